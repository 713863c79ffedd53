"""Activation checkpointing by decoder layer: keep a layer's input, compute the rest again in the backward pass.

Done here with torch's own checkpoint, since transformers renames its switch between versions and knows only
all layers or none. Non-reentrant: a fault between forward and backward raises instead of giving a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from qlora_tui.engine.fast.offload import Offload


def recompute(layers: torch.nn.ModuleList, number: int, *, dropout: bool, offload: Offload | None = None) -> None:
    """Make the first `number` layers recompute their inside; may be called again with another number.

    The first ones, since what they keep would lie in memory longest. Random numbers are replayed only where
    `dropout` draws any. With `offload` their inputs wait in the machine's memory.
    """
    for index, layer in enumerate(layers):
        inner = layer.forward.inner if isinstance(layer.forward, _Recomputed) else layer.forward
        # on the instance, so that no other model of the class is touched
        layer.forward = _Recomputed(inner, dropout, index, number, offload) if index < number else inner


def recomputed(layers: torch.nn.ModuleList) -> int:
    """Return how many of `layers` recompute their inside now."""
    return sum(isinstance(layer.forward, _Recomputed) for layer in layers)


def offloading(layers: torch.nn.ModuleList) -> Offload | None:
    """Return what holds the inputs of `layers` away from the device, or None where they stay."""
    return next((layer.forward.offload for layer in layers if isinstance(layer.forward, _Recomputed)), None)


class _Recomputed:
    """The forward of one layer, checkpointed whenever gradients are asked for."""

    def __init__(self, forward: Callable[..., Any], dropout: bool, index: int, number: int, offload: Offload | None) -> None:
        self.inner = forward
        self.dropout = dropout
        self.place = index, number
        self.offload = offload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        with nullcontext() if self.offload is None else self.offload.hooks(args[0], *self.place):  # hidden states come first
            return checkpoint(self.inner, *args, use_reentrant=False, preserve_rng_state=self.dropout, **kwargs)
