"""Activation checkpointing by decoder layer: keep a layer's input, compute the rest again in the backward pass.

Done here with torch's own checkpoint, since transformers renames its switch between versions and knows only
all layers or none. Non-reentrant: a fault between forward and backward raises instead of giving a wrong gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from qlora_tui.engine.fast.offload import Offload


class Pass(Enum):
    """Which pass a layer is in: one that keeps, the first of two, or the second, of which only what is kept is wanted."""

    KEEP = 0
    FIRST = 1
    AGAIN = 2


class _Now(threading.local):
    """A layer is computed again by the thread that goes back, which is autograd's own on a card."""

    which = Pass.KEEP


_NOW = _Now()


def current_pass() -> Pass:
    """Return the pass of the layer that this thread computes."""
    return _NOW.which


@contextmanager
def _within(which: Pass) -> Iterator[None]:
    before, _NOW.which = _NOW.which, which
    try:
        yield
    finally:
        _NOW.which = before


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
            return checkpoint(self.inner, *args, use_reentrant=False, preserve_rng_state=self.dropout, context_fn=_passes, **kwargs)


def _passes() -> tuple[Any, Any]:
    return _within(Pass.FIRST), _within(Pass.AGAIN)
