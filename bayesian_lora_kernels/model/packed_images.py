"""Which patches of packed images belong to which example.

Vision-language models of the Qwen-VL kind take the patches of all images of a batch one after the other, `pixel_values
[patches, d]`, and the grid of each image, `image_grid_thw [images, 3]`; videos likewise. Nothing there has a leading
dimension of examples: an example owns as many images as its image tokens are worth.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

TOKEN_TYPES = "mm_token_type_ids"


class _Medium(NamedTuple):
    name: str
    pixels: str  # [patches, d]
    grid: str  # [media, 3]
    other: tuple[str, ...]  # [media, ...]
    token_type: int


MEDIA = (
    _Medium("images", "pixel_values", "image_grid_thw", (), 1),
    _Medium("videos", "pixel_values_videos", "video_grid_thw", ("second_per_grid_ts",), 2),
)
PACKED_KEYS = frozenset(key for m in MEDIA for key in (m.pixels, m.grid, *m.other))


def packed_keys(items: Mapping[Any, Any], size: int) -> set[str]:
    """The keys that `cut_packed` cuts."""
    found: set[str] = set()
    for medium in MEDIA:
        grid = items.get(medium.grid)
        if isinstance(grid, Tensor) and grid.ndim == 2:
            found.update(key for key in (medium.grid, *medium.other) if items.get(key) is not None)
            pixels = items.get(medium.pixels)
            # Some processors pad the patches of each example: [N, patches, d].
            if isinstance(pixels, Tensor) and (pixels.shape[0] != size or int(grid.prod(dim=1).sum()) == size):
                found.add(medium.pixels)
    return found


def cut_packed(items: Mapping[Any, Any], start: int, stop: int, size: int) -> dict[str, Any]:
    """Packed pixels, grids and what else comes per image, of examples `start` to `stop`; None where they have no image.

    Args:
        items: of a batch of `size` examples.
        start: first example.
        stop: the one after the last.
        size: number of examples.

    Raises:
        ValueError: if grids, pixels and image tokens contradict each other, or nothing tells whose the images are.
    """
    keys = packed_keys(items, size)
    cut: dict[str, Any] = {}
    for medium in MEDIA:
        if medium.grid not in keys:
            continue
        grid = items[medium.grid]
        patches = grid.prod(dim=1).tolist()
        bounds = [0, *itertools.accumulate(_per_example(items, medium, patches, size))]
        rows = slice(bounds[min(start, size)], bounds[min(stop, size)])
        empty = rows.start >= rows.stop
        cut[medium.grid] = None if empty else grid[rows]
        for key in keys.intersection(medium.other):
            if len(items[key]) != len(patches):
                raise ValueError(f"{key}: expected one for each of {len(patches)} {medium.name}, got {len(items[key])}")
            cut[key] = None if empty else items[key][rows]
        if medium.pixels in keys:
            pixels, ends = items[medium.pixels], [0, *itertools.accumulate(patches)]
            if pixels.shape[0] != ends[-1]:
                raise ValueError(
                    f"{medium.pixels}: expected the {ends[-1]} patches that {medium.grid} tells of, got "
                    f"{pixels.shape[0]}"
                )
            cut[medium.pixels] = None if empty else pixels[ends[rows.start] : ends[rows.stop]]
    return cut


def _per_example(items: Mapping[Any, Any], medium: _Medium, patches: list[int], size: int) -> list[int]:
    """How many images each example has."""
    types = items.get(TOKEN_TYPES)
    if not isinstance(types, Tensor):
        if len(patches) == size:
            return [1] * size
        raise ValueError(
            f"{medium.grid}: {len(patches)} {medium.name} of {size} examples cannot be cut into pieces, because "
            f"nothing tells whose they are; add {TOKEN_TYPES} to the batch (the processor makes it), or allow all "
            "examples at once by a larger memory_budget"
        )
    if types.ndim != 2 or len(types) != size:
        raise ValueError(f"{TOKEN_TYPES}: expected [{size}, T], got {list(types.shape)}")
    tokens = (types == medium.token_type).sum(dim=1).tolist()
    total, merged = sum(patches), sum(tokens)
    each = total // merged if merged else 0  # patches behind one token
    consistent = total == each * merged and all(count % each == 0 for count in patches if each)
    counts, image = [], 0
    for wanted in tokens:
        first = image
        while consistent and wanted > 0 and image < len(patches):
            wanted -= patches[image] // each
            image += 1
        consistent = consistent and wanted == 0
        counts.append(image - first)
    if not consistent or image != len(patches):
        raise ValueError(
            f"{medium.grid}: {len(patches)} {medium.name} of {total} patches do not match the {merged} tokens of type "
            f"{medium.token_type} in {TOKEN_TYPES} ({tokens} for each example)"
        )
    return counts
