"""SLIC superpixels in plain torch and whole numbers: the definition, which the Triton kernels give bit for bit.

As in R. Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", 2012, with what they leave
open settled here; docs/superpixels.md has it in words. Everything is an integer, so that no order of a sum and no
rounding can tell one device from another:

- colours are CIELAB, L in fifths and below 2^10, a and b in tenths, shifted to lie between 0 and 2^11, so that the sum
  of their squared differences is 50 times dL^2 / 2 + 2 (da^2 + db^2) and below 2^23;
- places are in 1024ths of a cell's longer side: an image is less than 2^31 of them long and wide;
- a distance is 2^24 x 50 times dL^2 / 2 + 2 (da^2 + db^2) + compactness^2 (difference of places / side)^2, below 2^62
  for every compactness up to 10,000, since a pixel and its candidates are less than three cells apart;
- an image has less than 2^31 pixels, so that a colour difference or a size, and a pixel, fit into one int64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DEFINITION = 1
"""To be raised with every change of what comes out: caches name it."""
NEAR = ((0, 0), (-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""A pixel's own cell and those around it, (rows, columns) on: of equals, the first counts."""
FAR = 2**63 - 1
INDEX = 2**31 - 1
SMALL = 8
"""A region is small below this part of a cell."""
LEVELS = 1 << 15  # of linear light, and of f in CIELAB's definition
STEPS = 1 << 10  # of the table of f, between which it is interpolated
SCALES = (5, 10, 10)  # of L, a and b
SHIFT_A, SHIFT_B = 864, 1080  # sRGB's a and b are above -86.3 and -107.9


class Grid(NamedTuple):
    """Cells, one for each superpixel asked for or a few less: ``rows`` x ``columns`` of an image."""

    height: int
    width: int
    rows: int
    columns: int

    @classmethod
    def of(cls, height: int, width: int, count: int) -> Grid:
        """As many cells as ``count`` allows, nearly square: of the two numbers of rows that would be, the better."""
        square = max(1, int((count * height / width) ** 0.5))
        found = []
        for rows in (square, square + 1):
            rows = min(rows, height, count)
            columns = min(width, count // rows)
            found.append((rows * columns, -abs(height * columns - width * rows), rows, columns))
        return cls(height, width, *max(found)[2:])

    @property
    def cells(self) -> int:
        return self.rows * self.columns

    @property
    def step(self) -> int:
        """From a pixel to the next, in 2^-16 units of place."""
        return min((self.rows << 26) // self.height, (self.columns << 26) // self.width)


def weight(compactness: float) -> int:
    """Of a squared difference of places, where that of colours has 2^24."""
    return round(800 * compactness**2)  # 50 x 2^24 / 1024^2


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Linear light of sRGB's 256 values, and CIELAB's f at ``STEPS`` + 2 of its arguments; int32."""

    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    def f(t: float) -> float:
        return t ** (1 / 3) if t > (6 / 29) ** 3 else t * (29 / 6) ** 2 / 3 + 4 / 29

    light = [round(LEVELS * linear(value / 255)) for value in range(256)]
    curve = [round(LEVELS * f(min(1.0, step / STEPS))) for step in range(STEPS + 2)]
    return torch.tensor(light, dtype=torch.int32, device=device), torch.tensor(curve, dtype=torch.int32, device=device)


WHITE = ((14220, 12327, 6221), (6969, 23434, 2365), (582, 3587, 28599))
"""sRGB to XYZ over D65's white, in 2^-15: each row's sum is 2^15."""


def lab(images: Tensor) -> Tensor:
    """uint8 sRGB (B, 3, H, W) -> int32 (3, B, H, W): CIELAB of D65, scaled and shifted."""
    light, curve = tables(images.device)
    red, green, blue = light[images.int()].unbind(1)

    def f(x: int, y: int, z: int) -> Tensor:
        t = (x * red + y * green + z * blue + LEVELS // 2) >> 15
        low = t >> 5
        return curve[low] + (((curve[low + 1] - curve[low]) * (t & 31) + 16) >> 5)

    fx, fy, fz = (f(*row) for row in WHITE)
    half = LEVELS // 2
    lightness = (5 * 116 * fy - 5 * 16 * LEVELS + half) >> 15
    a = (10 * 500 * (fx - fy) + SHIFT_A * LEVELS + half) >> 15
    b = (10 * 200 * (fy - fz) + SHIFT_B * LEVELS + half) >> 15
    return torch.stack([lightness, a, b])


@torch.library.custom_op("cpn_fast::slic_eager", mutates_args=())
def slic(images: Tensor, mask: Tensor | None, count: int, compactness: float, iterations: int) -> Tensor:
    """As ``cpn_fast.kernels.slic``; ``images`` are uint8, ``mask`` bool (B, H, W)."""
    height, width = images.shape[2:]
    grid = Grid.of(height, width, count)
    shown = torch.ones_like(images[:, 0], dtype=torch.bool) if mask is None else mask
    colours = lab(images)
    row, column = cells(grid, images.device)
    labels = (row[:, None] * grid.columns + column).where(shown, -1)
    centres = torch.zeros(5, len(images), grid.rows, grid.columns, dtype=torch.int32, device=images.device)
    alive = torch.zeros_like(centres[0], dtype=torch.bool)
    for _ in range(iterations):
        centres, alive = means(colours, labels, centres, alive, grid)
        labels = nearest(colours, centres, alive, grid, weight(compactness)).where(shown, -1)
    return numbered(joined(labels, centres[2:], grid, count), count)


@slic.register_fake
def fake(images: Tensor, mask: Tensor | None, count: int, compactness: float, iterations: int) -> Tensor:
    return images.new_empty(len(images), *images.shape[2:], dtype=torch.int32)


def places(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 (H,) and (W,): where rows and columns of pixels are."""
    return tuple(((torch.arange(side, device=device) * grid.step) >> 16).int() for side in (grid.height, grid.width))  # type: ignore[return-value]


def cells(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """(H,) and (W,): which row and column of the grid pixels are in."""
    y, x = (torch.arange(side, device=device) for side in (grid.height, grid.width))
    return y * grid.rows // grid.height, x * grid.columns // grid.width


def members(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, h) and (columns, w): the rows and columns of pixels of each of the grid's, the last one repeated."""

    def of(side: int, cells: int) -> Tensor:
        ends = -(-torch.arange(cells + 1, device=device) * side // cells)
        within = torch.arange(-(-side // cells), device=device)
        return torch.minimum(ends[:-1, None] + within, ends[1:, None] - 1)

    return of(grid.height, grid.rows), of(grid.width, grid.columns)


def nearest(colours: Tensor, centres: Tensor, alive: Tensor, grid: Grid, weight: int) -> Tensor:
    """int64 (B, H, W): the nearest centre of those whose cell is a pixel's or next to it.

    ``centres`` are int32 (5, B, rows, columns) of place (y, x) and colour; one is ``alive`` once it has had a pixel.
    Inside, pixels are (rows, h, columns, w), so that those of a cell meet its nine candidates.
    """
    device = colours.device
    y, x = members(grid, device)
    y = y[:, :, None, None]
    colours = colours[:, :, y, x]
    places_y, places_x = places(grid, device)
    places_y, places_x = places_y[y], places_x[x]
    cell = torch.arange(grid.cells, device=device).view(grid.rows, 1, grid.columns, 1)
    around = F.pad(torch.cat([centres, alive[None].int()]), (1, 1, 1, 1))
    best = torch.full(colours.shape[1:], FAR, device=device)
    labels = cell.expand_as(best)
    for down, right in NEAR:
        candidate = around[:, :, 1 + down : 1 + down + grid.rows, 1 + right : 1 + right + grid.columns]
        centre_y, centre_x, *colour, there = candidate[:, :, :, None, :, None]
        offsets = [own - other for own, other in zip(colours, colour, strict=True)]
        colour_distance = sum(offset * offset for offset in offsets)
        offset_y, offset_x = places_y - centre_y, places_x - centre_x
        place_distance = offset_y * offset_y + offset_x * offset_x
        distance = (colour_distance.long() << 24) + place_distance.long() * weight
        distance = distance.where(there != 0, FAR)
        labels = (cell + (down * grid.columns + right)).where(distance < best, labels)
        best = torch.minimum(best, distance)
    found = torch.empty(len(best), grid.height, grid.width, dtype=torch.int64, device=device)
    found[:, y, x] = labels
    return found


def means(colours: Tensor, labels: Tensor, centres: Tensor, alive: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The mean of each centre's pixels, halves rounded up; a centre without pixels stays."""
    places_y, places_x = places(grid, colours.device)
    where = torch.stack([places_y[:, None].expand(grid.height, grid.width), places_x.expand(grid.height, -1)])
    values = torch.cat([where[:, None].expand(2, *labels.shape), colours, torch.ones_like(colours[:1])])
    target = torch.arange(len(labels), device=labels.device)[:, None, None] * (grid.cells + 1) + labels + 1
    sums = torch.zeros(6, len(labels) * (grid.cells + 1), dtype=torch.int64, device=labels.device)
    sums.index_add_(1, target.flatten(), values.flatten(1).long())
    *sums, number = sums.view(6, len(labels), grid.cells + 1)[:, :, 1:].reshape(6, *alive.shape)  # type: ignore[assignment]
    found = torch.stack([(2 * total + number) // (2 * number).clamp(min=1) for total in sums]).int()
    return found.where(number > 0, centres), alive | (number > 0)


def joined(labels: Tensor, colours: Tensor, grid: Grid, count: int) -> Tensor:
    """Regions, int64 (B, H, W), each the number of one of its pixels in the batch; -1 where labels are.

    Of an image's 4-connected parts of one label the ``count`` largest stay, and every other joins the neighbour that
    is most like it; so does then every region smaller than a cell's ``SMALL``-th part (see ``_join``). ``colours``
    (3, B, rows, columns) are the centres'.
    """
    batch, height, width = labels.shape
    pixels = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
    sides = [(pixels[:, :, :-1], pixels[:, :, 1:]), (pixels[:, :-1], pixels[:, 1:])]
    pairs = torch.cat([torch.stack([one.flatten(), other.flatten()]) for one, other in sides], 1)
    flat = labels.flatten()
    pairs = pairs[:, (flat[pairs] >= 0).all(0)]
    region = _connected(pairs[:, flat[pairs[0]] == flat[pairs[1]]], len(flat))
    size = torch.zeros_like(region).index_add_(0, region, (flat >= 0).long())
    pairs = pairs[:, region[pairs[0]] != region[pairs[1]]]

    rank = _rank(size).view(batch, height * width)
    last = rank.topk(min(count, rank.shape[1])).values[:, -1:]
    large = (rank >= last).flatten() & (size > 0)
    colour = colours.flatten(1)[:, (flat + pixels.flatten() // (height * width) * grid.cells).clamp(min=0)]
    region, size = _join(region, size, colour, pairs, lambda _: large)
    region, _ = _join(region, size, colour, pairs, lambda size: size * SMALL * grid.cells >= height * width)
    return region.where(flat >= 0, -1).view(labels.shape)


def _connected(pairs: Tensor, pixels: int) -> Tensor:
    """The first pixel of each pixel's region, given the pairs of neighbours that are in one."""
    region = torch.arange(pixels, device=pairs.device)
    while pairs.numel():
        low = region[pairs].amin(0)
        for end in pairs:
            region.scatter_reduce_(0, region[end], low, "amin")
        region = _roots(region)
        pairs = pairs[:, region[pairs[0]] != region[pairs[1]]]
    return region


def _roots(parents: Tensor) -> Tensor:
    """Where following ``parents`` ends."""
    while not torch.equal(further := parents[parents], parents):
        parents = further
    return parents


def _rank(size: Tensor) -> Tensor:
    """Orders regions by size; of equals the one with the lower number is higher."""
    return (size << 31) | (INDEX - torch.arange(len(size), device=size.device))


def _join(
    region: Tensor, size: Tensor, colour: Tensor, pairs: Tensor, staying: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Rounds in which every region that does not stay joins a neighbour, until none is left that has one.

    It joins the one that stays whose centre has the nearest colour (``colour`` (3, numbers)), of equals the one with
    the lowest number; where none stays, the largest. Chains end at a region that stays, or at two that would join each
    other: then at the larger, and what has gathered there takes part in the next round. So a round leaves at most half
    of the regions that do not stay. ``size`` is that of each region at its number, 0 elsewhere.
    """
    own = torch.arange(len(region), device=region.device)
    while True:
        stays = staying(size)
        one, other = region[pairs]
        apart = one != other
        one, other = torch.cat([one[apart], other[apart]]), torch.cat([other[apart], one[apart]])
        one, other = one[~stays[one]], other[~stays[one]]
        if not len(one):
            return region, size
        distance = (colour[:, one] - colour[:, other]).square().sum(0)
        likeness = (1 << 62) | ((INDEX - distance) << 31) | (INDEX - other)
        rank = _rank(size)
        best = torch.zeros_like(size).scatter_reduce_(0, one, likeness.where(stays[other], rank[other]), "amax")
        target = (INDEX - (best & INDEX)).where(best > 0, own)
        target = own.where((target[target] == own) & (rank > rank[target]), target)
        target = _roots(target)
        region = target[region]
        size = torch.zeros_like(size).index_add_(0, target, size)


def numbered(region: Tensor, count: int) -> Tensor:
    """int32 (B, H, W): regions in the order of their first pixels, those beyond ``count`` as one; -1 stays."""
    batch, pixels = len(region), region.shape[1] * region.shape[2]
    flat = region.flatten()
    own = torch.arange(len(flat), device=flat.device)
    first = torch.full_like(own, INDEX).scatter_reduce_(0, flat.clamp(min=0), own.where(flat >= 0, INDEX), "amin")
    begins = (first[flat.clamp(min=0)] == own) & (flat >= 0)
    number = begins.view(batch, pixels).cumsum(1).flatten() - 1
    number = number[first[flat.clamp(min=0)].clamp(max=len(flat) - 1)].clamp(max=count - 1)
    return number.where(flat >= 0, -1).view(region.shape).int()
