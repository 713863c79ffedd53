"""One GGUF file: what llama.cpp, Ollama and LM Studio run. Made from a merged model, which is made first and goes away again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tui.engine.data import Chat, TokenRow, load_tokenizer
from qlora_tui.engine.errors import ModelError, Problem
from qlora_tui.engine.export import gguf, llama, merged, records
from qlora_tui.engine.export.serving import asked, prompt_ids, prompt_text, versions
from qlora_tui.engine.export.target import F16, Q8_0, Served, Source, Target, Work
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.runs import slug
from qlora_tui.engine.spec import BUILTIN, RunConfig

_BITS = {F16: 16.0, Q8_0: 8.5}


def write(work: Work) -> None:
    """Write the file to the work's folder."""
    write_to(work, work.folder / file_name(work.source, work.kind))


def write_to(work: Work, out: Path) -> None:
    """Write the file `out`, from the merged model of this run if that was exported and proved, else from one made for it."""
    model = records.proved(work.source, merged.TARGET.name)
    if model is None:
        model = work.spare / "merged"
        model.mkdir()
        merged.write_to(work, model)

    def note(done: int, total: int) -> None:
        work.look()
        work.note(done, total, "tensors")

    gguf.write(model, out, work.kind, note)


def file_name(source: Source, kind: str) -> str:
    """Return the name of the file, such as `qwen3-8b-tuned-q8_0.gguf`."""
    return f"{slug(source.run.model_name_or_path.removeprefix(BUILTIN))}-tuned-{kind}.gguf"


def serve(work: Work) -> Served:
    """Let llama.cpp run it; where that is not installed, let transformers read the file back."""
    file = only(work.folder)
    said = header(file)
    return Served(
        engine=engine_of(work),
        losses=losses_of(work, file),
        prompt=_prompt(work, file, said),
        stops=stops_of(said),
        notes=notes(),
    )


def only(folder: Path) -> Path:
    """Return the one GGUF file of a folder.

    Raises:
        ModelError: there is none.
    """
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise ModelError("there is no GGUF file in it", where=str(folder))
    return found[0]


def header(file: Path) -> Mapping[str, Any]:
    """Return what a GGUF file says of its tokens: `eos_token_id`, `eot_token_id`, `add_bos_token`, `chat_template` where it has them."""
    from gguf import GGUFReader

    fields = GGUFReader(str(file)).fields
    names = ("eos_token_id", "eot_token_id", "bos_token_id", "add_bos_token")
    found = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in names if f"tokenizer.ggml.{name}" in fields}
    if "tokenizer.chat_template" in fields:
        found["chat_template"] = fields["tokenizer.chat_template"].contents()
    return found


def stops_of(said: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens at which llama.cpp ends an answer."""
    return frozenset(int(said[name]) for name in ("eos_token_id", "eot_token_id") if name in said)


def losses_of(work: Work, file: Path) -> Callable[[Sequence[TokenRow]], list[float]]:
    """Return what measures rows by the file."""
    if llama.available():
        from qlora_tui.engine.export.engines import Plain

        return Plain(work, file.parent, gguf=file.name).losses

    def losses(rows: Sequence[TokenRow]) -> list[float]:
        found: list[float] = []
        for row in rows:
            work.look()
            found += llama.losses(file, [row])
            work.note(len(found), len(rows), "rows by the export")
        return found

    return losses


def engine_of(work: Work) -> str:
    """Return what measures, in words."""
    return (
        f"{versions('transformers')} reading the file, {work.room.words}"
        if llama.available()
        else f"llama.cpp ({versions('llama-cpp-python')})"
    )


def notes() -> tuple[str, ...]:
    """Say what would prove it better."""
    missing = llama.available()
    return (f"llama.cpp itself was not asked: {missing}",) if missing else ()


def ids_of(work: Work, file: Path, text: str) -> list[int]:
    """Return the tokens that the engine makes of a prompt that begins with its first token, if it has one."""
    if llama.available():
        return prompt_ids(load_tokenizer(work.source.adapter), text)
    return llama.tokenize(file, text)


def _prompt(work: Work, file: Path, said: Mapping[str, Any]) -> Callable[[Chat], list[int] | None]:
    """Return what renders a chat by the template in the file, as llama.cpp's server does."""
    tokenizer = load_tokenizer(work.source.adapter)
    tokenizer.template = str(said.get("chat_template") or "")

    def prompt(chat: Chat) -> list[int] | None:
        messages = asked(chat)
        text = None if messages is None else prompt_text(tokenizer, messages)
        return None if text is None else ids_of(work, file, text)

    return prompt


def use(source: Source, out: Path) -> str:
    """Say how llama.cpp chats with it."""
    del source
    return f"llama-server --jinja -m {only(out)}"


def problems(run: RunConfig, spec: ModelSpec, folder: Path) -> list[Problem]:
    """Return what stands in the way: no 16-bit weights, or a family that is not written."""
    found = merged.problems(run, spec, folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the model is looked at elsewhere, and its fault is told there
        return found
    if not found and (sentence := gguf.supported(config)):
        found.append(Problem("export", sentence, "export merged; llama.cpp's own convert_hf_to_gguf.py may know it"))
    return found


def disk(spec: ModelSpec, weights: int, kind: str) -> int:
    """Return the bytes of the file and of the merged model that it is made from."""
    return merged.disk(spec, weights, kind) + int(spec.params * _BITS[kind] / 8)


TARGET = Target(
    name="gguf",
    about="one file for llama.cpp, Ollama and LM Studio",
    kinds=gguf.KINDS,
    problems=problems,
    disk=disk,
    write=write,
    serve=serve,
    use=use,
)
