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

    def __init__(self, *, sketches: bool) -> None:
        """Begin empty; without `sketches` only texts that are equal but for case and spaces count as near."""
        self.sketches = sketches
        self.exact, self.near = bytearray(), bytearray()
        self.sources: array[int] = array("Q")
        self.values: array[int] = array("I")
        self.ends: array[int] = array("q")
        self.tops: array[int] = array("q")
        self._known = _Hashes()

    def __len__(self) -> int:
        """Return how many rows were added."""
        return len(self.sources)

    def add(self, chat: Chat) -> None:
        """Take the fingerprints of one more row."""
        self.exact += exact_key(chat)
        self.near += near_key(chat)
        self.sources.append(int.from_bytes(_digest([chat.source_id])[:8]) or 1 if chat.source_id else 0)
        if self.sketches:
            values, top = sketch(words_of(chat), self._known)
            self.values.frombytes(values)
            self.tops.append(top)
            self.ends.append(len(self.values))


def sketch(words: list[str], known: _Hashes) -> tuple[bytes, int]:
    """Return the smallest hashes of the word pairs as 32-bit numbers in order, and the number up to which none is left out."""
    import numpy as np

    if len(words) == 1:
        words = [*words, _BORDER]
    each = np.fromiter((known[word] for word in words), np.uint64, len(words))
    pairs = each[:-1] * np.uint64(0x9E3779B97F4A7C15) + each[1:] * np.uint64(0xC2B2AE3D27D4EB4F)
    pairs ^= pairs >> np.uint64(29)
    pairs *= np.uint64(0xBF58476D1CE4E5B9)
    found = np.sort((pairs >> np.uint64(32)).astype(np.uint32))
    distinct = found[np.concatenate(([True], found[1:] != found[:-1]))] if len(found) else found
    if len(distinct) <= KEPT:
        return distinct.tobytes(), _EVERYTHING
    return distinct[:KEPT].tobytes(), int(distinct[KEPT - 1])


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
    state = blake2b(digest_size=16)
    for part in parts:
        state.update(part.encode("utf-8", "surrogatepass") + b"\1")
    return state.digest()
