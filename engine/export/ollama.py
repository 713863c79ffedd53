"""A GGUF file with the Modelfile that Ollama makes a model of: the template that was trained, and where answers end."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tui.engine.data import Chat, Tokenizer, load_tokenizer
from qlora_tui.engine.errors import EngineError, ModelError, Problem
from qlora_tui.engine.export import as_gguf, gguf_check, gotemplate, records
from qlora_tui.engine.export.gorender import render
from qlora_tui.engine.export.serving import first_token, prompt_texts
from qlora_tui.engine.export.target import Served, Source, Target, Work
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import replace_file
from qlora_tui.engine.runs import slug
from qlora_tui.engine.spec import RunConfig

MODELFILE = "Modelfile"
_QUOTES = '"""'
_TEMPLATE = re.compile(r'^TEMPLATE """(.*?)"""$', re.DOTALL | re.MULTILINE)
_STOP = re.compile(r'^PARAMETER stop "(.*)"$', re.MULTILINE)


def write(work: Work) -> None:
    """Write the GGUF file, or take the one that was exported and proved, and the Modelfile beside it."""
    file = work.folder / as_gguf.file_name(work.source, work.kind)
    known = records.proved(work.source, as_gguf.TARGET.name, work.kind)
    if known is None:
        as_gguf.write_to(work, file)
    else:
        _linked(known / file.name, file)
    tokenizer = load_tokenizer(work.source.adapter)
    template = gotemplate.translate(tokenizer, adds_bos=bool(as_gguf.header(file).get("add_bos_token")))
    stops = {work.rows.stop} if work.rows.stop is not None else set()
    replace_file(work.folder / MODELFILE, modelfile(file.name, template, [tokenizer.token(stop) for stop in stops]))


def modelfile(file: str, template: str, stops: list[str]) -> str:
    """Return the text of a Modelfile.

    Raises:
        ModelError: the template holds three quotes, which end it there.
    """
    if _QUOTES in template:
        raise ModelError("its chat template holds three quotes, which a Modelfile cannot", hint="export gguf")
    lines = [f"FROM ./{file}", f"TEMPLATE {_QUOTES}{template}{_QUOTES}", *(f'PARAMETER stop "{stop}"' for stop in stops)]
    return "\n".join(lines) + "\n"


def _linked(source: Path, out: Path) -> None:
    """Give a file a second name, or copy it where the disk has no such names."""
    try:
        os.link(source, out)
    except OSError:
        shutil.copyfile(source, out)


def serve(work: Work) -> Served:
    """Read the Modelfile as Ollama does; llama.cpp, which Ollama runs as well, runs the file."""
    text = (work.folder / MODELFILE).read_text(encoding="utf-8")
    file = work.folder / _said(re.search(r"^FROM \./(.+)$", text, re.MULTILINE), "FROM")
    template = _said(_TEMPLATE.search(text), "TEMPLATE")
    said = as_gguf.header(file)
    tokenizer = load_tokenizer(work.source.adapter)
    stops = {tokenizer.added[token] for token in _STOP.findall(text) if token in tokenizer.added}
    return Served(
        engine=as_gguf.engine_of(work),
        losses=as_gguf.losses_of(work, file),
        prompts=_prompts(work, file, template, tokenizer, said),
        stops=frozenset(stops),
        notes=as_gguf.notes(),
        faults=tuple(gguf_check.faults(file, tokenizer)),
    )


def _said(match: re.Match[str] | None, word: str) -> str:
    if match is None:
        raise ModelError(f"the Modelfile has no {word}")
    return match[1]


def _prompts(
    work: Work, file: Path, template: str, tokenizer: Tokenizer, said: Mapping[str, Any]
) -> Callable[[Sequence[Chat]], list[list[int] | None]]:
    beginning = first_token(tokenizer) if said.get("add_bos_token") else ""
    return lambda chats: as_gguf.ids_of(work, file, prompt_texts(chats, lambda messages: beginning + render(template, messages)))


def use(source: Source, out: Path, kind: str) -> str:
    """Say how Ollama takes it in and runs it."""
    del kind
    name = slug(source.folder.name)
    return f"ollama create {name} -f {shlex.quote(str(out / MODELFILE))} && ollama run {name}"


def problems(run: RunConfig, spec: ModelSpec, folder: Path, kind: str) -> list[Problem]:
    """Return what stands in the way of the GGUF file, and a template that cannot be put into Ollama's language."""
    found = as_gguf.problems(run, spec, folder, kind)
    if found or not (folder / "tokenizer.json").is_file():  # the demo's comes with its weights, and can be
        return found
    try:
        tokenizer = load_tokenizer(folder, run.chat_template)
        gotemplate.translate(tokenizer, adds_bos=bool(tokenizer.bos))
    except EngineError as error:
        found.append(Problem("export", error.problem.message, error.problem.hint))
    return found


TARGET = Target(
    name="ollama",
    about="a GGUF file with the Modelfile for Ollama: template and stop tokens as trained",
    kinds=as_gguf.TARGET.kinds,
    problems=problems,
    disk=as_gguf.disk,
    write=write,
    serve=serve,
    use=use,
)
