from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cpn_fast.data.seeds import Seed, export_seeds, read_seed, unit_scale, write_seed
from cpn_fast.runtime.errors import UserError


def some_seed(*classes: int, height: int = 9, width: int = 14) -> Seed:
    cam = np.random.default_rng(len(classes)).random((len(classes), height, width), np.float32)
    return Seed(np.array(classes, np.int64), cam)


@pytest.mark.parametrize("classes", [(), (0,), (3, 19), (0, 254)])
def test_a_seed_comes_back_within_the_stated_error(tmp_path: Path, classes: tuple[int, ...]) -> None:
    seed = some_seed(*classes)
    write_seed(tmp_path / "a.npz", seed)
    back = read_seed(tmp_path / "a.npz")
    assert back.classes.tolist() == list(classes)
    assert back.classes.dtype == np.int64
    assert back.cam.dtype == np.float32
    np.testing.assert_allclose(back.cam, seed.cam, rtol=0, atol=1 / 131070 + 1e-7)


def test_zero_and_one_are_exact_and_a_second_round_trip_changes_nothing(tmp_path: Path) -> None:
    cam = np.array([[[0, 1, 0.5, 1e-7]]], np.float32)
    write_seed(tmp_path / "a.npz", Seed(np.array([2]), cam))
    once = read_seed(tmp_path / "a.npz")
    write_seed(tmp_path / "b.npz", once)
    assert once.cam[0, 0, :2].tolist() == [0, 1]
    np.testing.assert_array_equal(read_seed(tmp_path / "b.npz").cam, once.cam)


@pytest.mark.parametrize(
    "seed",
    [
        Seed(np.array([1]), np.zeros((2, 3, 3), np.float32)),
        Seed(np.array([1]), np.zeros((3, 3), np.float32)),
        Seed(np.array([2, 1]), np.zeros((2, 3, 3), np.float32)),
        Seed(np.array([1, 1]), np.zeros((2, 3, 3), np.float32)),
        Seed(np.array([-1]), np.zeros((1, 3, 3), np.float32)),
        Seed(np.array([255]), np.zeros((1, 3, 3), np.float32)),
        Seed(np.array([1]), np.full((1, 3, 3), 1.01, np.float32)),
        Seed(np.array([1]), np.full((1, 3, 3), -0.01, np.float32)),
        Seed(np.array([1]), np.full((1, 3, 3), np.nan, np.float32)),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, seed: Seed) -> None:
    with pytest.raises(ValueError, match=r"a\.npz"):
        write_seed(tmp_path / "a.npz", seed)
    assert not list(tmp_path.iterdir())


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def foreign_files(folder: Path) -> list[Path]:
    write_seed(folder / "good.npz", some_seed(1))
    content = (folder / "good.npz").read_bytes()
    (folder / "empty.npz").write_bytes(b"")
    (folder / "cut.npz").write_bytes(content[: len(content) // 2])
    (folder / "text.npz").write_text("not a zip file")
    (folder / "pickle.npz").write_bytes(pickle.dumps({"classes": [1]}))
    np.savez(folder / "keys.npz", cam=np.zeros((1, 2, 2), np.uint16))
    np.savez(folder / "dtype.npz", classes=np.zeros(1, np.uint8), cam=np.zeros((1, 2, 2), np.float32))
    np.savez(folder / "shape.npz", classes=np.zeros(2, np.uint8), cam=np.zeros((1, 2, 2), np.uint16))
    np.savez(folder / "order.npz", classes=np.array([2, 1], np.uint8), cam=np.zeros((2, 2, 2), np.uint16))
    np.savez(folder / "objects.npz", classes=np.array([Bomb()]), cam=np.zeros((1, 2, 2), np.uint16))
    with (folder / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with zipfile.ZipFile(folder / "members.npz", "w") as archive:
        archive.writestr("classes.npy", b"x")
        archive.writestr("cam.npy", b"y")
    flipped = bytearray(content)
    flipped[content.index(b"cam.npy") + 60] ^= 0xFF
    (folder / "flipped.npz").write_bytes(flipped)
    return sorted(set(folder.glob("*.npz")) - {folder / "good.npz"})


def test_damaged_and_foreign_files_are_user_errors_and_nothing_in_them_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = foreign_files(tmp_path)
    assert len(files) == 12
    for path in files:
        with pytest.raises(UserError, match=rf"{path.name}.*cpn-fast cam"):
            read_seed(path)
    assert not Path("exploded").exists()


def test_any_single_damaged_byte_gives_a_seed_or_a_user_error(tmp_path: Path) -> None:
    write_seed(tmp_path / "a.npz", some_seed(1, 4, height=3, width=3))
    content = (tmp_path / "a.npz").read_bytes()
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x5A
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            read_seed(tmp_path / "b.npz")
        except UserError:
            refused += 1
    assert refused > len(content) / 2


def test_a_missing_seed_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such seed.*cpn-fast cam"):
        read_seed(tmp_path / "a.npz")


def test_mask_takes_the_best_class_above_the_threshold_and_the_lower_of_equals() -> None:
    cam = np.array([[[0.3, 0.2, 0.9, 0.9]], [[0.1, 0.4, 0.9, 0.95]]], np.float32)
    seed = Seed(np.array([4, 7]), cam)
    assert seed.mask(0.3).tolist() == [[0, 8, 5, 8]]
    assert seed.mask(0.3).dtype == np.uint8
    assert some_seed(height=2, width=3).mask(0).tolist() == [[0, 0, 0], [0, 0, 0]]


def released_unit_scale(cam: np.ndarray) -> np.ndarray:
    """Compute the unit scale step by step as CPN's infer_cam.py."""
    cam = cam.copy()
    cam[cam < 0] = 0
    high = cam.max((1, 2), keepdims=True)
    low = cam.min((1, 2), keepdims=True)
    cam[cam < low + 1e-5] = 0
    return (cam - low - 1e-5) / (high - low + 1e-5)


@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
        elements=st.floats(-2, 50, width=32),
    )
)
def test_unit_scale_is_the_released_rule_with_negatives_at_zero(cam: np.ndarray) -> None:
    scaled = unit_scale(torch.from_numpy(cam)).numpy()
    np.testing.assert_allclose(scaled, released_unit_scale(cam.astype(np.float64)).clip(0), atol=3e-5)
    assert scaled.min() >= 0
    assert scaled.max() <= 1


def test_constant_maps_and_no_maps_scale_to_background() -> None:
    assert unit_scale(torch.full((2, 3, 4), 7.0)).abs().max() == 0
    assert unit_scale(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


def exported(folder: Path, form: str) -> dict[object, object]:
    export_seeds(folder, folder / form, form)
    item: dict[object, object] = np.load(folder / form / "2007_000032.npy", allow_pickle=True).item()
    return item


def test_cpn_and_seam_forms_are_dicts_by_class_halved_and_not(tmp_path: Path) -> None:
    write_seed(tmp_path / "2007_000032.npz", some_seed(0, 14))
    seed = read_seed(tmp_path / "2007_000032.npz")
    for form, factor in (("cpn", 0.5), ("seam", 1)):
        maps = exported(tmp_path, form)
        assert list(maps) == [0, 14]
        assert all(type(key) is int for key in maps)
        for plane, own in zip(maps.values(), seed.cam, strict=True):
            assert isinstance(plane, np.ndarray)
            assert plane.dtype == np.float32
            np.testing.assert_array_equal(plane, own * np.float32(factor))


@pytest.mark.parametrize(("height", "width", "low"), [(9, 14, (3, 4)), (8, 12, (2, 3)), (375, 500, (94, 125))])
def test_irn_form_has_keys_a_stride_4_cam_and_the_full_one(
    tmp_path: Path, height: int, width: int, low: tuple[int, int]
) -> None:
    ramp = np.linspace(0, 0.8, width, dtype=np.float32)
    write_seed(tmp_path / "2007_000032.npz", Seed(np.array([5]), np.broadcast_to(ramp, (1, height, width))))
    form = exported(tmp_path, "irn")
    keys, cam, high = form["keys"], form["cam"], form["high_res"]
    assert isinstance(keys, torch.Tensor)
    assert isinstance(cam, torch.Tensor)
    assert isinstance(high, np.ndarray)
    assert keys.tolist() == [5]
    assert keys.dtype == torch.int64
    assert cam.shape == (1, *low)
    assert high.shape == (1, height, width)
    assert high.max() == pytest.approx(0.8 / (0.8 + 1e-5), abs=1e-6)
    assert (cam.diff(dim=2) > 0).all()


@pytest.mark.parametrize("form", ["cpn", "seam", "irn"])
def test_an_image_without_classes_is_exported_too(tmp_path: Path, form: str) -> None:
    write_seed(tmp_path / "2007_000032.npz", some_seed())
    content = exported(tmp_path, form)
    if form == "irn":
        assert [tuple(content[key].shape) for key in ("keys", "cam", "high_res")] == [(0,), (0, 3, 4), (0, 9, 14)]  # type: ignore[attr-defined]
    else:
        assert content == {}


def test_export_removes_what_a_killed_one_left_half_written(tmp_path: Path) -> None:
    write_seed(tmp_path / "seeds/a/1.npz", some_seed())
    (tmp_path / "out/a").mkdir(parents=True)
    for left in ("out/.0.npy.cpn-fast.tmp", "out/a/.2.npy.cpn-fast.tmp"):
        (tmp_path / left).touch()
    assert export_seeds(tmp_path / "seeds", tmp_path / "out", "cpn") == 1
    assert sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file()) == ["1.npy", "made_by.json"]


def test_export_keeps_arrays_of_other_programs(tmp_path: Path) -> None:
    write_seed(tmp_path / "seeds/1.npz", some_seed())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/1.npy").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds 1\.npy, but no made_by\.json"):
        export_seeds(tmp_path / "seeds", tmp_path / "out", "cpn")
    assert (tmp_path / "out/1.npy").read_bytes() == b"mine"


def test_export_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no CAM seeds"):
        export_seeds(tmp_path, tmp_path / "out", "cpn")
    with pytest.raises(UserError, match=r"'sem'.*cpn, seam, irn"):
        export_seeds(tmp_path, tmp_path / "out", "sem")


def test_seeds_are_plain_npz_for_other_programs(tmp_path: Path) -> None:
    write_seed(tmp_path / "a.npz", Seed(np.array([3]), np.full((1, 2, 2), 0.25, np.float32)))
    with np.load(io.BytesIO((tmp_path / "a.npz").read_bytes())) as arrays:
        assert arrays["classes"].tolist() == [3]
        assert (arrays["cam"] / 65535).round(4).tolist() == [[[0.25, 0.25], [0.25, 0.25]]]
