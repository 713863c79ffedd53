"""Passages that many rows share: what a model learns first, wanted or not.

Windows of twelve words are counted by hash over at most a few million of them, spread over the rows; what comes back often is
put together to passages and shown with its words. Rows of equal text count once, system turns not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from qlora_tui.engine.data.chat import Chat, Row
from qlora_tui.engine.data.prints import hashes, near_key

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Windows = NDArray[np.uint64]

WINDOW = 12
"""Words of the shortest passage that counts."""
_ROWS, _WINDOWS = 20_000, 3_000_000
_LEAST_ROWS, _LEAST_SHARE = 3, 0.01
_SHOWN = 10
_SHOWN_WORDS = 60
_ABOUT = 0.8


def boilerplate(rows: Sequence[Row], stopping: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Return the passages shared by most rows: `text`, `role` of the turn, `rows` that hold it, and `share` of those looked at.

    Slow; `stopping` is called for every row and raises to interrupt.
    """
    import numpy as np

    known = hashes()
    looked = list(_texts(rows, stopping))
    found: list[Windows] = []
    owner = [-1]
    for row, _, words in looked:
        stopping()
        each = _windows(words, known)
        if row == owner[-1]:
            found[-1] = np.concatenate((found[-1], each))
        else:
            found.append(each)
            owner.append(row)
    distinct = len(found)
    least = max(_LEAST_ROWS, round(_LEAST_SHARE * distinct))
    if not distinct:
        return []
    hashed, counts = np.unique(np.concatenate([np.unique(each) for each in found]), return_counts=True)
    often = {int(code): int(count) for code, count in zip(hashed[counts >= least], counts[counts >= least], strict=True)}
    passages: dict[tuple[str, str], int] = {}
    for _, role, words in looked if often else ():
        for text, count in _passages(words, _windows(words, known).tolist(), often):
            passages[role, text] = max(count, passages.get((role, text), 0))
    return _shown(passages, distinct)


def _texts(rows: Sequence[Row], stopping: Callable[[], None]) -> Iterator[tuple[int, str, list[str]]]:
    """Yield row, role and words of turns, spread over the rows, of each text once, until enough windows were seen."""
    seen: set[bytes] = set()
    windows = 0
    for index in range(min(len(rows), _ROWS)):
        stopping()
        chat = rows[index * len(rows) // min(len(rows), _ROWS)].chat
        key = near_key(chat)
        if key in seen or windows > _WINDOWS:
            continue
        seen.add(key)
        for role, words in _turns(chat):
            windows += len(words)
            yield index, role, words


def _turns(chat: Chat) -> Iterator[tuple[str, list[str]]]:
    return ((turn.role, turn.content.split()) for turn in chat.turns if turn.role != "system")


def _windows(words: Sequence[str], known: dict[str, int]) -> Windows:
    """Return a hash for every twelve words in a row."""
    import numpy as np

    if len(words) < WINDOW:
        return np.zeros(0, np.uint64)
    each = np.fromiter((known[word.casefold()] for word in words), np.uint64, len(words))
    found = np.zeros(len(words) - WINDOW + 1, np.uint64)
    for place in range(WINDOW):
        found = found * np.uint64(0x9E3779B97F4A7C15) + each[place : place + len(found)]
        found ^= found >> np.uint64(31)
    return found


def _passages(words: Sequence[str], windows: Sequence[int], often: dict[int, int]) -> Iterator[tuple[str, int]]:
    """Yield the longest stretches of frequent windows with about the same count, and that count."""
    start = 0
    while start < len(windows):
        count = often.get(windows[start], 0)
        end = start + 1
        while count and end < len(windows) and _ABOUT * count <= often.get(windows[end], 0) <= count / _ABOUT:
            end += 1
        if count:
            yield " ".join(words[start : end + WINDOW - 1]), min(often[code] for code in windows[start:end])
        start = end


def _alike(words: Sequence[str], others: Sequence[str]) -> bool:
    """Say whether more than half of the shorter text is one stretch of the longer: a passage with the word that happens to follow it."""
    same = SequenceMatcher(None, words, others, autojunk=False).find_longest_match().size
    return same > min(len(words), len(others)) / 2


def _shown(passages: dict[tuple[str, str], int], rows: int) -> list[dict[str, Any]]:
    """Return the passages in most rows, the longer first among equals, none that is for its larger part part of one shown."""
    ordered = sorted(passages.items(), key=lambda each: (-each[1], -len(each[0][1]), each[0]))
    shown: list[dict[str, Any]] = []
    for (role, text), count in ordered:
        if len(shown) == _SHOWN:
            break
        if any(_alike(text.casefold().split(), other["text"].casefold().split()) for other in shown):
            continue
        shown.append({"text": text, "role": role, "rows": count, "share": count / rows})
    for each in shown:
        words = each["text"].split(" ")
        each["text"] = " ".join(words[:_SHOWN_WORDS]) + (" ..." if len(words) > _SHOWN_WORDS else "")
    return shown
