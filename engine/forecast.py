"""How long a run takes: a rough figure from the card's data sheet before it starts, measured steps once it runs.

Before the first step the figure is an estimate within a wide range, and says so. After a few steps only what
was measured counts. Everything here is arithmetic on numbers given.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from qlora_tui.engine.events import Forecast
from qlora_tui.engine.machine import Card, Machine, card_of
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.spec import RunConfig, rows_per_step

Triple = tuple[float, float, float]

_MATMUL_SHARE = 0.75  # of the data sheet's products that large ones reach: 765-780 of 989 TFLOP/s on an H100, 2026-11-25
_MEMORY_SHARE = 0.6  # of the bandwidth that element-wise kernels reach
_DEQUANT_SHARE = 0.25  # of the bandwidth that bitsandbytes' 4-bit kernels reach, same card and day
_LAYER_SECONDS = 2e-3  # Python and launches of one layer, one pass: what is left of measured steps on that card
_CORE_FLOPS = 27e9  # of one CPU core, 4-bit and float32: SmolLM2-135M at about 100 tokens/s on two cores
_CARD_RANGE = (0.75, 1.5)
_CPU_RANGE = (0.5, 2.0)
_WINDOW = 64


@dataclass(frozen=True, slots=True)
class Before:
    """Seconds of one optimizer step and of the whole run, each as (low, mid, high), and what they rest on."""

    step_seconds: Triple
    total_seconds: Triple
    basis: str

    def to_json(self) -> dict[str, object]:
        """Return the promised keys of `budget --json`'s `time`."""
        return {"step_seconds": list(self.step_seconds), "total_seconds": list(self.total_seconds), "basis": self.basis}


def before(
    model: ModelSpec,
    run: RunConfig,
    machine: Machine,
    *,
    tokens_per_epoch: int,
    steps: int,
    steps_per_epoch: int = 0,
    holdout_tokens: int = 0,
) -> Before | None:
    """Estimate the time of a run that has not started; None without tokens or for a card that is not in the table.

    Args:
        model: the base's shape.
        run: the settings.
        machine: the device.
        tokens_per_epoch: real tokens of the training rows.
        steps: optimizer steps of the whole run.
        steps_per_epoch: tells how many tokens a step holds; 0: from `num_train_epochs`.
        holdout_tokens: real tokens that each measurement of the hold-out reads.
    """
    per_token = seconds_per_token(model, run, machine)
    if per_token is None or tokens_per_epoch <= 0 or steps <= 0:
        return None
    full_step = rows_per_step(run) * run.max_length
    if steps_per_epoch:
        tokens = tokens_per_epoch / steps_per_epoch
    elif run.max_steps or not run.num_train_epochs:
        tokens = min(full_step, tokens_per_epoch)
    else:
        tokens = tokens_per_epoch * run.num_train_epochs / steps
    step = per_token * tokens
    measurements = 2 + (steps // run.eval_steps if run.eval_steps else min(5, steps))
    total = step * steps + measurements * holdout_tokens * per_token * _forward_share(run)
    if run.max_time:
        total = min(total, run.max_time)
    low, high = _CPU_RANGE if machine.kind == "cpu" else _CARD_RANGE
    basis = "a laptop-class figure a core" if machine.kind == "cpu" else "the card's data sheet"
    cap = run.max_time or math.inf
    return Before(
        (step * low, step, step * high),
        (min(total * low, cap), total, min(total * high, cap)),
        f"estimate from {basis}; measured steps replace it",
    )


def seconds_per_token(model: ModelSpec, run: RunConfig, machine: Machine) -> float | None:
    """Return the estimated seconds of one token in training, or None for a card that is not in the table."""
    if machine.kind == "cpu":
        return flops_per_token(model, run) / (_CORE_FLOPS * max(machine.cores, 1))
    card = card_of(machine)
    return None if card is None else card_seconds_per_token(model, run, card)


def card_seconds_per_token(model: ModelSpec, run: RunConfig, card: Card) -> float:
    """Return the estimated seconds of one token in training on `card`.

    Products at the rate that large ones reach, plus the traffic of element-wise work, plus dequantization and
    launches, which cost the same for a batch of any size. Rows are taken to be `max_length` long.
    """
    tokens = run.per_device_train_batch_size * run.max_length
    passes = 3 if run.gradient_checkpointing else 2
    products = flops_per_token(model, run) / (card.flops * _MATMUL_SHARE)
    widths = 8 * model.hidden_size + 3 * model.query_size + 4 * model.intermediate_size
    traffic = passes * model.num_hidden_layers * widths * 2 * 2 / (card.bandwidth_bytes * _MEMORY_SHARE)
    dequantization = passes * model.linear_params * 2.5 / (card.bandwidth_bytes * _DEQUANT_SHARE) if run.method == "qlora" else 0.0
    launches = passes * model.num_hidden_layers * _LAYER_SECONDS
    return products + traffic + (dequantization + launches) / tokens


def flops_per_token(model: ModelSpec, run: RunConfig) -> float:
    """Return the operations of one trained token: frozen weights cost a forward and an input gradient, two each.

    With checkpointing the layers run forward once more. Attention is causal, so half the row counts.
    """
    layers = 2.0 * model.linear_params
    attention = 2.0 * model.num_hidden_layers * model.query_size * run.max_length
    head = 4.0 * model.vocab_size * model.hidden_size
    adapter = 6.0 * model.num_hidden_layers * sum(run.lora_r * (part.inputs + part.outputs) for part in model.linears())
    again = layers + attention if run.gradient_checkpointing else 0.0
    return 2 * layers + 3 * attention + head + adapter + again


def _forward_share(run: RunConfig) -> float:
    """Return what a forward pass costs of a training pass."""
    return 1 / 3 if run.gradient_checkpointing else 1 / 2


@dataclass(slots=True)
class Pace:
    """Measured steps turned into time left: robust against a slow step, honest about spread.

    Steps hold different numbers of tokens (rows are bucketed by length), so the rate is the median of tokens a
    second over the last steps and the tokens of a step are the mean of all of them.
    """

    _rates: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _steps: int = 0
    _tokens: int = 0

    def feed(self, seconds: float, tokens: int) -> None:
        """Take in one optimizer step. The first one warms kernels up and counts only for its tokens."""
        self._steps += 1
        self._tokens += tokens
        if self._steps > 1 and seconds > 0 and tokens > 0 and math.isfinite(seconds):
            self._rates.append(tokens / seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """The median rate of the last steps; None before the second step."""
        return statistics.median(self._rates) if self._rates else None

    def left(self, step: int, total_steps: int, *, extra_seconds: float = 0.0) -> Forecast | None:
        """Say how long the steps after `step` take; None before three steps are measured.

        Args:
            step: the last step done.
            total_steps: the last step there will be.
            extra_seconds: what measuring and saving will add, as far as it is known.
        """
        rate = self.tokens_per_second
        if len(self._rates) < 3 or rate is None:
            return None
        remaining = max(total_steps - step, 0)
        mid = remaining * self._tokens / self._steps / rate
        quarters = statistics.quantiles(self._rates, n=4, method="inclusive")
        spread = 0.74 * (quarters[2] - quarters[0]) / rate  # a standard deviation, if steps were normal
        off = min(0.9, 0.03 + 2 * spread * math.sqrt(1 / len(self._rates) + 1 / max(remaining, 1)))
        low, high = mid * (1 - off), mid * (1 + off)
        basis = f"{rate:,.0f} tokens/s, median of {len(self._rates)} steps"
        return Forecast((low + extra_seconds, mid + extra_seconds, high + extra_seconds), basis)
