"""What to say of a run that takes long: what would make it shorter and by how much, and what renting it would cost instead.

The thresholds are those that people are usually warned of. Where a usual warning is about a usual stack and not about this one,
it is said what is true here. Hours saved are computed as the hours themselves are, never guessed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

from qlora_tui.engine import money, prices, until
from qlora_tui.engine.events import Finding
from qlora_tui.engine.forecast import Before, Work, before_work, speed_of
from qlora_tui.engine.fused import has_scoreless
from qlora_tui.engine.machine import Machine, limited
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.sizes import element_bytes, weight_bytes
from qlora_tui.engine.spec import RunConfig, rows_per_step
from qlora_tui.engine.steptime import attention_share
from qlora_tui.engine.units import billions, count, gib, percent, words

LONG_RUN, LONG_EPOCH = 12 * 3600.0, 6 * 3600.0
_LONG_ROW, _LONG_CHAT = 8000, 4096  # tokens
_BIG_MODEL = 13_500_000_000  # weights; models called 13 B have 13.0
_CARD_24 = 25 << 30
_LEAST_LEFT = 3 << 30  # context, one row's activations and the allocator's slack
_BELOW = 0.97  # of the limit, so that a proposal is not over it by its own rounding
_LEAST_RANK = 4


@dataclass(frozen=True, slots=True)
class Shorter:
    """A change that makes a run shorter: `set` in the words of the command line, and the seconds that it saves."""

    set: tuple[str, ...]
    saves_seconds: float
    text: str

    @property
    def options(self) -> str:
        """Return it as options."""
        return " ".join(f"--set {one}" for one in self.set)

    def to_json(self) -> dict[str, Any]:
        """Return it for `budget --json`."""
        return {"set": list(self.set), "saves_seconds": self.saves_seconds, "text": self.text}


def shorter(
    model: ModelSpec, run: RunConfig, machine: Machine, before: Before | None, work: Work | None, scale: float = 1.0
) -> list[Shorter]:
    """Return what makes a run of more than 12 h shorter: fewer rows, fewer epochs or steps, a lower rank; the most hours first.

    `scale` is what a step was measured to take over what was estimated, where the run has begun.
    """
    if before is None or work is None or not work.rows or _whole(before, scale) <= LONG_RUN:
        return []
    whole, load = _whole(before, scale), before.load_seconds[1]
    share = max(0.05, _BELOW * (LONG_RUN - load) / (whole - load))
    found = []
    for changed, less, names in (_rows(run, work, share), _passes(run, work, share), _rank(run, work)):
        then = before_work(model, changed, machine, less) if names else None
        saved = whole - _whole(then, scale) if then else 0.0
        if saved > 0:
            found.append(Shorter(names, saved, f"{words(saved)} less, {words(whole - saved)} in all"))
    return sorted(found, key=lambda one: -one.saves_seconds)


def _whole(before: Before, scale: float) -> float:
    """Return the seconds of a run whose steps take `scale` times what was estimated."""
    around = before.load_seconds[1] + before.beside_seconds[1]
    return around + (before.total_seconds[1] - around) * scale


def finding(model: ModelSpec, asked: RunConfig, run: RunConfig, machine: Machine, work: Work, step: int, seconds: float) -> Finding | None:
    """Return what to say of a run that has begun and takes long; None where it does not.

    Args:
        model: the base's shape.
        asked: the settings as they were asked.
        run: the settings with every choice made.
        machine: the device.
        work: the rows.
        step: the last one done.
        seconds: from the first step to the end, as it looks now.
    """
    estimated = before_work(model, run, machine, work)
    if estimated is None:
        return None
    beside, steps = estimated.beside_seconds[1], estimated.step_seconds[1] * work.steps
    scale = max(0.0, seconds - beside) / steps
    epoch = estimated.epoch_seconds[1] * scale if estimated.epoch_seconds else 0.0
    scaled = dataclasses.replace(estimated, total_seconds=(seconds,) * 3, epoch_seconds=(epoch,) * 3)
    if not (said := _about_time(scaled)):
        return None
    proposals = shorter(model, run, machine, estimated, work, scale)
    advice = [f"{' '.join(one.set)}: {one.text}" for one in proposals]
    advice += _renting(model, asked, work) if epoch > LONG_EPOCH else []
    saved = {" ".join(one.set): one.saves_seconds for one in proposals}
    return Finding(
        "time", "warn", step, " ".join(said), tuple(advice), {"seconds": seconds, "epoch_seconds": epoch, "saves_seconds": saved}
    )


def shorter_words(found: list[Shorter]) -> list[str]:
    """Return proposals as lines for people."""
    return [f"shorter: {' '.join(one.set)}: {one.text}" for one in found]


def remarks(
    model: ModelSpec,
    run: RunConfig,
    machine: Machine,
    before: Before | None,
    *,
    longest: int | None = None,
    longest_chat: int = 0,
    asked: RunConfig | None = None,
    work: Work | None = None,
) -> list[str]:
    """Return one sentence for each threshold that people are warned of and that this run crosses, with what to change.

    Over 6 h an epoch, 8,000 tokens a row, or 13 B on 24 GB, what renting costs is said as well; that needs `asked` and `work`.

    Args:
        model: the base's shape.
        run: the settings.
        machine: the device.
        before: the time expected, where it is known.
        longest: tokens of the longest row, where the data are known.
        longest_chat: tokens of the longest row with several answers; 0: not known, or there is none.
        asked: the settings as they were asked, with what was left open.
        work: the rows, where the data are known.
    """
    length = min(run.max_length, longest or run.max_length)
    found = [*_about_time(before), *_about_until(run, before, work)] if before else []
    rent = bool(before and before.epoch_seconds and before.epoch_seconds[1] > LONG_EPOCH)
    if length > _LONG_ROW:
        rent = True
        found.append(_about_length(model, run, machine, length))
    device = limited(machine, run)
    if device.kind == "cuda" and device.total_bytes < _CARD_24 and model.params > _BIG_MODEL:
        rent = True
        found.append(_about_size(model, run, device))
    if min(longest_chat, run.max_length) > _LONG_CHAT:
        found.append(
            f"Chats with several answers reach {count(min(longest_chat, run.max_length))} tokens: 4,096 is the usual limit where chats are "
            "joined to rows of one length; here each is a row, and costs its own length alone; split them if memory or time is short."
        )
    return [*found, *(_renting(model, asked, work) if rent and asked is not None and work is not None else [])]


def _about_until(run: RunConfig, before: Before, work: Work | None) -> list[str]:
    """Say how many steps fit before the time of day by which the run has to be done, where not all do."""
    steps = work.steps if work else 0
    try:
        left = until.moment(run.until, time.time()) - time.time()
    except ValueError:  # nothing was said, or is being typed
        return []
    fit = int((left - before.load_seconds[1] - before.beside_seconds[1]) / before.step_seconds[1])
    if fit >= steps:
        return []
    told = f"Until {run.until} there is {words(max(0.0, left))}: about {count(max(0, fit))} of {count(steps)} steps fit"
    return [f"{told}, and the run takes as many, so that its learning rate comes to its end by then."]


def _renting(model: ModelSpec, asked: RunConfig, work: Work) -> list[str]:
    known, _ = prices.usable()
    hours = money.rented_hours(model, asked, known, work)
    if hours is None:
        return [f"Renting {known.rent_card} instead would not help: it does not fit there either."]
    cost = (known.rent[0] * (hours[0] + known.setup_hours[0]), known.rent[1] * (hours[1] + known.setup_hours[1]))
    return [money.rented_words(money.Rented(known.rent_card, hours, known.setup_hours, known.rent, cost), known.currency)]


def _about_time(before: Before) -> list[str]:
    found = []
    total, epoch = before.total_seconds[1], before.epoch_seconds[1] if before.epoch_seconds else 0.0
    if total > LONG_RUN:
        found.append(
            f"About {words(total)} is over 12 h: fewer rows, fewer epochs or a lower rank shorten it, "
            "and max_time=12h ends it saved, to be resumed."
        )
    if epoch > LONG_EPOCH:
        share = LONG_EPOCH / epoch
        found.append(
            f"An epoch of about {words(epoch)} is over 6 h, so a bad setting shows late: "
            f"try it with max_samples at {percent(share)} of the rows first."
        )
    return found


def _about_length(model: ModelSpec, run: RunConfig, machine: Machine, length: int) -> str:
    possible = has_scoreless(model, run, machine)
    if run.attn_implementation == "eager" or not possible:
        scores = model.num_attention_heads * length**2 * element_bytes(run, machine)
        cure = "attn_implementation=sdpa does not" if possible else "this family has no other kind, so lower max_length"
        return f"Rows of {count(length)} tokens: attention holds all scores, {gib(scores)} a layer and copy; {cure}."
    speed = speed_of(machine)
    share = f"{percent(attention_share(model, run, machine, speed, length))} of such a row's time goes" if speed else "time goes"
    return (
        f"Rows of {count(length)} tokens: 8,000 on 24 GB is a limit of the usual stack, which holds all scores and logits, "
        f"not of the card; here memory grows evenly, but {share} to attention, so a lower max_length pays if few rows need it."
    )


def _about_size(model: ModelSpec, run: RunConfig, device: Machine) -> str:
    said = f"{billions(model.params)} weights on {gib(device.total_bytes)}: the usual advice stops at 13 B on 24 GB"
    small = weight_bytes(model, dataclasses.replace(run, method="qlora"), device)
    left = device.free_bytes - small
    if left < _LEAST_LEFT:
        return f"{said}, and rightly: even in 4 bits they take {gib(small)} of {gib(device.free_bytes)}; take a smaller model."
    how = "" if run.method in ("qlora", "auto") else "set method=qlora: "
    return (
        f"{said}; {how}in 4 bits they take {gib(small)} and leave {gib(left)}, so short rows fit "
        "with gradient_checkpointing=true and per_device_train_batch_size=1."
    )


def _rows(run: RunConfig, work: Work, share: float) -> tuple[RunConfig, Work, tuple[str, ...]]:
    """Return the run with fewer rows; what is held out shrinks with them where it is a share."""
    kept = max(1, int(work.rows * share))
    held = max(1, int(work.held * share)) if run.val_set_size < 1 and work.held and not run.eval_data else work.held
    samples = kept if run.eval_data else kept + held
    an_epoch = math.ceil(kept / rows_per_step(run))
    steps = run.max_steps or max(1, math.ceil(run.num_train_epochs * an_epoch))
    less = work._replace(
        tokens_per_epoch=round(work.tokens_per_epoch * kept / work.rows),
        steps=steps,
        steps_per_epoch=an_epoch,
        holdout_tokens=round(work.holdout_tokens * held / work.held) if work.held else 0,
        rows=kept,
        held=held,
    )
    return dataclasses.replace(run, max_samples=samples), less, () if run.max_steps else (f"max_samples={samples}",)


def _passes(run: RunConfig, work: Work, share: float) -> tuple[RunConfig, Work, tuple[str, ...]]:
    """Return the run with fewer epochs, whole ones where there is more than one; or with fewer steps where they are what is set."""
    if run.max_steps:
        steps = max(1, int(run.max_steps * share))
        return dataclasses.replace(run, max_steps=steps), work._replace(steps=steps), (f"max_steps={steps}",)
    wanted = run.num_train_epochs * share
    epochs = float(math.floor(wanted)) if wanted >= 1 else max(0.1, math.floor(wanted * 10) / 10)
    steps = max(1, math.ceil(epochs * work.steps_per_epoch))
    changed = dataclasses.replace(run, num_train_epochs=epochs)
    return changed, work._replace(steps=steps), (f"num_train_epochs={epochs:g}",) if epochs < run.num_train_epochs else ()


def _rank(run: RunConfig, work: Work) -> tuple[RunConfig, Work, tuple[str, ...]]:
    """Return the run at half its rank and scale: the frozen weights are most of the work, so it saves little."""
    rank, alpha = run.lora_r // 2, max(1, run.lora_alpha // 2)
    names = (f"lora_r={rank}", f"lora_alpha={alpha}") if rank >= _LEAST_RANK else ()
    return dataclasses.replace(run, lora_r=max(1, rank), lora_alpha=alpha), work, names
