"""The whole model in 16 bits with the adapter in its weights: for whatever serves a Hugging Face folder.

Merged from the original weights, never from the 4-bit ones that training read: those would bring their rounding along.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from qlora_tui.engine.errors import Problem
from qlora_tui.engine.export.files import copy_about, copy_tokenizer, stop_at
from qlora_tui.engine.export.serving import prompts_of_folder, stops_of_folder, versions
from qlora_tui.engine.export.target import Served, Source, Target, Work
from qlora_tui.engine.hub import INDEX, SINGLE, listed
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.spec import RunConfig

_BESIDE_BYTES = 64 * 2**20


def write(work: Work) -> None:
    """Write the merged model to the work's folder."""
    write_to(work, work.folder)


def write_to(work: Work, out: Path) -> None:
    """Write the merged model to `out`: weights shard by shard, and everything that belongs beside them."""
    from qlora_tui.engine.export.merge import merge

    base = work.source.base
    copy_tokenizer(work.source.adapter, out)
    copy_about(base, out)
    stop_at(out, work.rows.stop)
    merge(work.source.adapter, base, listed(base), out, lambda done, total: work.note(done, total, "bytes"), work.look)
    if (base / INDEX).is_file():
        (out / INDEX).write_bytes((base / INDEX).read_bytes())


def serve(work: Work) -> Served:
    """Let transformers load it as any other model."""
    from qlora_tui.engine.export.engines import Plain

    plain = Plain(work, work.folder)
    return Served(
        engine=f"{versions('transformers')}, {plain.words}",
        losses=plain.losses,
        prompts=prompts_of_folder(work.folder),
        stops=stops_of_folder(work.folder),
    )


def use(source: Source, out: Path, kind: str) -> str:
    """Say how vLLM serves it."""
    del source, kind
    return shlex.join(("vllm", "serve", str(out)))


def problems(run: RunConfig, spec: ModelSpec, folder: Path, kind: str) -> list[Problem]:
    """A base stored in 4 bits has no 16-bit weights to merge into."""
    del run, folder, kind
    if not spec.quantized:
        return []
    told = f"the checkpoint holds its weights in 4 bits ({spec.quantized}), so there are no 16-bit weights to merge into"
    return [Problem("export", told, "export the adapter, or train on the 16-bit original: it is quantized while loading")]


def disk(spec: ModelSpec, weights: int, kind: str) -> int:
    """Return the bytes of the base's weights: the merged ones have the same types."""
    del spec, kind
    return weights + _BESIDE_BYTES


def weights_bytes(base: Path, spec: ModelSpec) -> int:
    """Return the bytes of the base's weight files, or of 16-bit ones where they are still to be fetched."""
    names = listed(base) if (base / INDEX).is_file() or (base / SINGLE).is_file() else []
    here = [base / name for name in names]
    return sum(file.stat().st_size for file in here) if here and all(file.is_file() for file in here) else 2 * spec.params


TARGET = Target(
    name="merged",
    about="the whole model in 16 bits, for transformers and vLLM",
    problems=problems,
    disk=disk,
    write=write,
    serve=serve,
    use=use,
)
