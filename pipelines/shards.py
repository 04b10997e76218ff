"""WebDataset shards: a training list in a few large files instead of many small ones, for millions of images.

A folder holds ``shards.json``, ``tags.csv`` (a line for each sample, in their order) and for each shard
``shard-00000.tar`` with its index for DALI, ``shard-00000.idx``, in the format of DALI's wds2idx. Sample 12 is the
unchanged image file, ``000000012-89abcdef-01234567.jpg``, and its superpixels,
``000000012-89abcdef-01234567.superpixels.png``. The names hold the checksums (CRC-32) of both files. Every read checks
them, which takes 0.08 ms of a core for 100 kB.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import Pipeline, fn

from cpn_fast.config import Config, Superpixels
from cpn_fast.data.dataset import VERIFIED, Sample, check_files, load_checked, load_samples
from cpn_fast.data.images import IMAGE_SUFFIXES
from cpn_fast.data.labels import read_labels
from cpn_fast.data.provenance import combined, image_digests
from cpn_fast.pipelines.superpixels import SuperpixelCache
from cpn_fast.runtime import distributed, reading
from cpn_fast.runtime.errors import UserError, some
from cpn_fast.runtime.files import named, read_json, read_note, remove_partials, replacing, with_checksum, write_json
from cpn_fast.runtime.owner import LOCK, owned
from cpn_fast.runtime.progress import track

FORMAT = 2
SIZE = 1000  # samples of a shard: about 100 MB of VOC's images
READ = 32  # samples in a batch of DALI's reader
IMAGE = ";".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
SUPERPIXELS = "superpixels.png"
AGAIN = "Copy the folder again, or pack it anew (cpn-fast shards)"
_KEY = re.compile(r"(\d{9,})-([0-9a-f]{8})(?:-([0-9a-f]{8}))?\.")


class _Member(NamedTuple):
    """Position and checksum of a file, according to the index."""

    offset: int
    size: int
    checksum: str


@dataclasses.dataclass(frozen=True)
class Shards:
    """A folder of shards, opened by ``open_shards``."""

    folder: Path
    samples: list[Sample]
    """In the order of the shards. ``image`` is not a file: it names the shard and the id."""
    size: int
    """Samples of every shard except the last."""
    superpixels: dict[str, Any] | None
    """Settings of the superpixels; None if the shards have none."""
    images: str
    """Digest of the images that were packed."""
    bits: int | None = None
    """Bits per pixel of the superpixels that ``read`` also returns; None returns no superpixels."""

    def with_superpixels(self, parent: Path, config: Superpixels) -> Shards:
        """Return the same shards, but read superpixels too.

        Raises UserError if the shards have no superpixels, or not those of ``config``. With
        ``superpixels.engine: auto`` superpixels of either engine are accepted.
        """
        cache = SuperpixelCache(parent, config)
        engines = ("fast_slic", "kernel") if config.engine == "auto" and self.superpixels is not None else ()
        if _without(self.superpixels, engines) != _without(cache.made_by, engines):
            raise UserError(
                f"{self.folder}: expected superpixels of {cache.made_by}, found {self.superpixels}. Pack the shards "
                "again (cpn-fast shards), or set superpixels as they were"
            )
        return dataclasses.replace(self, bits=8 * cache.dtype.itemsize)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[bytes, ...]]:
        """Yield image file and, with ``bits``, superpixel PNG of samples, whose ``indices`` must ascend.

        DALI's reader reads one shard after the other, with an index of only these samples.
        """
        members = {}
        with tempfile.TemporaryDirectory() as parts:
            paths, index_paths = [], []
            for number, chosen in itertools.groupby(indices, key=lambda index: index // self.size):
                lines, members_of_shard = self._indexed(number, list(chosen))
                members.update(members_of_shard)
                paths.append(str(_shard(self.folder, number)))
                index_paths.append(f"{parts}/{number}.idx")
                with named(Path(index_paths[-1])):
                    Path(index_paths[-1]).write_text(_index(lines))
            pipeline = Pipeline(READ, 1, None, prefetch_queue_depth=2)
            with pipeline:
                files = fn.readers.webdataset(
                    paths=paths,
                    index_paths=index_paths,
                    ext=[IMAGE, *([] if self.bits is None else [SUPERPIXELS])],
                    missing_component_behavior="error",
                    dont_use_mmap=True,  # mmap is slow on network file systems, where many shards are
                )
                pipeline.set_outputs(*(files if isinstance(files, list) else [files]))
            try:
                pipeline.build()
            except RuntimeError as error:
                raise self._damage(indices, members, error) from None
        for first in range(0, len(indices), READ):
            try:
                outputs = pipeline.run()
            except RuntimeError as error:
                raise self._damage(indices, members, error) from None
            for row, index in enumerate(indices[first : first + READ]):
                contents = tuple(np.asarray(output.at(row)).tobytes() for output in outputs)
                for content, member in zip(contents, members[index], strict=False):
                    if _checksum(content) != member.checksum:
                        raise self._other_content(index)
                yield contents

    def _indexed(self, number: int, chosen: Sequence[int]) -> tuple[list[str], dict[int, list[_Member]]]:
        """Return the index's lines of some samples of a shard, and their members. Raises UserError if damaged."""
        tar = _shard(self.folder, number)
        path = tar.with_suffix(".idx")
        count = min(self.size, len(self.samples) - number * self.size)
        members = {}
        try:
            head, *lines = reading.read_bytes(path, reading.INDEX).decode("ascii").splitlines()
            if head != f"v1.2 {count}" or len(lines) != count:
                raise ValueError(f"{len(lines)} lines for {count} samples")
            length = tar.stat().st_size
            for index in chosen:
                words = lines[index % self.size].split()
                entries = [words[first : first + 4] for first in range(0, len(words), 4)]
                members[index] = [_member(index, column, *entry) for column, entry in enumerate(entries)]
                if not all(0 <= member.offset <= length - member.size <= length for member in members[index]):
                    raise ValueError(f"sample {index} lies beyond the end of {tar.name}")
            return [lines[index % self.size] for index in chosen], members
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged: {error}. {AGAIN}") from None

    def _damage(self, indices: Sequence[int], members: dict[int, list[_Member]], error: RuntimeError) -> UserError:
        """Return an error that names the sample that DALI could not read."""
        for index in indices:
            tar = _shard(self.folder, index // self.size)
            try:
                with tar.open("rb") as file:
                    for member in members[index]:
                        file.seek(member.offset)
                        if _checksum(file.read(member.size)) != member.checksum:
                            return self._other_content(index)
            except OSError as refused:
                return UserError(f"{tar}: cannot be read: {refused.strerror}")
        return UserError(f"{self.folder}: DALI cannot read its shards: {str(error).strip().splitlines()[0]}. {AGAIN}")

    def _other_content(self, index: int) -> UserError:
        tar = _shard(self.folder, index // self.size)
        return UserError(
            f"{tar}: damaged: {self.samples[index].id} does not have the checksum of {tar.with_suffix('.idx').name}. "
            f"{AGAIN}"
        )


def _without(made_by: dict[str, Any] | None, keys: Sequence[str]) -> dict[str, Any] | None:
    return None if made_by is None else {key: value for key, value in made_by.items() if key not in keys}


def pack(
    samples: Sequence[Sample],
    classes: Sequence[str],
    cache: SuperpixelCache | None,
    folder: Path,
    *,
    seed: int,
    workers: int,
    size: int = SIZE,
) -> int:
    """Pack samples with labels in random order, and their superpixels if there is a ``cache``.

    Returns the number of new shards. It may be interrupted and run again: finished shards are kept, after their
    checksums have been verified. Under torchrun each process packs its share of the shards. Raises UserError for
    damaged images, and for a folder with other files in it.
    """
    rank = distributed.join()
    if cache is not None:
        cache.build(samples)
    ordered = [samples[index] for index in np.random.default_rng(seed).permutation(len(samples))]
    tags = _tags(ordered, classes)
    made_by = {
        "format": FORMAT,
        "samples": len(samples),
        "size": size,
        "superpixels": None if cache is None else cache.made_by,
        "tags_sha256": hashlib.sha256(tags).hexdigest(),
        "images": combined(image_digests([sample.image for sample in samples])),
    }
    with owned(folder, rank):
        return _pack(ordered, classes, cache, folder, made_by, tags, rank, workers)


def _pack(
    ordered: Sequence[Sample],
    classes: Sequence[str],
    cache: SuperpixelCache | None,
    folder: Path,
    made_by: dict[str, Any],
    tags: bytes,
    rank: distributed.Rank,
    workers: int,
) -> int:
    size = made_by["size"]
    if rank.first:
        _claim(folder, made_by, tags)
    rank.wait()
    numbers = range(-(-len(ordered) // size))
    shares = rank.share(numbers)
    missing = [number for number in track(shares, "checking", len(shares)) if not _is_sound(_shard(folder, number))]
    for number in track(missing, "shards", len(missing)):
        first = number * size
        shard = ordered[first : first + size]
        check_files(shard, workers=workers, classes=len(classes))
        tar = _shard(folder, number)
        with replacing(tar) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for index, sample in enumerate(shard, first):
                files = {sample.image.suffix.lower().lstrip("."): reading.read_bytes(sample.image, reading.IMAGE)}
                if cache is not None:
                    files[SUPERPIXELS] = reading.read_bytes(cache.path(sample), reading.MASK)
                key = "-".join([f"{index:09d}", *map(_checksum, files.values())])
                for ending, content in files.items():
                    _add(archive, f"{key}.{ending}", content)
        with replacing(tar.with_suffix(".idx")) as file:  # last: its existence means that the shard is finished
            file.write(_index(_members(tar)).encode())
    return sum(rank.gather(len(missing)))


def open_shards(folder: Path, classes: Sequence[str]) -> Shards:
    """Open shards that ``pack`` made, with their tags. Raises UserError for missing, truncated or foreign shards."""
    expected = f"expected the folder that `cpn-fast shards` wrote, in format {FORMAT}"
    manifest, table = folder / "shards.json", folder / "tags.csv"
    try:
        made_by = read_json(manifest)
    except OSError as error:
        raise UserError(f"{folder}: {expected}, found: {error}") from None
    except ValueError as error:
        raise UserError(f"{manifest}: damaged: {error}. {AGAIN}") from None
    try:
        tags = reading.read_bytes(table, reading.LABELS)
    except OSError as error:
        raise UserError(f"{table}: not readable: {error}. {AGAIN}") from None
    if not isinstance(made_by, dict) or made_by.get("format") != FORMAT:
        kind = made_by.get("format") if isinstance(made_by, dict) else type(made_by).__name__
        raise UserError(f"{manifest}: {expected}, found {kind}. {AGAIN}")
    if not made_by.keys() >= {"superpixels", "tags_sha256", "images"} or not all(
        type(made_by.get(key)) is int and made_by[key] > 0 for key in ("samples", "size")
    ):
        raise UserError(f"{manifest}: damaged: expected samples, size, superpixels, tags_sha256 and images. {AGAIN}")
    if made_by["tags_sha256"] != hashlib.sha256(tags).hexdigest():
        raise UserError(f"{table}: damaged: it does not have the checksum in shards.json. {AGAIN}")
    ids = [row[0] for row in csv.reader(io.StringIO(tags.decode(), newline=""))]
    if len(ids) != made_by["samples"]:
        raise UserError(f"{manifest}: damaged: {made_by['samples']} samples, but tags.csv has {len(ids)}. {AGAIN}")
    size = made_by["size"]
    shards = [_shard(folder, number) for number in range(-(-len(ids) // size))]
    unfinished = [shard.name for shard in shards if not _is_whole(shard)]
    if unfinished:
        raise UserError(
            f"{folder}: {len(unfinished)} shards are missing or do not have the size in their index "
            f"({some(unfinished, 3)}). Pack or copy them again"
        )
    labels = read_labels(folder / "tags.csv", ids, classes)
    samples = [Sample(id_, shards[index // size] / id_, None, labels[id_]) for index, id_ in enumerate(ids)]
    return Shards(folder, samples, size, made_by["superpixels"], made_by["images"])


def training_list(config: Config, *, decode: bool = False) -> tuple[list[Sample], Shards | None]:
    """Return the training list with its tags, and its shards if ``data.shards`` names them.

    ``decode`` also checks the contents of loose files, and remembers those that pass in the run's folder. Raises
    UserError with every problem.
    """
    if config.data.shards is None and decode:
        verified, workers = config.run / VERIFIED, config.train.data_threads
        list_path = config.data.train_list
        return load_checked(config.data, config.classes, list_path, workers=workers, verified=verified), None
    if config.data.shards is None:
        return load_samples(config.data, config.classes, config.data.train_list, labels=True, masks=None), None
    shards = open_shards(config.data.root / config.data.shards, config.classes)
    return shards.samples, shards


def not_as_packed(shards: Shards, samples: Sequence[Sample]) -> str | None:
    """Return how a list with labels differs from the list that was packed, in words; None if it does not."""
    packed, now = ({s.id: np.asarray(s.label).tolist() for s in each} for each in (shards.samples, samples))
    differing = sorted(id_ for id_ in packed.keys() | now.keys() if packed.get(id_) != now.get(id_))
    if not differing:
        return None
    return (
        f"data.shards: {shards.folder} was packed from another list or other tags than data.train_list and data.labels "
        f"have now ({some(differing, 3)}), and `train` reads the shards alone: pack them anew (cpn-fast shards)"
    )


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.tar"


def _tags(samples: Sequence[Sample], classes: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for sample in samples:
        assert sample.label is not None
        writer.writerow([sample.id, *(classes[k] for k in np.flatnonzero(sample.label).tolist())])
    return text.getvalue().encode()


def _claim(folder: Path, made_by: dict[str, Any], tags: bytes) -> None:
    """Start or continue a folder. The manifest is written first: files without it do not belong to these shards."""
    manifest = folder / "shards.json"
    remove_partials(folder)
    before = read_note(manifest)
    if before != made_by:
        others = [path.name for path in sorted(folder.iterdir()) if path.name not in (LOCK, "tags.csv", manifest.name)]
        if others:
            changed = sorted(key for key in made_by if not isinstance(before, dict) or before.get(key) != made_by[key])
            content = f"shards of other {', '.join(changed)}" if isinstance(before, dict) else others[0]
            raise UserError(
                f"{folder}: expected an empty folder or unfinished shards of this list, these images and these "
                f"settings, found {content}. Name another folder, or empty it"
            )
    write_json(manifest, with_checksum(made_by), indent=2)
    with replacing(folder / "tags.csv") as file:
        file.write(tags)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member without owner, mode and time, so that the same files give the same shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _members(tar: Path) -> list[str]:
    """Return a line for each sample of a shard: the ending, offset, size and name of its members."""
    with tarfile.open(tar, "r:") as archive:
        groups = itertools.groupby(archive, key=lambda member: member.name.partition(".")[0])
        return [" ".join(map(_entry, members)) for _, members in groups]


def _entry(member: tarfile.TarInfo) -> str:
    _, _, ending = member.name.partition(".")
    return f"{ending} {member.offset_data} {member.size} {member.name}"


def _checksum(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def _member(index: int, column: int, ending: str, offset: str, size: str, name: str) -> _Member:
    """Parse an entry of a sample's line. Raises ValueError if it has another sample's name or no checksum."""
    key = _KEY.match(name)
    if key is None or int(key[1]) != index or key[2 + column] is None or name != f"{key[0]}{ending}":
        raise ValueError(f"sample {index} has the name {name[:60]!r}")
    return _Member(int(offset), int(size), key[2 + column])


def _index(lines: Sequence[str]) -> str:
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


def _is_sound(tar: Path) -> bool:
    """Return whether a shard is finished, and each file in it has the checksum in its name."""
    if not _is_whole(tar):
        return False
    try:
        index = reading.read_bytes(tar.with_suffix(".idx"), reading.INDEX).decode("ascii")
        if index != _index(_members(tar)):
            return False
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, file = _KEY.match(member.name), archive.extractfile(member)
                checksum = key and key[3 if member.name.endswith(SUPERPIXELS) else 2]
                if file is None or _checksum(file.read()) != checksum:
                    return False
    except (OSError, ValueError, tarfile.TarError):
        return False
    return True


def _is_whole(tar: Path) -> bool:
    """Return whether a shard has at least the size in its index. A truncated copy has not."""
    try:
        with reading.opened(tar.with_suffix(".idx"), reading.INDEX) as index:
            index.seek(max(0, index.seek(0, os.SEEK_END) - 1000))
            _, offset, size, _ = index.read().split()[-4:]  # the last member
        return tar.stat().st_size >= int(offset) + int(size)
    except (OSError, ValueError):
        return False
