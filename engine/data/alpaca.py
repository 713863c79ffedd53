"""Alpaca rows: `instruction` and `output`, with optional `input`, `system` and `history`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from qlora_tui.engine.data.chat import PARTLY, Chat, Turn, checked, fields, read_text, read_words, share
from qlora_tui.engine.errors import BadRow


class Alpaca:
    """One instruction, maybe with input, and its answer; `history` holds earlier `[question, answer]` pairs."""

    name: ClassVar[str] = "alpaca"
    shape: ClassVar[str] = '{"instruction": "...", "input": "...", "output": "..."}'

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Count rows that have both `instruction` and `output`; `instruction` alone counts a little, to name what is missing."""
        plain = [fields(row) for row in rows]
        return share(rows, sum(1 if "output" in row else PARTLY for row in plain if "instruction" in row))

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row; the input follows the instruction after an empty line.

        Raises:
            BadRow: with the field at fault.
        """
        plain = fields(row)
        turns = [Turn("system", system)] if (system := _optional(plain, "system")).strip() else []
        turns += _history(plain.get("history"))
        question = "\n\n".join(text for name in ("instruction", "input") if (text := _optional(plain, name)).strip())
        if not question:
            raise BadRow("the text is empty", field="instruction")
        return checked([*turns, Turn("user", question), Turn("assistant", read_words(plain.get("output"), "output"))], "output")


def _optional(row: Mapping[str, object], name: str) -> str:
    value = row.get(name)
    return "" if value is None else read_text(value, name)


def _history(value: object) -> list[Turn]:
    if not value:
        return []
    if not isinstance(value, (list, tuple)):
        raise BadRow("a list of [question, answer] pairs was expected", field="history")
    turns = []
    for index, pair in enumerate(value):
        field = f"history[{index}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRow("a pair of question and answer was expected", field=field)
        turns += [Turn("user", read_words(pair[0], f"{field}[0]")), Turn("assistant", read_words(pair[1], f"{field}[1]"))]
    return turns
