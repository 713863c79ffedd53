"""One GGUF file: what llama.cpp, Ollama and LM Studio run. Made from a merged model, which is made first and goes away again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tui.engine.data import Chat, TokenRow, load_tokenizer
from qlora_tui.engine.errors import ModelError, Problem
from qlora_tui.engine.export import gguf, gguf_check, llama, merged, records
from qlora_tui.engine.export.serving import prompt_ids, prompt_text, prompt_texts, versions
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
    if work.kind not in llama.SMALLER:
        _written(work, model, out, work.kind)
        return
    whole = work.spare / "whole.gguf"
    _written(work, model, whole, F16)
    llama.quantize(_tools(), whole, out, work.kind, stopping=stopping(work))


def _written(work: Work, model: Path, out: Path, kind: str) -> None:
    """Write a family that is known here; for another, ask llama.cpp's own converter."""
    if gguf.supported(_config(model)):
        llama.convert(_tools(), model, out, kind, stopping=stopping(work))
        return

    def note(done: int, total: int) -> None:
        work.look()
        work.note(done, total, "tensors")

    gguf.write(model, out, kind, note)


def stopping(work: Work) -> Callable[[], bool]:
    """Return what child processes poll: it raises where the work is to end."""

    def asked_to_stop() -> bool:
        work.look()
        return False

    return asked_to_stop


def _tools() -> llama.LlamaTools:
    return llama.external() or llama.LlamaTools()


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the model is looked at elsewhere, and its fault is told there
        return {}
    return found if isinstance(found, dict) else {}


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
        prompts=_prompts(work, file, said),
        stops=stops_of(said),
        notes=notes(),
        faults=tuple(gguf_check.faults(file, load_tokenizer(work.source.adapter))),
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
    found = gguf_check.settings(file)
    return {name.split(".", 2)[-1].removeprefix("tokenizer."): value for name, value in found.items() if name.startswith("tokenizer.")}


def stops_of(said: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens at which llama.cpp ends an answer."""
    return frozenset(int(said[name]) for name in ("eos_token_id", "eot_token_id") if name in said)


def losses_of(work: Work, file: Path) -> Callable[[Sequence[TokenRow]], list[float]]:
    """Return what measures rows by the file."""
    if llama.available():
        from qlora_tui.engine.export.engines import Plain

        return Plain(work, file.parent, gguf=file.name).losses

    def losses(rows: Sequence[TokenRow]) -> list[float]:
        return llama.losses(file, rows, stopping=stopping(work), note=lambda done, total: work.note(done, total, "rows by the export"))

    return losses


def engine_of(work: Work) -> str:
    """Return what measures, in words."""
    return (
        f"{versions('transformers')} on its weights, {work.room.words}"
        if llama.available()
        else f"llama.cpp ({versions('llama-cpp-python')})"
    )


def notes() -> tuple[str, ...]:
    """Say what would prove it better."""
    missing = llama.available()
    return (f"only its weights, template and tokens were looked at, llama.cpp itself was not asked: {missing}",) if missing else ()


def ids_of(work: Work, file: Path, texts: Sequence[str | None]) -> list[list[int] | None]:
    """Return the tokens that the engine makes of each prompt, which begins with the first token of texts if there is one."""
    if llama.available():
        tokenizer = load_tokenizer(work.source.adapter)
        return [None if text is None else prompt_ids(tokenizer, text) for text in texts]
    given = [text for text in texts if text is not None]
    answers = iter(llama.ask(file, (), given, stopping=stopping(work)).tokens if given else [])
    return [None if text is None else next(answers) for text in texts]


def _prompts(work: Work, file: Path, said: Mapping[str, Any]) -> Callable[[Sequence[Chat]], list[list[int] | None]]:
    """Return what renders chats by the template in the file, as llama.cpp's server does."""
    tokenizer = load_tokenizer(work.source.adapter)
    tokenizer.template = str(said.get("chat_template") or "")
    return lambda chats: ids_of(work, file, prompt_texts(chats, lambda messages: prompt_text(tokenizer, messages)))


def use(source: Source, out: Path, kind: str) -> str:
    """Say how llama.cpp serves it."""
    return shlex.join(("llama-server", "--jinja", "-m", str(out / file_name(source, kind))))


def problems(run: RunConfig, spec: ModelSpec, folder: Path, kind: str) -> list[Problem]:
    """Return what stands in the way: no 16-bit weights, or a family or type that is not written here and for which no tool is."""
    found = merged.problems(run, spec, folder, kind)
    tools = _tools()
    if kind in llama.SMALLER and not tools.quantize:
        found.append(
            Problem("export", f"{kind} is made by llama-quantize, which is not on the PATH", "it comes with llama.cpp; or say q8_0")
        )
    config = _config(folder)
    if not found and config and not tools.convert and (sentence := gguf.supported(config)):
        hint = "export merged; or put llama.cpp's own convert_hf_to_gguf.py on the PATH, which may know it"
        found.append(Problem("export", sentence, hint))
    return found


def disk(spec: ModelSpec, weights: int, kind: str) -> int:
    """Return the bytes of the file and of the merged model that it is made from."""
    scratch = spec.params * 2 if kind in llama.SMALLER else 0
    return merged.disk(spec, weights, kind) + int(spec.params * _BITS.get(kind, _BITS[Q8_0]) / 8) + scratch


TARGET = Target(
    name="gguf",
    about="one file for llama.cpp, Ollama and LM Studio",
    kinds=(*gguf.KINDS, *llama.SMALLER),
    problems=problems,
    disk=disk,
    write=write,
    serve=serve,
    use=use,
)
