"""SLIC superpixels in plain torch and integers. This is the definition; the Triton kernels give the same bits.

The algorithm is R. Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", 2012. This
module settles what the paper leaves open; docs/superpixels.md explains it. Everything is an integer, so that neither
the order of a sum nor rounding can differ between devices:

- colours are CIELAB, L in fifths and below 2^10, a and b in tenths and shifted to lie between 0 and 2^11, so that the
  sum of their squared differences is 50 times dL^2 / 2 + 2 (da^2 + db^2) and below 2^23;
- places are in 1024ths of a cell's longer side: height and width of an image are less than 2^31 of these units;
- a distance is 2^24 x 50 times dL^2 / 2 + 2 (da^2 + db^2) + compactness^2 (difference of places / side)^2, below 2^62
  for every compactness up to 10,000, because a pixel and its candidates are less than three cells apart;
- an image has fewer than 2^31 pixels, so that one int64 holds a pixel together with a colour difference or a size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DEFINITION = 1
"""Version of the result. Increase it with every change of the labels: caches name it."""
NEAR = ((0, 0), (-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""Offsets (rows, columns) of a pixel's cell and its neighbours. The first of equally near centres wins."""
FAR = 2**63 - 1
INDEX = 2**31 - 1
SMALL = 8
"""A region is small if it has less than 1 / SMALL of a cell."""
LEVELS = 1 << 15  # of linear light, and of f in CIELAB's definition
STEPS = 1 << 10  # of the table of f, with interpolation between them
SCALES = (5, 10, 10)  # of L, a and b
SHIFT_A, SHIFT_B = 864, 1080  # sRGB's a and b are above -86.3 and -107.9


class Grid(NamedTuple):
    """The ``rows`` x ``columns`` cells of an image, as many as the requested superpixels or a few less."""

    height: int
    width: int
    rows: int
    columns: int

    @classmethod
    def of(cls, height: int, width: int, count: int) -> Grid:
        """Return nearly square cells, as many as ``count`` allows, from the better of two numbers of rows."""
        square = max(1, int((count * height / width) ** 0.5))
        candidates = []
        for rows in (square, square + 1):
            rows = min(rows, height, count)
            columns = min(width, count // rows)
            candidates.append((rows * columns, -abs(height * columns - width * rows), rows, columns))
        return cls(height, width, *max(candidates)[2:])

    @property
    def cells(self) -> int:
        return self.rows * self.columns

    @property
    def step(self) -> int:
        """Distance of neighbouring pixels, in 2^-16 units of place."""
        return min((self.rows << 26) // self.height, (self.columns << 26) // self.width)


def weight(compactness: float) -> int:
    """Return the weight of a squared difference of places. A squared difference of colours has the weight 2^24."""
    return round(800 * compactness**2)  # 50 x 2^24 / 1024^2


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return linear light of sRGB's 256 values, and CIELAB's f at ``STEPS`` + 2 arguments; int32."""

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
    """Convert uint8 sRGB (B, 3, H, W) to int32 (3, B, H, W): CIELAB of D65, scaled and shifted."""
    light, curve = tables(images.device)
    red, green, blue = light[images.int()].unbind(1)

    def f(x: int, y: int, z: int) -> Tensor:
        t = (x * red + y * green + z * blue + LEVELS // 2) >> 15
        low = t >> 5
        return curve[low] + (((curve[low + 1] - curve[low]) * (t & 31) + 16) >> 5)

    fx, fy, fz = (f(*row) for row in WHITE)
    half = LEVELS // 2
    of_l, of_a, of_b = SCALES
    lightness = (of_l * 116 * fy - of_l * 16 * LEVELS + half) >> 15
    a = (of_a * 500 * (fx - fy) + SHIFT_A * LEVELS + half) >> 15
    b = (of_b * 200 * (fy - fz) + SHIFT_B * LEVELS + half) >> 15
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
    """Return int32 (H,) and (W,): the places of the rows and columns of pixels."""
    return tuple(((torch.arange(side, device=device) * grid.step) >> 16).int() for side in (grid.height, grid.width))  # type: ignore[return-value]


def cells(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (H,) and (W,): the grid's row of each row of pixels, and its column of each column of pixels."""
    y, x = (torch.arange(side, device=device) for side in (grid.height, grid.width))
    return y * grid.rows // grid.height, x * grid.columns // grid.width


def members(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (rows, h) and (columns, w): the pixel rows of each grid row, and pixel columns of each grid column.

    Shorter ones repeat their last pixel row or column.
    """

    def of(side: int, cells: int) -> Tensor:
        ends = -(-torch.arange(cells + 1, device=device) * side // cells)
        within = torch.arange(-(-side // cells), device=device)
        return torch.minimum(ends[:-1, None] + within, ends[1:, None] - 1)

    return of(grid.height, grid.rows), of(grid.width, grid.columns)


def nearest(colours: Tensor, centres: Tensor, alive: Tensor, grid: Grid, weight: int) -> Tensor:
    """Return int64 (B, H, W): each pixel's nearest centre among its cell's and the neighbouring cells' centres.

    ``centres`` are int32 (5, B, rows, columns): place (y, x) and colour. A centre is ``alive`` once it has had a pixel.
    Inside this function pixels are (rows, h, columns, w), so that the pixels of a cell meet its nine candidates.
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
        centre_y, centre_x, *colour, lives = candidate[:, :, :, None, :, None]
        offsets = [pixel - centre for pixel, centre in zip(colours, colour, strict=True)]
        colour_distance = sum(offset * offset for offset in offsets)
        offset_y, offset_x = places_y - centre_y, places_x - centre_x
        place_distance = offset_y * offset_y + offset_x * offset_x
        distance = (colour_distance.long() << 24) + place_distance.long() * weight
        distance = distance.where(lives != 0, FAR)
        labels = (cell + (down * grid.columns + right)).where(distance < best, labels)
        best = torch.minimum(best, distance)
    by_pixel = torch.empty(len(best), grid.height, grid.width, dtype=torch.int64, device=device)
    by_pixel[:, y, x] = labels
    return by_pixel


def means(colours: Tensor, labels: Tensor, centres: Tensor, alive: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the mean of each centre's pixels, rounded half up, and which are alive. A centre without pixels stays."""
    places_y, places_x = places(grid, colours.device)
    place = torch.stack([places_y[:, None].expand(grid.height, grid.width), places_x.expand(grid.height, -1)])
    values = torch.cat([place[:, None].expand(2, *labels.shape), colours, torch.ones_like(colours[:1])])
    target = torch.arange(len(labels), device=labels.device)[:, None, None] * (grid.cells + 1) + labels + 1
    sums = torch.zeros(6, len(labels) * (grid.cells + 1), dtype=torch.int64, device=labels.device)
    sums.index_add_(1, target.flatten(), values.flatten(1).long())
    *sums, number = sums.view(6, len(labels), grid.cells + 1)[:, :, 1:].reshape(6, *alive.shape)  # type: ignore[assignment]
    averages = torch.stack([(2 * total + number) // (2 * number).clamp(min=1) for total in sums]).int()
    return averages.where(number > 0, centres), alive | (number > 0)


def joined(labels: Tensor, colours: Tensor, grid: Grid, count: int) -> Tensor:
    """Return regions, int64 (B, H, W). A region's number is one of its pixels in the batch; -1 where labels are -1.

    An image's parts are 4-connected pixels of one label. The ``count`` largest parts stay. Every other part joins its
    most similar neighbour. Then every region smaller than a cell's ``SMALL``-th part does so too (see ``_join``).
    ``colours`` (3, B, rows, columns) belong to the centres.
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
    """Return the first pixel of each pixel's region, from the pairs of neighbours that share a region."""
    region = torch.arange(pixels, device=pairs.device)
    while pairs.numel():
        low = region[pairs].amin(0)
        for end in pairs:
            region.scatter_reduce_(0, region[end], low, "amin")
        region = _roots(region)
        pairs = pairs[:, region[pairs[0]] != region[pairs[1]]]
    return region


def _roots(parents: Tensor) -> Tensor:
    """Follow ``parents`` to the end, and return the roots."""
    while not torch.equal(further := parents[parents], parents):
        parents = further
    return parents


def _rank(size: Tensor) -> Tensor:
    """Return ranks of regions by size. Of equal sizes the lower number has the higher rank."""
    return (size << 31) | (INDEX - torch.arange(len(size), device=size.device))


def _join(
    region: Tensor, size: Tensor, colour: Tensor, pairs: Tensor, staying: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Join every region that does not stay to a neighbour, in rounds, until no such region has a neighbour.

    A region joins the neighbour that stays and has the nearest colour of its centre (``colour`` (3, numbers)); of equal
    colours the lowest number. If no neighbour stays, it joins the largest. Chains end at a region that stays, or at two
    regions that would join each other. Then the larger of the two keeps them all, and takes part in the next round. So
    a round leaves at most half of the regions that do not stay. ``size`` is a region's size at its number, else 0.
    """
    numbers = torch.arange(len(region), device=region.device)
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
        target = (INDEX - (best & INDEX)).where(best > 0, numbers)
        target = numbers.where((target[target] == numbers) & (rank > rank[target]), target)
        target = _roots(target)
        region = target[region]
        size = torch.zeros_like(size).index_add_(0, target, size)


def numbered(region: Tensor, count: int) -> Tensor:
    """Return int32 (B, H, W): regions numbered in the order of their first pixels. -1 stays.

    Regions beyond ``count`` get the last number.
    """
    batch, pixels = len(region), region.shape[1] * region.shape[2]
    flat = region.flatten()
    index = torch.arange(len(flat), device=flat.device)
    first = torch.full_like(index, INDEX).scatter_reduce_(0, flat.clamp(min=0), index.where(flat >= 0, INDEX), "amin")
    begins = (first[flat.clamp(min=0)] == index) & (flat >= 0)
    number = begins.view(batch, pixels).cumsum(1).flatten() - 1
    number = number[first[flat.clamp(min=0)].clamp(max=len(flat) - 1)].clamp(max=count - 1)
    return number.where(flat >= 0, -1).view(region.shape).int()
