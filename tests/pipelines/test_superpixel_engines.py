"""The choice of the superpixel engine, and the cache of our kernel."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cpn_fast import kernels
from cpn_fast.commands import doctor
from cpn_fast.config import Superpixels
from cpn_fast.data.dataset import Sample
from cpn_fast.pipelines import superpixels
from cpn_fast.pipelines.superpixels import SuperpixelCache, engine, segment, segment_batch
from cpn_fast.runtime.errors import UserError

KERNEL = Superpixels(count=12, engine="kernel", iterations=2)


def install(monkeypatch: pytest.MonkeyPatch, *, fast_slic: bool, gpu: bool) -> None:
    """Pretend that fast-slic and a GPU exist, or do not."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if fast_slic else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


def save(folder: Path, count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = [Sample(str(index), folder / f"{index}.png", None, None) for index in range(count)]
    for sample in samples:
        noise = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        noise.resize((40, 30), Image.Resampling.BICUBIC).save(sample.image)
    return samples


@pytest.mark.parametrize(
    ("fast_slic", "gpu", "expected"),
    [(True, False, "fast-slic"), (False, False, "kernel"), (True, True, "kernel"), (False, True, "kernel")],
)
def test_auto_is_the_kernel_on_a_gpu_and_without_fast_slic(fast_slic, gpu, expected, monkeypatch):
    install(monkeypatch, fast_slic=fast_slic, gpu=gpu)
    assert engine(Superpixels()) == expected
    assert engine(Superpixels(engine="kernel")) == "kernel"
    assert engine(Superpixels(), torch.device("cuda")) == "kernel"
    assert engine(Superpixels(), torch.device("cpu")) == ("fast-slic" if fast_slic else "kernel")


def test_fast_slic_that_is_asked_for_and_not_installed_is_an_error(tmp_path, monkeypatch):
    install(monkeypatch, fast_slic=False, gpu=False)
    for call in (
        lambda: SuperpixelCache(tmp_path, Superpixels(engine="fast-slic")),
        lambda: segment_batch(torch.zeros(1, 3, 4, 4), Superpixels(engine="fast-slic"), 1),
    ):
        with pytest.raises(UserError, match=r"fast-slic, which is not installed: pip install .* kernel"):
            call()


def test_the_kernels_cache_has_its_own_folder_and_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(superpixels, "Workers", None)
    samples = save(tmp_path, 3)
    cache = SuperpixelCache(tmp_path / "cache", KERNEL)
    assert cache.build(samples, workers=2) == 3
    assert cache.missing(samples) == []
    assert cache.folder == tmp_path / "cache" / "kernel-n12-c10-i2-v3"
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert manifest == {"format": 2, "kernel": 1, "count": 12, "compactness": 10.0, "iterations": 2}
    for sample in samples:
        image = np.asarray(Image.open(sample.image))
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        expected = kernels.slic(pixels, count=12, compactness=10, iterations=2)[0].numpy()
        stored = np.asarray(Image.open(io.BytesIO(cache.path(sample).read_bytes())))
        assert stored.dtype == np.uint8
        assert np.array_equal(stored, expected)
        assert segment(image, KERNEL).dtype == np.uint16
        assert np.array_equal(segment(image, KERNEL), expected)
        assert torch.equal(segment_batch(pixels.float(), KERNEL, 1)[0], torch.from_numpy(expected))


def test_another_definition_of_the_kernel_is_an_error(tmp_path, monkeypatch):
    samples = save(tmp_path, 1)
    SuperpixelCache(tmp_path / "cache", KERNEL).build(samples, workers=1)
    monkeypatch.setattr(superpixels, "_definition", lambda: 2)
    with pytest.raises(UserError, match=r"manifest.json: expected .*'kernel': 2"):
        SuperpixelCache(tmp_path / "cache", KERNEL).missing(samples)


def test_doctor_names_the_engine(monkeypatch):
    install(monkeypatch, fast_slic=False, gpu=False)
    finding = doctor.examine(lambda: doctor.superpixels(Superpixels()))
    assert finding.state == "slow"
    assert "kernel 1 (cpu)" in finding.found
    assert "pip install" in finding.mend
    finding = doctor.examine(lambda: doctor.superpixels(Superpixels(engine="fast-slic")))
    assert finding.state == "broken"
    assert "fast-slic, which is not installed" in finding.found


@pytest.mark.parametrize("engine", [pytest.param("fast-slic", marks=pytest.mark.fast_slic), "kernel"])
def test_both_engines_take_the_same_images(engine: Any) -> None:
    config = Superpixels(engine=engine, count=4)
    for image in (
        np.random.default_rng(0).random((8, 9, 3)),
        np.zeros((8, 9), np.uint8),
        np.zeros((8, 9, 4), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"expected uint8 RGB \(H, W, 3\), found"):
            superpixels.segment(image, config)
    assert superpixels.segment_batch(torch.zeros(0, 3, 8, 9), config, 1).shape == (0, 8, 9)
