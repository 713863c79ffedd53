"""The learning rate of every step, and how many steps there are: pure functions, the same on resume."""

from __future__ import annotations

import math

from qlora_tui.engine.spec import RunConfig


def total_steps(run: RunConfig, steps_per_epoch: int) -> int:
    """Return how many optimizer steps the run has: `max_steps` if given, else whole epochs, at least one."""
    return run.max_steps or max(1, math.ceil(run.num_train_epochs * steps_per_epoch))


def warmup_steps(run: RunConfig, total: int) -> int:
    """Return the warm-up in steps; a share is rounded up so that a short run still warms up."""
    return min(total, int(run.warmup_steps) if run.warmup_steps >= 1 else math.ceil(run.warmup_steps * total))


def learning_rate(run: RunConfig, step: int, total: int) -> float:
    """Return the learning rate of `step`, counted from 1.

    Warm-up rises in equal parts and reaches the full rate at its last step; then cosine or linear fall to zero
    after the last step, or the rate stays.
    """
    warm = warmup_steps(run, total)
    if step <= warm:
        return run.learning_rate * step / warm
    progress = (step - 1 - warm) / max(1, total - warm)
    match run.lr_scheduler_type:
        case "cosine":
            return run.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return run.learning_rate * (1 - progress)
        case _:
            return run.learning_rate
