"""The plots and pictures of a report, as data URLs: the page needs no other file."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from cpn_fast.config import Config
from cpn_fast.data.masks import IGNORE
from cpn_fast.data.pictures import TINTS, cam_overlay, tinted
from cpn_fast.data.seeds import Seed
from cpn_fast.runtime.terminal import plotted
from cpn_fast.training.metrics import VALIDATED

SIDE = 320
"""Most pixels of a picture's side. This and HEATS bound the page's size."""
HEATS = 4
"""Most heat maps of an image."""


def curves(lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Plot the loss with its terms, validation, classification mAP, learning rate, gradient norm and speed."""
    known = ("step", "epoch", "lr", "images_per_second", "waiting", "gradient_norm", "scale", "skipped", "mAP")
    keys = dict.fromkeys(itertools.chain(*lines))
    panels = {
        "loss": [key for key in keys if key not in known and not key.startswith(VALIDATED)],
        "validation": [key for key in keys if key.startswith(VALIDATED)],
        "classification mAP": ["mAP"],
        "learning rate": ["lr"],
        "gradient norm": ["gradient_norm"],
        "images/s": ["images_per_second"],
    }
    plots = []
    for title, shown_keys in panels.items():
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for key in shown_keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                marker = "o" if len(points) < 3 else None
                axes.plot(*zip(*points, strict=True), label=key, lw=2 if key == "loss" else 1.2, marker=marker)
        if not axes.lines:
            continue
        if title == "loss" and len(shown_keys) > 1:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
            axes.set_yscale("log")
        measure = f" ({shown_keys[0].removeprefix(VALIDATED)})" if title == "validation" else ""
        axes.set(title=f"{title}{measure}", xlabel="step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        plots.append({"alt": f"{title} over the steps", "data": figure_url(figure)})
    return plots


def confusion_figure(tree: dict[str, Any]) -> Figure:
    """Plot the confusion matrix of an evaluation, in per cent of each true class's pixels."""
    counts = np.array(tree["results"][0]["confusion"], float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [plotted(name) for name in tree["classes"]]
    side = 3 + 0.3 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 1:
            axes.text(
                column,
                row,
                f"{share:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share > 55 else "black",
            )
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title="% of a class's pixels")
    return figure


def heat_maps(
    image: np.ndarray, seed: Seed, kind: str, config: Config, probabilities: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return the image under the heat map of each class of a seed, the least likely first, up to HEATS of them."""
    order = np.arange(len(seed.classes))
    if probabilities is not None:
        order = order[np.argsort(probabilities[seed.classes], kind="stable")]
    pictures = []
    for position in order[:HEATS].tolist():
        index = int(seed.classes[position])
        probability = "" if probabilities is None else f", {probabilities[index]:.0%}"
        caption = f"{kind}: {config.classes[index]}{probability}"
        pictures.append(captioned(cam_overlay(image, seed.cam[position]), caption))
    if len(order) > HEATS:
        pictures[-1]["caption"] += f" (and {len(order) - HEATS} more)"
    return pictures


def masked(image: np.ndarray, mask: np.ndarray, caption: str, config: Config) -> dict[str, Any]:
    """Return the image with the regions of a mask in colours, and a caption that explains the colours."""
    values = sorted({*np.unique(mask).tolist()} - {0, IGNORE})
    marks = [
        {"colour": "rgb({}, {}, {})".format(*TINTS[128, value]), "name": config.classes[value - 1]}
        for value in values
        if value <= len(config.classes)
    ]
    return {**captioned(tinted(image, mask), caption if marks else f"{caption}: nothing"), "marks": marks}


def captioned(image: np.ndarray, caption: str) -> dict[str, Any]:
    """Return the image, made smaller, with a caption."""
    scale = min(1, SIDE / max(image.shape[:2]))
    size = max(1, round(scale * image.shape[1])), max(1, round(scale * image.shape[0]))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return {"caption": caption, "data": data_url(_jpeg(small), "jpeg"), "marks": []}


def figure_url(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return data_url(file.getvalue(), "png")


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _jpeg(picture: np.ndarray) -> bytes:
    done, content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done
    return content.tobytes()
