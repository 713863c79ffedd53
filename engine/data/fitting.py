"""What becomes of rows with more than `max_length` tokens: dropped, cut, or a chat split between its exchanges.

Nothing is invented: a cut row ends where it was cut, without an end token. Nothing goes unsaid: every row that falls
away is listed, and what was cut or split is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlora_tui.engine.data.chat import Chat, Row, Turn
from qlora_tui.engine.data.render import TokenRow
from qlora_tui.engine.errors import BadRow
from qlora_tui.engine.spec import RunConfig

Rendered = Callable[[Row], TokenRow]


@dataclass(slots=True)
class Fitter:
    """Makes rows fit `max_length` as `too_long` says, and counts what it did."""

    run: RunConfig
    render: Rendered
    cut: int = 0
    split: int = 0
    parts: int = 0
    lost_turns: int = 0

    def fit(self, row: Row, tokens: TokenRow) -> tuple[list[TokenRow], str]:
        """Return what is used of a row, and if it is nothing, why."""
        longest = self.run.max_length
        if len(tokens.input_ids) <= longest:
            return [tokens], ""
        if self.run.too_long == "cut":
            return self._cut(tokens)
        if self.run.too_long == "split":
            return self._split(row)
        return [], f"longer than max_length {longest}"

    def notes(self) -> list[str]:
        """Return, in sentences, what was cut and split."""
        longest, found = self.run.max_length, []
        if self.cut:
            found.append(f"{self.cut} rows were cut at max_length {longest}: their last answers have no end token.")
        if self.split:
            found.append(f"{self.split} chats longer than max_length {longest} were split between turns into {self.parts} rows.")
        if self.lost_turns:
            found.append(f"{self.lost_turns} exchanges of them are left out: longer than max_length alone, or with nothing to train.")
        return found

    def _cut(self, tokens: TokenRow) -> tuple[list[TokenRow], str]:
        longest = self.run.max_length
        if not any(tokens.trained[:longest]):
            return [], f"its whole answer lies beyond max_length {longest}"
        self.cut += 1
        return [TokenRow(tokens.row, tokens.input_ids[:longest], tokens.trained[:longest])], ""

    def _split(self, row: Row) -> tuple[list[TokenRow], str]:
        chat, longest = row.chat, self.run.max_length
        if chat.plain or chat.verbatim or chat.ids is not None:
            return [], f"longer than max_length {longest}, and no chat that could be split"
        opening, exchanges = exchanges_of(chat.turns)
        if len(exchanges) < 2:
            return [], f"one exchange longer than max_length {longest}"
        found, lost = self._last(row, opening, exchanges) if self.run.mask_history else self._all(row, opening, exchanges)
        if not found:
            return [], f"every exchange of it is longer than max_length {longest}"
        self.split, self.parts, self.lost_turns = self.split + 1, self.parts + len(found), self.lost_turns + lost
        return found, ""

    def _all(self, row: Row, opening: Sequence[Turn], exchanges: Sequence[Sequence[Turn]]) -> tuple[list[TokenRow], int]:
        """Fill one part after the other with as many exchanges as fit."""
        found: list[TokenRow] = []
        start = lost = 0
        while start < len(exchanges):
            end, part = start, None
            while end < len(exchanges) and (longer := self._part(row, opening, exchanges[start : end + 1])) is not None:
                end, part = end + 1, longer
            if part is not None and any(part.trained):
                found.append(part)
            else:
                lost += max(1, end - start)
            start = max(end, start + 1)
        return found, lost

    def _last(self, row: Row, opening: Sequence[Turn], exchanges: Sequence[Sequence[Turn]]) -> tuple[list[TokenRow], int]:
        """Keep the last exchange and as many before it as fit: only the last answer of a chat is trained."""
        for start in range(1, len(exchanges)):
            part = self._part(row, opening, exchanges[start:])
            if part is not None and any(part.trained):
                return [part], start
        return [], 0

    def _part(self, row: Row, opening: Sequence[Turn], exchanges: Sequence[Sequence[Turn]]) -> TokenRow | None:
        """Return the tokens of some exchanges; None where they are too many. A part with nothing to train has no trained token."""
        turns = (*opening, *(turn for exchange in exchanges for turn in exchange))
        shown = any(turn.role == "assistant" and turn.trained for turn in turns)
        try:
            tokens = self.render(replace(row, chat=_with(row.chat, turns if shown else _shown(turns))))
        except BadRow:
            return None
        if len(tokens.input_ids) > self.run.max_length:
            return None
        return tokens if shown else replace(tokens, trained=bytes(len(tokens.trained)))


def exchanges_of(turns: Sequence[Turn]) -> tuple[list[Turn], list[list[Turn]]]:
    """Return the system turns at the start, and the rest in exchanges, each from a question to the turn before the next one."""
    begin = next((place for place, turn in enumerate(turns) if turn.role != "system"), len(turns))
    found: list[list[Turn]] = []
    for turn in turns[begin:]:
        asked = any(other.role == "user" for other in found[-1]) if found else False
        if not found or (turn.role == "user" and asked and found[-1][-1].role != "user"):
            found.append([])
        found[-1].append(turn)
    return list(turns[:begin]), found


def _with(chat: Chat, turns: Sequence[Turn]) -> Chat:
    return replace(chat, turns=tuple(turns))


def _shown(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with every answer trained, so that a part that only gives context can be measured."""
    return [replace(turn, trained=True) for turn in turns]
