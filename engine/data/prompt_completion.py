"""Prompt and completion rows: two texts, or two lists of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from qlora_tui.engine.data.chat import PARTLY, Chat, Turn, checked, fields, read_optional, read_words, share
from qlora_tui.engine.data.messages import SYSTEM
from qlora_tui.engine.data.tools import read_tools
from qlora_tui.engine.data.turns import looks_like_turns, read_turns, with_system
from qlora_tui.engine.errors import BadRow


class PromptCompletion:
    """`prompt` and `completion`; of message lists only the completion's answers are trained."""

    name: ClassVar[str] = "prompt-completion"
    shape: ClassVar[str] = '{"prompt": "...", "completion": "..."}'
    reads: ClassVar[tuple[str, ...]] = ("prompt", "completion", *SYSTEM, "tools", "functions")

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Count rows that have both `prompt` and `completion`; `prompt` alone counts a little, so that what is missing can be told."""
        plain = [fields(row) for row in rows]
        return share(rows, sum(1 if "completion" in row else PARTLY for row in plain if "prompt" in row))

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: with the field at fault.
        """
        plain = fields(row)
        prompt, completion = plain.get("prompt"), plain.get("completion")
        system, tools = read_optional(plain, SYSTEM), read_tools(plain)
        lists = looks_like_turns(prompt), looks_like_turns(completion)
        if lists == (False, False):
            turns = [Turn("user", read_words(prompt, "prompt")), Turn("assistant", read_words(completion, "completion"))]
            raw = not system and not tools
            return replace(checked(with_system(system, turns, "system"), "completion", plain=raw), tools=tools)
        before = read_turns(prompt, "prompt") if lists[0] else [Turn("user", read_words(prompt, "prompt"))]
        after = read_turns(completion, "completion") if lists[1] else [Turn("assistant", read_words(completion, "completion"))]
        if after[0].role != "assistant":
            raise BadRow("the completion must begin with an assistant turn", field="completion[0].role")
        checked(after, "completion")
        given = [replace(turn, trained=turn.role != "assistant") for turn in with_system(system, before, "prompt")]
        return replace(checked([*given, *after], "completion"), tools=tools)
