"""Every change of settings that advice may offer: what to set, what it does to the result, and how far to go.

A change that can be made by degrees (rows at once, layers recomputed, length, rank) is offered at the mildest
degree that is enough. `fixes` weighs and ranks what is found here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from qlora_tui.engine import onebyte
from qlora_tui.engine.budget import Budget, estimate
from qlora_tui.engine.forecast import seconds_per_token
from qlora_tui.engine.fused import has_scoreless
from qlora_tui.engine.machine import Machine, find_card
from qlora_tui.engine.measured import Correction
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.padding import row_of_largest
from qlora_tui.engine.sizes import (
    LOGITS_PER_CHUNK,
    checkpointed_layers,
    choose_optimizer,
    compute_type,
    double_quantized,
    element_bytes,
    four_bit,
)
from qlora_tui.engine.spec import RunConfig, offloads, rows_at_once, rows_per_step
from qlora_tui.engine.units import count, gib, percent
from qlora_tui.engine.values import Value

_STAND_IN = "RTX 4090"  # ranks the changes for a card that nobody knows; only the ratio of two times is told
_LENGTH_STEP = 256
_LEAST_RANK, _LEAST_CHUNK = 8, 64
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


@dataclass(frozen=True, slots=True)
class Change:
    """A change of settings. `harm` ranks what it does to the result: 0 nothing, 1 little, 2 something, 3 much."""

    values: dict[str, Value]
    text: str
    harm: int = 0
    quality: str = ""


class Asked:
    """The run as it is, and what each change makes of it."""

    def __init__(
        self,
        model: ModelSpec,
        run: RunConfig,
        machine: Machine,
        longest: int | None,
        lengths: tuple[int, ...],
        correction: Correction | None,
    ) -> None:
        self.model, self.run, self.machine = model, run, machine
        self.longest, self.lengths, self.correction = longest, lengths, correction
        self.tokens = tuple(itertools.accumulate(lengths))  # of the rows up to each
        self.now = self.after({})
        self.layers = model.num_hidden_layers
        self.recomputed = checkpointed_layers(model, run)
        self.length = min(run.max_length, longest or run.max_length)
        self.timed = machine if seconds_per_token(model, run, machine) is not None else find_card(_STAND_IN)
        self._kept = bisect_right(lengths, run.max_length)
        self.seconds = self._seconds(model, run)

    @property
    def short(self) -> bool:
        """Whether the run does not fit, or only if nothing is off."""
        return not self.now.fits or self.now.tight

    def after(self, values: Mapping[str, Value], model: ModelSpec | None = None) -> Budget:
        """Return the estimate with some settings changed."""
        run = _with(self.run, values)
        return estimate(model or self.model, run, self.machine, longest=self._longest(run), correction=self.correction)

    def _longest(self, run: RunConfig) -> int | None:
        """Return the longest row of `run`, which a longer limit lets in; None where not every row was counted.

        Of rows that lie end to end, one of those that are alike and together as long as the longest of them.
        """
        longest = self._longest_alone(run)
        if longest is None or not self.lengths or run.packing != "on":
            return longest
        rows, known = rows_at_once(run), bisect_right(self.lengths, run.max_length)
        cut = 0 if run.too_long == "drop" else min(rows, len(self.lengths) - known)
        trained = (run.max_length,) * cut + self.lengths[max(0, known - rows) : known]
        return min(longest, row_of_largest(trained, rows)) if trained else longest

    def _longest_alone(self, run: RunConfig) -> int | None:
        if self.longest is None or not self.lengths or run.max_length <= self.run.max_length:
            return self.longest
        if run.too_long != "drop":
            return min(self.lengths[-1], run.max_length)
        return max(self.longest, self.lengths[bisect_right(self.lengths, run.max_length) - 1])

    def need(self, values: Mapping[str, Value]) -> int:
        """Return the bytes that must be free for a change to be safe."""
        budget = self.after(values)
        return budget.total_bytes + budget.margin_bytes

    def enough(self, values: Mapping[str, Value]) -> bool:
        """Say whether the run fits after a change, with the margin."""
        return self.need(values) <= self.now.machine.free_bytes

    def factor(self, values: Mapping[str, Value], model: ModelSpec | None = None) -> float:
        """Return how much longer training takes after a change: all rows that are kept, or a token where none is, or none is known."""
        return self._seconds(model or self.model, _with(self.run, values)) / self.seconds

    def _seconds(self, model: ModelSpec, run: RunConfig) -> float:
        kept = bisect_right(self.lengths, run.max_length) if self._kept else 0
        if not kept:
            return seconds_per_token(model, run, self.timed) or 1.0
        tokens = self.tokens[kept - 1]
        return tokens * (seconds_per_token(model, run, self.timed, row_tokens=tokens / kept) or 1.0)

    def over(self, length: int) -> float | None:
        """Return the share of rows longer than `length`; None where lengths are not known."""
        return 1 - bisect_right(self.lengths, length) / len(self.lengths) if self.lengths else None


def smaller(asked: Asked) -> Iterator[Change]:
    """Yield every single change that may save memory."""
    yield from _same_result(asked)
    yield from _fewer_tokens(asked)
    yield from _smaller_adapter(asked)
    yield from _narrower(asked)


def _same_result(asked: Asked) -> Iterator[Change]:
    """Yield changes after which the same rows give the same steps, up to rounding."""
    model, run, cuda = asked.model, asked.run, asked.machine.kind == "cuda"
    if cuda and choose_optimizer(run, asked.machine) == "adamw_torch":
        yield Change({"optim": "paged_adamw_8bit"}, "keep the optimizer's state in 8 bits")
    if four_bit(model, run) and not model.quantized and not double_quantized(model, run):
        yield Change({"bnb_4bit_use_double_quant": True}, "quantize the block constants too")
    if run.attn_implementation == "eager" and has_scoreless(model, run, asked.machine):
        yield Change({"attn_implementation": "sdpa"}, "attention that does not hold all scores")
    if asked.recomputed < asked.layers:
        number = asked.layers
        if asked.short:
            number = _fewest(asked.recomputed + 1, number, lambda layers: asked.enough(_layers(asked, layers)))
        words = "every layer" if number == asked.layers else f"{number} of {asked.layers} layers"
        yield Change(_layers(asked, number), f"recompute {words} instead of keeping activations")
    if cuda and asked.recomputed == asked.layers and not offloads(run):
        away = asked.after({"offload_checkpoints": "on"})
        if away.fits_host:
            yield Change({"offload_checkpoints": "on"}, f"keep inputs of layers in RAM ({gib(away.host_bytes)}, pinned)")
    smaller = [rows for rows in _divisors(rows_per_step(run)) if rows < rows_at_once(run)]
    if smaller:
        rows = next((rows for rows in reversed(smaller) if asked.enough(_rows(run, rows))), smaller[0])
        yield Change(_rows(run, rows), f"{rows} row{'s' if rows > 1 else ''} at once, as many rows a step")
    chunk = run.loss_chunk_size or max(1, LOGITS_PER_CHUNK // model.vocab_size)
    if chunk // 4 >= _LEAST_CHUNK:
        yield Change({"loss_chunk_size": chunk // 4}, "logits of fewer tokens at a time")


def _fewer_tokens(asked: Asked) -> Iterator[Change]:
    """Yield the longest `max_length` that is enough, or half of it."""
    shorter = _shorter(asked)
    if not shorter:
        return
    length = next((length for length in shorter if asked.enough({"max_length": length})), shorter[-1])
    share = asked.over(length)
    if share is None:
        yield Change({"max_length": length}, f"rows of at most {length} tokens", 1, "longer rows are dropped")
    elif share == 0:
        yield Change({"max_length": length}, f"rows of at most {length} tokens, and none of your rows looked at is longer")
    else:
        now = asked.over(asked.run.max_length) or 0.0
        quality = f"{asked.run.too_long}s {percent(share - now)} of your rows"
        yield Change({"max_length": length}, f"rows of at most {length} tokens", 1 if share - now < 0.1 else 2, quality)


def _shorter(asked: Asked) -> list[int]:
    """Return lengths to try, longest first, down to half; with known rows down to what keeps half of them."""
    least = asked.length // 2
    if asked.lengths:
        least = min(least, asked.lengths[len(asked.lengths) // 2])
    top = (asked.length - 1) // _LENGTH_STEP * _LENGTH_STEP
    step = max(_LENGTH_STEP, top // 16 // _LENGTH_STEP * _LENGTH_STEP)
    return [length for length in range(top, 0, -step) if length >= least]


def _smaller_adapter(asked: Asked) -> Iterator[Change]:
    """Yield changes after which less is learned."""
    run = asked.run
    ranks = [rank for halvings in range(1, 11) if (rank := run.lora_r >> halvings) >= _LEAST_RANK]
    if ranks:
        rank = next((rank for rank in ranks if asked.enough({"lora_r": rank})), ranks[0])
        yield Change({"lora_r": rank}, f"rank {rank}", 1, "learns less detail")
    if run.use_dora:
        yield Change({"use_dora": False}, "plain LoRA instead of DoRA", 1, "a little worse at low ranks")
    names = [part.name for part in asked.model.targeted(run.lora_target_modules)]
    kept = tuple(name for name in names if name in _ATTENTION)
    if kept and len(kept) < len(names):
        yield Change({"lora_target_modules": kept}, "an adapter on attention alone", 2, "learns clearly less")


def _narrower(asked: Asked) -> Iterator[Change]:
    """Yield changes of the type that numbers are kept in."""
    model, run, machine = asked.model, asked.run, asked.machine
    if run.method == "lora" and onebyte.offered(model, run, machine):
        yield Change({"method": "lora-8bit"}, "the base in 8 bits", 1, onebyte.quality())
    if not four_bit(model, run) and run.init_lora_weights != "pissa":
        yield Change(
            {"method": "qlora", "bnb_4bit_quant_type": "nf4"}, "the base in 4 bits (nf4)", 2, "a little worse, most in small models"
        )
    usual = compute_type(dataclasses.replace(run, dtype="auto"), machine)
    if element_bytes(run, machine) == 4 and usual != "float32":
        yield Change({"dtype": usual}, "compute in 16 bits, as is usual", 1)


def roomier(asked: Asked) -> Iterator[Iterable[Change]]:
    """Yield ways to spend memory, each with the largest change first: the first that fits is told."""
    run, cuda = asked.run, asked.machine.kind == "cuda"
    if asked.recomputed:
        number = _fewest(0, asked.recomputed, lambda layers: asked.enough(_layers(asked, layers)))
        words = "all activations" if number == 0 else f"the activations of {asked.layers - number} of {asked.layers} layers"
        yield [Change(_layers(asked, number), f"keep {words}")] if number < asked.recomputed else []
    if cuda:
        larger = [rows for rows in _divisors(rows_per_step(run)) if rows > rows_at_once(run)]
        yield (Change(_rows(run, rows), f"{rows} rows at once, as many rows a step") for rows in reversed(larger))
        if four_bit(asked.model, run) and not asked.model.quantized:
            yield [Change({"method": "lora"}, "the base in 16 bits", quality="no loss from 4 bits")]
            byte = Change({"method": "lora-8bit"}, "the base in 8 bits", quality=onebyte.quality())
            useful = not asked.enough({"method": "lora"}) or asked.factor(byte.values) < 1
            yield [byte] if useful and onebyte.offered(asked.model, run, asked.machine) else []
    now = asked.over(run.max_length)
    whole = "" if run.too_long == "drop" else " whole"
    if now:
        yield (
            Change({"max_length": length}, f"max length {count(length)}", quality=f"keeps {percent(gain)} more of your rows{whole}")
            for length in _longer(asked)
            if (gain := now - (asked.over(length) or 0.0)) > 0
        )


def _longer(asked: Asked) -> list[int]:
    """Return lengths beyond `max_length` up to the longest row or what the model can read, longest first."""
    most = min(asked.lengths[-1], asked.model.max_position_embeddings)
    top = -(-most // _LENGTH_STEP) * _LENGTH_STEP
    step = max(_LENGTH_STEP, (top - asked.run.max_length) // 8 // _LENGTH_STEP * _LENGTH_STEP)
    return list(range(top, asked.run.max_length, -step))


def _fewest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """Return the smallest number from `low` to `high` that is enough; `high` where none is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _layers(asked: Asked, number: int) -> dict[str, Value]:
    return {"gradient_checkpointing": {0: "false", asked.layers: "true"}.get(number, str(number))}


def _rows(run: RunConfig, rows: int) -> dict[str, Value]:
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": rows_per_step(run) // rows}


def _with(run: RunConfig, values: Mapping[str, Value]) -> RunConfig:
    return dataclasses.replace(run, **values)  # type: ignore[arg-type]  # names and types of the key table
