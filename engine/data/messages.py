"""Chat rows: `messages`, or ShareGPT's `conversations`: a list of turns, with tools and a system text beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qlora_tui.engine.data.chat import PARTLY, Chat, checked, fields, read_optional, share
from qlora_tui.engine.data.tools import read_tools
from qlora_tui.engine.data.turns import looks_like_turns, read_turns, with_system

SYSTEM = ("system", "system_prompt")


@dataclass(frozen=True, slots=True)
class TurnList:
    """A list of turns in one of `names`; roles in any case, content as text or text parts, train flags of answers obeyed."""

    name: str
    shape: str
    names: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that are read, by plain name."""
        return (*self.names, *SYSTEM, "tools", "functions")

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Count rows that hold a list of turns; the name alone counts a little, so that its fault can be told."""
        return share(rows, sum(self._fit(fields(row)) for row in rows))

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: with the path of the message at fault, such as `messages[2].content`.
        """
        plain = fields(row)
        name = next((name for name in self.names if plain.get(name) is not None), self.names[0])
        turns = with_system(read_optional(plain, SYSTEM), read_turns(plain.get(name), name), name)
        chat, tools = checked(turns, name), read_tools(plain)
        return replace(chat, tools=tools) if tools else chat

    def _fit(self, row: Mapping[str, object]) -> float:
        if any(looks_like_turns(row.get(name)) for name in self.names):
            return 1.0
        return PARTLY if any(name in row for name in self.names) else 0.0


MESSAGES = TurnList(
    "messages", '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}', ("messages",)
)
SHAREGPT = TurnList(
    "sharegpt", '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}', ("conversations", "conversation")
)
