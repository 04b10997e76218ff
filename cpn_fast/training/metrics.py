"""The figures of a training: metrics.jsonl, TensorBoard, and the progress bar's note."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cpn_fast.config import Config
from cpn_fast.pipelines.batch import Batch
from cpn_fast.runtime.files import named, read_metrics, replacing, system_error
from cpn_fast.training.hook import Hook
from cpn_fast.training.nonfinite import GradientGuard
from cpn_fast.training.step import Figures

AHEAD = 2
"""Steps that the GPU still has to make when the host waits for one. The GPU always has work, and the host is never so
far ahead that a signal comes late."""
VALIDATED = "validation_"
"""Prefix of the figures of ``train.validate_every``."""


class Wait(NamedTuple):
    """The time between the request for a batch and its arrival."""

    seconds: float
    """Time of the host."""
    marks: tuple[torch.cuda.Event, torch.cuda.Event] | None
    """Before and after it in the GPU's queue. The host may be far ahead of the GPU."""

    def of_device(self) -> float:
        """Return the seconds in which the device had no work. On a GPU, call it after the step is made."""
        if self.marks is None:
            return self.seconds
        before, after = self.marks
        return before.elapsed_time(after) / 1000


class _Pending(NamedTuple):
    """A step's figures on their way to the host."""

    step: int
    names: tuple[str, ...]
    values: Tensor
    logits: Tensor | None
    labels: Tensor
    indices: Tensor
    copied: torch.cuda.Event | None
    line: dict[str, Any] | None
    """The known part of the line that ends with this step; None if no line does."""
    waits: Sequence[Wait]


class Meter:
    """Writes the means since the last line to metrics.jsonl and TensorBoard, and gives them to the user's hook.

    Figures are copied to the host without waiting, and read when the copy is complete. Means are over all processes;
    the first one writes. The first line of a continued run, and its first mAP, cover only the steps since it continued.
    Values that are not finite, as in a skipped step, are left out of means and mAP. A figure without finite values is
    left out of the line. ``waiting`` is the part of the time in which this process's device waited for data.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        guard: GradientGuard,
        start: int,
        batches_per_epoch: int,
        hook: Hook | None = None,
    ) -> None:
        self.path, self.rank, self.guard = config.run / "metrics.jsonl", guard.rank, guard
        self.on_cuda = guard.rank.device.type == "cuda"
        self.batch, self.accumulate, self.batches_per_epoch = batch, config.train.accumulate, batches_per_epoch
        self.board, self.hook = None, hook
        self.events, self.excepthook = config.run / "events.*", threading.excepthook
        if self.rank.first:
            kept = [line for line in read_metrics(self.path) if line["step"] <= start]
            with replacing(self.path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
            threading.excepthook = _warn
            with named(self.events):
                self.board = SummaryWriter(config.run, purge_step=start + 1)
            if self.hook is not None:
                self.hook.give(kept)
        self.last_step, self.last_added = start, start
        self.under_way: deque[_Pending] = deque()
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.began = time.perf_counter()
        self.waits: list[Wait] = []
        self._restart()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.board is not None:
                with named(self.events):
                    self.board.close()
        finally:
            threading.excepthook = self.excepthook
        if self.hook is not None:
            self.hook.close()

    def _restart(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}
        """Name of a figure -> its sum over the steps with a finite value, and the number of these steps."""
        self.skipped, self.waited = 0, 0.0

    def _epochs(self, step: int) -> float:
        """Return the number of epochs after a step. An epoch may end within a step."""
        return step * self.accumulate / self.batches_per_epoch

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and record the time that the device waits for each of them."""
        while True:
            began, before = time.perf_counter(), None
            if self.on_cuda:
                before = torch.cuda.Event(enable_timing=True)
                before.record()
            batch = next(batches)
            marks = None
            if before is not None:
                marks = before, torch.cuda.Event(enable_timing=True)
                marks[1].record()
            self.waits.append(Wait(time.perf_counter() - began, marks))
            yield batch

    def add(self, step: int, lr: float, figures: Figures, batches: Sequence[Batch], *, ends_line: bool) -> None:
        """Send a step's figures to the host; ``ends_line``: a line is written with them."""
        line = None
        if ends_line:
            now = time.perf_counter()
            images = (step - self.last_added) * self.accumulate * self.batch
            line = {"step": step, "epoch": round(self._epochs(step), 3), "lr": lr}
            line |= {"images_per_second": images / (now - self.began), "seconds": now - self.began}
            self.began, self.last_added = now, step
        labels, indices = (torch.cat(parts) for parts in zip(*((b.labels, b.indices) for b in batches), strict=True))
        values, labels, indices = (x.to("cpu", non_blocking=True) for x in (figures.values, labels, indices))
        logits = None if figures.logits is None else figures.logits.to("cpu", non_blocking=True)
        copied = None
        if self.on_cuda:
            copied = torch.cuda.Event(blocking=True)  # otherwise the host spins on a core that DALI could use
            copied.record()
        waits, self.waits = self.waits, []
        self.under_way.append(_Pending(step, figures.names, values, logits, labels, indices, copied, line, waits))

    def read(self, step: int, *, wait: bool, validate: Callable[[], dict[str, float]] | None = None) -> str | None:
        """Read the figures, after ``step`` was added. Without ``wait`` a GPU's newest AHEAD steps stay unread.

        ``validate`` returns more figures for the line of ``step``, and needs ``wait``. It is called when the gradients
        of all steps are known to be finite, and its time counts in no line's speed. All processes read the same steps.
        Returns a note for the progress bar if a line was written. Raises UserError for a gradient that was not finite
        (``GradientGuard.passes``).
        """
        note = None
        while self.under_way:
            pending = self.under_way[0]
            if not wait and pending.copied is not None and pending.step > step - AHEAD:
                break
            if pending.copied is not None:
                pending.copied.synchronize()
            self.under_way.popleft()
            note = self._take(pending, validate if pending.step == step else None) or note
        return note

    def show(self, name: str, picture: np.ndarray, step: int) -> None:
        """Send a picture, uint8 RGB (H, W, 3), to TensorBoard."""
        if self.board is not None:
            with named(self.events):
                self.board.add_image(name, picture, step, dataformats="HWC")

    def _take(self, pending: _Pending, validate: Callable[[], dict[str, float]] | None) -> str | None:
        values = dict(zip(pending.names, pending.values.tolist(), strict=True))
        norm, scale = values["gradient_norm"], values.pop("scale")
        if not self.guard.passes(pending.step, norm, scale, pending.indices.tolist()):
            self.skipped += 1
            values["gradient_norm"] = 0.0
        for name, value in values.items():
            if math.isfinite(value):
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + value, count + 1
        self.waited += sum(wait.of_device() for wait in pending.waits)
        if pending.logits is not None:
            scored = pending.logits.float().isfinite().all(dim=1)  # a skipped step may have others
            self.logits.append(pending.logits[scored])  # a copy: the pinned memory of the original is used again
            self.labels.append(pending.labels[scored])
        if pending.line is None:
            return None
        if validate is not None:
            pending.line.update(validate())
            self.began = time.perf_counter()
        return self._write(pending.line, scale)

    def _write(self, line: dict[str, Any], scale: float) -> str:
        everywhere = self.rank.gather(self.sums)
        names = dict.fromkeys(name for sums in everywhere for name in sums)  # in the order of the first process
        means = {}
        for name in names:
            totals, counts = zip(*(sums[name] for sums in everywhere if name in sums), strict=True)
            means[name] = sum(totals) / sum(counts)
        norm = means.pop("gradient_norm")
        seconds = line.pop("seconds")
        measured = {"images_per_second": line.pop("images_per_second"), "waiting": min(1.0, self.waited / seconds)}
        line |= {**means, **measured, "gradient_norm": norm}
        if scale != 1:
            line["scale"] = scale
        if self.skipped:
            line["skipped"] = self.skipped
        step = line["step"]
        if self.logits and int(self._epochs(step)) > int(self._epochs(self.last_step)):
            seen = self.rank.gather((torch.cat(self.labels), torch.cat(self.logits).float()))
            labels, logits = (torch.cat(parts) for parts in zip(*seen, strict=True))
            if labels.any():
                line["mAP"] = mean_average_precision(labels, logits)
            self.logits.clear()
            self.labels.clear()
        if self.board is not None:
            with named(self.path), self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            with named(self.events):
                for name, value in line.items():
                    if name not in ("step", "epoch"):
                        self.board.add_scalar(name, value, step)
        if self.hook is not None:
            self.hook.give([line])
        self.last_step = step
        self._restart()
        loss = f"{means['loss']:.3f}" if "loss" in means else "not finite"
        scores = "".join(f"  {name} {value:.1%}" for name, value in line.items() if name.startswith(VALIDATED))
        return f"loss {loss}  {line['images_per_second']:.1f} images/s  data {line['waiting']:.0%}{scores}"


def _warn(failure: threading.ExceptHookArgs) -> None:
    """Say in a line that TensorBoard's thread cannot write. The next figure raises its error in the main thread."""
    cause = None if failure.exc_value is None else system_error(failure.exc_value)
    if cause is None:
        threading.__excepthook__(failure)
    else:
        print(f"Warning: TensorBoard's file ends here: {cause.strerror}", file=sys.stderr)


def mean_average_precision(labels: Tensor, logits: Tensor) -> float:
    """Return the mean average precision over the classes that occur; labels and logits are (N, classes)."""
    from sklearn.metrics import average_precision_score  # slow to import, and only needed here

    truth, scores = labels.cpu().numpy() > 0.5, logits.float().cpu().numpy()
    occurring = truth.any(axis=0)
    return float(average_precision_score(truth[:, occurring], scores[:, occurring]))
