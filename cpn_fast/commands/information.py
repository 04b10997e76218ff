"""``cpn-fast information``: count the seeds that the sum of a pair's CAMs adds over the plain CAM (paper section 3.1).

The paper measures the information of a CAM by its seeds, and derives that the pair's sum has at least as much (eqs. 2
to 6). Seeds are the pixels of a tagged class's map whose score on the unit scale exceeds a threshold. For each size of
patches, this module compares an image's own map with the sum of the maps of its pair, at one scale and without flips.
Both are on the unit scale, as in ``cam``. With masks, it also counts the seeds on an object of their class, which shows
whether the added seeds are good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Column, Table
from torch import Tensor

from cpn_fast.config import Config, Patches
from cpn_fast.data.dataset import check_files, load_samples, tags
from cpn_fast.data.masks import IGNORE, read_mask
from cpn_fast.data.seeds import unit_scale
from cpn_fast.methods.patches import complementary_pair, normalised_fill
from cpn_fast.models.backbone import to_device
from cpn_fast.models.inference import images_for, load_network, summed_cams
from cpn_fast.models.network import Network
from cpn_fast.pipelines.inference import ScaledBatch
from cpn_fast.pipelines.superpixels import segment_batch
from cpn_fast.runtime import terminal
from cpn_fast.runtime.files import replacing, with_checksum, write_json
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.precision import autocast
from cpn_fast.runtime.progress import Progress
from cpn_fast.training import run_folder

SUPERPIXELS = (5, 50, 200, 500, 1000)
"""Superpixels asked for per image."""
GRIDS = (14, 28, 56, 112, 224)
"""Sides of grid cells, in pixels of the network's input."""
SHOWN = ("plain", "pair", "added", "lost", "plain on object", "added on object")
"""The ``Row.figures`` that the table and the picture show."""
THRESHOLDS = np.linspace(0, 1, 100, endpoint=False)


@dataclass
class Counts:
    """Numbers of seeds, int64 (2, thresholds): of all pixels, and of pixels on an object of the map's class."""

    plain: np.ndarray
    """Seeds of the image's own map."""
    pair: np.ndarray
    """Seeds of the sum of its pair's maps."""
    both: np.ndarray
    """Seeds of both."""
    pixels: np.ndarray
    """int64 (2,): pixels of all maps that could be seeds."""

    @classmethod
    def none(cls) -> Counts:
        plain, pair, both = np.zeros((3, 2, len(THRESHOLDS)), np.int64)
        return cls(plain, pair, both, np.zeros(2, np.int64))

    def add(self, plain: np.ndarray, pair: np.ndarray, on_object: np.ndarray, counted: np.ndarray) -> None:
        """Add the seeds of maps (k, H, W). ``on_object`` and ``counted`` are bool of that shape."""
        for total, scores in ((self.plain, plain), (self.pair, pair), (self.both, np.minimum(plain, pair))):
            for row, chosen in enumerate((counted, on_object)):
                total[row] += _above(scores[chosen])
        self.pixels += [counted.sum(), on_object.sum()]


@dataclass(frozen=True)
class Row:
    """A size of patches and its counts."""

    kind: str
    size: int
    """Superpixels per image, or the side of a grid cell."""
    counts: Counts

    def figures(self, threshold: float) -> dict[str, float | None]:
        """Return shares at the nearest of THRESHOLDS. A share on objects is None without masks."""
        index = int(np.abs(THRESHOLDS - threshold).argmin())
        (plain, plain_hit), (pair, pair_hit), (both, both_hit) = (
            count[:, index].tolist() for count in (self.counts.plain, self.counts.pair, self.counts.both)
        )
        pixels, objects = self.counts.pixels.tolist()
        known = objects > 0
        return {
            "plain": plain / pixels,
            "pair": pair / pixels,
            "more": pair / plain - 1 if plain else None,
            "added": (pair - both) / pixels,
            "lost": (plain - both) / pixels,
            "plain on object": plain_hit / plain if known and plain else None,
            "added on object": (pair_hit - both_hit) / (pair - both) if known and pair > both else None,
            "lost on object": (plain_hit - both_hit) / (plain - both) if known and plain > both else None,
            "object found, plain": plain_hit / objects if known else None,
            "object found, pair": pair_hit / objects if known else None,
        }


def run(config: Config, weights: Path, list_path: Path | None = None) -> Path:
    """Measure every size of patches on a list, print a table, write ``information/LIST.json`` and ``.png``.

    Patches follow the config, except for their kind and size. The table counts seeds at ``cam.mask_threshold``, the
    file at 100 thresholds. Returns the picture's path. Raises UserError for weights that do not fit and for
    damaged images or masks.
    """
    list_path = list_path or config.data.eval_list
    samples = load_samples(config.data, config.classes, list_path, labels=True, masks=None)
    check_files(samples, workers=config.train.data_threads, classes=len(config.classes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_folder.require_classes(config, weights)
    network = to_device(load_network(config, weights), device).eval()
    settings = [(patches, count, Counts.none()) for patches, count in patch_sizes(config.patches)]
    generators = [torch.Generator(device).manual_seed(config.train.seed) for _ in settings]
    batches = images_for(network, samples, config, (1.0,))
    with Progress("information", len(samples)) as progress:
        for batch in batches:
            batch_samples = [samples[index] for index in batch.indices]
            labels = torch.from_numpy(np.stack([tags(sample) for sample in batch_samples]))
            plain = unit_maps(network, batch, labels, config)
            truths = [None if sample.mask is None else read_mask(sample.mask) for sample in batch_samples]
            for (patches, count, counts), generator in zip(settings, generators, strict=True):
                split = split_batch(network, batch, patches, count, generator, config)
                for n, pair in enumerate(unit_maps(network, split, labels, config)):
                    counts.add(plain[n], pair, *_truth(labels[n], truths[n], pair.shape))
            progress.advance(len(batch_samples))
    rows = [Row(patches.kind, _size(patches, count), counts) for patches, count, counts in settings]
    _print(rows, config, list_path)
    return _write(rows, config, list_path)


def patch_sizes(patches: Patches) -> Iterator[tuple[Patches, int]]:
    """Yield the settings of each size, and the number of superpixels to ask for."""
    for count in SUPERPIXELS:
        yield patches.model_copy(update={"kind": "superpixel"}), count
    for side in GRIDS:
        yield patches.model_copy(update={"kind": "grid", "grid_sizes": (side,)}), 1


def split_batch(
    network: Network, batch: ScaledBatch, patches: Patches, count: int, generator: torch.Generator, config: Config
) -> ScaledBatch:
    """Return the batch with the two images of each pair in place of its only scale."""
    (images,) = batch.scales
    superpixels = None
    if patches.kind == "superpixel":
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (network.mean, network.std))
        options = config.superpixels.model_copy(update={"count": count})
        superpixels = segment_batch(images * std + mean, options, config.train.data_threads)
    fill = normalised_fill(patches, network.mean, network.std)
    pair = complementary_pair(images, superpixels, patches, fill, generator, patch_limit=count)
    return batch._replace(scales=[pair.visible, pair.complement])


def unit_maps(network: Network, batch: ScaledBatch, labels: Tensor, config: Config) -> list[np.ndarray]:
    """Return the sum of the CAMs of all scales, on the unit scale: float32 (present classes, H, W) for each image."""
    options = config.cam.model_copy(update={"flip": False})
    with torch.inference_mode(), autocast(config.train.precision, batch.scales[0].device):
        return [unit_scale(cam).cpu().numpy() for cam in summed_cams(network, batch, labels, options).cams]


def _truth(label: Tensor, mask: np.ndarray | None, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of the maps on an object of their class, and the pixels that count: bool (k, H, W) each."""
    if mask is None:
        return np.zeros(shape, bool), np.ones(shape, bool)
    values = label.nonzero().numpy()[:, :, None] + 1
    return mask == values, np.broadcast_to(mask != IGNORE, shape)


def _above(scores: np.ndarray) -> np.ndarray:
    """Return for each threshold how many scores exceed it, int64 (thresholds,)."""
    exceeded = np.searchsorted(THRESHOLDS.astype(np.float32), scores)  # number of thresholds that a score exceeds
    return np.bincount(exceeded, minlength=len(THRESHOLDS) + 1)[::-1].cumsum()[::-1][1:]


def _size(patches: Patches, count: int) -> int:
    return count if patches.kind == "superpixel" else patches.grid_sizes[0]


def _name(row: Row) -> str:
    return f"{row.size} superpixels" if row.kind == "superpixel" else f"grid of {row.size} px"


def _print(rows: Sequence[Row], config: Config, list_path: Path) -> None:
    threshold = config.cam.mask_threshold
    all_figures = [row.figures(threshold) for row in rows]
    shown = [name for name in SHOWN if any(figures[name] is not None for figures in all_figures)]
    title = f"Seeds of {list_path.name} above {threshold:g}: the plain CAM and the pair's sum"
    table = Table(Column("patches", no_wrap=True), *shown, title=title)
    for row, figures in zip(rows, all_figures, strict=True):
        table.add_row(_name(row), *("-" if (v := figures[name]) is None else f"{v:.1%}" for name in shown))
    terminal.console().print(table)


def _write(rows: Sequence[Row], config: Config, list_path: Path) -> Path:
    name = config.list_name(list_path)
    path = config.run / "information" / f"{name}.json"
    threshold = config.cam.mask_threshold
    tree = {
        "list": str(list_path),
        "threshold": threshold,
        "thresholds": THRESHOLDS.tolist(),
        "rows": [
            {
                "kind": row.kind,
                "size": row.size,
                **row.figures(threshold),
                "counts": {name: counts.tolist() for name, counts in dataclasses.asdict(row.counts).items()},
            }
            for row in rows
        ],
    }
    picture = path.with_name(f"{name}.png")
    with owned(path.parent, part=name, waits=True):
        write_json(path, with_checksum(tree))
        with replacing(picture) as file:
            _plot(rows, config).savefig(file, format="png", dpi=110)
    return picture


def _plot(rows: Sequence[Row], config: Config) -> Figure:
    """Plot the seeds against the size of patches, and against the threshold."""
    threshold = config.cam.mask_threshold
    figure = Figure((12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, kind, label in (
        (left, "superpixel", "superpixels per image"),
        (middle, "grid", "side of a grid cell, pixels"),
    ):
        kind_rows = [row for row in rows if row.kind == kind]
        all_figures = [row.figures(threshold) for row in kind_rows]
        for name in SHOWN:
            values = [figures[name] for figures in all_figures]
            if any(value is not None for value in values):
                style = "--" if name.endswith("object") else "-"
                axes.plot(
                    [row.size for row in kind_rows],
                    [np.nan if v is None else 100 * v for v in values],
                    style,
                    marker="o",
                    label=name,
                )
        axes.set_xscale("log")
        axes.set_xticks([row.size for row in kind_rows], [str(row.size) for row in kind_rows])
        axes.minorticks_off()
        axes.set(xlabel=label, ylabel="% of pixels; dashed: % of those seeds", title=f"seeds above {threshold:g}")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    for row in rows:
        with np.errstate(divide="ignore", invalid="ignore"):
            more_seeds = 100 * (row.counts.pair[0] / row.counts.plain[0] - 1)
        right.plot(THRESHOLDS, more_seeds, "-" if row.kind == "superpixel" else "--", label=_name(row))
    right.axvline(threshold, color="gray", lw=0.8)
    right.set(xlabel="threshold", ylabel="more seeds in the pair's sum, %", title="every threshold")
    right.grid(alpha=0.3)
    right.legend(fontsize=7)
    return figure
