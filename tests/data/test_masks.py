from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from cpn_fast.data.dataset import Sample
from cpn_fast.data.masks import IGNORE, PALETTE, read_mask, write_mask
from cpn_fast.data.pictures import FONT, GAP, LINE, GalleryRow, cam_overlay, gallery, overlay, tinted, write_gallery
from cpn_fast.data.png import can_be_kept, source_of
from cpn_fast.data.seeds import Seed, write_seed
from cpn_fast.runtime.errors import UserError

EVERY_VALUE = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_palette_is_vocs() -> None:
    known = {0: (0, 0, 0), 1: (128, 0, 0), 7: (128, 128, 128), 15: (192, 128, 128), 20: (0, 64, 128)}
    for value, colour in known.items():
        assert tuple(PALETTE[value]) == colour
    assert tuple(PALETTE[IGNORE]) == (224, 224, 192)
    assert len(np.unique(PALETTE, axis=0)) == 256


def test_every_value_survives_writing_and_reading(tmp_path: Path) -> None:
    write_mask(tmp_path / "a.png", EVERY_VALUE)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), EVERY_VALUE)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture.convert("RGB")), PALETTE[EVERY_VALUE])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@given(mask=npst.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_any_mask_survives(tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray) -> None:
    path = tmp_path_factory.getbasetemp() / "any.png"
    write_mask(path, mask)
    np.testing.assert_array_equal(read_mask(path), mask)


@pytest.mark.parametrize("mask", [np.zeros((2, 2), np.int64), np.zeros((2, 2, 3), np.uint8)])
def test_only_uint8_planes_are_written(tmp_path: Path, mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a mask is uint8"):
        write_mask(tmp_path / "a.png", mask)


def test_gray_rgb_and_small_palette_pngs_are_read_by_value(tmp_path: Path) -> None:
    Image.fromarray(EVERY_VALUE).save(tmp_path / "gray.png")
    Image.fromarray(PALETTE[EVERY_VALUE]).save(tmp_path / "rgb.png")
    few = EVERY_VALUE % 3
    picture = Image.fromarray(few)
    picture.putpalette(bytes([9, 9, 9, 5, 5, 5, 1, 2, 3]))
    picture.save(tmp_path / "two_bits.png", bits=2)
    np.testing.assert_array_equal(read_mask(tmp_path / "gray.png"), EVERY_VALUE)
    np.testing.assert_array_equal(read_mask(tmp_path / "rgb.png"), EVERY_VALUE)
    np.testing.assert_array_equal(read_mask(tmp_path / "two_bits.png"), few)


def png(bits: int, colour_type: int, rows: list[bytes], width: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x50"), (2, b"\x1b"), (4, b"\x01\x23")])
def test_gray_levels_of_other_depths_are_refused_because_they_would_be_stretched(
    tmp_path: Path, bits: int, row: bytes
) -> None:
    (tmp_path / "a.png").write_bytes(png(bits, 0, [row, row], 4))
    with pytest.raises(UserError, match=r"a\.png: .*8-bit grayscale"):
        read_mask(tmp_path / "a.png")


def test_16_bits_are_read_exactly_or_refused(tmp_path: Path) -> None:
    Image.fromarray(EVERY_VALUE.astype(np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), EVERY_VALUE)
    Image.fromarray(EVERY_VALUE.astype(np.uint16) + 1).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a 16-bit mask with the value 256, expected 0 to 254 for classes and 255"):
        read_mask(tmp_path / "a.png")


def test_masks_whose_values_cannot_be_told_are_refused(tmp_path: Path) -> None:
    image = PALETTE[EVERY_VALUE].copy()
    image[3, 4] = (1, 2, 3)
    Image.fromarray(image).save(tmp_path / "rgb.png")
    with pytest.raises(UserError, match=r"rgb\.png: .* 1 pixels .*\(1, 2, 3\).*palette"):
        read_mask(tmp_path / "rgb.png")
    Image.fromarray(EVERY_VALUE).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"must be PNG, found JPEG"):
        read_mask(tmp_path / "a.jpg")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "rgba.png")
    with pytest.raises(UserError, match=r"mode RGBA"):
        read_mask(tmp_path / "rgba.png")
    with pytest.raises(UserError, match=r"no such mask"):
        read_mask(tmp_path / "missing.png")
    write_mask(tmp_path / "b.png", EVERY_VALUE)
    content = (tmp_path / "b.png").read_bytes()
    for name, damaged in (("cut.png", content[:-40]), ("text.png", b"text")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}: not readable as a PNG"):
            read_mask(tmp_path / name)


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_tinted_leaves_the_background_alone_and_colours_regions_by_class() -> None:
    image, mask = photo(20, 20), np.zeros((20, 20), np.uint8)
    np.testing.assert_array_equal(tinted(image, mask), image)
    mask[5:15, 5:15] = 2
    picture = tinted(image, mask)
    np.testing.assert_array_equal(picture[:4], image[:4])
    assert (picture[4, 5:15] == 255).all()  # the outline
    red, green, blue = picture[5:15, 5:15].reshape(-1, 3).mean(0)
    assert green > red + 60
    assert abs(red - blue) < 1


def test_no_outline_is_drawn_at_ignored_pixels() -> None:
    mask = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = IGNORE
    mask[3:6, 3:6] = 1
    image = np.zeros((9, 9, 3), np.uint8)
    assert not (tinted(image, mask) == 255).any()


@pytest.mark.parametrize(("height", "width"), [(3000, 10), (60_000, 1), (1, 60_000), (1, 1)])
def test_overlay_of_a_thin_image_is_one_that_jpeg_can_hold(height: int, width: int) -> None:
    picture = overlay(photo(height, width), np.ones((height, width), np.uint8), ["cat"])
    assert max(picture.shape) <= 16_384 + LINE
    assert picture.shape[1] >= min(240, 16_384)
    assert cv2.imencode(".jpg", picture)[0]


def test_overlay_has_a_legend_that_wraps_and_room_for_it() -> None:
    mask = np.zeros((30, 300), np.uint8)
    one = overlay(photo(30, 300), np.where(mask == 0, 1, mask).astype(np.uint8), ["cat"])
    assert one.shape == (30 + LINE, 300, 3)
    mask[:, :20] = np.arange(1, 21)
    many = overlay(photo(30, 300), mask, [f"a name that fills more than half a line {k}" for k in range(20)])
    assert many.shape == (30 + 20 * LINE, 300, 3)
    tiny = overlay(photo(10, 60), np.ones((10, 60), np.uint8), ["cat"])
    assert tiny.shape == (40 + LINE, 240, 3)
    assert one.dtype == many.dtype == tiny.dtype == np.uint8


def test_a_mask_value_without_a_name_is_shown_by_its_number() -> None:
    mask = np.full((10, 240), 9, np.uint8)
    named = overlay(photo(10, 240), mask, [f"value {k}" for k in range(1, 10)])
    np.testing.assert_array_equal(overlay(photo(10, 240), mask, ["cat"]), named)
    assert not np.array_equal(overlay(photo(10, 240), mask, ["cat"] * 9), named)


def test_heat_map_shows_the_image_where_the_cam_is_zero_and_red_where_it_is_one() -> None:
    image = np.full((4, 8, 3), 100, np.uint8)
    cam = np.linspace(0, 0.9, 8, dtype=np.float32)[None].repeat(4, 0)
    picture = cam_overlay(image, cam)
    assert (picture[:, 0] == 100).all()
    red, green, blue = picture[0, -1].astype(int)
    assert red > green > blue


def test_gallery_fits_pictures_of_any_shape_into_its_cells() -> None:
    rows = [
        GalleryRow("wide", [1], {"image": photo(10, 50), "mask": photo(10, 50)}),
        GalleryRow("high", [], {"image": photo(500, 3)}),
        GalleryRow("", [], {"other": photo(1, 1)}),
    ]
    sheet = gallery(rows, ["cat"], cell=(60, 40))
    assert sheet.shape == (LINE + 3 * (LINE + GAP) + 12 + 40 + 40, GAP + 3 * (60 + GAP), 3)
    assert sheet.dtype == np.uint8
    first = sheet[2 * LINE : 2 * LINE + 12]
    assert (first[:, GAP : GAP + 60] < 255).any()
    assert (first[:, GAP + 2 * (60 + GAP) :] == 255).all()  # a cell that the row lacks


def test_titles_are_drawn() -> None:
    assert FONT.getlength("aeroplane") > 30
    rows = [GalleryRow(title, [], {"image": photo(8, 8)}) for title in ("", "a title")]
    blank, titled = (gallery([row], [])[LINE : 2 * LINE] for row in rows)
    assert (blank == 255).all()
    assert (titled < 128).any()


def test_write_gallery_puts_runs_beside_the_truth(tmp_path: Path) -> None:
    image = photo(30, 40)
    Image.fromarray(image).save(tmp_path / "a.png")
    truth = np.zeros((30, 40), np.uint8)
    truth[:, 20:] = 1
    write_mask(tmp_path / "truth.png", truth)
    write_seed(tmp_path / "run/seeds/a.npz", Seed(np.array([0]), truth[None].astype(np.float32)))
    write_mask(tmp_path / "run/masks/a.png", 2 * truth)
    write_mask(tmp_path / "run/masks/b.png", 0 * truth)
    write_seed(tmp_path / "run/seeds/b.npz", Seed(np.zeros(0, np.int64), np.zeros((0, 30, 40), np.float32)))
    samples = [Sample(name, tmp_path / "a.png", tmp_path / "truth.png", None) for name in "ab"]
    write_mask(tmp_path / "others/a.png", truth)
    write_mask(tmp_path / "others/b.png", 2 * truth)
    masks = {"segmenter": tmp_path / "others"}
    write_gallery(tmp_path / "sheet.png", samples, {"CPN": tmp_path / "run"}, masks, ["cat", "dog"], cell=(60, 40))
    pictures = {
        "image": image,
        "ground truth": tinted(image, truth),
        "CPN: heat": cam_overlay(image, truth.astype(np.float32)),
        "CPN: mask": tinted(image, 2 * truth),
        "segmenter": tinted(image, truth),
    }
    plain = pictures | {"CPN: heat": image, "CPN: mask": image, "segmenter": tinted(image, 2 * truth)}
    rows = [GalleryRow("a", [1, 2], pictures), GalleryRow("b", [1, 2], plain)]
    expected = gallery(rows, ["cat", "dog"], cell=(60, 40))
    with Image.open(tmp_path / "sheet.png") as picture:
        np.testing.assert_array_equal(np.array(picture), expected)


def test_a_flipped_bit_of_pixels_is_found(tmp_path) -> None:
    """Pillow checks no checksum of the pixels' chunks."""
    path = tmp_path / "a.png"
    write_mask(path, EVERY_VALUE, "made of this")
    content = path.read_bytes()
    assert source_of(content) == "made of this"
    assert can_be_kept(path, "made of this")
    assert not can_be_kept(path, "made of that")
    at = content.index(b"IDAT") + 8
    path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
    with pytest.raises(UserError, match=r"a\.png: not readable as a PNG"):
        read_mask(path)
    assert not can_be_kept(path, "made of this")
