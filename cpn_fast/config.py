"""One YAML per experiment, validated strictly: every key is documented where it is defined, here.

Where the paper and the released code differ, the key's docstring gives both values. Defaults are the released
ones (``configs/voc.yaml``), but for 200 superpixels, cached once per image, and the paper's best sizes of grids;
``configs/voc_paper.yaml`` sets the paper's.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Every number has both bounds, the outer ones where memory, time or float32 end: what cannot be carried out is refused
# with its key before anything starts.
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""Of a term of the loss."""
Rate = Annotated[float, Field(gt=0, le=1e30)]
"""Of learning; at 1e30 fp32 still holds twenty times it."""
Exponent = Annotated[float, Field(gt=0, le=10_000)]
Factor = Annotated[float, Field(ge=0.01, le=16)]
"""Of an image's sides."""
Side = Annotated[int, Field(ge=1, le=16_384)]
"""In pixels."""
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Group = Annotated[int, Field(ge=1, le=65_536)]
"""Images or batches that are taken together."""
Workers = Annotated[int, Field(ge=1, le=1024)]
"""Threads or processes."""
Level = Annotated[float, Field(ge=0, le=255)]
Rgb = tuple[Level, Level, Level]
Spread = Annotated[float, Field(ge=0.01, le=1000)]


def _number_or_auto(value: Any) -> Any:
    if value != "auto" and (type(value) is not int or not 1 <= value <= 65_536):
        raise ValueError(f"expected a whole number from 1 to 65536, or auto, found {reprlib.repr(value)}")
    return value


BACKBONES = ("resnet38d", "mobilenet_v2", "narrow")
TIMM = "timm:"
"""Before the name of a model of timm, as in ``timm:resnet50``."""
PACKAGE = "package:"
"""Before the name of an installed Python package that holds a file of weights."""


def _names_a_function(name: str) -> str:
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise ValueError(f"expected package.module:function or FILE.py:function, found {name!r}")
    return name


def _known_backbone(name: str) -> str:
    if name not in BACKBONES and not (name.startswith(TIMM) and name != TIMM):
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"expected {', '.join(BACKBONES)} or {TIMM}NAME, found {name!r}{hint}")
    return name


Images = Annotated[Group | Literal["auto"], BeforeValidator(_number_or_auto)]


class Section(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _home(cls, value: Any) -> Any:
        """``~`` is the home folder, as in a shell, which leaves it alone in KEY=~/VALUE."""
        return value.expanduser() if isinstance(value, Path) else value


class Data(Section):
    """Where the images, lists, labels and masks are. Relative paths start at ``root``."""

    root: Path
    """Folder in VOC's layout (the one that holds JPEGImages)."""
    images: Path = Path("JPEGImages")
    """Folder of the images; an id ``x`` is ``x.jpg``."""
    masks: Path = Path("SegmentationClass")
    """Folder of the ground-truth palette PNGs: scores need them, and ``train`` only looks whether they are sound."""
    labels: Path = Path("Annotations")
    """Image-level labels: a folder of VOC XML files, psa's ``cls_labels.npy``, or CSV/JSON of id -> class names. An
    image without a class is a negative."""
    train_list: Path = Path("Annotations")
    """Images to train on: a list of ids, of paths, or of psa's ``/JPEGImages/x.jpg /SegmentationClassAug/x.png``; or a
    source of labels, which stands for its images. Left out, it is ``labels``: all tagged images."""
    eval_list: Path = Path("Annotations")
    """Images that get seeds and scores; ``--list`` names others. Left out: ``train_list``."""
    shards: Path | None = None
    """Folder that ``cpn-fast shards`` packed the training list into: ``train`` reads images, tags and superpixels there
    and no other file of the data set. Null reads loose files."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_the_labels(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        labels = tree.get("labels", cls.model_fields["labels"].default)
        return {"train_list": labels, "eval_list": tree.get("train_list", labels), **tree}


class Superpixels(Section):
    """SLIC superpixels; docs/superpixels.md says what they are and compares the engines."""

    count: Annotated[int, Field(ge=1, le=32_000)] = 200
    """Superpixels asked for per image. Paper 200; released 300, of which skimage 0.17 made about 140 to 190."""
    compactness: Annotated[float, Field(gt=0, le=10_000)] = 10.0
    """Weight of distance against colour. fast-slic's integers overflow from about 16,000 on."""
    iterations: Annotated[int, Field(ge=1, le=1000)] = 10
    """Rounds of k-means."""
    mode: Literal["cached", "online"] = "cached"
    """``cached``: once per image, moved with the image. ``online`` (paper and released): on every augmented crop."""
    engine: Literal["auto", "fast-slic", "kernel"] = "auto"
    """``kernel``: ours, for a GPU; slow on a CPU. ``fast-slic``: another package, on the CPU. ``auto``: the kernel on a
    GPU and where fast-slic is not installed, else fast-slic. The two make different superpixels."""
    cache: Path = Path("superpixels")
    """Cache folder; relative paths start at ``out``, so that runs share it."""


class Augment(Section):
    """Training augmentation, in this order: resize, flip, colour, normalise, crop."""

    long_side: tuple[Side, Side] = (448, 768)
    """The long side is resized to a whole number drawn from this closed range."""
    scale: tuple[Factor, Factor] | None = None
    """Both sides are multiplied by a factor drawn from this range instead (``segment``: 0.5 to 1.5)."""
    crop: Side = 448
    """Side of the square crop; smaller images are padded with 0 (the mean colour) at a random offset."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    brightness: Share = 0.3
    """Factor from U[1 - x, 1 + x]."""
    contrast: Share = 0.3
    """Factor from U[1 - x, 1 + x]."""
    saturation: Share = 0.3
    """Factor from U[1 - x, 1 + x]."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Turn of the colour wheel from U[-x, x], as a share of the full circle."""

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
    """RGB (0 to 255) of hidden pixels; null is the normalisation's mean (released). Paper: the training set's mean."""
    grid_sizes: tuple[Side, ...] = (56, 112)
    """Sides of grid cells in pixels, one drawn per image. Paper's best 56, 112; released 224, 448."""

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
    """Output stride of the backbone: 8 (paper and released), or 16 with mobilenet_v2 and timm's, four times cheaper."""
    weights: Path | None = None
    """Pretrained weights: a file (.safetensors, .pth or MXNet .params), ``package:NAME`` for the one file of weights in
    an installed Python package, or ``timm`` for what timm downloads for ``timm:NAME``. Null: random weights."""
    mean: Rgb | None = None
    """RGB (0 to 255) subtracted from the input; null is what the backbone's usual weights were trained with."""
    std: tuple[Spread, Spread, Spread] | None = None
    """RGB (0 to 255) that divides the input; null as for ``mean``."""
    pcm: bool = True
    """Pixel correlation module (eqs. 8 to 10)."""
    prcm: bool = True
    """Pixel-region correlation module (eq. 11)."""
    pcm_norm: Literal["l2", "l1-squared"] = "l2"
    """Norm that divides an embedding in eq. 10. Paper (as printed) ``l1-squared``; released ``l2``."""
    pcm_sum: Literal["column", "all"] = "column"
    """What an affinity is divided by in eq. 9. Paper (as printed) ``all`` pairs; released each target's ``column``."""
    prcm_relu: bool = True
    """ReLU on keys and queries of eq. 11. Paper (linear) false; released true."""
    prcm_scale: Literal["classes", "one"] = "classes"
    """Factor before eq. 11's softmax. Paper ``one``; released ``classes``: (classes + 1) ** -0.5."""
    prcm_keys: Literal["transposed", "reread"] = "reread"
    """Layout of phi(Z). Paper ``transposed``; released ``reread``: its memory read as if it had been transposed."""
    mask_absent: bool = False
    """Zero the classes that an image is not tagged with before PCM and PRCM. Paper true; released false."""


class Loss(Section):
    """Weights and variants of the loss terms. A weight of 0 switches a term off."""

    tcp: Weight = 1.0
    """Weight of the triplet consistency term on raw CAMs (eq. 14)."""
    tcp_refined: Weight = 1.0
    """Weight of the same on refined CAMs."""
    cpcr: Weight = 1.0
    """Weight of cross regularisation (eq. 15)."""
    background_suppression: Weight = 1.0
    """Weight of the mean of the refined map's lowest 25 % pixels. Paper 0; released 1."""
    detach_refined_pair: bool = False
    """Stop the gradient of the pair in the refined eq. 14. Paper true; released false."""
    cpcr_target: Literal["difference", "one-hot"] = "one-hot"
    """Paper ``difference`` Y_o - lambda Y_h; released keeps only each pixel's largest channel, ``one-hot``."""
    normalise: Literal["max", "min-max"] = "min-max"
    """CAMs enter the terms divided by their ``max`` (paper), or stretched from their minimum too (released)."""
    background: Literal["before-lambda", "after-lambda"] = "after-lambda"
    """1 - max(foreground) (eq. 16) taken before (paper) or after (released) a branch is scaled by its lambda."""
    refined_background: Literal["own", "recomputed"] = "recomputed"
    """Background of refined maps: their ``own`` channel (paper) or eq. 16 again (released)."""
    hard_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the largest eq. 15 (SEAM: ECR) errors that count (OHEM); 1 is the plain mean. Both 0.2."""
    hard_over: Literal["image", "batch"] = "image"
    """Errors compete within a mini-``batch`` (paper) or an ``image`` (released). With negatives, ``batch`` needs
    ``background: before-lambda``: after lambda, their errors are all 1 and would win."""


class Seam(Section):
    """Equivariant regularisation between two scales; read by method ``seam``, as are three keys of ``loss``:
    ``background_suppression``, ``normalise`` and ``hard_share``."""

    scale: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Sides of the second view as a share of the first's. Both 0.3."""
    er: Weight = 1.0
    """Weight of the difference between the raw CAMs of the scales (ER)."""
    ecr: Weight = 1.0
    """Weight of the difference between one scale's refined and the other's raw CAM (ECR)."""


class Train(Section):
    """Optimiser, schedule and loop."""

    batch: Images = 4
    """Images per forward pass (three views each for CPN). ``auto``: as many as a GPU's memory takes, up to 256 a GPU,
    tried out when the run starts and kept in its config.yaml. ``lr``, epochs and steps stay as given."""
    accumulate: Group = 1
    """Batches per optimiser step; their gradients are averaged."""
    epochs: Count | None = None
    """Passes over the list; give this or ``steps``. Paper and released 8."""
    steps: Count | None = None
    """Optimiser steps; give this or ``epochs``. Raised on a run that has ended, or with more images in the list, the
    run goes on from its last checkpoint; ``lr`` follows the new schedule from there, and the command says at which
    rate. Steps that were made cannot be taken back."""
    lr: Rate = 0.01
    """Initial rate of backbone weights; biases x2, new layers x10, their biases x20."""
    power: Annotated[float, Field(ge=0, le=100)] = 0.9
    """Poly schedule: lr * (1 - step / steps) ** power."""
    momentum: Share = 0.0005
    """Paper 0.9; released 0.0005 (its weight decay landed in the momentum slot)."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 5e-4
    """L2 on weights, not on biases."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Autocast of the forward pass; null is bf16 where the device computes it itself (CUDA from sm_80, CPUs with
    AVX512-BF16, AMX or ARM's bf16), else fp32. ``fp16`` scales the loss: a step at which it overflows is skipped and
    the scale halved, which is no fault until the scale is down to 1."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a step whose gradient is not finite: ``stop`` the run, or ``skip`` the step (its gradient counts as
    zero). Its images are written to ``nonfinite.json`` in the run's folder."""
    compile: bool | None = None
    """torch.compile of the network and the losses (SEAM: the network): the same results to rounding. Null: on CUDA."""
    cuda_graph: bool | None = None
    """The whole step captured in a CUDA graph after the first three: the same results. Null: on CUDA in one process,
    but for SEAM, whose losses look at how many classes the images have."""
    checkpoint_activations: bool = False
    """Keep only the inputs of the backbone's blocks and compute the rest again in the backward pass: the same results,
    for ResNet38d with half of the memory and 19 % more computing (``cpn_fast/models/backbone.py``)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Shuffling, augmentation, hiding, dropout and new layers all follow from it."""
    deterministic: bool = False
    """The same bytes from the same seed on the same GPU too, as on a CPU without it; slower. An operation of torch that
    has no such algorithm (the cross-entropy of ``segment``) is named in a warning."""
    data_threads: Workers = 2
    """DALI's CPU threads."""
    log_every: Count = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; the last step always writes one."""
    validate_every: Count | None = None
    """Steps between scores of ``data.eval_list``, or of 200 of its images, evenly spread; one comes after the last
    step. It is the mIoU of their seeds where all of them have ground truth, else the mean average precision of their
    tags, at one scale without flip. best.safetensors keeps the weights with the highest. Null: none. In section
    ``train`` alone."""
    use_weights: Literal["last", "best"] = "last"
    """What later stages, ``predict`` and the report take: the weights after the ``last`` step (model.safetensors) or
    the ``best`` (best.safetensors, which ``validate_every`` writes)."""
    keep_checkpoints: Count = 2
    """The newest that are kept, for a restart and, when there are more, for curves of mIoU against steps
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
            raise ValueError("give exactly one of train.epochs and train.steps")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.use_weights == "best" and self.validate_every is None:
            raise ValueError("use_weights is best, which validate_every finds: give it the steps between scores")
        return self


class Cam(Section):
    """Multi-scale inference of CAM seeds."""

    map: Literal["refined", "raw"] = "refined"
    """Which map becomes the seed; a model with neither pcm nor prcm has only ``raw``."""
    scales: Annotated[tuple[Factor, ...], Field(min_length=1, max_length=64)] = (0.5, 1.0, 1.5, 2.0)
    """Image scales whose CAMs are summed."""
    flip: bool = True
    """Adds the mirrored image at each scale."""
    batch: Group = 4
    """Images of one size that share a batch (each twice when flipped)."""
    pixels: Annotated[int, Field(ge=4096, le=2**31)] = 2**23
    """Most pixels in a forward pass, which bounds memory: 1080p at scale 2 has 8.3 million and just fits. Fewer images
    share a batch where they would hold more, and a scale at which one image alone does is lowered for it."""
    mask_threshold: Share = 0.3
    """Background score of the palette PNGs and overlays written beside the seeds."""


class Evaluate(Section):
    """Scoring against ground-truth masks."""

    thresholds: Annotated[int, Field(ge=2, le=1000)] = 100
    """Background scores tried: 0, 1/n, ... (n - 1)/n."""
    threshold: Share | None = None
    """A background score fixed beforehand; null reports only the best one on this ground truth (the oracle)."""


CrfName = Literal["seam-labels", "seam-walk", "cpn", "segmentation", "irn-labels"]


class Crf(Section):
    """Dense CRFs of the seeds, which ``refine`` labels AffinityNet's training images by.

    A background score of (1 - max cam) ** alpha draws the line where the CAM is t, with (1 - t) ** alpha = t: alpha 24
    at 0.09, 6 at 0.22, 4 at 0.28, 1 at 0.5, 0.3 at 0.70. The released alphas were made for SEAM's and psa's seeds:
    choose others where the best threshold of ``evaluate`` is far from theirs.
    """

    parameters: CrfName = "seam-labels"
    """A released set of parameters; ``PARAMETERS`` of ``cpn_fast/refinement/crf.py`` lists them."""
    low_alpha: Exponent = 4.0
    """A class that wins against the large background score of this alpha is certain. SEAM and psa 4."""
    high_alpha: Exponent = 24.0
    """Background that wins with the small score of this alpha is certain. SEAM 24; psa 32, in its README 16."""
    workers: Workers | None = None
    """Processes; null is one for each core. Fewer work at a time where half of the free memory has no room for more: a
    CRF of 24 megapixels and 3 labels counts 9 GB, one of VOC's 500 x 375 pixels 0.07 GB."""

    @model_validator(mode="after")
    def _alphas_are_in_order(self) -> Self:
        if self.low_alpha > self.high_alpha:
            raise ValueError(
                f"low_alpha is {self.low_alpha:g}, more than high_alpha, {self.high_alpha:g}: swap them. The low one "
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
    """Passes over the list; ``steps`` replaces them. SEAM and psa 8."""


class Affinity(Section):
    """AffinityNet, trained by ``refine`` on the backbone and the weights of ``model``, at stride 8."""

    radius: Annotated[int, Field(ge=2, le=32)] = 5
    """Pairs are nearer than this, in cells of 8 pixels. psa and SEAM 5."""
    augment: AffinityAugment = AffinityAugment()
    """Released: crop 448, flip and colour."""
    train: AffinityTrain = AffinityTrain()
    """Released: 8 epochs, momentum 0.0005; lr 0.01 (SEAM), 0.1 (psa). With any of these keys, give epochs or steps."""


class Walk(Section):
    """Random walk of the seeds along AffinityNet's affinities, by ``refine``."""

    alpha: Exponent = 6.0
    """Background scores are (1 - max cam) ** alpha, as in ``crf``. SEAM 6; psa 16."""
    beta: Exponent = 8.0
    """Power of an affinity. SEAM and psa 8."""
    logt: Annotated[int, Field(ge=0, le=12)] = 6
    """The walk has 2 ** logt steps. SEAM 6; psa 8."""
    crf: CrfName | None = None
    """CRF of the walked scores (released: ``seam-walk``, switched off); null is none."""


class SegmentAugment(Augment):
    """As ``augment``, with the released trainer's values where it has such a thing."""

    scale: tuple[Factor, Factor] | None = (0.5, 1.5)
    """Released 0.5 to 1.5; null takes ``long_side``."""
    brightness: Share = 0.04
    """Released: a shift of V by up to 10 of 255, whose size this has."""
    contrast: Share = 0.0
    """Released: none."""
    saturation: Share = 0.04
    """Released: a shift of S by up to 10 of 255, whose size this has."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.056
    """Released 10 of 180."""


class SegmentTrain(Train):
    """As ``train``, with the released trainer's values."""

    batch: Images = 10
    """Released 10, on two GPUs."""
    steps: Count | None = 20_000
    """Released 20,000; ``epochs`` replace them."""
    lr: Rate = 0.001
    """Released 0.001, new layers x10 as in ``train``."""
    momentum: Share = 0.9
    """Released 0.9."""


class Segment(Section):
    """The DeepLab segmenter, on the backbone and the weights of ``model``."""

    augment: SegmentAugment = SegmentAugment()
    """Geometry and colour of its training images."""
    train: SegmentTrain = SegmentTrain()
    """Its optimiser and schedule."""
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = 0.0003
    """Share by which a step moves the statistics of the head's batch normalisation. Released 0.0003; a run of less than
    ten thousand steps needs more, or they stay near where they started."""
    eval_list: Path = Path("ImageSets/Segmentation/val.txt")
    """Images that ``segment`` makes masks for; ``--list`` names another one."""
    scales: Annotated[tuple[Factor, ...], Field(min_length=1, max_length=64)] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    """Image scales whose logits are averaged."""
    flip: bool = True
    """Adds the mirrored image at each scale."""
    crf: CrfName | None = "segmentation"
    """CRF of the averaged probabilities; null is none."""


_PARTS = ("deeplab",)
"""Folders beside those of lists."""


class Config(Section):
    """A whole experiment."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """Names the run's folder."""
    out: Path = Path("runs")
    """Parent of run folders; relative to the working directory."""
    classes: Annotated[tuple[str, ...], Field(min_length=1)] = VOC_CLASSES
    """Foreground class names in the order of labels and mask values (value 0 is background)."""
    method: Literal["cpn", "cam", "seam"] = "cpn"
    """``cpn``: the triplet of image, patches and complement. ``cam``: the plain classifier. ``seam``: SEAM, and SEAM*
    where ``model.prcm`` is on."""
    hook: Annotated[str, AfterValidator(_names_a_function)] | None = None
    """A function that gets every line of metrics.jsonl, for W&B, MLflow or others: ``package.module:function``, or
    ``FILE.py:function``. docs/logging.md has both in a few lines."""
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
        if len(self.classes) > 254:
            raise ValueError(
                f"classes has {len(self.classes)} names; 8-bit masks hold 254 beside background and ignore"
            )
        if self.model.stride == 16 and self.model.backbone in ("resnet38d", "narrow"):
            raise ValueError(f"model.stride 16 is for mobilenet_v2 and {TIMM}NAME; {self.model.backbone} has stride 8")
        if self.model.weights == Path("timm") and not self.model.backbone.startswith(TIMM):
            raise ValueError(f"model.weights timm is for model.backbone {TIMM}NAME, found {self.model.backbone}")
        for name, part in (("affinity", self.affinity), ("segment", self.segment)):
            if part.train.validate_every is not None:
                raise ValueError(f"{name}.train.validate_every: scores while training are for section train alone")
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
        """What the results of a list are called in the run's folder: its stem, as long as that is its alone.

        That is the first that is there: one that the config names, one beside ``data.train_list``, one in
        ``data.root``. All others, and lists called like a part of the run, have a digest of their path behind it.
        """

        def place(of: Path) -> str:  # data that was moved keeps it
            return os.path.relpath(self.data.root / of, self.data.root)

        own = [place(of) for of in (self.data.train_list, self.data.eval_list, self.segment.eval_list)]
        first = [of for of in own if Path(of).stem.casefold() == path.stem.casefold()]
        for folder in (Path(own[0]).parent, Path()):
            first += [str(folder / f"{path.stem}{ending}") for ending in (Path(own[0]).suffix, ".txt")]
        there = [of for of in first if (self.data.root / of).exists()]  # segment.eval_list has a default
        alone = place(path) in (there[:1] or first)
        stem = path.stem
        if alone and stem.casefold() not in _PARTS and not stem.startswith(".") and len(os.fsencode(stem)) < 200:
            return stem
        digest = hashlib.sha256(os.fsencode(place(path))).hexdigest()[:8]
        return f"{stem.lstrip('.')[:50] or 'list'}-{digest}"

    @property
    def superpixel_cache(self) -> Path:
        """Parent folder of superpixel caches."""
        return self.out / self.superpixels.cache
