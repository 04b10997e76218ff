"""Weight files: .safetensors, .pth and .pt, and MXNet's .params (ResNet38's ImageNet weights) without mxnet.

In memory and on disk, tensors have the released names: ``conv1a.weight``, ``fc8.weight``. The network holds its
backbone as a submodule: ``backbone.conv1a.weight``. ``to_network_keys`` and ``to_released_keys`` translate.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib.util
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cpn_fast.config import BACKBONES, PACKAGE, TIMM_WEIGHTS, Config, Model
from cpn_fast.models import build_backbone
from cpn_fast.models.mxnet import Content, read_params
from cpn_fast.models.network import HEADS
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, is_unread, unread
from cpn_fast.runtime.files import create, replacing

FINAL = "model.safetensors"
"""A run's weights after its last step."""
BEST = "best.safetensors"
"""A run's weights with the highest score of ``train.validate_every``."""
_SHOWN = 5
_NOTE = "cpn_fast"
"""Key of our entry in a file's metadata."""
_NOT_TRAINED = ("running_mean", "running_var", "num_batches_tracked")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file on the CPU, by released names.

    A .pth or .pt file is a state dict, bare or under ``state_dict`` or ``model`` (training checkpoints). Prefixes of
    data parallelism and compilation are removed. A .params file is ResNet38's, and its ImageNet classifier is left out.
    ``package:NAME`` stands for the only weight file in an installed Python package. No code in a file is executed.
    Raises UserError for a missing, damaged or foreign file, and for weights that are not finite.
    """
    return _read(in_package(path)).tensors


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], *, config: str = "", training: Mapping[str, Any] | None = None
) -> None:
    """Write a .safetensors file with a checksum that ``read_weights`` compares.

    Files of a run also have its config (YAML) and plain values of its ``training``: the ``step`` of the weights, and
    the score of the best ones.
    """
    with replacing(path) as file:
        file.write(_serialised(tensors, config, training))


def _serialised(tensors: Mapping[str, Tensor], config: str = "", training: Mapping[str, Any] | None = None) -> bytes:
    """Return the bytes of a .safetensors file. The same tensors give the same bytes.

    The metadata has only one entry, since several would have no fixed order.
    """
    # Copies: views would keep their whole storage, and safetensors refuses shared storage.
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    note = {"config": config} if training is None else {"config": config, "training": dict(training)}
    text = json.dumps({"sha256": _digest(copies, note), **note})
    return safetensors.torch.save(copies, metadata={_NOTE: text})


def weights_of(run: Path, config: Config) -> Path:
    """Return the file of a run's weights for later stages, which ``train.use_weights`` selects.

    Raises UserError if these are the best weights and the file does not exist.
    """
    if config.train.use_weights == "last":
        return run / FINAL
    if not (run / BEST).exists():
        raise UserError(
            f"train.use_weights is best, but there is no {run / BEST}: only training with "
            "train.validate_every writes it. Set train.use_weights to last, or raise train.steps to train longer"
        )
    return run / BEST


def training_of(path: Path) -> dict[str, Any]:
    """Return the ``training`` of ``write_weights``; empty for other files, and for those of earlier versions."""
    training = note_of(path).get("training")
    return training if isinstance(training, dict) else {}


def note_of(path: Path) -> dict[str, Any]:
    """Return our entry in a .safetensors file's metadata; empty if there is none.

    Raises UserError if the system cannot read the file: a finished run must not pass for one that has made no step.
    """
    try:
        with _safetensors(path) as file:
            note = json.loads((file.metadata() or {})[_NOTE])
    except (OSError, safetensors.SafetensorError, ValueError, LookupError, TypeError) as error:
        if is_unread(error):
            raise unread(path, error) from None
        return {}
    return note if isinstance(note, dict) else {}


def is_whole(path: Path) -> bool:
    """Return whether a .safetensors file exists and is complete. A file that was cut short is named on stderr.

    Raises UserError if its content does not match its checksum, and if the system cannot read it.
    """
    if not path.is_file():
        return False
    try:
        with _safetensors(path):
            pass
        _read_safetensors(path)
    except safetensors.SafetensorError as error:
        print(f"Warning: {path} is damaged ({error}) and made again", file=sys.stderr)
        return False
    except OSError as error:
        raise unread(path, error) from None
    return True


def require_finite(scores: np.ndarray, weights: Path | str, image: str) -> None:
    """Raise UserError, which names the weights, if a network's output for an image is not finite."""
    if not np.isfinite(scores).all():
        raise UserError(
            f"{weights}: the network's output for {image} is not finite. The weights are damaged, or too large for the "
            "precision: set train.precision to fp32, or use other weights"
        )


def _digest(tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(note["config"].encode(errors="backslashreplace"))
    if "training" in note:
        digest.update(json.dumps(note["training"], sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def in_package(path: Path) -> Path:
    """Return the weight file that ``package:NAME`` stands for. Any other path is returned unchanged.

    NAME is the name of the package or of its module. Raises UserError if the package is not installed, or if it does
    not have exactly one weight file.
    """
    if not str(path).startswith(PACKAGE):
        return path
    name = str(path).removeprefix(PACKAGE)
    try:
        spec = importlib.util.find_spec(name.replace("-", "_"))
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: no package {name} is installed; try `pip install {name}`")
    files = [file for root in spec.submodule_search_locations for file in Path(root).rglob("*")]
    matches = sorted(file for file in files if file.suffix in (".safetensors", ".pth", ".pt"))
    if len(matches) != 1:
        names = ", ".join(file.name for file in matches) or "none"
        raise UserError(f"{path}: expected one file of weights in that package, found {names}; name the file itself")
    return matches[0]


def content_of(path: Path | None) -> str | None:
    """Return the SHA-256 of a file of weights; None without one, for timm's download, and if it cannot be read."""
    if path is None or path == TIMM_WEIGHTS:
        return None
    try:
        return reading.sha256(in_package(path), reading.WEIGHTS)
    except (OSError, UserError):
        return None


def to_network_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename released names to ``Network``'s: all names but those of heads get the prefix ``backbone.``."""
    return {key if key.split(".")[0] in HEADS else f"backbone.{key}": tensor for key, tensor in tensors.items()}


def to_released_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``Network``'s names to released ones. Released names stay. Raises UserError if two become the same."""
    released = {key.removeprefix("backbone."): tensor for key, tensor in tensors.items()}
    if len(released) < len(tensors):
        twice = next(key for key in tensors if key.startswith("backbone.") and key.removeprefix("backbone.") in tensors)
        raise UserError(f"{twice} and {twice.removeprefix('backbone.')} are two names of one weight: remove one")
    return released


class Loaded(NamedTuple):
    """The keys that ``load_into`` was allowed to ignore."""

    missing: list[str]
    unexpected: list[str]


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: Path | str,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> Loaded:
    """Copy tensors into a module. Their keys and shapes must match, or nothing is copied.

    ``allow_missing`` and ``allow_unexpected`` are key patterns such as ``fc8.*``. Batch normalisation's
    ``num_batches_tracked`` is optional. Raises UserError that names ``source`` and lists all kinds of mismatches.
    """
    expected = module.state_dict()
    ignored = _compared(expected, tensors, source, allow_missing, allow_unexpected)
    shared = {key: tensor for key, tensor in tensors.items() if key in expected and not _is_counter(key)}
    module.load_state_dict(shared, strict=False)
    return ignored


def _compared(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: Path | str,
    allow_missing: Iterable[str],
    allow_unexpected: Iterable[str],
) -> Loaded:
    allow_missing, allow_unexpected = list(allow_missing), list(allow_unexpected)
    absent = [key for key in expected if key not in tensors and not _is_counter(key)]
    surplus = [key for key in tensors if key not in expected and not _is_counter(key)]
    missing = [key for key in absent if not _matches(key, allow_missing)]
    unexpected = [key for key in surplus if not _matches(key, allow_unexpected)]
    other_kind = [
        key
        for key, tensor in tensors.items()
        if key in expected and not _is_counter(key) and not _alike(tensor, expected[key])
    ]
    if missing or unexpected or other_kind:
        lines = [f"{source}: the weights do not fit the model"]
        lines += _section("missing", [_with_rename(key, expected[key], unexpected, tensors) for key in missing])
        lines += _section("unexpected", [f"{key} {_kind(tensors[key])}" for key in unexpected])
        lines += _section(
            "of another shape or type",
            [f"{key}: expected {_kind(expected[key])}, found {_kind(tensors[key])}" for key in other_kind],
        )
        lines.append("Check model.backbone, classes and the model's other keys against the file's origin.")
        raise UserError("\n".join(lines))
    return Loaded(absent, surplus)


@dataclass(frozen=True)
class Conversion:
    """The result of ``convert``; ``str`` describes it in words."""

    destination: Path
    tensors: int
    parameters: int
    """Elements of all tensors but batch normalisation's statistics."""
    dropped: tuple[str, ...]
    """Entries of the source that are not in the destination."""

    def __str__(self) -> str:
        text = f"{self.destination}: {self.tensors} tensors, {self.parameters:,} parameters"
        return f"{text}; left out {', '.join(self.dropped)}" if self.dropped else text


def convert(source: Path, destination: Path) -> Conversion:
    """Rewrite a weight file as .safetensors or .pth (a bare state dict), by released names.

    Raises UserError for an unreadable source, for weights that are not exactly one of our backbones with any heads, and
    for a destination with another suffix or with other content.
    """
    if destination.suffix not in (".safetensors", ".pth"):
        suffix = destination.suffix or "no suffix"
        raise UserError(f"{destination}: can write .safetensors, .pth and, of a run, .pt2, not {suffix!r}")
    content = _read(source)
    _check_backbone(source, content.tensors)
    if destination.suffix == ".pth":
        # Copies: views would keep their whole storage.
        tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in content.tensors.items()}
        file = BytesIO()
        torch.save(tensors, file)
        create(destination, file.getvalue())
    else:
        tensors = content.tensors
        create(destination, _serialised(tensors))
    trained = [tensor for key, tensor in tensors.items() if key.rpartition(".")[2] not in _NOT_TRAINED]
    return Conversion(destination, len(tensors), sum(tensor.numel() for tensor in trained), tuple(content.dropped))


def _check_backbone(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare with the backbone that shares most names. Weights of timm (``timm.*``) are not checked."""
    if any(key.startswith("timm.") for key in tensors):
        return
    with torch.device("meta"):
        backbones = [build_backbone(Model(backbone=name)) for name in BACKBONES]
    nearest = max(backbones, key=lambda backbone: len(backbone.state_dict().keys() & tensors.keys()))
    heads = [f"{head}.*" for head in HEADS]
    _compared(nearest.state_dict(), tensors, source, [], [*heads, *nearest.classifier])


def _read(path: Path) -> Content:
    readers = {".safetensors": _read_safetensors, ".pth": _read_torch, ".pt": _read_torch, ".params": read_params}
    if path.suffix not in readers:
        raise UserError(f"{path}: expected a weight file that ends in {', '.join(readers)}")
    if not path.exists():
        existing = ", ".join(sorted(str(file) for file in path.parent.glob("*") if file.suffix in readers))
        raise UserError(
            f"{path}: no such file of weights. There are: {existing or 'none in that folder'}. `cpn-fast train` writes "
            "model.safetensors; docs/voc.md says where pretrained weights come from"
        )
    try:
        reading.require_regular(path, reading.WEIGHTS)
        content = readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not content.tensors:
        raise UserError(f"{path}: holds no weights")
    for key, tensor in content.tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise UserError(f"{path}: {key} is sparse or quantised; expected dense tensors")
        if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            raise UserError(
                f"{path}: {int((~finite).sum()):,} of the {tensor.numel():,} numbers of {key} are not finite. The file "
                "is damaged, or its training failed: copy it again, or train anew"
            )
    try:
        return Content(to_released_keys(content.tensors), content.dropped)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """Open a .safetensors file. Raises OSError, which names it, where safetensors has errors without a number."""
    reading.require_regular(path, reading.WEIGHTS)
    try:
        file = safetensors.safe_open(path, "pt")
    except (OSError, RuntimeError) as error:  # safetensors opens it, and then torch opens it again
        raise OSError(errno.EIO, str(error) or os.strerror(errno.EIO), str(path)) from None
    with file:
        yield file


def _read_safetensors(path: Path) -> Content:
    try:
        with _safetensors(path) as file:
            note = (file.metadata() or {}).get(_NOTE)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a dict)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a readable .safetensors file: {error}. {_remedy(path)}") from None
    if note is not None:  # only files of cpn-fast have one
        try:
            written = json.loads(note)
            whole = written["sha256"] == _digest(tensors, written)
        except (ValueError, LookupError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{path}: damaged: its content does not match its checksum. {_remedy(path)}")
    return Content(tensors, [])


def _remedy(path: Path) -> str:
    if path.name == BEST:
        return "Copy it again. If it is lost, delete it, and set train.use_weights to last or raise train.steps"
    return "Copy it again. If a run wrote it, delete it: its stage (`cpn-fast train`) makes it again from a checkpoint"


def _read_torch(path: Path) -> Content:
    try:
        if zipfile.is_zipfile(path):  # torch writes checksums, but does not compare them
            with zipfile.ZipFile(path) as records:
                if (broken := records.testzip()) is not None:
                    raise zipfile.BadZipFile(f"damaged: the checksum of {broken} does not match")
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files raise from any part of torch.load
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{path}: not readable as plain weights ({type(error).__name__}: {reason}). A file that holds whole "
            "Python objects is refused, since reading it runs its code: save the model's state_dict() instead"
        ) from None
    dropped: list[str] = []
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            dropped += [str(key) for key in state if key != wrapper]
            state = state[wrapper]
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a state dict of named tensors, found {type(state).__name__}")
    size = path.stat().st_size
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: expected names and tensors, found {key!r} with {type(value).__name__}")
        if value.layout is torch.strided and value.nbytes > size:
            raise UserError(f"{path}: {key} claims {value.nbytes} bytes in a file of {size}: damaged")
    tensors = {key: value.detach() for key, value in state.items()}
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # compiled before or after it became data-parallel
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return Content(tensors, dropped)


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _matches(key: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _alike(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.is_floating_point() == other.is_floating_point()


def _kind(tensor: Tensor) -> str:
    shape = ", ".join(map(str, tensor.shape))
    return f"({shape})" if tensor.is_floating_point() else f"({shape}) {str(tensor.dtype).removeprefix('torch.')}"


def _with_rename(key: str, tensor: Tensor, unexpected: list[str], tensors: Mapping[str, Tensor]) -> str:
    same_shape = [other for other in unexpected if tensors[other].shape == tensor.shape]
    near = difflib.get_close_matches(key, same_shape, n=1)
    return f"{key} {_kind(tensor)}" + (f"; the file has {near[0]}" if near else "")


def _section(title: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    shown = [f"    {line}" for line in lines[:_SHOWN]]
    return [f"  {len(lines)} {title}:", *shown, *(["    ..."] if len(lines) > _SHOWN else [])]
