"""Texts that go through no chat template: whole texts, and pieces that say themselves what is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from qlora_tui.engine.data.chat import PARTLY, Chat, Turn, fields, read_flag, read_text, read_words, share
from qlora_tui.engine.data.turns import as_list
from qlora_tui.engine.errors import BadRow

_WEAK = 0.5
"""Many rows of other formats carry a rendered `text` beside their fields, so the name alone is weak evidence."""


class RawText:
    """`text`: written as it is, all of it trained."""

    name: ClassVar[str] = "text"
    shape: ClassVar[str] = '{"text": "..."}'
    reads: ClassVar[tuple[str, ...]] = ("text",)

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Count rows with a text by half, so that any format that names what is asked and answered comes first."""
        return _WEAK * share(rows, sum(isinstance(fields(row).get("text"), str) for row in rows))

    def settled(self, rows: Sequence[Mapping[str, object]], shown: Callable[[str], str] = str) -> tuple[RawText, str]:
        """Return the format itself, and say what it means."""
        return self, "no chat: every word of a text is trained"

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: there is no text in it.
        """
        return Chat((Turn("assistant", read_words(fields(row).get("text"), "text")),), verbatim="text")


class Segments:
    """`segments`: pieces of `{text, label}` written one after the other, those with a true label trained."""

    name: ClassVar[str] = "segments"
    shape: ClassVar[str] = '{"segments": [{"text": "...", "label": false}, {"text": "...", "label": true}]}'
    reads: ClassVar[tuple[str, ...]] = ("segments",)

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Count rows whose `segments` are objects with text and label; the name alone counts a little."""
        return share(rows, sum(_fit(fields(row)) for row in rows))

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: with the piece at fault, or nothing in it is trained.
        """
        pieces = as_list(fields(row).get("segments"))
        if not pieces:
            raise BadRow("a list of pieces with text and label was expected", field="segments")
        turns = tuple(_piece(piece, f"segments[{index}]") for index, piece in enumerate(pieces))
        if not any(turn.role == "assistant" and turn.content for turn in turns):
            raise BadRow("no piece has a true label, so nothing to learn", field="segments")
        return Chat(turns, verbatim="segments")


def _fit(row: Mapping[str, object]) -> float:
    pieces = as_list(row.get("segments"))
    if pieces and all(isinstance(piece, Mapping) and {"text", "label"} <= fields(piece).keys() for piece in pieces):
        return 1.0
    return PARTLY if "segments" in row else 0.0


def _piece(piece: object, field: str) -> Turn:
    if not isinstance(piece, Mapping):
        raise BadRow("a piece must be an object with text and label", field=field)
    plain = fields(piece)
    trained = read_flag(plain.get("label"), f"{field}.label")
    if trained is None:
        raise BadRow("the label is missing: true is trained, false is not", field=f"{field}.label")
    return Turn("assistant" if trained else "user", read_text(plain.get("text"), f"{field}.text"))
