from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn
from safetensors.numpy import load_file
from typer.testing import CliRunner

from cpn_fast import cli, config_file
from cpn_fast.commands import doctor
from cpn_fast.commands.demo_data import DEMO_CLASSES
from cpn_fast.config import Augment, Data, Superpixels
from cpn_fast.data.dataset import Sample, load_samples
from cpn_fast.pipelines import training
from cpn_fast.pipelines.batch import Batch
from cpn_fast.pipelines.shards import Shards, open_shards, pack
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.pipelines.training import TrainingPipeline
from cpn_fast.runtime import distributed
from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import chain, train

SLIC = Superpixels(count=30)
SIZE = 5  # 12 samples: shards of 5, 5 and 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SuperpixelCache:
    return SuperpixelCache(tmp_path_factory.mktemp("cache"), SLIC)


@pytest.fixture(scope="module")
def loose(small_voc: Path) -> list[Sample]:
    data = Data(root=small_voc, train_list=Path("ImageSets/Segmentation/train.txt"))
    return load_samples(data, DEMO_CLASSES, data.train_list, labels=True, masks=False)


@pytest.fixture(scope="module")
def folder(loose: list[Sample], cache: SuperpixelCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "shards"
    assert pack(loose, DEMO_CLASSES, cache, folder, seed=0, workers=1, size=SIZE) == 3
    return folder


@pytest.fixture
def shards(folder: Path, cache: SuperpixelCache) -> Shards:
    return open_shards(folder, DEMO_CLASSES).with_superpixels(cache.folder.parent, SLIC)


@pytest.fixture
def set_window(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    def set_to(samples: int) -> None:
        training._order.cache_clear()
        monkeypatch.setattr(training, "WINDOW", samples)

    yield set_to
    training._order.cache_clear()


def make(samples: list[Sample], shards: Shards | None, **options) -> TrainingPipeline:
    defaults = {"batch": 2, "mean": (120, 110, 100), "std": (60, 60, 60), "seed": 3, "threads": 1}
    settings = Augment(long_side=(64, 96), crop=64)
    return TrainingPipeline(samples, settings, device=torch.device("cpu"), shards=shards, **{**defaults, **options})


def take(pipeline: TrainingPipeline, count: int) -> list[Batch]:
    return list(itertools.islice(pipeline, count))


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


# Packing


def test_shards_are_plain_webdataset(folder: Path, shards: Shards, loose: list[Sample], cache: SuperpixelCache) -> None:
    """DALI's reader finds every file unchanged without our index."""
    pipeline = Pipeline(12, 1, None)
    with pipeline:
        tars = sorted(map(str, folder.glob("*.tar")))
        files: Any = fn.readers.webdataset(paths=tars, ext=["jpg", "superpixels.png"])
        pipeline.set_outputs(*files)
    images, maps = pipeline.run()
    by_id = {sample.id: sample for sample in loose}
    assert len(tars) == 3
    assert sorted(sample.id for sample in shards.samples) == sorted(by_id)
    for place, sample in enumerate(shards.samples):
        assert images.at(place).tobytes() == by_id[sample.id].image.read_bytes()
        assert maps.at(place).tobytes() == cache.path(by_id[sample.id]).read_bytes()


def test_any_samples_can_be_read(shards: Shards, loose: list[Sample], cache: SuperpixelCache) -> None:
    by_id = {sample.id: sample for sample in loose}
    for indices in ([0, 3, 4, 5, 11], [7], list(range(12))):
        for index, (image, png) in zip(indices, shards.read(indices), strict=True):
            sample = by_id[shards.samples[index].id]
            assert image == sample.image.read_bytes()
            assert png == cache.path(sample).read_bytes()


def test_tags_come_along(shards: Shards, loose: list[Sample]) -> None:
    labels = {sample.id: sample.label for sample in loose}
    for sample in shards.samples:
        assert np.array_equal(sample.label, labels[sample.id])


def test_the_list_is_packed_in_random_order(shards: Shards, loose: list[Sample]) -> None:
    assert [sample.id for sample in shards.samples] != [sample.id for sample in loose]


class Half(Rank):
    """One of two processes, which do not wait for each other."""

    def gather(self, value):
        return [value]


def test_packing_goes_on_where_it_was_interrupted(folder, loose, cache, tmp_path, monkeypatch) -> None:
    """Two processes share the shards. In this test they run one after the other."""
    halves = tmp_path / "halves"
    for number, own in enumerate((2, 1)):
        monkeypatch.setattr(distributed, "join", lambda number=number: Half(number, 2, number))
        assert pack(loose, DEMO_CLASSES, cache, halves, seed=0, workers=1, size=SIZE) == own
    monkeypatch.undo()
    kept = halves / "shard-00001.tar"
    before = kept.stat().st_mtime_ns
    for number in (0, 2):  # a killed process leaves a shard without its index
        (halves / f"shard-0000{number}.idx").unlink()
        (halves / f"shard-0000{number}.tar").write_bytes(b"half")
    with pytest.raises(UserError, match=r"2 shards are missing .*\(shard-00000.tar, shard-00002.tar\)"):
        open_shards(halves, DEMO_CLASSES)
    assert pack(loose, DEMO_CLASSES, cache, halves, seed=0, workers=1, size=SIZE) == 2
    assert kept.stat().st_mtime_ns == before
    for path in folder.iterdir():
        assert (halves / path.name).read_bytes() == path.read_bytes()


def test_a_folder_with_something_else_is_left_alone(loose, cache, folder, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="Name another folder"):
        pack(loose, DEMO_CLASSES, cache, tmp_path, seed=0, workers=1)
    with pytest.raises(UserError, match="Name another folder"):
        pack(loose, DEMO_CLASSES, None, folder, seed=0, workers=1, size=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "shards.json").write_text('{"seed"')  # a damaged manifest does not own the folder
    with pytest.raises(UserError, match="Name another folder"):
        pack(loose, DEMO_CLASSES, cache, tmp_path, seed=0, workers=1)


def test_damage_is_named(loose, cache, folder, tmp_path) -> None:
    with pytest.raises(UserError, match="expected the folder that `cpn-fast shards` wrote"):
        open_shards(tmp_path, DEMO_CLASSES)
    with pytest.raises(UserError, match="not a class"):
        open_shards(folder, ["unicorn"])
    with pytest.raises(UserError, match=r"expected superpixels of .*'count': 31"):
        open_shards(folder, DEMO_CLASSES).with_superpixels(tmp_path, Superpixels(count=31))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tar = copy / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-12_000])
    with pytest.raises(UserError, match=r"1 shards are .*shard-00001.tar"):
        open_shards(copy, DEMO_CLASSES)
    for member in range(2):  # the first sample's image and its superpixels
        lines = (copy / "shard-00001.idx").read_text().splitlines()
        offset, size = map(int, lines[1].split()[4 * member + 1 : 4 * member + 3])
        content = bytearray((folder / "shard-00001.tar").read_bytes())
        content[offset + size // 2 * member : offset + size] = bytes(size - size // 2 * member)
        tar.write_bytes(content)
        opened = open_shards(copy, DEMO_CLASSES).with_superpixels(cache.folder.parent, SLIC)
        with pytest.raises(UserError, match=f"shard-00001.tar: damaged: {opened.samples[SIZE].id} does not"):
            take(make(opened.samples, opened), 6)


def changed(old: bytes, new: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return change


def flipped(path: Path) -> None:
    """Flip one bit of the second sample's image."""
    content = bytearray(path.read_bytes())
    line = path.with_suffix(".idx").read_text().splitlines()[2].split()
    content[int(line[1]) + int(line[2]) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a list": ("shards.json", lambda path: path.write_text("[]")),
    "a missing key": ("shards.json", changed(b'"size"', b'"sizf"')),
    "a size of 0": ("shards.json", changed(b'"size": 5', b'"size": 0')),
    "a size that is no number": ("shards.json", changed(b'"size": 5', b'"size": "5"')),
    "another count": ("shards.json", changed(b'"samples": 12', b'"samples": 11')),
    "no JSON": ("shards.json", lambda path: path.write_bytes(b"\xff{")),
    "an empty line of tags": ("tags.csv", lambda path: path.write_bytes(b"\n" + path.read_bytes())),
    "an image without its class": (
        "tags.csv",
        lambda path: path.write_bytes(path.read_bytes().split(b",")[0] + b",\n"),
    ),
    "tags of another encoding": ("tags.csv", lambda path: path.write_bytes(b"\xff" + path.read_bytes())),
    "an offset beyond the end": ("shard-00000.idx", changed(b" 512 ", b" 51200000000 ")),
    "another offset": ("shard-00000.idx", changed(b" 512 ", b" 513 ")),
    "a negative offset": ("shard-00000.idx", changed(b" 512 ", b" -512 ")),
    "an offset that is no number": ("shard-00000.idx", changed(b" 512 ", b" many ")),
    "a line too few": ("shard-00000.idx", lambda path: path.write_text("\n".join(path.read_text().splitlines()[:-1]))),
    "a name without a checksum": ("shard-00000.idx", changed(b"000000000-", b"000000000.")),
    "a name of another sample": ("shard-00000.idx", changed(b"000000000-", b"000000001-")),
    "bytes in the index": ("shard-00000.idx", lambda path: path.write_bytes(b"\x95\xff\n" * 9 + b"jpg 1 2 x")),
    "an index that is a FIFO": ("shard-00000.idx", lambda path: (path.unlink(), os.mkfifo(path))),
    "a shard that is a device": ("shard-00000.tar", lambda path: (path.unlink(), path.symlink_to("/dev/zero"))),
    "a flipped bit": ("shard-00000.tar", flipped),
    "a tag's flipped bit": (
        "tags.csv",
        lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_each_kind_is_named(kind: str, loose, cache: SuperpixelCache, folder: Path, tmp_path: Path) -> None:
    name, spoil = DAMAGE[kind]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil(copy / name)

    def read() -> None:
        list(open_shards(copy, DEMO_CLASSES).read([0, 1]))

    with pytest.raises(UserError, match="shard-00000" if name.startswith("shard-") else name):
        read()
    if name.startswith("shard-"):  # the same command mends it
        assert pack(loose, DEMO_CLASSES, cache, copy, seed=0, workers=1, size=SIZE) == 1
        read()
        for path in folder.iterdir():
            assert (copy / path.name).read_bytes() == path.read_bytes()


# Reading for training


def test_batches_are_those_of_loose_files_in_the_same_order(shards, loose, cache, monkeypatch) -> None:
    """Images, superpixels and tags are the same. Only the order of an epoch differs."""
    own = take(make(shards.samples, shards), 13)
    by_id = {sample.id: sample for sample in loose}
    order = training._order
    monkeypatch.setattr(training, "_order", lambda seed, epoch, count, shard: order(seed, epoch, count, SIZE))
    ordered = [by_id[sample.id] for sample in shards.samples]
    expected = take(make(ordered, None, map_path=cache.path), 13)
    assert all(same(a, b) for a, b in zip(own, expected, strict=True))
    assert len({int(label) for batch in own for label in batch.pixel_map.unique()}) > 10


@pytest.mark.parametrize("window", [1, 4, 7, 4096])
def test_an_epoch_has_every_sample_once_in_a_new_order(window: int, set_window) -> None:
    """Shards come in random order, and samples mix only within a window."""
    set_window(window)
    epochs = [training._order(0, epoch, 43, SIZE).tolist() for epoch in range(4)]
    assert all(sorted(epoch) == list(range(43)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for epoch in epochs:
        for first in range(0, 43, window):
            touched = {index // SIZE for index in epoch[first : first + window]}
            assert len(touched) <= min(9, window // SIZE + 2 + (window == 4096))


@pytest.mark.parametrize("window", [5, 4096])
@pytest.mark.parametrize("start", [1, 6, 9])
def test_resumes_at_any_step(shards, start: int, window: int, set_window) -> None:
    set_window(window)
    through = take(make(shards.samples, shards), 14)
    resumed = take(make(shards.samples, shards, start_step=start), 14 - start)
    assert all(same(a, b) for a, b in zip(through[start:], resumed, strict=True))


@pytest.mark.parametrize("window", [5, 4096])
def test_ranks_share_the_batch_of_one_process(shards, window: int, set_window) -> None:
    set_window(window)
    samples = shards.samples
    parts = [take(make(samples, shards, batch=2, rank=rank, world=2), 7) for rank in range(2)]
    for step, batch in enumerate(take(make(samples, shards, batch=4), 7)):
        for name in ("images", "pixel_map", "labels", "indices"):
            assert torch.equal(torch.cat([getattr(part[step], name) for part in parts]), getattr(batch, name))


def test_an_epoch_drops_its_last_partial_batch(shards) -> None:
    batches = take(make(shards.samples, shards, batch=5), 4)
    for first in (0, 2):
        assert len(set(torch.cat([batch.indices for batch in batches[first : first + 2]]).tolist())) == 10


def test_no_more_than_a_window_is_held(shards, set_window, monkeypatch) -> None:
    set_window(6)
    reading = shards.read
    read = []
    counted = lambda indices: (read.append(1) or files for files in reading(indices))  # noqa: E731
    monkeypatch.setattr(Shards, "read", lambda self, indices: counted(indices))
    pipeline = make(shards.samples, shards)
    for step in range(1, 20):
        next(pipeline)
        assert len(read) <= 2 * (step + training.PREFETCH + 1) + 6


# Whole trainings


def test_trains_from_shards_alone_and_continues(tiny_config, tmp_path) -> None:
    """The data set has no other file."""
    packed = CliRunner().invoke(cli.app, ["shards", str(tiny_config(name="packing")), str(tmp_path / "shards")])
    assert f"--set data.shards={tmp_path / 'shards'}" in packed.output
    gone = {"root": str(tmp_path / "gone"), "shards": str(tmp_path / "shards")}
    steps = {"steps": 4, "checkpoint_every": 2}
    path = tiny_config(name="one", data=gone, train=steps, out=str(tmp_path / "one"))
    assert doctor.data(config_file.load(path)).found.startswith(f"12 images in {tmp_path / 'shards'}")
    expected = load_file(train.run(config_file.load(path)))
    run = config_file.load(path).run
    (run / "model.safetensors").unlink()
    (run / "checkpoints" / "step-00000004.pt").unlink()
    found = load_file(train.run(config_file.load(path)))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [2, 4]


def test_other_tags_images_or_lists_than_were_packed_are_said(tiny_config, small_voc, tmp_path, capsys) -> None:
    root = shutil.copytree(small_voc, tmp_path / "voc")
    path, folder = tiny_config(data={"root": str(root)}), tmp_path / "shards"
    shards = [f"data.shards={folder}"]
    settings = config_file.load(path, shards)

    def packed() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        assert CliRunner().invoke(cli.app, ["shards", str(path), str(folder)]).exit_code == 0

    packed()
    train.run(settings)
    chain.check(settings, 1)
    assert doctor.data(settings).state == "ok"
    listed = root / "ImageSets/Segmentation/train.txt"
    ids = listed.read_text().splitlines()
    tags = root / "Annotations" / f"{ids[0]}.xml"
    for file, text in ((listed, "\n".join(ids[:6])), (tags, "<annotation/>")):
        before = file.read_text()
        file.write_text(text)
        with pytest.raises(UserError, match="packed from another list or other tags"):
            chain.check(settings, 1)
        assert "packed from another list or other tags" in doctor.data(settings).found
        file.write_text(before)

    shutil.copy(root / f"JPEGImages/{ids[1]}.jpg", root / f"JPEGImages/{ids[0]}.jpg")
    packed()
    capsys.readouterr()
    train.run(settings)
    assert "was trained on shards that were packed from other images" in capsys.readouterr().err


def test_a_full_temporary_folder_is_said_with_the_file(shards: Shards, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # without a name, as from write()

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match=r"0\.idx: cannot be written: the disk is full"):
        list(shards.read([0]))
