from __future__ import annotations

import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cpn_fast.data.dataset import Sample
from cpn_fast.data.images import read_image
from cpn_fast.pipelines import decode
from cpn_fast.pipelines.inference import ScaledBatch, scaled_images
from cpn_fast.runtime.errors import UserError

SIZES = [(20, 30), (30, 20), (20, 30), (8, 5), (20, 30), (20, 30), (30, 20)]  # (height, width)


def save(path: Path, height: int, width: int, seed: int, orientation: int = 1) -> Sample:
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
    image.save(path, quality=100, subsampling=0, exif=exif)
    return Sample(path.stem, path, None, None)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return [save(tmp_path / f"{i}.jpg", *size, seed=i) for i, size in enumerate(SIZES)]


def scaled(samples: list[Sample], **options: Any) -> list[ScaledBatch]:
    """Return batches. Pixel values stay unchanged unless ``mean`` or ``std`` is given."""
    defaults: dict[str, Any] = {"scales": (1.0,), "mean": (0, 0, 0), "std": (1, 1, 1), "batch": 3, "pixels": 10**6}
    rest: dict[str, Any] = {"device": torch.device("cpu"), "threads": 1, "fit": lambda side: side}
    return list(scaled_images(samples, **{**defaults, **rest, **options}))


def test_every_image_comes_once_beside_images_of_its_size(samples: list[Sample]) -> None:
    batches = scaled(samples)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(SIZES)))
    assert all(SIZES[index] == batch.size for batch in batches for index in batch.indices)
    assert all(1 <= len(batch.indices) <= 3 for batch in batches)
    assert [batch.indices for batch in batches] == [[1, 6], [0, 2, 4], [5], [3]]  # large images first


def test_pixels_are_those_of_the_named_image(samples: list[Sample]) -> None:
    for batch in scaled(samples):
        for index, image in zip(batch.indices, batch.scales[0], strict=True):
            expected = np.asarray(Image.open(samples[index].image), np.float32)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_scales_are_pillows_cubic_at_the_fitting_size(samples: list[Sample]) -> None:
    for batch in scaled(samples[:3], scales=(0.5, 1.5), fit=lambda side: side // 4 * 4 + 1):
        for scale, images in zip((0.5, 1.5), batch.scales, strict=True):
            height, width = (round(scale * side) // 4 * 4 + 1 for side in batch.size)
            assert images.shape == (len(batch.indices), 3, height, width)
            for index, image in zip(batch.indices, images, strict=True):
                source = Image.open(samples[index].image)
                expected = np.asarray(source.resize((width, height), Image.Resampling.BICUBIC), np.float32)
                assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < 1


@given(pixels=st.integers(30, 4000))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_scale_of_a_batch_exceeds_the_pixels(samples: list[Sample], pixels: int) -> None:
    batches = scaled(samples, scales=(0.5, 1.0, 2.0), pixels=pixels)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(SIZES)))
    for batch in batches:
        for scale, images in zip((0.5, 1.0, 2.0), batch.scales, strict=True):
            count, _, height, width = images.shape
            room = 1 + 2 / min(height, width) ** 2  # sides are rounded
            assert count * height * width <= pixels * room + max(height, width)
            wanted = scale**2 * batch.size[0] * batch.size[1]
            if wanted <= pixels:
                assert (height, width) == tuple(round(scale * side) for side in batch.size)
            else:
                assert count == 1
                assert height / width == pytest.approx(batch.size[0] / batch.size[1], rel=2 / min(height, width))


def test_normalises(samples: list[Sample]) -> None:
    mean, std = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([2.0, 3.0, 4.0])
    for plain, batch in zip(scaled(samples), scaled(samples, mean=tuple(mean), std=tuple(std)), strict=True):
        expected = (plain.scales[0] - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        torch.testing.assert_close(batch.scales[0], expected)


def test_images_turned_by_exif_are_grouped_upright(tmp_path: Path) -> None:
    samples = [save(tmp_path / "a.jpg", 20, 30, seed=0, orientation=8), save(tmp_path / "b.jpg", 30, 20, seed=1)]
    (batch,) = scaled(samples)
    assert batch.indices == [0, 1]
    assert batch.size == (30, 20)
    expected = np.rot90(np.asarray(Image.open(samples[0].image), np.float32))
    assert np.array_equal(batch.scales[0][0].permute(1, 2, 0).numpy(), expected)


XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def exif(orientation: int, kind: int = 3) -> bytes:
    """Big-endian EXIF with an orientation as SHORT (3) or LONG (4)."""
    value = struct.pack(">HH", orientation, 0) if kind == 3 else struct.pack(">I", orientation)
    return b"Exif\0\0MM\0*\0\0\0\x08\0\1" + struct.pack(">HHI", 0x0112, kind, 1) + value + bytes(4)


@pytest.mark.parametrize(
    "metadata",
    [[XMP], [exif(6, 4)], [exif(6), exif(1)], [exif(1), exif(6)], [exif(6), XMP], [exif(3)], [exif(9)], [b"other"]],
    ids=["xmp", "long", "two: 6, 1", "two: 1, 6", "exif and xmp", "3", "9", "no exif"],
)
def test_dali_turns_an_image_as_pillow_does(metadata: list[bytes], tmp_path: Path) -> None:
    sample = save(tmp_path / "a.jpg", 40, 64, seed=0)
    Image.open(sample.image).save(sample.image, quality=95, subsampling=0)  # without EXIF
    content = sample.image.read_bytes()
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(data)) + data for data in metadata)
    sample.image.write_bytes(content[:2] + segments + content[2:])
    (batch,) = scaled([sample])
    image = read_image(sample.image)
    assert batch.size == image.shape[:2]
    assert np.abs(batch.scales[0][0].permute(1, 2, 0).numpy() - image).max() < 1e-3


def test_a_kept_batch_is_not_overwritten(samples: list[Sample]) -> None:
    batches = scaled(samples, batch=1)
    for kept, alone in zip(batches, (scaled([samples[b.indices[0]]])[0] for b in batches), strict=True):
        assert torch.equal(kept.scales[0], alone.scales[0])


def test_no_images_are_no_batches() -> None:
    assert scaled([]) == []


def test_a_missing_image_is_named(samples: list[Sample]) -> None:
    samples[3].image.unlink()
    with pytest.raises(UserError, match=r"3\.jpg"):
        scaled(samples)


def test_a_jpeg_with_damaged_data_is_named(samples: list[Sample]) -> None:
    """A Huffman table has a byte too many. Pillow decodes such a file without an error."""
    path = samples[2].image
    content = path.read_bytes()
    table = content.rindex(b"\xff\xc4")
    path.write_bytes(content[: table + 30] + b"\xa6" + content[table + 30 :])
    read_image(path)
    with pytest.raises(UserError, match=rf"{path.name}: .*damaged JPEG data"):
        scaled(samples)


def test_a_truncated_image_is_named(samples: list[Sample]) -> None:
    path = samples[3].image
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"3\.jpg"):
        scaled(samples)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_of_what_dali_writes_only_missing_libraries_that_nobody_needs_are_left_out(on_gpu, monkeypatch, capfd) -> None:
    needless = b"Failed to load nvjpeg2k library!\n[nvtiff_ext] Failed to load nvTIFF library.\n"
    needed, other = b"[nvjpeg-ext] Failed to load nvJPEG library.\n", b"something broke\n"
    pipeline = SimpleNamespace(build=lambda: os.write(2, needless + needed + other))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    decode.build(pipeline)
    os.write(2, b"after\n")
    assert capfd.readouterr().err.encode() == (needed if on_gpu else b"") + other + b"after\n"

    def fail() -> None:
        os.write(2, other)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        decode.build(SimpleNamespace(build=fail))
    assert capfd.readouterr().err.encode() == other
