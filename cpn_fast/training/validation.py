"""Scores of a network while it trains (``train.validate_every``), and the weights with the highest, best.safetensors.

Scored are the seeds of ``data.eval_list``, or of a fixed part of it, at one scale and without the mirrored image, which
costs little: compare the scores with each other, and not with ``evaluate``'s. Where every image of the part has ground
truth, the score is their mIoU, at ``evaluate.threshold`` or the best background threshold; elsewhere it is the mean
average precision of the tags, which says how well classes are told apart and nothing of outlines.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpn_fast import config_file
from cpn_fast.config import Config
from cpn_fast.data.dataset import Sample, check_files, load_samples, tags
from cpn_fast.data.masks import read_mask
from cpn_fast.data.provenance import combined, image_digests
from cpn_fast.data.scores import Scores, ThresholdSweep
from cpn_fast.data.seeds import Seed, unit_scale
from cpn_fast.models.folding import fold
from cpn_fast.models.inference import images_for, summed_cams
from cpn_fast.models.network import Network, build_network
from cpn_fast.models.weights import BEST, is_whole, require_finite, to_released_keys, training_of, write_weights
from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.precision import autocast
from cpn_fast.training.metrics import VALIDATED, mean_average_precision

MOST = 200
"""Images that are scored at most, evenly spread over the list."""


class Validation:
    """Scores a network every so many steps, and keeps the best weights in the run's folder."""

    def __init__(self, config: Config, trained_on: Sequence[Sample], rank: Rank, *, begins: bool) -> None:
        """``begins``: no step was made yet. All processes must call it.

        Raises UserError for an evaluation list that is damaged or has no tag.
        """
        self.config, self.rank = config, rank
        listed = load_samples(config.data, config.classes, config.data.eval_list, labels=True, masks=None)
        places = np.linspace(0, len(listed) - 1, min(len(listed), MOST)).round().astype(int)
        self.samples = [listed[place] for place in places]
        self.measure = "mIoU" if all(sample.mask is not None for sample in self.samples) else "mAP"
        if not any(tags(sample).any() for sample in self.samples):
            raise UserError(f"train.validate_every: no image of {config.data.eval_list} that is looked at has a tag")
        self.best: Mapping[str, Any] = {}
        if not rank.first:
            return
        workers, verified = config.train.data_threads, config.run / "verified.json"
        check_files(self.samples, workers=workers, classes=len(config.classes), verified=verified)
        self.of = self._digest()
        path = config.run / BEST
        if begins:
            path.unlink(missing_ok=True)
        elif is_whole(path):
            self.best = training_of(path)
            if self.best.get("of") != self.of:
                print(f"Warning: {path} was the best on other images: it is chosen anew", file=sys.stderr)
                self.best = {}
        words = "mIoU of their seeds" if self.measure == "mIoU" else "mean average precision of tags, for want of masks"
        which = f"{len(self.samples)} of the {len(listed)} images of {config.data.eval_list}"
        shared = {sample.id for sample in self.samples} & {sample.id for sample in trained_on}
        print(f"Validating on {which}, {len(shared)} of which are trained on: {words}")

    def after(self, step: int, network: Network) -> dict[str, float]:
        """The score after a step, for the line of metrics; the best weights are written. All processes must call it."""
        score = self._score(step, network)
        if self.rank.first and score > self.best.get("score", -1.0):
            self.best = {"step": step, "measure": self.measure, "score": score, "of": self.of}
            tensors = to_released_keys(network.state_dict())
            write_weights(self.config.run / BEST, tensors, config=config_file.dump(self.config), training=self.best)
        return {f"{VALIDATED}{self.measure}": score}

    def _score(self, step: int, trained: Network) -> float:
        config, device = self.config, self.rank.device
        # A network of its own, as in the stage ``cam``: the trained one may be compiled for training's shapes.
        network = build_network(config)
        network.load_state_dict(trained.state_dict())
        network = fold(network.eval()).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        options = config.cam.model_copy(update={"scales": (1.0,), "flip": False})
        own = self.rank.share(self.samples)
        fixed = config.evaluate.threshold
        grid = np.arange(config.evaluate.thresholds) / config.evaluate.thresholds
        sweep = ThresholdSweep(grid if fixed is None else np.array([fixed]), len(config.classes))
        labels, found = [], []
        for batch in images_for(network, own, config, options.scales):
            chosen = [own[index] for index in batch.indices]
            said = np.stack([tags(sample) for sample in chosen])
            with torch.inference_mode(), autocast(config.train.precision, device):
                cams, probabilities = summed_cams(network, batch, torch.from_numpy(said), options)
            require_finite(probabilities.cpu().numpy(), f"the network after step {step}", chosen[0].id)
            labels.append(said)
            found.append(probabilities.float().cpu().numpy())
            for sample, cam in zip(chosen, cams, strict=True):
                if self.measure == "mIoU":
                    assert sample.mask is not None
                    seed = Seed(np.flatnonzero(tags(sample)), unit_scale(cam).cpu().numpy())
                    sweep.add(seed, read_mask(sample.mask))
        if self.measure == "mIoU":
            return float(Scores(self.rank.sum(sweep.confusion())).mean_iou.max())
        everywhere = self.rank.gather((labels, found))
        told, scores = (
            torch.from_numpy(np.concatenate([*itertools.chain(*parts)])) for parts in zip(*everywhere, strict=True)
        )
        return mean_average_precision(told, scores)

    def _digest(self) -> str:
        """Of what is scored, and how."""
        images = image_digests([sample.image for sample in self.samples])
        masks = image_digests([sample.mask for sample in self.samples if sample.mask is not None])
        named = [(sample.id, np.flatnonzero(tags(sample)).tolist()) for sample in self.samples]
        return combined(self.measure, named, images, masks, self.config.evaluate.model_dump(mode="json"))


def best_of(run: Path) -> str | None:
    """What is known of a run's best weights, in words; None where there are none."""
    found = training_of(run / BEST)
    if not found:
        return None
    return f"{found['measure']} {found['score']:.1%} after step {found['step']:,} ({BEST})"
