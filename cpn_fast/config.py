"""Every key of a config, its bounds, its default and what it means. An unknown key is an error.

Where the paper and the released code differ, the key's docstring gives both values. Defaults are the released values
(``configs/voc.yaml``), except for 200 superpixels, cached once per image, and the paper's best sizes of grids.
``configs/voc_paper.yaml`` sets the paper's values.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.reading import expanded

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Every number has a lower and an upper bound, where memory, time or float32 end. So a value that cannot work is refused
# with its key before anything starts.
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""Weight of a loss term."""
Rate = Annotated[float, Field(gt=0, le=1e30)]
"""Learning rate. Biases of new layers take 20 times it, which fp32 still holds at 1e30."""
Exponent = Annotated[float, Field(gt=0, le=10_000)]
Factor = Annotated[float, Field(ge=0.01, le=16)]
"""Factor of an image's sides."""
Side = Annotated[int, Field(ge=1, le=16_384)]
"""Side in pixels."""
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Group = Annotated[int, Field(ge=1, le=65_536)]
"""Number of images or batches that are processed together."""
Workers = Annotated[int, Field(ge=1, le=1024)]
"""Number of threads or processes."""
Level = Annotated[float, Field(ge=0, le=255)]
Rgb = tuple[Level, Level, Level]
Spread = Annotated[float, Field(ge=0.01, le=1000)]


def _number_or_auto(value: Any) -> Any:
    if value != "auto" and (type(value) is not int or not 1 <= value <= 65_536):
        raise ValueError(f"expected a whole number from 1 to 65536, or auto, found {reprlib.repr(value)}")
    return value


BACKBONES = ("resnet38d", "mobilenet_v2", "narrow")
TIMM = "timm:"
"""Prefix of the name of a timm model, as in ``timm:resnet50``."""
TIMM_WEIGHTS = Path("timm")
"""Stands for the weights that timm downloads, in ``model.weights``."""
PACKAGE = "package:"
"""Prefix of the name of an installed Python package that holds a file of weights."""


def _names_a_function(name: str) -> str:
    module, _, function = name.rpartition(":")
    if not module or not function.isidentifier():
        raise ValueError(f"expected package.module:function or FILE.py:function, found {name!r}")
    return name


def _known_backbone(name: str) -> str:
    if name not in BACKBONES and not (name.startswith(TIMM) and name != TIMM):
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"expected {', '.join(BACKBONES)} or {TIMM}NAME, found {name!r}{hint}")
    return name


Images = Annotated[Group | Literal["auto"], BeforeValidator(_number_or_auto)]


def _holds_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(_holds_numbers(inner) for inner in get_args(annotation))


class Section(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true, yes and on (and false) for a number: pydantic takes them as 1 and 0."""
        switches = [item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, bool)]
        assert info.field_name is not None
        if switches and _holds_numbers(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"expected a number, found {str(switches[0]).lower()}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _home(cls, value: Any) -> Any:
        """Expand ``~`` to the home folder. A shell does not expand it in KEY=~/VALUE."""
        if isinstance(value, Path) and "\0" in str(value):  # YAML reads \0 in double quotes as a character of value 0
            raise ValueError(f"no path has a character of value 0, found {str(value)!r}")
        try:
            return expanded(value) if isinstance(value, Path) else value
        except UserError as error:
            raise ValueError(error) from None


class Data(Section):
    """Paths of the images, lists, labels and masks. Relative paths start at ``root``."""

    root: Path
    """Folder in VOC's layout (the one that holds JPEGImages)."""
    images: Path = Path("JPEGImages")
    """Folder of the images. The image of id ``x`` is ``x.jpg``."""
    masks: Path = Path("SegmentationClass")
    """Folder of the ground-truth palette PNGs. Scores need them; ``train`` only checks that they are valid."""
    labels: Path = Path("Annotations")
    """Image-level labels: a folder of VOC XML files, psa's ``cls_labels.npy``, or CSV/JSON of id -> class names. An
    image without a class is a negative."""
    train_list: Path = Path("Annotations")
    """Images to train on: a list of ids, of paths, or of psa's ``/JPEGImages/x.jpg /SegmentationClassAug/x.png``; or a
    source of labels, which stands for its images. By default all images that ``labels`` names."""
    eval_list: Path = Path("Annotations")
    """Images that get seeds and scores. ``--list`` names others."""
    shards: Path | None = None
    """Folder into which ``cpn-fast shards`` packed the training list. ``train`` reads images, tags and superpixels from
    it, and no other file of the data set. Null reads loose files."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_the_labels(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        labels = tree.get("labels", cls.model_fields["labels"].default)
        return {"train_list": labels, "eval_list": tree.get("train_list", labels), **tree}


class Superpixels(Section):
    """SLIC superpixels. docs/superpixels.md explains them and compares the engines."""

    count: Annotated[int, Field(ge=1, le=32_000)] = 200
    """Superpixels asked for per image. Paper 200; released 300, from which skimage 0.17 made about 140 to 190."""
    compactness: Annotated[float, Field(gt=0, le=10_000)] = 10.0
    """Weight of distance against colour. fast-slic's integers overflow from about 16,000 on."""
    iterations: Annotated[int, Field(ge=1, le=1000)] = 10
    """Rounds of k-means."""
    mode: Literal["cached", "online"] = "cached"
    """``cached``: once per image, moved with the image. ``online`` (paper and released): on every augmented crop."""
    engine: Literal["auto", "fast-slic", "kernel"] = "auto"
    """``kernel``: our kernel, for a GPU; slow on a CPU. ``fast-slic``: a package, on the CPU. ``auto``: the kernel on a
    GPU and where fast-slic is not installed, otherwise fast-slic. The two make different superpixels."""
    cache: Path = Path("superpixels")
    """Cache folder. Relative paths start at ``out``, so runs share the cache."""


class Augment(Section):
    """Training augmentation, in this order: resize, flip, colour, normalise, crop."""

    long_side: tuple[Side, Side] = (448, 768)
    """The long side is resized to a whole number drawn from this closed range."""
    scale: tuple[Factor, Factor] | None = None
    """Replaces ``long_side``: both sides are multiplied by a factor drawn from this range (``segment``: 0.5 to 1.5)."""
    crop: Side = 448
    """Side of the square crop. Smaller images are padded with 0 (the mean colour) at a random offset."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    brightness: Share = 0.3
    """Factor from U[1 - x, 1 + x]."""
    contrast: Share = 0.3
    """Factor from U[1 - x, 1 + x]."""
    saturation: Share = 0.3
    """Factor from U[1 - x, 1 + x]."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Rotation of the hue from U[-x, x], as a share of the full circle."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.long_side[0] > self.long_side[1]:
            raise ValueError(f"long_side goes from {self.long_side[0]} down to {self.long_side[1]}: swap them")
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError(f"scale goes from {self.scale[0]} down to {self.scale[1]}: swap them")
        return self


class Patches(Section):
    """How an image is split into a complementary pair."""

    kind: Literal["superpixel", "grid"] = "superpixel"
    """What a patch is."""
    hide: Share = 0.5
    """Probability (share, when drawn with replacement) of hiding a patch."""
    sampling: Literal["independent", "with-replacement"] = "with-replacement"
    """Paper ``independent``: one coin per patch. Released ``with-replacement``: floor(hide * n) draws, hiding about
    39 % at hide = 0.5. Grid patches are independent in both."""
    share: Literal["pixels", "patches"] = "pixels"
    """What lambda counts as visible. Paper ``patches``; released ``pixels`` for superpixels, ``patches`` for grids."""
    fill: Rgb | None = None
    """RGB (0 to 255) of hidden pixels. Null: the normalisation's mean (released). Paper: the training set's mean."""
    grid_sizes: tuple[Side, ...] = (56, 112)
    """Sides of grid cells in pixels; one is drawn per image. Paper's best 56, 112; released 224, 448."""

    @model_validator(mode="after")
    def _has_grid_sizes(self) -> Self:
        if not self.grid_sizes:
            raise ValueError("grid_sizes is empty: name at least one cell side in pixels")
        return self


class Model(Section):
    """Backbone, class head and the two refinements of the CAM."""

    backbone: Annotated[str, AfterValidator(_known_backbone)] = "resnet38d"
    """``resnet38d`` (paper), ``mobilenet_v2`` (small), ``narrow`` (the demo's), or ``timm:NAME``, a convolutional model
    of timm as in ``timm:resnet50`` (needs ``pip install timm torchvision``)."""
    stride: Literal[8, 16] = 8
    """Output stride of the backbone: 8 (paper and released), or 16 with mobilenet_v2 and timm, four times cheaper."""
    weights: Path | None = None
    """Pretrained weights: a file (.safetensors, .pth or MXNet .params), ``package:NAME`` for the only file of weights
    in an installed Python package, or ``timm`` for timm's download for ``timm:NAME``. Null: random weights."""
    mean: Rgb | None = None
    """RGB (0 to 255) subtracted from the input. Null: the mean that the backbone's usual weights were trained with
    (mobilenet_v2: TensorFlow's). ``init`` and an error give the values for torchvision's."""
    std: tuple[Spread, Spread, Spread] | None = None
    """RGB (0 to 255) that divides the input. Null: as for ``mean``."""
    pcm: bool = True
    """Pixel correlation module (eqs. 8 to 10)."""
    prcm: bool = True
    """Pixel-region correlation module (eq. 11)."""
    pcm_norm: Literal["l2", "l1-squared"] = "l2"
    """Norm that divides an embedding in eq. 10. Paper (as printed) ``l1-squared``; released ``l2``."""
    pcm_sum: Literal["column", "all"] = "column"
    """Sum that divides an affinity in eq. 9. Paper (as printed) ``all`` pairs; released each target's ``column``."""
    prcm_relu: bool = True
    """ReLU on keys and queries of eq. 11. Paper (linear) false; released true."""
    prcm_scale: Literal["classes", "one"] = "classes"
    """Factor before eq. 11's softmax. Paper ``one``; released ``classes``: (classes + 1) ** -0.5."""
    prcm_keys: Literal["transposed", "reread"] = "reread"
    """Layout of phi(Z). Paper ``transposed``; released ``reread``: the memory is read as if it had been transposed."""
    mask_absent: bool = False
    """Zero the maps of classes that are not tags of the image before PCM and PRCM. Paper true; released false."""


class Loss(Section):
    """Weights and variants of the loss terms. A weight of 0 takes a term out of the total; it is still logged."""

    tcp: Weight = 1.0
    """Weight of the triplet consistency term on raw CAMs (eq. 14)."""
    tcp_refined: Weight = 1.0
    """Weight of the triplet consistency term on refined CAMs."""
    cpcr: Weight = 1.0
    """Weight of cross regularisation (eq. 15)."""
    background_suppression: Weight = 1.0
    """Weight of the mean of the refined map's lowest 25 % of pixels. Paper 0; released 1."""
    detach_refined_pair: bool = False
    """Stop the pair's gradient in eq. 14 on refined maps. Paper true; released false."""
    cpcr_target: Literal["difference", "one-hot"] = "one-hot"
    """Target of eq. 15. Paper ``difference``: Y_o - lambda Y_h. Released ``one-hot``: only each pixel's largest channel
    of it."""
    normalise: Literal["max", "min-max"] = "min-max"
    """Normalisation of the CAMs in the terms. Paper ``max``: divided by their maximum. Released ``min-max``: from their
    minimum to their maximum."""
    background: Literal["before-lambda", "after-lambda"] = "after-lambda"
    """When 1 - max(foreground) (eq. 16) is taken: before (paper) or after (released) a branch is scaled by its
    lambda."""
    refined_background: Literal["own", "recomputed"] = "recomputed"
    """Background of refined maps. Paper ``own``: their background channel. Released ``recomputed``: eq. 16 again."""
    hard_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the errors of eq. 15 (SEAM: ECR) that count, the largest ones (OHEM). 1 is the plain mean. Paper and
    released 0.2. With C < 20 classes, 4.2 / (1 + C), at most 1, counts as many errors as 0.2 with twenty. ``init``
    writes it."""
    hard_over: Literal["image", "batch"] = "image"
    """Errors compete within a mini-``batch`` (paper) or an ``image`` (released). With negatives, ``batch`` needs
    ``background: before-lambda``. After lambda, all errors of a negative are 1 and would win."""


class Seam(Section):
    """Equivariant regularisation between two scales, for method ``seam``. The method also reads three keys of ``loss``:
    ``background_suppression``, ``normalise`` and ``hard_share``."""

    scale: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Sides of the second view as a share of the first view's. Paper and released 0.3."""
    er: Weight = 1.0
    """Weight of the difference between the raw CAMs of the scales (ER)."""
    ecr: Weight = 1.0
    """Weight of the difference between one scale's refined and the other's raw CAM (ECR)."""


class Train(Section):
    """Optimiser, schedule and loop."""

    batch: Images = 4
    """Images per forward pass (three views each for CPN). ``auto``: as many as a GPU's memory holds, up to 256 a GPU.
    The run tries this at its start and keeps it in its config.yaml. ``lr``, epochs and steps stay as given."""
    accumulate: Group = 1
    """Batches per optimiser step. Their gradients are averaged."""
    epochs: Count | None = None
    """Passes over the list. Give this or ``steps``. Paper and released 8."""
    steps: Count | None = None
    """Optimiser steps. Give this or ``epochs``. With more steps, or more images in the list, a finished run continues
    from its last checkpoint. ``lr`` follows the new schedule from there, and the command prints the rate. Steps cannot
    be taken back."""
    lr: Rate = 0.01
    """Initial learning rate of backbone weights. Biases take 2 times it, new layers 10 times, their biases 20 times."""
    power: Annotated[float, Field(ge=0, le=100)] = 0.9
    """Poly schedule: lr * (1 - step / steps) ** power."""
    momentum: Share = 0.0005
    """Momentum of SGD. Paper 0.9; released 0.0005, because its weight decay was passed as the momentum."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 5e-4
    """L2 on weights, not on biases."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Autocast of the forward pass. Null: bf16 where the hardware computes it (CUDA from sm_80, CPUs with AVX512-BF16,
    AMX or ARM's bf16), otherwise fp32. ``fp16`` scales the loss: a step whose gradient overflows is skipped and the
    scale is halved. An overflow counts as not finite only at a scale of 1."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a step whose gradient is not finite: ``stop`` the run, or ``skip`` the step (its gradient counts as
    zero). ``nonfinite.json`` in the run's folder names the step's images."""
    compile: bool | None = None
    """torch.compile of the network and the losses. Same results to rounding. Null: on CUDA."""
    cuda_graph: bool | None = None
    """Capture the whole step in a CUDA graph after the first three steps. Same results. Null: on CUDA from sm_80 on, in
    one process."""
    checkpoint_activations: bool = False
    """Keep only the inputs of the backbone's blocks, and compute the other activations again in the backward pass. Same
    results; for ResNet38d half of the memory and 19 % more computing (``cpn_fast/models/backbone.py``)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Random seed of shuffling, augmentation, hiding, dropout and new layers."""
    deterministic: bool = False
    """Give the same bytes from the same seed on the same GPU. Slower. A CPU does so without it. A warning names each
    operation of torch that has no deterministic algorithm (the cross-entropy of ``segment``)."""
    data_threads: Workers = 2
    """DALI's CPU threads."""
    log_every: Count = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Count = 500
    """Steps between checkpoints. The last step always writes one."""
    validate_every: Count | None = None
    """Steps between scores of ``data.eval_list``, or of 200 of its images, evenly spread; the last step has a score
    too. The score is the mIoU of the seeds if all images have ground truth, otherwise the mean average precision of
    their tags, at one scale without flip. best.safetensors keeps the weights with the highest score. Null: no scores.
    Only in section ``train``."""
    use_weights: Literal["last", "best"] = "last"
    """Weights for later stages, ``predict`` and the report: after the ``last`` step (model.safetensors) or the ``best``
    (best.safetensors, which ``validate_every`` writes)."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep. A restart needs them; more allow curves of mIoU against steps
    (``cam --checkpoint``)."""

    @model_validator(mode="before")
    @classmethod
    def _length_given_replaces_the_default(cls, tree: Any) -> Any:
        for given, other in (("epochs", "steps"), ("steps", "epochs")):
            if isinstance(tree, dict) and tree.get(given) is not None and other not in tree:
                return {**tree, other: None}
        return tree

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.steps is None else f"steps {self.steps} and epochs {self.epochs}"
            raise ValueError(f"give exactly one of epochs and steps, and set the other to null; found {found}")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.use_weights == "best" and self.validate_every is None:
            raise ValueError("use_weights is best, which needs scores: set validate_every to the steps between them")
        return self


class Cam(Section):
    """Multi-scale inference of CAM seeds."""

    map: Literal["refined", "raw"] = "refined"
    """Map that becomes the seed. A model with neither pcm nor prcm has only ``raw``. The best background threshold
    depends on the data and the network (docs/results.md)."""
    scales: Annotated[tuple[Factor, ...], Field(min_length=1, max_length=64)] = (0.5, 1.0, 1.5, 2.0)
    """Image scales whose CAMs are summed."""
    flip: bool = True
    """Add the mirrored image at each scale."""
    batch: Group = 4
    """Images of one size in a batch (each twice when flipped)."""
    pixels: Annotated[int, Field(ge=4096, le=2**31)] = 2**23
    """Most pixels in a forward pass, which bounds memory: 1080p at scale 2 has 8.3 million and just fits. A batch that
    would have more gets fewer images. If one image alone has more at a scale, the scale is lowered for it."""
    mask_threshold: Share = 0.3
    """Background threshold of the palette PNGs and overlays that are written with the seeds. A pixel whose best score
    is below it is background."""


class Evaluate(Section):
    """Scoring against ground-truth masks."""

    thresholds: Annotated[int, Field(ge=2, le=1000)] = 100
    """Number n of background thresholds tried: 0, 1/n, ... (n - 1)/n."""
    threshold: Share | None = None
    """A background threshold fixed beforehand. Null: the best one on this ground truth (the oracle)."""


CrfName = Literal["seam-labels", "seam-walk", "cpn", "segmentation", "irn-labels"]


class Crf(Section):
    """Dense CRFs of the seeds. ``refine`` makes AffinityNet's training labels with them.

    A background score of (1 - max cam) ** alpha cuts the CAM at the threshold t = (1 - t) ** alpha, so alpha is
    ln t / ln(1 - t): 24 for a t of 0.09, 6 for 0.22, 4 for 0.28, 1 for 0.5, 0.3 for 0.70. The released alphas were made
    for SEAM's and psa's seeds. For your seeds compute alpha from the best threshold of ``evaluate``. Set ``walk.alpha``
    to it, ``low_alpha`` to about half of it and ``high_alpha`` to about three times it, as ``configs/voc_mini.yaml``
    does.
    """

    parameters: CrfName = "seam-labels"
    """A released set of parameters. ``PARAMETERS`` of ``cpn_fast/refinement/crf.py`` lists them."""
    low_alpha: Exponent = 4.0
    """A pixel where a class beats the background score of this alpha is certainly of this class. The smaller alpha
    gives the larger background score. SEAM and psa 4."""
    high_alpha: Exponent = 24.0
    """A pixel where the background score of this alpha beats all classes is certainly background. SEAM 24; psa 32, in
    its README 16."""
    workers: Workers | None = None
    """Processes. Null: one for each core. Fewer run at a time if more would not fit into half of the free memory: a CRF
    of 24 megapixels and 3 labels counts 9 GB, one of VOC's 500 x 375 pixels 0.07 GB."""

    @model_validator(mode="after")
    def _alphas_are_in_order(self) -> Self:
        if self.low_alpha > self.high_alpha:
            raise ValueError(
                f"low_alpha is {self.low_alpha:g}, more than high_alpha, {self.high_alpha:g}: swap them. low_alpha "
                "gives background the larger score, (1 - max cam) ** alpha, and a class that still wins is certain"
            )
        return self


class AffinityAugment(Augment):
    """Keys of ``augment``."""

    scale: tuple[Factor, Factor] | None = (1.0, 1.0)
    """As in ``augment``. Released: images keep their size."""


class AffinityTrain(Train):
    """Keys of ``train``."""

    batch: Images = 8
    """Images per forward pass. SEAM and psa 8."""
    epochs: Count | None = 8
    """Passes over the list. ``steps`` replaces them. SEAM and psa 8."""


class Affinity(Section):
    """AffinityNet. ``refine`` trains it from the backbone and the weights of ``model``, at stride 8."""

    radius: Annotated[int, Field(ge=2, le=32)] = 5
    """Pairs of cells are closer than this, in cells of 8 pixels. psa and SEAM 5."""
    augment: AffinityAugment = AffinityAugment()
    """Released: crop 448, flip and colour."""
    train: AffinityTrain = AffinityTrain()
    """Released: 8 epochs, momentum 0.0005; lr 0.01 (SEAM), 0.1 (psa). If you set any of these keys, give epochs or
    steps."""


class Walk(Section):
    """Random walk of the seeds along AffinityNet's affinities, in ``refine``."""

    alpha: Exponent = 6.0
    """Background scores are (1 - max cam) ** alpha, as in ``crf``. SEAM 6; psa 16."""
    beta: Exponent = 8.0
    """Exponent of an affinity. SEAM and psa 8."""
    logt: Annotated[int, Field(ge=0, le=12)] = 6
    """The walk has 2 ** logt steps. SEAM 6; psa 8."""
    crf: CrfName | None = None
    """CRF of the scores after the walk (released: ``seam-walk``, switched off). Null: none."""


class SegmentAugment(Augment):
    """Keys of ``augment``, with the released trainer's values where it has them."""

    scale: tuple[Factor, Factor] | None = (0.5, 1.5)
    """Released 0.5 to 1.5. Null uses ``long_side``."""
    brightness: Share = 0.04
    """About the size of the released shift of V by up to 10 of 255."""
    contrast: Share = 0.0
    """Released: none."""
    saturation: Share = 0.04
    """About the size of the released shift of S by up to 10 of 255."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.056
    """Released 10 of 180."""


class SegmentTrain(Train):
    """Keys of ``train``, with the released trainer's values."""

    batch: Images = 10
    """Released 10, on two GPUs."""
    steps: Count | None = 20_000
    """Released 20,000. ``epochs`` replace them."""
    lr: Rate = 0.001
    """Released 0.001. New layers take 10 times it, as in ``train``."""
    momentum: Share = 0.9
    """Released 0.9."""


class Segment(Section):
    """The DeepLab segmenter. It starts from the backbone and the weights of ``model``."""

    augment: SegmentAugment = SegmentAugment()
    """Geometry and colour of its training images."""
    train: SegmentTrain = SegmentTrain()
    """Its optimiser and schedule."""
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = 0.0003
    """Share by which a step moves the statistics of the head's batch normalisation. Released 0.0003. A run of less than
    ten thousand steps needs a larger share, or the statistics stay near their start."""
    eval_list: Path = Path("ImageSets/Segmentation/val.txt")
    """Images for which ``segment`` makes masks. ``--list`` names another list."""
    scales: Annotated[tuple[Factor, ...], Field(min_length=1, max_length=64)] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    """Image scales whose logits are averaged."""
    flip: bool = True
    """Add the mirrored image at each scale."""
    crf: CrfName | None = "segmentation"
    """CRF of the averaged probabilities. Null: none."""


_PARTS = ("deeplab",)
"""Folders of a run that are beside the folders of lists."""


def is_class_name(name: str) -> bool:
    """Return whether a class may have this name."""
    return name == name.strip() and name.casefold() not in ("", "background") and name.isprintable()


class Config(Section):
    """A whole experiment."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """Name of the run's folder."""
    out: Path = Path("runs")
    """Parent of run folders, relative to the working directory."""
    classes: Annotated[tuple[str, ...], Field(min_length=1)] = VOC_CLASSES
    """Foreground class names in the order of labels and mask values (value 0 is background)."""
    method: Literal["cpn", "cam", "seam"] = "cpn"
    """``cpn``: the triplet of image, patches and complement. ``cam``: the plain classifier. ``seam``: SEAM, or SEAM*
    with ``model.prcm``."""
    hook: Annotated[str, AfterValidator(_names_a_function)] | None = None
    """A function that gets every line of metrics.jsonl, for W&B, MLflow or others: ``package.module:function``, or
    ``FILE.py:function``. docs/logging.md has examples."""
    data: Data
    superpixels: Superpixels = Superpixels()
    augment: Augment = Augment()
    patches: Patches = Patches()
    model: Model = Model()
    loss: Loss = Loss()
    seam: Seam = Seam()
    train: Train
    cam: Cam = Cam()
    evaluate: Evaluate = Evaluate()
    crf: Crf = Crf()
    affinity: Affinity = Affinity()
    walk: Walk = Walk()
    segment: Segment = Segment()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ValueError(f"classes has {', '.join(twice)} more than once")
        for name in self.classes:
            if not is_class_name(name):
                raise ValueError(
                    f"classes has {name!r}: expected printable names without spaces around them. background is always "
                    "there, as value 0; an image without a tag shows only background"
                )
        if set(self.name) == {"."} or self.run == self.superpixel_cache:
            raise ValueError(f"name {self.name}: its folder would not be the run's alone; give another name")
        if len(self.classes) > 254:
            raise ValueError(
                f"classes has {len(self.classes)} names; 8-bit masks hold 254 beside background and ignore"
            )
        if self.model.stride == 16 and self.model.backbone in ("resnet38d", "narrow"):
            raise ValueError(f"model.stride 16 is for mobilenet_v2 and {TIMM}NAME; {self.model.backbone} has stride 8")
        if self.model.weights == TIMM_WEIGHTS and not self.model.backbone.startswith(TIMM):
            raise ValueError(f"model.weights timm is for model.backbone {TIMM}NAME, found {self.model.backbone}")
        for name, part in (("affinity", self.affinity), ("segment", self.segment)):
            if part.train.validate_every is not None:
                key = f"{name}.train.validate_every"
                raise ValueError(f"{key}: scores while training are for section train only; set it to null")
        refines = self.model.pcm or self.model.prcm
        if self.cam.map == "refined" and not refines:
            raise ValueError("cam.map is refined but model.pcm and model.prcm are off: set cam.map to raw")
        if self.method == "cam" and refines:
            raise ValueError("method cam trains no refinement: set model.pcm and model.prcm to false")
        if self.method == "cpn" and not refines and (self.loss.tcp_refined or self.loss.cpcr):
            raise ValueError("loss.tcp_refined and loss.cpcr need a refined map: switch on model.pcm or model.prcm")
        if self.method == "seam" and not refines:
            raise ValueError("method seam compares refined maps: switch on model.pcm or model.prcm")
        return self

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.out / self.name

    def list_name(self, path: Path) -> str:
        """Return the name of a list's results in the run's folder: the list's stem, or the stem and a digest.

        Of several lists with one stem, only one has the name without a digest. It is the first that exists of: a list
        that the config names, a list beside ``data.train_list``, a list in ``data.root``. A list that is called like a
        part of the run has a digest too. The digest is of the list's path.
        """

        def relative(file: Path) -> str:  # stays the same when the data is moved
            return os.path.relpath(self.data.root / file, self.data.root)

        named = [relative(file) for file in (self.data.train_list, self.data.eval_list, self.segment.eval_list)]
        candidates = [file for file in named if Path(file).stem.casefold() == path.stem.casefold()]
        for folder in (Path(named[0]).parent, Path()):
            candidates += [str(folder / f"{path.stem}{ending}") for ending in (Path(named[0]).suffix, ".txt")]
        existing = [file for file in candidates if (self.data.root / file).exists()]  # segment.eval_list has a default
        has_stem_alone = relative(path) in (existing[:1] or candidates)
        stem = path.stem
        is_a_part = stem.casefold() in _PARTS
        if has_stem_alone and not is_a_part and not stem.startswith(".") and len(os.fsencode(stem)) < 200:
            return stem
        digest = hashlib.sha256(os.fsencode(relative(path))).hexdigest()[:8]
        return f"{stem.lstrip('.')[:50] or 'list'}-{digest}"

    @property
    def superpixel_cache(self) -> Path:
        """Parent folder of superpixel caches."""
        return self.out / self.superpixels.cache
