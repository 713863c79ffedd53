"""A run's tensors off its device and back, to the bit: what a pause does so that other programs get the memory.

It works on storages, the blocks of memory under the tensors: their bytes are copied away, then every block is shrunk to
nothing. All tensor objects stay who they are, with their views, owners and shared parts, so the model, the optimizer and
the fence notice nothing; a tensor that was overlooked would only keep its memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora_tui.engine.errors import CheckpointError, SpaceError
from qlora_tui.engine.fast.lora import fused
from qlora_tui.engine.load import Loaded, trainable
from qlora_tui.engine.machine import ram_bytes
from qlora_tui.engine.meter import empty_cache, out_of_memory
from qlora_tui.engine.places import discard
from qlora_tui.engine.shelf import SPARE_BYTES, free_bytes
from qlora_tui.engine.train.fence import BETWEEN, Fence
from qlora_tui.engine.units import gib

FOLDER = "paused"
"""In the run folder, and only while a pause lasts that RAM had no room for."""
PARKED_FROM = ("cuda",)
"""Kinds of device whose memory a pause frees; a CPU's is the RAM that it would go to."""
_SPARE_RAM_BYTES = 2 << 30
_PAGE_BYTES = 4096
_BYTES = "bytes"
_HINT = "the checkpoint of this step is good: resume from it"

Storage = torch.UntypedStorage


class Parked:
    """The storages of a run while it is paused: copied to RAM, or to files that are read back before anything is dropped."""

    def __init__(self, loaded: Loaded, optimizer: torch.optim.Optimizer, fence: Fence, folder: Path, *, free: bool = True) -> None:
        """Copy everything away, then free it; where neither RAM nor the disk has room, nothing was changed. Not `free`: do nothing.

        Raises:
            SpaceError: there is no room for it, or the disk gives back something else than what was written.
            FenceError: another thread than the owner, or a step is under way.
        """
        fence.check("a pause", BETWEEN)
        self._fence, self._device = fence, loaded.device
        self._small = [*trainable(loaded.model).values(), *_trained(optimizer), *_tensors(optimizer.state)]
        every = [*_of_model(loaded), *self._small]
        self._storages = _storages(every, loaded.device) if free and loaded.device.type in PARKED_FROM else {}
        self.bytes = sum(storage.nbytes() for storage in self._storages.values())
        self._held = _reserved(self._device)
        self._folder = folder / FOLDER
        self._sizes = {key: storage.nbytes() for key, storage in self._storages.items()}
        self._views = [(tensor, tensor.untyped_storage().data_ptr()) for tensor in self._small]
        self._ram: dict[int, torch.Tensor] = {}
        self._digests: dict[int, str] = {}
        self.on_disk = self.bytes > max(0, ram_bytes()[1] - _SPARE_RAM_BYTES)
        self._copy()
        for storage in self._storages.values():
            storage.resize_(0)
        for tensor in self._small:
            if _paged(tensor):
                _to_host(tensor)
        empty_cache(self._device)
        self.freed_bytes = max(0, self._held - _reserved(self._device)) or self.bytes

    def lacking(self) -> int:
        """Return how many bytes the device lacks of what this run held before the pause; 0 when it can go on."""
        if not self._storages:
            return 0
        return max(0, self._held - _reserved(self._device) - device_free_bytes(self._device))

    def back(self) -> bool:
        """Bring everything back to where it was; False, and nothing changed, when the device has no room for it.

        Raises:
            CheckpointError: a file is not what was written.
        """
        self._fence.check("the end of a pause", BETWEEN)
        if self.lacking() or not self._room():
            return False
        for key, storage in self._storages.items():
            _bytes_of(storage).copy_(self._copy_of(key))
        self._ram.clear()
        discard(self._folder)
        return True

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give the adapter and the optimizer's state their values in RAM for a moment, so that they can be saved."""
        before = [(tensor, tensor.data) for tensor in self._small]
        self.rescue()
        try:
            yield
        finally:
            for tensor, was in before:
                tensor.data = was

    def rescue(self) -> None:
        """Give the adapter and the optimizer's state their values in RAM for good: the run ends here, and they are saved once more."""
        self._fence.check("a save in a pause", BETWEEN)
        held = {key: self._copy_of(key).untyped_storage() for key in {key for _, key in self._views} & self._storages.keys()}
        for tensor, key in self._views:
            if key in held:
                place = tensor.storage_offset(), tensor.shape, tensor.stride()
                tensor.data = torch.empty(0, dtype=tensor.dtype).set_(held[key], *place)

    def drop(self) -> None:
        """Remove what lies on the disk: the run ends, and its checkpoint has all of it that counts."""
        discard(self._folder)

    def _copy(self) -> None:
        if not self.on_disk:
            self._ram = {key: _bytes_of(storage).to("cpu", copy=True) for key, storage in self._storages.items()}
            return
        free = free_bytes(self._folder.parent)
        if free < self.bytes + SPARE_BYTES:
            told = f"neither RAM ({gib(ram_bytes()[1])} free) nor the disk ({gib(free)}) has room for {gib(self.bytes)}"
            raise SpaceError(told)
        discard(self._folder)
        try:
            self._folder.mkdir(mode=0o700)
            for key, storage in self._storages.items():
                content = _bytes_of(storage).to("cpu", copy=True)
                save_file({_BYTES: content}, self._file(key))
                self._digests[key] = _digest(content)
                self._copy_of(key)
        except (OSError, SafetensorError, CheckpointError) as error:  # nothing was dropped yet: the run can stay where it is
            discard(self._folder)
            told = error.problem.message if isinstance(error, CheckpointError) else str(error)
            raise SpaceError(f"what is paused could not be written: {told}") from None

    def _copy_of(self, key: int) -> torch.Tensor:
        if key in self._ram:
            return self._ram[key]
        try:
            content: torch.Tensor = load_file(self._file(key))[_BYTES]
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"what was paused cannot be read: {error}", where=str(self._folder), hint=_HINT) from None
        if _digest(content) != self._digests[key]:
            raise CheckpointError("what was paused is not what was written", where=str(self._folder), hint=_HINT)
        return content

    def _file(self, key: int) -> Path:
        return self._folder / f"{key:x}.safetensors"

    def _room(self) -> bool:
        """Take the memory for everything, or give back what was got of it."""
        try:
            for key, storage in self._storages.items():
                storage.resize_(self._sizes[key])
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fault = True
        else:
            fault = False
        if fault:  # outside the `except` block: its exception holds frames
            for storage in self._storages.values():
                storage.resize_(0)
            empty_cache(self._device)
        return not fault


def device_free_bytes(device: torch.device) -> int:
    """Return what the device has free for anybody."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else ram_bytes()[1]


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _storages(tensors: Iterable[torch.Tensor], device: torch.device) -> dict[int, Storage]:
    """Return each storage on `device` that can be shrunk, once, by where it lies; a file that is mapped into memory cannot."""
    found: dict[int, Storage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == device.type and storage.nbytes() and storage.resizable() and not _paged(tensor):
            found[storage.data_ptr()] = storage
    return found


def _bytes_of(storage: Storage) -> torch.Tensor:
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return whole.set_(storage, 0, (storage.nbytes(),), (1,))


def _digest(content: torch.Tensor) -> str:
    return hashlib.sha256(content.numpy().data).hexdigest()


def _paged(tensor: torch.Tensor) -> bool:
    """Say whether bitsandbytes pages `tensor` between device and RAM: the driver moves it, nobody has to."""
    return bool(getattr(tensor, "is_paged", False))  # an attribute that bitsandbytes sets on its own tensors only


def _to_host(tensor: torch.Tensor) -> None:
    """Move a paged tensor's pages off the device, by reading a byte of each.

    bitsandbytes' own way (`prefetch_tensor(..., to_cpu=True)`) asks CUDA about device -1 and then ends the whole process.
    """
    _bytes_of(tensor.untyped_storage())[::_PAGE_BYTES].sum()


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _of_model(loaded: Loaded) -> Iterator[torch.Tensor]:
    """Yield every tensor of the model: parameters with their quantization, buffers, the head, and what fused layers keep."""
    for parameter in loaded.model.parameters():
        yield parameter
        yield from _tensors(vars(parameter))
    yield from loaded.model.buffers()
    yield from _tensors((loaded.head.weight_VH, loaded.head.bias_V))
    for _, layer in fused(loaded.model):
        yield from _tensors(vars(layer.forward))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors inside containers and quantization states."""
    match value:
        case torch.nn.Module():  # its own tensors are found by name
            return
        case torch.Tensor():
            yield value
        case Mapping():
            for part in value.values():
                yield from _tensors(part)
        case list() | tuple():
            for part in value:
                yield from _tensors(part)
        case QuantState():
            yield from _tensors(vars(value))
