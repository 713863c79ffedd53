"""Samples during a run: what the model answers as it is now, to a few prompts, in guarded excursions.

A sample borrows the model as a measurement does and gives everything back, so a run that samples often trains exactly the
same adapter. Whatever is in its way (memory, a template that refuses a prompt) is told, and never ends a run.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from qlora_tui.engine.data import Dataset, Tokenizer, TokenRow
from qlora_tui.engine.errors import ModelError, Stopped
from qlora_tui.engine.events import Event, Finding, Phase, Sampled, Wishes
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.meter import Meter, empty_cache, out_of_memory, said
from qlora_tui.engine.sample import ANSWER_TOKENS, MOST_TOKENS, greedy
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.engine.train.fence import BETWEEN, Fence
from qlora_tui.engine.train.holdout import poll_for

HELD_OUT = 3
"""So many held-out rows are asked when nobody names a prompt."""

_SHOWN = 400
_MOST_CHARACTERS = 20_000  # far more than the tokens that a sample takes, and few enough to be counted at once


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, as people read it and as the model does."""

    text: str
    ids: tuple[int, ...]


@dataclass(slots=True)
class Samples:
    """The prompts of a run. `read` makes a tokenizer of its own, which costs half a second: only once somebody samples."""

    run: RunConfig
    loaded: Loaded
    fence: Fence
    meter: Meter
    wishes: Wishes
    held_out: Sequence[TokenRow]
    dataset: Dataset  # that the held-out rows are from
    read: Callable[[], Tokenizer]
    seconds: float = 0.0  # that the samples of the last measurement took
    _tokenizer: Tokenizer | None = None
    _usual: list[Prompt] | None = None

    def usual(self, step: int) -> Iterator[Event]:
        """Show what `sample_prompts` asks for; called after each measurement."""
        if not self.run.sample_prompts:
            return
        began = time.monotonic()
        prompts, faults = self._prompts()
        yield from self.show(step, prompts)
        for fault in faults:
            yield Finding("sample", "warn", step, fault, ("change sample_prompts: a resume may",))
        self.seconds = time.monotonic() - began

    def wanted(self, text: object) -> tuple[list[Prompt], str]:
        """Return the prompts of a wish, and why there are none; `text` is what it asks, None for the run's own prompts."""
        if text is not None:
            return self._written(text)
        if self.run.sample_prompts:
            prompts, faults = self._prompts()
            return prompts, "; ".join(faults[:1])
        found = [prompt for row in self.held_out[:HELD_OUT] if (prompt := self._from_row(row)) is not None]
        return found, "" if found else "no rows are held out and there are no sample_prompts: name a prompt"

    def show(self, step: int, prompts: Sequence[Prompt]) -> Iterator[Event]:
        """Sample each prompt and say what came; a wish to stop ends it at the next token."""
        if not prompts:
            return
        began, told = time.monotonic(), ""
        yield Phase("sample", "begin", done=0, total=len(prompts), unit="samples")
        with self.meter.phase("sample"):
            for number, prompt in enumerate(prompts, 1):
                text, told = self._sample(prompt)
                if text is None:
                    break
                yield Sampled(step, prompt.text, text)
                yield Phase("sample", "progress", done=number, total=len(prompts), unit="samples")
        yield Phase("sample", "end", seconds=time.monotonic() - began, **self.meter.told("sample"))
        if told:
            empty_cache(self.loaded.device)
            yield Finding("sample", "warn", step, f"no sample: the device ran out of memory ({told}); training is not touched by that")

    def _sample(self, prompt: Prompt) -> tuple[str | None, str]:
        """Return the answer; or None where somebody asked to stop or memory ran out, with the error's words."""
        tokenizer = self.tokenizer()
        try:
            with self.fence.excursion():
                ids = greedy(self.loaded, prompt.ids, ANSWER_TOKENS, tokenizer.stop_ids(), lambda: poll_for(self.wishes))
        except Stopped:
            return None, ""
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None, said(error)
        return tokenizer.decode(ids), ""

    def tokenizer(self) -> Tokenizer:
        """Return this run's tokenizer for samples; whoever made it would own it, so nobody else may."""
        self.fence.check("a sample", BETWEEN)
        if self._tokenizer is None:
            self._tokenizer = self.read().claim()
        return self._tokenizer

    def _prompts(self) -> tuple[list[Prompt], list[str]]:
        """Return the config's prompts, and what is wrong with others of them; that is said once."""
        faults: list[str] = []
        if self._usual is None:
            self._usual = []
            for text in self.run.sample_prompts:
                found, fault = self._written(text)
                self._usual += found
                faults += [f"sample_prompts: {one_line(text, limit=40)!r}: {fault}"] if fault else []
        return self._usual, faults

    def _written(self, text: object) -> tuple[list[Prompt], str]:
        """Return a prompt that somebody typed, written as the rows are: as a question of a chat, or as the begin of a text."""
        if not isinstance(text, str) or not text.strip():
            return [], "the prompt is empty"
        if len(text) > _MOST_CHARACTERS:
            return [], f"the prompt has {len(text):,} characters, and a sample takes {_MOST_CHARACTERS:,} at most"
        try:
            ids = tuple(self.tokenizer().encode(self._as_rows_are(text))[0])
        except (TemplateError, ModelError, ValueError) as error:
            return [], f"the model's chat template takes no such prompt ({one_line(error, limit=120)})"
        if not 0 < len(ids) <= MOST_TOKENS - ANSWER_TOKENS:
            return [], f"the prompt has {len(ids)} tokens, and a sample takes {MOST_TOKENS - ANSWER_TOKENS} at most"
        return [Prompt(text, ids)], ""

    def _as_rows_are(self, text: str) -> str:
        tokenizer, chat = self.tokenizer(), self.dataset.rows[0].chat
        continues = bool(chat.verbatim) or chat.ids is not None or (chat.plain and tokenizer.assumed)
        if continues or not tokenizer.template:
            return tokenizer.bos + text
        return tokenizer.render([{"role": "user", "content": text}], answer_next=True)

    def told(self, row: TokenRow) -> tuple[str, str]:
        """Return what a row asks and what it answers, as people read it and no longer than they want to."""
        asked = self._from_row(row)
        answer = [token for token, target in zip(row.input_ids, row.trained, strict=True) if target]
        return asked.text[:_SHOWN] if asked else "", self.tokenizer().decode(answer[:_SHOWN])[:_SHOWN]

    def _from_row(self, row: TokenRow) -> Prompt | None:
        """Return what a held-out row asks: up to its first answer, or the first half of a text that is all answer."""
        first = row.trained.index(1)
        ids = list(row.input_ids[: first if first > 1 else len(row.input_ids) // 2][-(MOST_TOKENS - ANSWER_TOKENS) :])
        return Prompt(self._question(row.row) or self.tokenizer().decode(ids), tuple(ids)) if ids else None

    def _question(self, number: int) -> str:
        """Return the question of row `number` that its first trained answer answers, where it is a chat."""
        rows = self.dataset.rows
        place = bisect_left(rows, number, key=lambda row: row.number)
        if place == len(rows) or rows[place].number != number or rows[place].chat.verbatim:
            return ""
        asked = [turn.content for turn in rows[place].chat.turns if turn.role == "user"]
        return asked[-1 if self.run.mask_history else 0] if asked else ""
