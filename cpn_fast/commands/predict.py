"""Masks of single images by a trained network: ``cpn-fast predict``, and ``cpn_fast.load`` for programs."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import io
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.commands.annotations import writer
from cpn_fast.config import Config
from cpn_fast.config_file import read
from cpn_fast.data.dataset import Sample
from cpn_fast.data.images import UnreadableImage, read_image, upright
from cpn_fast.data.labels import IMAGE_SUFFIXES, read_labels
from cpn_fast.data.masks import write_mask
from cpn_fast.data.pictures import overlay
from cpn_fast.data.provenance import image_digest
from cpn_fast.data.seeds import Seed, unit_scale
from cpn_fast.kernels import pooled_logits
from cpn_fast.models.backbone import Headed
from cpn_fast.models.deeplab import DeepLab, build_deeplab
from cpn_fast.models.folding import fold
from cpn_fast.models.inference import images_for, nearest_scale, summed_cams
from cpn_fast.models.network import Network, build_network
from cpn_fast.models.weights import chosen, load_into, read_weights, require_finite, to_network_keys
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import create, remove_partials, replacing, write_json
from cpn_fast.runtime.owner import owned
from cpn_fast.runtime.precision import autocast
from cpn_fast.runtime.progress import tell, track
from cpn_fast.stages.segment import class_probabilities, mask_of
from cpn_fast.training import run_folder
from cpn_fast.training.run_folder import own_config

PRESENT = 0.5
"""A class counts as present from this probability on, where ``CamModel`` is given no tags."""


class Prediction(NamedTuple):
    """What a network sees in one image."""

    probabilities: dict[str, float]
    """Class name -> probability that the image shows it (a segmenter's: of its likeliest pixel), for all classes."""
    seed: Seed
    """Scores (of a segmenter: probabilities) of the classes that were given as tags or found."""
    mask: np.ndarray
    """uint8 (H, W): 0 background, i + 1 for ``Model.classes[i]``."""


EXPORTS = (".pt2", ".onnx")
"""Endings of what ``Model.export`` writes."""
Net = TypeVar("Net", bound=Headed)
Picture: TypeAlias = "str | Path | Image.Image | np.ndarray"
Tags: TypeAlias = "str | Sequence[str] | None"


class Model:
    """A trained network with its config: a ``CamModel`` or a ``Segmenter``."""

    blank: str
    """What it means that no class was found in an image."""
    network: Headed
    outputs: tuple[str, ...]
    """Names of what an exported network gives."""

    def __init__(self, config: Config, weights: Path) -> None:
        self.config, self.weights = config, weights

    @property
    def classes(self) -> tuple[str, ...]:
        return self.config.classes

    @overload
    def predict(self, image: Picture, tags: Tags = None) -> Prediction: ...
    @overload
    def predict(self, image: list[Picture], tags: Tags = None) -> list[Prediction]: ...
    def predict(self, image: Picture | list[Picture], tags: Tags = None) -> Prediction | list[Prediction]:
        """Segment an image, or each of a list: a file's path, a PIL image, or uint8 RGB (H, W, 3), RGBA or gray (H, W).

        tags: the classes that it shows, as at training, or the one; None takes those whose probability is at least
        ``PRESENT``. A segmenter takes no tags. Raises UserError for a missing or damaged file and for a tag that is no
        class, ValueError for an array of another kind.
        """
        images = image if isinstance(image, list) else [image]
        files = all(isinstance(each, (str, Path)) for each in images)
        with nullcontext("") if files else tempfile.TemporaryDirectory() as folder:
            paths = [_as_file(each, Path(folder) / f"{number}.png") for number, each in enumerate(images)]
            found = dict(self.predict_files(list(dict.fromkeys(paths)), tags))
        predictions = [found[path] for path in paths]
        return predictions if isinstance(image, list) else predictions[0]

    def predict_files(
        self, paths: Sequence[Path], tags: Tags | Mapping[Path, Sequence[str]] = None
    ) -> Iterator[tuple[Path, Prediction]]:
        """As ``predict``, for many files, the largest first. ``tags`` may differ by path; None of those left out."""
        raise NotImplementedError

    def graph(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """What ``export`` writes, and examples of what it takes beside images."""
        raise NotImplementedError

    def export(self, path: Path | str) -> None:
        """Write the network as a program of ``torch.export`` (.pt2) or as ONNX (.onnx), which need no cpn_fast to run.

        It takes images, float32 RGB (N, 3, H, W) from 0 to 255. A ``CamModel`` also takes tags, float32 (N, classes) of
        0 and 1, and gives the probability of each class, (N, classes), and the map ``cam.map`` of the tagged ones, at
        least 0, (N, classes, H, W). A ``Segmenter`` gives the probability of background and of each class, (N, 1 +
        classes, H, W). N, H and W are free, H and W from 17 on. It is one scale without a flip or CRF, in float32; PCM
        is the plain formula, which holds the affinities of all pairs of cells. ONNX needs ``pip install onnx
        onnxscript``. Raises UserError if the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in EXPORTS:
            raise UserError(f"{path}: expected a name that ends in {' or '.join(EXPORTS)}")
        if path.suffix == ".onnx" and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
            raise UserError(f"{path}: ONNX is written by packages that are not installed: pip install onnx onnxscript")
        graph, others = self.graph()
        device = next(graph.parameters()).device
        side = self.network.backbone.fit(97)
        free = torch.export.Dim.AUTO
        with torch.no_grad():
            program = torch.export.export(
                graph.eval().to(device),
                (torch.zeros(2, 3, side, side, device=device), *others),
                dynamic_shapes=({0: free, 2: free, 3: free}, *({0: free} for _ in others)),
            )
            create(path, _onnx(program, self.outputs) if path.suffix == ".onnx" else _saved(program))


def _as_file(image: Picture, path: Path) -> Path:
    """Where the pipelines can read an image: its file, or ``path``, to which its pixels are written."""
    if isinstance(image, (str, Path)):
        return Path(image)
    if isinstance(image, np.ndarray):
        shape = image.shape[:2] if image.ndim == 3 and image.shape[2] == 1 else image.shape
        if (
            image.dtype != np.uint8
            or not image.size
            or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4)))
        ):
            raise ValueError(f"an image is uint8 RGB (H, W, 3), RGBA or gray (H, W), found {image.dtype}{image.shape}")
        image = Image.fromarray(image.reshape(shape))
    Image.fromarray(upright(image)).save(path, "PNG", compress_level=1)
    return path


class Segmenter(Model):
    """DeepLab, which needs no tags; images go through the same steps as in ``cpn-fast segment``, CRF included."""

    blank = "no pixel is of a class"

    def __init__(self, config: Config, weights: Path, network: DeepLab) -> None:
        super().__init__(config, weights)
        self.network = network

    network: DeepLab
    outputs = ("probabilities",)

    def graph(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return _SegmenterGraph(network), ()

    def predict_files(
        self, paths: Sequence[Path], tags: Tags | Mapping[Path, Sequence[str]] = None
    ) -> Iterator[tuple[Path, Prediction]]:
        if tags is not None:
            raise UserError(
                "tags were given, and the model is a segmenter, which finds the classes itself: leave them out"
            )
        samples = [Sample(path.stem, path, None, None) for path in paths]
        for batch in images_for(self.network, samples, self.config, self.config.segment.scales, batch=1):
            path = paths[batch.indices[0]]
            (probabilities,) = class_probabilities(self.network, batch, self.config)
            require_finite(probabilities, self.weights, path.name)
            mask = mask_of(probabilities, path, self.config.segment.crf)
            found = np.setdiff1d(mask, 0).astype(np.int64)
            scores = dict(zip(self.classes, probabilities[1:].max((1, 2)).tolist(), strict=True))
            yield path, Prediction(scores, Seed(found - 1, probabilities[found]), mask)


class CamModel(Model):
    """A network of CPN, SEAM or the plain CAM; images go through the same steps as in ``cpn-fast cam``."""

    blank = f"no class has a probability of {PRESENT} (see the JSON); --tags names what is there"
    network: Network
    outputs = ("probabilities", "maps")

    def __init__(self, config: Config, weights: Path, network: Network, device: torch.device) -> None:
        super().__init__(config, weights)
        self.network, self.device = network, device

    def with_map(self, kind: Literal["refined", "raw"]) -> CamModel:
        """The same network, whose ``kind`` of map becomes the seed (``cam.map``)."""
        cam = self.config.cam.model_copy(update={"map": kind})
        return CamModel(self.config.model_copy(update={"cam": cam}), self.weights, self.network, self.device)

    def predict_files(
        self, paths: Sequence[Path], tags: Tags | Mapping[Path, Sequence[str]] = None
    ) -> Iterator[tuple[Path, Prediction]]:
        by_path = {path: self._indicator(own) for path, own in tags.items()} if isinstance(tags, Mapping) else None
        for_all = None if tags is None or isinstance(tags, Mapping) else self._indicator(tags)
        samples = [Sample(path.stem, path, None, None) for path in paths]
        batches = images_for(self.network, samples, self.config, self.config.cam.scales, batch=1)
        for batch in batches:
            with torch.inference_mode(), autocast(self.config.train.precision, self.device):
                probabilities = self._probabilities(batch.scales[nearest_scale(batch)])
                given = for_all if by_path is None else by_path.get(paths[batch.indices[0]])
                present = probabilities >= PRESENT if given is None else given
                (cam,) = summed_cams(self.network, batch, present[None], self.config.cam).cams
            seed = Seed(present.nonzero().squeeze(1).numpy(), unit_scale(cam).cpu().numpy())
            for found in (probabilities.numpy(), seed.cam):
                require_finite(found, self.weights, paths[batch.indices[0]].name)
            scores = dict(zip(self.classes, probabilities.tolist(), strict=True))
            yield paths[batch.indices[0]], Prediction(scores, seed, seed.mask(self.config.cam.mask_threshold))

    def graph(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return _CamGraph(network, self.config.cam.map), (torch.ones(2, len(self.classes), device=self.device),)

    def _probabilities(self, images: Tensor) -> Tensor:
        """float32 (classes,) on the CPU, of one image (1, 3, H, W)."""
        # Refinement plays no part in the logits, so any tags will do.
        cams = self.network(images.contiguous(memory_format=torch.channels_last), images.new_ones(1, len(self.classes)))
        return pooled_logits(cams.raw[:, 1:].float(), size=(images.shape[2], images.shape[3]))[0].sigmoid().cpu()

    def _indicator(self, tags: str | Sequence[str]) -> Tensor:
        tags = [tags] if isinstance(tags, str) else tags
        unknown = sorted(set(tags) - set(self.classes))
        if unknown:
            near = (difflib.get_close_matches(name, self.classes, n=1) for name in unknown)
            hint = "".join(f"; did you mean {found[0]}?" for found in near if found)
            named = f"tags that are no class: {', '.join(unknown)}{hint or '.'}"
            raise UserError(f"{named} Classes are: {', '.join(self.classes)}")
        return torch.tensor([name in tags for name in self.classes])


def _saved(program: torch.export.ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _onnx(program: torch.export.ExportedProgram, outputs: Sequence[str]) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, and says so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside the exporter
        written = torch.onnx.export(program, dynamo=True, output_names=outputs, verbose=False)
    assert written is not None
    return written.model_proto.SerializeToString()


class _Normalised(nn.Module):
    """A network that takes RGB from 0 to 255."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Headed) -> None:
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(network, name)).view(3, 1, 1))

    def normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class _CamGraph(_Normalised):
    """What ``Model.export`` writes of a ``CamModel``."""

    def __init__(self, network: Network, kind: Literal["refined", "raw"]) -> None:
        super().__init__(network)
        self.kind = kind

    def forward(self, images: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        size = images.shape[2], images.shape[3]
        cams = self.network(self.normalised(images), tags)
        probabilities = pooled_logits(cams.raw[:, 1:], size=size).sigmoid()
        maps = cams.refined if self.kind == "refined" else F.relu(cams.raw)
        maps = maps[:, 1:] * tags[:, :, None, None]
        return probabilities, F.interpolate(maps, size, mode="bilinear", align_corners=True)


class _SegmenterGraph(_Normalised):
    """What ``Model.export`` writes of a ``Segmenter``."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(self.normalised(images))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True).softmax(1)


def load(path: Path | str, device: str | torch.device | None = None) -> Model:
    """A trained model, ready to predict.

    >>> model = cpn_fast.load("runs/voc")
    >>> prediction = model.predict("photo.jpg", ["dog", "person"])  # without the names it finds out itself
    >>> prediction.mask, prediction.probabilities["dog"]  # uint8 (H, W), from 0 to 1

    path: the folder of a run or of its segmenter (``RUN/segment/deeplab``), or a file of weights with its
    ``config.yaml`` beside it or one folder up (where a checkpoint's is). device: by default CUDA where there is one.
    Raises UserError if either file is missing or damaged.
    """
    path = Path(path)
    weights = path / "model.safetensors" if path.is_dir() else path
    if not weights.exists():
        there = ", ".join(str(file.parent) for file in sorted(path.glob("*/model.safetensors")))
        hint = f"trained runs there: {there}" if there else "`cpn-fast train` writes a run's model.safetensors"
        raise UserError(f"{weights}: no such file of weights; {hint}")
    config = _config_of(weights)
    if path.is_dir():
        weights = chosen(path, config)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tensors = to_network_keys(read_weights(weights))

    def loaded(network: Net) -> Net:
        load_into(network, tensors, source=weights)
        return fold(network.eval()).to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    if "cls_conv.weight" in tensors:
        return Segmenter(config, weights, loaded(build_deeplab(config)))
    if "f8_5.weight" in tensors:
        raise UserError(
            f"{weights}: AffinityNet's weights, which tell what belongs together and know no classes; give the folder "
            "of the run, or of its segmenter (RUN/segment/deeplab)"
        )
    return CamModel(config, weights, loaded(build_network(config)), place)


def _config_of(weights: Path) -> Config:
    """The config beside a file of weights. Where that is missing, damaged, or of other weights, their own decides."""
    found = [folder / "config.yaml" for folder in weights.absolute().parents[:2]]
    source = next((file for file in found if file.exists()), None)
    own = own_config(weights)
    if source is None and own is None:
        raise UserError(f"{weights}: no config.yaml beside it; keep the two files of a run together")
    if own is None:
        assert source is not None
        return read(reading.read_bytes(source, reading.CONFIG).decode(errors="replace"), str(source))
    config = read(own, str(weights))
    if source is None:
        return config
    try:
        beside = read(reading.read_text(source, reading.CONFIG), str(source))
        differing = ", ".join(run_folder.differing_keys(config, beside))
    except (UserError, OSError, ValueError):
        differing = "it cannot be read"
    if not differing:
        return beside
    print(f"Warning: {source} is not what {weights} was trained with ({differing}): its own is taken", file=sys.stderr)
    return config


class Predicted(NamedTuple):
    """What ``run`` made."""

    images: int
    unreadable: list[str]
    """The images that could not be read, each with the reason."""
    left_out: list[Path]
    """Files in the folders that are no images by their ending."""
    remarks: list[str]
    """Sentences on images in which no class was found, and on those that a file of tags lacks."""
    annotations: list[Path]


def run(
    model: Path, images: Sequence[Path], out: Path, tags: Sequence[str] | Path | None, forms: Sequence[str] = ()
) -> Predicted:
    """Write ``ID_overlay.png``, ``ID_mask.png`` and ``ID.json`` for every image into ``out``, and files of annotations.

    A folder stands for the images in it and in its folders, whose names their ids keep; hidden files and folders are
    passed over. ``tags``: of all images, or a source of labels (``data.labels``) with those of each. ``forms`` are some
    of ``annotations.FORMS``. An image that cannot be read does not stop the others. Raises UserError if nothing can be
    predicted.
    """
    chosen, left_out = _find(images)
    trained = load(model)
    writers = [writer(form, trained.classes) for form in forms]
    reserved = sorted(set(chosen) & {Path(own.file).stem for own in writers})
    if reserved:
        raise UserError(f"images are called {', '.join(reserved)}, and so are files of --annotations: rename them")
    remarks = []
    given: Tags | Mapping[Path, Sequence[str]] = None if isinstance(tags, Path) else tags
    if isinstance(tags, Path):
        labels = read_labels(tags, chosen.keys(), trained.classes)
        given = {
            chosen[id_]: [name for name, there in zip(trained.classes, label, strict=True) if there]
            for id_, label in labels.items()
        }
        if unknown := [str(path) for id_, path in chosen.items() if id_ not in labels]:
            remarks.append(
                f"{tags} has no tags of {len(unknown)} images ({some(unknown, 3)}): the model found their classes"
            )
    ids = {path: id_ for id_, path in chosen.items()}
    unreadable: list[str] = []
    blank = 0
    weights_sha256 = reading.sha256(trained.weights, reading.WEIGHTS)
    with owned(out):
        remove_partials(*{out, *((out / id_).parent for id_ in chosen)})
        for image, prediction in track(_readable(trained, list(ids), given, unreadable), "predict", total=len(ids)):
            place = out / ids[image]
            write_mask(place.with_name(f"{place.name}_mask.png"), prediction.mask)
            with replacing(place.with_name(f"{place.name}_overlay.png")) as file:
                Image.fromarray(overlay(read_image(image), prediction.mask, trained.classes)).save(file, "PNG")
            summary = {"image": str(image), **_summary(trained, prediction)}
            made_of = {"image": image_digest(image), "weights_sha256": weights_sha256}
            write_json(place.with_name(f"{place.name}.json"), {**summary, "made_of": made_of}, indent=2)
            tell("prediction", mask=place.with_name(f"{place.name}_mask.png"), **summary)
            for own in writers:
                scores = [round(prediction.probabilities[name], 4) for name in trained.classes]
                own.add(str(image), prediction.mask, dict(enumerate(scores, 1)))
            blank += not len(prediction.seed.classes)
        if blank:
            remarks.append(f"In {blank} {trained.blank}")
        written = [own.write(out) for own in writers]
    return Predicted(len(ids) - len(unreadable), unreadable, left_out, remarks, written)


def _readable(
    model: Model, paths: list[Path], tags: Tags | Mapping[Path, Sequence[str]], unreadable: list[str]
) -> Iterator[tuple[Path, Prediction]]:
    """Predictions of those that can be read; the others go into ``unreadable``."""
    left = dict.fromkeys(paths)
    while left:
        try:
            for path, prediction in model.predict_files(list(left), tags):
                del left[path]
                yield path, prediction
        except UnreadableImage as error:
            if error.path not in left:
                raise
            del left[error.path]
            unreadable.append(f"{error.path} ({error.reason})")


def _find(given: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Id -> image, and the files that were left out. Raises UserError if an image is missing or two have one id."""
    found: list[tuple[str, Path]] = []
    left_out: list[Path] = []
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        raise UserError(f"no such file: {some(missing)}")
    for path in given:
        if not path.is_dir():
            found.append((path.stem, path))
            continue
        files = [file for file in sorted(path.rglob("*")) if file.is_file() or file.is_symlink()]
        seen = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        own = [file for file in seen if file.suffix.lower() in IMAGE_SUFFIXES]
        if not own:
            raise UserError(f"{path}: no images in that folder; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        found += [(file.relative_to(path).with_suffix("").as_posix(), file) for file in own]
        left_out += [file for file in seen if file not in own]
    counts = Counter(id_ for id_, _ in found)
    twice = sorted(id_ for id_, count in counts.items() if count > 1)
    if twice:
        raise UserError(
            f"several images are called {some(twice)}, and their masks too: "
            "rename them, or give one folder that holds them all"
        )
    long = [str(path) for id_, path in found if len(os.fsencode(Path(id_).name)) > 255 - len("_overlay.png")]
    if long:
        raise UserError(
            f"names too long to have _overlay.png behind them, at most 243 bytes: rename {', '.join(long[:3])}"
        )
    return dict(found), left_out


def _summary(model: Model, prediction: Prediction) -> dict[str, Any]:
    # The segmenter's background is a class like the others.
    threshold = {"background_score": model.config.cam.mask_threshold} if isinstance(model, CamModel) else {}
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
