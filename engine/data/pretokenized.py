"""Rows that are token ids already: `input_ids`, `labels` with -100 where nothing is trained, `attention_mask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from qlora_tui.engine.data.chat import PARTLY, Chat, fields, share
from qlora_tui.engine.data.turns import as_list
from qlora_tui.engine.errors import BadRow
from qlora_tui.engine.text import one_line

_IGNORED = -100


class Tokenized:
    """Token ids made elsewhere; padding is cut off, and labels have to be the ids themselves or -100."""

    name: ClassVar[str] = "tokenized"
    shape: ClassVar[str] = '{"input_ids": [1, 2], "labels": [-100, 2]}'
    reads: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "attention_mask", "token_type_ids", "position_ids")

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Count rows with ids and labels; ids alone count a little, so that the missing labels can be told."""
        plain = [fields(row) for row in rows]
        return share(rows, sum(1 if "labels" in row else PARTLY for row in plain if "input_ids" in row))

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: lists of different lengths, a label that is neither -100 nor its id, a mask with a hole, nothing trained.
        """
        plain = fields(row)
        ids = _numbers(plain, "input_ids", 0)
        if plain.get("labels") is None:
            fault = "labels are missing, so what is trained cannot be told"
            raise BadRow(fault, field="labels", hint="labels equal to input_ids train every token")
        labels = _numbers(plain, "labels", _IGNORED)
        mask = [1] * len(ids) if plain.get("attention_mask") is None else _numbers(plain, "attention_mask", 0)
        for name, found in (("labels", labels), ("attention_mask", mask)):
            if len(found) != len(ids):
                raise BadRow(f"{len(found)} values for {len(ids)} input_ids", field=name)
        first, last = _without_padding(mask)
        for place, (token, label, kept) in enumerate(zip(ids, labels, mask, strict=True)):
            _check(place, token, label, kept=bool(kept))
        trained = tuple(int(label != _IGNORED) for label in labels[first:last])
        if not any(trained[1:]):
            raise BadRow("no token after the first has a label, so nothing to learn", field="labels")
        return Chat((), ids=(tuple(ids[first:last]), trained))


def _check(place: int, token: int, label: int, *, kept: bool) -> None:
    if label == _IGNORED:
        return
    if not kept:
        raise BadRow("padding has a label; -100 was expected", field=f"labels[{place}]")
    if label != token:
        fault = f"{label} is neither -100 nor its token id {token}"
        raise BadRow(fault, field=f"labels[{place}]", hint="labels are not shifted: each stands at its own token")


def _without_padding(mask: Sequence[int]) -> tuple[int, int]:
    """Return where the tokens that count begin and end."""
    if 1 not in mask:
        raise BadRow("no token of it counts", field="attention_mask")
    first, last = mask.index(1), len(mask) - list(reversed(mask)).index(1)
    if any(value != 1 for value in mask[first:last]):
        raise BadRow("only padding at the ends can be masked, and only with 0", field="attention_mask")
    return first, last


def _numbers(row: Mapping[str, object], name: str, least: int) -> list[int]:
    value = as_list(row.get(name))
    if not value:
        raise BadRow("a list of numbers was expected", field=name)
    try:
        found = [_whole(item) for item in value]
    except (TypeError, ValueError) as error:
        raise BadRow(f"{one_line(error, limit=60)} is no whole number", field=name) from None
    odd = next((place for place, number in enumerate(found) if not least <= number < 2**31), None)
    if odd is not None:
        raise BadRow(f"{found[odd]} is out of range", field=f"{name}[{odd}]")
    return found


def _whole(item: object) -> int:
    if isinstance(item, int) and not isinstance(item, bool):
        return item
    if isinstance(item, str) and len(item) < 12 and item.lstrip("-").isdecimal():
        return int(item)
    raise ValueError(repr(item))
