"""The trained parameters as parts of one buffer, and their gradients as parts of another.

An adapter has hundreds of small tensors, and an optimizer that goes through them one by one keeps its host busy for longer
than the device works. Here tensors of one kind lie one after another, and the optimizer sees a single parameter for each
kind. The parameters themselves stay who they are: whoever trains, saves or measures them notices nothing.

Each tensor begins at a multiple of `BLOCK`, so a block of an 8-bit optimizer's state never holds numbers of two tensors, and
every number is what it would be if each tensor were updated alone. What lies between two tensors begins as zero, has a zero
gradient, and is read by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

BLOCK = 256
"""Numbers that share one constant in bitsandbytes' 8-bit states; 1,024 bytes, so that every part is aligned as a tensor of its own."""

Kind = TypeVar("Kind")


class Member(NamedTuple):
    """Where a parameter lies: the `number`-th of all, from the `start`-th number of its group on."""

    number: int
    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        """Return where the next one may begin."""
        return self.start + self.blocks * BLOCK

    @property
    def blocks(self) -> int:
        """Return the blocks that it takes, the last one perhaps in part."""
        return -(-self.shape.numel() // BLOCK)

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return its part of `whole`, which has a number for each of its group's, in its own shape."""
        return whole[self.start : self.start + self.shape.numel()].view(self.shape)

    def blocks_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return its part of `whole`, which has a number for each block of its group."""
        return whole[self.start // BLOCK : self.start // BLOCK + self.blocks]


@dataclass(frozen=True, slots=True)
class Group(Generic[Kind]):
    """Parameters of one kind, one after another: `parameter` is all of them, for an optimizer."""

    kind: Kind
    parameter: torch.nn.Parameter
    members: tuple[Member, ...]


class Flat(Generic[Kind]):
    """Parameters moved into one buffer, by kind, and a buffer of the same layout that is lent to them for their gradients."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], kinds: Sequence[Kind]) -> None:
        """Move `parameters` into one buffer, values and all; gradients take no memory before they are lent.

        Args:
            parameters: at least one, of one type and on one device.
            kinds: of each; those of one kind make a group, in the order in which kinds first appear.
        """
        self._parameters = list(parameters)
        first = self._parameters[0].data
        members: dict[Kind, list[Member]] = {kind: [] for kind in kinds}
        for number, (parameter, kind) in enumerate(zip(self._parameters, kinds, strict=True)):
            before = members[kind]
            members[kind].append(Member(number, before[-1].end if before else 0, parameter.shape))
        self._sizes = [group[-1].end for group in members.values()]
        parts = torch.zeros(sum(self._sizes), dtype=first.dtype, device=first.device).split(self._sizes)
        self.groups = [
            Group(kind, torch.nn.Parameter(part), tuple(group)) for (kind, group), part in zip(members.items(), parts, strict=True)
        ]
        for group in self.groups:
            for member in group.members:
                place = member.of(group.parameter.data)
                self._parameters[member.number].data = place.copy_(self._parameters[member.number].data)
        self._gradients = torch.empty(sum(self._sizes), dtype=first.dtype, device=first.device)
        self._empty = False
        self._places: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        for group, part in zip(self.groups, self._gradients.split(self._sizes), strict=True):
            self._places.append((group.parameter, part))
            self._places += [(self._parameters[member.number], member.of(part)) for member in group.members]
        self.release()

    @property
    def device(self) -> torch.device:
        """Return where they lie."""
        return self._parameters[0].device

    def empty(self) -> None:
        """Have the gradients' buffer, emptied, unless this step has it: enough for a recorded batch, which knows its place."""
        if self._empty:
            return
        storage = self._gradients.untyped_storage()
        if not storage.nbytes():
            storage.resize_(self._gradients.nbytes)
        self._gradients.zero_()
        self._empty = True

    def lend(self) -> None:
        """Give every parameter its part of the gradients' buffer, emptied, unless this step has done so."""
        if self.groups[0].parameter.grad is not None:
            return
        self.empty()
        for parameter, part in self._places:
            parameter.grad = part

    def clear(self) -> None:
        """Take the gradients back; their buffer stays where it is for the next step."""
        for parameter, _ in self._places:
            parameter.grad = None
        self._empty = False

    def release(self) -> None:
        """Take the gradients back and free their memory until they are lent again, perhaps elsewhere.

        Nothing may be left that writes to it, such as a recorded batch. All tensors stay who they are, without bytes.
        """
        self.clear()
        self._gradients.untyped_storage().resize_(0)

    def scale(self, factor: float) -> None:
        """Multiply every gradient by `factor`, in one operation."""
        self._gradients.mul_(factor)

    def finite(self) -> bool:
        """Say whether every gradient is a finite number; this waits for the device."""
        return bool(torch.isfinite(self._gradients).all())

    def strays(self) -> list[torch.nn.Parameter]:
        """Return the parameters whose values or gradients, which are lent now, lie elsewhere: no step of the optimizer reaches them."""
        size = self._parameters[0].element_size()
        found = [parameter for parameter, part in self._places if parameter.grad is not part]
        for group in self.groups:
            start = group.parameter.data_ptr()
            found += [
                self._parameters[member.number]
                for member in group.members
                if self._parameters[member.number].data_ptr() != start + member.start * size
            ]
        return found
