"""How many bytes of tensors are alive while a piece of code runs, exact to the byte and without a GPU.

Every operation that PyTorch dispatches is seen, forward and backward, and every storage that it makes counts
from then until it is freed. That is what CUDA's allocator calls "allocated", up to its rounding: a budget
can be held against it on any machine. What a kernel keeps inside itself (cuBLAS, a flash kernel's backward)
is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is entered; `peak` is the most that lived at once.

    `names` tells which operation made what was alive at the peak, as (operation, shape, type): bytes.
    """

    def __init__(self, before: Iterable[torch.Tensor] = ()) -> None:
        """Remember what is alive already, such as a model's weights, as `held`."""
        super().__init__()
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self.held = self.now = 0
        for tensor in before:
            self._see(tensor, "before")
        self.held = self.peak = self.now
        self._at_peak: dict[str, int] = {}
        self.detail = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and look at what came out."""
        out = func(*args, **(kwargs or {}))
        grown = False
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                grown |= self._see(leaf, str(func))
        if grown and self.now > self.peak:
            self.peak = self.now
            if self.detail:
                self._at_peak = self._listed()
        return out

    def reset(self) -> None:
        """Begin a new measurement: the peak is what is alive now."""
        self.peak = self.now

    @property
    def names(self) -> dict[str, int]:
        """Bytes alive at the peak by what made them, the largest first; filled where `detail` was set."""
        return dict(sorted(self._at_peak.items(), key=lambda item: -item[1]))

    def _see(self, tensor: torch.Tensor, maker: str) -> bool:
        if tensor.device.type == "meta":  # a shape without memory, as loaders make first
            return False
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = storage.nbytes()
        label = f"{maker} {tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
        self._known[key] = (weakref.ref(storage, lambda _: self._gone(key)), size, label)
        self.now += size
        return True

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)[1]

    def _listed(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for _, size, label in self._known.values():
            if not label.startswith("before"):
                found[label] = found.get(label, 0) + size
        return found
