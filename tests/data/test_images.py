from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cpn_fast.data.images import FORMATS, read_image
from cpn_fast.pipelines.decode import image_size

TURNS: dict[int, Any] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: np.rot90,
}
"""EXIF's orientation -> what turns the stored pixels upright."""
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
    "compressed TIFF": {"compression": "tiff_lzw"},
}


def picture() -> np.ndarray:
    """Return smooth coloured blobs, uint8 (40, 60, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((60, 40), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("form", [*FORMATS, "compressed TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_an_image_is_turned_upright_and_so_is_its_size(orientation: int, form: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x"
    Image.fromarray(picture()).save(path, form.split()[-1], exif=exif, **OPTIONS.get(form, {}))
    expected = TURNS[orientation](picture())
    found = read_image(path)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (12 if form == "JPEG" else 0)
    assert image_size(path) == found.shape[:2]


@pytest.mark.parametrize("transparency", [b"\x00\x80", 1])
def test_a_palette_s_transparency_is_dropped_without_a_warning(transparency: bytes | int, tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) % 4).convert("P")
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 99, 199]], np.uint8)
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "x.png", transparency=transparency)
    code = (
        "import pathlib; from cpn_fast.data.images import read_image; print(read_image(pathlib.Path('x.png')).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() == str(colours[np.arange(16).reshape(4, 4) % 4].tolist())
