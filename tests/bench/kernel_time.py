"""Where a step's time goes: kernels of some steps by kind, and the time in which the device had nothing to do.

Between two kernels of a recorded batch a card is idle for a microsecond or so; where it is idle for longer, it waits for its host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

KINDS = (
    ("dequantization", ("dequant", "kgetcode", "nf4", "_widen", "_scaled", "_turn")),
    ("gradients to 8 bits", ("_quantize",)),
    ("attention", ("flash", "fmha", "attention", "sdpa", "cudnn_generated", "sdp")),
    ("optimizer", ("optimizer", "adam", "l2norm", "koptimizer")),
    ("matmul", ("gemm", "nvjet", "cutlass", "xmma", "matmul", "cublas", "addmm", "::mm", "::bmm", "splitk", "linear")),
    (
        "elementwise and norm",
        (
            "elementwise",
            "vectorized",
            "reduce",
            "norm",
            "softmax",
            "silu",
            "swiglu",
            "rotate",
            "rope",
            "cat",
            "copy",
            "memcpy",
            "_gated",
            "_begun",
            "_join",
            "_add",
            "_heads",
            "_cross_entropy",
            "triton",
        ),
    ),
)
"""Kinds by a piece of the kernel's name, in lower case, the first that fits; what fits none is `other`."""


LONG_GAP = 50.0
"""Microseconds: a gap between two kernels that is longer is the host's, which had not asked for the next one yet."""


def kind_of(name: str) -> str:
    """Return the kind of a kernel."""
    low = name.lower()
    return next((kind for kind, pieces in KINDS if any(piece in low for piece in pieces)), "other")


def busy(spans: Iterable[tuple[float, float]]) -> tuple[float, list[float]]:
    """Return the length of the union of `spans`, kernels of two streams at once counted once, and the gaps inside it."""
    total, gaps, reached = 0.0, list[float](), float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        gaps += [start - reached] if float("-inf") < reached < start else []
        reached = max(reached, end)
    return total, gaps


def grouped(kernels: Iterable[tuple[str, float, float]], wall: float) -> dict[str, Any]:
    """Return milliseconds by kind for kernels of (name, start, end) in microseconds and `wall` in milliseconds.

    Of wall less the time in which anything ran, short gaps are `between kernels`, the rest is `waiting for the host`; the largest
    kernels of `other` are named, so that they find a kind.
    """
    known = list(kernels)
    kinds: dict[str, float] = dict.fromkeys([kind for kind, _ in KINDS] + ["other"], 0.0)
    names, often = dict[str, float](), Counter(name for name, _, _ in known)
    for name, start, end in known:
        kinds[kind_of(name)] += (end - start) / 1e3
        names[name] = names.get(name, 0.0) + (end - start) / 1e3
    ran, gaps = busy((start, end) for _, start, end in known)
    short = sum(gap for gap in gaps if gap <= LONG_GAP) / 1e3
    idle = {"between kernels": short, "waiting for the host": wall - ran / 1e3 - short}
    unknown = sorted((name for name in names if kind_of(name) == "other"), key=lambda name: -names[name])
    top = sorted(names, key=lambda name: -names[name])[:40]
    return {
        "wall": wall,
        "kinds": kinds | idle,
        "kernels": len(known),
        "longest_gaps": [round(gap / 1e3, 3) for gap in sorted(gaps, reverse=True)[:12]],
        "largest": {f"{often[name]} of {name[:90]}": round(names[name], 3) for name in top},
        "unknown": {name[:90]: round(names[name], 3) for name in unknown[:6]},
    }


class Profile:
    """Profiles the steps after step `first` up to step `last`; give `step` to a run as its listener."""

    def __init__(self, *, cpu: bool, first: int, last: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.cpu, self.first, self.last = cpu, first, last
        self.profile = profile(activities=[ProfilerActivity.CPU if cpu else ProfilerActivity.CUDA])

    def step(self, stepped: Any) -> None:
        """Begin after step `first`, end after step `last`; a step ends only when the device has, since its loss is read."""
        if stepped.step == self.first:
            self.profile.start()
        elif stepped.step == self.last:
            self.profile.stop()

    def told(self, seconds: list[float]) -> dict[str, Any]:
        """Return milliseconds a step by kind; on a processor operations stand for kernels, each by the time of its own."""
        from torch.autograd import DeviceType

        steps = len(seconds)
        kernels = []
        for event in self.profile.events() or ():
            start = event.time_range.start
            if self.cpu:
                kernels.append((event.name, start, start + event.self_cpu_time_total))
            elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                kernels.append((event.name, start, event.time_range.end))
        if not kernels:
            raise SystemExit("the profiler saw no kernel")
        found = grouped(kernels, 1e3 * sum(seconds))
        kinds = {kind: round(value / steps, 3) for kind, value in found["kinds"].items()}
        return found | {"wall": round(found["wall"] / steps, 3), "kinds": kinds, "kernels": found["kernels"] // steps, "steps": steps}


def table(profile: dict[str, Any]) -> str:
    """Return a profile as a Markdown table."""
    rows = ["| kind | ms a step | share |", "|---|---|---|"]
    for kind, value in [*profile["kinds"].items(), ("wall", profile["wall"])]:
        rows.append(f"| {kind} | {value:.1f} | {value / profile['wall']:.1%} |")
    return "\n".join(rows)
