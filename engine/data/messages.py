"""Chat rows: `messages`, a list of `{role, content}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from qlora_tui.engine.data.chat import PARTLY, Chat, Turn, checked, fields, read_role, read_text, read_words, share
from qlora_tui.engine.errors import BadRow

_NOT_TRAINED_YET = ("tool_calls", "function_call", "reasoning_content", "audio")


class Messages:
    """The OpenAI chat shape; roles in any case, content as text or text parts, `weight: 0` or `train: false` on an answer obeyed."""

    name: ClassVar[str] = "messages"
    shape: ClassVar[str] = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Count rows whose `messages` is a list of objects; the key alone counts a little, so that its fault can be named."""
        plain = [fields(row) for row in rows]
        return share(rows, sum(looks_like_turns(row.get("messages")) or PARTLY * ("messages" in row) for row in plain))

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: with the path of the message at fault, such as `messages[2].content`.
        """
        plain = fields(row)
        if plain.get("tools"):
            raise BadRow("tool definitions cannot be trained yet", field="tools", hint="remove the row or its tools")
        return checked(read_turns(plain.get("messages"), "messages"), "messages")


def looks_like_turns(value: object) -> bool:
    """Say whether `value` is a list of objects with a role each."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Mapping) and "role" in fields(item) for item in value)


def read_turns(value: object, field: str) -> list[Turn]:
    """Read a list of messages; nothing in it is passed over in silence.

    Raises:
        BadRow: with the path of the message at fault.
    """
    if not isinstance(value, (list, tuple)):
        raise BadRow("a list of messages was expected", field=field)
    if not value:
        raise BadRow("the list of messages is empty", field=field)
    return [_turn(item, f"{field}[{index}]") for index, item in enumerate(value)]


def _turn(item: object, field: str) -> Turn:
    if not isinstance(item, Mapping):
        raise BadRow("a message must be an object with role and content", field=field)
    plain = fields(item)
    unread = [name for name in _NOT_TRAINED_YET if plain.get(name)]
    if unread:
        raise BadRow(f"{unread[0]} cannot be trained yet", field=f"{field}.{unread[0]}", hint="remove it or the row")
    role = read_role(plain.get("role"), f"{field}.role")
    read = read_text if role == "system" else read_words
    content = read(plain.get("content"), f"{field}.content")
    return Turn(role, content, _wanted(plain))


def _wanted(message: Mapping[str, object]) -> bool:
    weight, train = message.get("weight"), message.get("train")
    return str(weight) not in ("0", "0.0") and train is not False
