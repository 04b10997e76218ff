"""``cpn-fast predict``: masks, overlays and annotations of images and folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cpn_fast.commands.annotations import is_ours, writer
from cpn_fast.commands.photos import is_summary, visible_files
from cpn_fast.commands.trained_model import CamModel, Model, Prediction, Tags, load
from cpn_fast.data.dataset import TABLES
from cpn_fast.data.images import IMAGE_SUFFIXES, UnreadableImage, read_image
from cpn_fast.data.labels import read_labels
from cpn_fast.data.masks import mask_source, write_mask
from cpn_fast.data.pictures import overlay
from cpn_fast.data.provenance import image_digest, mark
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import remove_partials, replacing, write_json
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.progress import tell, track
from cpn_fast.runtime.reading import expanded


class Predicted(NamedTuple):
    """The result of ``run``."""

    images: int
    """Number of images that were predicted."""
    unreadable: list[str]
    """The images that could not be read, each with the reason."""
    left_out: list[Path]
    """Files in the folders whose endings are not of images."""
    remarks: list[str]
    """Sentences on images in which no class was found, and on images that a file of tags lacks."""
    annotations: list[Path]
    """The files of annotations."""


def run(model: Path, images: Sequence[Path], out: Path, tags: str | None, forms: Sequence[str] = ()) -> Predicted:
    """Write ``ID_overlay.png``, ``ID_mask.png`` and ``ID.json`` for every image into ``out``, and files of annotations.

    A folder stands for the images in it and its subfolders, without hidden files and folders; the ids keep the names of
    subfolders. ``tags``: the tags of all images, as in ``dog;person``, or the path of a source of labels
    (``data.labels``) with the tags of each. ``forms``: some of ``annotations.FORMS``. An image that cannot be read does
    not stop the others. Raises UserError if nothing can be predicted, and if a file of another program would be lost.
    """
    paths, left_out = _find(images)
    trained = load(model)
    writers = [writer(form, trained.classes) for form in forms]
    reserved = sorted(set(paths) & {Path(form_writer.file).stem for form_writer in writers})
    if reserved:
        raise UserError(f"images are called {', '.join(reserved)}, and so are files of --annotations: rename them")
    remarks = []
    names_or_source = None if tags is None else _tags(tags, trained.classes)
    tags_of: Tags | Mapping[Path, Sequence[str]] = None if isinstance(names_or_source, Path) else names_or_source
    if isinstance(names_or_source, Path):
        labels = read_labels(names_or_source, paths.keys(), trained.classes)
        tags_of = {
            paths[id_]: [name for name, present in zip(trained.classes, label, strict=True) if present]
            for id_, label in labels.items()
        }
        if untagged := [str(path) for id_, path in paths.items() if id_ not in labels]:
            remarks.append(
                f"{tags} has no tags of {len(untagged)} images ({some(untagged, 3)}): the model found their classes"
            )
    ids = {path: id_ for id_, path in paths.items()}
    unreadable: list[str] = []
    blank = 0
    weights_sha256 = reading.sha256(trained.weights, reading.WEIGHTS)
    with owned(out):
        _refuse_foreign(out, paths, [out / form_writer.file for form_writer in writers])
        remove_partials(*{out, *((out / id_).parent for id_ in paths)})
        for image, prediction in track(_readable(trained, list(ids), tags_of, unreadable), "predict", total=len(ids)):
            stem = out / ids[image]
            mask_path = stem.with_name(f"{stem.name}_mask.png")
            digest = image_digest(image)
            write_mask(mask_path, prediction.mask, mark(digest))
            with replacing(stem.with_name(f"{stem.name}_overlay.png")) as file:
                Image.fromarray(overlay(read_image(image), prediction.mask, trained.classes)).save(file, "PNG")
            summary = {"image": str(image), **_summary(trained, prediction)}
            provenance = {"image": digest, "weights_sha256": weights_sha256}
            write_json(stem.with_name(f"{stem.name}.json"), {**summary, "made_of": provenance}, indent=2)
            tell("prediction", mask=mask_path, **summary)
            scores = [round(prediction.probabilities[name], 4) for name in trained.classes]
            for form_writer in writers:
                form_writer.add(str(image), prediction.mask, dict(enumerate(scores, 1)))
            tagged = tags_of is not None and (not isinstance(tags_of, Mapping) or image in tags_of)
            blank += not tagged and not len(prediction.seed.classes)
        if blank:
            remarks.append(f"In {blank} {trained.blank}")
        annotations = [form_writer.write(out) for form_writer in writers]
    return Predicted(len(ids) - len(unreadable), unreadable, left_out, remarks, annotations)


def _readable(
    model: Model, paths: list[Path], tags: Tags | Mapping[Path, Sequence[str]], unreadable: list[str]
) -> Iterator[tuple[Path, Prediction]]:
    """Yield the predictions of the images that can be read. Adds the others to ``unreadable``."""
    remaining = dict.fromkeys(paths)
    while remaining:
        try:
            for path, prediction in model.predict_files(list(remaining), tags):
                del remaining[path]
                yield path, prediction
        except UnreadableImage as error:
            if error.path not in remaining:
                raise
            del remaining[error.path]
            unreadable.append(f"{error.path} ({error.reason})")


def _find(images: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Return id -> image of files and folders, and the files that are not images.

    Raises UserError if an image is missing, if two have the same id, or if a name is too long.
    """
    paths: list[tuple[str, Path]] = []
    left_out: list[Path] = []
    missing = [str(path) for path in images if not path.exists()]
    if missing:
        raise UserError(f"no such file: {some(missing)}")
    for path in images:
        if not path.is_dir():
            paths.append((path.stem, path))
            continue
        visible = visible_files(path)
        in_folder = [file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES]
        if not in_folder:
            raise UserError(f"{path}: no images in that folder; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        paths += [(file.relative_to(path).with_suffix("").as_posix(), file) for file in in_folder]
        left_out += [file for file in visible if file not in in_folder]
    counts = Counter(id_ for id_, _ in paths)
    repeated = sorted(id_ for id_, count in counts.items() if count > 1)
    if repeated:
        raise UserError(
            f"several images are called {some(repeated)}, and so would be their masks: rename them, or give one folder "
            "that holds them all"
        )
    too_long = [str(path) for id_, path in paths if len(os.fsencode(Path(id_).name)) > 255 - len("_overlay.png")]
    if too_long:
        raise UserError(
            f"names of more than 243 bytes are too long for a file NAME_overlay.png: rename {', '.join(too_long[:3])}"
        )
    return dict(paths), left_out


def _tags(text: str, classes: Sequence[str]) -> list[str] | Path:
    """Return the classes that ``--tags`` names, or the source of labels that it is.

    Names of classes come first, even if there is a folder of that name. ``;`` is no class.
    """
    if not text.strip():
        raise UserError("--tags is empty: expected classes, as in 'dog;person', a single ; for none, or a file of tags")
    names = [text] if text in classes else [name.strip() for name in re.split("[;,]", text) if name.strip()]
    if not all(name in classes for name in names):
        source = expanded(Path(text))
        with suppress(OSError):  # a list of classes may be too long for a name
            if source.exists():
                return source
            if source.suffix.lower() in (*TABLES, ".xml", ".txt"):
                raise UserError(f"--tags {text}: no such file of tags")
    return names


def _refuse_foreign(out: Path, paths: Mapping[str, Path], annotations: Sequence[Path]) -> None:
    """Raise UserError if results would replace an input, or a file that this command did not write."""
    inputs = {path.resolve() for path in paths.values()}
    lost, foreign = [], [path.name for path in annotations if path.exists() and not is_ours(path)]
    for id_ in paths:
        overlay_path, mask_path, summary = (out / f"{id_}{ending}" for ending in ("_overlay.png", "_mask.png", ".json"))
        lost += [path.name for path in (overlay_path, mask_path) if path.resolve() in inputs]
        if summary.exists():
            foreign += [] if is_summary(summary) else [summary.name]
        elif mask_path.exists() and mask_source(mask_path) is None:
            foreign.append(mask_path.name)
        elif overlay_path.exists() and not mask_path.exists():  # the mask is written first
            foreign.append(overlay_path.name)
    if lost or foreign:
        reason = "of the images to segment" if lost else "that cpn-fast predict did not write"
        raise UserError(f"{out}: files {reason} would be replaced ({some(lost or foreign)}): name another --out")


def _summary(model: Model, prediction: Prediction) -> dict[str, Any]:
    # A segmenter has no background threshold: its background is a class like the others.
    threshold = {"background_threshold": model.config.cam.mask_threshold} if isinstance(model, CamModel) else {}
    areas = np.bincount(prediction.mask.ravel(), minlength=1 + len(model.classes)) / prediction.mask.size
    return {
        "classes": {
            (name := model.classes[index]): {
                "probability": round(prediction.probabilities[name], 4),
                "mask_value": index + 1,
                "area": round(float(areas[index + 1]), 4),
            }
            for index in prediction.seed.classes.tolist()
        },
        "probabilities": {name: round(value, 4) for name, value in prediction.probabilities.items()},
        **threshold,
    }
