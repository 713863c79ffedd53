"""Prompt and completion rows: two texts, or two lists of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from qlora_tui.engine.data.chat import PARTLY, Chat, Turn, checked, fields, read_words, share
from qlora_tui.engine.data.messages import looks_like_turns, read_turns
from qlora_tui.engine.errors import BadRow


class PromptCompletion:
    """`prompt` and `completion`; of message lists only the completion's answers are trained."""

    name: ClassVar[str] = "prompt-completion"
    shape: ClassVar[str] = '{"prompt": "...", "completion": "..."}'

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
        lists = looks_like_turns(prompt), looks_like_turns(completion)
        if lists == (False, False):
            turns = [Turn("user", read_words(prompt, "prompt")), Turn("assistant", read_words(completion, "completion"))]
            return checked(turns, "completion", plain=True)
        before = read_turns(prompt, "prompt") if lists[0] else [Turn("user", read_words(prompt, "prompt"))]
        after = read_turns(completion, "completion") if lists[1] else [Turn("assistant", read_words(completion, "completion"))]
        if after[0].role != "assistant":
            raise BadRow("the completion must begin with an assistant turn", field="completion[0].role")
        return checked([Turn(turn.role, turn.content, turn.role != "assistant") for turn in before] + after, "completion")
