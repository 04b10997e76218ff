"""Scores of a network while it trains (``train.validate_every``); the best weights become best.safetensors.

The scored images are those of ``data.eval_list``, or a fixed part of it. If all of them have ground truth, the score is
the mIoU of their seeds, at ``evaluate.threshold`` or the best background threshold. Otherwise it is the mean average
precision of their tags, which measures classification and not outlines. To save time, seeds have one scale and no
mirror image: compare the scores with each other, but not with those of ``evaluate``.
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
from cpn_fast.data.dataset import VERIFIED, Sample, check_files, load_samples, tags
from cpn_fast.data.masks import read_mask
from cpn_fast.data.provenance import combined, image_digests
from cpn_fast.data.scores import Scores, ThresholdSweep
from cpn_fast.data.seeds import Seed, unit_scale
from cpn_fast.models.backbone import to_device
from cpn_fast.models.folding import fold
from cpn_fast.models.inference import images_for, summed_cams
from cpn_fast.models.network import Network, build_network
from cpn_fast.models.weights import BEST, is_whole, require_finite, to_released_keys, training_of, write_weights
from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError
from cpn_fast.runtime.precision import autocast
from cpn_fast.training.metrics import VALIDATED, mean_average_precision

MOST = 200
"""Maximum number of scored images, evenly spread over the list."""


class Validation:
    """Scores a network while it trains, and keeps the best weights in the run's folder."""

    def __init__(self, config: Config, trained_on: Sequence[Sample], rank: Rank, *, begins: bool) -> None:
        """``begins``: no step was made yet. All processes must call it.

        Raises UserError for damaged files, and if no scored image has a tag.
        """
        self.config, self.rank = config, rank
        samples = load_samples(config.data, config.classes, config.data.eval_list, labels=True, masks=None)
        indices = np.linspace(0, len(samples) - 1, min(len(samples), MOST)).round().astype(int)
        self.samples = [samples[index] for index in indices]
        self.measure = "mIoU" if all(sample.mask is not None for sample in self.samples) else "mAP"
        if not any(tags(sample).any() for sample in self.samples):
            raise UserError(f"train.validate_every: no scored image of {config.data.eval_list} has a tag")
        self.best: Mapping[str, Any] = {}
        if not rank.first:
            return
        workers, verified = config.train.data_threads, config.run / VERIFIED
        check_files(self.samples, workers=workers, classes=len(config.classes), verified=verified)
        self.digest = self._digest()
        path = config.run / BEST
        if begins:
            path.unlink(missing_ok=True)
        elif is_whole(path):
            self.best = training_of(path)
            if self.best.get("of") != self.digest:
                print(f"Warning: {path} was the best on other images or of other maps: chosen anew", file=sys.stderr)
                self.best = {}
        words = "mIoU of their seeds" if self.measure == "mIoU" else "mAP of their tags, since masks are missing"
        which = f"{len(self.samples)} of the {len(samples)} images of {config.data.eval_list}"
        shared = {sample.id for sample in self.samples} & {sample.id for sample in trained_on}
        print(f"Validating on {which}, {len(shared)} of which are trained on: {words}")

    def after(self, step: int, network: Network) -> dict[str, float]:
        """Return the score after a step, for metrics.jsonl; write the best weights. All processes must call it."""
        score = self._score(step, network)
        if self.rank.first and score > self.best.get("score", -1.0):
            self.best = {"step": step, "measure": self.measure, "score": score, "of": self.digest}
            tensors = to_released_keys(network.state_dict())
            write_weights(self.config.run / BEST, tensors, config=config_file.dump(self.config), training=self.best)
        return {f"{VALIDATED}{self.measure}": score}

    def _score(self, step: int, trained: Network) -> float:
        config, device = self.config, self.rank.device
        # A second network, as in the stage ``cam``: the trained one may be compiled for the shapes of training.
        network = build_network(config)
        network.load_state_dict(trained.state_dict())
        network = to_device(fold(network.eval()), device)
        options = config.cam.model_copy(update={"scales": (1.0,), "flip": False})
        share = self.rank.share(self.samples)
        fixed = config.evaluate.threshold
        grid = np.arange(config.evaluate.thresholds) / config.evaluate.thresholds
        sweep = ThresholdSweep(grid if fixed is None else np.array([fixed]), len(config.classes))
        all_labels, all_scores = [], []
        for batch in images_for(network, share, config, options.scales):
            chosen = [share[index] for index in batch.indices]
            labels = np.stack([tags(sample) for sample in chosen])
            with torch.inference_mode(), autocast(config.train.precision, device):
                cams, probabilities = summed_cams(network, batch, torch.from_numpy(labels), options)
            require_finite(probabilities.cpu().numpy(), f"the network after step {step}", chosen[0].id)
            all_labels.append(labels)
            all_scores.append(probabilities.float().cpu().numpy())
            for sample, cam in zip(chosen, cams, strict=True):
                if self.measure == "mIoU":
                    assert sample.mask is not None
                    seed = Seed(np.flatnonzero(tags(sample)), unit_scale(cam).cpu().numpy())
                    sweep.add(seed, read_mask(sample.mask))
        if self.measure == "mIoU":
            return float(Scores(self.rank.sum(sweep.confusion())).mean_iou.max())
        everywhere = self.rank.gather((all_labels, all_scores))
        truth, scores = (
            torch.from_numpy(np.concatenate([*itertools.chain(*parts)])) for parts in zip(*everywhere, strict=True)
        )
        return mean_average_precision(truth, scores)

    def _digest(self) -> str:
        """Return the digest of the scored images, their labels, and the way of scoring."""
        images = image_digests([sample.image for sample in self.samples])
        masks = image_digests([sample.mask for sample in self.samples if sample.mask is not None])
        tags_of = [(sample.id, np.flatnonzero(tags(sample)).tolist()) for sample in self.samples]
        scoring = self.config.evaluate.model_dump(mode="json")
        if self.measure == "mIoU":
            scoring["map"] = self.config.cam.map
        return combined(self.measure, tags_of, images, masks, scoring)


def best_of(run: Path) -> str | None:
    """Return the score and the step of a run's best weights, in words; None if there are none."""
    best = training_of(run / BEST)
    if not best:
        return None
    return f"{best['measure']} {best['score']:.1%} after step {best['step']:,} ({BEST})"
