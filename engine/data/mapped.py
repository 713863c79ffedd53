"""One source's format with its columns: what every format has in common, done in one place.

Columns that a person named are renamed before a format sees a row, so formats know one set of names. Pictures and
sound are refused in every format, and the conversation's own id is kept for grouping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qlora_tui.engine.columns import INNER_FIELDS
from qlora_tui.engine.data.chat import Chained, Chat, Format, Placed, Refusal, Row, fields, plain_name
from qlora_tui.engine.data.turns import as_list
from qlora_tui.engine.errors import BadRow
from qlora_tui.engine.text import one_line

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_SOURCE_IDS = ("source_id", "conversation_id", "thread_id", "dialogue_id", "document_id", "doc_id")
_LISTED = 6
LISTS = ("messages", "conversations", "prompt", "completion")


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of a file's columns by field; `renamed` gives a row under the fields' names."""

    by_field: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, row: Mapping[str, object]) -> Mapping[str, object]:
        """Return the row with each mapped column under its field; a column of the field's own name is then another's, and hidden."""
        if not self.by_field:
            return row
        outer = {name: column for name, column in self.by_field.items() if name not in INNER_FIELDS}
        inner = {name: column for name, column in self.by_field.items() if name in INNER_FIELDS}
        found = _under(row, outer)
        return {name: _inner(value, inner) if inner and name in LISTS else value for name, value in found.items()}

    def shown(self, path: str) -> str:
        """Return the path of a field as it is in the file: `prompt[0]` is `question[0]` where prompt is the column question."""
        end = min((place for mark in ".[" if (place := path.find(mark)) >= 0), default=len(path))
        return self.by_field.get(path[:end], path[:end]) + path[end:]


@dataclass(frozen=True, slots=True)
class Mapped:
    """A format bound to the columns of one source."""

    form: Format
    columns: Columns = Columns()

    @property
    def name(self) -> str:
        """The format's name."""
        return self.form.name

    @property
    def shape(self) -> str:
        """A row of the format, as a hint shows it."""
        return self.form.shape

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that are read, by the format's own names."""
        return self.form.reads

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Say how well rows of the file fit."""
        return self.form.score([self.columns.renamed(row) for row in rows])

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: the field at fault, by the name it has in the file.
        """
        try:
            plain = self.columns.renamed(row)
            self._refuse_other(plain, row)
            _refuse_media(plain)
            chat = self.form.read(plain)
        except BadRow as error:
            raise BadRow(error.problem.message, field=self.columns.shown(error.field), hint=error.problem.hint) from None
        found = "" if chat.source_id else _source_id(plain)
        return replace(chat, source_id=found) if found else chat

    def read_all(self, rows: Iterable[Placed], look: Callable[[], None] = lambda: None) -> Iterator[Row | Refusal]:
        """Read rows as they come: each gives a `Row` or a `Refusal`, except those that become part of a later row's chat.

        A chained format looks at all rows before it gives the first; meanwhile it calls `look`, which raises to interrupt.
        """
        if not isinstance(self.form, Chained):
            return (self._read_one(row) for row in rows)
        renamed = ((number, line, self.columns.renamed(row)) for number, line, row in rows)
        found = self.form.chain(renamed, look)
        return (replace(one, field=self.columns.shown(one.field)) if isinstance(one, Refusal) else one for one in found)

    def _refuse_other(self, plain: Mapping[str, object], row: Mapping[str, object]) -> None:
        """Refuse a row that has none of the format's columns, which is a better reason than the first one that is missing."""
        if fields(plain).keys().isdisjoint(self.form.reads):
            held = ", ".join(repr(one_line(key, limit=40)) for key in list(row)[:_LISTED]) or "nothing"
            raise BadRow(f"the row has none of the fields of {self.name}; it holds {held}")

    def _read_one(self, placed: Placed) -> Row | Refusal:
        number, line, row = placed
        try:
            return Row(number, line, self.read(row))
        except BadRow as error:
            return refusal(number, line, error)
        except RecursionError:
            return Refusal(number, line, "", "the row is nested too deeply")


def refusal(number: int, line: int | None, error: BadRow) -> Refusal:
    """Return the line that tells of a row that is not used."""
    hint = f"; {error.problem.hint}" if error.problem.hint else ""
    return Refusal(number, line, error.field, error.problem.message + hint)


def key_in(row: Mapping[str, object], column: str) -> str | None:
    """Return the key of the row that a person means by `column`: that very one, or one that differs in case or spaces only."""
    if column in row:
        return column
    return next((key for key in row if plain_name(key) == plain_name(column)), None)


def _inner(value: object, names: Mapping[str, str]) -> object:
    items = as_list(value)
    if not items:
        return value
    return [_under(item, names) if isinstance(item, Mapping) else item for item in items]


def _under(row: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    """Return the row with the columns that `names` gives to fields under the fields' names, and nothing else under these."""
    keys = {name: key_in(row, column) for name, column in names.items()}
    found = {key: value for key, value in row.items() if key not in keys.values() and plain_name(key) not in names}
    return found | {name: row[key] for name, key in keys.items() if key is not None}


def _refuse_media(row: Mapping[str, object]) -> None:
    plain = fields(row)
    if plain.keys().isdisjoint(_MEDIA):
        return
    name = next((name for name in _MEDIA if plain.get(name)), None)
    if name:
        raise BadRow("pictures and sound cannot be trained; the row would lose them", field=name, hint="remove the column or the row")


def _source_id(row: Mapping[str, object]) -> str:
    plain = fields(row)
    if plain.keys().isdisjoint(_SOURCE_IDS):
        return ""
    found = next((plain[name] for name in _SOURCE_IDS if plain.get(name) not in (None, "")), "")
    return str(found) if isinstance(found, (str, int)) else ""
