"""Which rows are held out: whole groups of like rows, drawn by seed from the texts, with every length in fair share.

The draw goes through the distinct texts in an order that the seed and the texts decide, not the file. A text brings its
whole group along: near copies and the rest of its conversation. So nothing that is measured was also trained on.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_tui.engine.data.duplicates import groups
from qlora_tui.engine.data.prints import Prints
from qlora_tui.engine.data.tape import polled
from qlora_tui.engine.spec import RunConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

HOLDOUT_FLOOR, HOLDOUT_CAP = 20, 500
"""A share holds out no fewer and no more rows: below, the mean says little; above, measuring costs time and tells no more."""
_QUARTERS = 4
_LEEWAY = 1.1
_TEXTS_AT_ONCE = 2**16


@dataclass(frozen=True, slots=True)
class Held:
    """Positions held out, and how many groups lie on both sides, which is none unless something is broken."""

    places: frozenset[int] = frozenset()
    overlap: int = 0


def size_of(rows: int, wanted: float, notes: list[str]) -> int:
    """Return how many of `rows` to hold out where `val_set_size` is `wanted`; at least one stays to train.

    A share gives at least 20 rows if that is no more than a tenth of them, and at most 500. A number is obeyed.
    """
    size = int(wanted) if wanted >= 1 else round(rows * wanted)
    if 0 < wanted < 1:
        floor = min(HOLDOUT_FLOOR, rows // 10)
        if size < floor and size:
            notes.append(f"{floor} rows are held out, not {size}: fewer would say little. A number in val_set_size is obeyed.")
        size = max(size, floor)
        if size > HOLDOUT_CAP:
            notes.append(
                f"{HOLDOUT_CAP} rows are held out, not {size}: more would cost time and tell no more. A number in val_set_size is obeyed."
            )
            size = HOLDOUT_CAP
    if size > rows - 1 and wanted and rows:
        notes.append(f"There are {rows} rows: {rows - 1} are held out, so that one is left to train.")
    return max(0, min(size, rows - 1))


def hold_out(
    prints: Prints,
    lengths: Sequence[int] | Numbers,
    run: RunConfig,
    notes: list[str],
    *,
    weights: Sequence[int] | None = None,
    stopping: Callable[[], None] = lambda: None,
) -> Held:
    """Choose the rows to measure on.

    Args:
        prints: the fingerprints of the usable rows.
        lengths: their tokens, or anything that grows with them.
        run: says how many, and the seed.
        notes: gets a sentence where it comes out otherwise than asked for.
        weights: into how many rows each was split; one each if not given.
        stopping: called between steps; raises to interrupt.
    """
    import numpy as np

    if not len(prints):
        return Held()
    each = np.asarray(weights if weights is not None else np.ones(len(prints)), np.int64)
    wanted = size_of(int(each.sum()), run.val_set_size, notes)
    if not wanted:
        return Held()
    roots = np.frombuffer(groups(prints, stopping=stopping), np.int64)
    chosen = _draw(prints, roots, each, np.asarray(lengths, np.int64), wanted, run.seed, stopping)
    inside = np.isin(roots, np.asarray(sorted(chosen), np.int64))
    held = int(each[inside].sum())
    if held < wanted:
        notes.append(
            f"{held} rows are held out, not {wanted}: the others are too like rows that are trained, or from one conversation with them."
        )
    overlap = len({*roots[inside].tolist()} & {*roots[~inside].tolist()})
    return Held(frozenset(np.flatnonzero(inside).tolist()), overlap)


def _draw(
    prints: Prints, roots: Numbers, weights: Numbers, lengths: Numbers, wanted: int, seed: int, stopping: Callable[[], None]
) -> set[int]:
    """Return the roots of the groups drawn; those over the share of their length wait for a second round."""
    import numpy as np

    stopping()
    texts, firsts = np.unique(np.frombuffer(bytes(prints.near), "S16"), return_index=True)
    order = list(range(len(texts)))
    stopping()
    random.Random(seed).shuffle(order)
    stopping()
    size = np.bincount(roots, weights=weights, minlength=len(roots)).astype(np.int64)
    quarter, room = _quarters(lengths, weights, wanted)
    chosen: set[int] = set()
    held = 0
    for fair in (True, False):
        for text in polled(order, stopping, _TEXTS_AT_ONCE):
            root = int(roots[firsts[text]])
            if held >= wanted:
                return chosen
            part, rows = quarter[root], int(size[root])
            if root in chosen or held + rows > wanted or (fair and rows > room[part]):
                continue
            chosen.add(root)
            held += rows
            room[part] -= rows
    return chosen


def _quarters(lengths: Numbers, weights: Numbers, wanted: int) -> tuple[list[int], list[int]]:
    """Return the quarter of each row by length, and how many rows each quarter may give: its share and a tenth more.

    A hold-out of a few rows is not divided: it would follow the rounding.
    """
    import numpy as np

    if wanted < HOLDOUT_FLOOR:
        return [0] * len(lengths), [wanted]
    ordered = np.sort(lengths)
    edges = [ordered[len(ordered) * part // _QUARTERS] for part in range(1, _QUARTERS)]
    quarter = np.searchsorted(edges, lengths, side="right")
    rows = np.bincount(quarter, weights=weights, minlength=_QUARTERS)
    return quarter.tolist(), np.ceil(_LEEWAY * wanted * rows / weights.sum()).astype(int).tolist()


def leaks(prints: Prints, trained: int, stopping: Callable[[], None] = lambda: None) -> array[int]:
    """Return the positions, from `trained` on, of rows that are too like one of the first `trained` rows to be measured."""
    import numpy as np

    roots = np.frombuffer(groups(prints, sources=False, stopping=stopping), np.int64)
    return array("q", (np.flatnonzero(np.isin(roots[trained:], roots[:trained])) + trained).tolist())
