"""Activation checkpointing by decoder layer: keep a layer's input, compute the rest again in the backward pass.

Done here with torch's own checkpoint, since transformers renames its switch between versions and knows only
all layers or none. Non-reentrant: a fault between forward and backward raises instead of giving a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recompute(layers: torch.nn.ModuleList, number: int, *, dropout: bool) -> None:
    """Make the first `number` layers recompute their inside; may be called again with another number.

    The first ones, since what they keep would lie in memory longest. Random numbers are replayed only where
    `dropout` draws any.
    """
    for index, layer in enumerate(layers):
        inner = layer.forward.inner if isinstance(layer.forward, _Recomputed) else layer.forward
        # on the instance, so that no other model of the class is touched
        layer.forward = _Recomputed(inner, dropout) if index < number else inner


def recomputed(layers: torch.nn.ModuleList) -> int:
    """Return how many of `layers` recompute their inside now."""
    return sum(isinstance(layer.forward, _Recomputed) for layer in layers)


class _Recomputed:
    """The forward of one layer, checkpointed whenever gradients are asked for."""

    def __init__(self, forward: Callable[..., Any], dropout: bool) -> None:
        self.inner = forward
        self.dropout = dropout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        return checkpoint(self.inner, *args, use_reentrant=False, preserve_rng_state=self.dropout, **kwargs)
