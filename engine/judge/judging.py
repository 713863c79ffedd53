"""Judging by an endpoint: each pair both ways round, kept reply by reply, within what it may cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_tui.engine.errors import EngineError, Stopped
from qlora_tui.engine.judge.endpoint import Endpoint, Refused
from qlora_tui.engine.judge.kept import JUDGEMENTS, Answered, Call, Judgement, Pairs, alone, keep_judgement, read_pairs
from qlora_tui.engine.judge.patience import Wait, ask
from qlora_tui.engine.judge.prices import Prices
from qlora_tui.engine.judge.question import Message, messages, read_verdict, size_of

_PATIENT_WITH = 4
"""So many replies without a verdict from the start, and the model is no judge."""
_ROUNDING = 1e-9  # of dollars


@dataclass(frozen=True, slots=True)
class Todo:
    """One question that has no reply yet."""

    answer: Answered
    first: Literal["base", "tuned"]

    @property
    def question(self) -> list[Message]:
        """Return what is sent."""
        return messages(self.answer, self.first)


def todo(pairs: Pairs, judge: str) -> list[Todo]:
    """Return the questions that `judge` has not replied to; pairs of equal answers are not asked about."""
    return [step for answer in pairs.answers if not answer.same for step in _missing(pairs, judge, answer)]


def _missing(pairs: Pairs, judge: str, answer: Answered) -> Iterator[Todo]:
    known = pairs.calls(judge, answer.pair)
    seed = pairs.sheet.seed if pairs.sheet else 0
    order: tuple[Literal["base", "tuned"], ...] = ("tuned", "base") if answer.tuned_first(seed) else ("base", "tuned")
    return (Todo(answer, first) for first in order if first not in known)


@dataclass(frozen=True, slots=True)
class Judged:
    """How a session with an endpoint ended: replies got, dollars counted in it, and why it ended early, if it did.

    `error` is what the endpoint did; a price cap and a person's wish are none.
    """

    replies: int
    dollars: float
    early: str = ""
    error: EngineError | None = None


def judge(
    folder: Path,
    endpoint: Endpoint,
    prices: Prices,
    cap: float,
    *,
    wait: Wait,
    say: Callable[[int, int, float], object] = lambda done, total, dollars: None,
) -> Judged:
    """Ask `endpoint` about every pair of the run in `folder` that it has not judged, and keep each reply at once.

    Args:
        folder: the run.
        endpoint: the judge.
        prices: what a question costs.
        cap: dollars that this judge may cost for this run in all, earlier sessions included; no question is sent that could pass it.
        wait: waits between tries.
        say: hears replies got, questions in all, and dollars.

    Raises:
        JournalError: another process judges this run, or a reply cannot be kept.
    """
    with alone(folder, JUDGEMENTS):
        pairs = read_pairs(folder)
        return _through(folder, endpoint, prices, cap - pairs.dollars(endpoint.name), todo(pairs, endpoint.name), wait, say)


def _through(
    folder: Path, endpoint: Endpoint, prices: Prices, room: float, steps: list[Todo], wait: Wait, say: Callable[[int, int, float], object]
) -> Judged:
    spent, done, unclear = 0.0, 0, 0

    def lost(size: int) -> None:
        nonlocal spent
        spent += prices.most(size)
        if spent + prices.most(size) > room + _ROUNDING:
            raise Stopped("a question got no reply and may be billed, and asking again could pass --max-cost")

    for step in steps:
        question = step.question
        size = size_of(question)
        if spent + prices.most(size) > room + _ROUNDING:
            return Judged(done, spent, "the next question could pass --max-cost")
        try:
            reply = ask(endpoint, question, wait=wait, lost=lambda size=size: lost(size))  # type: ignore[misc]
        except Stopped as stopped:
            return Judged(done, spent, str(stopped))
        except EngineError as error:
            return Judged(done, spent, str(error), error)
        said, cost = read_verdict(reply.text, step.first), prices.used(reply, size)
        call = Call(step.first, said, reply.tokens_in or 0, reply.tokens_out or 0, round(cost, 8))
        keep_judgement(folder, Judgement(step.answer.pair, step.answer.row, endpoint.name, said, call))
        spent, done, unclear = spent + cost, done + 1, unclear + (said == "unclear")
        say(done, len(steps), spent)
        if unclear == done == _PATIENT_WITH:
            fault = Refused(f"{done} of {done} replies hold no verdict", where=endpoint.host, hint="choose another model as the judge")
            return Judged(done, spent, str(fault), fault)
    return Judged(done, spent)
