"""Compile every Triton kernel configuration for each GPU architecture, and report the assembler's result.

It needs no GPU: registers, stack, spills and shared memory are read from the cubin, tensor-core instructions from its
disassembly. A configuration passes if it has no stack frame and no spill, and if a kernel with a product uses tensor
cores. The script exits with 1 if one fails. Kernels are compiled for the blocks of the paper's C = 21 and D = 192, and
for the extreme blocks of other numbers of channels and classes (``--shapes paper`` leaves these out).

A second table counts the work of each kernel in training: useful FLOPs, FLOPs with padding, bytes to and from memory,
and the lower bound of its time on an H100.
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

from cpn_fast.kernels import (
    losses_triton,
    pixel_triton,
    region_triton,
    selection_triton,
    slic_triton,
    suppression_triton,
    upsampled_triton,
)
from cpn_fast.kernels.launch import Blocks, family, fitting

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = {"bf16": "half", "fp16": "half", "fp32": "tf32"}
LIMITS = {80: (164, 64), 86: (100, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48)}
"""Shared memory in KiB and warps of a multiprocessor (CUDA C++ Programming Guide)."""
RESERVED = 1 << 10  # bytes of shared memory that CUDA reserves in every program
REGISTERS = 65536
SPILL = re.compile(r"\b(?:LDL|STL)\b")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
BACK = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
POINTERS = {  # arguments that do not have the products' dtype
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
    pipelined: bool = False
    """Whether its loop must copy ahead of its products."""
    all_float32: bool = False
    whole: dict[str, str] | None = None
    """Argument types of a kernel of integers; other arguments are i32."""

    @property
    def options(self) -> str:
        blocks = [f"{name}={value}" for name, value in self.config.kwargs.items()]
        return " ".join([*blocks, f"warps={self.config.num_warps}", f"stages={self.config.num_stages}"])


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
    loop: int
    """Instructions of the loop with the products; 0 without a loop."""
    copies: int
    """Asynchronous copies to shared memory in the loop."""
    loads: int
    """Synchronous loads in the loop."""
    occupancy: float
    """Share of a multiprocessor's warps for which registers and shared memory are enough."""
    verdict: str


BLOCKS = ((64, 3, 32), (64, 3, 16), (64, 4, 128), (64, 4, 16), (64, 3, 128), (64, 3, 64), (64, 1, 128), (16, 1, 16))
"""Channels in one product, how many products, and columns of classes; the paper's first."""
LAYOUTS: dict[str, dict[str, int]] = {
    "NCHW": {"stride_ep": 1, "stride_cp": 1, "stride_gp": 1, "stride_op": 1},
    "NHWC": {"stride_ed": 1, "stride_cc": 1, "stride_gc": 1, "stride_oc": 1},
}
"""The strides that are 1."""
REGION_BLOCKS = (32, 64, 16)
"""Classes; the paper's first."""


def configuration(blocks: Blocks) -> triton.Config:
    sizes = {"BM": blocks.targets, "BN": blocks.sources, "RESIDENT": blocks.resident}
    return triton.Config(sizes, num_warps=blocks.warps, num_stages=blocks.stages)


def cases(dtype: str, arch: int, shapes: str) -> Iterator[Case]:
    """Yield every configuration that may run for a dtype on an architecture."""
    numbers, gpu = DTYPES[dtype], family(arch // 10)
    product = {"PRECISION": numbers}
    plain = triton.Config({}, num_warps=4)
    for dk, chunks, cb in BLOCKS if shapes == "all" else BLOCKS[:1]:
        size, channels = f" D={dk * chunks} CB={cb}", dk * chunks
        pixel: dict[str, Any] = {"DK": dk, "CHUNKS": chunks, "CB": cb, **product}
        for layout, strides in LAYOUTS.items():
            prepare = {"DK": dk, "CHUNKS": chunks, "CB": cb, "BP": 32, **strides}
            yield Case(f"pixel prepare {layout}" + size, pixel_triton._prepare_kernel, prepare, plain)
            constants = {"CB": cb, "BP": 32, **strides}
            name = f"pixel prepare backward {layout}" + size
            yield Case(name, pixel_triton._prepare_backward_kernel, constants, plain)
        constants = {**pixel, "NORMALISE": True, "stride_op": 1}
        blocks = fitting(pixel_triton.FORWARD, numbers, gpu, channels, cb)
        yield Case("pixel forward" + size, pixel_triton._forward_kernel, constants, configuration(blocks), True, True)
        for groups in (1, 2) if cb == 128 else (1,):
            blocks = fitting(pixel_triton.BACKWARD, numbers, gpu, channels, cb * groups)
            constants = {**pixel, "CP": min(pixel_triton.CP, cb), "UNROLLED": blocks.unrolled}
            name = "pixel backward" + size + (" groups" if groups > 1 else "")
            yield Case(name, pixel_triton._backward_kernel, constants, configuration(blocks), True, blocks.unrolled)

    if dtype == "bf16":  # kernels of integers do not depend on the dtype
        yield from superpixel_cases()

    regional = triton.Config({}, **region_triton.OPTIONS)
    join = {"DB": region_triton.JOINED, "SB": region_triton.SPLITS}
    yield Case("region join", region_triton._join_kernel, join, regional)
    yield Case("region correlate", region_triton._correlate_kernel, {"SB": 64, "BP": 1024}, regional)
    for cb in REGION_BLOCKS if shapes == "all" else REGION_BLOCKS[:1]:
        regional = triton.Config({}, **region_triton.options(cb, numbers))
        region: dict[str, Any] = {"CB": cb, "BP": region_triton.BP, **product}
        pool, correlate = {**region, "BD": region_triton.BD}, {**region, "BE": region_triton.BD}
        yield Case(f"region pool CB={cb}", region_triton._pool_kernel, pool, regional, True)
        name = f"region pool backward CB={cb}"
        wanted = {"OF_CAM": True, "OF_FEATURES": True}
        backward = triton.Config({}, **region_triton.pool_backward_options(cb, numbers, gpu))
        yield Case(name, region_triton._pool_backward_kernel, {**pool, **wanted}, backward, True)
        yield Case(f"region logits CB={cb}", region_triton._logits_kernel, correlate, regional, True)
        name = f"region correlate backward CB={cb}"
        wanted = {"OF_CAM": True, "OF_LOGITS": True, "OF_QUERIES": True}
        yield Case(name, region_triton._correlate_backward_kernel, {**correlate, **wanted}, regional, True)

    if dtype != "fp32":
        return
    t = losses_triton
    strips, tile, side = {"STRIPS": t.STRIPS}, {"TILE": upsampled_triton.TILE}, {"SIDE": upsampled_triton.SIDE}
    digit = {"SHIFT": 20, "WIDTH": 11, "BINS": selection_triton.BINS}
    options = upsampled_triton.OPTIONS
    plain = triton.Config({}, num_warps=options["num_warps"], num_stages=options["num_stages"])
    variant = {"BEFORE": False, "ONE_HOT": True, "BATCH": False}
    for own in (False, True):
        flag = {"OWN": own}
        for name, kernel, constants, has_product in (
            ("extrema", t._extrema_kernel, {**strips, **tile, "HAS_REFINED": True}, False),
            ("join", t._join_kernel, {**strips, "MIN_MAX": True}, False),
            ("histogram", t._histogram_kernel, {**variant, **tile, **digit}, False),
            ("cpcr", t._cpcr_kernel, {**variant, **tile, **side, "GRADIENTS": True}, True),
            ("finish", t._finish_kernel, {**tile, **side, "FIRST": 0, "MIN_MAX": True, "BLOCKS": 16}, True),
        ):
            label = f"losses {name}" + (" (own)" if own else "")
            yield Case(label, kernel, {**flag, **constants}, plain, has_product, all_float32=True)
    for name, of_map in (("losses tcp", 0), ("losses tcp refined", 3)):
        tcp: dict[str, Any] = {**tile, **side, "MAP": of_map, "PAIR": of_map == 3, "GRADIENTS": True}
        yield Case(name, t._tcp_kernel, tcp, plain, True, all_float32=True)
    for name, directions, batch in (("losses classes", 2, True), ("suppression classes", 1, False)):
        classes = {"DIRECTIONS": directions, "BATCH": batch, "CHOICE": True, "CB": 32}
        yield Case(name, selection_triton.classes_kernel, classes, plain, all_float32=True)
    pick: dict[str, Any] = {"WIDTH": 10, "LAST": True, "SMALLEST": True, "BINS": selection_triton.BINS}
    yield Case("losses pick", selection_triton.pick_kernel, pick, plain, all_float32=True)
    scores: dict[str, Any] = {**tile, **digit}
    yield Case("suppression histogram", suppression_triton._score_histogram_kernel, scores, plain, all_float32=True)
    suppression: dict[str, Any] = {**tile, **side, "GRADIENTS": True}
    yield Case("suppression", suppression_triton._suppression_kernel, suppression, plain, True, all_float32=True)


def superpixel_cases() -> Iterator[Case]:
    s = slic_triton
    assign, pixels, join = (triton.Config({}, **options) for options in (s.ASSIGN, s.PIXELS, s.JOIN))
    ints = dict.fromkeys(
        ("packed", "light", "curve", "labels", "parents", "centres", "sizes", "regions", "roots", "numbers"), "*i32"
    ) | {"images": "*u8", "mask": "*u8", "sums": "*i64", "best": "*i64", "weight": "i64"}
    warp, block = {"BLOCK": s.WARP}, {"BLOCK": s.BLOCK}
    for first, last in ((True, False), (False, False), (False, True)):
        flags = {"HAS_MASK": True, "FIRST": first, "LAST": last, "PART": s.PART}
        name = "slic assign" + " first" * first + " last" * last
        yield Case(name, s._assign_kernel, {**flags, **warp}, assign, whole=ints)
    yield Case("slic means", s._means_kernel, warp, assign, whole=ints)
    for name, kernel in (
        ("colours", s._colours_kernel), ("link", s._link_kernel), ("root", s._root_kernel), ("number", s._number_kernel)
    ):  # fmt: skip
        yield Case(f"slic {name}", kernel, block, pixels, whole=ints)
    yield Case("slic join", s._join_kernel, {"BLOCK": s.JOINED}, join, whole=ints | {"parts": "*i32"})


def compiled(case: Case, dtype: str, arch: int) -> Any:
    """Compile one case; the result's ``asm`` holds its TTIR, PTX and cubin."""
    function = case.kernel
    while not isinstance(function, triton.runtime.JITFunction):
        function = function.fn
    names = {parameter.name for parameter in function.params}
    constants = {name: value for name, value in case.constants.items() if name in names} | case.config.kwargs
    types = dict.fromkeys(VALUES + GRADIENTS, dtype) | POINTERS
    if case.kernel is region_triton._pool_backward_kernel:
        types["grad"] = dtype
    elif dtype == "fp16":  # divided by a scale (launch.half_scale), these are float32
        types |= {"d_embedding": "fp32", "d_queries": "fp32"}
    signature: dict[str, str] = {}
    attributes = {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif case.whole is not None:
            signature[name] = case.whole.get(name, "i32")
        else:
            signature[name] = _type(name, types, case.all_float32)
        if signature[name].startswith("*") or name == "padded":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    if case.all_float32:
        options["enable_fp_fusion"] = False
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def build(case: Case, dtype: str, arch: int) -> Result:
    """Compile one case and read its cubin."""
    kernel = compiled(case, dtype, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = _dump(file.name, "-res-usage"), _dump(file.name, "-sass")
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    registers, stack, shared = int(match[1]), int(match[2]), kernel.metadata.shared
    spills, instructions = len(SPILL.findall(code)), sorted(set(TENSOR_CORE.findall(code)))
    loop = main_loop(code) if case.has_product else []
    copies, loads = (sum(name in line for line in loop) for name in ("LDGSTS", "LDG."))
    problems = [
        f"{stack} bytes of stack" if stack else "",
        f"{spills} spills" if spills else "",
        "no tensor cores" if case.has_product and not instructions else "",
        "loop is not pipelined" if case.pipelined and not copies else "",
        "" if shared + RESERVED <= LIMITS[arch][0] << 10 else "too much shared memory",
        "too much tensor memory" if (getattr(kernel.metadata, "tmem_size", 0) or 0) > 512 else "",
    ]
    return Result(
        case.name, case.options, dtype, arch, registers, stack, spills, shared, " ".join(instructions),
        len(loop), copies, loads,
        _occupancy(arch, registers, shared, case.config.num_warps),
        ", ".join(filter(None, problems)) or "pass",
    )  # fmt: skip


def main_loop(sass: str) -> list[str]:
    """Return the instructions of the longest loop with tensor-core products."""
    lines = [(int(match[1], 16), match[2]) for match in INSTRUCTION.finditer(sass)]
    longest: list[str] = []
    for address, text in lines:
        jump = BACK.search(text)
        if jump and int(jump[1], 16) < address:
            body = [line for at, line in lines if int(jump[1], 16) <= at <= address]
            if len(body) > len(longest) and any(TENSOR_CORE.search(line) for line in body):
                longest = body
    return longest


def report(dtypes: list[str], archs: list[int], shapes: str, jobs: int = 1) -> list[Result]:
    """Return all results, in order."""
    work = [(case, dtype, arch) for arch in archs for dtype in dtypes for case in cases(dtype, arch, shapes)]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda job: build(*job), work))


def _type(name: str, types: dict[str, str], all_float32: bool) -> str:
    if name in types:
        return "*" + types[name]
    if name in ("eps", "scale", "factor", "factor_cpcr"):
        return "fp32"
    if all_float32 and name in (
        "parts", "refined", "statistics", "visible", "cut", "d_refined", "gradient", "maps", "moments", "labels",
    ):  # fmt: skip
        return "*fp32"
    return "i32"


def _occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    kilobytes, slots = LIMITS[arch]
    by_registers = REGISTERS // (-(-max(registers, 1) // 8) * 8 * 32 * warps)  # a warp gets multiples of 256
    by_shared = (kilobytes << 10) // (shared + RESERVED)
    return min(slots, warps * min(by_registers, by_shared)) / slots


def _dump(path: str, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if command is None:
        raise FileNotFoundError("cuobjdump: not in triton's wheel and not on the PATH; install the CUDA toolkit")
    return subprocess.run([command, option, path], capture_output=True, text=True, check=True).stdout


def model() -> list[dict[str, Any]]:
    """Return the work of each kernel in a training step: 12 images, 56 x 56 maps, losses at 448 x 448, bfloat16.

    slic has 4 crops. An upsampled and normalised value takes 12 FLOPs. Losses see K = 1.56 present classes an image.
    Pixels on the rim of a 16 x 16 block are computed for both blocks. ``floor`` is the larger of FLOPs over the H100's
    rate (798 TFLOP/s dense bfloat16, measured in another run; 67 TFLOP/s float32 without tensor cores) and bytes over
    3.35 TB/s.
    """
    n, p, d, c, f = 12, 56 * 56, 192, 21, 195
    padded, columns = -(-p // pixel_triton.PAD) * pixel_triton.PAD, 32
    k, large = 1.56, 448 * 448
    rim = ((upsampled_triton.SIDE + 1) / upsampled_triton.SIDE) ** 2
    sample, maps, fold = 12, losses_triton.MAPS, 2 * 2 * upsampled_triton.TILE  # FLOPs a pixel
    small_map = 4 * n * p
    rows: list[tuple[str, float, float, float, float]] = [  # useful and executed FLOPs, bytes, FLOP/s
        ("pixel prepare", 4 * n * p * d, 4 * n * padded * d, 2 * n * (p * (d + c) + padded * (d + columns)), 67e12),
        (
            "pixel forward", 2 * n * p * p * (d + c), 2 * n * padded**2 * (d + columns),
            2 * n * (padded * (d + columns) + p * c), 798e12,
        ),
        (
            "pixel prepare backward", 3 * n * p * c, 3 * n * padded * columns,
            2 * n * (2 * p * c + padded * columns), 67e12,
        ),
        (
            "pixel backward", 4 * n * p * p * (d + c), 4 * n * padded**2 * (d + columns),
            2 * n * (padded * (d + 2 * columns) + p * d), 798e12,
        ),
        ("region pool", 2 * n * p * c * f, 2 * n * p * columns * 256, 2 * n * p * (c + f), 798e12),
        ("region pool backward", 4 * n * p * c * f, 4 * n * p * columns * 256, 4 * n * p * (c + f), 798e12),
        ("region logits", 2 * n * p * c * d, 2 * n * p * columns * d, n * p * (2 * d + 4 * c), 798e12),
        ("region correlate", 3 * n * p * c, 3 * n * p * c, 8 * n * p * c, 67e12),
        (
            "region correlate backward", 4 * n * p * c * d, 2 * n * p * (columns + c) * d,
            n * p * (4 * d + 14 * c), 798e12,
        ),
        ("losses extrema", maps * n * k * large * sample, maps * n * k * large * sample, maps * k * small_map, 67e12),
        (
            "losses tcp, raw and refined", 6 * n * k * large * sample,
            n * k * large * rim * (6 * sample + 4 * 3 * fold), 10 * k * small_map, 67e12,
        ),
        (
            "losses cpcr", 5 * n * k * large * sample,
            n * (k + 1) * large * rim * (5 * (k + 1) * sample + 2 * 3 * fold), 7 * k * small_map, 67e12,
        ),
        (
            "losses finish", maps * n * k * large * sample, maps * n * k * large * rim * sample,
            3 * maps * k * small_map, 67e12,
        ),
        # integer operations: a pixel has 9 distances of 16 in 10 rounds, and 27 sums of 2 in 10; 64 per clock and SM
        ("slic assign", 4 * large * 10 * 9 * (16 + 6), 4 * large * 10 * 9 * (16 + 6), 4 * large * 11 * 4, 14.8e12),
        ("slic without assign", 4 * large * 200, 4 * large * 200, 4 * large * 100, 14.8e12),
    ]  # fmt: skip
    return [
        {
            "kernel": name,
            "useful GFLOP": useful / 1e9,
            "executed GFLOP": executed / 1e9,
            "MB": moved / 1e6,
            "bound by": "arithmetic" if useful / rate > moved / 3.35e12 else "memory",
            "floor us": max(useful / rate, moved / 3.35e12) * 1e6,
        }
        for name, useful, executed, moved, rate in rows
    ]


def one_row_a_line(content: dict[str, Any]) -> str:
    """Return JSON with one row of a list on each line, so that a diff shows the rows that changed."""
    entries = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--shapes", default="all", choices=("all", "paper"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kernel_report.json")
    options = parser.parse_args()
    rows = [asdict(result) for result in report(options.dtype, options.arch, options.shapes, options.jobs)]
    print_table(f"Triton {triton.__version__}", rows)
    counted = model()
    print_table("Counted per training step: 12 images, 56 x 56, losses at 448 x 448", counted)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"triton": triton.__version__, "model": counted, "rows": rows}
    (options.out / "kernel_report.json").write_text(one_row_a_line(content))
    failed = sum(row["verdict"] != "pass" for row in rows)
    print(f"{len(rows)} configurations, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
