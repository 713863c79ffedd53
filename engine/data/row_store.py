"""Many rows without holding them: above some size they go to a file that has no name.

The file lies in the cache folder but no path leads to it, so nobody else can open it and it is gone when the rows are
dropped or the process ends, however it ends. Values are written as JSON; nothing that is read back can run.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

from qlora_tui.engine import places
from qlora_tui.engine.data.chat import Chat, Refusal, Row, Turn
from qlora_tui.engine.errors import SpaceError
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib

HELD_BYTES = 64 * 2**20
"""Up to this, items stay in memory: about 60,000 rows of usual length."""
_ITEM_BYTES = 1024
"""What an item costs in memory beside its text."""
_FREE_BYTES = 2**30
_LOOK_EVERY_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**20

Item = TypeVar("Item")


class Pile(Generic[Item]):
    """Items being gathered, in order; `done` returns them as a sequence, in memory if they are few."""

    def __init__(self, pack: Callable[[Item], bytes], unpack: Callable[[bytes], Item]) -> None:
        """Begin with none; `unpack(pack(item))` must equal `item`."""
        self._pack, self._unpack = pack, unpack
        self._few: list[Item] = []
        self._bytes = 0
        self._owned: _Owned | None = None
        self._ends = array("Q")
        self._look_at = _LOOK_EVERY_BYTES

    def __len__(self) -> int:
        return len(self._few) + len(self._ends)

    def add(self, item: Item) -> bytes:
        """Take one more item; return how it was packed.

        Raises:
            SpaceError: the disk is full, or its cache folder cannot be written.
        """
        packed = self._pack(item)
        if self._owned is not None:
            self._write(packed)
            return packed
        self._few.append(item)
        self._bytes += len(packed) + _ITEM_BYTES
        if self._bytes > HELD_BYTES:
            self._to_disk()
        return packed

    def done(self) -> Sequence[Item]:
        """Return what was gathered; nothing may be added after that."""
        if self._owned is None:
            return tuple(self._few)
        try:
            self._owned.file.flush()
        except OSError as error:
            raise _no_room(self._owned.folder, error) from None
        return Stored(self._owned, self._ends, self._unpack)

    def _to_disk(self) -> None:
        folder = places.place("cache")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._owned = _Owned(folder)
        except OSError as error:
            raise _no_room(folder, error) from None
        few, self._few, self._bytes = self._few, [], 0
        for item in few:
            self._write(self._pack(item))

    def _write(self, packed: bytes) -> None:
        if self._owned is None:
            raise AssertionError("nothing is written before there is a file")
        self._bytes += len(packed)
        folder = self._owned.folder
        if self._bytes > self._look_at:
            self._look_at += _LOOK_EVERY_BYTES
            free = shutil.disk_usage(folder).free
            if free < _FREE_BYTES:
                raise _full(folder, free)
        try:
            self._owned.file.write(packed)
        except OSError as error:
            raise _no_room(folder, error) from None
        self._ends.append(self._bytes)


class _Owned:
    """A file without a name, closed when nobody holds this any more and at exit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=_BLOCK_BYTES)  # noqa: SIM115  (it lives as long as this)
        weakref.finalize(self, self.file.close)


class Stored(Sequence[Item]):
    """Items in a file; one is read when it is asked for, and a slice is a view that holds none."""

    def __init__(self, owned: _Owned, ends: array[int], unpack: Callable[[bytes], Item]) -> None:
        """Take over the file; item n ends at byte `ends[n]`, where the next one begins."""
        self._owned, self._ends, self._unpack = owned, ends, unpack

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return Picked(self, range(len(self))[index])
        place = range(len(self))[index]
        begin = self._ends[place - 1] if place else 0
        return self._unpack(os.pread(self._owned.file.fileno(), self._ends[place] - begin, begin))  # pread: any thread, no shared place

    def __iter__(self) -> Iterator[Item]:
        for block, begin, rows in self._blocks():
            place = 0
            for index in rows:
                end = self._ends[index] - begin
                yield self._unpack(block[place:end])
                place = end

    def blocks(self) -> Iterator[bytes]:
        """Yield all items as they are written, many at a time."""
        return (block for block, _, _ in self._blocks())

    def _blocks(self) -> Iterator[tuple[bytes, int, range]]:
        """Yield about a mebibyte after the other, with the place in the file where it begins and the items it holds."""
        first, count = 0, len(self._ends)
        while first < count:
            begin = self._ends[first - 1] if first else 0
            last = max(first + 1, bisect_right(self._ends, begin + _BLOCK_BYTES, first))
            yield os.pread(self._owned.file.fileno(), self._ends[last - 1] - begin, begin), begin, range(first, last)
            first = last


class Picked(Sequence[Item]):
    """Some of the items of another sequence, by their places in it; holds the places alone."""

    def __init__(self, whole: Sequence[Item], places: Sequence[int]) -> None:
        """Show the items of `whole` at `places`, in that order."""
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return Picked(self._whole, self._places[index])
        return self._whole[self._places[index]]


def rows() -> Pile[Row]:
    """Return a pile for rows."""
    return Pile(_pack_row, _unpack_row)


def refusals() -> Pile[Refusal]:
    """Return a pile for refusals."""
    return Pile(_pack_refusal, _unpack_refusal)


def picked(whole: Sequence[Row], places: Sequence[int]) -> Sequence[Row]:
    """Return the rows at `places`; a view where the rows are on the disk."""
    return Picked(whole, places) if isinstance(whole, Stored) else tuple(whole[place] for place in places)


def packed(whole: Sequence[Row]) -> Iterator[bytes]:
    """Yield the rows as they are written to the disk, one after the other or many at a time: joined, the bytes are the same."""
    return whole.blocks() if isinstance(whole, Stored) else map(_pack_row, whole)


def chat_part(packed: bytes) -> bytes:
    """Return the part of a packed row that does not tell where it stood."""
    return packed.split(b",", 2)[2]


def _names_and_defaults(record: type[Any]) -> tuple[Callable[[Any], tuple[Any, ...]], tuple[object, ...]]:
    found = fields(record)
    return attrgetter(*(field.name for field in found)), tuple(None if field.default is MISSING else field.default for field in found)


_TURN, _TURN_DEFAULTS = _names_and_defaults(Turn)
_CHAT, _CHAT_DEFAULTS = _names_and_defaults(Chat)
_PLAIN_FIELDS = 4
"""Fields of a turn before its tool calls: none of them is a tuple."""
_REFUSAL, _ = _names_and_defaults(Refusal)


def _values(found: tuple[Any, ...], defaults: tuple[object, ...]) -> tuple[Any, ...]:
    """Return the values without those at the end that are what they are anyway."""
    last = len(found)
    while last > 1 and found[last - 1] == defaults[last - 1]:
        last -= 1
    return found[:last]


def _pack_row(row: Row) -> bytes:
    turns = [_values(_TURN(turn), _TURN_DEFAULTS) for turn in row.chat.turns]
    return _dump((row.number, row.line, turns, *_values(_CHAT(row.chat), _CHAT_DEFAULTS)[1:]))


def _unpack_row(packed: bytes) -> Row:
    number, line, turns, *rest = _load(packed)
    chat = Chat(tuple([Turn(*(turn if len(turn) <= _PLAIN_FIELDS else map(_tuples, turn))) for turn in turns]), *map(_tuples, rest))
    return Row(number, line, chat)


def _tuples(value: Any) -> Any:
    """Return what was a tuple before JSON made a list of it: a field that is a list, and lists that are right inside it."""
    return tuple(tuple(item) if isinstance(item, list) else item for item in value) if isinstance(value, list) else value


def _pack_refusal(refusal: Refusal) -> bytes:
    return _dump(_REFUSAL(refusal))


def _unpack_refusal(packed: bytes) -> Refusal:
    return Refusal(*_load(packed))


_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"), default=str)
_DECODER = json.JSONDecoder()


def _dump(value: object) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _load(packed: bytes) -> Any:
    return _DECODER.decode(packed.decode("utf-8", "surrogatepass"))


def _no_room(folder: Path, error: OSError) -> SpaceError:
    return SpaceError(
        f"the rows are too many to hold and cannot be written here ({error.strerror or one_line(error)})",
        hint="QLORA_TUI_HOME names another place",
        where=one_line(folder),
    )


def _full(folder: Path, free: int) -> SpaceError:
    return SpaceError(
        f"the rows are too many to hold and only {gib(free)} are free here",
        hint="QLORA_TUI_HOME names another place",
        where=one_line(folder),
    )
