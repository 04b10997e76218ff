"""``cpn-fast demo``: the chain on generated images, with CPN and a plain CAM of the same start and number of steps."""

from __future__ import annotations

import time
from importlib.resources import as_file, files
from pathlib import Path

from rich.table import Table

from cpn_fast.commands.demo_data import generate
from cpn_fast.config import Config
from cpn_fast.config_file import load, override
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.pictures import write_gallery
from cpn_fast.runtime import terminal
from cpn_fast.stages import cam, chain, evaluate, train

ROWS = {
    "plain CAM": ("demo_cam",),
    "CPN": ("demo",),
    "CPN, raw map": ("demo", "name=demo_raw", "cam.map=raw", "cam.mask_threshold=0.25"),
}
"""Row of the table -> config, and the keys that only its seeds change."""
SHOWN, IMAGES, CELL = ("plain CAM", "CPN"), 5, (150, 112)
"""The picture (README shows it): rows of the table, number of validation images, size of each in pixels."""


def run(out: Path) -> None:
    """Generate the data set in ``out/data``, train and score both methods, and run the other stages on CPN's seeds.

    Prints the mIoU of each and writes ``out/demo.jpg``.
    """
    console = terminal.console()
    started = time.perf_counter()
    console.print(f"Generating a data set in {out / 'data'}")
    generate(out / "data")
    console.print("Pretraining a small classifier on it, in place of ImageNet")
    pretrained = train.run(_config("demo_pretrain", out))
    table = Table("method", "train mIoU (oracle threshold)", "validation mIoU (train's threshold)", "minutes")
    folders: dict[str, Path] = {}
    for row, (name, *overrides) in ROWS.items():
        row_started = time.perf_counter()
        weights = train.run(_config(name, out, override("model.weights", pretrained)))
        config = _config(name, out, override("model.weights", pretrained), *overrides)
        scores = []
        threshold = None
        for list_name in ("train", "val"):
            list_path = Path(f"ImageSets/Segmentation/{list_name}.txt")
            folders[row] = cam.run(config, weights, list_path)
            evaluation = evaluate.run(
                config, cams=folders[row] / "seeds", masks=None, list_path=list_path, threshold_from=threshold
            )
            scores.append(evaluation)
            threshold = evaluation.path
        train_scores, val_scores = scores
        table.add_row(
            row,
            f"{train_scores.oracle.mean_iou:.1%}",
            f"{val_scores.fixed.mean_iou:.1%}",
            f"{(time.perf_counter() - row_started) / 60:.1f}",
        )
    console.print(table)
    console.print("The other stages: CRF, AffinityNet and random walk, then a segmenter that needs no tags")
    config = _config("demo", out, override("model.weights", pretrained))
    chain.run(config)
    samples = load_samples(config.data, config.classes, list_path, labels=True, masks=True)
    picture = out / "demo.jpg"
    segmented = {"segmenter": config.run / "segment/val/crf"}
    runs = {name: folders[name] for name in SHOWN}
    write_gallery(picture, samples[:IMAGES], runs, segmented, config.classes, cell=CELL)
    console.print(f"Pictures: {picture}. Took {(time.perf_counter() - started) / 60:.1f} minutes.")


def _config(name: str, out: Path, *overrides: str) -> Config:
    with as_file(files("cpn_fast.configs")) as folder:
        return load(folder / f"{name}.yaml", [override("out", out), override("data.root", out / "data"), *overrides])
