"""Values that a run may have and that seldom end well: told beside the field, never refused.

What cannot work at all is in `rules`. Every limit here is a rule of thumb of people who tune adapters, so each is told
with its reason, and none is in the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_tui.engine.spec import RunConfig, rows_per_step
from qlora_tui.engine.units import count, percent

_RATE_LOW, _RATE_HIGH = 2e-5, 6e-4
_SCALE_LOW, _SCALE_HIGH = 0.5, 4.0
_FEW_ROWS, _MANY_PASSES, _TOO_MANY_PASSES = 1000, 3.0, 5.0
_FEW_STEPS = 20
_FEW_ROWS_A_STEP, _MANY_ROWS_A_STEP = 4, 256
_HIGH_RANK, _VERY_HIGH_RANK = 64, 256
_MANY_TOO_LONG = 0.3
_MUCH_DROPOUT, _MUCH_HELD, _LONG_WARM_UP = 0.2, 0.3, 0.3


@dataclass(frozen=True, slots=True)
class Unusual:
    """What is unusual about the key `name`: in a few words that fit beside a field, and in a sentence with what to do."""

    name: str
    short: str
    why: str


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the run beside its settings; 0 where it is not.

    `rows` are trained on, in `steps` optimizer steps; `over` is the share of rows longer than `max_length`; `positions`
    is the longest row the model was made for.
    """

    rows: int = 0
    steps: int = 0
    over: float = 0.0
    positions: int = 0


def unusual(run: RunConfig, known: Known = Known()) -> dict[str, Unusual]:
    """Return what is unusual about `run`, by key: the first found of each."""
    found: dict[str, Unusual] = {}
    for one in (*_rate(run), *_adapter(run, known), *_passes(run, known), *_rows(run, known), *_lengths(run, known)):
        found.setdefault(one.name, one)
    return found


def _rate(run: RunConfig) -> Iterator[Unusual]:
    if run.learning_rate > _RATE_HIGH:
        yield Unusual("learning_rate", "high: may diverge", "Above 6e-4 a run often diverges; 1e-4 to 3e-4 is usual for LoRA.")
    elif 0 < run.learning_rate < _RATE_LOW:
        yield Unusual("learning_rate", "low: may learn nothing", "Below 2e-5 an adapter hardly moves; 1e-4 to 3e-4 is usual for LoRA.")
    if run.lr_scheduler_type == "constant":
        yield Unusual("lr_scheduler_type", "never falls", "A rate that never falls leaves the last steps noisy; cosine ends gently.")


def _adapter(run: RunConfig, known: Known) -> Iterator[Unusual]:
    scale = run.lora_alpha / (math.sqrt(run.lora_r) if run.use_rslora else run.lora_r)
    root = " of the square root" if run.use_rslora else ""
    if scale > _SCALE_HIGH:
        why = f"Alpha at {scale:.3g} times{root} the rank makes steps {scale / 2:.2g} times as large as usual: lower it, or the rate."
        yield Unusual("lora_alpha", f"{scale:.3g}x the rank; 1-2x is usual", why)
        yield Unusual("lora_r", f"alpha {run.lora_alpha} is {scale:.3g}x this", why)
    elif scale < _SCALE_LOW:
        why = f"Alpha at {scale:.2g} times{root} the rank makes each step small: raise alpha to once or twice the rank."
        yield Unusual("lora_alpha", f"{scale:.2g}x the rank; 1-2x is usual", why)
        yield Unusual("lora_r", f"alpha {run.lora_alpha} is {scale:.2g}x this", why)
    if run.lora_r >= _VERY_HIGH_RANK:
        yield Unusual("lora_r", "very high: seldom learns more", "Ranks from 256 on seldom learn more than 64, and cost memory and time.")
    elif run.lora_r >= _HIGH_RANK and 0 < known.rows < _FEW_ROWS:
        why = f"Rank {run.lora_r} has room to learn {count(known.rows)} rows by heart; 8 to 32 is usual for so few."
        yield Unusual("lora_r", "high for so few rows", why)
    if run.lora_dropout > _MUCH_DROPOUT:
        yield Unusual("lora_dropout", "much; 0-0.1 is usual", "Above 0.2 dropout holds learning back more than it keeps from overfitting.")
    if run.bnb_4bit_quant_type == "fp4" and run.method in ("qlora", "auto"):
        yield Unusual("method", "nf4 loses half as much", "fp4 takes the memory of nf4 and loses about twice as much quality.")


def _passes(run: RunConfig, known: Known) -> Iterator[Unusual]:
    epochs = run.num_train_epochs
    if run.max_steps and known.rows:
        epochs = min(epochs or math.inf, run.max_steps * rows_per_step(run) / known.rows)
    passes = f"{epochs:.2g} passes"
    if epochs >= _MANY_PASSES and 0 < known.rows < _FEW_ROWS:
        why = f"{passes} over {count(known.rows)} rows: the model may learn them by heart; the held-out loss says when it is enough."
        yield Unusual("num_train_epochs", f"many over {count(known.rows)} rows", why)
    elif epochs >= _TOO_MANY_PASSES:
        yield Unusual("num_train_epochs", "many: likely to overfit", "Most tasks peak after one or two passes; from five on most overfit.")
    if 0 < known.steps < _FEW_STEPS and known.rows:
        why = f"A run of {known.steps} steps hardly learns: fewer rows a step, more rows, or another pass."
        yield Unusual("num_train_epochs", f"only {known.steps} steps in all", why)
    warm_up = run.warmup_steps if run.warmup_steps >= 1 else run.warmup_steps * known.steps
    if known.steps and warm_up >= known.steps:
        why = f"{warm_up:.0f} steps of warm-up in a run of {known.steps}: the learning rate never gets where you set it."
        yield Unusual("warmup_steps", f"the run has only {count(known.steps)} steps", why)
    elif run.warmup_steps < 1 and run.warmup_steps > _LONG_WARM_UP:
        yield Unusual("warmup_steps", "long; 0.03-0.1 is usual", "So long a warm-up leaves few steps at the full rate.")


def _rows(run: RunConfig, known: Known) -> Iterator[Unusual]:
    each = rows_per_step(run)
    rows = f"{each} row{'s' if each > 1 else ''} a step"
    if each < _FEW_ROWS_A_STEP:
        why = f"{rows}: each step follows single rows, so the loss is noisy; 8 to 32 is usual, and costs no memory."
        yield Unusual("gradient_accumulation_steps", f"{rows}: noisy", why)
    elif known.rows and each > known.rows:
        why = f"A step of {count(each)} rows is more than all {count(known.rows)}: each pass is a single step."
        yield Unusual("gradient_accumulation_steps", "more than all your rows", why)
    elif each > _MANY_ROWS_A_STEP:
        why = f"{count(each)} rows a step make few steps; 8 to 64 is usual for adapters."
        yield Unusual("gradient_accumulation_steps", f"{count(each)} rows a step: few steps", why)
    if not run.val_set_size and not run.eval_data:
        yield Unusual("val_set_size", "nothing is measured", "Without rows held out nothing can say whether it helped; 0.1 is usual.")
    elif _MUCH_HELD < run.val_set_size < 1:
        why = f"{percent(run.val_set_size)} of the rows are not trained on; 0.1 measures as well."
        yield Unusual("val_set_size", "much is not trained on", why)
    if run.perplexity_filter and run.perplexity_drop_most > _MUCH_HELD:
        why = "More than three rows in ten may go; look with F3 on the data page at which before."
        yield Unusual("perplexity_drop_most", "many rows may go", why)


def _lengths(run: RunConfig, known: Known) -> Iterator[Unusual]:
    if known.positions and run.max_length > known.positions:
        why = f"The model was made for {count(known.positions)} tokens: a longer limit is refused at the start."
        yield Unusual("max_length", f"the model reads {count(known.positions)}", why)
    elif known.over > _MANY_TOO_LONG:
        told = {"drop": "dropped", "cut": "cut", "split": "split"}[run.too_long]
        why = f"{percent(known.over)} of your rows are longer and are {told}: raise it, or say on the data page what becomes of them."
        yield Unusual("max_length", f"{percent(known.over)} of your rows are {told}", why)
