"""What every format is read into: a chat of turns, and a row that knows where it came from.

Plain records of text. A format file turns one row of a file into a `Chat`; everything after that
(rendering, masks, counts) knows chats only, so a new format cannot change what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

from qlora_tui.engine.errors import BadRow
from qlora_tui.engine.text import one_line

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)

_ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing said, by whom; `trained` is false where the data itself says not to learn an answer.

    `tool_calls` are those of an answer, each `{"type": "function", "function": {"name", "arguments"}}` with the arguments as
    an object and `id` where the data has one; then `content` may be empty. A `tool` turn is what a tool gave back; `name` and
    `tool_call_id` are empty where the data names none. `thoughts` are what an answer gives as `reasoning_content`. A renderer
    that cannot write one of these refuses the row.
    """

    role: Role
    content: str
    trained: bool = True
    name: str = ""
    tool_calls: tuple[Mapping[str, object], ...] = ()
    tool_call_id: str = ""
    thoughts: str = ""


Verbatim = Literal["", "text", "segments"]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, or a text of another kind.

    - `plain`: a prompt and its continuation (two turns), written as raw text where the model has no chat template.
    - `verbatim`: never through a template. `text`: one assistant turn that is the whole text; the tokenizer's first token comes
      before it and its end token after it, trained. `segments`: pieces written one after the other, nothing added at either end;
      assistant turns are trained, user turns are given, and control tokens in them are meant.
    - `ids`: token ids and, for each, 1 if it is trained: tokenized elsewhere. Then there are no turns, so whatever compares
      rows has to compare `ids`.
    - `tools`: what the model may call, each `{"type": "function", "function": {...}}`.
    - `source_id`: the conversation's own id in the data, for grouping; empty if it has none.
    - `joined`: numbers of the other rows of the file that are part of this chat (rows that name their parent).
    """

    turns: tuple[Turn, ...]
    plain: bool = False
    tools: tuple[Mapping[str, object], ...] = ()
    verbatim: Verbatim = ""
    ids: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    source_id: str = ""
    joined: tuple[int, ...] = ()

    @property
    def segments(self) -> tuple[tuple[str, bool], ...]:
        """The pieces of a verbatim text, each with whether it is trained; empty for a chat."""
        return tuple((turn.content, turn.role == "assistant" and turn.trained) for turn in self.turns) if self.verbatim else ()


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


Placed = tuple[int, int | None, Mapping[str, object]]
"""A row as found: its number over all sources, its line, its fields."""


class Format(Protocol):
    """One shape of rows. A new one is a new file and one more name in `formats.FORMATS`."""

    @property
    def name(self) -> str:
        """The name that `data_format` chooses it by."""

    @property
    def shape(self) -> str:
        """A row of it, as a hint shows it."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that are read, by plain name; what else a row holds is left out, and said to be."""

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Say how well the rows fit: 0 = not mine, 1 = surely mine."""

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: the field at fault and what is wrong with it.
        """


@runtime_checkable
class Settling(Protocol):
    """A format that says more once it has seen rows: which columns it reads, so that no row is read another way than the next."""

    def settled(self, rows: Sequence[Mapping[str, object]], shown: Callable[[str], str] = str) -> tuple[Format, str]:
        """Return the format bound to its columns, and what to say about it (empty: nothing); `shown` gives a field's name in the file."""


@runtime_checkable
class Chained(Protocol):
    """A format whose rows belong together: one pass over all rows comes before the first chat."""

    def chain(self, rows: Iterable[Placed], look: Callable[[], None] = lambda: None) -> Iterator[Row | Refusal]:
        """Return the chats, and a refusal for each row that is part of none, in order of the rows; `look` raises to interrupt."""


_SHORT_KEY = 40
_MOST_NAMES = 1024
_plain_names: set[str] = set()
PARTLY = 0.3
"""What a row counts for a format when it has the format's name on it but not its shape."""


def share(rows: Sequence[object], fitting: float) -> float:
    """Return `fitting` as a share of the rows; 0 of none."""
    return fitting / len(rows) if rows else 0.0


def fields(row: Mapping[str, object]) -> Mapping[str, object]:
    """Return the row by plain key names.

    Whole names are compared and never parts of them: "text" must not match "context". A key already spelled
    plainly wins over one that only becomes equal.
    """
    if row.keys() <= _plain_names or all(map(_is_plain, row)):
        return row
    return {**{plain_name(key): value for key, value in row.items()}, **row}


def plain_name(key: str) -> str:
    """Return a key in lower case, outer spaces cut, `-` and space as `_`."""
    return key.strip().casefold().replace("-", "_").replace(" ", "_")


def _is_plain(key: str) -> bool:
    """Say whether a name is plain already, and remember the few that come with every row."""
    plain = plain_name(key) == key
    if plain and len(key) <= _SHORT_KEY and len(_plain_names) < _MOST_NAMES:  # or a hostile file could fill the memory
        _plain_names.add(key)
    return plain


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
        return _parts_text(value, field)
    if not isinstance(value, str):
        raise BadRow(f"text was expected, found {kind_of(value)}", field=field)
    if not value.isascii() and not _is_unicode(value):
        raise BadRow("the text holds half of a surrogate pair, which is no character", field=field, hint="write the file as UTF-8 again")
    return value


def read_optional(row: Mapping[str, object], names: Sequence[str]) -> str:
    """Return the first of the named fields that holds more than spaces; empty if none does.

    Raises:
        BadRow: what is there is no text.
    """
    for name in names:
        text = "" if row.get(name) is None else read_text(row[name], name)
        if text.strip():
            return text
    return ""


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


def read_flag(value: object, field: str) -> bool | None:
    """Return true or false as files spell them: `true`, `"False"`, `1`, `"0"`; None where nothing is said.

    Raises:
        BadRow: it is neither.
    """
    if value is None or value == "":
        return None
    word = str(value).strip().casefold()
    if isinstance(value, (bool, int, float, str)) and word in ("true", "false", "0", "1", "0.0", "1.0"):
        return word in ("true", "1", "1.0")
    raise BadRow(f"{one_line(value, limit=40)!r} is neither true nor false", field=field)


def kind_of(value: object) -> str:
    """Return what a value is, in words."""
    words: dict[type, str] = {
        dict: "an object",
        list: "a list",
        tuple: "a list",
        bool: "true or false",  # before int, which it is too
        int: "a number",
        float: "a number",
        str: "text",
    }
    if value is None:
        return "nothing"
    return next((word for kind, word in words.items() if isinstance(value, kind)), "something else")


def _parts_text(parts: Sequence[object], field: str) -> str:
    if len(parts) > 1 and any(isinstance(part, str) for part in parts):
        raise BadRow(f"one text was expected, found a list of {len(parts)} texts", field=field, hint="which one is meant cannot be told")
    return "".join(_part_text(part, field) for part in parts)


def _part_text(part: object, field: str) -> str:
    if isinstance(part, str):
        return read_text(part, field)
    if not isinstance(part, Mapping):
        raise BadRow(f"a part of the content is {kind_of(part)}, not text", field=field)
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise BadRow(f"a part of the content is of type {one_line(kind, limit=40)!r}; only text can be trained", field=field)
    if any(part.get(name) is not None for name in ("train", "weight")):
        raise BadRow("a part of an answer has a train flag of its own", field=field, hint="flags of whole turns, or segments, can be told")
    return read_text(part.get("text"), field)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
