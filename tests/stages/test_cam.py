from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cpn_fast import config, config_file
from cpn_fast.commands import information
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.masks import read_mask
from cpn_fast.data.seeds import read_seed
from cpn_fast.models import inference
from cpn_fast.models.network import Cams, build_network
from cpn_fast.pipelines.inference import ScaledBatch
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import cam, evaluate, refine, segment, train


@pytest.fixture
def trained(tiny_config):
    settings = config_file.load(tiny_config(train={"steps": 2}))
    return settings, train.run(settings)


def test_seeds_masks_and_overlays_of_a_list(trained) -> None:
    settings, weights = trained
    list_path = settings.data.train_list.with_name("val.txt")
    folder = cam.run(settings, weights, list_path)
    samples = load_samples(settings.data, settings.classes, list_path, labels=True, masks=True)
    for sample in samples:
        seed = read_seed(folder / "seeds" / f"{sample.id}.npz")
        truth = read_mask(sample.mask)
        assert list(seed.classes) == list(np.flatnonzero(sample.label))
        assert seed.cam.shape == (len(seed.classes), *truth.shape)
        assert seed.cam.min() >= 0
        assert seed.cam.max() <= 1
        mask = read_mask(folder / "masks" / f"{sample.id}.png")
        assert set(np.unique(mask)) <= {0, *(seed.classes + 1)}
        assert (folder / "overlays" / f"{sample.id}.jpg").stat().st_size > 0


def test_finished_seeds_are_kept_and_damaged_ones_made_again(trained) -> None:
    settings, weights = trained
    folder = cam.run(settings, weights)
    paths = sorted((folder / "seeds").iterdir())
    contents = [path.read_bytes() for path in paths]
    stamps = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()
    paths[1].write_bytes(contents[1][:50])
    cam.run(settings, weights)
    assert [read_seed(path).cam.shape for path in paths]
    assert [path.stat().st_mtime_ns for path in paths[2:]] == stamps[2:]


def test_seeds_do_not_depend_on_where_the_pretrained_weights_were(trained) -> None:
    settings, weights = trained
    folder = cam.run(settings, weights)
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "seeds").iterdir()}
    moved = settings.model.model_copy(update={"weights": Path("elsewhere/imagenet.safetensors")})
    cam.run(settings.model_copy(update={"model": moved}), weights)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.parametrize("other", [{"scales": (1.5,)}, {"pixels": 4096}], ids=str)
def test_other_settings_make_new_seeds(trained, other: dict[str, Any]) -> None:
    settings, weights = trained
    folder = cam.run(settings, weights)
    path = min((folder / "seeds").iterdir())
    before = read_seed(path).cam
    cam.run(settings.model_copy(update={"cam": settings.cam.model_copy(update=other)}), weights)
    assert not np.array_equal(before, read_seed(path).cam)


def test_another_threshold_draws_anew_and_makes_no_seeds(trained, monkeypatch) -> None:
    settings, weights = trained
    folder = cam.run(settings, weights)

    def stamps(name: str) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (folder / name).iterdir()}

    def never(*arguments) -> None:
        raise AssertionError("the network is not needed")

    monkeypatch.setattr(inference, "summed_cams", never)
    seeds, manifest = stamps("seeds"), (folder / "made_by.json").read_bytes()
    path = min((folder / "masks").iterdir())
    assert (read_mask(path) > 0).any()
    cam.run(settings.model_copy(update={"cam": settings.cam.model_copy(update={"mask_threshold": 1.0})}), weights)
    assert not (read_mask(path) > 0).any()
    assert stamps("seeds") == seeds
    assert (folder / "made_by.json").read_bytes() == manifest

    masks = stamps("masks")
    path.unlink()
    (folder / "overlays" / f"{path.stem}.jpg").unlink()
    cam.run(settings.model_copy(update={"cam": settings.cam.model_copy(update={"mask_threshold": 1.0})}), weights)
    again = stamps("masks")
    assert {name for name in masks if again[name] != masks[name]} == {path.name}
    assert again.keys() == masks.keys()
    assert {Path(name).stem for name in masks} == {Path(name).stem for name in stamps("overlays")}


class Painter(torch.nn.Module):
    """A network whose CAM is the image itself, at an eighth of its size."""

    widest = 0

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Cams:
        assert len(images) == len(labels)
        self.widest = max(self.widest, images[:, 0].numel())
        small = F.interpolate(images, scale_factor=1 / 8, mode="area")
        maps = torch.cat([torch.zeros_like(small[:, :1]), small], dim=1)
        return Cams(-maps, maps)


def summed(batch: ScaledBatch, labels: torch.Tensor, network: Any = None, **options) -> list[torch.Tensor]:
    network = network or Painter()
    return inference.summed_cams(network, batch, labels, config.Cam(**options)).cams


def test_scales_and_flips_are_summed_in_place() -> None:
    """A network that returns its input gives twice the image for a flip pair at one scale, and sums over scales."""
    image = torch.zeros(1, 3, 64, 96)
    image[:, 1, 16:32, 8:40] = 1.0
    labels = torch.tensor([[False, True, True]])
    batch = ScaledBatch([0], (64, 96), [image, F.interpolate(image, scale_factor=2)])
    (single,), (double,) = (summed(batch, labels, flip=flip) for flip in (False, True))
    assert single.shape == (2, 64, 96)
    torch.testing.assert_close(double, 2 * single)
    assert single[1].abs().max() == 0
    assert single[0, 24, 24] > 1.9  # inside the rectangle, at both scales
    assert single[0, 50, 80] == 0
    (raw,) = summed(batch, labels, flip=False, map="raw")
    assert raw.abs().max() == 0  # negative logits do not count


def test_a_forward_pass_keeps_to_the_pixels() -> None:
    images = torch.rand(2, 3, 64, 96)
    labels = torch.tensor([[True, True, False], [False, False, True]])
    batch = ScaledBatch([0, 1], (64, 96), [images])
    together, apart = Painter(), Painter()
    expected = summed(batch, labels, together)
    found = summed(batch, labels, apart, pixels=images[:, 0].numel())
    assert (together.widest, apart.widest) == (4 * 64 * 96, 2 * 64 * 96)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_an_image_without_tags_has_no_maps() -> None:
    images = torch.rand(2, 3, 64, 96)
    labels = torch.tensor([[False, False, False], [False, False, True]])
    found = summed(ScaledBatch([0, 1], (64, 96), [images]), labels)
    assert [own.shape for own in found] == [(0, 64, 96), (1, 64, 96)]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(tiny_config) -> None:
    """torch raises if the CPU waits. The sums equal the CPU's up to rounding."""
    settings = config_file.load(tiny_config())
    torch.manual_seed(0)
    network = build_network(settings).eval()
    scales = [torch.rand(2, 3, 64, 96), torch.rand(2, 3, 96, 144)]
    labels = torch.arange(2 * len(settings.classes)).view(2, -1) % 2 == 0
    with torch.inference_mode():
        expected = inference.summed_cams(network, ScaledBatch([0, 1], (64, 96), scales), labels, settings.cam)
        network, scales = network.cuda(), [images.cuda() for images in scales]
        batch = ScaledBatch([0, 1], (64, 96), scales)
        inference.summed_cams(network, batch, labels, settings.cam)  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = inference.summed_cams(network, batch, labels, settings.cam)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip([*expected.cams, expected.probabilities], [*found.cams, found.probabilities], strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-2, atol=1e-2)


def test_seeds_of_images_whose_tags_changed_are_made_again(tiny_config, tmp_path) -> None:
    tags = tmp_path / "tags.json"
    settings = config_file.load(tiny_config(train={"steps": 1}))
    samples = load_samples(
        settings.data, settings.classes, settings.data.train_list.with_name("val.txt"), labels=True, masks=False
    )
    named = {s.id: [settings.classes[k] for k in np.flatnonzero(s.label)] for s in samples}
    tags.write_text(json.dumps(named))
    own = settings.model_copy(update={"data": settings.data.model_copy(update={"labels": tags})})
    weights, val = train.run(settings), settings.data.train_list.with_name("val.txt")
    folder = cam.run(own, weights, val)
    first, *others = (folder / "seeds" / f"{sample.id}.npz" for sample in samples)
    before = [path.stat().st_mtime_ns for path in others]
    named[samples[0].id] = [name for name in settings.classes if name not in named[samples[0].id]]
    tags.write_text(json.dumps(named))
    cam.run(own, weights, val)
    assert [settings.classes[k] for k in read_seed(first).classes] == named[samples[0].id]
    assert [path.stat().st_mtime_ns for path in others] == before


def test_classes_in_another_order_than_the_weights_are_refused(tiny_config, small_voc: Path) -> None:
    path = tiny_config()
    settings = config_file.load(path)
    weights = train.run(settings)
    seeds = cam.run(settings, weights) / "seeds"
    before = {file: file.read_bytes() for file in seeds.iterdir()}
    turned = settings.model_copy(update={"classes": settings.classes[::-1], "data": settings.data})
    for stage in (cam.run, information.run):
        with pytest.raises(UserError, match=f"trained on the classes {', '.join(settings.classes)}, and the config"):
            stage(turned, weights)
    for use in (
        lambda: evaluate.run(turned, cams=seeds, masks=None, list_path=None, threshold_from=None),
        lambda: evaluate.run(turned, cams=None, masks=seeds.parent / "masks", list_path=None, threshold_from=None),
        lambda: segment.run(turned, seeds.parent / "masks"),
        lambda: refine.run(turned),
    ):
        with pytest.raises(UserError, match=f"its files are of the classes {', '.join(settings.classes)}"):
            use()
    assert {file: file.read_bytes() for file in seeds.iterdir()} == before
