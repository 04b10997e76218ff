from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from typer.testing import CliRunner

import cpn_fast
from cpn_fast import config_file
from cpn_fast.cli import app
from cpn_fast.commands import predict
from cpn_fast.commands.annotations import FORMS
from cpn_fast.commands.trained_model import PRESENT, CamModel
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.images import read_image
from cpn_fast.data.masks import read_mask
from cpn_fast.data.seeds import STEPS, read_seed
from cpn_fast.models.affinity_net import build_affinity_net
from cpn_fast.models.weights import to_released_keys
from cpn_fast.runtime.errors import UserError

NO_TEXT = os.fsdecode(b"caf\xe9")
"""A name in Latin-1: Linux accepts it, but it is not UTF-8."""


@pytest.fixture
def samples(small_run: Path):
    settings = config_file.load(small_run / "config.yaml")
    return load_samples(
        settings.data, settings.classes, Path("ImageSets/Segmentation/val.txt"), labels=True, masks=False
    )


def test_given_the_tags_it_predicts_the_seeds_of_the_stage_cam(small_run: Path, samples) -> None:
    model = cpn_fast.load(small_run)
    for sample in samples:
        tags = [name for name, present in zip(model.classes, sample.label, strict=True) if present]
        prediction = model.predict(sample.image, tags)
        seed = read_seed(small_run / "cams/val/seeds" / f"{sample.id}.npz")
        assert prediction.seed.classes.tolist() == seed.classes.tolist()
        assert np.abs(prediction.seed.cam - seed.cam).max() <= 0.5 / STEPS + 1e-5
        assert (prediction.mask == read_mask(small_run / "cams/val/masks" / f"{sample.id}.png")).mean() > 0.999
    again = model.predict(read_image(samples[0].image), ["fish"])
    assert again.seed.classes.tolist() == [0]


def test_without_tags_it_takes_the_classes_that_it_finds(small_run: Path, samples) -> None:
    model = cpn_fast.load(small_run / "model.safetensors", device="cpu")
    prediction = model.predict(samples[0].image)
    assert list(prediction.probabilities) == list(model.classes)
    found = [index for index, value in enumerate(prediction.probabilities.values()) if value >= PRESENT]
    assert prediction.seed.classes.tolist() == found
    assert set(np.unique(prediction.mask)) <= {0, *(index + 1 for index in found)}


def test_what_the_model_cannot_do_is_said(small_run: Path, samples) -> None:
    model = cpn_fast.load(small_run)
    assert isinstance(model, CamModel)
    with pytest.raises(UserError, match=r"cam\.map: .*'refined' or 'raw', found 'Raw'"):
        model.with_map("Raw")  # type: ignore[arg-type]
    no_names: list[Any] = [[["red"]], [None], 3, True, {samples[0].image: 3}]
    for tags in no_names:
        with pytest.raises(UserError, match="expected names of classes, the same for all images"):
            model.predict([samples[0].image], tags)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cuda is asked for, and torch finds no GPU"):
            cpn_fast.load(small_run, "cuda")
        with pytest.raises(UserError, match=r"^device: "):  # the words depend on torch's build
            cpn_fast.load(small_run, 0)  # type: ignore[arg-type]


def test_an_array_is_predicted_as_its_file_is(small_run: Path, samples, tmp_path: Path) -> None:
    model = cpn_fast.load(small_run)
    image = read_image(samples[0].image)
    Image.fromarray(image).save(tmp_path / "a.png")
    one, other = model.predict(image, ["fish"]), model.predict(str(tmp_path / "a.png"), ["fish"])
    assert np.array_equal(one.seed.cam, other.seed.cam)
    for wrong in (image.astype(np.float32), image[None], image[..., :2], image[:0]):
        with pytest.raises(ValueError, match=r"uint8 RGB"):
            model.predict(wrong)
    others: list[Any] = [Image.fromarray(image).convert("I"), None, b"jpeg", torch.from_numpy(image), (image, image)]
    for other_kind in others:
        with pytest.raises(ValueError, match=r"^an image (is|has) "):
            model.predict(other_kind)


def test_pictures_of_every_kind_and_lists_of_them_are_predicted(small_run: Path, samples) -> None:
    model = cpn_fast.load(small_run)
    photo = Image.open(samples[0].image)
    gray = np.asarray(photo.convert("L"))
    found = model.predict([samples[0].image, str(samples[1].image), photo, gray, gray[..., None]], tags="fish")
    assert [prediction.seed.classes.tolist() for prediction in found] == [[0]] * 5
    assert np.array_equal(found[0].mask, model.predict(samples[0].image, ["fish"]).mask)
    assert np.abs(found[0].seed.cam - found[2].seed.cam).max() < 1e-3
    assert np.array_equal(found[3].seed.cam, found[4].seed.cam)
    assert np.array_equal(found[3].seed.cam, model.predict(photo.convert("L"), "fish").seed.cam)
    with pytest.raises(UserError, match=r"tags that are not classes: fsh; did you mean fish\?"):
        model.predict(gray, "fsh")


def test_a_checkpoint_loads_with_the_config_of_its_run(small_run: Path, samples) -> None:
    (checkpoint,) = (small_run / "checkpoints").glob("*.pt")
    expected = cpn_fast.load(small_run).predict(samples[0].image, ["bird"])
    assert np.array_equal(cpn_fast.load(checkpoint).predict(samples[0].image, ["bird"]).seed.cam, expected.seed.cam)


def test_the_command_writes_overlay_mask_and_json(small_run: Path, samples, tmp_path: Path) -> None:
    images = [str(sample.image) for sample in samples[:2]]
    arguments = ["predict", *images, "--model", str(small_run), "--out", str(tmp_path / "out"), "--tags", "fish; bird"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    for sample in samples[:2]:
        mask = read_mask(tmp_path / "out" / f"{sample.id}_mask.png")
        summary = json.loads((tmp_path / "out" / f"{sample.id}.json").read_text())
        assert list(summary["classes"]) == ["fish", "bird"]
        assert summary["classes"]["bird"]["mask_value"] == 5
        assert summary["classes"]["bird"]["area"] == pytest.approx((mask == 5).mean(), abs=1e-4)
        assert Image.open(tmp_path / "out" / f"{sample.id}_overlay.png").mode == "RGB"


def test_photos_of_any_kind_and_folders_of_them_are_segmented(small_run: Path, samples, tmp_path: Path) -> None:
    photos, out = tmp_path / "my photos", tmp_path / "out"
    photos.mkdir()
    photo = Image.open(samples[0].image)
    turn = Image.Exif()
    turn[0x0112] = 6
    photo.crop((0, 0, 90, 60)).save(photos / "turned.JPG", exif=turn)
    photo.crop((0, 0, 90, 60)).save(photos / "turned too.tif", exif=turn)
    for mode, name in (("L", "gray.jpg"), ("CMYK", "cmyk.jpeg"), ("P", "palette.png"), ("RGBA", "alpha.png")):
        photo.convert(mode).save(photos / name)
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(photos / "16 bits.png")
    photo.resize((3, 2)).save(photos / "tiny.png")
    photo.convert("L").save(photos / f"{NO_TEXT}.png")
    (photos / "notes.txt").touch()
    arguments = ["predict", str(photos), "--model", str(small_run), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--tags", "fish"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "JSON of 9 images" in result.output
    assert "Left out: 1 files that are not images" in result.output
    assert "notes.txt" in result.output
    shapes = {path.name.removesuffix("_mask.png"): read_mask(path).shape for path in out.glob("*_mask.png")}
    full = photo.size[::-1]
    assert shapes == {"turned": (90, 60), "turned too": (90, 60), "tiny": (2, 3)} | dict.fromkeys(
        ("gray", "cmyk", "palette", "alpha", "16 bits", NO_TEXT), full
    )
    assert json.loads((out / f"{NO_TEXT}.json").read_bytes())["image"] == str(photos / f"{NO_TEXT}.png")
    blank = CliRunner().invoke(app, [*arguments, "--tags", ";"], catch_exceptions=False)
    assert "no class has a probability" not in blank.output  # the tags say that there is none
    assert list(json.loads((out / "gray.json").read_text())["probabilities"]) == list(cpn_fast.load(small_run).classes)


def test_a_run_becomes_a_program_that_plain_torch_runs_at_any_size(small_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    result = CliRunner().invoke(app, ["convert", str(small_run), str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model = cpn_fast.load(small_run, device="cpu")
    inputs = []
    for shape in ((1, 3, 64, 96), (3, 3, 75, 51)):
        images, tags = torch.rand(shape) * 255, (torch.rand(shape[0], 5) < 0.5).float()
        inputs.append((images, tags))
    torch.save(inputs, tmp_path / "inputs.pt")
    elsewhere = f"""
import sys, torch
program = torch.export.load({str(path)!r}).module()
torch.save([program(*each) for each in torch.load({str(tmp_path / "inputs.pt")!r})], {str(tmp_path / "outputs.pt")!r})
assert "cpn_fast" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", elsewhere], check=True, cwd=tmp_path)
    network = model.network
    for (images, tags), (probabilities, maps) in zip(inputs, torch.load(tmp_path / "outputs.pt"), strict=True):
        with torch.no_grad():
            cams = network(
                (images - torch.tensor(network.mean).view(3, 1, 1)) / torch.tensor(network.std).view(3, 1, 1)
            )
        large = [
            F.interpolate(c, images.shape[2:], mode="bilinear", align_corners=True) for c in (cams.raw, cams.refined)
        ]
        torch.testing.assert_close(probabilities, large[0][:, 1:].mean((2, 3)).sigmoid())
        torch.testing.assert_close(maps, large[1][:, 1:] * tags[:, :, None, None], rtol=1e-4, atol=1e-5)
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"exists already"):
        model.export(path)
    assert path.read_bytes() == b"mine"


def largest_error(session: Any, graph: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """Return the largest error of onnxruntime's outputs against torch's."""
    given = {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        expected = graph.eval()(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = session.run(None, given)
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected, strict=True))


def test_a_run_and_its_segmenter_become_onnx_of_any_size(
    small_run: Path, small_segmenter: Path, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    for source, name in ((small_run, "cam.onnx"), (small_segmenter, "segmenter.onnx")):
        path = tmp_path / name
        result = CliRunner().invoke(app, ["convert", str(source), str(path)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        session = onnxruntime.InferenceSession(str(path))
        model = cpn_fast.load(source, device="cpu")
        assert [output.name for output in session.get_outputs()] == list(model.outputs)
        graph, _ = model.graph()
        for shape in ((1, 3, 64, 96), (3, 3, 75, 51)):
            images, tags = torch.rand(shape) * 255, (torch.rand(shape[0], len(model.classes)) < 0.5).float()
            assert largest_error(session, graph, images, *[tags][: len(session.get_inputs()) - 1]) < 1e-4
    with pytest.raises(UserError, match=r"ends in \.pt2 or \.onnx"):
        model.export(tmp_path / "model.pb")


def test_the_segmenter_becomes_a_program_of_plain_torch(small_segmenter: Path, tmp_path: Path) -> None:
    model = cpn_fast.load(small_segmenter, device="cpu")
    model.export(tmp_path / "segmenter.pt2")
    program = torch.export.load(tmp_path / "segmenter.pt2").module()
    images = torch.rand(2, 3, 75, 51) * 255
    with torch.no_grad():
        torch.testing.assert_close(program(images), model.graph()[0].eval()(images))
    assert program(images).shape == (2, 1 + len(model.classes), 75, 51)


def test_the_segmenter_of_a_run_segments_photos_as_its_stage_does(small_segmenter: Path, tmp_path: Path) -> None:
    """This includes scales, flip and CRF. It needs no tags."""
    settings = config_file.load(small_segmenter / "config.yaml")
    samples = load_samples(settings.data, settings.classes, settings.segment.eval_list, labels=False, masks=False)
    images, out = [str(sample.image) for sample in samples], tmp_path / "out"
    arguments = ["predict", *images, "--model", str(small_segmenter), "--out", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model, found = cpn_fast.load(small_segmenter), set()
    for sample in samples:
        mask = read_mask(out / f"{sample.id}_mask.png")
        staged = {
            kind: read_mask(small_segmenter.parent / "val" / kind / f"{sample.id}.png") for kind in ("masks", "crf")
        }
        assert (mask == staged["crf"]).mean() > 0.999
        assert (mask == staged["masks"]).mean() < 0.99
        assert Image.open(out / f"{sample.id}_overlay.png").mode == "RGB"
        summary = json.loads((out / f"{sample.id}.json").read_text())
        values = [entry["mask_value"] for entry in summary["classes"].values()]
        assert values == sorted({*mask.ravel().tolist()} - {0})
        assert [settings.classes[value - 1] for value in values] == list(summary["classes"])
        for entry in summary["classes"].values():
            assert entry["area"] == pytest.approx((mask == entry["mask_value"]).mean(), abs=1e-4)
        assert list(summary["probabilities"]) == list(settings.classes)
        assert "background_threshold" not in summary
        prediction = model.predict(read_image(sample.image))
        assert np.array_equal(prediction.mask, mask)
        assert (prediction.seed.classes + 1).tolist() == values
        for index, scores in zip(prediction.seed.classes, prediction.seed.cam, strict=True):
            assert scores.max() == pytest.approx(prediction.probabilities[settings.classes[index]])
        found.update(values)
    assert len(found) > 1  # with one class the test would show nothing

    checkpoint = next((small_segmenter / "checkpoints").glob("*.pt"))
    assert np.array_equal(
        cpn_fast.load(checkpoint).predict(samples[0].image).mask, model.predict(samples[0].image).mask
    )


def test_an_image_without_classes_is_said_and_a_tiny_one_is_segmented(small_segmenter: Path, tmp_path: Path) -> None:
    model = shutil.copytree(small_segmenter, tmp_path / "deeplab", ignore=shutil.ignore_patterns("checkpoints"))
    weights = load_file(model / "model.safetensors")
    weights["cls_conv.bias"][0] = 1e3  # background everywhere
    save_file(weights, model / "model.safetensors")
    Image.new("RGB", (3, 2)).save(tmp_path / "tiny.png")
    arguments = ["predict", str(tmp_path / "tiny.png"), "--model", str(model), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "In 1 no pixel is of a class" in result.output
    assert read_mask(tmp_path / "out/tiny_mask.png").tolist() == [[0] * 3] * 2


def test_what_the_parts_of_a_run_cannot_do_is_said(small_segmenter: Path, samples, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a segmenter, which finds the classes itself: give it no tags"):
        cpn_fast.load(small_segmenter).predict(samples[0].image, ["fish"])
    settings = config_file.load(small_segmenter / "config.yaml")
    shutil.copy(small_segmenter / "config.yaml", tmp_path)
    affinity = to_released_keys(build_affinity_net(settings.model).state_dict())
    save_file({key: tensor.contiguous() for key, tensor in affinity.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"AffinityNet's weights, which know no classes; give the folder of the run"):
        cpn_fast.load(tmp_path)


def test_what_is_wrong_is_said(small_run: Path, samples, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file of weights; `cpn-fast train` writes"):
        cpn_fast.load(tmp_path)
    with pytest.raises(UserError, match=r"no such file of weights; trained runs there: .*small"):
        cpn_fast.load(small_run.parent)
    with pytest.raises(UserError, match=r"tags that are not classes: brid; did you mean bird\?"):
        cpn_fast.load(small_run).predict(samples[0].image, ["brid"])
    with pytest.raises(UserError, match=r"no such file: .*nowhere\.jpg"):
        predict.run(small_run, [tmp_path / "nowhere.jpg"], tmp_path, None)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: no images in that folder"):
        predict.run(small_run, [tmp_path / "none"], tmp_path, None)
    shutil.copy(small_run / "model.safetensors", tmp_path)
    assert cpn_fast.load(tmp_path).config == cpn_fast.load(small_run).config  # the weights hold the config
    save_file(load_file(small_run / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no config\.yaml beside it"):
        cpn_fast.load(tmp_path)
    with pytest.raises(UserError, match=r"tags that are not classes: cat\. Classes are: fish"):
        cpn_fast.load(small_run).predict(samples[0].image, ["cat", "fish"])
    with pytest.raises(UserError, match=r"nowhere\.jpg"):
        cpn_fast.load(small_run).predict(tmp_path / "nowhere.jpg")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_folders_keep_their_names_hidden_files_are_passed_over_and_bad_ones_named_last(
    small_run: Path, samples, tmp_path: Path
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for place in ("a/0.JPG", "b/0.jpg", "._0.jpg", ".thumbs/0.jpg", "b/notes.txt"):
        (photos / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(samples[0].image, photos / place)
    whole = samples[1].image.read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "b/empty.png").touch()
    (photos / "c.webp").write_bytes(b"")
    Image.open(samples[1].image).save(photos / "c.webp")
    (out / "b").mkdir(parents=True)
    (out / "b/.gone_mask.png.cpn-fast.tmp").touch()  # as a killed command leaves it, of another photo
    result = invoke(photos, "--model", small_run, "--out", out, "--tags", "fish")
    assert not list(out.rglob(".*"))
    assert isinstance(result.exception, UserError)
    message = str(result.exception)
    assert "2 images cannot be read, the others are done" in message
    assert "cut.jpg" in message
    assert "empty.png (empty file)" in message
    assert "JSON of 3 images" in result.output
    assert "Left out: 1 files that are not images" in result.output
    assert "notes.txt" in result.output
    assert {path.relative_to(out).as_posix() for path in out.rglob("*_mask.png")} == {
        "a/0_mask.png",
        "b/0_mask.png",
        "c_mask.png",
    }


def test_a_file_gives_each_image_its_tags(small_run: Path, samples, tmp_path: Path) -> None:
    first, second, third = samples[:3]
    tags = tmp_path / "tags.csv"
    tags.write_text(f"{first.id}.jpg,fish\n{second.id},fish;bird\n")
    out = tmp_path / "out"
    images = [first.image, second.image, third.image]
    result = invoke(*images, "--model", small_run, "--out", out, "--tags", tags)
    assert result.exit_code == 0, result.output
    found = [list(json.loads((out / f"{sample.id}.json").read_text())["classes"]) for sample in (first, second)]
    assert found == [["fish"], ["fish", "bird"]]
    assert f"has no tags of 1 images ({third.image})" in result.output.replace("\n", "")
    tags.write_text(f"{first.id},fsh\n")
    assert "did you mean fish" in str(invoke(first.image, "--model", small_run, "--out", out, "--tags", tags).exception)


def test_a_list_of_classes_is_not_taken_for_a_path(small_run: Path, samples, tmp_path: Path, monkeypatch) -> None:
    image, name = samples[0].image, config_file.load(small_run / "config.yaml").classes[0]
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    for tags in (name, ";".join([name] * 60)):  # a folder of this name; longer than a name of a file
        result = invoke(image, "--model", small_run, "--tags", tags)
        assert result.exit_code == 0, result.output
        assert "has no tags" not in result.output
        assert list(json.loads(Path(f"predictions/{image.stem}.json").read_text())["classes"]) == [name]
    assert "--tags is empty" in str(invoke(image, "--model", small_run, "--tags", " ").exception)
    assert "no home folder of ~no-such-user" in str(
        invoke(image, "--model", small_run, "--tags", "~no-such-user/x.csv").exception
    )


def test_its_own_results_and_masks_are_no_photos(small_run: Path, samples, tmp_path: Path) -> None:
    for sample in samples[:2]:
        shutil.copy(sample.image, tmp_path)
    for name in ("SegmentationClass", "SegmentationObject"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / f"{samples[0].id}.png")
    for _ in range(2):
        assert predict.run(small_run, [tmp_path], tmp_path, None).images == 2
    assert predict.run(small_run, [tmp_path], tmp_path / "out", None).images == 2


@pytest.mark.parametrize("foreign", ["{}.json", "{}_mask.png", "{}_overlay.png", "own photo"])
def test_files_of_other_programs_are_not_replaced(foreign: str, small_run: Path, samples, tmp_path: Path) -> None:
    image = tmp_path / "p.jpg"
    shutil.copy(samples[0].image, image)
    theirs = tmp_path / foreign.format("p")
    images = [image]
    if foreign == "own photo":
        theirs = tmp_path / "p_mask.png"
        images.append(theirs)
    if theirs.suffix == ".json":
        theirs.write_text('{"shapes": []}')
    else:
        Image.new("L", (8, 8)).save(theirs)
    before = theirs.read_bytes()
    with pytest.raises(UserError, match=rf"would be replaced \({theirs.name}\): name another --out"):
        predict.run(small_run, images, tmp_path, None)
    assert theirs.read_bytes() == before
    theirs.unlink()
    predict.run(small_run, [image], tmp_path, None)
    (tmp_path / "p.json").unlink()  # as after a kill between mask and JSON
    assert predict.run(small_run, [image], tmp_path, None).images == 1


@pytest.mark.parametrize("form", FORMS)
def test_annotations_of_other_programs_are_not_replaced(form: str, small_run: Path, samples, tmp_path: Path) -> None:
    predicted = predict.run(small_run, [samples[0].image], tmp_path, None, [form])
    predict.run(small_run, [samples[0].image], tmp_path, None, [form])  # its own are
    (path,) = predicted.annotations
    refused = pytest.raises(UserError, match=rf"would be replaced \({path.name}\): name another --out")
    path.write_text("[]")
    with refused:
        predict.run(small_run, [samples[0].image], tmp_path, None, [form])
    assert path.read_text() == "[]"
    path.unlink()
    os.mkfifo(path)  # it must not wait for a writer
    with refused:
        predict.run(small_run, [samples[0].image], tmp_path, None, [form])


def test_a_missing_file_of_tags_is_no_class(small_run: Path, samples, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tags nope\.csv: no such file of tags"):
        predict.run(small_run, [samples[0].image], tmp_path, "nope.csv")


def test_tags_may_be_any_names_of_classes(small_run: Path, samples) -> None:
    model, image = cpn_fast.load(small_run), samples[0].image
    name = model.classes[2]
    every: tuple[Any, ...] = (name, [name], (each for each in [name]), {str(image): [name]}, {image: [name]})
    for tags in every:
        assert model.predict(image, tags).seed.classes.tolist() == [2]
    no_images: list[Any] = ["other.jpg", 0]
    for unknown in no_images:
        with pytest.raises(UserError, match=f"tags of files that are not among the images: {unknown}"):
            model.predict(image, {unknown: [name]})
    found = model.predict(image)
    assert np.array_equal(model.predict(image, {image: None}).seed.classes, found.seed.classes)
    with pytest.raises(UserError, match=r"device: expected cuda, cuda:1, .* found 'gpu'"):
        cpn_fast.load(small_run, "gpu")


def test_annotations_are_written_beside_the_masks(small_run: Path, samples, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    forms = [word for form in FORMS for word in ("--annotations", form)]
    image = samples[0].image
    result = invoke(image, "--model", small_run, "--out", tmp_path, "--tags", "fish", *forms)
    assert result.exit_code == 0, result.output
    tree = json.loads((tmp_path / "coco.json").read_text())
    assert [entry["file_name"] for entry in tree["images"]] == [str(image)]
    assert (tmp_path / "coco-polygons.json").exists()
    assert (tmp_path / "label-studio.json").exists()
    assert (tmp_path / "cvat.xml").exists()
    assert "expected one of coco" in str(invoke(image, "--model", small_run, "--annotations", "yolo").exception)
    shutil.copy(image, tmp_path / "coco.jpg")
    refused = invoke(tmp_path / "coco.jpg", "--model", small_run, "--out", tmp_path / "x", "--annotations", "coco")
    assert "images are called coco, and so are files of --annotations" in str(refused.exception)


def test_names_that_leave_no_room_for_their_outputs_are_told_before_anything_starts(tmp_path) -> None:
    image = tmp_path / f"{'x' * 244}.jpg"
    image.write_bytes(b"never read")
    with pytest.raises(UserError, match=r"more than 243 bytes are too long for a file NAME_overlay\.png: rename"):
        predict.run(tmp_path / "no-model-either", [image], tmp_path / "out", None)
