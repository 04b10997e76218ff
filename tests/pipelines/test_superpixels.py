from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.measure
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from cpn_fast import config as configs
from cpn_fast.data.dataset import Sample
from cpn_fast.data.images import read_image
from cpn_fast.pipelines import slic, superpixels
from cpn_fast.pipelines.superpixels import SuperpixelCache, segment, segment_batch
from cpn_fast.runtime import owner
from cpn_fast.runtime.errors import UserError

pytestmark = pytest.mark.fast_slic
Superpixels = functools.partial(configs.Superpixels, engine="fast-slic")
CONFIG = Superpixels(count=30)


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """Return smooth coloured blobs, uint8 (H, W, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def save_samples(folder: Path, count: int) -> list[Sample]:
    folder.mkdir(exist_ok=True)
    samples = [Sample(f"image_{index}", folder / f"image_{index}.jpg", None, None) for index in range(count)]
    for index, sample in enumerate(samples):
        Image.fromarray(picture(40 + index % 3, 60, index)).save(sample.image)
    return samples


def stored(cache: SuperpixelCache, sample: Sample) -> np.ndarray:
    return np.asarray(Image.open(cache.path(sample)))


# Reading


def test_read_image_is_rgb(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(picture()).save(path)
    assert np.array_equal(read_image(path), picture())


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
def test_read_image_converts(tmp_path, mode):
    path = tmp_path / "x.png"
    Image.fromarray(picture()).convert(mode).save(path)
    image = read_image(path)
    assert (image.dtype, image.shape) == (np.uint8, (40, 60, 3))


def test_of_16_bits_the_upper_8_are_taken(tmp_path):
    """Pillow's conversion clips at 255, which makes nearly all of such an image white."""
    gray = np.arange(600).reshape(20, 30) * 109
    Image.fromarray(gray.astype(np.uint16)).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png"), np.repeat(gray[..., None] >> 8, 3, axis=2))


def test_read_image_converts_cmyk_and_gray_jpegs(tmp_path):
    red = Image.new("RGB", (32, 16), (220, 30, 40))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg")
    red.convert("L").save(tmp_path / "gray.jpg")
    assert np.abs(read_image(tmp_path / "cmyk.jpg").mean((0, 1)) - (220, 30, 40)).max() < 6
    gray = read_image(tmp_path / "gray.jpg")
    assert gray.shape == (16, 32, 3)
    assert (gray == gray[..., :1]).all()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing"])
def test_read_image_names_a_bad_file(tmp_path, damage):
    path = tmp_path / "bad.jpg"
    Image.fromarray(picture(200, 200)).save(path)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": path.read_bytes()[:1500], "empty": b"", "text": b"not an image"}[damage])
    with pytest.raises(UserError, match=r"bad\.jpg"):
        read_image(path)


# Segmenting


@settings(max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([1, 2, 7, 50, 200, 3000, 32_000]),
    st.sampled_from(["noise", "smooth", "constant"]),
    st.sampled_from([0.5, 10.0, 500.0]),
    st.integers(0, 2**31),
)
def test_labels_are_a_partition_into_regions(height, width, count, kind, compactness, seed):
    rng = np.random.default_rng(seed)
    image = {
        "noise": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "smooth": picture(height, width, seed),
        "constant": np.full((height, width, 3), rng.integers(256), np.uint8),
    }[kind]
    labels = segment(image, Superpixels(count=count, compactness=compactness))
    assert (labels.dtype, labels.shape) == (np.uint16, (height, width))
    found = np.unique(labels)
    assert np.array_equal(found, np.arange(len(found)))
    assert len(found) <= min(count, height * width)
    for label in found if len(found) < 60 else found[::50]:
        assert cv2.connectedComponents((labels == label).astype(np.uint8), connectivity=4)[0] == 2


@pytest.mark.parametrize("count", [20, 200, 1000])
def test_about_as_many_as_asked_for_even_without_edges(count):
    for image in (picture(300, 400), np.zeros((300, 400, 3), np.uint8)):
        assert 0.75 * count <= segment(image, Superpixels(count=count)).max() + 1 <= count


def test_superpixels_follow_edges():
    image = np.zeros((90, 120, 3), np.uint8)
    image[17:71, 25:83] = (255, 160, 0)
    labels = segment(image, CONFIG)
    inside = np.zeros(labels.max() + 1)
    np.add.at(inside, labels[17:71, 25:83].ravel(), 1)
    purity = inside / np.bincount(labels.ravel())
    assert np.all((purity < 0.05) | (purity > 0.95))


def test_deterministic_in_threads_and_for_views():
    images = np.stack([picture(64, 64, seed) for seed in range(8)])
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    one, many = (segment_batch(batch, CONFIG, threads) for threads in (1, 4))
    assert many.dtype == torch.int32
    assert torch.equal(one, many)
    assert torch.equal(segment_batch(batch + 0.3, CONFIG, 1), one)
    assert np.array_equal(one[3], segment(images[3], CONFIG))
    flipped = images[3][:, ::-1]
    assert np.array_equal(segment(flipped, CONFIG), segment(flipped.copy(), CONFIG))


INSTRUCTION_SETS = """
import sys; sys.path[:] = {path!r}
import fast_slic, numpy as np
from cpn_fast.pipelines import slic
images = np.random.default_rng(0).integers(0, 256, (3, 97, 131, 3)).astype(np.uint8)
best = [slic.segment(image, slic.Settings(30, 10.0, 10)) for image in images]
slic._slic = lambda: fast_slic.Slic
assert slic.instruction_set() == "standard"
assert all((slic.segment(image, slic.Settings(30, 10.0, 10)) == labels).all() for image, labels in zip(images, best))
"""


def test_every_instruction_set_gives_the_same():
    """The test uses a new process without torch, in which fast-slic always runs."""
    subprocess.run([sys.executable, "-c", INSTRUCTION_SETS.format(path=sys.path)], check=True)


def test_refuses_a_build_for_another_cpu(monkeypatch):
    import fast_slic

    slic._slic.cache_clear()
    monkeypatch.setattr(slic, "_cpu_flags", lambda: {"fpu", "sse4_2"})
    monkeypatch.setattr(fast_slic, "supported_archs", ("standard", "x64/avx2"))
    with pytest.raises(UserError, match="AVX2, which this CPU lacks"):
        slic.instruction_set()
    monkeypatch.setattr(fast_slic, "supported_archs", ("standard",))
    assert slic.instruction_set() == "standard"
    slic._slic.cache_clear()


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_refuses_other_arrays(image):
    with pytest.raises(ValueError, match="expected uint8"):
        segment(image, CONFIG)


@pytest.mark.parametrize(
    ("height", "width", "count", "factor"),
    [
        (375, 500, 200, 1),
        (4000, 6000, 200, 1),  # a camera's 24 megapixels
        (32_767, 40, 200, 1),
        (32_768, 40, 200, 2),  # coordinates have 16 bits
        (40, 70_000, 1, 3),
        (2**26, 1, 200, 2049),
        (1860, 1860, 1, 1),
        (1861, 1861, 1, 2),  # 621 of the rows are read; their coordinates may add up to 1,861 x 621 x 1,861 > 2^31
        (8192, 8192, 1, 5),
        (8192, 8192, 32_000, 2),  # 2^26 pixels and a border: the index overflows at 2^29
    ],
)
def test_what_fast_slic_cannot_hold_is_segmented_smaller(height, width, count, factor):
    assert slic.shrink(height, width, count) == factor


@pytest.mark.parametrize(("height", "width", "count"), [(40_000, 100, 200), (20, 33_000, 2), (32_767, 9, 500)])
def test_long_images_have_superpixels(height, width, count):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    labels = segment(image, Superpixels(count=count))
    assert labels.shape == (height, width)
    found = labels.max() + 1
    assert 2 <= found <= count  # far fewer than requested, because fast-slic starts with as many rows as columns
    assert skimage.measure.label(labels + 1, connectivity=1).max() == found == len(np.unique(labels))


def test_an_enlarged_map_follows_edges():
    image = np.zeros((40_000, 64, 3), np.uint8)
    image[20_000:] = 255
    labels = segment(image, Superpixels(count=50))
    assert not set(labels[:19_998].ravel()) & set(labels[20_002:].ravel())


@pytest.mark.parametrize("compactness", [0.001, 10_000])
@pytest.mark.parametrize("count", [1, 200, 32_000])
def test_every_setting_that_the_config_allows(compactness, count):
    labels = segment(picture(300, 200), Superpixels(count=count, compactness=compactness))
    assert len(np.unique(labels)) == labels.max() + 1 <= count


# Caching


def test_build_stores_each_segmentation(tmp_path):
    samples = save_samples(tmp_path / "images", 5)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    assert cache.missing(samples) == samples
    assert cache.build(samples, workers=3) == 5
    assert cache.folder == tmp_path / "cache" / "fast-slic-n30-c10-i10-v3"
    for sample in samples:
        assert stored(cache, sample).dtype == np.uint8
        assert np.array_equal(stored(cache, sample), segment(read_image(sample.image), CONFIG))
    assert cache.missing(samples) == []
    assert cache.build(samples, workers=3) == 0
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert manifest["count"] == 30
    assert manifest["fast_slic"]
    assert not list(cache.folder.glob("*.tmp"))


def test_more_labels_take_16_bits(tmp_path):
    sample = Sample("x", tmp_path / "x.png", None, None)
    Image.fromarray(picture(120, 150)).save(sample.image)
    config = Superpixels(count=2000)
    cache = SuperpixelCache(tmp_path, config)
    cache.build([sample], workers=1)
    labels = stored(cache, sample)
    assert cache.dtype == labels.dtype == np.uint16
    assert labels.max() > 256
    assert np.array_equal(labels, segment(picture(120, 150), config))
    assert SuperpixelCache(tmp_path, Superpixels(count=256)).dtype == np.uint8
    assert SuperpixelCache(tmp_path, Superpixels(count=257)).dtype == np.uint16


def damage_truncate(cache, samples):
    path = cache.path(samples[1])
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(cache, samples):
    cache.path(samples[1]).write_bytes(b"")


def damage_flip(cache, samples):
    path = cache.path(samples[1])
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def damage_zero(cache, samples):
    path = cache.path(samples[1])
    path.write_bytes(bytes(path.stat().st_size))


def damage_remove(cache, samples):
    cache.path(samples[1]).unlink()


def damage_swap(cache, samples):
    cache.path(samples[1]).write_bytes(cache.path(samples[0]).read_bytes())


def damage_foreign(cache, samples):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(cache.path(samples[1]))


def damage_new_image(cache, samples):
    Image.fromarray(picture(33, 44, seed=9)).save(samples[1].image)


def damage_turned_in_place(cache, samples):
    """Change the EXIF orientation but not the size, as image viewers do."""
    content = samples[1].image.read_bytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    upright = io.BytesIO()
    Image.open(io.BytesIO(content)).save(upright, "PNG", exif=exif)
    exif[ExifTags.Base.Orientation] = 3
    turned = io.BytesIO()
    Image.open(io.BytesIO(content)).save(turned, "PNG", exif=exif)
    assert len(upright.getvalue()) == len(turned.getvalue())
    samples[1].image.write_bytes(upright.getvalue())
    cache.build(samples, workers=1)
    samples[1].image.write_bytes(turned.getvalue())


@pytest.mark.parametrize(
    "damage",
    [
        damage_turned_in_place,
        damage_truncate,
        damage_flip,
        damage_empty,
        damage_zero,
        damage_remove,
        damage_swap,
        damage_foreign,
        damage_new_image,
    ],
)
def test_damaged_entries_are_made_again(tmp_path, damage):
    samples = save_samples(tmp_path / "images", 3)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.build(samples, workers=2)
    before = cache.path(samples[0]).stat().st_mtime_ns
    damage(cache, samples)
    assert cache.missing(samples) == [samples[1]]
    assert cache.build(samples, workers=2) == 1
    assert np.array_equal(stored(cache, samples[1]), segment(read_image(samples[1].image), CONFIG))
    assert cache.path(samples[0]).stat().st_mtime_ns == before


def test_other_parameters_are_another_folder(tmp_path):
    configs = [
        CONFIG,
        Superpixels(count=31),
        Superpixels(count=30, compactness=2.5),
        Superpixels(count=30, iterations=4),
    ]
    assert len({SuperpixelCache(tmp_path, config).folder for config in configs}) == 4


@pytest.mark.parametrize("content", ['{"count": 30}', "{", "[]", b"\xff\xfe\x00"])
def test_other_manifest_is_an_error(tmp_path, content):
    samples = save_samples(tmp_path / "images", 2)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.build(samples, workers=1)
    (cache.folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    kept = stored(cache, samples[0])
    for call in (lambda: cache.missing(samples), lambda: cache.build(samples, workers=1)):
        with pytest.raises(UserError, match=r"manifest\.json.*expected.*found"):
            call()
    assert np.array_equal(stored(cache, samples[0]), kept)


def test_another_fast_slic_is_an_error(tmp_path, monkeypatch):
    samples = save_samples(tmp_path / "images", 1)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.build(samples, workers=1)
    monkeypatch.setattr(superpixels, "_version", lambda: "9.9")
    with pytest.raises(UserError, match=r"'9\.9'"):
        cache.missing(samples)


def test_maps_of_unknown_origin_are_not_taken_over(tmp_path):
    samples = save_samples(tmp_path / "images", 2)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.build(samples, workers=1)
    (cache.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"expected manifest\.json"):
        cache.build(samples, workers=1)


def test_a_bad_image_stops_the_build_but_keeps_what_is_done(tmp_path):
    samples = save_samples(tmp_path / "images", 4)
    good = samples[3].image.read_bytes()
    samples[3].image.write_bytes(good[:300])
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    with pytest.raises(UserError, match=r"image_3\.jpg"):
        cache.build(samples, workers=1)
    samples[3].image.write_bytes(good)
    assert cache.build(samples, workers=1) < 4
    assert cache.missing(samples) == []


def test_interrupted_build_stops_soon_and_continues(tmp_path, monkeypatch):
    samples = save_samples(tmp_path / "images", 40)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    write = superpixels._write

    def interrupt(*arguments):
        if len(list(cache.folder.glob("*.png"))) >= 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(superpixels, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.build(samples, workers=2)
    assert 30 < len(cache.missing(samples)) < 40
    monkeypatch.undo()
    assert cache.build(samples, workers=2) > 30
    assert cache.missing(samples) == []


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    samples = save_samples(tmp_path / "images", 2)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.folder.mkdir(parents=True)
    (cache.folder / ".image_0.png.cpn-fast.tmp").write_bytes(b"half")
    assert cache.missing(samples) == samples
    cache.build(samples, workers=1)
    assert not list(cache.folder.glob(".*.tmp"))


BUILDER = """
import os, signal, sys
from pathlib import Path
from cpn_fast.config import Superpixels
from cpn_fast.data.dataset import Sample
from cpn_fast.pipelines import slic, superpixels

images, folder, fate = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
samples = [Sample(image.stem, image, None, None) for image in sorted(images.iterdir())]
cache = superpixels.SuperpixelCache(folder, Superpixels(count=30, engine="fast-slic"))
write = superpixels._write

def write_or_die(*arguments):
    if len(list(cache.folder.glob("*.png"))) == 3:
        print("about to die", flush=True)
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)

if fate == "dies":
    superpixels._write = write_or_die
else:
    print("ready", flush=True)
    sys.stdin.readline()
print("made", cache.build(samples, workers=1), "left", len(cache.missing(samples)))
"""


def test_two_processes_share_one_build_and_outlive_a_killed_one(tmp_path):
    samples = save_samples(tmp_path / "images", 30)
    killed, *builders = (
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(tmp_path / "images"), str(tmp_path / "cache"), fate],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for fate in ("dies", "lives", "lives")
    )
    assert [builder.stdout.readline() for builder in builders] == ["ready\n"] * 2
    assert "about to die\n" in iter(killed.stdout.readline, "")
    for builder in builders:
        builder.stdin.write("go\n")
        builder.stdin.flush()
    # Both now find a folder that is locked and half built.
    killed.communicate("\n", timeout=300)
    results = [builder.communicate(timeout=300) for builder in builders]
    assert [builder.returncode for builder in (killed, *builders)] == [-signal.SIGKILL, 0, 0], results
    lines = [output.strip().splitlines()[-1] for output, _ in results]
    assert sorted(lines) == ["made 0 left 0", "made 27 left 0"]
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    assert all(np.array_equal(stored(cache, s), segment(read_image(s.image), CONFIG)) for s in samples)


@pytest.mark.parametrize("id_", ["2007_000042.v2", "..", "../../x", "/x", "ü ñ", "dogs/a", "é" * 120, "a" * 250])
def test_any_id_is_a_short_name_in_the_folder(tmp_path, id_):
    image = tmp_path / "x.jpg"
    Image.fromarray(picture()).save(image)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    path = cache.path(Sample(id_, image, None, None))
    assert path.parent == cache.folder
    assert len(os.fsencode(path.name)) < 200
    assert path.name.startswith(Path(id_).name[:60])
    assert cache.build([Sample(id_, image, None, None)], workers=1) == 1


def test_data_sets_with_the_same_names_share_a_folder(tmp_path):
    one, other = (save_samples(tmp_path / name, 2) for name in ("one", "other"))
    for sample in other:
        Image.fromarray(255 - picture(40, 60)).save(sample.image)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    assert [cache.build(samples, workers=1) for samples in (one, other, one, other)] == [2, 2, 0, 0]
    for sample in (*one, *other):
        assert np.array_equal(stored(cache, sample), segment(read_image(sample.image), CONFIG))


def test_moved_images_keep_their_superpixels(tmp_path):
    samples = save_samples(tmp_path / "images", 2)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.build(samples, workers=1)
    (tmp_path / "images").rename(tmp_path / "photos")
    moved = [Sample(sample.id, tmp_path / "photos" / sample.image.name, None, None) for sample in samples]
    assert cache.build(moved, workers=1) == 0


def test_an_image_that_is_gone_is_named_and_not_its_superpixels(tmp_path):
    samples = save_samples(tmp_path / "images", 2)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.build(samples, workers=1)
    samples[1].image.unlink()
    samples[1].image.symlink_to("/nonexistent/image_1.jpg")
    for call in (cache.missing, cache.build):
        with pytest.raises(UserError) as raised:
            call(samples)
        assert str(raised.value).startswith(str(samples[1].image))


def test_who_waits_for_another_builder_says_so(tmp_path, monkeypatch, capfd):
    samples = save_samples(tmp_path / "images", 1)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.folder.mkdir(parents=True)
    monkeypatch.setattr(owner, "SAID_AFTER", 0.1)
    held = owner.lock(cache.folder / owner.LOCK)
    assert held is not None
    threading.Timer(1, os.close, (held,)).start()
    assert cache.build(samples, workers=1) == 1
    assert f"Waiting for {cache.folder}: it is in use by another process" in capfd.readouterr().err


def test_what_a_builder_left_that_was_killed_at_its_end_is_removed(tmp_path):
    samples = save_samples(tmp_path / "images", 1)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.build(samples, workers=1)
    whole = sorted(cache.folder.iterdir())
    for name in (owner.LOCK, ".manifest.json.cpn-fast.tmp"):
        (cache.folder / name).touch()
    assert cache.build(samples, workers=1) == 0
    assert sorted(cache.folder.iterdir()) == whole


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache.*cannot write superpixels"):
        SuperpixelCache(tmp_path / "cache", CONFIG).build(save_samples(tmp_path / "images", 1), workers=1)


def test_complete_cache_is_readable_where_nothing_can_be_written(tmp_path, monkeypatch):
    samples = save_samples(tmp_path / "images", 2)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.build(samples, workers=1)

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    for name in ("mkdir", "write_bytes", "replace", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(superpixels, "owned", refuse)
    assert cache.build(samples, workers=1) == 0


def test_entry_is_a_plain_grayscale_png(tmp_path):
    samples = save_samples(tmp_path / "images", 1)
    cache = SuperpixelCache(tmp_path / "cache", CONFIG)
    cache.build(samples, workers=1)
    content = cache.path(samples[0]).read_bytes()
    assert np.array_equal(
        cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED),
        np.asarray(Image.open(io.BytesIO(content))),
    )
