"""Activation checkpointing by decoder layer: keep a layer's input, compute the rest again in the backward pass.

Done here with torch's own checkpoint, since transformers renames its switch between versions and knows only
all layers or none. Non-reentrant: a fault between forward and backward raises instead of giving a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recompute(layers: torch.nn.ModuleList, *, dropout: bool) -> None:
    """Make every layer of `layers` recompute its inside; random numbers are replayed only where `dropout` draws any."""
    for layer in layers:
        layer.forward = _Recomputed(layer.forward, dropout)  # on the instance, so no other model of the class is touched


class _Recomputed:
    """The forward of one layer, checkpointed whenever gradients are asked for."""

    def __init__(self, forward: Callable[..., Any], dropout: bool) -> None:
        self._forward = forward
        self._dropout = dropout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=self._dropout, **kwargs)
