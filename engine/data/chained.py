"""Rows that name their parent: `id`, `parent_id`, a question and an answer. A row without a parent begins a chat.

One chat is made for each row that nobody names as parent, from the first row down to it. Where a chat branches,
the shared answers are trained in the first branch only, so that every answer of the file is trained once.
Structure is kept in memory, about 200 bytes a row; the texts wait in a temporary file.
"""

from __future__ import annotations

import json
import re
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO

from qlora_tui.engine.data.alpaca import Alpaca
from qlora_tui.engine.data.chat import Chat, Placed, Refusal, Row, Turn, fields, share
from qlora_tui.engine.data.prompt_completion import PromptCompletion
from qlora_tui.engine.data.question_answer import QuestionAnswer
from qlora_tui.engine.data.tape import polled
from qlora_tui.engine.errors import BadRow
from qlora_tui.engine.text import one_line

Pair = Alpaca | PromptCompletion | QuestionAnswer
_NO_PARENT = -1
_ALONE = "--set data_format=question-answer reads every row on its own"


@dataclass(frozen=True, slots=True)
class Chained:
    """Questions and answers joined into chats by `parent_id`; `pairs` are the formats a single row may have, the likely one first."""

    pairs: tuple[Pair, ...] = (Alpaca(), PromptCompletion(), QuestionAnswer())

    name = "chained"
    shape = '{"id": "2", "parent_id": "1", "prompt": "...", "answer": "..."}'

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that are read, by plain name."""
        return ("id", "parent_id", *(name for pair in self.pairs for name in pair.reads))

    def bound(self, names: Iterable[str]) -> Chained:
        """Return the format with those of its columns fixed that a person has named."""
        given = tuple(names)
        return Chained(tuple(pair.bound(given) if isinstance(pair, QuestionAnswer) else pair for pair in self.pairs))

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Count rows with an id, a parent id that may be empty, a question and an answer."""
        plain = [fields(row) for row in rows]
        return share(rows, sum({"id", "parent_id"} <= row.keys() and any(pair.score([row]) == 1 for pair in self.pairs) for row in plain))

    def settled(self, rows: Sequence[Mapping[str, object]], shown: Callable[[str], str] = str) -> tuple[Chained, str]:
        """Return the format with one way to read a row: the one that fits most of `rows`."""
        best = max(self.pairs, key=lambda pair: pair.score(rows))
        bound, told = best.settled(rows, shown) if isinstance(best, QuestionAnswer) else (best, "")
        return Chained((bound,)), told

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read a row that begins a chat; the others need `chain`.

        Raises:
            BadRow: the field at fault, or the row has a parent.
        """
        plain = fields(row)
        if _identity(plain.get("parent_id"), "parent_id"):
            raise BadRow("the row has a parent, and is read together with it only", field="parent_id", hint=_ALONE)
        return self.read_alone(plain)

    def read_alone(self, row: Mapping[str, object]) -> Chat:
        """Read question and answer of one row, whoever its parent is.

        Raises:
            BadRow: the field at fault.
        """
        if row.get("history"):
            raise BadRow("a history beside a parent: which one is meant cannot be told", field="history", hint="remove one of them")
        pair = next((pair for pair in self.pairs if pair.score([row]) == 1), self.pairs[0])
        return replace(pair.read(row), plain=False)

    def chain(self, rows: Iterable[Placed], look: Callable[[], None] = lambda: None) -> Iterator[Row | Refusal]:
        """Return a chat for each last row of a chain, and a refusal for each row that cannot be part of one, in order."""
        with tempfile.TemporaryFile() as file:
            yield from _Chains(file, self, rows, look).results()


class _Chains:
    def __init__(self, file: IO[bytes], form: Chained, rows: Iterable[Placed], look: Callable[[], None]) -> None:
        self.file, self.form, self.look = file, form, look
        self.numbers, self.lines, self.places = array("q"), array("q"), array("q")
        self.parents, self.systems = array("q"), array("q")
        self.faults: dict[int, BadRow] = {}
        self.by_id: dict[str, int] = {}
        self.twice: set[str] = set()
        named = [self._add(row) for row in rows]
        for index, parent in enumerate(polled(named, look)):
            self.parents.append(self._parent(index, parent))
        self._spread()

    def results(self) -> Iterator[Row | Refusal]:
        count = len(self.numbers)
        inner, trained = bytearray(count), bytearray(count)
        for index in polled(range(count), self.look):
            if index not in self.faults and self.parents[index] >= 0:
                inner[self.parents[index]] = 1
        for index in polled(range(count), self.look):
            line = self.lines[index] or None
            if fault := self.faults.get(index):
                hint = f"; {fault.problem.hint}" if fault.problem.hint else ""
                yield Refusal(self.numbers[index], line, fault.field, fault.problem.message + hint)
            elif not inner[index]:
                yield Row(self.numbers[index], line, self._chat(index, trained))

    def _add(self, row: Placed) -> str:
        """Keep one row and return the id of its parent; what is wrong with it is remembered."""
        number, line, found = row
        index = len(self.numbers)
        self.numbers.append(number)
        self.lines.append(line or 0)
        self.places.append(self.file.tell())
        self.systems.append(0)
        plain = fields(found)
        try:
            parent = _identity(plain.get("parent_id"), "parent_id")
            self._name(index, _identity(plain.get("id"), "id"))
            chat = self.form.read_alone(plain)
        except BadRow as error:
            self.faults[index] = error
            return ""
        except RecursionError:
            self.faults[index] = BadRow("the row is nested too deeply")
            return ""
        self.systems[index] = hash(chat.turns[0].content) if chat.turns[0].role == "system" else 0
        self.file.write(json.dumps([[turn.role, turn.content] for turn in chat.turns]).encode() + b"\n")
        return parent

    def _name(self, index: int, name: str) -> None:
        if not name:
            raise BadRow("the id is missing", field="id")
        if name in self.by_id:
            self.twice.add(name)
            raise BadRow(f"{one_line(name, limit=40)!r} is the id of row {self.numbers[self.by_id[name]]} too", field="id")
        self.by_id[name] = index

    def _parent(self, index: int, name: str) -> int:
        if index in self.faults or not name:
            return _NO_PARENT
        shown = one_line(name, limit=40)
        if name in self.twice:
            self.faults[index] = BadRow(f"its parent {shown!r} is the id of more than one row", field="parent_id")
        elif name not in self.by_id:
            self.faults[index] = BadRow(f"its parent {shown!r} is in no row", field="parent_id", hint=_ALONE)
        return self.by_id.get(name, _NO_PARENT)

    def _spread(self) -> None:
        """Refuse what hangs below a refused row, and rows that are their own ancestors; each row is looked at once or twice."""
        known = bytearray(len(self.numbers))
        for start in polled(range(len(known)), self.look):
            path: list[int] = []
            at = start
            while at >= 0 and not known[at]:
                known[at] = 1
                path.append(at)
                at = self.parents[at] if at not in self.faults else _NO_PARENT
            if at in path:
                self._refuse_loop(path[path.index(at) :])
            self._inherit(path)

    def _refuse_loop(self, loop: Sequence[int]) -> None:
        for index in loop:
            self.faults[index] = BadRow("it is its own ancestor: its parents lead back to it", field="parent_id")

    def _inherit(self, path: Sequence[int]) -> None:
        for index in reversed(path):
            parent = self.parents[index]
            if index in self.faults or parent < 0:
                continue
            if parent in self.faults:
                self.faults[index] = BadRow(f"row {self.numbers[parent]}, its parent, cannot be used", field="parent_id")
            elif self.systems[index] not in (0, self.systems[parent]):
                self.faults[index] = BadRow("its system text is another than that of the row which begins the chat", field="system")
            self.systems[index] = self.systems[parent]

    def _chat(self, last: int, trained: bytearray) -> Chat:
        """Join the rows from the first down to `last`; answers that another chat trains already are marked so."""
        path = [last]
        while (parent := self.parents[path[-1]]) >= 0:
            path.append(parent)
        turns: list[Turn] = []
        for index in reversed(path):
            turns += self._turns(index, first=index == path[-1], trained=not trained[index])
            trained[index] = 1
        return Chat(tuple(turns), source_id=str(self.numbers[path[-1]]), joined=tuple(self.numbers[index] for index in reversed(path[1:])))

    def _turns(self, index: int, *, first: bool, trained: bool) -> Iterator[Turn]:
        self.file.seek(self.places[index])
        for role, content in json.loads(self.file.readline()):
            if role != "system" or first:
                yield Turn(role, content, trained if role == "assistant" else True)


def _identity(value: object, field: str) -> str:
    """Return an id as text; `12.0` is `12`, since a column with empty cells is often written as decimals."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow("an id must be text or a number", field=field)
    text = str(value).strip()
    return text.split(".")[0] if re.fullmatch(r"\d+\.0+", text) else text
