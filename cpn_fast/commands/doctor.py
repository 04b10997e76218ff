"""``cpn-fast doctor``: check everything that a run needs on this machine, and say how to fix faults."""

from __future__ import annotations

import importlib.metadata
import io
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text

import cpn_fast
from cpn_fast.config import Config, Superpixels
from cpn_fast.runtime import precision, terminal
from cpn_fast.runtime.errors import UserError

State = Literal["ok", "slow", "broken"]


class Finding(NamedTuple):
    """The result of a check."""

    state: State
    """``slow``: a run works, but not at its best."""
    found: str
    """What the check found, in words."""
    mend: str = ""
    """What the user can do."""


def run(config: Config | None) -> bool:
    """Print a finding for every part, and for a config's data if there is a config. Returns False if any is broken."""
    checks: dict[str, Callable[[], Finding]] = {
        "Python": python,
        "torch": pytorch,
        "GPU": gpu,
        "Triton": triton,
        "operations": operations,
        "DALI": dali,
        "superpixels": lambda: superpixels(Superpixels() if config is None else config.superpixels),
        "pydensecrf": dense_crf,
    }
    if config is not None:
        checks |= {
            "data": lambda: data(config),
            "weights": lambda: weights(config),
            "disk": lambda: disk(config.out),
        }
    if config is not None and config.hook is not None:
        checks["hook"] = lambda: hook(config)
    table = Table("", "state", "found", "how to fix it")
    findings = [examine(check) for check in checks.values()]
    colours = {"ok": "green", "slow": "yellow", "broken": "red"}
    for name, finding in zip(checks, findings, strict=True):
        state = Text(finding.state, style=colours[finding.state])
        table.add_row(name, state, finding.found, finding.mend, end_section=True)
    terminal.console().print(table)
    return all(finding.state != "broken" for finding in findings)


def examine(check: Callable[[], Finding]) -> Finding:
    """Return the finding of a check. An exception of the check is a finding too."""
    try:
        return check()
    except UserError as error:
        return Finding("broken", str(error))
    except Exception as error:  # a broken part may raise anything
        return Finding("broken", f"{type(error).__name__}: {error}", "make setup (installs every part anew)")


def python() -> Finding:
    found = f"{platform.python_version()}, cpn-fast {cpn_fast.__version__} on {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 10) or platform.system() != "Linux":
        return Finding("broken", found, "cpn-fast needs Python 3.10 or newer on Linux, as DALI does")
    return Finding("ok", found)


def pytorch() -> Finding:
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{torch.__version__}, {torch.get_num_threads()} CPU threads, {capability}, which trains in "
    found += f"{precision.default(torch.device('cpu'))} by default"
    if _driver() and torch.version.cuda is None:
        return Finding("slow", f"{found}; a CPU build, but there is a GPU", "pip install --force-reinstall torch")
    return Finding("ok", found)


def gpu() -> Finding:
    driver = _driver()
    if not torch.cuda.is_available():
        if driver and torch.version.cuda is not None:
            found = f"driver {driver} does not work with torch, which was built for CUDA {torch.version.cuda}"
            return Finding("broken", found, "update the NVIDIA driver")
        return Finding("slow", "none; everything runs on the CPU", "enough for the demo and configs/voc_mini.yaml")
    if torch.version.hip:
        mend = "torch for CUDA and an NVIDIA GPU; or HIP_VISIBLE_DEVICES=-1 to run on the CPU"
        return Finding("broken", f"torch {torch.__version__} for ROCm: DALI and the kernels need an NVIDIA GPU", mend)
    properties = torch.cuda.get_device_properties(0)
    found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
    if properties.major < 8:
        return Finding("slow", found, "a GPU of sm_80 or newer: the Triton kernels need it, and bf16 is slow before")
    return Finding("ok", f"{found}, driver {driver}")


def triton() -> Finding:
    version = importlib.metadata.version("triton")
    if not torch.cuda.is_available():
        return Finding("ok", f"{version}; not used without a GPU")
    from cpn_fast.kernels import pixel_correlation

    cam, embedding = torch.rand(1, 3, 9, 9, device="cuda"), torch.randn(1, 16, 9, 9, device="cuda")
    ours, plain = (pixel_correlation(cam, embedding, backend=backend) for backend in ("triton", "eager"))
    error = (ours - plain).abs().max().item()
    if error > 1e-2:
        mend = "install the version of triton that torch requires"
        return Finding("broken", f"{version}; a kernel has an error of {error:.2g}", mend)
    return Finding("ok", f"{version}; compiles and agrees with the plain formula")


def operations() -> Finding:
    """Tell which backend each operation takes in the precision of training, and why it is not the fastest one."""
    from cpn_fast.kernels import backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision_name = precision.default(device)
    operations_of: dict[tuple[str, str | None], list[str]] = {}
    for name, (backend, reason) in backends(device, precision.dtype(None, device)).items():
        operations_of.setdefault((backend, reason), []).append(name)
    found = "; ".join(f"{backend} for {', '.join(names)}" for (backend, _), names in operations_of.items())
    reasons = [reason for _, reason in operations_of if reason is not None]
    if device.type == "cuda" and reasons:
        return Finding("slow", f"in {precision_name}: {found}, because {'; '.join(reasons)}", "see docs/kernels.md")
    return Finding("ok", f"in {precision_name}: {found}")


def dali() -> Finding:
    """Decode a JPEG, a PNG of 8 bits and a PNG of 16 bits as training does."""
    from nvidia.dali import Pipeline, fn, types

    from cpn_fast.pipelines.decode import build

    rng = np.random.default_rng(0)
    maps: list[np.ndarray] = [
        rng.integers(0, 255, (24, 40)).astype(np.uint8),
        rng.integers(0, 9000, (24, 40)).astype(np.uint16),
    ]
    pipeline = Pipeline(1, 1, None)
    with pipeline:
        names = [fn.external_source(name=name) for name in ("jpeg", "gray", "deep")]
        outputs = [fn.decoders.image(names[0], device="cpu")]
        for name, dtype in zip(names[1:], (types.UINT8, types.UINT16), strict=True):
            outputs.append(fn.decoders.image(name, device="cpu", output_type=types.ANY_DATA, dtype=dtype))
        pipeline.set_outputs(*outputs)
    build(pipeline)
    smooth = np.broadcast_to(np.linspace(0, 255, 40)[None, :, None], (24, 40, 3)).astype(np.uint8)
    pipeline.feed_input("jpeg", [_encoded(smooth, "JPEG")])
    for name, picture in zip(("gray", "deep"), maps, strict=True):
        pipeline.feed_input(name, [_encoded(picture, "PNG")])
    jpeg, *pngs = (output.at(0).squeeze() for output in pipeline.run())
    version = importlib.metadata.version(next(name for name in _installed() if name.startswith("nvidia-dali-cuda")))
    wrong = [f"{picture.dtype} PNG" for picture, png in zip(maps, pngs, strict=True) if not (picture == png).all()]
    if np.abs(jpeg.astype(int) - smooth).max() > 8:
        wrong.append("JPEG")
    if wrong:
        return Finding("broken", f"{version}; wrong pixels from {', '.join(wrong)}", "install another DALI release")
    return Finding("ok", f"{version}; decodes JPEG and PNG of 8 and 16 bits")


BESIDE_TORCH = """
import sys; sys.path[:] = {path!r}
import torch
from pathlib import Path
from cpn_fast.pipelines import slic
slic.png_of_file(Path({image!r}), slic.Settings(200, 10.0, 10), 8, "")
"""
SHARED_LIBRARY = 'LDFLAGS="-Wl,--no-as-needed -l:libstdc++.so.6" pip install --force-reinstall --no-cache-dir '


def superpixels(settings: Superpixels) -> Finding:
    """Segment a photo as the cache does. With fast-slic, do so also in another process that has loaded torch."""
    from cpn_fast.commands.demo_data import generate
    from cpn_fast.data.images import read_image
    from cpn_fast.pipelines.superpixels import described, engine, segment

    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), train=1, val=1)
        image = next(Path(folder).rglob("*.jpg"))
        labels = segment(read_image(image), settings)
        found = f"{described(settings)}; {len(np.unique(labels))} superpixels where {settings.count} were asked for"
        if engine(settings) == "kernel":
            if torch.cuda.is_available():
                return Finding("ok", found)
            found += ". On a CPU the kernel's plain form makes them, which is slow"
            return Finding("slow", found, SHARED_LIBRARY + "--no-build-isolation fast-slic")
        script = BESIDE_TORCH.format(path=sys.path, image=str(image))
        finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if finished.returncode < 0:
        found += f"; beside torch it dies of {signal.Signals(-finished.returncode).name}. Runs still work: they keep it"
        found += " in separate processes"
        return Finding("slow", found, SHARED_LIBRARY + "--no-build-isolation --no-deps fast-slic")
    if finished.returncode > 0:
        return Finding("broken", f"{found}; beside torch: {finished.stderr.strip().splitlines()[-1]}", "make setup")
    return Finding("ok", f"{found}, beside torch too")


def dense_crf() -> Finding:
    from pydensecrf.densecrf import DenseCRF2D

    crf = DenseCRF2D(8, 6, 2)
    crf.setUnaryEnergy(np.ascontiguousarray(np.random.default_rng(0).random((2, 48)), np.float32))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    total = np.array(crf.inference(1)).sum(0)
    if np.abs(total - 1).max() > 1e-4:
        return Finding("broken", "its probabilities do not sum to 1", "pip install --no-build-isolation pydensecrf2")
    return Finding("ok", importlib.metadata.version("pydensecrf2"))


def data(config: Config) -> Finding:
    from cpn_fast.data.dataset import cannot_be_learned, cannot_be_scored, check_files, load_samples
    from cpn_fast.pipelines.shards import not_as_packed, training_list

    samples, shards = training_list(config)  # with shards, the loose files may be missing
    tags = np.stack([sample.label for sample in samples if sample.label is not None])
    source = config.data.train_list if shards is None else shards.folder
    negatives = int((~tags.any(1)).sum())
    found = f"{len(samples)} images in {source}, {tags.sum(1).mean():.2f} tags each"
    found += f", {negatives} of them negatives" if negatives else ""
    found += f", {sum(sample.mask is not None for sample in samples)} with a mask"
    doubts = cannot_be_learned(samples, config.classes)
    if shards is None:
        check_files(samples, workers=config.train.data_threads, classes=len(config.classes))
        scored = load_samples(config.data, config.classes, config.data.eval_list, labels=True, masks=None)
        doubts += cannot_be_scored(scored, config.classes, workers=config.train.data_threads)
    else:
        with suppress(UserError):  # the loose files may be on another machine
            loose = load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=None)
            doubts += filter(None, [not_as_packed(shards, loose)])
    if doubts:
        return Finding("slow", "; ".join([found, *doubts]), "correct the tags or the ground truth before you train")
    try:
        load_samples(config.data, config.classes, config.segment.eval_list, labels=False, masks=False)
    except UserError as error:
        return Finding("slow", f"{found}; segment.eval_list: {error}", "name another list: `segment` and `run` need it")
    return Finding("ok", found)


def weights(config: Config) -> Finding:
    from cpn_fast.models.network import build_network
    from cpn_fast.models.pretrained import load_pretrained

    new_layers = load_pretrained(build_network(config), config.model)
    if config.model.weights is None:
        return Finding("ok", "none (model.weights is null)")
    found = f"{config.model.weights} fits {config.model.backbone}"
    return Finding("ok", f"{found}; new layers: {', '.join(new_layers) or 'none'}")


def hook(config: Config) -> Finding:
    from cpn_fast.training.hook import load

    assert config.hook is not None
    load(config.hook)
    return Finding("ok", f"{config.hook} can be called")


def disk(out: Path) -> Finding:
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # a kill leaves no file
            file.write(b"0")
    except OSError as error:
        mend = "allow yourself to write there, or name another folder with --set out=FOLDER"
        return Finding("broken", f"{folder} cannot be written: {error.strerror}", mend)
    free = shutil.disk_usage(folder).free / 2**30
    # ResNet38d's two kept checkpoints take 1.7 GB. VOC's seeds take 230 kB a class, 0.5 to 4 GB together.
    if free < 8:
        return Finding("slow", f"{free:.1f} GiB free in {folder}", "make room: a full VOC run writes up to 6 GB")
    return Finding("ok", f"{free:.0f} GiB free in {folder}")


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, or None without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    finished = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return finished.stdout.split("\n")[0] if finished.returncode == 0 else None


def _installed() -> list[str]:
    return [distribution.metadata["Name"] for distribution in importlib.metadata.distributions()]


def _encoded(picture: np.ndarray, form: str) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form)
    return np.frombuffer(file.getvalue(), np.uint8)
