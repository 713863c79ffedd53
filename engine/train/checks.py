"""What is measured once more when training is over: held-out answers after other questions, general text, and rows trained on.

They tell content from manner, what was forgotten, and what was only memorised. All by the hold-out's definition and with its
guards, base against tuned. The work is bounded: at most `question.MOST_PAIRS` answers, `forgetting.PASSAGES` passages of general
text, and as many training rows as are held out, at most `MOST_ROWS`. The answers come first: the verdict rests on them. A wish
to stop ends it without a result, and so does the end of the time that `until` gives; the adapter is on disk by then.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_tui.engine import evaluate, forgetting
from qlora_tui.engine.data import TokenRow, TokenRows, lengths_of
from qlora_tui.engine.errors import Stopped
from qlora_tui.engine.evaluate import RowLoss, Scorecard
from qlora_tui.engine.events import Event, Finding, Probed
from qlora_tui.engine.score import IMPROVEMENT_NATS, manner_alone
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import question
from qlora_tui.engine.train.question import Pair
from qlora_tui.engine.watch.advice import BEST
from qlora_tui.engine.watch.overfitting import ERRORS, NATS
from qlora_tui.engine.watch.rule import paired

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_tui.engine.train.loop import Loop

MOST_ROWS, LEAST_ROWS = 64, 24
"""Training rows that are measured: as many as are held out, within these."""
FORGOT_NATS = 0.1
"""General text that lost more than this a token is a warning; less, where it is more than noise, is said."""

_RULE_FAR = f"training rows gained {IMPROVEMENT_NATS} nats more than held-out ones, by more than {ERRORS} standard errors"
_GENTLER = (
    "fewer epochs, or half the learning rate",
    "a lower rank, or attention layers alone: lora_target_modules=q_proj,v_proj",
    "mix some general rows into the data (data_weights)",
)


@dataclass(frozen=True, slots=True)
class Checks:
    """The training rows and the answers that are measured at the end, and how long all checks take in measurements of the hold-out."""

    run: RunConfig
    rows: Sequence[TokenRow] = ()
    pairs: Sequence[Pair] = ()
    holdouts: float = 0.0

    def seconds(self, holdout_seconds: float) -> float:
        """Return about what the checks take, where measuring the hold-out takes `holdout_seconds`; 0 where they are off."""
        return self.holdouts * holdout_seconds

    def final(self, loop: Loop) -> Iterator[Event]:
        """Measure and say what came out; findings where only manner was learned, something forgotten, or only memorised."""
        if not self.run.final_checks or loop.pause.unfit:
            return
        yield from self._other_questions(loop)
        general = yield from _probe(loop, "general", *_general(loop))
        if general is not None and (found := forgotten(loop.step, general)) is not None:
            yield found
        if not loop.holdout.newest or not loop.holdout.base:
            return
        trained = yield from _probe(loop, "train", self.rows, f"{len(self.rows)} of the training rows, drawn by seed")
        if trained is not None and (found := overfitted(loop, trained)) is not None:
            yield found

    def _other_questions(self, loop: Loop) -> Iterator[Event]:
        """Measure answers after other questions; where no more is sure than manner, the verdict is said anew."""
        holdout = loop.holdout
        if not (self.pairs and holdout.base and holdout.newest and holdout.told):
            return
        losses = yield from _measure(loop, "held-out answers after other questions", [pair.row for pair in self.pairs])
        if losses is None:
            return
        base, tuned = ([known[pair.place] for pair in self.pairs] for known in (holdout.base, holdout.newest))
        own = question.own(base, tuned, *losses)
        about = f"the answers of {len(self.pairs)} held-out rows, each after the question of another one"
        yield dataclasses.replace(_probed(loop, "other_question", about, losses), own_more=own.more, own_interval=own.interval)
        found = question.manner(loop.step, evaluate.compare(holdout.base, holdout.newest), own)
        if found is not None:
            yield found
            yield dataclasses.replace(holdout.told, verdict=manner_alone(own.gain, own.other_gain), manner=True)


def checks_of(run: RunConfig, train: TokenRows, held: TokenRows) -> Checks:
    """Return the checks of a run: which training rows, and what they will cost."""
    number = min(len(train), MOST_ROWS, max(LEAST_ROWS, len(held)))
    rows = train.at(sorted(random.Random(f"{run.seed}/checks").sample(range(len(train)), number)))
    if not run.final_checks or not len(held):
        return Checks(run, rows)
    pairs = question.pairs(held, run.max_length, run.seed)
    tokens = sum(lengths_of(rows)) + forgetting.PASSAGES * min(run.max_length, forgetting.PASSAGE_TOKENS)
    tokens += sum(len(pair.row.input_ids) for pair in pairs)
    return Checks(run, rows, pairs, 2 * tokens / sum(lengths_of(held)))


def _general(loop: Loop) -> tuple[list[TokenRow], str]:
    tokenizer, found = loop.samples.tokenizer(), forgetting.passages()
    rows = forgetting.rows_of(found, lambda text: tokenizer.encode(text)[0], tokenizer.bos, loop.run.max_length)
    kinds = ", ".join(dict.fromkeys(passage.kind for passage in found))
    return rows, f"{len(rows)} passages of text that comes with installed packages: {kinds}"


def _probe(loop: Loop, name: Literal["general", "train"], rows: Sequence[TokenRow], about: str) -> Generator[Event, None, Scorecard | None]:
    """Measure `rows` and say what came out; None if there are none, or somebody asked to stop."""
    losses = yield from _measure(loop, {"general": "general text", "train": "training rows"}[name], rows)
    if losses is None:
        return None
    yield _probed(loop, name, about, losses)
    return evaluate.compare(*losses)


def _measure(loop: Loop, what: str, rows: Sequence[TokenRow]) -> Generator[Event, None, tuple[list[RowLoss], list[RowLoss]] | None]:
    """Measure `rows` with the adapter off and on; None if there are none, or somebody asked to stop."""

    def look() -> None:
        if loop.limits.deadline.left() <= 0:
            raise Stopped("the time is up")

    if not rows:
        return None
    losses = []
    for off in (True, False):
        note = f"{what}, {'base' if off else 'tuned'}"
        part = yield from loop.holdout.losses(rows, loop.loaded, loop.fence, step=loop.step, adapter_off=off, note=note, look=look)
        if not part:
            return None
        losses.append(part)
    return losses[0], losses[1]


def _probed(
    loop: Loop, name: Literal["general", "train", "other_question"], about: str, losses: tuple[list[RowLoss], list[RowLoss]]
) -> Probed:
    card, tokens = evaluate.compare(*losses), sum(loss.tokens for loss in losses[0])
    return Probed(loop.step, name, about, len(losses[0]), tokens, card.base_loss, card.loss, card.drop, card.interval, card.better_share)


def forgotten(step: int, card: Scorecard) -> Finding | None:
    """Return the finding that general text got less likely by more than noise, or None."""
    low, high = card.interval
    if high >= 0:
        return None
    message = f"general text is {-card.drop:.2f} nats a token less likely than to the base ({-high:.2f} to {-low:.2f}): some was forgotten"
    severity: Literal["warn", "info"] = "warn" if -card.drop >= FORGOT_NATS else "info"
    numbers = {"drop": card.drop, "interval": card.interval, "base_loss": card.base_loss, "loss": card.loss}
    return Finding("forgetting", severity, step, message, _GENTLER if severity == "warn" else (), numbers)


def overfitted(loop: Loop, trained: Scorecard) -> Finding | None:
    """Return the finding that the run learned its rows by heart, or None.

    Two things have to come together: training rows gained far more than held-out ones, and these gained nothing that is sure,
    or lost again since their best measurement, by the rule of the detector that watches the run.
    """
    holdout = loop.holdout
    held = evaluate.compare(holdout.base, holdout.newest)
    gap, error = trained.drop - held.drop, math.hypot(_error(trained), _error(held))
    rise, spread = paired([loss.mean for loss in holdout.best], [loss.mean for loss in holdout.newest]) if holdout.best else (0.0, 0.0)
    rose = holdout.best_step < loop.step and rise > max(ERRORS * spread, NATS)
    if gap < max(IMPROVEMENT_NATS, ERRORS * error) or not (rose or held.interval[0] <= 0):
        return None
    since = f"and are {rise:.2f} nats worse than at step {holdout.best_step}" if rose else "which may be chance"
    told = f"training rows gained {trained.drop:.2f} nats, held-out rows {held.drop:.2f} {since}"
    numbers = {
        "train_drop": trained.drop,
        "drop": held.drop,
        "rise": rise if rose else 0.0,
        "best_step": holdout.best_step,
        "rule": _RULE_FAR,
    }
    return Finding("overfitted", "warn", loop.step, f"overfitted: {told}", BEST, numbers)


def _error(card: Scorecard) -> float:
    """Return about the standard error behind a 95 % interval."""
    return (card.interval[1] - card.interval[0]) / 4
