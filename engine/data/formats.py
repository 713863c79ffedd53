"""The formats there are, and how one is chosen: by scored evidence, told in a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qlora_tui.engine.columns import INNER_FIELDS, fault, split
from qlora_tui.engine.data.alpaca import Alpaca
from qlora_tui.engine.data.chained import Chained
from qlora_tui.engine.data.chat import Format, Settling, plain_name
from qlora_tui.engine.data.mapped import LISTS, Columns, Mapped, key_in
from qlora_tui.engine.data.messages import MESSAGES, SHAREGPT
from qlora_tui.engine.data.preference import MOST, refused_shape
from qlora_tui.engine.data.pretokenized import Tokenized
from qlora_tui.engine.data.prompt_completion import PromptCompletion
from qlora_tui.engine.data.question_answer import QuestionAnswer
from qlora_tui.engine.data.texts import RawText, Segments
from qlora_tui.engine.errors import DataError
from qlora_tui.engine.spec import nearest
from qlora_tui.engine.text import one_line

FORMATS: tuple[Format, ...] = (
    MESSAGES,
    SHAREGPT,
    Chained(),
    Alpaca(),
    PromptCompletion(),
    QuestionAnswer(),
    Segments(),
    Tokenized(),
    RawText(),
)
"""Every format, in the order that breaks a tie."""

_KNOWN = ("messages", "conversations", "instruction", "output", "prompt", "completion", "question", "answer", "text", "input_ids")
_LISTED = 6


def detect(rows: Sequence[Mapping[str, object]], wanted: str = "auto", columns: Sequence[str] = ()) -> tuple[Mapped, str]:
    """Return the format of `rows`, bound to its columns, and the sentence that says why.

    `wanted` other than `auto` is obeyed; `columns` are `data_columns`.

    Raises:
        DataError: no format fits (the keys that were found and the known shapes are named), the rows are of a kind that cannot
            be trained on, or a column that was named is in none of them.
    """
    mapping = _columns(rows, columns)
    seen = [mapping.renamed(row) for row in rows]
    if wanted != "auto":
        form = _bound(_named(wanted), mapping)
        if unread := _unread(form, mapping):
            raise DataError(f"data_columns names {unread}, which {form.name} does not read", hint=f"it reads {', '.join(form.reads)}")
        form, told = _settled(form, seen, mapping)
        return Mapped(form, mapping), "; ".join([f"{wanted}, as data_format says", *told, *_left_out(form, seen)])
    forms = [form for form in (_bound(form, mapping) for form in FORMATS) if not _unread(form, mapping)]
    if not forms:
        raise DataError("data_columns names fields that belong to no one format", hint="--help-keys tells what they are for")
    fits = [sum(form.score([row]) >= MOST for row in seen) for form in forms]
    scores = [form.score(seen) for form in forms]
    best = scores.index(max(scores))
    if (refused := refused_shape(seen)) and _may_refuse(forms[best].name, fits[best], len(seen)):
        raise refused
    if scores[best] <= 0:
        raise DataError(f"no known format fits: the rows hold {_keys(rows)}", hint=_shapes(rows))
    others = [form.name for form, fit in zip(forms, fits, strict=True) if form is not forms[best] and fit and fit >= fits[best]]
    form, told = _settled(forms[best], seen, mapping)
    why = [f"{form.name}: {fits[best]} of the {len(rows)} rows looked at fit", *told]
    if others:
        why.append(f"{' and '.join(others)} would fit too: --set data_format=NAME chooses")
    return Mapped(form, mapping), "; ".join([*why, *_left_out(form, seen)])


def _may_refuse(best: str, fitting: int, count: int) -> bool:
    """Say whether a shape that compares answers is what the rows are about: not where they hold a question with its answer as well."""
    return best not in ("question-answer", "alpaca") or fitting < MOST * count


def _bound(form: Format, mapping: Columns) -> Format:
    return form.bound(mapping.by_field) if isinstance(form, (QuestionAnswer, Chained)) else form


def _unread(form: Format, mapping: Columns) -> str:
    """Return a field of `data_columns` that this format would not read; naming it must not be without effect."""
    lists = any(name in LISTS for name in form.reads)
    known = {*form.reads, "source_id", *(INNER_FIELDS if lists else ())}
    return next((name for name in mapping.by_field if name not in known), "")


def _settled(form: Format, rows: Sequence[Mapping[str, object]], mapping: Columns) -> tuple[Format, list[str]]:
    if not isinstance(form, Settling):
        return form, []
    bound, told = form.settled(rows, mapping.shown)
    return bound, [told] if told else []


def _named(wanted: str) -> Format:
    for form in FORMATS:
        if form.name == wanted:
            return form
    raise DataError(
        f"no data format is called {one_line(wanted, limit=60)!r}", hint=f"known are {', '.join(form.name for form in FORMATS)}"
    )


def _columns(rows: Sequence[Mapping[str, object]], entries: Sequence[str]) -> Columns:
    if sentence := fault(entries):
        raise DataError(f"data_columns: {one_line(sentence)}")
    mapping = dict(split(entry) for entry in entries)
    for field, column in mapping.items():
        if field not in INNER_FIELDS and rows and not any(key_in(row, column) is not None for row in rows):
            told = f"data_columns reads {field} from the column {one_line(column, limit=60)!r}, which none of the rows looked at has"
            raise DataError(told, hint=f"they hold {_keys(rows)}")
    return Columns(mapping)


def _left_out(form: Format, rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return what the sentence says about columns that hold something and are not read."""
    held = Counter(key for row in rows for key, value in row.items() if value not in (None, "", [], {}))
    names = [key for key, _ in held.most_common() if plain_name(key) not in form.reads]
    if not names:
        return []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"not read: {', '.join(one_line(name, limit=40) for name in names[:_LISTED])}{more}"]


def _keys(rows: Sequence[Mapping[str, object]]) -> str:
    counted = Counter(key for row in rows for key in row)
    names = ", ".join(repr(one_line(key, limit=40)) for key, _ in counted.most_common(_LISTED))
    return f"the keys {names}" if names else "no keys"


def _shapes(rows: Sequence[Mapping[str, object]]) -> str:
    close = next((f"{hint} " for row in rows[:1] for key in row if (hint := nearest(key, _KNOWN))), "")
    return close + "known shapes: " + " or ".join(form.shape for form in FORMATS) + "; data_columns names columns, such as prompt=question"
