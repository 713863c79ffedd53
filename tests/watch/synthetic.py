"""Made-up runs: what a healthy one looks like at several batch sizes, and one function for each illness and each change of the data.

A healthy loss falls from 1.8 to 1.1 nats; an example's noise is log-normal with sigma 0.55, a step is the mean of its rows. The
gradient norm is log-normal around 1. Every trace is a list of steps, a pure function of its seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qlora_tui.engine.events import Evaluated, Stepped
from qlora_tui.engine.watch import HeldRow
from qlora_tui.engine.watch.replay import Held, Moment

STEPS = 1000
ONSET = 400
EVERY = 50
HELD_ROWS = 40
PER_EPOCH = 250


@dataclass
class Trace:
    """A run under the pen: its noise, and what a step costs; `loss(step)` and `norm(step)` are factors and sums over health."""

    seed: int
    batch: int = 16
    steps: int = STEPS
    add: Callable[[int], float] = lambda step: 0.0
    times: Callable[[int], float] = lambda step: 1.0
    norm: Callable[[int], float] = lambda step: 1.0
    learns: Callable[[int], float] = lambda step: 0.7 * math.exp(-step / 150)
    held: Callable[[int], float] | None = lambda step: 1.15 + 0.7 * math.exp(-step / 150)
    hard_share: float = 0.0
    seconds: Callable[[int], float] = lambda step: 1.0
    data_seconds: Callable[[int], float] = lambda step: 0.01
    swing: Callable[[int], float] = lambda step: 0.0
    ill: bool = False

    def moments(self) -> Iterator[Moment]:
        """Yield every step, and after some of them a measurement of the hold-out."""
        noise = random.Random(self.seed)
        rows = [noise.lognormvariate(0, 0.4) for _ in range(HELD_ROWS)]
        yield from self._held(0, rows, noise)
        for step in range(1, self.steps + 1):
            sizes = [noise.lognormvariate(-0.15, 0.55) for _ in range(self.batch)]
            factors = [size * (3 if noise.random() < self.hard_share else 1) for size in sizes]
            loss = (1.1 + self.learns(step)) * sum(factors) / self.batch
            loss = (loss + self.add(step)) * self.times(step) * math.exp(self.swing(step) * (1 if step % 2 else -1))
            yield self._step(step, loss, noise)
            if step % EVERY == 0:
                yield from self._held(step, rows, noise)

    def look(self, step: int) -> Held | None:
        """Return the hold-out as measured at any `step`, as the loop does before it stops a run."""
        noise = random.Random(self.seed)
        rows = [noise.lognormvariate(0, 0.4) for _ in range(HELD_ROWS)]
        return next(self._held(step, rows, random.Random(self.seed * 10_007 + step)), None)

    def _step(self, step: int, loss: float, noise: random.Random) -> Stepped:
        norm = self.norm(step) * noise.lognormvariate(0, 0.25 * (16 / self.batch) ** 0.25)
        finite = math.isfinite(loss) and math.isfinite(norm)
        return Stepped(
            step, self.steps, step / PER_EPOCH, loss, norm, norm > 1.5, not finite, 2e-4,
            2000, 1000, self.seconds(step), self.data_seconds(step), (step * 2, step * 2 + 1),
        )  # fmt: skip

    def _held(self, step: int, rows: list[float], noise: random.Random) -> Iterator[Held]:
        if self.held is None:
            return
        level = self.held(step) if step else 1.85
        if self.ill and step:
            level = (level + self.add(step)) * self.times(step)
        losses = [HeldRow(level * size + noise.gauss(0, 0.03), 60) for size in rows]
        mean = sum(row.loss for row in losses) / len(losses)
        yield Held(Evaluated(step, mean, len(losses), 0.05), losses)


def after(step: int, then: Callable[[int], float], before: float = 0.0) -> Callable[[int], float]:
    """Return a function that is `before` up to the onset and `then(steps since)` from it on."""
    return lambda now: before if now < step else then(now - step)


HEALTHY: dict[str, Callable[[int], Trace]] = {
    "healthy, 16 rows a step": lambda seed: Trace(seed),
    "healthy, 4 rows a step": lambda seed: Trace(seed, 4),
    "healthy, 1 row a step": lambda seed: Trace(seed, 1),
    "one row in a hundred is hard, 4 rows": lambda seed: Trace(seed, 4, hard_share=0.01),
    "one row in a hundred is hard, 1 row": lambda seed: Trace(seed, 1, hard_share=0.01),
    "rows sorted by length, anew each epoch": lambda seed: Trace(seed, 4, add=lambda step: 0.5 * (step % PER_EPOCH) / PER_EPOCH),
    "a curriculum, easy rows first": lambda seed: Trace(seed, 16, add=lambda step: 1.2 * step / STEPS),
    "a harder source begins (+1.0)": lambda seed: Trace(seed, 16, add=after(ONSET, lambda n: 1.0 * math.exp(-n / 200))),
    "a foreign source begins (+2.5)": lambda seed: Trace(seed, 16, add=after(ONSET, lambda n: 2.5 * math.exp(-n / 200))),
}
"""Runs that nobody should stop, by name."""

ILL: dict[str, tuple[Callable[[int], Trace], tuple[str, ...], int]] = {
    "loss +3.0 and stays": (
        lambda seed: Trace(seed, ill=True, add=after(ONSET, lambda n: 3.0), norm=after(ONSET, lambda n: 4.0, 1.0)),
        ("spike",),
        2,
    ),
    "bump of +2.5 for 8 steps": (
        lambda seed: Trace(
            seed, ill=True, add=after(ONSET, lambda n: 2.5 if n < 8 else 0.0), norm=after(ONSET, lambda n: 4.0 if n < 8 else 1.0, 1.0)
        ),
        ("spike",),
        3,
    ),
    "loss +1.0 and stays": (
        lambda seed: Trace(seed, ill=True, add=after(ONSET, lambda n: 1.0), norm=after(ONSET, lambda n: 2.0, 1.0)),
        ("spike", "drift"),
        32,
    ),
    "divergence, 5 % a step": (
        lambda seed: Trace(
            seed, ill=True, times=after(ONSET, lambda n: 1.05 ** min(n, 60), 1.0), norm=after(ONSET, lambda n: 1.05 ** min(n, 60), 1.0)
        ),
        ("spike", "drift"),
        24,
    ),
    "slow rise, 0.4 % a step": (
        lambda seed: Trace(seed, ill=True, times=after(ONSET, lambda n: 1.004**n, 1.0), norm=after(ONSET, lambda n: 1.006**n, 1.0)),
        ("drift",),
        110,
    ),
    "blown up, gradients vanish": (
        lambda seed: Trace(seed, ill=True, add=after(ONSET, lambda n: 6.0), norm=after(ONSET, lambda n: 0.03, 1.0)),
        ("spike",),
        2,
    ),
    "ill from step 3": (
        lambda seed: Trace(seed, ill=True, add=after(3, lambda n: min(3.0, n)), norm=after(3, lambda n: 5.0, 1.0)),
        ("spike", "drift"),
        50,
    ),
    "oscillation of 45 %": (
        lambda seed: Trace(seed, swing=after(ONSET, lambda n: math.log(1.45)), norm=after(ONSET, lambda n: 1.6, 1.0)),
        ("oscillation",),
        64,
    ),
    "gradient norm times 30, loss normal": (
        lambda seed: Trace(seed, norm=after(ONSET, lambda n: 30.0 if n % 3 == 0 else 1.0, 1.0)),
        ("gradient",),
        8,
    ),
    "overflow: every fifth step is NaN": (
        lambda seed: Trace(seed, norm=after(ONSET, lambda n: math.nan if n % 5 == 0 else 1.0, 1.0)),
        ("non_finite",),
        16,
    ),
    "overfitting": (
        lambda seed: Trace(seed, learns=lambda step: 0.7 * math.exp(-step / 400), held=lambda step: 1.15 + abs(step - ONSET) / 2000),
        ("overfitting",),
        4 * EVERY,
    ),
    "learnt by heart, no hold-out": (
        lambda seed: Trace(seed, 16, learns=lambda step: -min(0.95, step / 500), held=None),
        ("memorisation",),
        100,
    ),
    "not learning at all": (lambda seed: Trace(seed, learns=lambda step: 0.7, held=lambda step: 1.85), ("not_learning",), 600),
    "noise that repeats every epoch": (
        lambda seed: Trace(seed, learns=lambda step: 0.7 - 0.8 * min(1.0, step / ONSET), held=lambda step: 1.9),
        ("not_learning",),
        200,
    ),
    "four times slower": (lambda seed: Trace(seed, seconds=after(ONSET, lambda n: 4.0, 1.0)), ("throughput",), 10),
    "waits for batches": (lambda seed: Trace(seed, data_seconds=after(ONSET, lambda n: 0.5, 0.01)), ("data_wait",), 32),
}
"""Ill runs by name: how they are made, which detectors may name them, and within how many steps of the onset."""

ONSETS: dict[str, int] = {"ill from step 3": 3, "not learning at all": 1, "noise that repeats every epoch": PER_EPOCH}
"""Where an illness begins elsewhere than at `ONSET`."""
