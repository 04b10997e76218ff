"""Input of image files to a DALI graph, and output as tensors."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import ExifTags, Image
from torch import Tensor

from cpn_fast.data.images import UnreadableImage, opened, orientation, upright, upright_size
from cpn_fast.runtime import reading

APP1, START_OF_SCAN = b"\xff\xe1", b"\xff\xda"
"""Markers of a JPEG's segments."""


class Encoded(NamedTuple):
    """A file's bytes, and the size of its image after EXIF rotation."""

    data: np.ndarray
    """uint8 (bytes,)."""
    height: int
    width: int


def read_encoded(path: Path, content: bytes | None = None) -> Encoded:
    """Read an image for ``decode``: a file, or its ``content``; then ``path`` is only for errors.

    RGB and gray JPEGs stay encoded: DALI turns them upright and, on the CPU, gives Pillow's pixels. Pillow decodes all
    other images (CMYK, PNG), which become raw RGB. Raises UserError for a missing or unreadable file.

    DALI reads the orientation in its own way: it does not know XMP, and takes another of several EXIF segments than
    Pillow. So a JPEG with metadata gets the orientation that Pillow finds as its only metadata.
    """
    try:
        content = reading.read_bytes(path, reading.IMAGE) if content is None else content
    except OSError as error:
        raise UnreadableImage(path, str(error)) from None
    with opened(path, io.BytesIO(content)) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            jpeg = _with_orientation(content, orientation(image))
            return Encoded(np.frombuffer(jpeg, np.uint8), *upright_size(image))
        pixels = upright(image)
    height, width, _ = pixels.shape
    ppm = b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()
    return Encoded(np.frombuffer(ppm, np.uint8), height, width)


def image_size(path: Path) -> tuple[int, int]:
    """Read height and width after EXIF rotation from an image's header. Raises UserError as ``read_encoded``."""
    with opened(path) as image:
        return upright_size(image)


def decode(encoded: Any, device: torch.device) -> Any:
    """Return a DALI node of uint8 RGB (H, W, 3), upright, on ``device``, for a node of encoded images."""
    backend = "mixed" if device.type == "cuda" else "cpu"
    return fn.decoders.image(encoded, device=backend, output_type=types.RGB, jpeg_fancy_upsampling=True)


def device_id(device: torch.device) -> int | None:
    """Return DALI's id of a device: the GPU's number, or None for the CPU."""
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def build(pipeline: Pipeline) -> None:
    """Build a pipeline, and drop messages about libraries for JPEG 2000 and TIFF, which DALI never decodes here.

    nvImageCodec writes to stderr about each missing library, past Python and at every log level. Without a GPU it also
    writes about the GPU's JPEG decoder. All other lines are passed on after the build.
    """
    needless = re.compile(rb"nvtiff|nvjpeg2k|nvjpeg2000" + (b"" if torch.cuda.is_available() else b"|nvjpeg"), re.I)
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), 2)
        try:
            pipeline.build()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            messages.seek(0)
            for line in messages:
                if not needless.search(line):
                    os.write(2, line)


def run(pipeline: Pipeline, device: torch.device, files: Iterable[tuple[Path, bytes | None]]) -> list[Tensor]:
    """Return the next batch of a pipeline's outputs as tensors. On a GPU they are in order with the current stream.

    On a CPU the tensors share DALI's memory, which DALI does not reuse while they live. On a GPU they are copies:
    tensors in DALI's memory would return to a thread of DALI that synchronises the device. That breaks the capture of a
    CUDA graph, and a kernel's error in that thread ends the process before Python can report it.

    ``files`` are the names of the batch's files, with their contents if these come from shards. They are checked when
    the pipeline fails: UserError names a damaged one.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        outputs = pipeline.run(stream)
    except RuntimeError:
        for path, content in files:
            with opened(path, None if content is None else io.BytesIO(content)) as image:
                image.load()
                kind = image.format
            if kind == "JPEG" and not _is_decoded(read_encoded(path, content).data):
                raise UnreadableImage(path, "damaged JPEG data") from None
        raise
    if stream is None:
        return [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs]
    from nvidia.dali.plugin.pytorch import feed_ndarray
    from nvidia.dali.plugin.pytorch.torch_utils import to_torch_type

    copies = []
    for output in outputs:
        dense = output.as_tensor()
        copy = torch.empty(dense.shape(), dtype=to_torch_type[dense.dtype], device=device)
        copies.append(feed_ndarray(dense, copy, cuda_stream=stream))
    return copies


def _is_decoded(jpeg: np.ndarray) -> bool:
    """Return whether DALI decodes a JPEG. Pillow also decodes damaged data, DALI does not."""
    pipeline = Pipeline(1, 1, None)
    with pipeline:
        pipeline.set_outputs(decode(fn.external_source(name="jpeg"), torch.device("cpu")))
    pipeline.feed_input("jpeg", [jpeg])
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


def _with_orientation(jpeg: bytes, wanted: int) -> bytes:
    """Return a JPEG whose only APP1 segment (EXIF, XMP) gives the wanted orientation; without one for 1.

    A file without such segments stays as it is, and so does a damaged one, with other bytes between the segments of its
    header: DALI refuses it.
    """
    parts = [jpeg[:2]]
    if wanted != 1:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = wanted
        content = exif.tobytes()
        parts.append(APP1 + struct.pack(">H", 2 + len(content)) + content)
    at, found = 2, False
    while (marker := jpeg[at : at + 2]) != START_OF_SCAN:
        if marker == b"\xff\xff":  # a byte that fills the space before a marker
            at += 1
            continue
        if len(jpeg) < at + 4 or marker[0] != 0xFF:
            return jpeg
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker == APP1:
            found = True
        else:
            parts.append(jpeg[at:end])
        at = end
    return b"".join([*parts, jpeg[at:]]) if found else jpeg
