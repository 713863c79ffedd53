"""An adapter folded into the weights it was trained on: one tensor at a time, out of the original files into new ones.

The new file has the header of the old one, byte for byte: every tensor keeps its name, type, shape and place. So what is
untouched is copied as bytes, whatever it is, and memory holds no more than one tensor, in float32 and in its own type.

Source: LoRA (Hu et al., 2021), equation 3: W + scaling * B A. DoRA (Liu et al., 2024), equation 5: the rows of that sum are
given the lengths that were trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlora_tui.engine.errors import CheckpointError, ModelError
from qlora_tui.engine.text import one_line

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PART = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?")
_TEXT_BEFORE_LAYERS = ("model.", "language_model.model.", "model.language_model.", "language_model.")
_BLOCK = 1 << 24
_LONGEST_HEADER = 100_000_000  # as the format says


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one linear layer: scaling * B [O, R] A [R, I], and DoRA's lengths of the rows [O] or None."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    lengths: torch.Tensor | None = None

    def onto(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return the merged weight in float32."""
        merged = torch.addmm(weight_OI.float(), self.b, self.a, alpha=self.scaling)
        if self.lengths is not None:
            merged *= (self.lengths / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged


def read_adapter(folder: Path) -> dict[str, Delta]:
    """Return what the adapter in `folder` adds, by the name of the linear layer.

    Raises:
        CheckpointError: it cannot be read, is no plain LoRA, or holds numbers that are not finite.
    """
    try:
        said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        rank, alpha = int(said["r"]), float(said["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError("the adapter cannot be read", where=str(folder), hint=f"{type(error).__name__}") from error
    if said.get("rank_pattern") or said.get("alpha_pattern") or said.get("fan_in_fan_out"):
        raise CheckpointError("the adapter has layers of different kinds, which no run here makes", where=str(folder))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match is None or not bool(torch.isfinite(tensor).all()):
            why = "is of a kind that is not merged here" if match is None else "holds numbers that are not finite"
            raise CheckpointError(f"{one_line(name)} {why}", where=str(folder))
        found.setdefault(match["module"], {})[match["part"]] = tensor.float()
    scaling = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
    return {module: Delta(parts["lora_A"], parts["lora_B"], scaling, parts.get("lora_magnitude_vector")) for module, parts in found.items()}


def merge(adapter: Path, base: Path, shards: list[str], out: Path, note: Callable[[int, int], None], look: Callable[[], None]) -> int:
    """Write the weight files `shards` of `base` to `out` with the adapter in them; return how many layers were merged.

    `note` gets bytes done and bytes in all; `look` is called between tensors, and may raise to end it.

    Raises:
        CheckpointError: the adapter cannot be read.
        ModelError: the base has no 16-bit weights for a layer of the adapter, or the merged weight does not fit its type.
        OSError: the disk is full.
    """
    deltas = read_adapter(adapter)
    headers = {name: _header(base / name) for name in shards}
    places = _places(deltas, [tensor for _, header in headers.values() for tensor in header], str(base))
    done, total = 0, sum((base / name).stat().st_size for name in shards)
    for name in shards:
        with (base / name).open("rb") as source, (out / name).open("wb") as sink:
            for size in _written(source, sink, *headers[name], places, look):
                done += size
                note(done, total)
    return len(places)


def _written(
    source: IO[bytes], sink: IO[bytes], length: int, header: dict[str, Any], places: Mapping[str, Delta], look: Callable[[], None]
) -> Iterator[int]:
    """Write one file, tensor by tensor, and yield the bytes of each part."""
    sink.write(source.read(length))
    yield length
    for tensor, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        look()
        size = about["data_offsets"][1] - about["data_offsets"][0]
        if tensor in places:
            sink.write(_merged(source.read(size), about, places[tensor], tensor))
        else:
            _copy(source, sink, size, look)
        yield size


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return how many bytes come before the tensors of a safetensors file, and what it says of each tensor."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header: dict[str, Any] = json.loads(handle.read(min(size, _LONGEST_HEADER)))
    header.pop("__metadata__", None)
    return 8 + size, header


def _places(deltas: Mapping[str, Delta], tensors: list[str], where: str) -> dict[str, Delta]:
    """Return the adapter's parts by the tensor that each belongs to.

    Names in files are not always those of the loaded model: the text part of one that also sees has been renamed since. So
    where the name itself is missing, the layer of the same number and name in the text part is taken, if there is just one.
    """
    known = set(tensors)
    by_tail: dict[str, list[str]] = {}
    for name in tensors:
        before, layers, tail = name.partition("layers.")
        if layers and before in _TEXT_BEFORE_LAYERS:
            by_tail.setdefault(tail, []).append(name)
    found: dict[str, Delta] = {}
    for module, delta in deltas.items():
        name = f"{module}.weight"
        alike = [name] if name in known else by_tail.get(name.partition("layers.")[2], [])
        if len(alike) != 1 or alike[0] in found:
            raise ModelError(
                f"the base has no weights for the adapter's layer {one_line(module)}",
                where=where,
                hint="the adapter belongs to another model, or to another version of it",
            )
        found[alike[0]] = delta
    return found


def _merged(raw: bytes, about: Mapping[str, Any], delta: Delta, name: str) -> bytes:
    kind = _TYPES.get(about["dtype"])
    if kind is None:
        raise ModelError(
            f"{one_line(name)} is stored as {one_line(about['dtype'])}: there are no 16-bit weights to merge into",
            hint="export the adapter, or train on the 16-bit original: it is quantized while loading",
        )
    weight = torch.frombuffer(bytearray(raw), dtype=kind).view(about["shape"])
    if weight.shape != (len(delta.b), delta.a.shape[1]):
        raise ModelError(f"{one_line(name)} has another shape than the adapter's layer", hint="the adapter belongs to another model")
    merged = delta.onto(weight).to(kind)
    if not bool(torch.isfinite(merged).all()):
        raise ModelError(f"merged, {one_line(name)} holds numbers that {about['dtype']} cannot", hint="export the adapter instead")
    return merged.contiguous().view(torch.uint8).numpy().tobytes()


def _copy(source: IO[bytes], sink: IO[bytes], size: int, look: Callable[[], None]) -> None:
    for block in _blocks(size):
        look()
        sink.write(source.read(block))


def _blocks(size: int) -> Iterator[int]:
    while size > 0:
        yield min(size, _BLOCK)
        size -= _BLOCK
