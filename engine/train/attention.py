"""Which attention kernel really runs: one forward pass over the longest row, watched operator by operator.

No flag is believed. Every operator passes a dispatch mode, so what is counted is what was called with the real shapes, mask
and type; and memory is measured at the longest row and at half of it. Costs two forward passes, once, before step 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tui.engine.batches import blocks_of
from qlora_tui.engine.events import Event
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.meter import empty_cache, out_of_memory
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.watch.attention import FUSED, SOFTMAX, Seen, judge

SHORTEST = 256
"""Below this, half a row says nothing of how memory grows."""


class Calls(TorchDispatchMode):
    """Counts attention operators; a softmax counts where it is over scores of `length` by `length`, so a router's does not."""

    def __init__(self, length: int) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.length = length
        self.seen = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one call and let it through."""
        name = str(func.overloadpacket.__name__)
        square = name == SOFTMAX and tuple(args[0].shape[-2:]) == (self.length, self.length)
        if square or name.startswith("_scaled_dot_product") or name in FUSED:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def tell_kernel(run: RunConfig, loaded: Loaded, fence: Fence, longest: int, head_dim: int) -> Iterator[Event]:
    """Say which kernel attends to rows of `longest` tokens, and why where it is a slow one; nothing on a CPU, where the loading said so."""
    if loaded.device.type != "cuda":
        return
    if loaded.caps_scores:
        return  # loading compiled its kernel, which under a mode that watches operators would run uncompiled, with all scores
    try:
        with fence.excursion():
            calls = calls_of(loaded, longest)
            full, half = (peak_bytes(loaded, length) if longest >= SHORTEST else 0 for length in (longest, longest // 2))
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return  # the rehearsal or the first step says so, with what to do about it
    finally:
        empty_cache(loaded.device)
    dtype = str(loaded.dtype).removeprefix("torch.")
    capability = torch.cuda.get_device_capability(loaded.device)
    yield judge(Seen(calls, longest, half, full, head_dim, dtype, run.attn_implementation, capability))


@torch.no_grad()
def calls_of(loaded: Loaded, length: int) -> dict[str, int]:
    """Return the attention operators that one forward pass over `length` tokens calls, by name."""
    with Calls(length) as calls:
        _forward(loaded, length)
    return dict(calls.seen)


@torch.no_grad()
def peak_bytes(loaded: Loaded, length: int) -> int:
    """Return the bytes that a forward pass over `length` tokens needs at its peak, beside what lies on the card already."""
    torch.cuda.synchronize(loaded.device)
    torch.cuda.reset_peak_memory_stats(loaded.device)
    before = torch.cuda.memory_allocated(loaded.device)
    _forward(loaded, length)
    torch.cuda.synchronize(loaded.device)
    return torch.cuda.max_memory_allocated(loaded.device) - before


def _forward(loaded: Loaded, length: int) -> None:
    """Let a row pass, as rows pass in this run, of tokens that every vocabulary has."""
    row = torch.arange(length, device=loaded.device)[None] % 100
    loaded.hidden(row, blocks_of([length], loaded.device) if loaded.packs else None)
