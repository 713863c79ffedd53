"""Which rows are the same text in substance: groups for the hold-out, copies for the filter.

Rows belong together when they are equal but for case and spaces, when they come from the same conversation, or when
they share seven tenths of their word pairs, which is about nine words of ten in the same order. Word pairs that every tenth row has
are an instruction that was put around different texts, and do not count.

Candidates are rows that share one of the smallest hashes of their sketches; of those that share one, neighbours by
their next hash are compared. A pair above the limit is missed about once in five hundred.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_tui.engine.data.chat import Row
from qlora_tui.engine.data.prints import Prints, Sketches, likeness, turn_words, words_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]
    Hashes = NDArray[np.uint32]

Stopping = Callable[[], None]
ALIKE = 0.7
"""Share of word pairs from which on two rows count as near copies."""
_COMMON_SHARE, _COMMON_LEAST = 10, 8
_PROBES = 6
_NEIGHBOURS = 2
_AT_ONCE = 20_000
_VALUES_AT_ONCE = 2**19
_EVERY_HASH = 2**32
_SAMPLED = 256
_COMPARED = 32
_BEYOND = 2**33


def groups(prints: Prints, *, sources: bool = True, stopping: Stopping = lambda: None) -> array[int]:
    """Return for each row the position of the first row it belongs together with, itself if there is none.

    Args:
        prints: the rows' fingerprints.
        sources: whether rows of one conversation or source belong together too.
        stopping: called between steps, each well under a second for a million rows; raises to interrupt.
    """
    join = _Union(len(prints), stopping)
    join.equal(_columns(prints.near))
    if prints.sketches is not None:
        for found in _alike(prints.sketches, join.roots(), stopping):
            join.pairs(found)
    if sources and any(prints.sources):
        join.sources(prints.sources)
    return _places(join.roots())


def first_of_equal(prints: Prints, stopping: Stopping = lambda: None) -> array[int]:
    """Return for each row the position of the first row with exactly the same text."""
    join = _Union(len(prints), stopping)
    join.equal(_columns(prints.exact))
    return _places(join.roots())


def copies(prints: Prints, rows: Sequence[Row], *, near: bool, stopping: Stopping = lambda: None) -> Mapping[int, int]:
    """Return the positions of rows that copy an earlier row, each with the position of that row.

    A near copy has an answer that is alike too: a question asked twice and answered differently is two rows.
    """
    same = first_of_equal(prints, stopping)
    found = {place: first for place, first in enumerate(same) if first != place}
    if not near:
        return found
    members: dict[int, list[int]] = {}
    for place, root in enumerate(groups(prints, sources=False, stopping=stopping)):
        if root != place and place not in found:
            members.setdefault(root, [root]).append(place)
    for group in members.values():
        found |= _near_copies(group, rows, stopping)
    return found


def _near_copies(group: Sequence[int], rows: Sequence[Row], stopping: Stopping) -> dict[int, int]:
    kept: list[tuple[int, list[str], list[str]]] = []
    found: dict[int, int] = {}
    for place in group:
        stopping()
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

    def __init__(self, size: int, stopping: Stopping) -> None:
        self._up, self._stopping = array("q", range(size)), stopping

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
        for begin in range(0, len(found), _AT_ONCE):
            self._stopping()
            for first, second in found[begin : begin + _AT_ONCE].tolist():
                self.join(first, second)

    def equal(self, columns: tuple[Any, Any]) -> None:
        import numpy as np

        self._stopping()
        order = np.argsort(columns[0], kind="stable")
        self._stopping()
        order = order[np.argsort(columns[1][order], kind="stable")]
        self._stopping()
        same = (columns[0][order][1:] == columns[0][order][:-1]) & (columns[1][order][1:] == columns[1][order][:-1])
        self.pairs(np.stack([order[:-1][same], order[1:][same]], axis=1))

    def sources(self, ids: array[int]) -> None:
        import numpy as np

        each = np.frombuffer(ids, np.uint64)
        order = np.argsort(each, kind="stable")
        same = (each[order][1:] == each[order][:-1]) & (each[order][1:] != 0)
        self.pairs(np.stack([order[:-1][same], order[1:][same]], axis=1))

    def roots(self) -> Numbers:
        import numpy as np

        up = np.array(self._up, np.int64)
        while not np.array_equal(further := up[up], up):  # half the way to the root each time
            self._stopping()
            up = further
        return up


def _places(found: Numbers) -> array[int]:
    return array("q", found.tobytes())


def _columns(keys: bytearray) -> tuple[Any, Any]:
    import numpy as np

    both = np.frombuffer(bytes(keys), np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _alike(sketches: Sketches, rows: Numbers, stopping: Stopping) -> Iterator[Numbers]:
    """Yield pairs of rows above the limit; of rows with equal text, which share an entry of `rows`, only the first takes part."""
    import numpy as np

    first = np.flatnonzero(rows == np.arange(len(rows)))
    hashes, ends, reach = sketches.columns
    values, starts, sizes = _rare(np.frombuffer(hashes, np.uint32), np.frombuffer(ends, np.int64), first, stopping)
    tops = np.frombuffer(reach, np.int64)[first]
    for pairs in _candidates(values, starts, sizes, stopping):
        for begin in range(0, len(pairs), _AT_ONCE):
            stopping()
            part = np.stack(np.divmod(pairs[begin : begin + _AT_ONCE], len(first)), axis=1)
            yield first[part[_share(values, starts, sizes, tops, part) >= ALIKE]]


def _rare(values: Hashes, ends: Numbers, rows: Numbers, stopping: Stopping) -> tuple[Hashes, Numbers, Numbers]:
    """Return the sketches of `rows` one after the other without what is common to many: hashes, starts, sizes."""
    import numpy as np

    every = np.diff(ends, prepend=0)
    if len(rows) < len(every):
        taken = np.zeros(len(every), bool)
        taken[rows] = True
        values = values[np.repeat(taken, every)]
    sizes = every[rows]
    common = _common(values, max(_COMMON_LEAST, len(rows) // _COMMON_SHARE), stopping)
    if len(common):
        keep, before = np.ones(len(values), bool), np.zeros(len(values) + 1, np.int32)
        for begin in range(0, len(values), _VALUES_AT_ONCE):
            stopping()
            part = slice(begin, begin + _VALUES_AT_ONCE)
            keep[part] = np.isin(values[part], common, invert=True)
            before[1:][part] = before[begin] + np.cumsum(keep[part])
        last = np.cumsum(sizes)
        sizes = (before[last] - before[last - sizes]).astype(np.int64)
        stopping()
        values = values[keep]
    stopping()
    return values, np.cumsum(sizes) - sizes, sizes


def _common(values: Hashes, most: int, stopping: Stopping) -> Hashes:
    """Return the hashes that come more than `most` times: looked for in one part of their range after the other."""
    import numpy as np

    found = []
    for low, high in _ranges(values):
        stopping()
        part = np.sort(values[(values >= low) & (values <= high)])
        found.append(np.unique(part[most:][part[most:] == part[:-most]]))
    return np.concatenate(found)


def _candidates(values: Hashes, starts: Numbers, sizes: Numbers, stopping: Stopping) -> Iterator[Numbers]:
    """Yield pairs of rows that share one of their smallest hashes and lie beside each other by the next one.

    A pair is one number: the first row times the number of rows, and the second. One part of the range of hashes comes after the
    other, since rows that share a hash are in the same part; a pair that shares hashes of several parts comes again.
    """
    import numpy as np

    parts = []
    for probe in range(_PROBES):
        stopping()
        rows = np.flatnonzero(sizes > probe)
        value = values[starts[rows] + probe].astype(np.uint64)
        other = values[starts[rows] + (0 if probe else np.minimum(1, sizes[rows] - 1))].astype(np.uint64)
        parts.append(((value << np.uint64(32)) | other, rows.astype(np.uint32)))
    keys, owners = (np.concatenate(part) for part in zip(*parts, strict=True))
    del parts
    shared = (keys >> np.uint64(32)).astype(np.uint32)
    for low, high in _ranges(shared):
        stopping()
        inside = np.flatnonzero((shared >= low) & (shared <= high))
        inside = inside[np.argsort(keys[inside], kind="stable")]
        yield _beside(shared[inside], owners[inside].astype(np.int64), len(sizes))


def _beside(shared: Hashes, rows: Numbers, count: int) -> Numbers:
    """Return the pairs of neighbours in `rows` whose `shared` is the same, each once, in order."""
    import numpy as np

    found = []
    for distance in range(1, _NEIGHBOURS + 1):
        same = np.flatnonzero(shared[distance:] == shared[:-distance])
        one, other = rows[same], rows[same + distance]
        found.append((np.minimum(one, other) * count + np.maximum(one, other))[one != other])
    codes = np.concatenate(found)
    codes.sort()  # np.unique goes by a hash table, which takes ten times as long here
    distinct: Numbers = codes[np.diff(codes, prepend=-1) != 0]
    return distinct


def _ranges(hashes: Numbers | Hashes) -> Iterator[tuple[int, int]]:
    """Yield the first and last hash of parts of their range that hold about equally many of them, few enough to be sorted in a moment."""
    import numpy as np

    parts = 1 + len(hashes) // _VALUES_AT_ONCE
    some = np.sort(hashes[:: 1 + len(hashes) // (_SAMPLED * parts)])
    edges = sorted({0, _EVERY_HASH, *(int(some[len(some) * part // parts]) for part in range(1, parts))})
    for low, high in itertools.pairwise(edges):
        yield low, high - 1


def _share(values: Hashes, starts: Numbers, sizes: Numbers, tops: Numbers, pairs: Numbers) -> NDArray[np.float64]:
    """Return how much of their word pairs each two rows share: hashes in both over hashes in either, as far as both reach."""
    import numpy as np

    width = int(sizes[pairs].max())
    column = np.arange(width)
    padded = np.empty((len(pairs), 2 * width), np.int64)
    for side in (0, 1):
        rows = pairs[:, side]
        inside = column < sizes[rows, None]
        places = np.minimum(starts[rows, None] + column, len(values) - 1)
        padded[:, side * width : (side + 1) * width] = np.where(inside, values[places].astype(np.int64), _BEYOND)
    reach = np.minimum(tops[pairs[:, 0]], tops[pairs[:, 1]])[:, None]
    padded.sort(axis=1)
    counted = padded <= reach
    both = ((padded[:, 1:] == padded[:, :-1]) & counted[:, 1:]).sum(axis=1)
    either = counted.sum(axis=1) - both
    return np.where(either > 0, both / np.maximum(either, 1), 0.0)
