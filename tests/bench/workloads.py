"""What `step.py` measures: workloads, the rows of each, the work in a step, and the search for the longest row. Pure: no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA8, QWEN15, QWEN14 = "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-14B"
MEDIAN, SIGMA, SHORTEST = 350, 0.8, 16
"""Ragged rows: log-normal in tokens, cut at the longest; sigma 0.8 puts a tenth of them over 2.8 medians."""
IDS = 256
"""Token ids are below this: all are known to the byte-level tokenizer, and an id costs what any other costs."""
GIB = 2**30
OURS = ("full", "offloaded", "none", "auto")
"""What ours recomputes; `offloaded`: everything, from inputs in pinned RAM, as the fastest peer does."""
PEERS = {"plain": "full", "plain-lean": "full", "liger": "full", "liger-nogc": "none", "unsloth": "full", "unsloth-nogc": "none"}
"""Each peer and what of its activations it recomputes."""
NEEDS = {"plain": "peft", "plain-lean": "peft", "liger": "liger_kernel", "unsloth": "unsloth"}


@dataclass(frozen=True, slots=True)
class Case:
    """One process: a backend on a workload. `rows` are those of a step, `at_once` those of a micro-batch, `limit` is GiB or 0."""

    workload: str
    shape: str
    rows: int
    at_once: int
    length: int
    ragged: bool = False
    rank: int = 16
    warm: int = 3
    steps: int = 10
    backend: str = "ours"
    setting: str = "full"
    packing: str = ""
    method: str = "qlora"
    gradients: str = "auto"  # what ours multiplies them in, on an 8-bit base
    older: bool = False  # ours plays a card before Ampere: float16 under a loss scale, layer by layer
    limit: float = 0.0
    profile: bool = False
    sixteen: bool = False  # the checkpoint's weights are bfloat16, and ours loads it too
    tiny: bool = False

    @property
    def key(self) -> str:
        """What names the case in a file of results; a case in it is not run again."""
        parts = [self.workload, self.backend, self.setting, self.packing, f"{self.length}", f"{self.limit:g}GiB" if self.limit else ""]
        parts += [self.method] if self.method != "qlora" else []
        parts += [f"gradients {self.gradients}"] if self.gradients != "auto" else []
        parts += [name for name in ("profile", "sixteen", "older", "tiny") if dataclasses.asdict(self)[name]]
        return " ".join(part for part in parts if part)

    @property
    def package(self) -> str:
        """The package that has to be there, or nothing for ours."""
        return NEEDS.get(self.backend.removesuffix("-nogc"), "")

    @classmethod
    def of(cls, text: str) -> Case:
        """Read what `json.dumps(dataclasses.asdict(case))` wrote."""
        return cls(**json.loads(text))


STEP_TOKENS = 16_384
WORKLOADS: dict[str, tuple[Case, ...]] = {
    "a": (Case("a", LLAMA8, 2, 2, 2048),),
    "b": (Case("b", LLAMA8, 16, 4, 2048, ragged=True, warm=20),),  # ours records a batch of each size first
    "c": (Case("c", QWEN15, 4, 4, 2048),),
    "d": (Case("d", QWEN14, 1, 1, 8192),),
    "length": tuple(Case("length", LLAMA8, STEP_TOKENS // n, STEP_TOKENS // n, n) for n in (512, 1024, 2048, 4096, 8192, 16_384)),
    "long": (Case("long", LLAMA8, 1, 1, 8192, rank=32, warm=0, steps=2),),
}


def cases(
    workload: str, *, only: Sequence[str], settings: Sequence[str], limit: float, ours: Mapping[str, Any] | None = None, **flags: bool
) -> list[Case]:
    """Return the processes of a workload: ours in each setting, then the peers; empty `only` or `settings` take all.

    `ours` are fields of our cases alone: peers know NF4 and bfloat16. `flags` are `profile`, `sixteen` and `tiny` of each case; only
    ours are profiled.
    """
    pairs = [("ours", setting) for setting in OURS] + ([] if flags.get("profile") else list(PEERS.items()))
    kept = [(name, setting) for name, setting in pairs if (not only or name in only) and (not settings or setting in settings)]
    found = []
    for base in WORKLOADS[workload]:
        shared = dataclasses.replace(base, limit=limit, **flags)
        if shared.tiny:
            shared = dataclasses.replace(shared, length=min(base.length, 64), rows=min(base.rows, 4), at_once=min(base.at_once, 2), steps=3)
        for name, setting in kept:
            made = dataclasses.replace(shared, backend=name, setting=setting, **((ours or {}) if name == "ours" else {}))
            found += [dataclasses.replace(made, packing=packing) for packing in (("padded", "packed") if base.ragged else ("",))]
    return list(dict.fromkeys(found))


def lengths(case: Case, seed: int = 0) -> list[int]:
    """Return the tokens of each row, for all steps: all of `length`, or log-normal and never longer."""
    count = case.rows * (case.warm + case.steps)
    if not case.ragged:
        return [case.length] * count
    chance = random.Random(seed)
    median = min(MEDIAN, case.length // 4)
    return [min(case.length, max(SHORTEST, round(chance.lognormvariate(math.log(median), SIGMA)))) for _ in range(count)]


def rows(case: Case, seed: int = 0) -> Iterator[dict[str, list[int]]]:
    """Return rows of token ids; of ragged ones the first half is masked. A row's first token is never predicted, so has no label."""
    chance = random.Random(seed + 1)
    for length in lengths(case, seed):
        ids = chance.choices(range(IDS), k=length)
        masked = length // 2 if case.ragged else 1
        yield {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


def write_rows(case: Case, path: Path) -> None:
    """Write the rows one a line: every backend reads this file."""
    with path.open("w") as file:
        for row in rows(case):
            file.write(json.dumps(row) + "\n")


def bins(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Put rows into as few bins of `room` tokens as first fit, longest first, finds; returns the places of the rows in each."""
    found: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        fitting = next((number for number, free in enumerate(left) if free >= sizes[place]), None)
        if fitting is None:
            found.append([])
            left.append(room)
            fitting = len(found) - 1
        found[fitting].append(place)
        left[fitting] -= sizes[place]
    return found


def flops(config: Mapping[str, Any], sizes: Sequence[int], supervised: int) -> float:
    """Return the floating-point operations that a step on rows of `sizes` tokens needs, nothing recomputed.

    Frozen weights cost 2 a parameter forward and 2 backward (the input's gradient alone); causal attention costs 2 h n^2 a
    layer forward and twice that backward; the head is needed where a token is supervised. Adapters are left out.
    """
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or hidden // heads
    a_layer = 2 * hidden * width * (heads + shared) + 3 * hidden * inner
    attention = 6.0 * heads * width * sum(size * size for size in sizes)
    return layers * (4.0 * a_layer * sum(sizes) + attention) + 4.0 * hidden * config["vocab_size"] * supervised


def next_try(tried: Mapping[int, bool], *, start: int, grain: int, most: int, near: float = 0.02) -> int | None:
    """Return the next length to try, a multiple of `grain`; None once the longest that trains is known well enough.

    Doubled until one does not train, then halved in between, to a share of `near` or to `grain`, whichever is coarser.
    `start` and `most` are multiples of `grain`, `start` at most `most`.
    """
    good = max((length for length, trains in tried.items() if trains), default=0)
    bad = min((length for length, trains in tried.items() if not trains and length > good), default=None)
    if bad is None:
        return None if good >= most else min(most, max(start, 2 * good))
    if bad - good <= max(grain, near * good):
        return None
    return good + max(grain, (bad - good) // 2 // grain * grain)


def longest(tried: Mapping[int, bool]) -> int:
    """Return the longest row that trained, 0 if none did."""
    return max((length for length, trains in tried.items() if trains), default=0)
