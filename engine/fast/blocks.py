"""Attention in which rows that lie end to end stay apart, or a token sees only a window: without a mask on a card.

The flash kernel for rows of any length reads where each begins, so it makes no scores outside them; a window is a number
to it. A mask would take the square of the length, and keep the kernel away. Elsewhere rows go one by one, with a mask
where they are longer than the window: the same numbers, for tests and for cards that the kernel does not know.

Shapes: B rows, T tokens, A heads, D size of a head; keys and values may have fewer heads.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from qlora_tui.engine.batches import Blocks
from qlora_tui.engine.fused import flash_takes

_KNOWN = inspect.signature(varlen_attn).parameters  # 2.10 has no window; 2.13 wants to be told that keys have fewer heads
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _KNOWN else {}


def attend(
    query_BTAD: torch.Tensor, key_BTAD: torch.Tensor, value_BTAD: torch.Tensor, blocks: Blocks | None, window: int | None, scale: float
) -> torch.Tensor:
    """Return causal attention [B, T, A, D]; a token sees `window` tokens with itself, or all before it in its row.

    Args:
        query_BTAD: queries.
        key_BTAD: keys.
        value_BTAD: values.
        blocks: where rows lie that go end to end, B being 1; None: every row of the batch is a block.
        window: how many tokens a token sees, itself included; None: all.
        scale: what scores are multiplied by.
    """
    rows, length = query_BTAD.shape[:2]
    if not _has_kernel(query_BTAD):
        ends = None if blocks is None else blocks.bounds.tolist()
        return _one_by_one((query_BTAD, key_BTAD, value_BTAD), ends, window, scale)
    bounds, longest = (even_bounds(rows, length, query_BTAD.device), length) if blocks is None else (blocks.bounds, blocks.longest)
    seen = (-1 if window is None else window - 1, 0)  # the kernel counts the tokens before
    query, key, value = (part.flatten(0, 1) for part in (query_BTAD, key_BTAD, value_BTAD))
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=seen, **_GROUPED)
    assert isinstance(out, torch.Tensor)  # what else it gives is not asked for
    attended: torch.Tensor = out.unflatten(0, (rows, length))
    return attended


def window_of(config: Any, layer: int) -> int | None:
    """Return how many tokens, itself included, a token of `layer` sees at most; None where it sees all before it."""
    values = config.to_dict()
    window: int | None = values.get("sliding_window")
    kinds = values.get("layer_types")
    return window if kinds is None or kinds[layer] == "sliding_attention" else None


def _has_kernel(query: torch.Tensor) -> bool:
    """Say whether the kernel takes such heads, by torch's own conditions."""
    size = query.shape[-1]
    return query.is_cuda and query.dtype == torch.bfloat16 and flash_takes(size) and "window_size" in _KNOWN


def even_bounds(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Return where `rows` rows of `length` tokens begin, and the end of the last: the `bounds` of `Blocks`."""
    return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)


def _one_by_one(parts: tuple[torch.Tensor, ...], ends: list[int] | None, window: int | None, scale: float) -> torch.Tensor:
    """Return the same from one call for each block that has tokens; without `ends` all rows are one block, side by side."""
    lengths = [parts[0].shape[1]] if ends is None else [end - start for start, end in itertools.pairwise(ends) if end > start]
    outs = []
    for query, key, value in zip(*(part.transpose(1, 2).split(lengths, dim=2) for part in parts), strict=True):
        size = query.shape[2]
        mask = None
        if window is not None and window < size:
            ones = torch.ones(size, size, dtype=torch.bool, device=query.device)
            mask = ones.tril() & ones.triu(1 - window)
        outs.append(scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True))
    return torch.cat(outs, dim=2).transpose(1, 2)
