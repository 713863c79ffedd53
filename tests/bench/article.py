"""The memory figures of the tutorial that this tool answers to, beside ours, with the reason for each difference.

Every number of ours is computed here by the functions that the wizard uses; nothing is loaded and no card is needed.
`python tests/bench/article.py` prints the table and writes it to `tests/bench/results/article.md`. Gigabytes are
10^9 bytes, as in the tutorial.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.engine import budget, sizes
from qlora_tui.engine.activations import Batch, stack
from qlora_tui.engine.forecast import seconds_per_token
from qlora_tui.engine.machine import find_card
from qlora_tui.engine.models import ModelSpec, find
from qlora_tui.engine.spec import RunConfig

RESULT = Path(__file__).with_name("results") / "article.md"
GB = 1e9
CARD, LARGE = find_card("RTX 4090"), find_card("RTX 5090")
FULL_BYTES = 2 + 2 + 4 + 4 + 4
"""Of one weight in full fine-tuning with mixed precision: itself and its gradient in 16 bits, a 32-bit copy, two moments."""

QLORA = RunConfig(
    per_device_train_batch_size=1,
    gradient_accumulation_steps=16,
    gradient_checkpointing="true",
    max_length=2048,
    lora_r=16,
    optim="paged_adamw_8bit",
)
LORA = dataclasses.replace(QLORA, method="lora", optim="adamw_torch")


@dataclass(frozen=True, slots=True)
class Row:
    """One claim: what the tutorial says, what comes out here, and why they differ."""

    claim: str
    article: str
    ours: str
    why: str


def rows() -> tuple[Row, ...]:
    """Return all claims about memory, in the tutorial's order."""
    small, large = _model("meta-llama/Llama-2-7b-chat-hf"), _model("meta-llama/Llama-2-13b-chat-hf")
    return (*_totals(small, large), *_savings(small), *_full(small, large), _square(small))


def table() -> str:
    """Return the rows as markdown."""
    head = f"""# The tutorial's memory figures beside ours

Computed by `tests/bench/article.py` for Llama 2 (7 B: 6.74 billion weights, 13 B: 13.0), rank {QLORA.lora_r} on all linear layers,
1 x {QLORA.max_length:,} tokens, on an {CARD.name} unless said otherwise. GB are 10^9 bytes; the whole device is counted, with CUDA's
context. Estimates: the formulas met the peaks measured on one H100 within 1 % (2026-11-25-h100-80gb.md, before two later
savings), these cards have not been run.

| claim | tutorial | ours | off by, and why |
|---|---|---|---|
"""
    return head + "".join(f"| {row.claim} | {row.article} | {row.ours} | {row.why} |\n" for row in rows())


def _totals(small: ModelSpec, large: ModelSpec) -> tuple[Row, ...]:
    weights = sizes.weight_bytes(small, LORA, CARD)
    lora, kept = _total(small, LORA), _total(small, LORA, gradient_checkpointing="false")
    qlora, wide = _total(small, QLORA), _total(small, QLORA, per_device_train_batch_size=4)
    bigger, most = _total(large, QLORA), _total(large, QLORA, per_device_train_batch_size=4)
    return (
        Row("7 B in 16 bits, weights", "14 GB", _gb(weights), f"{_off(14 * GB, weights)}: the model has 6.74 billion weights, not 7.0"),
        Row(
            "LoRA, rank 16, 7 B",
            "18-20 GB",
            f"{_gb(lora)}; {_gb(kept)} with all activations kept",
            f"{_off(19 * GB, lora)} for its middle, which lies between our two ends: it depends on length, rows and checkpointing, "
            "which the tutorial does not name",
        ),
        Row(
            "QLoRA, 7 B",
            "8-10 GB",
            f"{_gb(qlora)}; {_gb(wide)} with 4 rows at once",
            f"{_off(9 * GB, qlora)} for its middle: its recipe keeps norms, embeddings and head in 32 bits and all logits at once "
            "(8 B, 2 x 2,048 tokens, measured on an H100: 16.4 GiB that way, 7.6 GiB ours); "
            f"the 4-bit base alone is {_gb(sizes.weight_bytes(small, QLORA, CARD))}",
        ),
        Row(
            "QLoRA, 13 B",
            "18 GB and up",
            f"{_gb(bigger)}; {_gb(most)} with 4 rows at once",
            f"{_off(18 * GB, bigger)}: the 4-bit base is {_gb(sizes.weight_bytes(large, QLORA, CARD))}; "
            f"on a 12 GiB card it {_verdict(large, QLORA, 'RTX 3060')}, on one of 16 GiB it {_verdict(large, QLORA, 'RTX 4080')}",
        ),
    )


def _savings(small: ModelSpec) -> tuple[Row, ...]:
    whole, lean = (_activations(small, dataclasses.replace(QLORA, gradient_checkpointing=word)) for word in ("false", "true"))
    saved, kept = 1 - lean / whole, dataclasses.replace(QLORA, gradient_checkpointing="false")
    batch = Batch(small, QLORA, 2, 1, QLORA.max_length, cuda=True, kernels=True, fuses=True)
    each = stack(batch).plain.kept / batch.hidden
    slower = _seconds(small, QLORA) / _seconds(small, kept) - 1
    single = sizes.quantized_bytes(small, dataclasses.replace(QLORA, bnb_4bit_use_double_quant=False))
    double = single - sizes.quantized_bytes(small, QLORA)
    plain, eight = (sizes.optimizer_bytes(small, QLORA, name) for name in ("adamw_torch", "adamw_8bit"))
    return (
        Row(
            "checkpointing, activations",
            "saves 60 %",
            f"saves {saved:.0%}: {_gb(whole)} to {_gb(lean)}",
            f"it is more: a layer keeps one hidden state instead of {each:.0f} of that size; what is left is those hidden "
            f"states. Of the whole run it saves {1 - _total(small, QLORA) / _total(small, kept):.0%}, which may be what is meant",
        ),
        Row(
            "checkpointing, time",
            "costs 20-30 %",
            f"costs {slower:.0%} (estimate)",
            "a frozen base needs no gradients of its weights, so the backward pass costs as much as the forward pass and another one "
            "adds up to a half (49 % measured on an H100); a third is right where all weights are trained",
        ),
        Row(
            "double quantization",
            "saves 0.5-1 GB",
            f"saves {_gb(double)}",
            f"{_off(0.75 * GB, double)} for its middle: 0.37 bits for each of {small.quantized_params / 1e9:.2f} billion weights "
            "(QLoRA paper, section 3); 0.5-1 GB is right for 11 to 22 billion weights",
        ),
        Row(
            "8-bit AdamW, optimizer's memory",
            "saves 75 %",
            f"saves {1 - eight / plain:.1%}: {_gb(plain)} to {_gb(eight)}",
            "right, less the block constants (1.6 % of the 32-bit state); but an adapter's state is small, so the run saves only "
            f"{(plain - eight) / _total(small, dataclasses.replace(QLORA, optim='adamw_torch')):.1%}",
        ),
    )


def _full(small: ModelSpec, large: ModelSpec) -> tuple[Row, ...]:
    full = small.params * FULL_BYTES
    fits = budget.estimate(large, LORA, LARGE)
    return (
        Row(
            "full fine-tuning, 7 B",
            "40-50 GB",
            f"{_gb(full)} before any activation",
            f"{_off(45 * GB, full)} for its middle: {FULL_BYTES} bytes a weight (16-bit weight and gradient, 32-bit copy, two moments; "
            "112 GB for 7.0 billion). 40 GB is what 8-bit AdamW without a 32-bit copy takes: 6 bytes a weight, "
            f"{_gb(small.params * 6)}",
        ),
        Row(
            f"{LARGE.name} ({LARGE.total_bytes / 2**30:.0f} GiB) for LoRA of 13 B",
            "enough",
            f"{_gb(fits.total_bytes)} of {_gb(LARGE.total_bytes)}: {_verdict(large, LORA, LARGE.name)}",
            f"the 16-bit base alone is {_gb(sizes.weight_bytes(large, LORA, LARGE))}; with the usual stack's full logits it would be more",
        ),
        Row(
            f"{LARGE.name} for full fine-tuning of 7 B",
            "enough",
            f"{_gb(full)} of {_gb(LARGE.total_bytes)}: does not fit",
            f"{full / LARGE.total_bytes:.1f} times the card; even 6 bytes a weight ({_gb(small.params * 6)}) do not fit",
        ),
    )


def _square(small: ModelSpec) -> Row:
    def growth(attention: str) -> float:
        run = dataclasses.replace(QLORA, attn_implementation=attention, gradient_checkpointing="false")
        return _activations(small, dataclasses.replace(run, max_length=8192)) / _activations(small, run)

    return Row(
        "activations and the length of the context",
        "grow with its square",
        f"2,048 to 8,192 tokens: {growth('sdpa'):.1f} times with the flash kernel, {growth('eager'):.1f} times with eager attention",
        "only scores grow with the square, and the flash kernel never stores them; four times the tokens take four times the memory",
    )


def _activations(model: ModelSpec, run: RunConfig) -> int:
    train = next(phase for phase in budget.estimate(model, run, CARD).phases if phase.name == "train")
    return sum(item.bytes for item in train.items if item.name == "activations")


def _total(model: ModelSpec, run: RunConfig, **changes: str | int) -> int:
    return budget.estimate(model, dataclasses.replace(run, **changes), CARD).total_bytes  # type: ignore[arg-type]  # names of the key table


def _seconds(model: ModelSpec, run: RunConfig) -> float:
    found = seconds_per_token(model, run, CARD)
    assert found is not None
    return found


def _verdict(model: ModelSpec, run: RunConfig, card: str) -> str:
    found = budget.estimate(model, run, find_card(card))
    return "fits, but only just" if found.tight else "fits" if found.fits else "does not fit"


def _model(name: str) -> ModelSpec:
    found = find(name)
    assert found is not None
    return found


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB" if size < 3 * GB else f"{size / GB:.1f} GB"


def _off(article: float, ours: float) -> str:
    return f"the tutorial is {article / ours - 1:+.0%}"


def main() -> None:
    """Print the table and write it beside the other results."""
    text = table()
    print(text, end="")
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
