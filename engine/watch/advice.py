"""What to do about an ill run, cheapest first: each list is in the order in which a person should try."""

from __future__ import annotations

USUAL_RATE = 1e-4
"""A rate that LoRA runs rarely leave the ground with, and rarely blow up with."""


def calmer(rate: float) -> tuple[str, ...]:
    """Return the advice for steps that are too large, given the present learning rate.

    Four-bit floats come last and only as a new run: the type of a base cannot change under a live adapter, and fp4 loses more
    than nf4.
    """
    lower = f"learning_rate={USUAL_RATE:g}" if rate > 2 * USUAL_RATE else f"half the learning rate ({rate / 2:.2g})"
    return (
        lower,
        "warm up longer: warmup_steps=0.1",
        "more rows a step: double gradient_accumulation_steps",
        "clip harder: max_grad_norm=0.3",
        "experimental, and only as a new run: bnb_4bit_quant_type=fp4; it usually loses more than nf4",
    )


CALM = "and the gradient norm did not move, as when the rows change and not the model"
DATA = (
    "look at the rows of these steps: another source, longer or harder rows begin here",
    "if that is not what you want, let them be shuffled with the rest",
)
BEST = ("stop here and take the checkpoint of the best measurement", "fewer epochs", "a lower rank or some lora_dropout", "more rows")
LEARN = (
    "look at what is trained on: qlora-tui data FILE --examples 3",
    "a higher learning rate: 2e-4 is usual",
    "a higher rank, or lora_target_modules=all-linear",
)
