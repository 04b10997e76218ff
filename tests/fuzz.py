"""Fuzz the readers: for every content of a file a reader gives a valid value or raises UserError, in bounded memory.

By hand: ``python tests/fuzz.py --minutes 10`` (all readers in turn, or ``--reader seed``). The file of a failure is
kept.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image

from cpn_fast import config_file
from cpn_fast.commands import import_coco
from cpn_fast.config import Data
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.images import read_image
from cpn_fast.data.labels import read_labels
from cpn_fast.data.masks import read_mask, write_mask
from cpn_fast.data.png import is_whole_png, source_of
from cpn_fast.data.seeds import Seed, read_seed, write_seed
from cpn_fast.models.weights import read_weights
from cpn_fast.pipelines.decode import read_encoded
from cpn_fast.runtime import owner
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import read_metrics, read_note, with_checksum
from cpn_fast.stages import evaluate
from cpn_fast.training import checkpoint

CLASSES = ("cat", "dog")
MEMORY = 2**31
"""Bytes that a reader may reserve in addition to the process's memory."""


class Reader(NamedTuple):
    file: str
    """Name of the file."""
    valid: bytes
    """Content of a valid file, which the fuzzer changes."""
    read: Callable[[Path], Any]
    """Reads the file and asserts that later code can use the value."""


def written(write: Callable[[Path], Any], name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, name))
        return Path(folder, name).read_bytes()


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def picture(form: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def params() -> bytes:
    """Return a file in MXNet's format with one array."""
    name, content = b"arg:conv1a_weight", np.zeros((2, 3), "<f4").tobytes()
    array = struct.pack("<IiIqqqiii", 0xF993FAC9, 0, 2, 2, 3, 0, 0, 0, 0)[: 4 + 4 + 4 + 16]
    array += struct.pack("<iii", 1, 0, 0) + content
    return struct.pack("<QQQ", 0x112, 0, 1) + array + struct.pack("<QQ", 1, len(name)) + name


def labels(path: Path) -> None:
    source = path.parent if path.suffix == ".xml" else path
    for label in read_labels(source, ["a", "b"], CLASSES).values():
        assert label.dtype == bool
        assert label.shape == (2,)


def lists(path: Path) -> None:
    data = Data(root=path.parent)
    if not (data.root / data.images).exists():
        (data.root / data.images).mkdir()
        for name in ("a", "b", "ä ö"):
            (data.root / data.images / f"{name}.jpg").touch()
    for sample in load_samples(data, CLASSES, Path(path.name), labels=False, masks=None):
        assert sample.image.resolve().is_relative_to(path.parent.resolve())
        assert sample.id == Path(sample.id).name


def seed(path: Path) -> None:
    cams = read_seed(path)
    assert cams.cam.shape[:1] == cams.classes.shape
    assert ((cams.cam >= 0) & (cams.cam <= 1)).all()
    cams.mask(0.5)


def mask(path: Path) -> None:
    values = read_mask(path)
    assert (values.dtype, values.ndim) == (np.uint8, 2)


def image(path: Path) -> None:
    encoded = read_encoded(path)
    pixels = read_image(path)
    assert pixels.shape == (encoded.height, encoded.width, 3)


def weights(path: Path) -> None:
    for name, tensor in read_weights(path).items():
        assert isinstance(name, str)
        assert tensor.nbytes <= path.stat().st_size or tensor.layout is torch.strided
        tensor.clone()


def state(path: Path) -> None:
    assert checkpoint.read(path, torch.device("cpu"))["step"] is not None


def metrics(path: Path) -> None:
    assert all(isinstance(line["step"], int) for line in read_metrics(path))


def settings(path: Path) -> None:
    config = config_file.load(path)
    assert config_file.parse(yaml.safe_load(config_file.dump(config)), "again") == config


def instances(path: Path) -> None:
    """Read COCO's JSON and draw the outlines that it holds."""
    tree, _ = import_coco._read(path)
    values = {category.id: 1 for category in tree.categories}
    for image in tree.images:
        if image.width * image.height > 10_000:
            continue
        outlines = [item for item in tree.annotations if item.image_id == image.id and item.category_id in values]
        with suppress(ValueError):  # import-coco catches it
            import_coco.mask_of(image, outlines, values)


def text(*rows: tuple[str, ...]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


XML = b"""<?xml version="1.0"?>
<annotation><size/><object><name>cat</name><part><name>ear</name></part></object></annotation>"""
CONFIG = (
    b"name: x\ndata: {root: .}\nclasses: &c [a, b]\naugment:\n  long_side: [64, 96]\ntrain:\n  steps: 3\n  lr: 1.0e-2\n"
)
LIST = "b\n/JPEGImages/a.jpg /SegmentationClass/a.png\nJPEGImages/ä ö.jpg\n".encode()
TABLE = {"a": np.array([1.0, 0.0], np.float32), "b": np.array([0, 1])}
EVALUATION = {"results": [{"kind": "oracle", "threshold": 0.5}], "ids": ["a", "b"]}
INSTANCES = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 10}],
    "categories": [{"id": 3, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": [[1, 1, 15, 1, 15, 8, 1.5, 8]]},
        {
            "id": 2,
            "image_id": 1,
            "category_id": 3,
            "iscrowd": 1,
            "segmentation": {"size": [10, 20], "counts": [50, 150]},
        },
        {"id": 3, "image_id": 1, "category_id": 3, "iscrowd": 1, "segmentation": {"size": [10, 20], "counts": "b1f4"}},
    ],
}
CAMS = Seed(np.array([0, 1]), np.random.default_rng(0).random((2, 5, 7), np.float32))
STATE = {"step": 3, "model": {"a": torch.ones(2)}, "optimizer": {"state": {}}, "config": "name: x"}

READERS = {
    "list": Reader("list.txt", LIST, lists),
    "xml": Reader("a.xml", XML, labels),
    "csv": Reader("labels.csv", text(("a", "cat;dog"), ("b.jpg", "dog")), labels),
    "json": Reader("labels.json", json.dumps({"a": ["cat"], "b": ["dog", "cat"]}).encode(), labels),
    "npy": Reader(
        "labels.npy", written(lambda path: np.save(path, np.array(TABLE, object), allow_pickle=True), "x.npy"), labels
    ),
    "params": Reader("x.params", params(), weights),
    "pth": Reader("x.pth", saved({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int64)}), weights),
    "safetensors": Reader("x.safetensors", safetensors.torch.save({"a": torch.ones(2, 3)}), weights),
    "checkpoint": Reader("step-00000003.pt", saved(STATE), state),
    "seed": Reader("a.npz", written(lambda path: write_seed(path, CAMS), "a.npz"), seed),
    "mask": Reader("a.png", written(lambda path: write_mask(path, np.eye(9, dtype=np.uint8)), "a.png"), mask),
    "jpeg": Reader("a.jpg", picture("JPEG"), image),
    "png": Reader("a.jpg", picture("PNG"), image),
    "config": Reader("x.yaml", CONFIG, settings),
    "metrics": Reader("metrics.jsonl", b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n', metrics),
    "evaluation": Reader(
        "evaluation.json", json.dumps(EVALUATION).encode(), lambda path: evaluate.held_out_threshold(path, ["z"])
    ),
    "instances": Reader("instances_a.json", json.dumps(INSTANCES).encode(), instances),
    "note": Reader("made_by.json", json.dumps(with_checksum(EVALUATION)).encode(), read_note),
    "owner": Reader(".lock", json.dumps(owner._self()).encode(), lambda path: owner._owner(path).encode()),
    "chunks": Reader(
        "a.png", picture("PNG"), lambda path: (is_whole_png(path.read_bytes()), source_of(path.read_bytes()))
    ),
}

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**64 - 1)
TOKENS = (
    b"\0", b"\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"../", b"/", b".jpg ", b".png", b"a,", b";", b"cat", b"\t",
    b"<!ENTITY a 'b'>", b"&a;", b"]]>", b"<name>", b"<object>", b"</object>", b"encoding='utf-16'",
    b'{"a":', b"[[[[", b"]", b'"', b"NaN", b"1e999", b"\\ud800",
    b"*c", b"&c ", b"!!python/name:os.system ", b"? ", b"- ", b": ", b"2024-13-45", b"0x", b"1_0", b"~", b"<<: ",
    b"cos\nsystem\n", b"(", b"tR.",
)  # fmt: skip


def spoilt(valid: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return a valid file after one or several random changes.

    Bits flip, numbers and words are written or inserted, parts are removed, repeated, or come from another file.
    """
    content = bytearray(valid)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, size = rng.randrange(len(content) + 1), rng.choice((1, 2, 4, 8, 40, 400))
        kind = rng.randrange(8)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            number = rng.choice(EXTREMES).to_bytes(8, rng.choice(("little", "big")))
            width = rng.choice((1, 2, 4, 8))
            content[at : at + width] = number[:width] if rng.random() < 0.5 else number[-width:]
        elif kind == 2:
            content[at:at] = rng.choice(TOKENS) * rng.choice((1, 1, 1, 2, 1000))
        elif kind == 3:
            word = rng.choice(TOKENS)
            content[at : at + len(word)] = word
        elif kind == 4:
            del content[at : at + size]
        elif kind == 5:
            del content[at:]
        elif kind == 6:
            start = rng.randrange(len(content) + 1)
            content[at:at] = content[start : start + size]
        else:
            start = rng.randrange(len(other) + 1)
            content[at : at + size] = other[start : start + size]
    return bytes(content)


def attempt(reader: Reader, content: bytes, folder: Path) -> bool:
    """Return whether the reader accepts the file. False for a UserError; other exceptions pass."""
    path = folder / reader.file
    path.write_bytes(content)
    try:
        reader.read(path)
    except UserError as error:
        message = str(error)
    else:
        return True
    assert len(message) < 20_000
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for each reader")
    parser.add_argument("--reader", choices=READERS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.reader or READERS:
            reader, rng = READERS[name], random.Random(options.seed)
            until, slowest = time.monotonic() + 60 * options.minutes, 0.0
            runs = taken = 0
            others = [other.valid for other in READERS.values()]
            folder = Path(scratch, name)
            folder.mkdir()
            while time.monotonic() < until:
                content = spoilt(reader.valid, rng.choice(others), rng)
                begin = time.perf_counter()
                try:
                    taken += attempt(reader, content, folder)
                except BaseException:
                    kept = Path(tempfile.gettempdir(), f"fuzz-{name}-{runs}-{reader.file}")
                    kept.write_bytes(content)
                    print(f"{name}: {kept}\n{traceback.format_exc()}", flush=True)
                    failed = True
                    break
                slowest = max(slowest, time.perf_counter() - begin)
                runs += 1
            print(f"{name}: {runs:,} executions, {taken:,} valid, slowest {slowest * 1e3:.0f} ms", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
