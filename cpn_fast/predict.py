"""Masks of single images by a trained network: ``cpn-fast predict``, and ``cpn_fast.load`` for programs."""

from __future__ import annotations

import copy
import difflib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from cpn_fast.cam import images_for, summed_cams
from cpn_fast.config import Config, parse
from cpn_fast.dataset import Sample
from cpn_fast.errors import UserError
from cpn_fast.files import replacing, write_json
from cpn_fast.kernels import pooled_logits
from cpn_fast.labels import IMAGE_SUFFIXES
from cpn_fast.masks import overlay, write_mask
from cpn_fast.models.backbone import Headed
from cpn_fast.models.deeplab import DeepLab, build_deeplab
from cpn_fast.models.folding import fold
from cpn_fast.models.network import Network, build_network
from cpn_fast.pipelines.superpixels import read_image
from cpn_fast.precision import autocast
from cpn_fast.progress import track
from cpn_fast.seeds import Seed, unit_scale
from cpn_fast.segment import class_probabilities, mask_of
from cpn_fast.weights import load_into, read_weights, to_network_keys

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


Net = TypeVar("Net", bound=Headed)


class Model:
    """A trained network with its config: a ``CamModel`` or a ``Segmenter``."""

    blank: str
    """What it means that no class was found in an image."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def classes(self) -> tuple[str, ...]:
        return self.config.classes

    def predict(self, image: Path | str | np.ndarray, tags: Sequence[str] | None = None) -> Prediction:
        """Segment one image: a file, or uint8 RGB (H, W, 3).

        tags: names of the classes that it shows, as at training; None takes those whose probability is at least
        ``PRESENT``. A segmenter takes no tags. Raises UserError for a missing or damaged file and for a tag that is no
        class.
        """
        if not isinstance(image, np.ndarray):
            return next(self.predict_files([Path(image)], tags))[1]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is uint8 RGB (H, W, 3), found {image.dtype}{image.shape}")
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            Image.fromarray(image).save(file, "PNG", compress_level=1)
            file.flush()
            return next(self.predict_files([Path(file.name)], tags))[1]

    def predict_files(
        self, paths: Sequence[Path], tags: Sequence[str] | None = None
    ) -> Iterator[tuple[Path, Prediction]]:
        """As ``predict``, for many files, the largest first."""
        raise NotImplementedError


class Segmenter(Model):
    """DeepLab, which needs no tags; images go through the same steps as in ``cpn-fast segment``, CRF included."""

    blank = "no pixel is of a class"

    def __init__(self, config: Config, network: DeepLab) -> None:
        super().__init__(config)
        self.network = network

    def predict_files(
        self, paths: Sequence[Path], tags: Sequence[str] | None = None
    ) -> Iterator[tuple[Path, Prediction]]:
        if tags is not None:
            raise UserError(
                "tags were given, and the model is a segmenter, which finds the classes itself: leave them out"
            )
        samples = [Sample(path.stem, path, None, None) for path in paths]
        for batch in images_for(self.network, samples, self.config, self.config.segment.scales, batch=1):
            path = paths[batch.indices[0]]
            (probabilities,) = class_probabilities(self.network, batch, self.config)
            mask = mask_of(probabilities, path, self.config.segment.crf)
            found = np.setdiff1d(mask, 0).astype(np.int64)
            scores = dict(zip(self.classes, probabilities[1:].max((1, 2)).tolist(), strict=True))
            yield path, Prediction(scores, Seed(found - 1, probabilities[found]), mask)


class CamModel(Model):
    """A network of CPN, SEAM or the plain CAM; images go through the same steps as in ``cpn-fast cam``."""

    blank = f"no class has a probability of {PRESENT} (see the JSON); --tags names what is there"

    def __init__(self, config: Config, network: Network, device: torch.device) -> None:
        super().__init__(config)
        self.network, self.device = network, device

    def with_map(self, map: Literal["refined", "raw"]) -> CamModel:
        """The same network, whose ``map`` becomes the seed (``cam.map``)."""
        cam = self.config.cam.model_copy(update={"map": map})
        return CamModel(self.config.model_copy(update={"cam": cam}), self.network, self.device)

    def predict_files(
        self, paths: Sequence[Path], tags: Sequence[str] | None = None
    ) -> Iterator[tuple[Path, Prediction]]:
        given = None if tags is None else self._indicator(tags)
        samples = [Sample(path.stem, path, None, None) for path in paths]
        batches = images_for(self.network, samples, self.config, self.config.cam.scales, batch=1)
        for batch in batches:
            with torch.inference_mode(), autocast(self.config.train.precision, self.device):
                probabilities = self._probabilities(batch.scales)
                present = probabilities >= PRESENT if given is None else given
                (cam,) = summed_cams(self.network, batch, present[None], self.config.cam)
            seed = Seed(present.nonzero().squeeze(1).numpy(), unit_scale(cam).cpu().numpy())
            scores = dict(zip(self.classes, probabilities.tolist(), strict=True))
            yield paths[batch.indices[0]], Prediction(scores, seed, seed.mask(self.config.cam.mask_threshold))

    def export(self, path: Path | str) -> None:
        """Write the network as a program of ``torch.export`` (.pt2), which plain torch loads and runs without cpn_fast.

        Called with images, float32 RGB (N, 3, H, W) from 0 to 255, and tags, float32 (N, classes) of 0 and 1, it gives
        the probability of each class, (N, classes), and the map ``cam.map`` of the tagged ones, at least 0, (N,
        classes, H, W). N, H and W are free, H and W from 17 on. It is one scale without a flip, in float32; PCM is the
        plain formula, which holds the affinities of all pairs of cells. Raises UserError if the file cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise UserError(f"{path}: exists already; remove it or choose another name")
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        graph = _Graph(network, self.config.cam.map).to(self.device).eval()
        side = network.backbone.fit(97)
        images, tags = torch.zeros(2, 3, side, side), torch.ones(2, len(self.classes))
        free = torch.export.Dim.AUTO
        with torch.no_grad():
            program = torch.export.export(
                graph,
                (images.to(self.device), tags.to(self.device)),
                dynamic_shapes=({0: free, 2: free, 3: free}, {0: free}),
            )
        with replacing(path) as file:
            torch.export.save(program, file)

    def _probabilities(self, scales: Sequence[Tensor]) -> Tensor:
        """float32 (classes,) on the CPU, of the image at the scale nearest to its own size."""
        factors = self.config.cam.scales
        images = scales[min(range(len(factors)), key=lambda i: abs(factors[i] - 1))]
        # Refinement plays no part in the logits, so any tags will do.
        cams = self.network(images.contiguous(memory_format=torch.channels_last), images.new_ones(1, len(self.classes)))
        return pooled_logits(cams.raw[:, 1:].float(), size=(images.shape[2], images.shape[3]))[0].sigmoid().cpu()

    def _indicator(self, tags: Sequence[str]) -> Tensor:
        unknown = sorted(set(tags) - set(self.classes))
        if unknown:
            near = (difflib.get_close_matches(name, self.classes, n=1) for name in unknown)
            hint = "".join(f"; did you mean {found[0]}?" for found in near if found)
            named = f"tags that are no class: {', '.join(unknown)}{hint or '.'}"
            raise UserError(f"{named} Classes are: {', '.join(self.classes)}")
        return torch.tensor([name in tags for name in self.classes])


class _Graph(nn.Module):
    """What ``CamModel.export`` writes."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, map: Literal["refined", "raw"]) -> None:
        super().__init__()
        self.network, self.map = network, map
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(network, name)).view(3, 1, 1))

    def forward(self, images: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        size = images.shape[2], images.shape[3]
        cams = self.network((images - self.mean) / self.std, tags)
        probabilities = pooled_logits(cams.raw[:, 1:], size=size).sigmoid()
        maps = cams.refined if self.map == "refined" else F.relu(cams.raw)
        maps = maps[:, 1:] * tags[:, :, None, None]
        return probabilities, F.interpolate(maps, size, mode="bilinear", align_corners=True)


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
    if not weights.is_file():
        there = ", ".join(str(file.parent) for file in sorted(path.glob("*/model.safetensors")))
        hint = f"trained runs there: {there}" if there else "`cpn-fast train` writes a run's model.safetensors"
        raise UserError(f"{weights}: no such file of weights; {hint}")
    found = [folder / "config.yaml" for folder in weights.absolute().parents[:2]]
    source = next((file for file in found if file.is_file()), None)
    if source is None:
        raise UserError(f"{weights}: no config.yaml beside it; keep the two files of a run together")
    try:
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{source}: not readable as YAML: {error}") from None
    config = parse(tree, str(source))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tensors = to_network_keys(read_weights(weights))

    def loaded(network: Net) -> Net:
        load_into(network, tensors, source=weights)
        return fold(network.eval()).to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    if "cls_conv.weight" in tensors:
        return Segmenter(config, loaded(build_deeplab(config)))
    if "f8_5.weight" in tensors:
        raise UserError(
            f"{weights}: AffinityNet's weights, which tell what belongs together and know no classes; give the folder "
            "of the run, or of its segmenter (RUN/segment/deeplab)"
        )
    return CamModel(config, loaded(build_network(config)), place)


def run(model: Path, images: Sequence[Path], out: Path, tags: Sequence[str] | None) -> tuple[int, str]:
    """Write ``ID_overlay.png``, ``ID_mask.png`` and ``ID.json`` for every image into ``out``.

    A folder stands for the JPEG and PNG files in it. Returns the number of images, and a sentence on those in which no
    class was found, empty if there are none.
    """
    blank = 0
    images = [file for path in images for file in (_images_in(path) if path.is_dir() else [path])]
    missing = [str(image) for image in images if not image.is_file()]
    if missing:
        raise UserError(f"no such file: {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}")
    stems = [image.stem for image in images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise UserError(f"several images are called {', '.join(twice)}, and so would be their masks: rename them")
    trained = load(model)
    for image, prediction in track(trained.predict_files(images, tags), "predict", total=len(images)):
        write_mask(out / f"{image.stem}_mask.png", prediction.mask)
        with replacing(out / f"{image.stem}_overlay.png") as file:
            Image.fromarray(overlay(read_image(image), prediction.mask, trained.classes)).save(file, "PNG")
        summary = {"image": str(image), **_summary(trained, prediction)}
        write_json(out / f"{image.stem}.json", summary, indent=2)
        blank += not len(prediction.seed.classes)
    return len(images), f"In {blank} {trained.blank}" if blank else ""


def _images_in(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"{folder}: no JPEG or PNG files in that folder")
    return found


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
