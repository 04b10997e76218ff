from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
from html import escape as html_escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cpn_fast.cli import app
from cpn_fast.commands import report, report_pictures
from cpn_fast.commands.agreement import all_found, weights_digests
from cpn_fast.config_file import dump, load
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.masks import read_mask, write_mask
from cpn_fast.data.seeds import read_seed, write_seed
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.files import read_json
from cpn_fast.stages import evaluate


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the small run that a test may change."""
    return shutil.copytree(small_run, tmp_path / "small")


PLOTS, CAMS = 4 + 3, 4 * 3 + 2 * 5
"""Plots: curves, threshold curve, classes, confusion. Image, ground truth and mask of 4 images; 2 maps of 5 tags."""


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_the_page_stands_alone_and_says_what_was_measured(run: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run)], catch_exceptions=False)
    assert result.exit_code == 0
    html = (run / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)  # the page loads nothing
    assert "<script" not in html
    assert "<td>superpixels.compactness" not in html  # because it has its default
    tree = json.loads((run / "evaluation/val/cams-val-seeds/evaluation.json").read_text())
    assert f"{100 * tree['results'][0]['mean_iou']:.2f}" in html
    assert "(oracle)" in html
    for words in (
        "Best images",
        "cpn with narrow on 12 images of 5 classes",
        "waiting for data",
        "backbone: narrow",
        "<td>superpixels.count</td><td>30</td>",
    ):
        assert words in html
    assert len(pictures(html)) == PLOTS + CAMS
    assert max(max(picture.size) for picture in pictures(html)[PLOTS:]) <= report_pictures.SIDE
    for caption in ("image", "ground truth", r"plain CAM: \w+", r"refined CAM: \w+", "mask"):
        assert re.search(rf"<figcaption>{caption}\b", html)
    assert html.index("Best images") < html.index("Worst images")
    assert "Seeds on val" not in html  # scored seeds are not compared with tags
    for anchor in re.findall(r'href="#([^"]+)"', html):
        assert f'id="{anchor}"' in html


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
HEADLESS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
LOOK = """<script>
const images = [...document.images];
document.body.dataset.images = images.length;
document.body.dataset.broken = images.filter(image => !image.complete || !image.naturalWidth || !image.alt).length;
document.body.dataset.beyond = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.body.dataset.asked = performance.getEntriesByType("resource").map(entry => entry.name);
</script>"""


@pytest.mark.skipif(not CHROMIUM or "snap" in str(Path(CHROMIUM).resolve()), reason="needs Chromium, not in a sandbox")
@pytest.mark.parametrize("width", [420, 1300])
def test_a_browser_shows_the_whole_page_and_asks_for_nothing(run: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    page.write_text(report.run(run).page.read_text().replace("</body>", f"{LOOK}</body>"))
    options = [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *HEADLESS, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300
    )
    assert f'data-images="{PLOTS + CAMS}" data-broken="0" data-beyond="0" data-asked=""' in done.stdout, (
        done.stdout[-300:] + done.stderr
    )
    for heading in ("Scores", "Training", "cams-val-seeds on val", "Best images", "Configuration"):
        assert re.search(rf"<h[23][^>]*>{heading}</h[23]>", done.stdout)
    assert "CONSOLE" not in done.stderr


def test_masks_and_several_lists_have_their_sections_and_names_are_escaped(run: Path, small_voc: Path) -> None:
    settings = load(run / "config.yaml")
    val = Path("ImageSets/Segmentation/val.txt")
    masks = run / "cams/val/masks & more"
    (run / "cams/val/masks").rename(masks)
    evaluate.run(
        settings.model_copy(update={"out": run.parent}), cams=None, masks=masks, list_path=val, threshold_from=None
    )
    html = report.run(run).page.read_text()
    assert "masks &amp; more" in html
    assert "masks & more" not in html
    shown = pictures(html)
    assert len(shown) == PLOTS + CAMS + 2 + CAMS  # masks have no threshold plot, and their CAMs appear too


def test_without_tags_masks_are_shown_without_cams(run: Path, small_voc: Path, tmp_path: Path) -> None:
    tree = load(run / "config.yaml")
    bare = tree.model_copy(update={"out": run.parent, "data": tree.data.model_copy(update={"labels": Path("nowhere")})})
    (run / "config.yaml").write_text(dump(bare))
    shutil.rmtree(run / "evaluation")
    val = Path("ImageSets/Segmentation/val.txt")
    evaluate.run(bare, cams=None, masks=run / "cams/val/masks", list_path=val, threshold_from=None)
    assert len(pictures(report.run(run).page.read_text())) == 4 + 2 + 4 * 3


def test_a_run_without_scores_or_weights_has_a_page_that_says_so(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    (run / "model.safetensors").unlink()
    (run / "metrics.jsonl").unlink()
    html = report.run(run).page.read_text()
    assert (
        f"Nothing has been scored yet. This command scores the seeds: <code>cpn-fast evaluate {run}/config.yaml" in html
    )
    assert "No line of metrics.jsonl" in html


def test_parts_that_were_trained_have_their_curves_and_half_a_line_is_no_obstacle(run: Path) -> None:
    part = run / "segment/deeplab"
    part.mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(run / name, part)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ep')
    (run / "environment.json").unlink()
    html = report.run(run).page.read_text()
    assert "Training of segment/deeplab" in html
    assert len(pictures(html)) == PLOTS + CAMS + 4


def test_damaged_lines_of_metrics_are_left_out(run: Path) -> None:
    path = run / "metrics.jsonl"
    whole = report._training(path, run)
    first = json.loads(path.read_text().splitlines()[0])
    damaged = [{"step": 1}, {**first, "images_per_second": "x"}, {**first, "step": 9, "loss": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in damaged[:2]) + path.read_text())
    assert dict(report._training(path, run)["figures"]) == dict(whole["figures"])
    path.write_text(json.dumps(damaged[2]) + "\n")
    figures = dict(report._training(path, run)["figures"])
    assert figures["steps"] == "9"
    assert "loss at the end" not in figures
    path.write_text(json.dumps(damaged[0]) + "\n")
    assert "figures" not in report._training(path, run)


@pytest.mark.parametrize(
    ("key", "value"),
    [("ids", None), ("list", 3), ("results", []), ("results", [{"kind": "oracle", "threshold": 0.5}])],
)
def test_scores_of_another_form_are_named(key: str, value: object, run: Path) -> None:
    (path,) = run.glob("evaluation/*/*/evaluation.json")
    path.write_text(json.dumps({**read_json(path), key: value}))
    with pytest.raises(UserError, match=rf"expected scores as this version writes them, found other {key}\. Evaluate"):
        report.run(run)


@pytest.mark.parametrize("name", ["environment.json", "evaluation.json"])
def test_a_list_instead_of_an_object_is_named(name: str, run: Path) -> None:
    (path,) = run.rglob(name)
    path.write_text("[]")
    with pytest.raises(UserError, match=rf"{name}: damaged \(expected an object, found a list\); delete it"):
        report.run(run)


def test_a_segmenter_has_a_page_that_names_the_report_of_its_run(small_segmenter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_segmenter, tmp_path / "small/segment/deeplab")
    result = CliRunner().invoke(app, ["report", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    html = (folder / "report.html").read_text()
    assert "segmenter with narrow on 12 images of 5 classes" in html
    assert f"<code>cpn-fast report {tmp_path / 'small'}</code>" in html
    assert "--cams" not in html
    assert len(pictures(html)) == 4  # curves


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml in it; give the folder of a run"):
        report.run(tmp_path)


def test_seeds_that_are_gone_are_named_and_the_old_page_stays(run: Path) -> None:
    page = report.run(run).page
    before = page.read_bytes()
    seed = next((run / "cams/val/seeds").glob("*.npz"))
    seed.unlink()
    with pytest.raises(UserError, match=seed.name):
        report.run(run)
    assert page.read_bytes() == before


def test_a_run_that_was_moved_has_its_own_seeds_on_its_page(small_run: Path, run: Path) -> None:
    for path in (run / "cams/val/seeds").glob("*.npz"):
        seed = read_seed(path)
        write_seed(path, dataclasses.replace(seed, cam=np.zeros_like(seed.cam)))
    changed = "These results or their ground truth have changed since they were scored"
    assert changed in report.run(run).page.read_text()
    shutil.rmtree(run)
    assert changed not in report.run(shutil.copytree(small_run, run)).page.read_text()


def test_scores_of_other_weights_than_the_run_has_are_said(run: Path) -> None:
    other = "Made with other weights than this run has now"
    assert other not in report.run(run).page.read_text()
    note = run / "cams/val/made_by.json"
    note.write_text(note.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    assert other in report.run(run).page.read_text()


def test_other_ground_truth_than_was_scored_is_said(run: Path, small_voc: Path, tmp_path: Path) -> None:
    other = shutil.copytree(small_voc, tmp_path / "voc")
    changed = "These results or their ground truth have changed since they were scored"
    assert changed not in report.run(run, [f"data.root={other}"]).page.read_text()
    for path in (other / "SegmentationClass").glob("*.png"):
        write_mask(path, np.roll(read_mask(path), 5, 0))
    assert changed in report.run(run, [f"data.root={other}"]).page.read_text()


def test_scores_of_an_older_list_or_ground_truth_are_named(run: Path, small_voc: Path, tmp_path: Path) -> None:
    path = next(run.glob("evaluation/*/*/evaluation.json"))
    before = read_json(path)
    path.write_text(json.dumps(before | {"ids": [*before["ids"], "gone"]}))
    with pytest.raises(UserError, match=r"no longer has gone\n.*Evaluate again, or delete this folder"):
        report.run(run)
    path.write_text(json.dumps(before | {"list": str(tmp_path / "none.txt")}))
    with pytest.raises(UserError, match=r"none\.txt: no such list(.|\n)*Evaluate again, or delete this folder"):
        report.run(run)


def test_images_that_moved_are_found_where_they_are_said_to_lie(
    small_run: Path, small_voc: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    path = run / "config.yaml"
    path.write_text(path.read_text().replace(str(small_voc), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"--set data\.root=FOLDER"):
        report.run(run)
    assert "data:image/jpeg" in report.run(run, [f"data.root={small_voc}"]).page.read_text()


VAL = Path("ImageSets/Segmentation/val.txt")


def test_photos_without_scores_are_ordered_by_how_their_tags_and_the_network_agree(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    settings = load(run / "config.yaml")
    samples = load_samples(settings.data, settings.classes, VAL, labels=True, masks=False)
    for sample, certainty in zip(samples, (0.9, 0.3, 0.7, 0.6), strict=True):
        path = run / f"cams/val/seeds/{sample.id}.npz"
        write_seed(path, read_seed(path), "", np.where(sample.label, certainty, 0.05))
    absent = int(np.flatnonzero(~samples[0].label)[0])  # of the photo with the most certain tags
    path = run / f"cams/val/seeds/{samples[0].id}.npz"
    write_seed(path, read_seed(path), "", np.where(np.arange(5) == absent, 0.8, np.where(samples[0].label, 0.9, 0)))
    (found,) = all_found(run, settings, weights_digests(run, settings))
    assert [photo.sample.id for photo in found.photos] == [samples[k].id for k in (2, 3, 1, 0)]
    assert found.photos[0].agreement == pytest.approx(0.7)
    assert found.photos[-1].doubt == f"{settings.classes[absent]} is not a tag; the network gives it 80%"
    tagged, missed = (np.sum([sample.label for sample in some], axis=0) for some in (samples, samples[1:2]))
    assert [count.tagged for count in found.classes] == tagged.tolist()
    assert [count.missed for count in found.classes] == missed.tolist()
    assert [count.found for count in found.classes] == (tagged - missed).tolist()
    assert [count.besides for count in found.classes] == [int(k == absent) for k in range(5)]

    html = report.run(run).page.read_text()
    assert "Made with other weights" not in html
    shown = re.findall(r"<h4>(\S+) <span>agreement (\d+)%; ([^<]*)", html)
    assert [(id_, share) for id_, share, _ in shown] == [
        (samples[k].id, share) for k, share in ((0, "20"), (1, "30"), (2, "70"), (3, "60"))
    ]
    name = settings.classes[int(np.flatnonzero(samples[1].label)[0])]
    assert f"<figcaption>heat: {name}, 30%" in html
    assert "It says nothing about outlines" in html
    note = run / "cams/val/made_by.json"
    note.write_text(note.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    assert "Made with other weights than this run has now" in report.run(run).page.read_text()


def test_masks_of_a_segmenter_are_compared_with_tags(run: Path) -> None:
    settings = load(run / "config.yaml")
    samples = load_samples(settings.data, settings.classes, VAL, labels=True, masks=True)
    for sample in samples[1:]:
        mask = read_mask(sample.mask).copy()
        if sample == samples[2]:
            mask[:] = 0
        write_mask(run / f"segment/val/masks/{sample.id}.png", mask)
    (found,) = (own for own in all_found(run, settings, weights_digests(run, settings)) if own.kind == "segment")
    assert [(photo.sample.id, photo.agreement) for photo in found.photos] == [
        (samples[1].id, 1),
        (samples[3].id, 1),
        (samples[2].id, 0),  # the first has no mask, so it is missing
    ]
    assert "is a tag and not found" in found.photos[-1].doubt
    html = report.run(run).page.read_text()
    assert "Masks of the segmenter on val" in html
    assert "mask: nothing" in html


def test_names_of_photos_and_classes_are_escaped(run: Path) -> None:
    """Names come from anywhere, and appear in text and in attributes."""
    shutil.rmtree(run / "evaluation")
    evil = '<b onclick="x">&'
    tree = load(run / "config.yaml")
    (run / "config.yaml").write_text(dump(tree.model_copy(update={"classes": (evil, *tree.classes[1:])})))
    html = report.run(run).page.read_text()
    assert "&lt;b onclick=&#34;x&#34;&gt;&amp;" in html
    assert 'onclick="' not in html


def test_the_next_step_works_at_every_stage(tiny_config, small_voc: Path, tmp_path: Path, monkeypatch) -> None:
    """The data are as after ``cpn-fast init``: tags, photos and no mask. The last step segments new photos."""
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "my photos"
    shutil.copytree(small_voc / "JPEGImages", photos / "JPEGImages")
    shutil.copytree(small_voc / "Annotations", photos / "Annotations")
    for name, ids in (("train", range(4)), ("held_out", range(4, 6))):
        (photos / f"{name}.txt").write_text("".join(f"train_{k:04d}\n" for k in ids))
    short = {"batch": 2, "steps": 2, "data_threads": 1}
    path = tiny_config(
        out="runs",
        data={"root": "my photos", "train_list": "train.txt"},
        train=short,
        cam={"scales": [1.0]},
        crf={"workers": 1},
        affinity={"train": short, "augment": {"long_side": [64, 96], "crop": 64}},
        walk={"logt": 1},
        segment={"train": short, "augment": {"crop": 64}, "scales": [1.0], "crf": None, "eval_list": "held_out.txt"},
    )

    def typed(command: str) -> str:
        result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found = re.search(r"^Next: (.*)$", result.output, re.MULTILINE)
        return found[1] if found else result.output

    assert typed(f"cpn-fast train {path}").startswith("cpn-fast cam ")
    made = ["cpn-fast report runs/tiny"]
    for _ in range(20):
        made.append(typed(made[-1]))
        if not made[-1].startswith("cpn-fast"):
            break
        if made[-1].split()[1] in ("cam", "run") and "report" not in made[-1]:
            html = Path("runs/tiny/report.html").read_text()
            assert f"<code>{html_escape(made[-1], quote=False)}</code>" in html.replace("&#39;", "'")
    stages = [command.split()[1] for command in made[:-1]]
    assert stages == ["report", "cam", "report", "run", "report", "predict"]
    assert "train_0004.jpg" in made[-2]  # held out
    assert "Overlays, masks and JSON of 1 images" in made[-1]
    html = Path("runs/tiny/report.html").read_text()
    assert "Seeds on train" in html
    assert "pseudo-mask" in html
    assert "Masks of the segmenter on held_out" in html
    assert "Nothing has been scored. A score needs" in html
    assert "evaluate" not in html.split("All keys")[0]
