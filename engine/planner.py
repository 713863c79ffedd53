"""What to choose for all that was left open, so that the memory that is free buys time.

A run leaves a setting open with `auto` or 0. Recomputing fewer layers and taking more rows at once cost memory
and save seconds; neither changes what a step learns, since the rows of a step stay the same. The choice is the
fastest that fits with the estimate's whole margin. What was fixed by hand is never changed. On a processor nothing
that could move the last bit of a result follows free memory, so that one seed gives one adapter.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_tui.engine import forecast, measured, onebyte
from qlora_tui.engine.budget import Budget
from qlora_tui.engine.forecast import step_key
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.padding import bucket
from qlora_tui.engine.search import FEW_LAYERS, Asked, Choice, Search
from qlora_tui.engine.spec import RunConfig, rows_per_step, values_of
from qlora_tui.engine.units import count, gib, percent
from qlora_tui.engine.values import Value

__all__ = ["Plan", "choose", "open_keys", "settled", "step_key"]

_OPEN: Mapping[str, Value] = {
    "method": "auto",
    "dtype": "auto",
    "optim": "auto",
    "gradient_checkpointing": "auto",
    "per_device_train_batch_size": 0,
    "offload_checkpoints": "auto",
    "loss_chunk_size": 0,
    "cuda_graphs": "auto",
    "packing": "auto",
}
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """A run with nothing left open, what it needs, and why it was chosen.

    `choices` are the values of the keys that were open, `reasons` a few words for each. `fallbacks` are leaner runs
    in their order, the last the leanest: they differ in open keys alone, and are what to try when memory runs out.
    """

    run: RunConfig
    budget: Budget
    choices: Mapping[str, Any]
    why: str
    seconds_per_token: float | None
    fallbacks: tuple[RunConfig, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)


def open_keys(run: RunConfig) -> tuple[str, ...]:
    """Return the keys that a run leaves to the planner."""
    values = values_of(run)
    return tuple(name for name, value in _OPEN.items() if values[name] == value)


def settled(run: RunConfig) -> bool:
    """Say whether nothing is left to choose."""
    return not open_keys(run)


def choose(
    model: ModelSpec,
    run: RunConfig,
    machine: Machine,
    *,
    longest: int | None = None,
    mean: float | None = None,
    lengths: Sequence[int] = (),
) -> Plan:
    """Choose everything that `run` leaves open.

    Args:
        model: the base's shape.
        run: the settings.
        machine: the device; its `memory_limit_gib` is applied here.
        longest: tokens of the longest row, which decides memory; else rows are taken to be `max_length` long.
        mean: tokens of the mean row, which decides time; else the longest is taken.
        lengths: tokens of the rows, where they are known: they say what padding would cost, and how large rows end to end can be.

    Raises:
        ConfigError: `lora_target_modules` names a layer that the model does not have.
    """
    long = min(run.max_length, longest or run.max_length)
    trained = [length for length in lengths if length <= run.max_length]
    step = rows_per_step(run)
    cut = 0 if run.too_long == "drop" else min(step, len(lengths) - len(trained))
    most = tuple(heapq.nlargest(step, [run.max_length] * cut + trained))
    return _choose(model, run, machine, longest, min(mean or long, long), bucket(trained, step), most, measured.stamp())


@functools.lru_cache(maxsize=64)
def _choose(
    model: ModelSpec,
    run: RunConfig,
    machine: Machine,
    longest: int | None,
    mean: float,
    some: tuple[int, ...],
    most: tuple[int, ...],
    stamp: tuple[int, int],
) -> Plan:
    """Choose, once for the same question; `stamp` changes with what was measured."""
    asked = Asked(model, run, machine, longest, mean, forecast.speed_of(machine), measured.correction_now(machine.name), some, most)
    search, found = _best(asked)
    chosen = search.config(found)
    names = open_keys(run)
    if "per_device_train_batch_size" in names:
        names = (*names, "gradient_accumulation_steps")
    if run.grad_matmul != chosen.grad_matmul:
        names = (*names, "grad_matmul")
    values = values_of(chosen)
    return Plan(
        run=chosen,
        budget=search.budget(found),
        choices={name: values[name] for name in names},
        why=_why(search, found),
        seconds_per_token=forecast.seconds_per_token(model, chosen, machine, row_tokens=mean),
        fallbacks=_fallbacks(search, found),
        reasons={name: reason for name, reason in _reasons(search, found).items() if name in names},
    )


def _best(asked: Asked) -> tuple[Search, Choice]:
    """Return the best choice and the search it is from: the first base that fits, of 16 and 8 bits the faster.

    Inputs of layers wait in RAM only where nothing fits without.
    """
    tried: list[Search] = []
    best: tuple[Search, Choice] | None = None
    for method in _methods(asked.model, asked.run, asked.machine):
        if best is not None and method == "qlora":
            break
        best = _of_base(asked, method, tried, math.inf if best is None else best[0].rank(best[1]) - 1) or best
    if best is not None:
        return best
    last = [(one, away) for one in tried if (away := one.leanest_away()) is not None]
    return next((one for one in last if one[0].roomy(one[1])), last[-1] if last else (tried[-1], tried[-1].leanest()))


def _of_base(asked: Asked, method: str, tried: list[Search], limit: float) -> tuple[Search, Choice] | None:
    """Return the best choice of one base whose rank is at most `limit`; the searches made are added to `tried`.

    The optimizer pages only where that saves time.
    """
    found: tuple[Search, Choice] | None = None
    for optim in _optimizers(asked.run, asked.machine):
        search = Search(asked, method, optim)
        tried.append(search)
        if found is not None and search.need(found[1]) >= found[0].need(found[1]):
            continue
        choice = search.find(limit if found is None else found[0].rank(found[1]) - 1)
        found = (search, choice) if choice is not None else found
    return found


def _methods(model: ModelSpec, run: RunConfig, machine: Machine) -> tuple[str, ...]:
    """Return the bases to try, the better first: 4 bits cost quality, so 16 are taken where they fit, or 8 where those were measured."""
    if run.method != "auto":
        return (run.method,)
    if model.quantized:
        return ("qlora",)
    if run.init_lora_weights == "pissa":  # it needs the weights' main directions, which 4 bits no longer hold
        return ("lora",)
    if machine.kind != "cuda":
        return ("qlora",)
    return ("lora", "lora-8bit", "qlora") if onebyte.offered(model, run, machine) else ("lora", "qlora")


def _optimizers(run: RunConfig, machine: Machine) -> tuple[str, ...]:
    if run.optim != "auto":
        return (run.optim,)
    return ("adamw_8bit", "paged_adamw_8bit") if machine.kind == "cuda" else ("adamw_torch",)


def _fallbacks(search: Search, found: Choice) -> tuple[RunConfig, ...]:
    """Return ever leaner choices: more layers recomputed, then fewer rows at once, then the leanest there is.

    Their order needs no estimate, which was too low if one of them is ever taken.
    """
    leanest, away = search.leanest(), search.leanest_away()
    most = leanest.recomputed
    halfway = (found.recomputed + most + 1) // 2
    ladder = [found._replace(recomputed=halfway)] if most > halfway > FEW_LAYERS else []
    ladder += [found._replace(rows=rows, recomputed=most) for rows in reversed(search.rows) if rows <= found.rows]
    every = [away] if found.away else [*ladder, leanest, away]
    return tuple(search.config(choice) for choice in dict.fromkeys(every) if choice not in (found, None))


def _why(search: Search, found: Choice) -> str:
    """Return one sentence with the plan's arithmetic; it promises a speed only where the device is known."""
    budget, leanest = search.budget(found), Choice(search.rows[0], search.ends()[0], found.chunk)
    free = f"{gib(budget.machine.free_bytes)}{' free' if budget.machine.others_bytes else ''}"
    used = f"{budget.total_bytes / _GIB:.1f} of {free}"
    limits = _at_most(search)
    if not budget.fits:
        return f"needs {used}{', even with ' + limits if limits else ''}"
    if budget.tight:
        return f"uses {used}, which is within the estimate's margin{', even with ' + limits if limits else ''}"
    faster = search.seconds(leanest) / search.seconds(found)
    if search.asked.speed is None or faster < 1.05 or not limits:
        return f"uses {used}"
    both = search.layers_open and len(search.rows) > 1
    return f"uses {used}, {faster:.1f}x faster than {'the leanest choice' if both else limits}"


def _at_most(search: Search) -> str:
    """Return what the leanest choice does, of that which is open."""
    one_row = len(search.rows) > 1
    if search.layers_open:
        return "recomputing all layers at 1 row" if one_row else "recomputing all layers"
    return "1 row at once" if one_row else ""


def _reasons(search: Search, found: Choice) -> dict[str, str]:
    """Return a few words for each thing that can be chosen."""
    run, processor = search.base, search.asked.machine.kind == "cpu"
    kept = search.layers - found.recomputed
    layers = f"{kept} of {search.layers} layers keep their activations" if kept else "memory is short, so every layer is recomputed"
    smaller = found.chunk != search.chunks[0]
    return {
        "method": _why_this_base(search),
        "dtype": "what this device computes in",
        "optim": "plain AdamW on a processor" if processor else "pages its state when memory is short" if "paged" in run.optim else "fits",
        "gradient_checkpointing": "all activations fit" if kept == search.layers else layers,
        "per_device_train_batch_size": "by length alone on a processor" if processor else "the fastest that fits",
        "gradient_accumulation_steps": f"{count(rows_per_step(search.asked.run))} rows a step, as asked",
        "offload_checkpoints": f"nothing fits without: {gib(search.budget(found).host_bytes)} of pinned RAM"
        if found.away
        else "not needed",
        "loss_chunk_size": "smaller than usual, for memory" if smaller else "by the vocabulary",
        "cuda_graphs": "launching kernels would hold the device up"
        if search.replayed(found)
        else "kernels take far longer than their launches",
        "grad_matmul": "the fastest of what was timed on this card"
        if search.speed.fp8_share or search.speed.int8_share
        else "usual; a run times this card's products, and the next one takes the fastest",
        "packing": search.why_padded(found) or f"padding would be {percent(search.padded(found))} of a batch",
    }


def _why_this_base(search: Search) -> str:
    if search.base.method == "lora":
        return "the 16-bit base fits, and 4 bits cost quality"
    if search.base.method == "lora-8bit":
        return f"the fastest base that fits and is near 16 bits: {onebyte.quality()}"
    if search.asked.model.quantized:
        return "its weights are stored in 4 bits"
    return "the usual choice on a processor" if search.asked.machine.kind == "cpu" else "the 16-bit base does not fit"
