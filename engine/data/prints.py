"""What a row is known by: a fingerprint of its text, one that forgives case and spaces, and a sketch of its word pairs.

The sketch is MinHash in its bottom-k form: one hash a word pair, the smallest 64 of them kept. Two sketches tell how
much of their word pairs two rows share, exactly for short rows and within 0.06 for long ones. A library was weighed:
datasketch keeps Python sets for every band of every row, several GB for a million rows, and brings scipy. Numbers in
arrays take 300 bytes a row, and numpy is here with transformers.

Nothing here hangs on Python's own hash, which differs from process to process.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from hashlib import blake2b

from qlora_tui.engine.data.chat import Chat, Turn

KEPT = 64
"""Hashes of word pairs kept of a row."""
_EVERYTHING = 2**32
_WORDS_KNOWN = 2**20
_WORDS_AT_ONCE = 2**15
_WORD = re.compile(r"\w+")
# Characters that are words of their own where nothing is put between words: Chinese, Japanese, Korean.
_WIDE = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WIDE_WORD = re.compile(f"[{_WIDE}]|[^\\W{_WIDE}]+")
_BORDER = "\0"


def exact_key(chat: Chat) -> bytes:
    """Return a fingerprint of a chat's roles, texts and calls, 16 bytes."""
    return _digest(_parts(chat, str))


def near_key(chat: Chat) -> bytes:
    """Return a fingerprint that is equal for texts that differ in case or spaces only, 16 bytes."""
    return _digest(_parts(chat, _plain))


def words_of(chat: Chat) -> list[str]:
    """Return the words that make a row what it is, a border before each turn.

    System turns do not count where there is anything else: one long instruction would make all rows alike.
    """
    if chat.ids is not None:
        return [str(index) for index in chat.ids[0]]
    turns = [turn for turn in chat.turns if turn.role != "system"] or chat.turns
    found: list[str] = []
    for turn in turns:
        found.append(_BORDER)
        found += turn_words(turn)
    return found


def turn_words(turn: Turn) -> list[str]:
    """Return the words of a turn in lower case, without punctuation unless there is nothing else."""
    text = turn.content.casefold()
    if turn.tool_calls:
        text += f" {json.dumps(turn.tool_calls, sort_keys=True, default=str)}"
    return (_WORD if text.isascii() else _WIDE_WORD).findall(text) or text.split()


class Prints:
    """The fingerprints of many rows, by position in the order they were added; about 350 bytes a row at most."""

    def __init__(self, *, sketches: bool, exact: bool = True) -> None:
        """Begin empty; without `sketches` only texts equal but for case and spaces count as near, without `exact` none as equal."""
        self.sketches = Sketches() if sketches else None
        self._exact = exact
        self.exact, self.near = bytearray(), bytearray()
        self.sources: array[int] = array("Q")

    def __len__(self) -> int:
        """Return how many rows were added."""
        return len(self.sources)

    def add(self, chat: Chat) -> None:
        """Take the fingerprints of one more row."""
        if self._exact:
            self.exact += exact_key(chat)
        self.near += near_key(chat)
        self.sources.append(int.from_bytes(_digest([chat.source_id])[:8]) or 1 if chat.source_id else 0)
        if self.sketches is not None:
            self.sketches.add(words_of(chat))


class Sketches:
    """The smallest hashes of the word pairs of many rows, all in one array; worked out for some thousand words at a time.

    `values` holds the hashes of a row in order as 32-bit numbers, `ends` where each row ends in it, and `tops` the number up to
    which none of the row's is left out.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._values: array[int] = array("I")
        self._ends: array[int] = array("q")
        self._tops: array[int] = array("q")
        self._known = _Hashes()
        self._words: array[int] = array("Q")
        self._sizes: array[int] = array("q")

    def add(self, words: list[str]) -> None:
        """Take one more row."""
        if len(words) == 1:
            words = [*words, _BORDER]
        self._words.extend(map(self._known.__getitem__, words))
        self._sizes.append(len(words))
        if len(self._words) > _WORDS_AT_ONCE:
            self._work_out()

    @property
    def columns(self) -> tuple[array[int], array[int], array[int]]:
        """Return `values`, `ends` and `tops` of all rows so far."""
        self._work_out()
        return self._values, self._ends, self._tops

    def _work_out(self) -> None:
        import numpy as np

        if not self._sizes:
            return
        each, sizes = np.array(self._words, np.uint64), np.array(self._sizes, np.int64)
        del self._words[:], self._sizes[:]
        owner = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
        inside = owner[1:] == owner[:-1]
        pairs = each[:-1] * np.uint64(0x9E3779B97F4A7C15) + each[1:] * np.uint64(0xC2B2AE3D27D4EB4F)
        pairs ^= pairs >> np.uint64(29)
        pairs *= np.uint64(0xBF58476D1CE4E5B9)
        keys = np.sort((owner[1:] << np.uint64(32) | pairs >> np.uint64(32))[inside])  # by row, and in a row by hash
        keys = keys[np.concatenate((np.ones(len(keys[:1]), bool), keys[1:] != keys[:-1]))]
        row = (keys >> np.uint64(32)).astype(np.int64)
        counts = np.bincount(row, minlength=len(sizes))
        rank = np.arange(len(keys)) - (np.cumsum(counts) - counts)[row]
        tops = np.full(len(sizes), _EVERYTHING, np.int64)
        last = (rank == KEPT - 1) & (counts[row] > KEPT)
        tops[row[last]] = keys[last] & np.uint64(0xFFFFFFFF)
        before = self._ends[-1] if self._ends else 0
        self._values.frombytes(keys[rank < KEPT].astype(np.uint32).tobytes())
        self._tops.frombytes(tops.tobytes())
        self._ends.frombytes((before + np.cumsum(np.minimum(counts, KEPT))).tobytes())


def likeness(first: list[str], second: list[str]) -> float:
    """Return the share of word pairs that two lists of words have in common, counted, not estimated."""
    mine, theirs = ({*itertools.pairwise(words)} or {(word, "") for word in words} for words in (first, second))
    return len(mine & theirs) / len(mine | theirs) if mine or theirs else 1.0


class _Hashes(dict[str, int]):
    """A number for each word, kept because words come again and again; forgotten all at once when there are too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _WORDS_KNOWN:
            self.clear()
        self[word] = value = zlib.crc32(word.encode("utf-8", "surrogatepass")) * 0x9E3779B1 + len(word)
        return value


def hashes() -> _Hashes:
    """Return an empty memory of words, to be used for many rows."""
    return _Hashes()


def _parts(chat: Chat, plain: Callable[[str], str]) -> Iterator[str]:
    for turn in chat.turns:
        yield f"{turn.role}\0{plain(turn.content)}"
        if turn.tool_calls or turn.name or turn.thoughts:
            yield _json([turn.name, turn.thoughts, [call.get("function", call) for call in turn.tool_calls]])
    if chat.tools:
        yield _json(list(chat.tools))
    if chat.verbatim:
        yield f"\2{chat.verbatim}"
    if chat.ids is not None:
        yield f"\3{chat.ids}"


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _digest(parts: Iterator[str] | list[str]) -> bytes:
    text = "".join([f"{part}\1" for part in parts])
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
