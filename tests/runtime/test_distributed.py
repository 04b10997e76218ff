from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from several_processes import run_in_processes

from cpn_fast import config_file
from cpn_fast.data.dataset import load_samples
from cpn_fast.data.masks import read_mask
from cpn_fast.data.seeds import Seed, read_seed, write_seed
from cpn_fast.models.deeplab import build_deeplab
from cpn_fast.models.weights import to_released_keys
from cpn_fast.pipelines import superpixels
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.refinement import crf
from cpn_fast.runtime import distributed, interrupts
from cpn_fast.runtime.distributed import Rank
from cpn_fast.runtime.errors import UserError
from cpn_fast.stages import cam, evaluate, refine, segment, train
from cpn_fast.training import checkpoint


@given(items=st.lists(st.integers()), world=st.integers(1, 9))
def test_every_item_is_in_exactly_one_share(items: list[int], world: int) -> None:
    places = [Rank(number, world, 0).share(range(len(items))) for number in range(world)]
    assert sorted(place for share in places for place in share) == list(range(len(items)))
    assert max(map(len, places)) - min(map(len, places)) <= 1


def test_alone_there_is_nothing_to_share() -> None:
    rank = distributed.join()
    assert rank.first
    assert rank.share([1, 2, 3]) == [1, 2, 3]
    assert rank.gather("x") == ["x"]
    assert rank.sum(np.array([1, 2])).tolist() == [1, 2]
    rank.wait()


@pytest.mark.parametrize(
    ("allowed", "limit", "processes", "cores"),
    [(8, "max 100000", 1, 8), (8, "250000 100000", 1, 3), (8, "max 100000", 2, 4), (2, "800000 100000", 4, 1)],
)
def test_cores_are_a_share_of_this_machine_s_or_container_s(
    allowed: int, limit: str, processes: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr(Path, "read_text", lambda path: {"/sys/fs/cgroup/cpu.max": limit}[str(path)])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))  # of this machine; others may have more
    assert Rank(number=0, world=2 * processes, local=0).cores == cores


def talk() -> tuple[list[str], list[int], bool]:
    rank = distributed.join()
    rank.wait()
    return rank.gather(f"from {rank.number}"), rank.sum(np.array([1, rank.number])).tolist(), rank.first


def test_processes_tell_each_other() -> None:
    expected = (["from 0", "from 1", "from 2"], [3, 3])
    assert run_in_processes(3, talk) == [(*expected, True), (*expected, False), (*expected, False)]


STAGES = ("superpixels", "seeds", "CRFs", "labels", "walks", "segmented")


def stages(path: Path, weights: Path, deeplab: Path) -> dict[str, list[str]]:
    """Run all stages except training, on the training list. Return this process's images in each stage."""
    settings = config_file.load(path)
    made: dict[str, list[str]] = {stage: [] for stage in STAGES}

    def record(stage, owner, name, ids):
        original = getattr(owner, name)

        def recorded(*arguments, **options):
            made[stage] += ids(*arguments)
            return original(*arguments, **options)

        setattr(owner, name, recorded)  # no undo: the process ends

    record("superpixels", superpixels, "_write", lambda _, image, *__: [image.stem])
    record("seeds", cam, "_write", lambda _, sample, *__: [sample.id])
    record("CRFs", refine, "write_label_maps", lambda samples, *_: [sample.id for sample in samples])
    record("labels", refine, "write_mask", lambda path, *_: [path.stem] if path.parent.name == "labels" else [])
    record("walks", refine, "_write_mask", lambda path, *_: [path.stem])
    record("segmented", segment, "_write", lambda _, sample, *__: [sample.id])
    vars(crf)["process_pool"] = ThreadPoolExecutor  # daemonic processes may not start processes
    names = settings.data.train_list
    samples = load_samples(settings.data, settings.classes, names, labels=False, masks=False)
    SuperpixelCache(settings.superpixel_cache, settings.superpixels).build(samples, workers=1)
    seeds = cam.run(settings, weights, names) / "seeds"
    refine.run(settings)
    masks = segment.segment(settings, deeplab, names) / "masks"
    evaluate.run(settings, cams=seeds, masks=None, list_path=names, threshold_from=None)
    evaluate.run(settings, cams=None, masks=masks, list_path=names, threshold_from=None)
    return made


def test_two_processes_share_every_stage(tiny_config, tmp_path) -> None:
    """No image is made twice, and the files equal one process's; AffinityNet's differ by rounding."""
    weights = train.run(config_file.load(tiny_config(train={"steps": 2})))
    small = {
        "cam": {"batch": 1},
        "crf": {"workers": 1},
        "affinity": {
            "augment": {"long_side": [64, 96], "crop": 64},
            "train": {"batch": 2, "steps": 1, "data_threads": 1},
        },
        "segment": {"scales": [1.0], "flip": False, "crf": None},
    }
    alone, together = (tiny_config(name=name, out=str(tmp_path / name), **small) for name in ("alone", "together"))
    deeplab = tmp_path / "deeplab.safetensors"
    save_file(to_released_keys(build_deeplab(config_file.load(alone)).state_dict()), deeplab)
    (expected,) = run_in_processes(1, stages, alone, weights, deeplab)
    parts = run_in_processes(2, stages, together, weights, deeplab)
    for stage in STAGES:
        assert sorted(parts[0][stage] + parts[1][stage]) == sorted(expected[stage]), stage
        assert {*parts[0][stage]}.isdisjoint(parts[1][stage]), stage
        assert len({*expected[stage]}) == 12, stage
        assert min(len(part[stage]) for part in parts) > 0, stage

    seeds = sorted((tmp_path / "alone").rglob("*.npz"))
    assert len(seeds) == 12
    for path in seeds:
        a, b = (read_seed(Path(str(path).replace("alone", name))) for name in ("alone", "together"))
        assert np.array_equal(a.cam, b.cam)
        assert np.array_equal(a.classes, b.classes)
    for path in (tmp_path / "alone").rglob("*.png"):
        one, two = (np.asarray(Image.open(str(path).replace("alone", name))) for name in ("alone", "together"))
        assert np.mean(one == two) > (0.99 if "refine/masks" in str(path) else 0.9999), path
    found = []
    for name in ("alone", "together"):
        scores = [json.loads(path.read_text()) for path in sorted((tmp_path / name).rglob("evaluation.json"))]
        assert len(scores) == 2
        found.append(
            [{key: value for key, value in own.items() if key not in ("source", "checksum")} for own in scores]
        )
    assert found[0] == found[1]


def score_with_a_seed_missing(path: Path, seeds: Path) -> None:
    settings = config_file.load(path)
    with pytest.raises(UserError, match="1 files missing"):
        evaluate.run(settings, cams=seeds, masks=None, list_path=settings.data.train_list, threshold_from=None)


def test_a_problem_of_one_process_is_told_by_all(tiny_config, tmp_path) -> None:
    path = tiny_config()
    settings = config_file.load(path)
    samples = load_samples(settings.data, settings.classes, settings.data.train_list, labels=False, masks=True)
    for sample in samples[1:]:
        height, width = read_mask(sample.mask).shape
        write_seed(tmp_path / f"{sample.id}.npz", Seed(np.array([0]), np.zeros((1, height, width), np.float32)))
    run_in_processes(2, score_with_a_seed_missing, path, tmp_path)


TRAINING = {"batch": 4, "steps": 4, "log_every": 1, "checkpoint_every": 2}


def weights_after(path: Path) -> dict[str, np.ndarray]:
    return load_file(train.run(config_file.load(path)))


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compare within the stated tolerance: 1e-3 of each array's norm, because sums over fewer images round differently.

    Most differ by 1e-6. Rounding may put a pixel on the other side of a ReLU or an arg-max. That moves a bias, which
    consists of a few updates, by about 1e-4.
    """
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(found[name] - array) <= 1e-3 * np.linalg.norm(array), name


@pytest.mark.parametrize("world", [2, 4])
def test_processes_train_as_one_and_another_number_continues(world: int, tiny_config) -> None:
    """It holds with dropout and hidden patches, on CPN's whole loss."""
    expected = weights_after(tiny_config(name="one", train=TRAINING))
    path = tiny_config(name="many", train=TRAINING)
    for found in run_in_processes(world, weights_after, path):
        assert_close(found, expected)
    folders = [config_file.load(path.with_name(f"{name}.yaml")).run for name in ("one", "many")]
    one, many = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in folders)
    assert [line["step"] for line in many] == [1, 2, 3, 4]
    for a, b in zip(one, many, strict=True):
        assert {key: b[key] for key in ("loss", "tcp", "cpcr")} == pytest.approx(
            {key: a[key] for key in ("loss", "tcp", "cpcr")}, rel=1e-3
        )

    (folders[1] / "model.safetensors").unlink()
    newest, before = checkpoint.existing(folders[1] / "checkpoints")
    assert before.stem == "step-00000002"
    newest.unlink()
    assert_close(weights_after(path), expected)


def checked_before_training(path: Path, masks: Path) -> list[int]:
    """Return how many images and masks this process decodes before it trains the segmenter."""
    checked: list[int] = []
    vars(segment)["check_files"] = lambda samples, **_: checked.append(len(samples))
    vars(train)["fit"] = lambda settings, *_, **__: settings.run  # no undo: the process ends
    segment.run(config_file.load(path), masks)
    return checked


def test_only_the_first_process_decodes_the_segmenter_s_masks(tiny_config, small_voc) -> None:
    path = tiny_config(segment={"train": {"batch": 2}})
    assert run_in_processes(2, checked_before_training, path, small_voc / "SegmentationClass") == [[12], []]


UNTRAINED: dict[str, dict[str, Any]] = {
    "cpn": {"loss": {"tcp_refined": 0, "cpcr": 0, "background_suppression": 0}},
    "seam": {"method": "seam", "loss": {"background_suppression": 0}, "seam": {"ecr": 0}},
}


@pytest.mark.parametrize("method", UNTRAINED)
def test_processes_do_not_wait_for_gradients_that_no_loss_gives(method: str, tiny_config) -> None:
    """Without its terms the refinement is not trained, and its weights stay as they are at the start."""
    expected = weights_after(tiny_config(name="one", train=TRAINING, **UNTRAINED[method]))
    for found in run_in_processes(2, weights_after, tiny_config(name="many", train=TRAINING, **UNTRAINED[method])):
        assert_close(found, expected)


def test_a_batch_must_be_shared_equally(tiny_config, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "join", lambda: Rank(0, 3, 0))
    with pytest.raises(UserError, match="multiple of torchrun's 3"):
        train.run(config_file.load(tiny_config(train=TRAINING)))


def test_processes_that_start_again_and_do_not_meet_are_told_why(monkeypatch) -> None:
    def refused(*_, **__):
        raise RuntimeError("Connection refused")

    monkeypatch.setattr(distributed, "_store", refused)
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"})
    with pytest.raises(RuntimeError, match="Connection refused"):
        distributed.join.__wrapped__()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    with pytest.raises(UserError, match=r"Connection refused.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed.join.__wrapped__()


@pytest.mark.parametrize(("number", "missing"), [(0, 1), (1, 0)])
def test_who_is_missing_at_the_meeting_is_said(number: int, missing: int, monkeypatch, capfd) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=1.5))
    monkeypatch.setattr(distributed, "SAID_AFTER", 0.2)
    names = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=rf"still waiting for process {missing} of 2.*127\.0\.0\.1:{port}"):
        distributed.join.__wrapped__()
    assert f"Waiting for process {missing} of 2" in capfd.readouterr().err


def test_a_signal_ends_the_meeting_at_once(monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(interrupts.Stopped), interrupts.acted_on():
        distributed.join.__wrapped__()


def test_processes_without_a_place_to_meet_are_told(monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT"):
        distributed.join.__wrapped__()


LOSING = """
import os, signal
from pathlib import Path
from typing import Any
from cpn_fast import cli
from cpn_fast.stages import train

class Losing(train.GradientGuard):
    def passes(self, step, *others):
        if step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            Path(__file__).with_name("lost").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().passes(step, *others)

train.GradientGuard = Losing
cli.main()
"""


def test_torchrun_starts_again_after_a_lost_worker(tiny_config, tmp_path) -> None:
    """The second of two processes is killed in the third step. The run ends as if this had not happened."""
    expected = weights_after(tiny_config(name="one", train=TRAINING))
    path = tiny_config(name="many", train=TRAINING)
    script = tmp_path / "losing.py"
    script.write_text(LOSING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--max-restarts=1", str(script), "train", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "lost").exists()  # torchrun may name the other process, which ended because of this one
    assert done.stdout.count("Weights are in") == 1  # only the first process prints
    run = config_file.load(path).run
    assert_close(load_file(run / "model.safetensors"), expected)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``cpn-fast ARGUMENTS`` in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = [*command, "-m", "cpn_fast", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, timeout=300, env=environment, check=False)


def last_said(done: subprocess.CompletedProcess[str]) -> str:
    """Return torchrun's traceback of the first process that failed. It is the last output."""
    before, _, end = done.stderr.strip().rpartition("\n====")
    assert set(end) == {"="}, done.stderr
    return before.rpartition("\n  traceback : ")[2]


def test_the_error_of_all_processes_is_the_last_that_torchrun_says(tiny_config) -> None:
    path = str(tiny_config())
    done = torchrun("train", path, "--set", "train.steeps=4")
    assert done.returncode == 1
    assert last_said(done) == f"Error: {path}: 1 problem(s)\n    train.steeps: unknown key; did you mean steps?"


def test_the_error_of_one_process_is_the_last_that_torchrun_says(tiny_config, small_voc, tmp_path) -> None:
    """Only the first process decodes images before training. The other one loses it and prints no traceback."""
    data = shutil.copytree(small_voc, tmp_path / "voc")
    (data / "JPEGImages/train_0003.jpg").write_bytes(b"no image")
    done = torchrun("train", str(tiny_config(data={"root": str(data)})))
    assert "train_0003.jpg" in last_said(done)
    assert last_said(done).startswith("Error: ")
    assert "[rank1]" not in done.stderr
    assert done.stderr.count("Traceback") == 1  # from torchrun


@pytest.mark.parametrize("culprit", [0, 1])
def test_who_ends_for_another_is_not_taken_for_the_cause(culprit: int, tmp_path, monkeypatch) -> None:
    """This holds even within one second, torchrun's resolution. A process that torchrun ended has no file."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    for third_is_told in (True, False):
        failures = {}
        for number in (0, 1, 2):
            path = tmp_path / f"{number}-{third_is_told}.json"
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
            if number < 2 or third_is_told:
                distributed.tell_torchrun(f"process {number}: 5 $", cause=number == culprit)
            failures[number] = ProcessFailure(number, 7, 1, str(path))
        error = ChildFailedError("cpn_fast", failures)
        assert error.get_first_failure()[0] == culprit
        assert str(error).rstrip("=\n").endswith(f"process {culprit}: 5 $")


def test_ranks_left_over_from_a_job_do_not_count(monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "1", "LOCAL_RANK": "1"})
    assert distributed.announced() == (0, 1, 0)
    monkeypatch.setattr(os, "environ", {"RANK": "1", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "64"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(Path, "read_text", lambda _: "max 100000")
    assert distributed.announced().first
    assert distributed.announced().cores == 2


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}]
)
def test_what_is_no_rank_is_said(environment: dict[str, str], monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(UserError, match=rf"WORLD_SIZE={environment['WORLD_SIZE']},.* Start with torchrun"):
        distributed.announced()


def test_a_lost_process_is_told_from_other_errors(monkeypatch) -> None:
    lost = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:39661")
    assert not distributed.lost_another(lost)  # a single process has no other
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.lost_another(lost)
    assert distributed.lost_another(torch.distributed.DistNetworkError("connection was likely closed"))
    assert not distributed.lost_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not distributed.lost_another(ValueError("gloo has no peer"))
