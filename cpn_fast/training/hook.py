"""The key ``hook``: a function of the user's that gets every line of metrics.jsonl (docs/logging.md).

It is called by the first process, where lines are written. What it raises never ends a training: the line waits, and is
given again before the next one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import read_note, write_json


@functools.cache
def load(name: str) -> Callable[[dict[str, Any]], object]:
    """The function that ``package.module:function`` or ``FILE.py:function`` names.

    Raises UserError if it cannot be imported, or does not take one argument.
    """
    place, _, wanted = name.rpartition(":")
    try:
        module = _of_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # the module is the user's: it may raise anything
        hint = f"; did you mean {place}.py:{wanted}?" if Path(f"{place}.py").is_file() else ""
        raise UserError(f"hook: {name} cannot be imported: {type(error).__name__}: {error}{hint}") from None
    function = getattr(module, wanted, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"hook: {place} has no function {wanted}; its functions are {', '.join(found) or 'none'}")
    try:
        inspect.signature(function).bind({})
    except TypeError as error:
        raise UserError(f"hook: {name} must take one argument, the line as a dict: {error}") from None
    except ValueError:  # a function of C may not tell
        pass
    return function


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()} is no file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Hook:
    """Hands lines to the function in their order, each once.

    ``hook.json`` in ``folder``, that of the metrics.jsonl, remembers the step up to which they were given, so that a
    continued training does not give its first lines again. ``told`` is put before every line's figures.
    """

    def __init__(self, name: str, folder: Path, told: dict[str, Any]) -> None:
        self.name, self.function, self.path, self.told = name, load(name), folder / "hook.json", told
        note = read_note(self.path)
        known = isinstance(note, dict) and note.get("hook") == name and isinstance(note.get("step"), int)
        self.given = note["step"] if known else 0
        self.waiting: deque[dict[str, Any]] = deque()
        self.failing = False

    def give(self, lines: Iterable[dict[str, Any]]) -> None:
        """Call the function with each line that it has not been given, until it raises."""
        self.waiting += [line for line in lines if line["step"] > self.given]
        before = self.given
        while self.waiting:
            line = self.waiting[0]
            try:
                self.function({**self.told, **line})
            except Exception as error:
                if not self.failing:
                    print(f"Warning: {self._complaint(line['step'], error)}", file=sys.stderr)
                self.failing = True
                break
            self.failing, self.given = False, line["step"]
            self.waiting.popleft()
        if self.given > before:
            write_json(self.path, {"hook": self.name, "step": self.given})

    def close(self) -> None:
        """Say what it has not taken to the end."""
        if self.waiting:
            first, there = self.waiting[0]["step"], self.path.with_name("metrics.jsonl")
            print(
                f"Warning: hook {self.name} has not taken {len(self.waiting)} lines, from step {first} on; they are in "
                f"{there}, and the same command gives them again",
                file=sys.stderr,
            )

    def _complaint(self, step: int, error: Exception) -> str:
        frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
        where = f" ({frames[0].filename}, line {frames[0].lineno})" if frames else ""
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        return f"hook {self.name} failed at step {step}: {said}{where}. Training goes on, and the next line tries again"
