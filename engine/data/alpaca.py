"""Alpaca rows: `instruction` and `output`, with optional `input`, `system` and `history`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from qlora_tui.engine.data.chat import PARTLY, Chat, Turn, checked, fields, read_optional, read_words, share
from qlora_tui.engine.data.messages import SYSTEM
from qlora_tui.engine.data.turns import read_history, with_system
from qlora_tui.engine.errors import BadRow


class Alpaca:
    """One instruction, maybe with input, and its answer; `history` holds earlier `[question, answer]` pairs."""

    name: ClassVar[str] = "alpaca"
    shape: ClassVar[str] = '{"instruction": "...", "input": "...", "output": "..."}'
    reads: ClassVar[tuple[str, ...]] = ("instruction", "input", "output", "history", *SYSTEM)

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
        question = "\n\n".join(text for name in ("instruction", "input") if (text := read_optional(plain, (name,))))
        if not question:
            raise BadRow("the text is empty", field="instruction")
        turns = [*read_history(plain.get("history")), Turn("user", question), Turn("assistant", read_words(plain.get("output"), "output"))]
        return checked(with_system(read_optional(plain, SYSTEM), turns, "system"), "output")
