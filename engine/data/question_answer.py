"""Question and answer rows under the many names they go by, with optional context, system text and history.

Which two columns are meant is chosen once for a source, by the rows looked at, and said: a row that lacks one of
them is refused, where a choice row by row would read one column in one row and another in the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qlora_tui.engine.data.chat import PARTLY, Chat, Turn, checked, fields, read_optional, read_words, share
from qlora_tui.engine.data.messages import SYSTEM
from qlora_tui.engine.data.turns import read_history, with_system
from qlora_tui.engine.text import one_line

QUESTIONS = ("question", "instruction", "query", "prompt", "problem", "input")
ANSWERS = ("answer", "response", "generation", "completion", "output", "solution")
CONTEXTS = ("context", "article", "passage", "input")
_OTHERS = {("instruction", "output"), ("prompt", "completion")}
"""These pairs have formats of their own."""


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """One question and its answer; columns that are empty are open until `settled`."""

    question: str = ""
    answer: str = ""

    name = "question-answer"
    shape = '{"question": "...", "answer": "..."}'

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that are read, by plain name."""
        return (*self._questions, *self._answers, *(name for name in CONTEXTS if name != self.question), *SYSTEM, "history")

    def bound(self, names: Iterable[str]) -> QuestionAnswer:
        """Return the format with those of its columns fixed that a person has named."""
        given = set(names)
        question, answer = (next((name for name in known if name in given), "") for known in (QUESTIONS[:-1], ANSWERS))
        return QuestionAnswer(question, answer)

    def score(self, rows: Sequence[Mapping[str, object]]) -> float:
        """Count rows that have a question and an answer; a question alone counts a little, so that what is missing can be told."""
        return share(rows, sum(self._fit(fields(row)) for row in rows))

    def settled(self, rows: Sequence[Mapping[str, object]], shown: Callable[[str], str] = str) -> tuple[QuestionAnswer, str]:
        """Return the format with the pair of columns that most of `rows` have, and say which by their names in the file."""
        plain = [fields(row) for row in rows]
        found = Counter(pair for row in plain for pair in self._pairs(row) if all(row[name] not in (None, "") for name in pair))
        found = found or Counter(pair for row in plain for pair in self._pairs(row))
        if not found:
            return replace(self, question=self.question or "question", answer=self.answer or "answer"), ""
        order = [(question, answer) for answer in ANSWERS for question in QUESTIONS]
        question, answer = min(found, key=lambda pair: (-found[pair], order.index(pair)))
        told = f"the question is {one_line(shown(question), limit=40)}, the answer is {one_line(shown(answer), limit=40)}"
        rivals = [name for name in ANSWERS if name != answer and found.get((question, name), 0) == found[question, answer]]
        if rivals:
            told += f" and not {' or '.join(rivals)} (--set data_columns=answer={rivals[0]} changes that)"
        return replace(self, question=question, answer=answer), told

    def read(self, row: Mapping[str, object]) -> Chat:
        """Read one row.

        Raises:
            BadRow: with the field at fault.
        """
        plain = fields(row)
        question, answer = self.question, self.answer
        if not question or not answer:
            question, answer = next(iter(self._pairs(plain)), ("question", "answer"))
        asked = read_words(plain.get(question), question)
        context = read_optional(plain, [name for name in CONTEXTS if name != question])
        # An instruction is followed by what it is about; a question comes after the text it asks about.
        parts = (asked, context) if question == "instruction" else (context, asked)
        turns = [
            *read_history(plain.get("history")),
            Turn("user", "\n\n".join(part for part in parts if part)),
            Turn("assistant", read_words(plain.get(answer), answer)),
        ]
        return checked(with_system(read_optional(plain, SYSTEM), turns, "system"), answer)

    @property
    def _questions(self) -> tuple[str, ...]:
        return (self.question,) if self.question else QUESTIONS

    @property
    def _answers(self) -> tuple[str, ...]:
        return (self.answer,) if self.answer else ANSWERS

    def _fit(self, row: Mapping[str, object]) -> float:
        if self._pairs(row):
            return 1.0
        return PARTLY if any(name in row for name in ("question", "query", "problem")) else 0.0

    def _pairs(self, row: Mapping[str, object]) -> list[tuple[str, str]]:
        """Return the pairs of columns of a row that could be question and answer, likely ones first."""
        if not (self.question or self.answer) and any(question in row and answer in row for question, answer in _OTHERS):
            return []
        return [(question, answer) for answer in self._answers for question in self._questions if question in row and answer in row]
