"""Compile every Triton kernel configuration for each GPU architecture and report what the assembler made of it.

Needs no GPU: registers, stack, spills and shared memory are read from the cubin, tensor-core instructions from its
disassembly. A configuration passes when it has no stack frame and no spill, and a kernel with a product uses tensor
cores; the script exits with 1 where one does not. Shapes are those of the paper: C = 21, D = 192.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from timing import RESULTS, print_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cpn_fast.kernels import losses_triton, pixel_triton, region_triton
from cpn_fast.kernels.launch import family

ARCHITECTURES = (80, 86, 89, 90, 100)
DTYPES = {"bf16": "half", "fp16": "half", "fp32": "tf32"}
LIMITS = {80: (163, 64), 86: (99, 48), 89: (99, 48), 90: (227, 64), 100: (227, 64)}
"""Shared memory of a program in KiB and warps of a multiprocessor (CUDA C++ Programming Guide)."""
REGISTERS = 65536
SPILL = re.compile(r"\b(?:LDL|STL)\b")
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
POINTERS = {  # what is not of the products' dtype
    "out": "fp32", "total": "fp32", "norm": "fp32", "cam": "fp32", "high": "fp32", "highs": "fp32", "sums": "fp32",
    "along": "fp32", "partial": "fp32", "logits": "fp32", "d_cam": "fp32", "grad": "fp32",
    "table": "i32", "present": "i32", "state": "i32", "bins": "i32",
}  # fmt: skip
VALUES = ("g", "y", "z", "embedding", "features", "pooled", "keys", "queries")
GRADIENTS = ("d_embedding", "d_features", "d_logits", "d_queries")


@dataclass(frozen=True)
class Case:
    """One kernel with one configuration."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    config: triton.Config
    has_product: bool = False
    all_float32: bool = False


@dataclass(frozen=True)
class Result:
    kernel: str
    config: str
    dtype: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: str
    occupancy: float
    """Share of a multiprocessor's warps that registers and shared memory let it hold."""
    verdict: str


def cases(dtype: str, arch: int) -> Iterator[Case]:
    """Every configuration that may run for a dtype on an architecture."""
    key = (DTYPES[dtype], family(arch // 10))
    product = {"PRECISION": DTYPES[dtype]}
    pixel: dict[str, Any] = {"DK": 64, "CHUNKS": 3, "CB": 32, **product}
    plain = triton.Config({}, num_warps=4)
    regional = triton.Config({}, **region_triton.OPTIONS)
    yield Case("pixel prepare", pixel_triton._prepare_kernel, {"DP": 192, "CB": 32, "DK": 64, "BP": 32}, plain)
    for config in pixel_triton.FORWARD[key]:
        constants = {**pixel, "NORMALISE": True, "stride_op": 1}
        yield Case("pixel forward", pixel_triton._forward_kernel, constants, config, True)
    yield Case("pixel prepare backward", pixel_triton._prepare_backward_kernel, {"CB": 32, "BP": 32}, plain)
    for config in pixel_triton.BACKWARD[key]:
        yield Case("pixel backward", pixel_triton._backward_kernel, {**pixel, "stride_ed": 1}, config, True)

    region: dict[str, Any] = {"CB": 32, "BP": region_triton.BP, **product}
    pool, correlate = {**region, "BD": region_triton.BD}, {**region, "BE": region_triton.BD}
    yield Case("region pool", region_triton._pool_kernel, pool, regional, True)
    yield Case("region join", region_triton._join_kernel, {"DB": 256, "SB": region_triton.SPLITS}, regional)
    yield Case("region pool backward", region_triton._pool_backward_kernel, pool, regional, True)
    yield Case("region logits", region_triton._logits_kernel, correlate, regional, True)
    yield Case("region correlate", region_triton._correlate_kernel, {"SB": 64, "BP": 1024}, regional)
    yield Case("region correlate backward", region_triton._correlate_backward_kernel, correlate, regional, True)

    if dtype != "fp32":
        return
    t = losses_triton
    strips, tile, sums = {"STRIPS": t.STRIPS}, {"TILE": t.TILE}, {"SIDE": t.SIDE, "SUMS": t.SUMS}
    variant = {"BEFORE": False, "ONE_HOT": True, "BATCH": False}
    for own in (False, True):
        flag = {"OWN": own}
        for name, kernel, constants, has_product in (
            ("extrema", t._extrema_kernel, {**strips, **tile, "HAS_REFINED": True}, False),
            ("join", t._join_kernel, {**strips, "MIN_MAX": True}, False),
            ("histogram", t._histogram_kernel, {**variant, **tile, "SHIFT": 20, "WIDTH": 11, "BINS": t.BINS}, False),
            ("cpcr", t._cpcr_kernel, {**variant, **tile, **sums, "GRADIENTS": True}, True),
            (
                "finish",
                t._finish_kernel,
                {**tile, **sums, "MAP": 3, "GRADIENT": 1, "MIN_MAX": True, "BLOCKS": 16},
                True,
            ),
        ):
            label = f"losses {name}" + (" (own)" if own else "")
            config = triton.Config({}, num_warps=t.OPTIONS["num_warps"], num_stages=t.OPTIONS["num_stages"])
            yield Case(label, kernel, {**flag, **constants}, config, has_product, True)
    tcp: dict[str, Any] = {**tile, **sums, "MAP": 3, "PAIR": True, "GRADIENTS": True}
    plain = triton.Config({}, num_warps=t.OPTIONS["num_warps"], num_stages=t.OPTIONS["num_stages"])
    yield Case("losses tcp", t._tcp_kernel, tcp, plain, True, True)
    pick: dict[str, Any] = {"WIDTH": 10, "LAST": True, "SMALLEST": True, "BINS": t.BINS}
    yield Case("losses pick", t._pick_kernel, pick, plain, False, True)
    scores: dict[str, Any] = {**tile, "SHIFT": 20, "WIDTH": 11, "BINS": t.BINS}
    yield Case("suppression histogram", t._score_histogram_kernel, scores, plain, False, True)
    suppression: dict[str, Any] = {**tile, "SIDE": t.SIDE, "GRADIENTS": True}
    yield Case("suppression", t._suppression_kernel, suppression, plain, True, True)


def build(case: Case, dtype: str, arch: int) -> Result:
    """Compile one case and read its cubin."""
    function = case.kernel
    while not isinstance(function, triton.runtime.JITFunction):
        function = function.fn
    constants = {**case.constants, **case.config.kwargs}
    types = dict.fromkeys(VALUES + GRADIENTS, dtype) | POINTERS
    if case.name == "region pool backward":
        types["grad"] = dtype
    signature: dict[str, str] = {}
    attributes = {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        signature[name] = "constexpr" if name in constants else _type(name, types, case.all_float32)
        if signature[name].startswith("*") or name == "padded":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    if case.all_float32:
        options["enable_fp_fusion"] = False
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = _dump(file.name, "-res-usage"), _dump(file.name, "-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack, shared = int(found[1]), int(found[2]), compiled.metadata.shared
    spills, instructions = len(SPILL.findall(code)), sorted(set(TENSOR_CORE.findall(code)))
    config = " ".join(f"{k}={v}" for k, v in case.config.kwargs.items())
    warps = case.config.num_warps
    problems = [
        f"{stack} bytes of stack" if stack else "",
        f"{spills} spills" if spills else "",
        "no tensor cores" if case.has_product and not instructions else "",
        "" if shared <= LIMITS[arch][0] << 10 else "too much shared memory",
    ]
    return Result(
        case.name, f"{config} warps={warps} stages={case.config.num_stages}".strip(), dtype, arch, registers, stack,
        spills, shared, " ".join(instructions), _occupancy(arch, registers, shared, warps),
        ", ".join(filter(None, problems)) or "pass",
    )  # fmt: skip


def report(dtypes: list[str], archs: list[int], jobs: int = 1) -> list[Result]:
    """All results, in order."""
    work = [(case, dtype, arch) for arch in archs for dtype in dtypes for case in cases(dtype, arch)]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda item: build(*item), work))


def _type(name: str, types: dict[str, str], all_float32: bool) -> str:
    if name in types:
        return "*" + types[name]
    if name in ("eps", "scale", "factor"):
        return "fp32"
    if all_float32 and name in (
        "parts", "refined", "statistics", "visible", "cut", "d_tcp", "d_refined", "d_cpcr", "gradient", "maps",
    ):  # fmt: skip
        return "*fp32"
    return "i32"


def _occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    kilobytes, slots = LIMITS[arch]
    by_registers = REGISTERS // (max(registers, 1) * 32 * warps)
    by_shared = (kilobytes << 10) // shared if shared else slots
    return min(slots, warps * min(by_registers, by_shared)) / slots


def _dump(path: str, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if command is None:
        raise FileNotFoundError("cuobjdump: neither in triton's wheel nor on the PATH; install the CUDA toolkit")
    return subprocess.run([command, option, path], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kernel_report.json")
    options = parser.parse_args()
    rows = [asdict(result) for result in report(options.dtype, options.arch, options.jobs)]
    print_table(f"Triton {triton.__version__}", rows)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernel_report.json").write_text(
        json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n"
    )
    failed = sum(row["verdict"] != "pass" for row in rows)
    print(f"{len(rows)} configurations, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
