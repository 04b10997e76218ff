from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cpn_fast import evaluate, report
from cpn_fast.cli import app
from cpn_fast.config import dump, load
from cpn_fast.errors import UserError
from cpn_fast.files import read_json


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run that may be changed."""
    return shutil.copytree(small_run, tmp_path / "small")


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_the_page_stands_alone_and_says_what_was_measured(run: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run)], catch_exceptions=False)
    assert result.exit_code == 0
    html = (run / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)  # nothing is fetched
    assert "<script" not in html
    assert "<td>superpixels.compactness" not in html  # as by default
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
    shown = pictures(html)
    assert len(shown) == 4 + 4  # curves, and threshold curve, classes, confusion, the best of 4 images
    columns = 5  # image, ground truth, plain CAM, refined CAM, mask
    assert shown[-1].width == 8 + columns * 248
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
    page.write_text(report.run(run).read_text().replace("</body>", f"{LOOK}</body>"))
    options = [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *HEADLESS, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert 'data-images="8" data-broken="0" data-beyond="0" data-asked=""' in done.stdout, (
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
    html = report.run(run).read_text()
    assert "masks &amp; more" in html
    assert "masks & more" not in html
    shown = pictures(html)
    assert len(shown) == 8 + 3
    assert [picture.width for picture in shown].count(8 + 5 * 248) == 2  # masks have their CAMs beside them too


def test_without_tags_masks_are_shown_without_cams(run: Path, small_voc: Path, tmp_path: Path) -> None:
    tree = load(run / "config.yaml")
    bare = tree.model_copy(update={"out": run.parent, "data": tree.data.model_copy(update={"labels": Path("nowhere")})})
    (run / "config.yaml").write_text(dump(bare))
    shutil.rmtree(run / "evaluation")
    val = Path("ImageSets/Segmentation/val.txt")
    evaluate.run(bare, cams=None, masks=run / "cams/val/masks", list_path=val, threshold_from=None)
    assert pictures(report.run(run).read_text())[-1].width == 8 + 3 * 248


def test_a_run_without_scores_or_weights_has_a_page_that_says_so(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    (run / "model.safetensors").unlink()
    (run / "metrics.jsonl").unlink()
    html = report.run(run).read_text()
    assert "Nothing has been scored yet" in html
    assert "No line of metrics.jsonl" in html


def test_parts_that_were_trained_have_their_curves_and_half_a_line_is_no_obstacle(run: Path) -> None:
    part = run / "segment/deeplab"
    part.mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(run / name, part)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ep')
    (run / "environment.json").unlink()
    html = report.run(run).read_text()
    assert "Training of segment/deeplab" in html
    assert len(pictures(html)) == 8 + 4


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
    page = report.run(run)
    before = page.read_bytes()
    seed = next((run / "cams/val/seeds").glob("*.npz"))
    path = run / "evaluation/val/cams-val-seeds/evaluation.json"
    path.write_text(json.dumps(read_json(path) | {"source": str(seed.parent)}))
    seed.unlink()
    with pytest.raises(UserError, match=seed.name):
        report.run(run)
    assert page.read_bytes() == before


def test_images_that_moved_are_found_where_they_are_said_to_lie(
    small_run: Path, small_voc: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    path = run / "config.yaml"
    path.write_text(path.read_text().replace(str(small_voc), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"--set data\.root=FOLDER"):
        report.run(run)
    assert "data:image/jpeg" in report.run(run, [f"data.root={small_voc}"]).read_text()
