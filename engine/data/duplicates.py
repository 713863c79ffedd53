"""Which rows are the same text in substance: groups for the hold-out, copies for the filter.

Rows belong together when they are equal but for case and spaces, when they come from the same conversation, or when
they share seven tenths of their word pairs, which is about nine words of ten in the same order. Word pairs that every tenth row has
are an instruction that was put around different texts, and do not count.

Candidates are rows that share one of the smallest hashes of their sketches; of those that share one, neighbours by
their next hash are compared. A pair above the limit is missed about once in five hundred.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_tui.engine.data.chat import Row
from qlora_tui.engine.data.prints import KEPT, Prints, likeness, turn_words, words_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

ALIKE = 0.7
"""Share of word pairs from which on two rows count as near copies."""
_COMMON_SHARE, _COMMON_LEAST = 10, 8
_PROBES = 6
_NEIGHBOURS = 2
_AT_ONCE = 20_000
_VALUES_AT_ONCE = 4_000_000
_COMPARED = 32
_BEYOND = 2**33


def groups(prints: Prints, *, sources: bool = True, stopping: Callable[[], None] = lambda: None) -> array[int]:
    """Return for each row the position of the first row it belongs together with, itself if there is none.

    Args:
        prints: the rows' fingerprints.
        sources: whether rows of one conversation or source belong together too.
        stopping: called between steps; raises to interrupt.
    """
    join = _Union(len(prints))
    join.equal(_columns(prints.near))
    representatives = join.roots()
    if prints.sketches:
        for found in _alike(prints, representatives, stopping):
            join.pairs(found)
    if sources and any(prints.sources):
        join.sources(prints.sources)
    return join.roots()


def first_of_equal(prints: Prints) -> array[int]:
    """Return for each row the position of the first row with exactly the same text."""
    join = _Union(len(prints))
    join.equal(_columns(prints.exact))
    return join.roots()


def copies(prints: Prints, rows: Sequence[Row], *, near: bool, stopping: Callable[[], None] = lambda: None) -> Mapping[int, int]:
    """Return the positions of rows that copy an earlier row, each with the position of that row.

    A near copy has an answer that is alike too: a question asked twice and answered differently is two rows.
    """
    same = first_of_equal(prints)
    found = {place: first for place, first in enumerate(same) if first != place}
    if not near:
        return found
    members: dict[int, list[int]] = {}
    for place, root in enumerate(groups(prints, sources=False, stopping=stopping)):
        if root != place and place not in found:
            members.setdefault(root, [root]).append(place)
    for group in members.values():
        stopping()
        found |= _near_copies(group, rows)
    return found


def _near_copies(group: Sequence[int], rows: Sequence[Row]) -> dict[int, int]:
    kept: list[tuple[int, list[str], list[str]]] = []
    found: dict[int, int] = {}
    for place in group:
        chat = rows[place].chat
        whole = words_of(chat)
        answers = [word for turn in chat.turns if turn.role == "assistant" for word in turn_words(turn)]
        alike = (other for other, theirs, given in kept if likeness(whole, theirs) >= ALIKE and likeness(answers, given) >= ALIKE)
        first = next(alike, None)
        if first is not None:
            found[place] = first
        elif len(kept) < _COMPARED:
            kept.append((place, whole, answers))
    return found


class _Union:
    """Rows joined into groups; the root of a group is its first row."""

    def __init__(self, size: int) -> None:
        self._up = array("q", range(size))

    def _root(self, place: int) -> int:
        up = self._up
        while up[place] != place:
            up[place] = up[up[place]]
            place = up[place]
        return place

    def join(self, first: int, second: int) -> None:
        first, second = self._root(first), self._root(second)
        self._up[max(first, second)] = min(first, second)

    def pairs(self, found: Numbers) -> None:
        for first, second in found.tolist():
            self.join(first, second)

    def equal(self, columns: tuple[Any, Any]) -> None:
        import numpy as np

        order = np.lexsort(columns)
        same = (columns[0][order][1:] == columns[0][order][:-1]) & (columns[1][order][1:] == columns[1][order][:-1])
        self.pairs(np.stack([order[:-1][same], order[1:][same]], axis=1))

    def sources(self, ids: array[int]) -> None:
        import numpy as np

        each = np.frombuffer(ids, np.uint64)
        order = np.argsort(each, kind="stable")
        same = (each[order][1:] == each[order][:-1]) & (each[order][1:] != 0)
        self.pairs(np.stack([order[:-1][same], order[1:][same]], axis=1))

    def roots(self) -> array[int]:
        return array("q", (self._root(place) for place in range(len(self._up))))


def _columns(keys: bytearray) -> tuple[Any, Any]:
    import numpy as np

    both = np.frombuffer(bytes(keys), np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _alike(prints: Prints, representatives: array[int], stopping: Callable[[], None]) -> Iterator[Numbers]:
    """Yield pairs of rows above the limit; of rows with equal text only the first takes part."""
    import numpy as np

    rows = np.frombuffer(representatives, np.int64)
    first = np.flatnonzero(rows == np.arange(len(rows)))
    stopping()
    values, starts, sizes = _rare(prints, first)
    stopping()
    pairs = _candidates(values, starts, sizes)
    tops = np.frombuffer(prints.tops, np.int64)[first]
    for begin in range(0, len(pairs), _AT_ONCE):
        stopping()
        part = np.stack(np.divmod(pairs[begin : begin + _AT_ONCE], len(first)), axis=1)
        yield first[part[_share(values, starts, sizes, tops, part) >= ALIKE]]


def _rare(prints: Prints, rows: Numbers) -> tuple[NDArray[np.uint32], Numbers, Numbers]:
    """Return the sketches of `rows` one after the other without what is common to many: hashes, starts, sizes."""
    import numpy as np

    ends = np.frombuffer(prints.ends, np.int64)
    every = np.diff(ends, prepend=0)
    taken = np.zeros(len(ends), bool)
    taken[rows] = True
    values = np.frombuffer(prints.values, np.uint32)[np.repeat(taken, every)]
    sizes = every[rows]
    most = max(_COMMON_LEAST, len(rows) // _COMMON_SHARE)
    order = np.sort(values)
    common = np.unique(order[most:][order[most:] == order[:-most]])
    del order
    if len(common):
        parts = np.array_split(values, -(-len(values) // _VALUES_AT_ONCE))
        keep = np.concatenate([np.isin(part, common, invert=True) for part in parts])
        before = np.concatenate((np.zeros(1, np.int32), np.cumsum(keep, dtype=np.int32)))
        last = np.cumsum(sizes)
        sizes = (before[last] - before[last - sizes]).astype(np.int64)
        values = values[keep]
    return values, np.cumsum(sizes) - sizes, sizes


def _candidates(values: NDArray[np.uint32], starts: Numbers, sizes: Numbers) -> Numbers:
    """Return pairs of rows that share one of their smallest hashes and lie beside each other by the next one.

    A pair is one number: the first row times the number of rows, and the second.
    """
    import numpy as np

    parts = []
    for probe in range(_PROBES):
        rows = np.flatnonzero(sizes > probe)
        value = values[starts[rows] + probe].astype(np.uint64)
        other = values[starts[rows] + (0 if probe else np.minimum(1, sizes[rows] - 1))].astype(np.uint64)
        parts.append(((value << np.uint64(32)) | other, rows.astype(np.uint32)))
    keys, owners = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    shared, rows = (keys[order] >> np.uint64(32)).astype(np.uint32), owners[order].astype(np.int64)
    del keys, owners, order, parts
    found = []
    for distance in range(1, _NEIGHBOURS + 1):
        same = np.flatnonzero(shared[distance:] == shared[:-distance])
        one, other = rows[same], rows[same + distance]
        found.append((np.minimum(one, other) * len(sizes) + np.maximum(one, other))[one != other])
    codes = np.concatenate(found)
    codes.sort()  # np.unique goes by a hash table, which takes ten times as long here
    distinct: Numbers = codes[np.diff(codes, prepend=-1) != 0]
    return distinct


def _share(values: NDArray[np.uint32], starts: Numbers, sizes: Numbers, tops: Numbers, pairs: Numbers) -> NDArray[np.float64]:
    """Return how much of their word pairs each two rows share: hashes in both over hashes in either, as far as both reach."""
    import numpy as np

    column = np.arange(KEPT)
    padded = np.full((len(pairs), 2 * KEPT), _BEYOND, np.int64)
    for side in (0, 1):
        rows = pairs[:, side]
        inside = column < sizes[rows, None]
        places = np.minimum(starts[rows, None] + column, len(values) - 1)
        padded[:, side * KEPT : (side + 1) * KEPT] = np.where(inside, values[places].astype(np.int64), _BEYOND)
    reach = np.minimum(tops[pairs[:, 0]], tops[pairs[:, 1]])[:, None]
    padded.sort(axis=1)
    counted = padded <= reach
    both = ((padded[:, 1:] == padded[:, :-1]) & counted[:, 1:]).sum(axis=1)
    either = counted.sum(axis=1) - both
    return np.where(either > 0, both / np.maximum(either, 1), 0.0)
