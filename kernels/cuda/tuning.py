"""The search for the launches of a matrix that take the least time, whoever measures it.

First splits, the same for all numbers of rows, since a row's sums must not depend on how many rows come with it: those
that lose least, each number of rows against its own best. Then for each number of rows outputs and warps, then stages;
for many, whether programs walk over tiles. At last torch's own product against the best launch for many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torchinfer.kernels.cuda.tiles import LEAST_SPAN, Product, Tiles, choose_tiles
from torchinfer.kernels.cuda.tuned_table import MANY_ROWS, ROWS, SPLITS, Launch, Tuned

OUTPUTS = (32, 64, 128)
STAGES = (2, 3, 4, 5, 6)
FEW_ROWS = tuple(rows for rows in ROWS if rows < 128)

LIBRARY_ROWS = (4096, 1024, 256)  # at which the library is measured

Seconds = Callable[[int, Tiles], float | None]  # of so many rows; None: such a launch does not fit the card


def search(
    product: Product,
    num_processors: int,
    seconds: Seconds,
    library_seconds: Callable[[int], float | None],  # of so many rows; None: it has no such product
) -> Tuned:
    """The best launches that were found, starting from the rule's."""
    rule = {rows: choose_tiles(product, rows, num_processors) for rows in ROWS}
    splits = best_splits(product, {rows: rule[rows] for rows in FEW_ROWS}, seconds)
    launches = {}
    for rows, tiles in rule.items():
        start = tiles if rows == 128 else replace(tiles, splits=splits)
        shapes = [replace(start, outputs=o, num_warps=w) for o in OUTPUTS for w in warps(start)]
        best = fastest([start, *shapes], rows, seconds)
        best = fastest([best, *(replace(best, num_stages=stages) for stages in STAGES)], rows, seconds)
        if rows == MANY_ROWS and product.num_matrices == 1:
            # Their loads go on behind a tile, so that other steps ahead may be the best.
            walking = [replace(best, per_processor=n, num_stages=s) for n in (1, 2) for s in STAGES]
            best = fastest([best, *walking], rows, seconds)
        launches[rows] = Launch(best.outputs, best.num_warps, best.num_stages, best.per_processor)
    # `best` is that of 128 rows, the last.
    return Tuned(splits, launches, least_library_rows(best, seconds, library_seconds))


def least_library_rows(tiles: Tiles, seconds: Seconds, library_seconds: Callable[[int], float | None]) -> int:
    """The least of LIBRARY_ROWS from which on the library is faster than the launch; 0 if it is not at the most."""
    found = 0
    for rows in LIBRARY_ROWS:
        theirs = library_seconds(rows)
        if theirs is None:
            break
        ours = seconds(rows, tiles)
        if ours is not None and ours <= theirs:
            break
        found = rows
    return found


def best_splits(product: Product, rule: dict[int, Tiles], seconds: Seconds) -> int:
    """The splits with the least sum over rows of the time, each as a part of the best one for these rows."""
    choices = [splits for splits in SPLITS if splits == 1 or product.num_inputs >= splits * LEAST_SPAN // 2]
    share = dict.fromkeys(choices, 0.0)
    for rows, tiles in rule.items():
        times = {splits: seconds(rows, replace(tiles, splits=splits)) for splits in choices}
        least = min((time for time in times.values() if time is not None), default=1.0)
        for splits, time in times.items():
            share[splits] += float("inf") if time is None else time / least
    return min(choices, key=lambda splits: share[splits])


def warps(tiles: Tiles) -> tuple[int, ...]:
    """Those that leave the instruction for products as it is: Hopper has another one from four warps on."""
    return (1, 2) if tiles.num_warps <= 2 else (4, 8)


def fastest(candidates: Iterable[Tiles], rows: int, seconds: Seconds) -> Tiles:
    """The first of the fastest; the first one if none fits."""
    distinct = list(dict.fromkeys(candidates))
    times = [seconds(rows, tiles) for tiles in distinct]
    found = [(time, index) for index, time in enumerate(times) if time is not None]
    return distinct[min(found)[1]] if found else distinct[0]
