"""Run the tests that need a GPU (``@pytest.mark.gpu``), and time them.

    python bench/gpu_tests.py [--out FOLDER]

Exits with 1 if one fails. The JSON file has its output.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from timing import ROOT, arguments, folder, machine, print_table, write_json


class Rows:
    """A plugin of pytest that writes the results after every test."""

    def __init__(self, write: Any) -> None:
        self.rows: list[dict[str, Any]] = []
        self.write = write

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.add(report.nodeid, report.outcome, report.duration, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:  # a module that cannot be imported, for example without DALI
            self.add(report.nodeid, report.outcome, 0.0, report.longreprtext)

    def add(self, test: str, outcome: str, seconds: float, words: str) -> None:
        self.rows.append({"test": test, "outcome": outcome, "s": seconds, "words": words[-2000:]})
        self.write(self.rows, finished=False)


def modules() -> list[str]:
    """Return the files of tests that have a test for GPUs."""
    return [str(file) for file in sorted(ROOT.glob("tests/**/test_*.py")) if "@pytest.mark.gpu" in file.read_text()]


def main() -> int:
    options = arguments(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU: pytest would skip all of these tests")
    device = torch.device("cuda")
    described, path = machine(device), folder(options.out, device) / "gpu_tests.json"
    results = Rows(lambda rows, finished: write_json(path, described, rows, finished=finished))
    flags = ["-m", "gpu", "--continue-on-collection-errors", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    code = pytest.main([*flags, *modules()], plugins=[results])
    results.write(results.rows, finished=True)
    print_table("GPU tests", [{key: row[key] for key in ("test", "outcome", "s")} for row in results.rows])
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
