from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image, ImageOps

from cpn_fast.config import Augment, Superpixels
from cpn_fast.data.dataset import Sample
from cpn_fast.data.images import read_image
from cpn_fast.data.masks import PALETTE, write_mask
from cpn_fast.pipelines import training
from cpn_fast.pipelines.batch import Batch
from cpn_fast.pipelines.superpixels import segment
from cpn_fast.pipelines.training import TrainingPipeline
from cpn_fast.runtime.errors import UserError

PLAIN = {"flip": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
ORIENTATION = 274  # EXIF tag


def save(path: Path, pixels: np.ndarray, **options: Any) -> Sample:
    """Write an image with full chroma at the best quality. The label is the parity of the id's first character."""
    best: dict[str, Any] = {"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels).save(path, **best, **options)
    return Sample(path.stem, path, None, np.array([True, ord(path.stem[0]) % 2 == 0]))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return smooth colours between 80 and 170, so that a jitter of 0.3 clips nothing."""
    small = np.random.default_rng(seed).integers(80, 171, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))


def make(samples: list[Sample], augment: dict[str, Any] | None = None, **options: Any) -> TrainingPipeline:
    """Return a pipeline. Pixel values stay unchanged unless ``mean`` or ``std`` is given."""
    defaults: dict[str, Any] = {"batch": 1, "mean": (0, 0, 0), "std": (1, 1, 1), "seed": 3, "threads": 1}
    settings = Augment(**{"long_side": (20, 40), "crop": 32, **(augment or {})})
    return TrainingPipeline(samples, settings, device=torch.device("cpu"), **{**defaults, **options})


def pixels(batch: Batch) -> np.ndarray:
    return batch.images[0].permute(1, 2, 0).numpy()


def shown_size(batch: Batch) -> tuple[int, int]:
    """Return height and width of the part that is not black."""
    rows, columns = (pixels(batch) > 0).all(2).nonzero()
    return len(np.unique(rows)), len(np.unique(columns))


def take(pipeline: TrainingPipeline, count: int) -> list[Batch]:
    return list(itertools.islice(pipeline, count))


def same(first: Batch, second: Batch) -> bool:
    pairs: Iterable[Any] = zip(first, second, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return [save(tmp_path / f"{i}.jpg", noise(24 + i, 36 - 2 * i, seed=i)) for i in range(10)]


# Geometry


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_image_and_superpixels_stay_aligned(tmp_path: Path, dtype: type, orientation: int) -> None:
    """Each of a label's three bits is a colour channel, so that edges of image and map can be compared."""
    blocks = np.random.default_rng(1).integers(1, 8, (6, 8))
    labels = blocks.repeat(12, 0).repeat(12, 1)
    painted = np.where(labels[..., None] >> np.arange(3) & 1, 215, 40).astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = np.rot90(painted) if orientation == 6 else painted
    sample = save(tmp_path / "a.jpg", stored.copy(), exif=exif)
    assert np.abs(read_image(sample.image).astype(int) - painted).max() < 30
    scale = 9000 if dtype == np.uint16 else 1
    Image.fromarray((labels * scale).astype(dtype)).save(tmp_path / "a.png")

    crops = {**PLAIN, "flip": 0.5, "long_side": (48, 192), "crop": 96}
    seen_padding = False
    for batch in take(make([sample], crops, map_path=lambda s: tmp_path / f"{s.id}.png"), 24):
        assert batch.pixel_map is not None
        assert batch.pixel_map.dtype == torch.int32
        found = batch.pixel_map[0].numpy() // scale
        padding = (pixels(batch) == 0).all(2)
        seen_padding |= padding.any()
        drawn = np.where(padding, -1, ((pixels(batch) > 127.5) << np.arange(3)).sum(2))
        assert np.array_equal(padding, found == -1)
        assert (found == drawn).mean() > 0.95  # corners are rounded; a map half a pixel off gives down to 0.9
        inner = np.pad(np.ones((94, 94), bool), 1)
        for shift in itertools.product((-1, 0, 1), repeat=2):
            inner &= np.roll(found, shift, (0, 1)) == found
        assert np.array_equal(found[inner], drawn[inner])
    assert seen_padding


def test_a_mask_gives_its_values_in_every_form(tmp_path: Path) -> None:
    sample = save(tmp_path / "a.jpg", noise(60, 80))
    values = np.random.default_rng(2).choice(np.array([0, 1, 20, 255], np.uint8), (60, 80))
    write_mask(tmp_path / "palette.png", values)
    upside_down = Image.Exif()
    upside_down[ORIENTATION] = 3
    Image.fromarray(values).save(tmp_path / "gray.png")
    Image.fromarray(values).save(tmp_path / "gray with EXIF.png", exif=upside_down)  # a mask has no upright
    Image.fromarray(PALETTE[values]).save(tmp_path / "colours.png")
    low = Image.fromarray(values % 16)
    low.save(tmp_path / "low.png")
    low.putpalette(PALETTE[:16].tobytes())
    low.save(tmp_path / "4 bits.png", bits=4)
    crops = {**PLAIN, "flip": 0.5, "long_side": (40, 120), "crop": 64}

    def batches(kind: str) -> list[Batch]:
        return take(make([sample], crops, map_path=lambda s: tmp_path / f"{kind}.png"), 6)

    palette = batches("palette")
    for other in ("gray", "gray with EXIF", "colours"):
        assert all(same(a, b) for a, b in zip(palette, batches(other), strict=True))
    assert all(same(a, b) for a, b in zip(batches("low"), batches("4 bits"), strict=True))
    assert {int(v) for batch in palette for v in batch.pixel_map.unique()} == {-1, 0, 1, 20, 255}


def test_scale_draws_a_factor_of_the_images_own_size(tmp_path: Path) -> None:
    sample = save(tmp_path / "a.jpg", noise(30, 60))
    sides = []
    for batch in take(make([sample], {**PLAIN, "scale": (0.5, 1.5), "crop": 96}), 40):
        height, width = shown_size(batch)
        assert abs(height - width / 2) <= 1
        sides.append(int(width))
    assert 30 <= min(sides) < 40
    assert 80 < max(sides) <= 90


def test_flip_mirrors(samples: list[Sample]) -> None:
    shapes = {**PLAIN, "long_side": (64, 80), "crop": 20}
    for plain, flipped in zip(
        take(make(samples, shapes), 5), take(make(samples, {**shapes, "flip": 1}), 5), strict=True
    ):
        assert not torch.equal(flipped.images, plain.images)
        torch.testing.assert_close(flipped.images.flip(3), plain.images, atol=1, rtol=0)


def test_long_side_takes_every_whole_number_of_its_range(tmp_path: Path) -> None:
    sample = save(tmp_path / "a.jpg", noise(30, 60))
    found = set()
    for batch in take(make([sample], {**PLAIN, "long_side": (8, 11), "crop": 16}), 60):
        height, width = shown_size(batch)
        assert height == round(width / 2)
        found.add(int(width))
    assert found == {8, 9, 10, 11}


def test_crop_and_padding_take_every_position(tmp_path: Path) -> None:
    columns = np.broadcast_to(np.arange(100, 120, dtype=np.uint8)[None, :, None], (20, 20, 3))
    sample = save(tmp_path / "a.png", columns.copy())
    cropped = {
        int(b.images[0, 0, 0, 0]) for b in take(make([sample], {**PLAIN, "long_side": (20, 20), "crop": 18}), 40)
    }
    assert cropped == {100, 101, 102}
    padded = take(make([sample], {**PLAIN, "long_side": (20, 20), "crop": 22}), 60)
    offsets = {tuple((batch.images[0, 0] > 0).nonzero()[0].tolist()) for batch in padded}
    assert offsets == set(itertools.product(range(3), repeat=2))
    for batch in padded:
        top, left = (batch.images[0, 0] > 0).nonzero()[0].tolist()
        assert np.array_equal(pixels(batch)[top : top + 20, left : left + 20], columns)


def test_resize_is_pillows_cubic(tmp_path: Path) -> None:
    sample = save(tmp_path / "a.png", noise(60, 60))
    for side in (40, 90):
        batch = next(make([sample], {**PLAIN, "long_side": (side, side), "crop": side}))
        expected = Image.open(sample.image).resize((side, side), Image.Resampling.BICUBIC)
        assert np.abs(pixels(batch) - np.asarray(expected, np.float32)).max() <= 2


@pytest.mark.parametrize("long_side", [90, 250])
def test_the_cpu_shows_what_dali_resizes(long_side: int) -> None:
    """Parts of the image, mirrored or not, equal ``fn.resize`` on a GPU except at the image's border."""
    image = noise(120, 160).copy()
    augment = Augment(long_side=(long_side - 9, long_side), crop=96)
    for seed in range(12):
        size, start, end, _ = training._geometry(augment, 120, 160, np.random.default_rng(seed))
        pipeline = Pipeline(1, 1, None)
        with pipeline:
            source = fn.external_source(source=lambda: [image], batch=True, layout="HWC")
            options: dict[str, Any] = {"size": size, "roi_start": start, "roi_end": end}
            pipeline.set_outputs(fn.resize(source, interp_type=types.INTERP_CUBIC, **options))
        (expected,) = pipeline.run()
        found, average = training._shown(image, size, start, end)
        inner = (slice(9, -9),) * 2
        difference = found[inner].astype(int) - np.asarray(expected.at(0))[inner]
        assert found.shape == expected.at(0).shape
        assert np.abs(difference).max() <= 2
        np.testing.assert_allclose(average, image.mean((0, 1))[None], rtol=1e-5)


# Decoding


@pytest.mark.parametrize("kind", ["rgb", "gray", "cmyk", "palette", "rgba", *(f"exif{i}" for i in range(1, 9))])
def test_every_kind_of_file_decodes_as_in_pillow(tmp_path: Path, kind: str) -> None:
    image, path = Image.fromarray(noise(40, 24)), tmp_path / "a.jpg"
    options: dict[str, Any] = {}
    if kind == "gray":
        image = image.convert("L")
    elif kind == "cmyk":
        image = image.convert("CMYK")
    elif kind in ("palette", "rgba"):
        image, path = image.convert({"palette": "P", "rgba": "RGBA"}[kind]), tmp_path / "a.png"
    elif kind.startswith("exif"):
        exif = Image.Exif()
        exif[ORIENTATION] = int(kind[4])
        options = {"exif": exif}
    image.save(path, **options)
    sample = Sample("a", path, None, np.array([True]))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    batch = next(make([sample], {**PLAIN, "long_side": (40, 40), "crop": 40}))
    rows, columns = (pixels(batch) > 0).any(2).nonzero()
    shown = pixels(batch)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert np.array_equal(shown, expected)


def test_normalises_and_pads_with_the_mean(tmp_path: Path) -> None:
    sample = save(tmp_path / "a.png", np.full((4, 4, 3), (50, 100, 150), np.uint8))
    options: dict[str, Any] = {"mean": (10.0, 20.0, 30.0), "std": (2.0, 4.0, 8.0)}
    batch = next(make([sample], {**PLAIN, "long_side": (4, 4), "crop": 8}, **options))
    assert batch.images.shape == (1, 3, 8, 8)
    for channel, value in enumerate((20.0, 20.0, 15.0)):
        assert sorted(batch.images[0, channel].flatten().tolist()) == [0.0] * 48 + [value] * 16


# Colour


def jittered(sample: Sample, **spread: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pixels before and after the jitter, without resizing."""
    before = read_image(sample.image).astype(np.float32)
    side = before.shape[0]
    pipeline = make([sample], {**PLAIN, "long_side": (side, side), "crop": side, **spread})
    return [(before, pixels(batch)) for batch in take(pipeline, 12)]


@pytest.fixture
def coloured(tmp_path: Path) -> Sample:
    return save(tmp_path / "coloured.png", noise(16, 16))


LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def test_brightness_scales(coloured: Sample) -> None:
    factors = [after.sum() / before.sum() for before, after in jittered(coloured, brightness=0.3)]
    for factor, (before, after) in zip(factors, jittered(coloured, brightness=0.3), strict=True):
        np.testing.assert_allclose(after, factor * before, rtol=1e-4)
    assert 0.7 <= min(factors) < 0.85
    assert 1.15 < max(factors) <= 1.3


def test_contrast_scales_around_the_mean_gray(coloured: Sample) -> None:
    factors = []
    for before, after in jittered(coloured, contrast=0.3):
        gray = (before @ LUMA).mean()
        factors.append(float(((after - gray) / (before - gray))[0, 0, 0]))
        np.testing.assert_allclose(after, gray + factors[-1] * (before - gray), atol=0.01)
    assert 0.7 <= min(factors) < 0.85
    assert 1.15 < max(factors) <= 1.3


def test_saturation_scales_around_each_pixels_gray(coloured: Sample) -> None:
    factors = []
    for before, after in jittered(coloured, saturation=0.3):
        gray = (before @ LUMA)[..., None]
        factors.append(float(np.linalg.norm(after - gray) / np.linalg.norm(before - gray)))
        np.testing.assert_allclose(after, gray + factors[-1] * (before - gray), atol=0.01)
    assert 0.7 <= min(factors) < 0.85
    assert 1.15 < max(factors) <= 1.3


def test_hue_turns_around_the_gray_axis(coloured: Sample) -> None:
    angles = []
    for before, after in jittered(coloured, hue=0.1):
        np.testing.assert_allclose(after.mean(2), before.mean(2), atol=0.01)
        chroma = before - before.mean(2, keepdims=True), after - after.mean(2, keepdims=True)
        first, second = (c @ np.array([1, np.exp(2j * np.pi / 3), np.exp(-2j * np.pi / 3)]) for c in chroma)
        np.testing.assert_allclose(abs(first), abs(second), atol=0.02)
        angles.append(float(np.angle((second * first.conj()).sum()) / (2 * np.pi)))
    assert -0.1 <= min(angles) < -0.05
    assert 0.05 < max(angles) <= 0.1


def test_adjustments_come_in_random_order(coloured: Sample) -> None:
    """A product of saturation and hue without its saturation is a rotation, if it is removed on the right side."""
    orders = set()
    for before, after in jittered(coloured, saturation=0.3, hue=0.1):
        matrix = np.linalg.lstsq(before.reshape(-1, 3), after.reshape(-1, 3), rcond=None)[0].T
        factor = np.sqrt(np.linalg.det(matrix))
        inverse = np.linalg.inv(factor * np.eye(3) + (1 - factor) * np.tile(LUMA, (3, 1)))
        last, first = (np.abs(turn @ turn.T - np.eye(3)).max() < 1e-3 for turn in (inverse @ matrix, matrix @ inverse))
        assert last != first
        orders.add(bool(last))
    assert orders == {False, True}


def test_all_of_the_jitter_together_is_clipped_to_the_range_of_colours(tmp_path: Path) -> None:
    extreme = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (16, 16, 3))
    sample = save(tmp_path / "a.png", extreme)
    full = {"brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "hue": 0.5}
    options: dict[str, Any] = {"mean": (100.0, 110.0, 120.0), "std": (50.0, 60.0, 70.0)}
    low, high = [], []
    for batch in take(make([sample], {**full, "long_side": (16, 16), "crop": 16}, **options), 12):
        values = pixels(batch) * np.array(options["std"]) + np.array(options["mean"])
        low.append(values.min())
        high.append(values.max())
    assert min(low) == pytest.approx(0, abs=1e-4)
    assert max(high) == pytest.approx(255, abs=1e-4)


# Order


def test_an_epoch_is_a_new_order_without_the_last_partial_batch(samples: list[Sample]) -> None:
    pipeline = make(samples, batch=3)
    assert pipeline.steps_per_epoch == 3
    epochs = [torch.cat([batch.indices for batch in take(pipeline, 3)]).tolist() for _ in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = make(samples, batch=3, seed=4)
    assert torch.cat([batch.indices for batch in take(other, 3)]).tolist() != epochs[0]


def test_labels_and_images_belong_to_the_indices(samples: list[Sample]) -> None:
    plain = {**PLAIN, "long_side": (36, 36), "crop": 36}
    for batch in take(make(samples, plain, batch=2), 5):
        for image, label, index in zip(batch.images, batch.labels, batch.indices.tolist(), strict=True):
            assert label.tolist() == [1.0, float(index % 2 == 0)]
            own = read_image(samples[index].image).reshape(-1, 3).mean(0)
            shown = image[:, image.sum(0) > 0].mean(1).numpy()
            assert np.abs(shown - own).max() < 2


@pytest.mark.parametrize("start", [1, 4, 5, 12])
def test_resumes_at_any_step(samples: list[Sample], start: int) -> None:
    through = take(make(samples, batch=2), 16)
    resumed = take(make(samples, batch=2, start_step=start), 16 - start)
    assert all(same(a, b) for a, b in zip(through[start:], resumed, strict=True))
    assert not same(through[0], through[5])  # the same position in the next epoch


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one_process(samples: list[Sample], world: int) -> None:
    whole = take(make(samples, batch=4), 5)
    ranks = [take(make(samples, batch=4 // world, rank=rank, world=world), 5) for rank in range(world)]
    for step, batch in enumerate(whole):
        for name in ("images", "labels", "indices"):
            parts = [getattr(rank[step], name) for rank in ranks]
            assert torch.equal(torch.cat(parts), getattr(batch, name))


def test_a_kept_batch_is_not_overwritten(samples: list[Sample], tmp_path: Path) -> None:
    for sample in samples:
        Image.fromarray(read_image(sample.image)[..., 0]).save(tmp_path / f"{sample.id}.png")
    pipeline = make(samples, batch=2, map_path=lambda s: tmp_path / f"{s.id}.png")
    kept = next(pipeline)
    tensors = ((name, part) for name, part in kept._asdict().items() if isinstance(part, torch.Tensor))
    clones: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors}
    copy = kept._replace(**clones)
    take(pipeline, 8)
    assert same(kept, copy)


# Superpixels of the crop


@pytest.mark.parametrize("engine", [pytest.param("fast-slic", marks=pytest.mark.fast_slic), "kernel"])
def test_online_superpixels_are_those_of_the_augmented_crop(engine: Any, tmp_path: Path) -> None:
    pixel_values = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    sample = save(tmp_path / "a.png", pixel_values)
    config = Superpixels(count=12, engine=engine)
    options: dict[str, Any] = {"mean": (124.0, 116.0, 104.0), "std": (58.0, 57.0, 57.5), "online": config}
    batch = next(make([sample], {**PLAIN, "long_side": (40, 40), "crop": 40}, **options))
    assert batch.pixel_map is not None
    assert batch.pixel_map.dtype == torch.int32
    assert np.array_equal(batch.pixel_map[0].numpy(), segment(pixel_values, config))


def test_superpixels_are_none_unless_asked_for(samples: list[Sample]) -> None:
    assert next(make(samples)).pixel_map is None


# Errors


def test_a_list_shorter_than_a_step_is_an_error(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="10 samples do not fill a step of 2 x 6 images"):
        make(samples, batch=6, world=2)


def test_cached_and_online_superpixels_exclude_each_other(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="exclude"):
        make(samples, map_path=lambda sample: sample.image, online=Superpixels())


def test_a_vanished_image_is_named(samples: list[Sample]) -> None:
    pipeline = make(samples)
    samples[7].image.unlink()
    with pytest.raises(UserError, match=r"7\.jpg"):
        take(pipeline, 10)


@pytest.mark.parametrize("kept", [0.0, 0.7])
def test_a_truncated_image_is_named(samples: list[Sample], kept: float) -> None:
    path = samples[7].image
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=r"7\.jpg"):
        take(make(samples, batch=5), 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is gone"),
        (lambda path: path.write_bytes(b"\x89PNG"), "expected a map of labels"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "checksums do not fit"),
        (lambda path: Image.new("RGB", (9, 8), (1, 2, 3)).save(path), "colours that VOC's palette lacks"),
        (lambda path: Image.new("L", (9, 8)).convert("1").save(path), "mask of PNG mode 1"),
        (
            lambda path: Image.new("L", (5, 6)).save(path),
            r"bits \[6, 5, 8\], expected \[8, 9, 8\] for .*a\.jpg",
        ),
    ],
)
def test_damaged_superpixels_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    sample = save(tmp_path / "a.jpg", noise(8, 9))
    Image.fromarray(noise(8, 9)[..., 0].copy()).save(tmp_path / "a.png")
    damage(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"a\.png: .*{message}"):
        next(make([sample], map_path=lambda s: tmp_path / f"{s.id}.png"))


def on(device: str, samples: list[Sample], tmp_path: Path, **options: Any) -> TrainingPipeline:
    for sample in samples:
        Image.fromarray(read_image(sample.image)[..., 0]).save(tmp_path / f"{sample.id}.png")
    maps: dict[str, Any] = {"map_path": lambda s: tmp_path / f"{s.id}.png"} if "online" not in options else {}
    augment = Augment(long_side=(20, 40), crop=32)
    places: dict[str, Any] = {"batch": 5, "mean": (0, 0, 0), "std": (1, 1, 1), "seed": 0, "threads": 1}
    return TrainingPipeline(samples, augment, device=torch.device(device), **places, **maps, **options)


@pytest.mark.gpu
def test_gpu_gives_nearly_the_images_and_exactly_the_maps_of_the_cpu(samples: list[Sample], tmp_path: Path) -> None:
    for cpu, gpu in zip(*(take(on(device, samples, tmp_path), 4) for device in ("cpu", "cuda")), strict=True):
        assert gpu.images.is_cuda
        assert (gpu.images.cpu() - cpu.images).abs().mean() < 2
        for name in ("pixel_map", "labels", "indices"):
            assert torch.equal(getattr(gpu, name).cpu(), getattr(cpu, name)), name


@pytest.mark.gpu
def test_batches_on_a_gpu_are_their_own_however_late_they_are_read(samples: list[Sample], tmp_path: Path) -> None:
    """Work is queued before each batch, like a training step, and more batches are made while it runs."""
    expected = [batch.images.cpu() for batch in take(on("cuda", samples, tmp_path), 8)]
    pipeline, found = on("cuda", samples, tmp_path), []
    for _ in range(8):
        torch.cuda._sleep(50_000_000)
        batch = next(pipeline)
        found.append(batch.images * 1)
        del batch  # its memory may be reused only after the line above is done
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), other)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [pytest.param("fast-slic", marks=pytest.mark.fast_slic), "kernel"])
def test_superpixels_of_crops_do_not_wait_for_the_step_before(
    engine: Any, samples: list[Sample], tmp_path: Path
) -> None:
    pipeline = on("cuda", samples, tmp_path, online=Superpixels(count=10, engine=engine))
    next(pipeline)
    before, after = (torch.cuda.Event() for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    torch.cuda._sleep(2_000_000_000)  # about a second
    after.record()
    next(pipeline)
    assert before.query()
    assert not after.query()
