"""llama.cpp as a second engine: what it says to a GGUF file, and its own tools where they are on this machine.

A file that only its writer has read proves nothing. llama-cpp-python holds the engine that people will run the file
with; it is an extra of its own because it is built from source. The engine ends its whole process at a file that it
dislikes, so it always works in a child.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine import child
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.errors import ConfigError, ModelError
from qlora_tui.engine.export.gguf import KINDS, published
from qlora_tui.engine.text import one_line

SMALLER = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_m", "q2_k")
"""What llama-quantize makes of an f16 file without measuring the model on text first."""

Stopping = Callable[[], bool]
Note = Callable[[int, int], object]


def never() -> bool:
    """Say that nobody asks to stop."""
    return False


def silent(_done: int, _total: int) -> None:
    """Tell nobody how far it is."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What llama.cpp made of a file: the mean loss of each row in nats a supervised token, and the ids of each text."""

    losses: list[float]
    tokens: list[list[int]]


@dataclass(frozen=True, slots=True)
class LlamaTools:
    """Programs of a llama.cpp on this machine; an empty path is one that is not there."""

    quantize: str = ""
    convert: str = ""


def available() -> str:
    """Return an empty text if llama.cpp can be asked here, else the sentence what to install."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return ""
    return "llama-cpp-python, which checks GGUF files, is not installed; pip install 'qlora-tui[llama]' builds it in some minutes"


def losses(gguf: Path, rows: Sequence[TokenRow], *, stopping: Stopping = never, note: Note = silent) -> list[float]:
    """Return the mean loss of each row in llama.cpp, in nats a supervised token; `note` counts the rows done.

    Raises:
        ModelError: llama.cpp cannot read the file, or is not there.
        Stopped: `stopping()` became true.
    """
    return ask(gguf, rows, (), stopping=stopping, note=note).losses


def tokenize(gguf: Path, text: str) -> list[int]:
    """Return the ids that llama.cpp reads in `text`: special tokens in it are read as such, none is added.

    Raises:
        ModelError: as `losses`.
    """
    return ask(gguf, (), (text,)).tokens[0]


def ask(gguf: Path, rows: Sequence[TokenRow], texts: Sequence[str], *, stopping: Stopping = never, note: Note = silent) -> Answers:
    """Return what llama.cpp says to rows and to texts; one child answers all, since loading costs the most.

    Raises:
        ModelError: as `losses`.
        Stopped: `stopping()` became true.
    """
    missing = available()
    if missing:
        raise ModelError(missing)
    with tempfile.TemporaryDirectory(prefix="qlora-tui-llama-") as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.jsonl"
        lines = [{"ids": list(row.input_ids), "trained": list(row.trained)} for row in rows]
        asked.write_text(json.dumps({"gguf": str(gguf.absolute()), "rows": lines, "texts": list(texts)}), encoding="utf-8")
        answered.touch()
        command = [sys.executable, "-P", "-m", "qlora_tui.engine.export.llama_child", str(asked), str(answered)]
        ended = child.run(
            command,
            doing="asking llama.cpp",
            stopping=stopping,
            watch=lambda: note(_lines(answered), len(rows)),
            env={"CUDA_VISIBLE_DEVICES": ""},
        )
        if ended.code != 0:
            raise ModelError(f"llama.cpp cannot use the file: {ended.last_words}", where=one_line(gguf))
        given: list[Any] = [json.loads(line) for line in answered.read_text(encoding="utf-8").splitlines()]
    note(len(rows), len(rows))
    return Answers([line["loss"] for line in given if "loss" in line], [line["tokens"] for line in given if "tokens" in line])


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def external() -> LlamaTools | None:
    """Return the tools of a llama.cpp on the PATH; None if there is neither the quantizer nor the converter."""
    convert = next((found for name in ("convert_hf_to_gguf.py", "convert-hf-to-gguf.py") if (found := shutil.which(name))), "")
    tools = LlamaTools(shutil.which("llama-quantize") or "", convert)
    return tools if tools.quantize or tools.convert else None


def convert(tools: LlamaTools, merged: Path, out: Path, kind: str, *, stopping: Stopping = never) -> int:
    """Let llama.cpp's own converter write a family that is not written here; returns the size of the file in bytes.

    Raises:
        ConfigError: `kind` is not one of `gguf.KINDS`.
        ModelError: the converter refuses the model, or is not there.
        SpaceError: the file cannot be written.
        Stopped: `stopping()` became true.
    """
    if kind not in KINDS:
        raise ConfigError(f"{one_line(kind, limit=40)!r} is not a kind that the converter writes", hint=f"one of {', '.join(KINDS)}")
    if not tools.convert:
        raise ModelError("llama.cpp's convert_hf_to_gguf.py is not on the PATH", hint="it lies in llama.cpp's source folder")
    with published(out) as partial:
        # Not with -P: the script finds its parts beside itself. It is the user's own program.
        command = [sys.executable, tools.convert, str(merged), "--outfile", str(partial), "--outtype", kind]
        _run(command, "llama.cpp's converter", merged, partial, stopping)
    return out.stat().st_size


def quantize(tools: LlamaTools, source: Path, out: Path, kind: str, *, stopping: Stopping = never) -> int:
    """Let llama-quantize make a smaller file of the f16 file `source`; returns its size in bytes.

    Raises:
        ConfigError: `kind` is not one of `SMALLER`.
        ModelError: llama-quantize fails, or is not there.
        SpaceError: the file cannot be written.
        Stopped: `stopping()` became true.
    """
    if kind not in SMALLER:
        raise ConfigError(f"{one_line(kind, limit=40)!r} is not a kind that llama-quantize makes here", hint=f"one of {', '.join(SMALLER)}")
    if not tools.quantize:
        raise ModelError("llama-quantize is not on the PATH", hint="it comes with llama.cpp")
    with published(out) as partial:
        _run([tools.quantize, str(source), str(partial), kind.upper()], "llama-quantize", source, partial, stopping)
    return out.stat().st_size


def _run(command: list[str], name: str, source: Path, made: Path, stopping: Stopping) -> None:
    ended = child.run(command, doing=f"waiting for {name}", stopping=stopping, env={"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    if ended.code != 0:
        raise ModelError(f"{name} failed: {ended.last_words}", where=one_line(source))
    if not made.is_file():
        raise ModelError(f"{name} reported success but wrote no file", where=one_line(source))
