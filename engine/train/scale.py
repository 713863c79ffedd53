"""The factor that lifts gradients in float16, whose smallest number is 6e-8: cards before Ampere have no other type of 16 bits.

The loss is multiplied before the backward pass and the adapter's gradients, in float32, are divided after it; both by a power of two,
so that nothing is rounded. Where a gradient overflows, the same rows are done again with half the factor, on the same random
numbers: no step is lost, and a run stays a function of its settings. After many steps without that the factor is doubled.

Source of the figures: torch.amp.GradScaler's defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.train.optim import Kind

_FIRST, _STEPS = 2.0**16, 2000
_MOST_HALVINGS = 5  # in one step: a gradient that is not finite after that is so for another reason


@dataclass(slots=True)
class LossScale:
    """The factor now, and the steps since it last changed; without `lifts` it is 1 and stays so."""

    lifts: bool = False
    factor: float = 1.0
    steps: int = 0
    _halved: int = 0

    @staticmethod
    def of(dtype: torch.dtype) -> LossScale:
        """Return the scale that gradients in `dtype` need."""
        return LossScale(True, _FIRST) if dtype == torch.float16 else LossScale()

    def settle(self, flat: Flat[Kind]) -> bool:
        """Divide the gradients by the factor; returns whether the step is done, or its rows have to go through again."""
        if not self.lifts:
            return True
        flat.scale(1 / self.factor)
        if flat.finite():
            self.steps, self._halved = self.steps + 1, 0
            if self.steps == _STEPS:
                self.factor, self.steps = self.factor * 2, 0
            return True
        if self._halved == _MOST_HALVINGS or self.factor == 1:
            self.factor, self._halved = self.factor * 2.0**self._halved, 0
            return True
        self.factor, self.steps, self._halved = self.factor / 2, 0, self._halved + 1
        return False

    def state(self) -> list[float]:
        """Return what a resume has to know."""
        return [self.factor, self.steps]

    def restore(self, state: Sequence[float]) -> None:
        """Go on from what `state` returned."""
        if self.lifts and state:
            self.factor, self.steps = float(state[0]), int(state[1])
