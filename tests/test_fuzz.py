from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fuzz import EXTREMES, READERS, attempt, spoilt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", READERS)
def test_sound_files_are_read(name: str, tmp_path: Path) -> None:
    assert attempt(READERS[name], READERS[name].valid, tmp_path)


@pytest.mark.parametrize("name", READERS)
@given(rng=st.randoms(use_true_random=False), other=st.sampled_from(sorted(READERS)))
@settings(max_examples=120, suppress_health_check=list(HealthCheck))
def test_a_reader_gives_a_valid_value_or_a_user_error(
    name: str, tmp_path: Path, rng: random.Random, other: str
) -> None:
    """fuzz.py does the same for as long as you like."""
    attempt(READERS[name], spoilt(READERS[name].valid, READERS[other].valid, rng), tmp_path)


def with_every_extreme(content: bytes) -> list[bytes]:
    """Return copies of a small file with a huge number at every position."""
    width = 8
    return [
        content[:at] + struct.pack("<Q", number)[:size] + content[at + size :]
        for at in range(len(content) - width)
        for number in EXTREMES[-4:]
        for size in (4, 8)
    ]


PICKLE = READERS["npy"].valid[:128]
CLAIMS = {
    "params": with_every_extreme(READERS["params"].valid),
    "npy": [
        PICKLE + b"\x80\x04" + opcode + struct.pack("<Q", number)[:size] + b"x"
        for opcode, size in ((b"\x8e", 8), (b"\x8d", 8), (b"\x96", 8), (b"\x95", 8), (b"B", 4), (b"Nr", 4), (b"X", 4))
        for number in (2**31 - 1, 2**33, 2**60)
    ],
}


@pytest.mark.parametrize("name", CLAIMS)
def test_nothing_is_reserved_for_what_a_small_file_claims(name: str, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for content in CLAIMS[name]:
            attempt(READERS[name], content, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**24


def test_a_seed_that_would_unfold_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has a thousandth of the zeros' bytes."""
    monkeypatch.setattr("cpn_fast.data.seeds.LARGEST", 2**20)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, classes=np.zeros(1, np.uint8), cam=np.zeros((1, 1024, 1024), np.uint16))
    assert not attempt(READERS["seed"], path.read_bytes(), tmp_path)
