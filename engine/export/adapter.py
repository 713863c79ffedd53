"""The adapter alone, in PEFT's layout: what transformers, vLLM and every other tool puts on the base."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from qlora_tui.engine.errors import Problem
from qlora_tui.engine.export.files import ADAPTER_FILES, copied, copy_tokenizer
from qlora_tui.engine.export.serving import prompts_of_folder, stops_of_folder, versions
from qlora_tui.engine.export.target import Served, Source, Target, Work
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import replace_file
from qlora_tui.engine.sizes import adapter_params
from qlora_tui.engine.spec import BUILTIN, RunConfig

_TOKENIZER_BYTES = 64 * 2**20


def write(work: Work) -> None:
    """Copy the adapter, each file proved by its SHA-256, and name the base that it belongs to."""
    source = work.source.adapter
    for done, name in enumerate(ADAPTER_FILES):
        work.look()
        copied(source / name, work.folder / name)
        work.note(done + 1, len(ADAPTER_FILES), "files")
    copy_tokenizer(source, work.folder)
    path = work.folder / ADAPTER_FILES[0]
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    replace_file(path, json.dumps({**said, "base_model_name_or_path": base_name(work.source)}, indent=2) + "\n")


def base_name(source: Source) -> str:
    """Return what others find the base by: the hub's id, or the folder that holds it here."""
    name = source.run.model_name_or_path
    return str(source.base.resolve()) if name.startswith(BUILTIN) or Path(name).is_dir() else name


def serve(work: Work) -> Served:
    """Let PEFT put it on the 16-bit base."""
    from qlora_tui.engine.export.engines import Plain

    plain = Plain(work, work.source.base, adapter=work.folder)
    stops, trained = stops_of_folder(work.folder) | stops_of_folder(work.source.base), work.rows.stop
    unnamed = trained is not None and trained not in stops
    told = "the base's files name another token than answers end with: whoever serves the adapter has to name it as a stop"
    return Served(
        engine=f"{versions('transformers', 'peft')}, {plain.words}",
        losses=plain.losses,
        prompts=prompts_of_folder(work.folder),
        stops=stops | ({trained} if trained is not None else set()),
        notes=(told,) if unnamed else (),
    )


def use(source: Source, out: Path, kind: str) -> str:
    """Say how vLLM serves the base with it; a server has to be told for which rank to make room."""
    del kind
    rank = int(json.loads((source.adapter / ADAPTER_FILES[0]).read_text(encoding="utf-8"))["r"])
    return shlex.join(("vllm", "serve", base_name(source), "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"tuned={out}"))


def problems(run: RunConfig, spec: ModelSpec, folder: Path, kind: str) -> list[Problem]:
    """Nothing stands in the way of a copy."""
    del run, spec, folder, kind
    return []


def disk(spec: ModelSpec, weights: int, kind: str) -> int:
    """Return a bound: an adapter of rank 64 on every layer, and a tokenizer."""
    del weights, kind
    return 4 * adapter_params(spec, RunConfig(lora_r=64)) + _TOKENIZER_BYTES


TARGET = Target(
    name="adapter",
    about="the adapter in PEFT's layout, a copy that was checked",
    problems=problems,
    disk=disk,
    write=write,
    serve=serve,
    use=use,
)
