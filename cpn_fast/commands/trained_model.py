"""A trained network that predicts single images: ``cpn_fast.load``."""

from __future__ import annotations

import copy
import difflib
import reprlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cpn_fast.commands.program import CamGraph, SegmenterGraph, write_program
from cpn_fast.config import Config
from cpn_fast.config_file import parse, read
from cpn_fast.data.dataset import Sample
from cpn_fast.data.images import upright
from cpn_fast.data.seeds import Seed, unit_scale
from cpn_fast.kernels import pooled_logits
from cpn_fast.models.backbone import Headed, to_device
from cpn_fast.models.deeplab import DeepLab, build_deeplab
from cpn_fast.models.folding import fold
from cpn_fast.models.inference import images_for, nearest_scale, summed_cams
from cpn_fast.models.network import Network, build_network
from cpn_fast.models.weights import FINAL, load_into, read_weights, require_finite, to_network_keys, weights_of
from cpn_fast.runtime import reading
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.precision import autocast
from cpn_fast.stages.segment import class_probabilities, mask_of
from cpn_fast.training import run_folder
from cpn_fast.training.run_folder import own_config

PRESENT = 0.5
"""Without tags, ``CamModel`` finds a class if its probability is at least this."""


class Prediction(NamedTuple):
    """The prediction for one image."""

    probabilities: dict[str, float]
    """Class name -> probability that the image shows it, for all classes. A segmenter gives its likeliest pixel's."""
    seed: Seed
    """Scores of the classes that were given as tags or found. A segmenter's scores are probabilities."""
    mask: np.ndarray
    """uint8 (H, W): 0 background, i + 1 for ``Model.classes[i]``."""


Net = TypeVar("Net", bound=Headed)
Picture: TypeAlias = "str | Path | Image.Image | np.ndarray"
Tags: TypeAlias = "str | Sequence[str] | None"
TagsByPath: TypeAlias = "Mapping[str, Tags] | Mapping[Path, Tags]"


class Model:
    """A trained network with its config: a ``CamModel`` or a ``Segmenter``."""

    blank: str
    """Words for an image in which no class was found."""
    network: Headed
    outputs: tuple[str, ...]
    """Names of an exported network's outputs."""

    def __init__(self, config: Config, weights: Path) -> None:
        self.config, self.weights = config, weights

    @property
    def classes(self) -> tuple[str, ...]:
        return self.config.classes

    @overload
    def predict(self, image: Picture, tags: Tags | TagsByPath = None) -> Prediction: ...
    @overload
    def predict(self, image: list[Picture], tags: Tags | TagsByPath = None) -> list[Prediction]: ...
    def predict(self, image: Picture | list[Picture], tags: Tags | TagsByPath = None) -> Prediction | list[Prediction]:
        """Segment an image or a list of images: file paths, PIL images, or uint8 RGB (H, W, 3), RGBA or gray (H, W).

        ``tags``: the classes that the image shows, as in training, or one class, or path -> classes for image files.
        None takes the classes whose probability is at least ``PRESENT``. A segmenter takes no tags. Raises UserError
        for a missing or damaged file, for an unknown tag and for tags of other files, ValueError for another kind of
        array.
        """
        images = image if isinstance(image, list) else [image]
        files = all(isinstance(each, (str, Path)) for each in images)
        with nullcontext("") if files else tempfile.TemporaryDirectory() as folder:
            paths = [_as_file(each, Path(folder) / f"{number}.png") for number, each in enumerate(images)]
            if isinstance(tags, Mapping):
                others = {str(key) for key in tags if not isinstance(key, (str, Path)) or Path(key) not in paths}
                if others:
                    raise UserError(f"tags of files that are not among the images: {some(sorted(others), 3)}")
            by_path = dict(self.predict_files(list(dict.fromkeys(paths)), tags))
        predictions = [by_path[path] for path in paths]
        return predictions if isinstance(image, list) else predictions[0]

    def predict_files(self, paths: Sequence[Path], tags: Tags | TagsByPath = None) -> Iterator[tuple[Path, Prediction]]:
        """Yield the predictions of many files, the largest files first.

        ``tags`` is as in ``predict``, or maps paths to tags. A path that is not in the mapping has None.
        """
        raise NotImplementedError

    def graph(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Return the module that ``export`` writes, and examples of its inputs after the images."""
        raise NotImplementedError

    def export(self, path: Path | str) -> None:
        """Write the network as a program of ``torch.export`` (.pt2) or as ONNX (.onnx). Both run without cpn_fast.

        The program takes images, float32 RGB (N, 3, H, W) from 0 to 255, for any N and for H and W from 17 on. A
        ``CamModel`` also takes tags, float32 (N, classes) of 0 and 1. It gives the probability of each class, (N,
        classes), and the map ``cam.map`` of the tagged classes, at least 0, (N, classes, H, W). A ``Segmenter`` gives
        the probability of background and of each class, (N, 1 + classes, H, W).

        The program has one scale without flip or CRF, in float32. PCM is the plain formula, which holds the affinities
        of all pairs of cells. ONNX needs ``pip install onnx onnxscript``. Raises UserError if the file cannot be
        written.
        """
        graph, other_inputs = self.graph()
        write_program(Path(path), graph, other_inputs, side=self.network.backbone.fit(97), outputs=self.outputs)


def _as_file(image: Picture, path: Path) -> Path:
    """Return the path of an image's file. Pixels are written to ``path``, so that the pipelines can read them."""
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
    if not isinstance(image, Image.Image):
        kinds = "an image is a path, a PIL image or a uint8 array, and several are a list of them"
        raise ValueError(f"{kinds}; found {type(image).__name__}")
    if image.mode in ("I", "F"):
        raise ValueError(f"an image has 8 or 16 bits a channel, found a PIL image of mode {image.mode} (32 bits)")
    Image.fromarray(upright(image)).save(path, "PNG", compress_level=1)
    return path


class Segmenter(Model):
    """DeepLab, which needs no tags. Images go through the same steps as in ``cpn-fast segment``, CRF included."""

    blank = "no pixel is of a class"

    def __init__(self, config: Config, weights: Path, network: DeepLab) -> None:
        super().__init__(config, weights)
        self.network = network

    network: DeepLab
    outputs = ("probabilities",)

    def graph(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return SegmenterGraph(network), ()

    def predict_files(self, paths: Sequence[Path], tags: Tags | TagsByPath = None) -> Iterator[tuple[Path, Prediction]]:
        if tags is not None:
            raise UserError("the model is a segmenter, which finds the classes itself: give it no tags")
        samples = [Sample(path.stem, path, None, None) for path in paths]
        for batch in images_for(self.network, samples, self.config, self.config.segment.scales, batch=1):
            path = paths[batch.indices[0]]
            (probabilities,) = class_probabilities(self.network, batch, self.config)
            require_finite(probabilities, self.weights, path.name)
            mask = mask_of(probabilities, path, self.config.segment.crf)
            values = np.setdiff1d(mask, 0).astype(np.int64)
            scores = dict(zip(self.classes, probabilities[1:].max((1, 2)).tolist(), strict=True))
            yield path, Prediction(scores, Seed(values - 1, probabilities[values]), mask)


class CamModel(Model):
    """A network of CPN, SEAM or the plain CAM. Images go through the same steps as in ``cpn-fast cam``."""

    blank = f"no class has a probability of {PRESENT} (see the JSON); give their classes with --tags"
    network: Network
    outputs = ("probabilities", "maps")

    def __init__(self, config: Config, weights: Path, network: Network, device: torch.device) -> None:
        super().__init__(config, weights)
        self.network, self.device = network, device

    def with_map(self, kind: Literal["refined", "raw"]) -> CamModel:
        """Return a model of the same network with another kind of map as the seed (``cam.map``).

        Raises UserError for a kind that the network does not have.
        """
        tree = self.config.model_dump(mode="json")
        config = parse({**tree, "cam": {**tree["cam"], "map": kind}}, str(self.weights))
        return CamModel(config, self.weights, self.network, self.device)

    def predict_files(self, paths: Sequence[Path], tags: Tags | TagsByPath = None) -> Iterator[tuple[Path, Prediction]]:
        by_path: dict[Path, Tensor] = {}
        if isinstance(tags, Mapping):
            by_path = {Path(path): self._indicator(names) for path, names in tags.items() if names is not None}
        elif tags is not None:
            by_path = dict.fromkeys(paths, self._indicator(tags))
        samples = [Sample(path.stem, path, None, None) for path in paths]
        batches = images_for(self.network, samples, self.config, self.config.cam.scales, batch=1)
        for batch in batches:
            path = paths[batch.indices[0]]
            with torch.inference_mode(), autocast(self.config.train.precision, self.device):
                probabilities = self._probabilities(batch.scales[nearest_scale(batch)])
                present = by_path.get(path, probabilities >= PRESENT)
                (cam,) = summed_cams(self.network, batch, present[None], self.config.cam).cams
            seed = Seed(present.nonzero().squeeze(1).numpy(), unit_scale(cam).cpu().numpy())
            for values in (probabilities.numpy(), seed.cam):
                require_finite(values, self.weights, path.name)
            scores = dict(zip(self.classes, probabilities.tolist(), strict=True))
            yield path, Prediction(scores, seed, seed.mask(self.config.cam.mask_threshold))

    def graph(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return CamGraph(network, self.config.cam.map), (torch.ones(2, len(self.classes), device=self.device),)

    def _probabilities(self, images: Tensor) -> Tensor:
        """Return the class probabilities of one image (1, 3, H, W), float32 (classes,) on the CPU."""
        # The logits do not depend on the refinement, so any tags will do.
        cams = self.network(images.contiguous(memory_format=torch.channels_last), images.new_ones(1, len(self.classes)))
        return pooled_logits(cams.raw[:, 1:].float(), size=(images.shape[2], images.shape[3]))[0].sigmoid().cpu()

    def _indicator(self, tags: str | Sequence[str]) -> Tensor:
        """Return which classes are tags, bool (classes,)."""
        if isinstance(tags, Iterable):
            tags = [tags] if isinstance(tags, str) else list(tags)  # an iterator gives its names only once
        if not isinstance(tags, list) or not all(isinstance(name, str) for name in tags):
            raise UserError(f"tags: expected names of classes, the same for all images, found {reprlib.repr(tags)}")
        unknown = sorted(set(tags) - set(self.classes))
        if unknown:
            all_matches = (difflib.get_close_matches(name, self.classes, n=1) for name in unknown)
            hint = "".join(f"; did you mean {matches[0]}?" for matches in all_matches if matches)
            problem = f"tags that are not classes: {', '.join(unknown)}{hint or '.'}"
            raise UserError(f"{problem} Classes are: {', '.join(self.classes)}")
        return torch.tensor([name in tags for name in self.classes])


def load(path: Path | str, device: str | torch.device | None = None) -> Model:
    """Load a trained model for predictions.

    >>> model = cpn_fast.load("runs/voc")
    >>> prediction = model.predict("photo.jpg", ["dog", "person"])  # without names the model finds the classes
    >>> prediction.mask, prediction.probabilities["dog"]  # uint8 (H, W), from 0 to 1

    ``path``: the folder of a run or of its segmenter (``RUN/segment/deeplab``), or a file of weights with a
    ``config.yaml`` beside it or one folder up (as for a checkpoint). ``device``: by default CUDA if there is one.
    Raises UserError if either file is missing or damaged.
    """
    path = Path(path)
    weights = path / FINAL if path.is_dir() else path
    if not weights.exists():
        runs = ", ".join(str(file.parent) for file in sorted(path.glob(f"*/{FINAL}")))
        hint = f"trained runs there: {runs}" if runs else f"`cpn-fast train` writes a run's {FINAL}"
        raise UserError(f"{weights}: no such file of weights; {hint}")
    config = _config_of(weights)
    if path.is_dir():
        weights = weights_of(path, config)
    try:
        torch_device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except RuntimeError:
        raise UserError(f"device: expected cuda, cuda:1, ... or cpu, found {device!r}") from None
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {torch_device} is asked for, and torch finds no GPU; `cpn-fast doctor` says why")
    tensors = to_network_keys(read_weights(weights))

    def loaded(network: Net) -> Net:
        load_into(network, tensors, source=weights)
        return to_device(fold(network.eval()), torch_device)

    if "cls_conv.weight" in tensors:
        return Segmenter(config, weights, loaded(build_deeplab(config)))
    if "f8_5.weight" in tensors:
        raise UserError(
            f"{weights}: these are AffinityNet's weights, which know no classes; give the folder of the run, or of its "
            "segmenter (RUN/segment/deeplab)"
        )
    return CamModel(config, weights, loaded(build_network(config)), torch_device)


def _config_of(weights: Path) -> Config:
    """Return the config beside a file of weights, or the config in the weights if the file is missing or differs."""
    candidates = [folder / "config.yaml" for folder in weights.absolute().parents[:2]]
    source = next((file for file in candidates if file.exists()), None)
    stored = own_config(weights)
    if source is None and stored is None:
        raise UserError(f"{weights}: no config.yaml beside it; keep the two files of a run together")
    if stored is None:
        assert source is not None
        return read(reading.read_bytes(source, reading.CONFIG).decode(errors="replace"), str(source))
    config = read(stored, str(weights))
    if source is None:
        return config
    try:
        beside = read(reading.read_text(source, reading.CONFIG), str(source))
        differing = ", ".join(run_folder.differing_keys(config, beside))
    except (UserError, OSError, ValueError):
        differing = "it cannot be read"
    if not differing:
        return beside
    print(
        f"Warning: {source} is not the config that {weights} was trained with ({differing}). The config in the weights "
        "is used",
        file=sys.stderr,
    )
    return config
