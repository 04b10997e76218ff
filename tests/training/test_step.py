"""The training step, its figures, and the largest batch."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
from torch import Tensor, nn

from cpn_fast import config, config_file
from cpn_fast.commands import report
from cpn_fast.methods.cam import PlainCam
from cpn_fast.methods.known import METHODS
from cpn_fast.models import network
from cpn_fast.models.backbone import Backbone, Features
from cpn_fast.pipelines.batch import Batch
from cpn_fast.runtime import distributed
from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import train
from cpn_fast.training import batch_size, previews
from cpn_fast.training.batch_size import largest
from cpn_fast.training.metrics import AHEAD, Meter, Wait, mean_average_precision
from cpn_fast.training.nonfinite import GradientGuard
from cpn_fast.training.step import WARM_UP, Figures, Step, captures, load_optimizer, make_optimizer, set_rate

PLAIN = {"method": "cam", "model": {"pcm": False, "prcm": False}, "cam": {"map": "raw"}}
ALONE, CPU = Rank(0, 1, 0), torch.device("cpu")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def batches(count: int, images: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(images, 3, 32, 32, generator=generator),
            None,
            (torch.rand(images, 3, generator=generator) < 0.5).float(),
            torch.arange(images),
        )
        for _ in range(count)
    ]


def weights(settings: config.Config, rates: list[float], *, ours: bool) -> dict[str, Tensor]:
    """Return the weights after a step at each rate, of our step or of the same step written out."""
    torch.manual_seed(0)
    method = METHODS[settings.method](settings)
    net = method.network.train()
    data = iter(batches(len(rates) * settings.train.accumulate))
    optimizer = make_optimizer(net, settings.train, CPU)
    step = Step(method, optimizer, torch.Generator(), settings.train, ALONE, CPU)
    plain = torch.optim.SGD(
        [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups],
        momentum=settings.train.momentum,
        foreach=False,
    )
    places = set()
    for number, rate in enumerate(rates):
        torch.manual_seed(number)
        own = [next(data) for _ in range(settings.train.accumulate)]
        if ours:
            set_rate(optimizer, rate)
            step(own)
            rate_tensors = [group["lr"] for group in optimizer.param_groups]
            buffers = [tensor for batch in step.inputs for tensor in batch if isinstance(tensor, Tensor)]
            places.add(tuple(tensor.data_ptr() for tensor in (*rate_tensors, *buffers)))
        else:
            for group, ours_ in zip(plain.param_groups, optimizer.param_groups, strict=True):
                group["lr"] = ours_["base_lr"] * rate
            plain.zero_grad()
            for batch in own:
                views = method.views(batch, torch.Generator())
                outputs = [net(*inputs) for inputs in views.inputs]
                (method.losses(outputs, views).total / len(own)).backward()
            plain.step()
    assert len(places) <= 1  # a graph always uses the same memory
    return dict(net.state_dict())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_plain_sgd_on_tensors_that_stay_in_place(accumulate: int, tiny_config) -> None:
    options = {"accumulate": accumulate, "momentum": 0.9, "lr": 0.05}
    settings = config_file.load(tiny_config(**PLAIN, train=options, classes=["a", "b", "c"]))
    rates = [1.0, 0.5, 0.25]
    expected, found = (weights(settings, rates, ours=ours) for ours in (False, True))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_brings_momentum_and_no_settings(tiny_config) -> None:
    """So does one of a run with plain numbers as rates and an SGD that was not fused."""
    settings = config_file.load(tiny_config(**PLAIN))
    parameters = [parameter for parameter in PlainCam(settings).network.parameters() if parameter.requires_grad]
    old = torch.optim.SGD([{"params": parameters, "base_lr": 7.0}], lr=7.0, momentum=0.5)
    torch.stack([parameter.sum() for parameter in parameters]).sum().backward()
    old.step()
    new = torch.optim.SGD([{"params": parameters, "lr": torch.tensor(1.0), "base_lr": 1.0}], momentum=0.9, fused=True)
    rate = new.param_groups[0]["lr"]
    load_optimizer(new, old.state_dict())
    (group,) = new.param_groups
    assert group["lr"] is rate
    assert (group["base_lr"], group["momentum"], group["fused"]) == (1.0, 0.9, True)
    assert torch.equal(new.state[parameters[0]]["momentum_buffer"], torch.ones_like(parameters[0]))


def switched(tiny_config, name: str, **options) -> bytes:
    """Return the trained tensors. The file also has the config."""
    path = train.run(config_file.load(tiny_config(name=name, train={"steps": 3, **options})))
    return save(load_file(path))


def test_recomputed_blocks_train_the_same(tiny_config) -> None:
    assert switched(tiny_config, "a") == switched(tiny_config, "b", checkpoint_activations=True)


class Toy(Backbone):
    """One block with batch normalisation. On a busy CPU torch.compile takes minutes for a whole backbone."""

    channels = (8, 8, 8)
    mean = std = (127.5, 127.5, 127.5)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=8, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.train()

    def forward(self, images: Tensor) -> Features:
        x = self.through(self.norm, self.conv(images)).relu()
        return Features(x, x, x)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_and_plain_training_continue_each_other(tiny_config, monkeypatch, capsys) -> None:
    """They agree within the stated tolerance, with the same dropout."""
    monkeypatch.setattr(network, "build_backbone", lambda options: Toy())
    options = {"steps": 3, "checkpoint_every": 2, "log_every": 1}
    plain = config_file.load(tiny_config(**PLAIN, name="plain", train=options))
    expected = load_file(train.run(plain))
    settings = config_file.load(tiny_config(**PLAIN, name="compiled", train={**options, "compile": True}))
    final = train.run(settings)
    (last,) = (settings.run / "checkpoints").glob("*3.pt")
    for path in (final, last):
        path.unlink()
    found = load_file(train.run(config_file.load(tiny_config(**PLAIN, name="compiled", train=options))))
    assert capsys.readouterr().out.count("The first step takes a minute or more") == 1
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for a, b in zip(lines(plain.run), lines(settings.run), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


def test_where_a_step_cannot_be_captured(tiny_config) -> None:
    def asked(graph: bool | None, rank: Rank, device: str) -> bool:
        options = config_file.load(tiny_config(train={"cuda_graph": graph})).train
        return captures(options, rank, torch.device(device))

    assert asked(None, ALONE, "cuda")
    assert asked(True, ALONE, "cuda")
    assert not asked(False, ALONE, "cuda")
    for rank, device, why in ((ALONE, "cpu", "no GPU"), (Rank(0, 2, 0), "cuda", "exchange gradients")):
        assert not asked(None, rank, device)
        with pytest.raises(UserError, match=rf"train.cuda_graph is true, but .*{why}"):
            asked(True, rank, device)
    with pytest.MonkeyPatch.context() as patched:  # there CPN's losses are tiled, which wait for the device
        patched.setattr("cpn_fast.kernels.launch.gpu_obstacle", lambda _: "needs a GPU of compute capability 8.0")
        assert not asked(None, ALONE, "cuda")
        assert asked(True, ALONE, "cuda")


class Capture:
    """Stand-in for CUDA's graphs that records calls. A capture makes no step; its replay does."""

    def __init__(self, monkeypatch, tiny_config, made) -> None:
        """``made`` is called for every step that runs or is captured."""
        self.notes: list[str] = []
        self.capturing = False
        streams = SimpleNamespace(wait_stream=lambda other: None)
        graph = SimpleNamespace(
            register_generator_state=lambda generator: self.notes.append("register"),
            replay=lambda: self.notes.append("step"),
        )
        for name, fake in {
            "CUDAGraph": lambda: graph,
            "graph": self.captured,
            "stream": lambda stream: nullcontext(),
            "Stream": lambda *_: streams,
            "current_stream": lambda: streams,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr("cpn_fast.training.step.captures", lambda *_: True)

        def make(step: Step) -> str:
            self.notes.append("captured" if self.capturing else "step")
            made(step)
            return "figures"

        monkeypatch.setattr(Step, "_make", make)
        settings = config_file.load(tiny_config(**PLAIN))
        self.method = METHODS["cam"](settings)
        optimizer = make_optimizer(self.method.network, settings.train, CPU)
        self.step = Step(self.method, optimizer, torch.Generator(), settings.train, ALONE, CPU)

    @contextmanager
    def captured(self, graph: object, *, stream: object, capture_error_mode: str):
        assert capture_error_mode == "thread_local"
        self.capturing = True
        try:
            yield
        except BaseException:  # in CUDA, the end of a failed capture hides the reason
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        self.capturing = False

    def gradients(self) -> list[Tensor]:
        return [x.grad for x in self.method.network.parameters() if x.grad is not None]


def test_every_call_makes_one_step_whether_eager_captured_or_replayed(tiny_config, monkeypatch) -> None:
    kept = []

    def made(step: Step) -> None:
        kept.append(bool(fake.gradients()))
        for parameter in fake.method.network.parameters():
            parameter.grad = torch.zeros_like(parameter)

    fake = Capture(monkeypatch, tiny_config, made)
    assert [fake.step(batches(1)) for _ in range(5)] == ["figures"] * 5
    assert fake.notes == ["step"] * WARM_UP + ["register", "captured"] + ["step"] * (5 - WARM_UP)
    # The graph has its own gradients: no other gradients are kept.
    assert kept == [False] + [True] * (WARM_UP - 1) + [False]


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (
            RuntimeError("an operation that waits\nat line 3"),
            UserError,
            "graph: an operation that waits. Continue with",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), UserError, "memory does not hold the step as a CUDA graph"),
        (KeyError("a bug"), KeyError, "a bug"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_capture_that_fails_says_why(error, raised: type, said: str | None, tiny_config, monkeypatch) -> None:
    def made(step: Step) -> None:
        if fake.capturing:
            raise error

    fake = Capture(monkeypatch, tiny_config, made)
    for _ in range(WARM_UP):
        fake.step(batches(1))
    with pytest.raises(raised, match=said):
        fake.step(batches(1))


def test_recomputed_blocks_of_several_processes_are_not_compiled(tiny_config) -> None:
    settings = config_file.load(tiny_config(train={"compile": True, "checkpoint_activations": True}))
    method = METHODS["cpn"](settings)
    optimizer = make_optimizer(method.network, settings.train, CPU)
    with pytest.raises(UserError, match=r"needs train\.compile=false"):
        Step(method, optimizer, torch.Generator(), settings.train, Rank(0, 2, 0), CPU)


# fp16


def with_bad_losses(monkeypatch, first: int, last: int) -> None:
    real, calls = PlainCam.losses, iter(range(1, 1000))

    def losses(self, outputs, views):
        found = real(self, outputs, views)
        return found._replace(total=found.total * (float("nan") if first <= next(calls) <= last else 1))

    monkeypatch.setattr(PlainCam, "losses", losses)


def test_fp16_skips_an_overflow_and_halves_the_scale(tiny_config, monkeypatch) -> None:
    options = {"precision": "fp16", "log_every": 1, "steps": 4}
    with_bad_losses(monkeypatch, 2, 2)
    settings = config_file.load(tiny_config(**PLAIN, train=options))
    found = load_file(train.run(settings))
    assert all(tensor.isfinite().all() for tensor in found.values())
    told = lines(settings.run)
    assert [line.get("skipped") for line in told] == [None, 1, None, None]
    assert [line["scale"] for line in told] == [65536, 65536, 32768, 32768]
    assert not (settings.run / "nonfinite.json").exists()


def test_fp16_trains_as_fp32_and_a_scale_that_collapses_stops_the_run(tiny_config, monkeypatch) -> None:
    options = {"steps": 24, "log_every": 1, "checkpoint_every": 100}
    fp32 = config_file.load(tiny_config(**PLAIN, name="fp32", train={**options, "steps": 3}))
    expected = load_file(train.run(fp32))
    half = load_file(
        train.run(config_file.load(tiny_config(**PLAIN, train={**options, "steps": 3, "precision": "fp16"})))
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(half[name], tensor, rtol=1e-2, atol=1e-3, msg=name)

    with_bad_losses(monkeypatch, 3, 1000)
    settings = config_file.load(tiny_config(**PLAIN, name="bad", train={**options, "precision": "fp16"}))
    with pytest.raises(UserError, match="gradient of step 19 is not finite"):  # 65536 is halved at steps 3 to 18
        train.run(settings)
    assert [entry["step"] for entry in json.loads((settings.run / "nonfinite.json").read_text())] == [19]


# Figures on their way to the host


class Event:
    """An event of a GPU that is done when somebody waits for it."""

    def __init__(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


def meter_of(settings: config.Config, ids: list[str], batches_per_epoch: int, mode: Any = "skip") -> Meter:
    settings.run.mkdir(parents=True)
    return Meter(settings, len(ids), GradientGuard(settings.run, ids, mode, ALONE), 0, batches_per_epoch)


def figures_of(loss: float, norm: float, logits: Tensor | None = None) -> Figures:
    return Figures(("loss", "gradient_norm", "scale"), torch.tensor([loss, norm, 1.0]), logits)


def test_a_disk_that_refuses_the_figures_is_said_with_the_file(tiny_config, monkeypatch, capfd) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # without a name, as from write()

    settings, batch = config_file.load(tiny_config()), Batch(torch.zeros(1), None, torch.zeros(1, 5), torch.tensor([0]))
    meter, picture = meter_of(settings, ["x"], 1), np.zeros((2, 2, 3), np.uint8)
    excepthook = meter.excepthook
    monkeypatch.setattr(LocalFileSystem, "_write", refuse)

    def show() -> None:
        with meter:
            for step in range(1000):  # TensorBoard's thread writes
                meter.show("cams", picture, step)
                time.sleep(0.01)

    with pytest.raises(UserError, match=r"events.*: the disk is full.*make room"):
        show()
    assert threading.excepthook is excepthook
    said = capfd.readouterr().err
    assert "Warning: TensorBoard's file ends here: No space left on device" in said
    assert "Traceback" not in said

    meter.path = Path("/dev/full")
    meter.add(1, 0.1, figures_of(1.0, 1.0), [batch], ends_line=True)
    with pytest.raises(UserError, match="/dev/full: cannot be written: the disk is full"):
        meter.read(1, wait=True)


NAN = float("nan")


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_counts_in_no_mean_and_no_map(bad: float, tiny_config) -> None:
    """In a skipped step, as in fp16 or with train.accumulate, a single batch or image may be the cause."""
    settings = config_file.load(tiny_config())
    batch = batches(1)[0]._replace(labels=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    right, wrong = torch.tensor([[2.0, -2.0], [-2.0, 2.0]]), torch.tensor([[bad, -2.0], [9.0, -9.0]])
    with meter_of(settings, ["x", "y"], 2) as meter:
        for step, (loss, logits) in enumerate([(1.0, right), (bad, wrong), (bad, wrong * bad), (bad, wrong * bad)], 1):
            norm = 1.0 if step == 1 else bad
            meter.add(step, 0.1, figures_of(loss, norm, logits), [batch], ends_line=step % 2 == 0)
            note = meter.read(step, wait=True)
    first, second = lines(settings.run)
    assert (first["loss"], first["skipped"], first["gradient_norm"]) == (1.0, 1, 0.5)
    # x is always right; y is wrong once, where another class has the best score.
    assert first["mAP"] == pytest.approx(mean_average_precision(batch.labels[[0, 1, 1]], torch.cat([right, wrong[1:]])))
    assert "loss" not in second
    assert "mAP" not in second
    assert second["skipped"] == 2
    assert note is not None
    assert "loss not finite" in note

    def strict(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for line in (settings.run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=strict)


def test_an_epoch_may_end_within_a_step(tiny_config) -> None:
    """Two epochs of six batches are three steps of four batches: the first epoch ends within the second step."""
    options = {"steps": None, "epochs": 2, "accumulate": 4, "log_every": 1}
    settings = config_file.load(tiny_config(**PLAIN, train=options))
    train.run(settings)
    found = [(line["epoch"], "mAP" in line) for line in lines(settings.run)]
    assert found == [(0.667, False), (1.333, True), (2, True)]


def test_steps_of_nan_are_skipped_to_the_end(tiny_config, monkeypatch) -> None:
    """This holds even if all steps of an epoch are NaN, and they do not affect the next start."""
    with_bad_losses(monkeypatch, 1, 1000)
    real = PlainCam.losses

    def losses(self, outputs, views):
        found = real(self, outputs, views)
        return found._replace(logits=found.logits * NAN)

    monkeypatch.setattr(PlainCam, "losses", losses)
    options = {"nonfinite": "skip", "steps": 7, "accumulate": 2, "log_every": 3}  # an epoch is 3 steps
    settings = config_file.load(tiny_config(**PLAIN, train=options))
    found = load_file(train.run(settings))
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert [line["skipped"] for line in lines(settings.run)] == [3, 3, 1]
    assert not any("mAP" in line or "loss" in line for line in lines(settings.run))
    assert "steps skipped" in report.run(settings.run).page.read_text()


class Mark:
    """A GPU event with its time in milliseconds."""

    def __init__(self, at: float) -> None:
        self.at = at

    def elapsed_time(self, other: Mark) -> float:
        return other.at - self.at


def test_waiting_is_the_devices_and_not_the_hosts(tiny_config) -> None:
    """A host that is ahead waits for the pipeline while the GPU works. This wait does not count."""
    settings = config_file.load(tiny_config())
    with meter_of(settings, ["x", "y"], 100) as meter:
        for step, idle in enumerate((0.0, 3.0), 1):
            marks: Any = (Mark(100.0), Mark(100.0 + idle))
            meter.waits = [Wait(60.0, marks)]
            meter.began -= 0.5  # seconds before now
            meter.add(step, 0.1, figures_of(1.0, 1.0), batches(1), ends_line=True)
            meter.read(step, wait=True)
    none, some = (line["waiting"] for line in lines(settings.run))
    assert none == 0
    assert 0 < some <= 0.003 / 0.5


def test_on_a_cpu_waiting_is_the_time_in_the_pipeline(tiny_config) -> None:
    settings = config_file.load(tiny_config())
    clock = iter([0.0, 0.0, 1.0, 4.0])
    with meter_of(settings, ["x", "y"], 100) as meter, pytest.MonkeyPatch.context() as patched:
        meter.began = 0.0
        patched.setattr("cpn_fast.training.metrics.time", SimpleNamespace(perf_counter=lambda: next(clock)))
        next(clock)
        batch = next(meter.timed(iter(batches(1))))
        meter.add(1, 0.1, figures_of(1.0, 1.0), [batch], ends_line=True)
        meter.read(1, wait=True)
    assert lines(settings.run)[0]["waiting"] == 0.25


def test_figures_are_read_late_and_belong_to_their_steps(tiny_config) -> None:
    settings = config_file.load(tiny_config(train={"batch": 2}))
    events: list[Any] = []
    with meter_of(settings, ["x", "y"], 100) as meter:
        for step in range(1, 8):
            values = torch.tensor([float(step), float("inf") if step == 4 else 1.0, 1.0])
            figures = Figures(("loss", "gradient_norm", "scale"), values, None)
            meter.add(step, 0.1 * step, figures, batches(1), ends_line=step % 3 == 0)
            events.append(Event())
            meter.under_way[-1] = meter.under_way[-1]._replace(copied=events[-1])
            note = meter.read(step, wait=False)
            assert [event.waited for event in events] == [number <= step - AHEAD for number in range(1, step + 1)]
            assert (note is not None) == (step - AHEAD > 0 and (step - AHEAD) % 3 == 0)
        (first,) = lines(settings.run)
        assert (first["step"], first["loss"], first["lr"]) == (3, 2.0, pytest.approx(0.3))
        meter.read(7, wait=True)
    _, second = lines(settings.run)
    assert (second["step"], second["loss"], second["skipped"]) == (6, 5.0, 1)
    assert second["gradient_norm"] == pytest.approx(2 / 3)
    assert json.loads((settings.run / "nonfinite.json").read_text()) == [{"step": 4, "images": ["x", "y"]}]


def test_a_run_keeps_no_pinned_memory(tiny_config) -> None:
    """An epoch's mAP keeps copies. The tensors from the GPU, whose memory is pinned, are freed."""
    settings = config_file.load(tiny_config(train={"batch": 2}))
    with meter_of(settings, ["x", "y"], 100) as meter:
        meter.add(1, 0.1, figures_of(1.0, 1.0)._replace(logits=torch.zeros(2, 5)), batches(1), ends_line=False)
        came = [weakref.ref(tensor) for tensor in (meter.under_way[0].logits, meter.under_way[0].labels)]
        meter.read(1, wait=True)
        assert len(meter.logits) == len(meter.labels) == 1
        assert [tensor() for tensor in came] == [None, None]


def test_pictures_of_cams_come_with_checkpoints(tiny_config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config_file.load(tiny_config())
    train.run(settings)
    board = EventAccumulator(str(settings.run))
    board.Reload()
    pictures = board.Images("cams")
    assert [picture.step for picture in pictures] == [3, 6]
    assert (pictures[0].height, pictures[0].width) == (4 * 160, 3 * 160)


def test_a_picture_for_which_memory_is_full_is_left_out(tiny_config, monkeypatch, capsys) -> None:
    def full(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(previews.Previews, "_drawn", full)
    train.run(config_file.load(tiny_config(**PLAIN)))
    assert capsys.readouterr().err.count("no pictures of CAMs") == 1


# The largest batch


@given(limit=st.integers(0, 300), most=st.integers(1, 300))
def test_the_largest_that_fits(limit: int, most: int) -> None:
    tried: list[int] = []

    def fits(images: int) -> bool:
        tried.append(images)
        return images <= limit

    assert largest(fits, most) == min(limit, most)
    assert len(set(tried)) == len(tried) <= 20
    assert max(tried) <= most


def test_a_run_finds_its_batch_and_keeps_it(tiny_config, monkeypatch) -> None:
    monkeypatch.setattr(batch_size, "require_gpu", lambda config, key: None)
    monkeypatch.setattr(batch_size, "step_fits", lambda config, build, rank, images: images <= 3)
    settings = config_file.load(
        path := tiny_config(train={"batch": "auto", "steps": None, "epochs": 1, "log_every": 1})
    )
    expected = load_file(train.run(settings))
    assert config_file.load(settings.run / "config.yaml").train.batch == 3
    assert [line["step"] for line in lines(settings.run)] == [1, 2, 3, 4]  # 12 images

    monkeypatch.undo()  # as on another machine
    (settings.run / "model.safetensors").unlink()
    found = load_file(train.run(config_file.load(path)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert config_file.load(settings.run / "config.yaml").train.batch == 3


def test_no_batch_has_more_images_than_the_list(tiny_config, monkeypatch) -> None:
    monkeypatch.setattr(batch_size, "require_gpu", lambda config, key: None)
    monkeypatch.setattr(batch_size, "step_fits", lambda config, build, rank, images: True)
    settings = config_file.load(tiny_config(train={"batch": "auto", "steps": 1}))
    train.run(settings)
    assert config_file.load(settings.run / "config.yaml").train.batch == 12


def test_a_recorded_batch_that_the_processes_cannot_share_is_refused(tiny_config, monkeypatch) -> None:
    settings = config_file.load(path := tiny_config(train={"batch": 3, "steps": 1}))
    train.run(settings)
    monkeypatch.setattr(distributed, "join", lambda: Rank(0, 2, 0))
    monkeypatch.setattr(Rank, "gather", lambda rank, item: [item, item])
    with pytest.raises(UserError, match=r"train\.batch is 3, expected a multiple of torchrun's 2 processes"):
        train.run(config_file.load(path, ["train.batch=auto"]))


def test_a_batch_that_does_not_fit_is_said(tiny_config, monkeypatch) -> None:
    settings = config_file.load(tiny_config(train={"batch": "auto"}))
    with pytest.raises(UserError, match="there is no GPU: give a number"):
        train.run(settings)
    monkeypatch.setattr(batch_size, "require_gpu", lambda config, key: None)
    monkeypatch.setattr(batch_size, "step_fits", lambda config, build, rank, images: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    with pytest.raises(UserError, match=r"one image of 64 px .*train\.checkpoint_activations"):
        train.run(settings)


@pytest.mark.parametrize(("gibibytes", "share"), [(80, 0.9), (24, 0.9), (16, 0.875), (8, 0.75), (1, 0.0)])
def test_a_small_gpu_keeps_room_for_the_pipeline(gibibytes: int, share: float, monkeypatch) -> None:
    properties = SimpleNamespace(total_memory=gibibytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert batch_size.usable(CPU) == share


@pytest.mark.parametrize(
    ("error", "fits"),
    [
        (None, True),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("a bug"), None),
    ],
)
def test_only_full_memory_lowers_the_batch(error, fits: bool | None, tiny_config, monkeypatch) -> None:
    def tried(*_arguments: object) -> None:
        if error is not None:
            raise error

    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(batch_size, "try_steps", tried)
    with nullcontext() if fits is not None else pytest.raises(RuntimeError, match="a bug"):
        assert batch_size.step_fits(config_file.load(tiny_config()), METHODS["cpn"], ALONE, 1) is fits
    assert limits == [0.9, 1.0]  # the training may use all


@pytest.mark.parametrize("method", ["cpn", "seam"])
def test_what_is_tried_is_a_training_step(method: str, tiny_config, monkeypatch) -> None:
    settings = config_file.load(tiny_config(method=method, train={"accumulate": 2}))
    made = []
    real = Step._make
    monkeypatch.setattr(Step, "_make", lambda self: made.append(real(self)) or made[-1])
    batch_size.try_steps(settings, METHODS[method], CPU, 2)
    assert [figures.logits.shape for figures in made] == [(4, len(settings.classes))] * 2


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["cpn", "seam"])
@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"accumulate": 2}, {"checkpoint_activations": True}])
def test_a_captured_step_trains_as_an_eager_one(options: dict, method: str, tiny_config) -> None:
    """Dropout and hidden patches also follow from (seed, step). Sums of atomics differ in their order."""
    runs = []
    for graph in (False, True):
        free = {"steps": 8, "log_every": 1, "compile": False, "cuda_graph": graph, **options}
        runs.append(config_file.load(tiny_config(name=f"graph-{graph}", method=method, train=free)))
    eager, captured = (load_file(train.run(settings)) for settings in runs)
    for name, tensor in eager.items():
        assert (captured[name] - tensor).norm() <= 1e-2 * tensor.norm(), name
    for a, b in zip(*(lines(settings.run) for settings in runs), strict=True):
        assert b["step"] == a["step"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_nothing_waits_for_the_gpu(precision: str, tiny_config) -> None:
    options = {"precision": precision, "compile": False, "cuda_graph": False, "nonfinite": "skip"}
    settings = config_file.load(tiny_config(patches={"kind": "grid", "grid_sizes": [8, 16]}, train=options))
    settings.run.mkdir(parents=True)
    device = torch.device("cuda", 0)
    method = METHODS["cpn"](settings)
    method.network.to(device).train()
    optimizer = make_optimizer(method.network, settings.train, device)
    step = Step(method, optimizer, torch.Generator(device), settings.train, ALONE, device)
    labels = torch.ones(2, len(settings.classes), device=device)
    images, indices = torch.randn(2, 3, 64, 64, device=device), torch.arange(2, device=device)
    data = [Batch(images, None, labels, indices)]
    guard = GradientGuard(settings.run, ["x", "y"], "skip", ALONE)
    with Meter(settings, 2, guard, 0, 100) as meter:
        step(data)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(1, 4):
                set_rate(optimizer, 1 / number)
                meter.add(number, 0.1, step(data), data, ends_line=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        meter.read(3, wait=True)


def test_a_step_takes_what_the_quickest_of_several_took_but_the_first(tiny_config, monkeypatch) -> None:
    settings = config_file.load(tiny_config(**PLAIN))
    clock = iter([0.0, 1.0, 10.0, 19.0, 20.0, 22.0, 30.0, 35.0])  # 1, 9, 2 and 5 seconds
    monkeypatch.setattr("cpn_fast.training.batch_size.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert batch_size.try_steps(settings, METHODS["cam"], torch.device("cpu"), 2, 4) == 2


@pytest.mark.gpu
def test_auto_finds_a_batch_on_a_gpu(tiny_config) -> None:
    settings = config_file.load(tiny_config())
    assert batch_size.step_fits(settings, METHODS["cpn"], ALONE, 2)
    assert not batch_size.step_fits(settings, METHODS["cpn"], ALONE, 10**6)
