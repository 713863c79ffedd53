"""A row as it will be trained, in pieces for people to look at: what is trained, what is not, and the special tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_tui.engine.data.render import TokenRow
from qlora_tui.engine.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens one after the other that are of one kind: their text, whether they are trained, and whether they are special tokens."""

    text: str
    trained: bool
    special: bool


def pieces(row: TokenRow, tokenizer: Tokenizer) -> list[Piece]:
    """Return the row in pieces whose texts joined are its text; each special token is a piece of its own.

    Texts are the dataset's own: whoever shows them escapes them.
    """
    ids = list(row.input_ids)
    marked = special(ids, tokenizer)
    kinds = [
        (bool(trained), is_special, place if is_special else -1)
        for place, (trained, is_special) in enumerate(zip(row.trained, marked, strict=True))
    ]
    found: list[Piece] = []
    end = 0
    for (trained, is_special, _), run in itertools.groupby(kinds):
        start, end = end, end + sum(1 for _ in run)
        found.append(Piece(tokenizer.token(ids[start]) if is_special else _text(ids, start, end, tokenizer), trained, is_special))
    return found


def special(ids: Sequence[int], tokenizer: Tokenizer) -> list[bool]:
    """Return for each token whether it is one of those that were added to the vocabulary, such as the end of a turn."""
    added = tokenizer.control_ids | frozenset(tokenizer.added.values())
    return [index in added for index in ids]


def _text(ids: Sequence[int], start: int, end: int, tokenizer: Tokenizer) -> str:
    """Return the text of a part of the tokens; some tokenizers drop the space before the first word unless a token stands before it."""
    if start:
        before = tokenizer.decode(ids[start - 1 : start])
        text = tokenizer.decode(ids[start - 1 : end])
        if before and text.startswith(before) and "\ufffd" not in before:
            return text[len(before) :]
    return tokenizer.decode(ids[start:end])
