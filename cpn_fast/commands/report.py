"""``cpn-fast report``: a run as one HTML page that needs no network and no other file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from jinja2 import Environment

from cpn_fast.commands.agreement import (
    LEAST,
    SURE,
    Found,
    Photo,
    all_found,
    has_other_weights,
    listed,
    mask_path,
    of_these_images,
    weights_digests,
)
from cpn_fast.commands.report_next import next_step, scoring_command
from cpn_fast.commands.report_pictures import (
    captioned,
    confusion_figure,
    curves,
    data_url,
    figure_url,
    heat_maps,
    masked,
)
from cpn_fast.commands.trained_model import CamModel, Model, Segmenter
from cpn_fast.commands.trained_model import load as load_model
from cpn_fast.config import Config
from cpn_fast.config_file import load, parse
from cpn_fast.data.dataset import Sample, load_samples
from cpn_fast.data.images import read_image
from cpn_fast.data.masks import read_mask
from cpn_fast.data.scores import SUMMARY, Scores, confusion
from cpn_fast.data.seeds import Seed, read_seed
from cpn_fast.models.weights import FINAL
from cpn_fast.pipelines.shards import training_list
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some, unread
from cpn_fast.runtime.files import read_json, read_metrics, replacing
from cpn_fast.runtime.progress import track
from cpn_fast.training.validation import best_of

Item = TypeVar("Item")
SHOWN = 8
"""Images in each of the galleries of the best and the worst."""


class Report(NamedTuple):
    """The result of ``run``."""

    page: Path
    next: str
    """The command to run next."""


def run(folder: Path, overrides: list[str] | None = None) -> Report:
    """Write ``report.html`` into a run's folder, from the results that exist so far.

    ``overrides`` are as in ``config_file.load``, such as ``data.root=FOLDER`` for images that were moved. Raises
    UserError if the folder holds no run, or if files that it refers to are missing.
    """
    if not (folder / "config.yaml").exists():
        runs = ", ".join(str(file.parent) for file in sorted(folder.glob("*/config.yaml"))) or "for example runs/voc"
        raise UserError(f"{folder}: no config.yaml in it; give the folder of a run: {runs}")
    config = load(folder / "config.yaml", overrides)
    environment = folder / "environment.json"
    model = load_model(folder) if (folder / FINAL).exists() else None
    evaluation_paths = sorted(folder.glob("evaluation/*/*/evaluation.json"))
    digests = weights_digests(folder, config)
    evaluations = [_evaluation(path, config, model, digests) for path in evaluation_paths]
    trained = "segmenter" if isinstance(model, Segmenter) else config.method
    page = Environment(autoescape=True, trim_blocks=True).from_string(
        files("cpn_fast.commands").joinpath("report.html").read_text()
    )
    if config.data.shards is None:
        images = len(load_samples(config.data, config.classes, config.data.train_list, labels=False, masks=False))
    else:
        images = len(training_list(config)[0])
    scored = {path.parent.name for path in evaluation_paths}
    results = [
        result for result in all_found(folder, config, digests) if not any(_is_of(name, result) for name in scored)
    ]
    why, then = next_step(folder, config, model, overrides or [])
    html = page.render(
        name=config.name,
        next={"why": why, "command": then},
        scoring=scoring_command(folder, config, results, overrides or []),
        masks=config.data.root / config.data.masks,
        results=[_result(result, folder, config) for result in results],
        sure=SURE,
        least=LEAST,
        subtitle=f"{trained} with {config.model.backbone} on {images} images of {len(config.classes)} classes",
        folder=folder,
        evaluations=evaluations,
        part_of=folder.absolute().parents[1] if isinstance(model, Segmenter) else None,
        trainings=[
            _training(path, folder) for path in (folder / "metrics.jsonl", *sorted(folder.glob("*/*/metrics.jsonl")))
        ],
        environment=_json(environment) if environment.exists() else {},
        changed=_changed(config),
        config=reading.read_text(folder / "config.yaml", reading.CONFIG),
    )
    path = folder / "report.html"
    with replacing(path) as file:
        file.write(html.encode())
    return Report(path, then)


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
        if not isinstance(tree, dict):
            raise ValueError(f"expected an object, found a {type(tree).__name__}")
        return tree
    except OSError as error:
        raise unread(path, error) from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and the command that wrote it makes it anew") from None


# Training


def _training(path: Path, folder: Path) -> dict[str, Any]:
    """Return the figures and curves of a training: the run's, AffinityNet's or the segmenter's."""
    title = "Training" if path.parent == folder else f"Training of {path.parent.relative_to(folder)}"
    values = [{key: x for key, x in line.items() if isinstance(x, (int, float))} for line in read_metrics(path)]
    lines = [line for line in values if line.keys() >= {"epoch", "images_per_second", "waiting"}]  # not damaged ones
    if not lines:
        return {"title": title}
    options = load(path.with_name("config.yaml")).train
    last, rates = lines[-1], [line["images_per_second"] for line in lines]
    steps = np.diff([0, *(line["step"] for line in lines)])
    seconds = float((steps * options.batch * options.accumulate / np.array(rates)).sum())
    figures = {
        "steps": f"{last['step']:,}",
        "epochs": f"{last['epoch']:.1f}",
        "images a second (median of the lines)": f"{statistics.median(rates):.1f}",
        "time in steps": f"{seconds / 60:,.1f} minutes",
        "waiting for data": f"{statistics.mean(line['waiting'] for line in lines):.1%} of this time",
    }
    losses = [line["loss"] for line in lines if "loss" in line]  # a line without finite losses has none
    if losses:
        figures["loss at the end"] = f"{losses[-1]:.4f}"
    maps = [line["mAP"] for line in lines if "mAP" in line]
    if maps:
        figures["classification mAP of the last epoch"] = f"{maps[-1]:.1%}"
    if best := best_of(path.parent):
        figures["best validation"] = best
        figures["weights that later stages use"] = f"the {options.use_weights} (train.use_weights)"
    skipped = sum(line.get("skipped", 0) for line in lines)
    if skipped:
        figures["steps skipped, because their gradients were not finite"] = f"{skipped:,}"
    return {"title": title, "figures": figures.items(), "plots": curves(lines)}


# Configuration


def _changed(config: Config) -> list[tuple[str, str]]:
    """Return the keys with values other than the defaults, and these values."""
    minimal = {"name": config.name, "data": {"root": str(config.data.root)}, "train": {"steps": 1}}
    return [*_differing("", config.model_dump(mode="json"), parse(minimal, "defaults").model_dump(mode="json"))]


def _differing(prefix: str, tree: dict[str, Any], defaults: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _differing(f"{prefix}{key}.", value, defaults[key])
        elif value != defaults[key]:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + key, "null" if value is None else text


# Evaluations


_SCORES = {"source": str, "list": str, "images": int, "classes": list, "results": list, "ids": list}
"""Keys that the report reads in an evaluation.json."""


def _scores(path: Path) -> dict[str, Any]:
    """Read an evaluation.json. Raises UserError for a damaged one, and for one of an earlier version."""
    tree = _json(path)
    lacking = [key for key, kind in _SCORES.items() if not isinstance(tree.get(key), kind) or not tree[key]]
    if not lacking and not all({"kind", "threshold", "confusion", *SUMMARY} <= {*result} for result in tree["results"]):
        lacking = ["results"]
    if lacking:
        raise UserError(
            f"{path}: expected scores as this version writes them, found other {', '.join(lacking)}. Evaluate again, "
            f"or delete {path.parent}"
        )
    return tree


def _evaluation(path: Path, config: Config, model: Model | None, digests: Mapping[str, str]) -> dict[str, Any]:
    tree = _scores(path)
    source, threshold = _scored_folder(path, tree, config), tree["results"][0]["threshold"]
    ending = ".png" if threshold is None else ".npz"

    def predicted(sample: Sample) -> np.ndarray:
        file = source / f"{sample.id}{ending}"
        return read_mask(file) if threshold is None else read_seed(file).mask(threshold)

    try:
        by_id = {sample.id: sample for sample in listed(config, Path(tree["list"]), masks=True)}
        if gone := [id_ for id_ in tree["ids"] if id_ not in by_id]:
            raise UserError(f"{tree['list']} no longer has {some(gone, 3)}")
        results = of_these_images([(by_id[id_], source / f"{id_}{ending}") for id_ in tree["ids"]])
        counts = _counts([sample for sample, _ in results], predicted, config, f"Scoring each of {source.name}")
        galleries = _galleries(counts, predicted, config, model)
    except UserError as error:
        raise UserError(
            f"{error}\n{path.parent} has the scores of what was there. Evaluate again, or delete this folder"
        ) from None
    plots = [
        {"alt": alt, "data": data_url(reading.read_bytes(path.with_name(name), reading.IMAGE), "png")}
        for name, alt in (("curve.png", "Scores at every background threshold"), ("per_class.png", "IoU of each class"))
        if path.with_name(name).exists()
    ]
    plots.append({"alt": "Where the pixels of each class go", "data": figure_url(confusion_figure(tree))})
    return {
        "title": f"{path.parent.name} on {path.parent.parent.name}",
        "anchor": f"{path.parent.parent.name}-{path.parent.name}",
        "source": tree["source"],
        "list": tree["list"],
        "images": tree["images"],
        "results": [
            {
                "threshold": "masks" if result["threshold"] is None else f"{result['threshold']:g} ({result['kind']})",
                **{name: "-" if result[name] is None else f"{100 * result[name]:.2f}" for name in SUMMARY},
            }
            for result in tree["results"]
        ],
        "plots": plots,
        "galleries": galleries,
        "other_weights": has_other_weights(source.parent, digests),
        "outdated": bool(np.any(sum(count for _, count in counts) != np.array(tree["results"][0]["confusion"]))),
    }


def _scored_folder(path: Path, tree: dict[str, Any], config: Config) -> Path:
    """Return the folder of the scored seeds or masks, also if the run's folder has another name or place now."""
    source, run = Path(tree["source"]).absolute(), config.run.absolute()
    return path.parents[3] / source.relative_to(run) if source.is_relative_to(run) else source


def _counts(
    samples: Sequence[Sample], predicted: Callable[[Sample], np.ndarray], config: Config, stage: str
) -> list[tuple[Sample, np.ndarray]]:
    """Return each image with its ``scores.confusion``, of its result and its ground truth as they are now."""

    def count(sample: Sample) -> np.ndarray:
        assert sample.mask is not None
        prediction, truth = predicted(sample), read_mask(sample.mask)
        if prediction.shape != truth.shape:
            raise UserError(f"{sample.mask} has another size than {sample.id}'s result")
        return confusion(prediction, truth, len(config.classes))

    with ThreadPoolExecutor() as pool:
        counted = pool.map(count, samples)
        return list(zip(samples, track(counted, stage, total=len(samples)), strict=True))


def _galleries(
    counts: Sequence[tuple[Sample, np.ndarray]],
    predicted: Callable[[Sample], np.ndarray],
    config: Config,
    model: Model | None,
) -> list[dict[str, Any]]:
    """Return the images with the highest and lowest mean IoU over their true and predicted classes."""
    samples, scores = [sample for sample, _ in counts], [float(Scores(count).mean_iou) for _, count in counts]
    ordered = [(samples[index], scores[index]) for index in np.argsort(scores, kind="stable")[::-1].tolist()]
    galleries = dict(zip(("Best images", "Worst images"), _both_ends(ordered), strict=True))
    return [
        {
            "title": title,
            "rows": [
                {
                    "title": sample.id,
                    "note": f"IoU {score:.0%}",
                    "pictures": _pictures(sample, predicted(sample), config, model),
                }
                for sample, score in scored
            ],
        }
        for title, scored in galleries.items()
        if scored
    ]


def _pictures(sample: Sample, mask: np.ndarray, config: Config, model: Model | None) -> list[dict[str, Any]]:
    """Return the image, ground truth, raw and refined CAMs of the tagged classes, and mask."""
    assert sample.mask is not None
    image, truth = read_image(sample.image), read_mask(sample.mask)
    pictures = [captioned(image, "image"), masked(image, truth, "ground truth", config)]
    if isinstance(model, CamModel) and sample.label is not None:
        tags = [name for name, present in zip(model.classes, sample.label, strict=True) if present]
        for kind, seed in _cams(model, sample.image, tags).items():
            pictures += heat_maps(image, seed, kind, config)
    return [*pictures, masked(image, mask, "mask", config)]


def _cams(model: CamModel, image: Path, tags: Sequence[str]) -> dict[str, Seed]:
    maps: dict[str, Literal["refined", "raw"]] = {"plain CAM": "raw"}
    if model.config.model.pcm or model.config.model.prcm:
        maps["refined CAM"] = "refined"
    return {name: model.with_map(kind).predict(image, tags).seed for name, kind in maps.items()}


# Results without ground truth


def _is_of(scored: str, result: Found) -> bool:
    """Return whether an evaluation scores a list's seeds or masks. ``scored`` is the name of its folder."""
    return scored.startswith(f"{result.kind}-{result.folder.name}-")


def _result(result: Found, folder: Path, config: Config) -> dict[str, Any]:
    """Return counts by class, and the photos whose results agree least and most with their tags."""
    compared = [photo for photo in result.photos if photo.agreement is not None]
    best, doubtful = _both_ends(compared)
    galleries = {"Most doubtful first": doubtful, "Best first": best}
    if not compared:
        galleries = {"First photos of the list": result.photos[:SHOWN]}

    def row(photo: Photo) -> dict[str, Any]:
        notes = [] if photo.agreement is None else [f"agreement {photo.agreement:.0%}", photo.doubt]
        is_seed = result.kind == "cams"
        pictures = _seed_pictures(photo, result, folder, config) if is_seed else _mask_pictures(photo, result, config)
        return {"title": photo.sample.id, "note": "; ".join(filter(None, notes)), "pictures": pictures}

    return {
        "kind": result.kind,
        "title": f"{'Seeds' if result.kind == 'cams' else 'Masks of the segmenter'} on {result.folder.name}",
        "anchor": f"{result.kind}-{result.folder.name}",
        "source": result.folder,
        "images": len(result.photos),
        "list": result.listed,
        "compared": len(compared),
        "trained_on": result.listed == config.data.train_list,
        "outdated": result.outdated,
        "classes": [count for count in result.classes if count.tagged or count.besides],
        "galleries": [
            {"title": title, "rows": [row(photo) for photo in photos]} for title, photos in galleries.items() if photos
        ],
    }


def _seed_pictures(photo: Photo, result: Found, folder: Path, config: Config) -> list[dict[str, Any]]:
    """Return the photo, the heat map of each tagged class, the mask, and the pseudo-mask if there is one."""
    id_, image = photo.sample.id, read_image(photo.sample.image)
    seed = read_seed(result.folder / "seeds" / f"{id_}.npz")
    pictures = [captioned(image, "photo"), *heat_maps(image, seed, "heat", config, photo.probabilities)]
    pictures.append(masked(image, seed.mask(config.cam.mask_threshold), "mask", config))
    refined = folder / "refine/masks" / f"{id_}.png"
    if result.listed == config.data.train_list and refined.is_file():
        pictures.append(masked(image, read_mask(refined), "pseudo-mask", config))
    return pictures


def _mask_pictures(photo: Photo, result: Found, config: Config) -> list[dict[str, Any]]:
    image = read_image(photo.sample.image)
    mask = read_mask(mask_path(result.folder, photo.sample))
    return [captioned(image, "photo"), masked(image, mask, "mask", config)]


def _both_ends(ordered: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """Return the first items of a sequence, and the last items in reverse: up to SHOWN each, without overlap."""
    last = ordered[::-1][: min(SHOWN, len(ordered) // 2)]
    return ordered[: min(SHOWN, len(ordered) - len(last))], last
