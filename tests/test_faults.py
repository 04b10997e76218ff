"""Faults of files: a test makes each fault, runs a command, and checks its exit code and words. Also docs/faults.md."""

from __future__ import annotations

import io
import re
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cpn_fast import cli, config_file
from cpn_fast.commands.demo_data import DEMO_CLASSES
from cpn_fast.data.dataset import load_samples
from cpn_fast.pipelines.superpixels import SuperpixelCache

PAGE = Path(__file__).parent.parent / "docs/faults.md"
TESTS = set(
    re.findall(
        r"^def (test_\w+)\(", "".join(path.read_text() for path in PAGE.parents[1].glob("tests/**/test_*.py")), re.M
    )
)


class World(NamedTuple):
    """A data set, a config, and a finished run, for faults."""

    root: Path
    run: Path
    config: Path

    @property
    def image(self) -> Path:
        return self.root / "JPEGImages/val_0001.jpg"

    @property
    def mask(self) -> Path:
        return self.root / "SegmentationClass/val_0001.png"

    @property
    def tags(self) -> Path:
        return self.root / "Annotations/val_0001.xml"

    @property
    def list(self) -> Path:
        return self.root / "ImageSets/Segmentation/val.txt"

    @property
    def seed(self) -> Path:
        return self.run / "cams/val/seeds/val_0001.npz"

    def set(self, **sections: dict) -> None:
        """Change keys of the config."""
        tree = yaml.safe_load(self.config.read_text())
        for section, keys in sections.items():
            tree[section] = {**tree.get(section, {}), **keys}
        self.config.write_text(yaml.safe_dump(tree))

    def picture(self) -> Image.Image:
        with Image.open(self.image) as picture:
            return picture.copy()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.picture().size[::-1]

    def save(self, picture: Image.Image, form: str) -> None:
        """Replace the image."""
        with self.image.open("wb") as file:
            picture.save(file, form)


@pytest.fixture
def world(small_voc: Path, small_run: Path, tmp_path: Path) -> World:
    made = World(tmp_path / "voc", tmp_path / "runs/small", tmp_path / "config.yaml")
    shutil.copytree(small_voc, made.root)
    shutil.copytree(small_run, made.run)
    val = "ImageSets/Segmentation/val.txt"
    tree = {
        "name": "small",
        "out": str(made.run.parent),
        "classes": list(DEMO_CLASSES),
        "data": {"root": str(made.root), "train_list": val, "eval_list": val},
        "augment": {"long_side": [64, 96], "crop": 64},
        "model": {"backbone": "narrow"},
        "superpixels": {"count": 30},
        "train": {"batch": 2, "steps": 1, "data_threads": 1},
        "affinity": {"train": {"batch": 2, "steps": 1}},
        "cam": {"scales": [0.5, 1.0]},  # as in small_run
    }
    made.config.write_text(yaml.safe_dump(tree))
    return made


def command(name: str, world: World) -> list[str]:
    weights = str(world.run / "model.safetensors")
    return {
        "superpixels": ["superpixels", str(world.config)],
        "train": ["train", str(world.config), "--set", "name=fresh"],
        "train again": ["train", str(world.run.parent / "again.yaml")],
        "cam": ["cam", str(world.config), "--checkpoint", weights, "--set", "name=fresh"],
        "cam again": ["cam", str(world.config), "--checkpoint", weights],
        "evaluate": ["evaluate", str(world.config), "--cams", str(world.run / "cams/val/seeds")],
        "evaluate masks": ["evaluate", str(world.config), "--masks", str(world.run / "cams/val/masks")],
        "segment": ["segment", str(world.config), "--masks", str(world.run / "cams/val/masks")],
        "predict": ["predict", str(world.image), "--model", str(world.run), "--out", str(world.run / "predicted")],
        "report": ["report", str(world.run), "--set", f"data.root={world.root}"],
        "refine": ["refine", str(world.config)],
        "convert": ["convert", str(world.run / "code.pth"), str(world.run / "new.pth")],
    }[name]


# Faults


def noise(*shape: int, most: int = 255, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, most + 1, shape).astype(dtype))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def png(width: int, height: int) -> bytes:
    """Return a PNG whose header gives this size, without pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def labels(world: World, name: str, content: bytes) -> None:
    (world.root / name).write_bytes(content)
    world.set(data={"labels": name})


def xml(*names: str, head: str = "") -> str:
    return f"{head}<annotation>{''.join(f'<object><name>{name}</name></object>' for name in names)}</annotation>"


class Payload:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return print, ("the payload ran",)


def npy(value: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(value, dtype=object), allow_pickle=True)
    return file.getvalue()


def superpixels(world: World) -> Path:
    """Build the cache, and return its folder."""
    settings = config_file.load(world.config)
    samples = load_samples(settings.data, settings.classes, settings.data.train_list, labels=False, masks=False)
    cache = SuperpixelCache(settings.superpixel_cache, settings.superpixels)
    cache.build(samples, workers=1)
    return cache.folder


def with_a_claim(path: Path) -> None:
    """Write a seed of a few bytes whose header claims 2^60 numbers."""
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (1, 1073741824, 1073741824), }".ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with np.load(path) as arrays:
        classes = arrays["classes"][:1]
    np.savez(path, classes=classes)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("cam.npy", member)


def again(world: World, **train: float) -> None:
    """Write the config of the finished run again, with changed keys in the section train."""
    tree = yaml.safe_load((world.run / "config.yaml").read_text())
    tree["train"] |= train
    tree["out"] = str(world.run.parent)
    (world.run.parent / "again.yaml").write_text(yaml.safe_dump(tree))


def spoil(path: Path) -> None:
    """Put NaN into weights, and save them without a checksum, as another tool would."""
    tensors = load_file(path)
    tensors["fc8.weight"][0] = float("nan")
    save_file(tensors, path)


def nested(depth: int) -> str:
    return "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 'x'}]" for i in range(depth))


ENTITIES = "<!DOCTYPE a [<!ENTITY a 'fish'>" + "".join(
    f"<!ENTITY {name} '{f'&{before};' * 99}'>" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)

FAULTS: dict[str, Callable[[World], object]] = {
    "an image cut short": lambda w: cut(w.image),
    "an empty image": lambda w: w.image.write_bytes(b""),
    "an image that is a folder": lambda w: (w.image.unlink(), w.image.mkdir()),
    "a web page called .jpg": lambda w: w.image.write_bytes(b"<html>404</html>"),
    "a PNG called .jpg": lambda w: w.save(w.picture(), "PNG"),
    "a GIF called .jpg": lambda w: w.save(w.picture(), "GIF"),
    "a PostScript file called .jpg": lambda w: w.save(w.picture(), "EPS"),
    "an image of a few bytes that claims 50,000 x 50,000 pixels": lambda w: w.image.write_bytes(png(50_000, 50_000)),
    "an image of 9,000 x 9,000 pixels": lambda w: w.image.write_bytes(png(9_000, 9_000)),
    "a gray image of 16 bits": lambda w: w.save(noise(*w.size, most=65535, dtype=np.uint16), "PNG"),
    "a CMYK image": lambda w: w.save(w.picture().convert("CMYK"), "JPEG"),
    "an image with a palette": lambda w: w.save(w.picture().convert("P"), "PNG"),
    "a mask cut short": lambda w: cut(w.mask),
    "a mask with values that are no class": lambda w: noise(*w.size, most=254).save(w.mask),
    "a mask of 16 bits with values of no class": lambda w: noise(*w.size, most=65535, dtype=np.uint16).save(w.mask),
    "a mask saved as JPEG": lambda w: Image.open(w.mask).convert("L").save(w.mask, "JPEG"),
    "a mask of another size": lambda w: noise(9, 9, most=3).save(w.mask),
    "a list with Windows line ends and a byte order mark": lambda w: w.list.write_bytes(
        b"\xef\xbb\xbf" + w.list.read_bytes().replace(b"\n", b"\r\n")
    ),
    "a list in UTF-16": lambda w: w.list.write_bytes(w.list.read_text().encode("utf-16")),
    "a list with an id that leaves the data": lambda w: w.list.write_text("../../etc/passwd\n"),
    "a list with a path that leaves the data": lambda w: w.list.write_text("/../x.jpg /SegmentationClass/x.png\n"),
    "a list with a zero byte in a path": lambda w: w.list.write_text("/JPEG\0Images/x.jpg /a\0b/x.png\n"),
    "a list with a name of 5,000 characters": lambda w: w.list.write_text(f"{'a/' * 2500}x.jpg\n"),
    "an empty list": lambda w: w.list.write_text("\n"),
    "a list that is a folder": lambda w: (w.list.unlink(), w.list.mkdir()),
    "a list with a missing image and one listed twice": lambda w: w.list.write_text("nowhere\nval_0001\nval_0001\n"),
    "XML without objects": lambda w: w.tags.write_text(xml()),
    "XML of an unknown class": lambda w: w.tags.write_text(xml("fsh")),
    "XML cut short": lambda w: cut(w.tags),
    "XML whose entities multiply": lambda w: w.tags.write_text(xml("&h;", head=ENTITIES + "]>")),
    "XML in an encoding that does not exist": lambda w: w.tags.write_text(
        xml("fish", head='<?xml version="1.0" encoding="klingon"?>')
    ),
    "CSV of an unknown class": lambda w: labels(w, "tags.csv", b"val_0001,fsh\n"),
    "JSON cut short": lambda w: labels(w, "tags.json", b'{"val_0001": ["fish"'),
    "cls_labels.npy that runs code": lambda w: labels(w, "tags.npy", npy({"val_0001": Payload()})),
    "cls_labels.npy of 20 classes for 5": lambda w: labels(w, "tags.npy", npy({"val_0001": np.zeros(20)})),
    "cls_labels.npy that claims 2^60 bytes": lambda w: labels(
        w, "tags.npy", npy({})[:128] + b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x"
    ),
    "a config with a misspelt key": lambda w: w.set(train={"ephocs": 3}),
    "a config that is no mapping": lambda w: w.config.write_text("- a\n- b\n"),
    "a config with a tab": lambda w: w.config.write_text("name: x\n\tout: y\n"),
    "a config that asks for a Python object": lambda w: w.config.write_text(
        "name: !!python/object/apply:builtins.print ['the payload ran']\n"
    ),
    "a config whose aliases multiply": lambda w: w.config.write_text(nested(30) + "\nclasses: [*k29, *k29]\n"),
    "a config nested 5,000 deep": lambda w: w.config.write_text("[" * 5000),
    "a config with an impossible date": lambda w: w.config.write_text("name: 2024-13-45\n"),
    "weights cut short": lambda w: cut(w.run / "model.safetensors"),
    "weights that run code": lambda w: torch.save({"a": Payload()}, w.run / "code.pth"),
    "a run that is a file": lambda w: (w.run.parent / "fresh").write_text(""),
    "a damaged config.yaml in the run": lambda w: (w.run / "config.yaml").write_bytes(b"\xff\x00"),
    "a config.yaml of another run": lambda w: (w.run / "config.yaml").write_text(
        (w.run / "config.yaml").read_text().replace("prcm: true", "prcm: false")
    ),
    "another config, and metrics.jsonl is gone": lambda w: ((w.run / "metrics.jsonl").unlink(), again(w, lr=0.9)),
    "a bit of the weights that flipped": lambda w: (flip(w.run / "model.safetensors"), again(w)),
    "weights that are not finite": lambda w: spoil(w.run / "model.safetensors"),
    "a damaged superpixel map": lambda w: flip(next(superpixels(w).glob("val_0001-*.png"))),
    "a damaged superpixel manifest": lambda w: (superpixels(w) / "manifest.json").write_bytes(b"\xff{"),
    "a damaged seed": lambda w: flip(w.seed),
    "a seed of a few bytes that claims 2^60 numbers": lambda w: with_a_claim(w.seed),
    "a damaged mask of the seeds": lambda w: flip(w.run / "cams/val/masks/val_0001.png"),
    "a torn line in metrics.jsonl": lambda w: (w.run / "metrics.jsonl").write_bytes(
        (w.run / "metrics.jsonl").read_bytes() + b'{"step": 3, "lo'
    ),
    "a damaged evaluation.json": lambda w: cut(next(w.run.rglob("evaluation.json"))),
    "an image that was replaced after its seed": lambda w: w.save(noise(*w.size, 3), "JPEG"),
    "an image that was replaced by a larger one": lambda w: w.save(noise(300, 400, 3), "JPEG"),
    "a missing seed": lambda w: w.seed.unlink(),
    "a damaged record of what made the seeds": lambda w: (w.run / "cams/val/made_by.json").write_bytes(b"\xff{"),
}


class Row(NamedTuple):
    fault: str
    command: str
    code: int
    words: tuple[str, ...]
    """Parts of the command's output."""


def row(fault: str, command: str, code: int, *words: str) -> Row:
    return Row(fault, command, code, words)


ROWS = [
    row("an image cut short", "train", 1, "1 images that cannot be decoded", "val_0001.jpg (image file is truncated"),
    row(
        "an image cut short",
        "cam",
        1,
        "val_0001.jpg: expected a readable image, found: image file is truncated",
        "Restore it or take it off the list",
    ),
    row("an empty image", "train", 1, "val_0001.jpg (empty file)"),
    row("an image that is a folder", "train", 1, "Is a directory"),
    row("a web page called .jpg", "train", 1, "val_0001.jpg (none of JPEG, PNG, WEBP, TIFF)"),
    row("a PNG called .jpg", "superpixels", 0),
    row("a GIF called .jpg", "superpixels", 1, "none of JPEG, PNG, WEBP, TIFF"),
    row("a PostScript file called .jpg", "superpixels", 1, "none of JPEG, PNG, WEBP, TIFF"),
    row(
        "an image of a few bytes that claims 50,000 x 50,000 pixels",
        "train",
        1,
        "more than 67,108,864 pixels; scale it down",
    ),
    row("an image of 9,000 x 9,000 pixels", "cam", 1, "more than 67,108,864 pixels; scale it down"),
    row("a gray image of 16 bits", "superpixels", 0),
    row("a CMYK image", "superpixels", 0),
    row("an image with a palette", "superpixels", 0),
    row("a mask cut short", "train", 1, "1 masks that cannot be used", "val_0001.png: not readable as a PNG"),
    row("a mask cut short", "evaluate", 1, "val_0001.png: not readable as a PNG"),
    row(
        "a mask with values that are no class",
        "train",
        1,
        "1 masks with values other than 0 to 5 and 255",
        "val_0001.png (6, 7, 8, 9, 10)",
    ),
    row(
        "a mask with values that are no class",
        "evaluate",
        1,
        "1 ground truths with values other than 0 to 5 and 255: val_0001",
    ),
    row(
        "a mask of 16 bits with values of no class",
        "evaluate",
        1,
        "a 16-bit mask with the value",
        "expected 0 to 254 for classes",
    ),
    row("a mask saved as JPEG", "evaluate", 1, "a mask must be PNG, found JPEG, which may change class values"),
    row(
        "a mask of another size",
        "evaluate",
        1,
        "1 of another size than the ground truth: val_0001 (200x150, ground truth 9x9)",
    ),
    row("a list with Windows line ends and a byte order mark", "superpixels", 0),
    row("a list in UTF-16", "train", 1, "val.txt: not readable as a list of images, which is UTF-8 text"),
    row(
        "a list with an id that leaves the data",
        "train",
        1,
        "1 lines that are neither an id nor paths inside data.root: line 1 '../../etc/passwd'",
    ),
    row(
        "a list with a path that leaves the data",
        "train",
        1,
        "1 lines that are neither an id nor paths inside data.root: line 1 '/../x.jpg",
    ),
    row(
        "a list with a zero byte in a path",
        "train",
        1,
        "1 lines that are neither an id nor paths inside data.root: line 1",
    ),
    row(
        "a list with a name of 5,000 characters",
        "train",
        1,
        "1 lines that are neither an id nor paths inside data.root: line 1",
    ),
    row("an empty list", "train", 1, "1 list without any id"),
    row("a list that is a folder", "train", 1, "val.txt: not readable as a list of images", "Is a directory"),
    row(
        "a list with a missing image and one listed twice",
        "train",
        1,
        "1 images missing in",
        "nowhere.jpg",
        "1 ids listed more than once: line 3 val_0001",
        "1 ids without labels",
    ),
    row("XML without objects", "train", 0),
    row("XML of an unknown class", "train", 1, "val_0001.xml line 1: 'fsh' is not a class; did you mean fish?"),
    row("XML cut short", "train", 1, "val_0001.xml: not VOC's XML"),
    row("XML whose entities multiply", "train", 1, "val_0001.xml: not VOC's XML: it declares an entity"),
    row("XML in an encoding that does not exist", "train", 1, "val_0001.xml: not VOC's XML: unknown encoding: klingon"),
    row("CSV of an unknown class", "train", 1, "line 1: 'fsh' is not a class; did you mean fish?"),
    row("JSON cut short", "train", 1, "tags.json: not readable as JSON"),
    row("cls_labels.npy that runs code", "train", 1, "it asks for builtins.print, which a label file does not need"),
    row(
        "cls_labels.npy of 20 classes for 5",
        "train",
        1,
        "val_0001: expected an array of 5 numbers, one per class, found float64(20,)",
    ),
    row("cls_labels.npy that claims 2^60 bytes", "train", 1, "but only 1 remain"),
    row("a config with a misspelt key", "train", 1, "train.ephocs: unknown key; did you mean epochs?"),
    row("a config that is no mapping", "train", 1, "expected keys and values, found list"),
    row("a config with a tab", "train", 1, "config.yaml: not readable as YAML", "line 2, column 1"),
    row("a config that asks for a Python object", "train", 1, "could not determine a constructor"),
    row("a config whose aliases multiply", "train", 1, "classes.0: Input should be a valid string, found [[["),
    row(
        "a config nested 5,000 deep", "train", 1, "config.yaml: not readable as YAML: maximum recursion depth exceeded"
    ),
    row("a config with an impossible date", "train", 1, "config.yaml: not readable as YAML: month must be in 1..12"),
    row("weights cut short", "cam", 1, "model.safetensors: not a readable .safetensors file"),
    row("weights that run code", "convert", 1, "A file that holds whole Python objects is refused"),
    row("a run that is a file", "train", 1, "fresh: it is a file, and a folder is expected"),
    row(
        "a damaged config.yaml in the run",
        "predict",
        0,
        "config.yaml is not the config that",
        "was trained with (it cannot be read). The config in the weights is used",
    ),
    row(
        "a config.yaml of another run", "predict", 0, "was trained with (model.prcm). The config in the weights is used"
    ),
    row(
        "another config, and metrics.jsonl is gone",
        "train again",
        1,
        "These keys differ from its step-00000002.pt: train.lr",
    ),
    row(
        "a bit of the weights that flipped",
        "cam",
        1,
        "model.safetensors: damaged: its content does not match its checksum",
    ),
    row(
        "a bit of the weights that flipped",
        "train again",
        1,
        "model.safetensors: damaged",
        "delete it: its stage (`cpn-fast train`) makes it again from a checkpoint",
    ),
    row("weights that are not finite", "cam", 1, "model.safetensors:", "numbers of fc8.weight are not finite"),
    row("weights that are not finite", "predict", 1, "model.safetensors:", "numbers of fc8.weight are not finite"),
    row("a damaged superpixel map", "superpixels", 0, "is damaged and made again"),
    row("a damaged superpixel manifest", "superpixels", 1, "manifest.json: expected", "Delete", "to build it anew"),
    row("a damaged seed", "cam again", 0, "val_0001.npz is damaged and made again"),
    row("a damaged seed", "evaluate", 1, "val_0001.npz: damaged, or not a CAM seed of cpn-fast (Bad CRC-32"),
    row("a damaged seed", "refine", 1, "val_0001.npz: damaged, or not a CAM seed of cpn-fast"),
    row(
        "a seed of a few bytes that claims 2^60 numbers",
        "evaluate",
        1,
        "val_0001.npz: damaged, or not a CAM seed of cpn-fast",
    ),
    row(
        "an image that was replaced after its seed",
        "evaluate",
        1,
        "1 files made from an image that has changed: val_0001.npz",
    ),
    row(
        "an image that was replaced after its seed",
        "evaluate masks",
        1,
        "1 files made from an image that has changed: val_0001.png",
    ),
    row(
        "an image that was replaced after its seed",
        "segment",
        1,
        "1 masks were made from images that have changed (val_0001)",
    ),
    row(
        "an image that was replaced by a larger one",
        "report",
        0,
        "the report leaves out 1 files of",
        "(val_0001.npz): their images have changed since",
    ),
    row("a missing seed", "evaluate", 1, "1 files missing: val_0001.npz"),
    row("a damaged mask of the seeds", "cam again", 0, "val_0001.png is damaged and made again"),
    row("a torn line in metrics.jsonl", "report", 0),
    row(
        "a damaged evaluation.json", "report", 1, "evaluation.json: damaged", "the command that wrote it makes it anew"
    ),
    row("a damaged record of what made the seeds", "cam again", 0),
]


def test_faults_and_rows_are_the_same() -> None:
    assert {row.fault for row in ROWS} == FAULTS.keys()


def test_every_claim_of_the_page_names_tests_that_are_there() -> None:
    text = PAGE.read_text()
    claims = [claim.split("\n\n")[0] for claim in text.split("\n- ")[1:]]
    assert len(claims) > 20
    unheld = [claim for claim in claims if not re.search(r"`test_\w+`", claim)]
    assert not unheld
    missing = set(re.findall(r"`(test_\w+)`", text)) - TESTS
    assert not missing


def outcome(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["cpn-fast", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    if isinstance(ended.value.code, str):  # as the interpreter does
        print(ended.value.code, file=sys.stderr)
        return 1
    return ended.value.code or 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command}: {row.fault}")
def test_a_fault_ends_as_its_row_says(row: Row, world: World, monkeypatch, capfd) -> None:
    FAULTS[row.fault](world)
    capfd.readouterr()
    assert outcome(command(row.command, world), monkeypatch) == row.code
    said = "".join(capfd.readouterr())
    for words in row.words:
        assert words in said.replace("\n", " ")
    assert "Traceback" not in said
    assert "the payload ran" not in said
