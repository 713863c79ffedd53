"""What every format is read into: a chat of turns, and a row that knows where it came from.

Plain records of text. A format file turns one row of a file into a `Chat`; everything after that
(rendering, masks, counts) knows chats only, so a new format cannot change what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

from qlora_tui.engine.errors import BadRow
from qlora_tui.engine.text import one_line

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)

_ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing said, by whom; `trained` is false where the data itself says not to learn an answer."""

    role: Role
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; `plain` marks a prompt and its continuation as two raw texts, for models without a chat template."""

    turns: tuple[Turn, ...]
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row: its number over all sources from 1, its line in its file (None where there are no lines)."""

    number: int
    line: int | None
    chat: Chat


@dataclass(frozen=True, slots=True)
class Refusal:
    """One row that is not used: where it is, the field at fault and a sentence that says why."""

    row: int
    line: int | None
    field: str
    reason: str
    source: str = ""


class Format(Protocol):
    """One shape of rows. A new one is a new file and one more name in `formats.FORMATS`."""

    name: ClassVar[str]
    shape: ClassVar[str]

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Say how well the rows fit: 0 = not mine, 1 = surely mine."""

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: the field at fault and what is wrong with it.
        """


PARTLY = 0.3
"""What a row counts for a format when it has the format's name on it but not its shape."""


def share(rows: Sequence[object], fitting: float) -> float:
    """Return `fitting` as a share of the rows; 0 of none."""
    return fitting / len(rows) if rows else 0.0


def fields(row: Mapping[str, object]) -> dict[str, object]:
    """Return the row by plain key names: lower case, outer spaces cut, `-` and space as `_`.

    Whole names are compared and never parts of them: "text" must not match "context". A key already spelled
    plainly wins over one that only becomes equal.
    """
    plain = {key.strip().casefold().replace("-", "_").replace(" ", "_"): value for key, value in row.items()}
    return {**plain, **row}


def read_role(value: object, field: str) -> Role:
    """Return the role a file means, in any case and by its usual names.

    Raises:
        BadRow: it is no role, or one that cannot be trained on.
    """
    if not isinstance(value, str):
        raise BadRow("the role is missing or no text", field=field)
    role = _ROLE_NAMES.get(value.strip().casefold())
    if role is None:
        raise BadRow(f"role {one_line(value, limit=40)!r} is not known", field=field, hint=f"known are {', '.join(ROLES)}")
    return role


def read_text(value: object, field: str) -> str:
    """Return content as text: a string, a number as written, or a list of `{type: text, text}` parts joined.

    Raises:
        BadRow: it is missing, holds something that is no text, or cannot be written as UTF-8.
    """
    if value is None:
        raise BadRow("the text is missing", field=field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (list, tuple)):
        return "".join(_part_text(part, field) for part in value)
    if not isinstance(value, str):
        raise BadRow(f"text was expected, found {_kind(value)}", field=field)
    if not value.isascii() and not _is_unicode(value):
        raise BadRow("the text holds half of a surrogate pair, which is no character", field=field, hint="write the file as UTF-8 again")
    return value


def read_words(value: object, field: str) -> str:
    """Return `read_text`, refusing text that is empty or only spaces.

    Raises:
        BadRow: nothing is there.
    """
    text = read_text(value, field)
    if not text.strip():
        raise BadRow("the text is empty", field=field)
    return text


def checked(turns: Sequence[Turn], field: str, *, plain: bool = False) -> Chat:
    """Return the turns as a chat that holds an answer to learn.

    Raises:
        BadRow: there is no assistant turn, or none that may be trained.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise BadRow("there is no assistant turn, so nothing to learn", field=field)
    if not any(turn.trained for turn in answers):
        raise BadRow("every assistant turn is marked as not to be trained", field=field)
    return Chat(tuple(turns), plain)


def _part_text(part: object, field: str) -> str:
    if isinstance(part, str):
        return read_text(part, field)
    if not isinstance(part, Mapping):
        raise BadRow(f"a part of the content is {_kind(part)}, not text", field=field)
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise BadRow(f"a part of the content is of type {one_line(kind, limit=40)!r}; only text can be trained", field=field)
    return read_text(part.get("text"), field)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    words: dict[type, str] = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return "nothing" if value is None else words.get(type(value), "something else")
