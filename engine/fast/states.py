"""An optimizer's state tensor by tensor, as checkpoints keep it, whatever tensors its steps put together.

A checkpoint does not depend on how parameters lie in memory: one that was written when each was updated alone is read like any
other. `members` of an optimizer's group (see `flat`) say which part of its one parameter belongs to which tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from qlora_tui.engine.errors import CheckpointError
from qlora_tui.engine.fast.flat import BLOCK, Member

_PER_NUMBER, _PER_BLOCK = ("exp_avg", "exp_avg_sq", "state1", "state2"), ("absmax1", "absmax2")  # the rest is one for all
_MAPS = {"state1": "qmap1", "state2": "qmap2"}
EIGHT = 8
"""Bits of a state, where it is not 32."""
_MOMENTS = 2  # of every optimizer that can be chosen


def split(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state's tensors by `number.name`, and what is no tensor beside them.

    bitsandbytes shares its quantization maps between parameters, and safetensors stores no shared memory, so every tensor
    is cloned on the way.
    """
    _wait()
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    states = [{name: _on_host(value) for name, value in optimizer.state.get(_only(group), {}).items()} for group in optimizer.param_groups]
    for member, at in _members(optimizer):
        for name, value in states[at].items():
            if isinstance(value, torch.Tensor):
                tensors[f"{member.number}.{name}"] = _part(name, value, member).clone()
            else:
                numbers.setdefault(str(member.number), {})[name] = value
    return tensors, {"numbers": numbers, "kind": type(optimizer).__name__}


def zeros(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return tensors as large as the state will be: what an optimizer that has not stepped yet would save."""
    kinds = [torch.uint8 if group["bits"] == EIGHT else torch.float32 for group in optimizer.param_groups]
    return {
        f"{member.number}.{moment}": torch.zeros(member.shape, dtype=kinds[at])
        for member, at in _members(optimizer)
        for moment in range(_MOMENTS)
    }


def check(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any], where: str) -> None:
    """Refuse a state of another kind, of other parameters or of other sizes.

    Raises:
        CheckpointError: what differs; nothing was changed.
    """
    if rest["kind"] != type(optimizer).__name__:
        raise CheckpointError(f"the checkpoint's optimizer is {rest['kind']}, this run's is {type(optimizer).__name__}", where=where)
    members = _members(optimizer)
    held = {int(name.split(".", 1)[0]) for name in tensors}
    if held and held != set(range(len(members))):
        told = f"the optimizer's state in the checkpoint is of {len(held)} tensors, and this run trains {len(members)}"
        raise CheckpointError(told, where=where)
    saved, numbers = _by_number(tensors), rest["numbers"]
    for group in optimizer.param_groups if held else ():
        first = group["members"][0].number
        for member in group["members"]:
            wrong = next(_misfits(group["bits"], member, saved[member.number], saved[first]), "")
            if not wrong and numbers.get(str(member.number)) != numbers.get(str(first)):
                wrong = f"step of tensor {member.number} is not that of tensor {first}"
            if wrong:
                raise CheckpointError(f"the optimizer's {wrong}", where=where)


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
    """Fill the optimizer's state with one that `check` let pass, in place of what its first step would make.

    bitsandbytes makes its state through `init_state` (paged where asked), so its tensors are made that way and filled:
    loading them as plain tensors would silently give up paging.
    """
    _wait()
    saved = _by_number(tensors)
    for at, group in enumerate(optimizer.param_groups):
        parameter, members = _only(group), group["members"]
        first = saved.get(members[0].number, {})
        if first and isinstance(optimizer, Optimizer8bit) and not optimizer.state.get(parameter):  # a paged buffer is never freed
            optimizer.init_state(group, parameter, at, 0)
        state = optimizer.state[parameter]
        for name, part in first.items():
            whole = part.clone()  # not a view of the file
            if name in _PER_NUMBER or name in _PER_BLOCK:
                # Between two tensors lies zero. In 8 bits that is a code of its own: another one would be a moment of the last block.
                zero = int(state[_MAPS[name]].abs().argmin()) if part.dtype == torch.uint8 else 0
                whole = _joined(name, members, [saved[member.number][name] for member in members], zero)
            if name in state:
                state[name].copy_(whole)
            else:
                state[name] = whole if name == "step" else whole.to(parameter.device)
        state.update(rest["numbers"].get(str(members[0].number), {}))


def _wait() -> None:
    """Let the device end what it was given: a paged state is read and written from the host, and no stream orders that."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _only(group: Mapping[str, Any]) -> torch.nn.Parameter:
    (parameter,) = group["params"]
    found: torch.nn.Parameter = parameter
    return found


def _members(optimizer: torch.optim.Optimizer) -> list[tuple[Member, int]]:
    """Return every member with the place of its group, in the order of their numbers."""
    return sorted((member, at) for at, group in enumerate(optimizer.param_groups) for member in group["members"])


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def _part(name: str, whole: torch.Tensor, member: Member) -> torch.Tensor:
    if name in _PER_NUMBER:
        return member.of(whole)
    return member.blocks_of(whole) if name in _PER_BLOCK else whole


def _joined(name: str, members: Sequence[Member], parts: Sequence[torch.Tensor], between: int) -> torch.Tensor:
    size = members[-1].end // (BLOCK if name in _PER_BLOCK else 1)
    whole = torch.full((size,), between, dtype=parts[0].dtype)
    for member, part in zip(members, parts, strict=True):
        _part(name, whole, member).copy_(part)
    return whole


def _by_number(tensors: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, part in tensors.items():
        number, name = key.split(".", 1)
        found.setdefault(int(number), {})[name] = part
    return found


def _misfits(bits: int, member: Member, parts: Mapping[str, torch.Tensor], first: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield what of `parts` is not as this run would make it; `first` is of a tensor of the same group."""
    number = f"of tensor {member.number}"
    if parts.keys() != first.keys():
        yield f"state {number} has other parts than that of the tensors beside it"
        return
    for name, part in parts.items():
        shape = member.shape if name in _PER_NUMBER else torch.Size([member.blocks]) if name in _PER_BLOCK else first[name].shape
        if part.shape != shape:
            yield f"{name} {number} has another shape than in this run"
        elif name in _PER_NUMBER and part.dtype != (torch.uint8 if bits == EIGHT else torch.float32):
            yield f"{name} {number} has another type than in this run"
        elif name not in (*_PER_NUMBER, *_PER_BLOCK) and not torch.equal(part, first[name]):
            yield f"{name} {number} is not that of the tensors beside it"
