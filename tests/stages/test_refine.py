from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from cpn_fast import config_file
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.images import read_image
from cpn_fast.data.masks import IGNORE, read_mask
from cpn_fast.data.seeds import Seed
from cpn_fast.models.affinity_net import build_affinity_net
from cpn_fast.pipelines.inference import ScaledBatch
from cpn_fast.refinement import affinity, walk
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import cam, refine, segment, train

AFFINITY = {
    "augment": {"long_side": [64, 96], "crop": 64},
    "train": {"batch": 2, "steps": 2, "checkpoint_every": 1, "data_threads": 1},
}


@pytest.fixture
def seeded(tiny_config):
    """Return a config whose training list has seeds."""
    settings = config_file.load(tiny_config(train={"steps": 1}, affinity=AFFINITY, crf={"workers": 1}))
    cam.run(settings, train.run(settings), settings.data.train_list)
    return settings


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_from_seeds_to_pseudo_masks(seeded, capsys) -> None:
    masks = refine.run(seeded)
    samples = load_samples(seeded.data, seeded.classes, seeded.data.train_list, labels=True, masks=True)
    for sample in samples:
        truth, present = read_mask(sample.mask), {0, *(np.flatnonzero(sample.label) + 1)}
        mask = read_mask(masks / f"{sample.id}.png")
        low, high = (read_mask(masks.parent / name / f"{sample.id}.png") for name in ("crf-low", "crf-high"))
        labels = read_mask(masks.parent / "labels" / f"{sample.id}.png")
        assert {mask.shape, low.shape, high.shape, labels.shape} == {truth.shape}
        assert set(np.unique(mask)) <= present
        assert set(np.unique(labels)) <= {*present, IGNORE}
        assert (low > 0).sum() <= (high > 0).sum()  # a large background score leaves less to the classes
        np.testing.assert_array_equal(labels, affinity.combined_labels(low, high))
    assert "f8_5.weight" in load_file(masks.parent / "affinity" / "model.safetensors")


def test_finished_parts_are_kept_and_changed_ones_made_again(seeded) -> None:
    masks = refine.run(seeded)
    before = contents(masks.parent)
    refine.run(seeded)
    after = contents(masks.parent)
    manifests = {name for name in before if name.endswith("made_by.json")}
    kept = {name for name in before if name.endswith((".png", ".safetensors", ".pt"))}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert {name: after[name][1] for name in manifests} == {name: before[name][1] for name in manifests}

    refine.run(seeded.model_copy(update={"walk": seeded.walk.model_copy(update={"alpha": 1.0})}))
    changed = contents(masks.parent)
    assert {name for name in kept if changed[name][0] != before[name][0]} == {
        name for name in kept if name.startswith("masks/")
    }

    refine.run(seeded.model_copy(update={"crf": seeded.crf.model_copy(update={"high_alpha": 100.0})}))
    again = contents(masks.parent)
    same = {name for name in kept if name.startswith("crf-low/")}
    for name in kept:  # labels of masks that did not change
        high = name.replace("labels/", "crf-high/")
        if high != name and again[high][1] == before[high][1]:
            same.add(name)
    assert {name for name in kept if again[name][0] == before[name][0]} == same


def test_an_interrupted_stage_continues(seeded, capfd) -> None:
    """Files that were lost or damaged in any part come back unchanged. Other files are not touched."""
    masks = refine.run(seeded)
    folder = masks.parent
    before = contents(folder)
    lost = ["affinity/model.safetensors", "affinity/checkpoints/step-00000002.pt"]
    for name in ("crf-low", "labels", "masks"):
        lost += [f"{name}/{path.name}" for path in sorted((folder / name).glob("*.png"))[:2]]
    for name in lost[1::2]:
        (folder / name).unlink()
    for name in lost[::2]:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:-1])
    refine.run(seeded)
    warnings = capfd.readouterr().err
    assert all(f"{folder / name} is damaged and made again" in warnings for name in lost[2::2])
    after = contents(folder)
    for name in lost:
        if not name.endswith(".pt"):
            assert after[name][1] == before[name][1]
    untouched = {name for name in before if name.endswith(".png") and name not in lost}
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}


def test_other_tags_of_an_image_make_its_files_and_affinity_net_anew(seeded, tmp_path: Path) -> None:
    samples = load_samples(seeded.data, seeded.classes, seeded.data.train_list, labels=True, masks=False)
    named = {sample.id: [seeded.classes[k] for k in np.flatnonzero(sample.label)] for sample in samples}
    source = tmp_path / "tags.json"
    settings = seeded.model_copy(update={"data": seeded.data.model_copy(update={"labels": source})})
    weights = seeded.run / "model.safetensors"

    def run() -> dict[str, tuple[int, bytes]]:
        source.write_text(json.dumps(named))
        cam.run(settings, weights, settings.data.train_list)
        return contents(refine.run(settings).parent)

    before = run()
    changed = samples[0].id
    named[changed] = [next(name for name in seeded.classes if name not in named[changed])]
    after = run()
    for part in ("crf-low", "crf-high", "labels", "masks"):
        allowed = {0, IGNORE, 1 + seeded.classes.index(named[changed][0])}
        assert set(np.unique(read_mask(settings.run / "refine" / part / f"{changed}.png"))) <= allowed
    old = {name for name in before if name.endswith(".png") and not name.startswith("masks/")}
    assert {name for name in old if after[name][0] != before[name][0]} == {
        f"{part}/{changed}.png" for part in ("crf-low", "crf-high", "labels")
    }
    assert after["affinity/metrics.jsonl"][0] != before["affinity/metrics.jsonl"][0]
    named.popitem()
    with pytest.raises(UserError, match="ids without labels"):
        run()


def test_other_settings_of_its_training_make_affinity_net_anew(seeded, capsys) -> None:
    before = contents(refine.run(seeded).parent)

    def run(**changes) -> dict[str, tuple[int, bytes]]:
        train_ = seeded.affinity.train.model_copy(update=changes)
        section = seeded.affinity.model_copy(update={"train": train_})
        return contents(refine.run(seeded.model_copy(update={"affinity": section})).parent)

    weights = "affinity/model.safetensors"
    assert run(log_every=1)[weights] == before[weights]
    assert "anew" not in capsys.readouterr().err
    run(steps=3)
    said = capsys.readouterr()
    assert "affinity is made anew" not in said.err
    assert "Going on after step 2: the run now has 3 steps" in said.out
    with pytest.raises(UserError, match=r"affinity\.train\.steps is 2, but .* has made 3 steps"):
        run(steps=2)
    after = run(steps=3, lr=0.02)
    assert "affinity is made anew, because these have changed: train.lr" in capsys.readouterr().err
    assert after[weights][1] != before[weights][1]
    assert {name for name in before if name.startswith(("crf", "labels")) and after[name] != before[name]} == set()


def test_a_finished_affinity_net_is_kept_until_another_can_be_trained(seeded) -> None:
    refine.run(seeded)
    weights = seeded.run / "refine/affinity/model.safetensors"
    before = weights.read_bytes()
    train_ = seeded.affinity.train.model_copy(update={"lr": 0.5})  # it must be trained anew
    other = {"affinity": seeded.affinity.model_copy(update={"train": train_})}
    for update, message in (
        ({"model": seeded.model.model_copy(update={"weights": Path("none.pth")})}, "none.pth"),
        ({"hook": "nowhere:log"}, "nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            refine.run(seeded.model_copy(update={**other, **update}))
    assert weights.read_bytes() == before


def test_seeds_of_other_weights_or_settings_are_said(seeded, capsys) -> None:
    refine.run(seeded)
    assert "Warning" not in capsys.readouterr().err
    longer = seeded.model_copy(update={"train": seeded.train.model_copy(update={"steps": 2})})
    train.run(longer)
    raw = longer.model_copy(update={"cam": longer.cam.model_copy(update={"map": "raw"})})
    refine.run(raw)
    said = capsys.readouterr().err
    assert "were made with other settings or weights than the run has now (weights_sha256, cam)" in said
    assert "cpn-fast cam CONFIG --list" in said


def test_missing_seeds_name_the_command(seeded) -> None:
    seeds = seeded.run / "cams" / "train" / "seeds"
    path = min(seeds.iterdir())
    path.unlink()
    with pytest.raises(UserError, match=rf"1 of the 12 images .* no seed there \({path.stem}\)") as caught:
        refine.run(seeded)
    assert "cpn-fast cam CONFIG --list ImageSets/Segmentation/train.txt" in str(caught.value)


def test_walked_scores_equal_the_released_steps(tiny_config) -> None:
    """Sides are multiples of 8, which need no padding. Images have different numbers of classes."""
    changes = {"walk": {"beta": 2.0}, "affinity": {"train": {"steps": 1, "precision": "fp32"}}}
    settings = config_file.load(tiny_config(**changes))  # with beta 8 the affinities of an untrained network vanish
    torch.manual_seed(0)
    network = build_affinity_net(settings.model).eval()
    rng = np.random.default_rng(0)
    seeds = [
        Seed(np.array([1]), rng.random((1, 64, 96), np.float32)),
        Seed(np.array([0, 3]), rng.random((2, 64, 96), np.float32)),
    ]
    images = torch.randn(2, 3, 64, 96)
    found = refine.walked_scores(network, ScaledBatch([0, 1], (64, 96), [images]), seeds, settings)
    for image, seed, own in zip(images, seeds, found, strict=True):
        planes = torch.zeros(1 + len(settings.classes), 64, 96)
        planes[1 + seed.classes] = torch.from_numpy(seed.cam)
        planes[0] = (1 - planes[1:].amax(0)) ** settings.walk.alpha
        pooled = F.avg_pool2d(planes, 8)
        with torch.no_grad():
            features = network(image[None])
        radius = affinity.fitting_radius(settings.affinity.radius, 8, 12)
        matrix = walk.transition(
            affinity.pair_affinities(features, radius), (8, 12), radius=radius, beta=settings.walk.beta
        ).to_dense()
        walked = pooled.flatten(1) @ torch.linalg.matrix_power(matrix, 2**settings.walk.logt).T
        expected = F.interpolate(walked.view(1, -1, 8, 12), (64, 96), mode="bilinear")[0]
        np.testing.assert_allclose(own, expected[[0, *(1 + seed.classes)]], rtol=0, atol=1e-5)


@pytest.fixture
def own_images(small_voc: Path, tmp_path: Path):
    """Return a copy of the data set whose images a test may replace."""
    return Path(shutil.copytree(small_voc, tmp_path / "voc"))


def test_a_replaced_image_makes_its_files_and_what_learned_of_it_anew(own_images, tiny_config, capsys) -> None:
    """This holds from seeds to segmentations. Files of other images stay. CPN's network stays too, with a warning."""
    train_list = "ImageSets/Segmentation/train.txt"
    short = {"augment": {"long_side": [64, 96], "crop": 64}, "train": {"batch": 2, "steps": 1, "data_threads": 1}}
    path = tiny_config(
        data={"root": str(own_images), "train_list": train_list, "eval_list": train_list},
        train={"steps": 1},
        cam={"scales": [0.5]},
        crf={"workers": 1},
        affinity=short,
        walk={"logt": 1},
        segment={**short, "augment": {"crop": 64}, "scales": [0.5], "crf": None, "eval_list": train_list},
    )
    settings = config_file.load(path)

    def made() -> dict[str, int]:
        weights = train.run(settings)
        cam.run(settings, weights)
        masks = refine.run(settings)
        segment.segment(settings, segment.run(settings, masks))
        files = [file for ending in ("npz", "png", "safetensors") for file in settings.run.rglob(f"*.{ending}")]
        return {str(file.relative_to(settings.run)): file.stat().st_mtime_ns for file in files}

    before = made()
    image = own_images / "JPEGImages/train_0003.jpg"
    Image.fromarray(255 - read_image(image)).save(image)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"1 seeds were made from images or tags that have changed \(train_0003\)"):
        refine.run(settings)
    after = made()
    assert "trained on 1 other images under the same names (train_0003)" in capsys.readouterr().err
    anew = {name for name in before if after[name] != before[name]}
    own = {name for name in before if "train_0003" in name}
    follow = ("refine/affinity/", "refine/masks/", "segment/")  # they follow from AffinityNet and the segmenter
    assert own <= anew
    assert {name for name in anew - own if not name.startswith(follow)} == set()
    assert before["model.safetensors"] == after["model.safetensors"]
    assert after["segment/deeplab/model.safetensors"] != before["segment/deeplab/model.safetensors"]
    assert made() == after
