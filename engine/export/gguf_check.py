"""What a GGUF file says of itself, held against the tokenizer that trained: template, beginnings and ends.

The `gguf` library's reader makes an object of every token, which takes 40 s and a gigabyte where the vocabulary is
large. Only the few single values matter here, so the header is read past the lists.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

from qlora_tui.engine.data import Tokenizer
from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.text import one_line

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9
"""Types of values, from the GGUF specification (ggml/docs/gguf.md)."""
_MOST = 1 << 28  # bytes of one text; more is a damaged file


def settings(path: Path) -> dict[str, Any]:
    """Return the single values in the header of a GGUF file; of a list, only how long it is.

    Raises:
        ModelError: it is no GGUF file, or a damaged one.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF" or _number(file, "<I") not in (2, 3):
                raise ModelError("this is no GGUF file", where=one_line(path))
            _number(file, "<Q")  # how many tensors
            return {_text(file): _value(file, _number(file, "<I")) for _ in range(_number(file, "<Q"))}
    except (OSError, struct.error, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ModelError(f"the GGUF file cannot be read ({one_line(error, limit=200)})", where=one_line(path)) from None


def faults(path: Path, tokenizer: Tokenizer) -> list[str]:
    """Return a sentence for everything in which the file would render, begin or end a chat otherwise than in training.

    Raises:
        ModelError: as `settings`.
    """
    from qlora_tui.engine.export.gguf_vocabulary import stop_id

    found = settings(path)
    ends = {found.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    stop = stop_id(tokenizer)
    adds, begins = bool(found.get("tokenizer.ggml.add_bos_token")), bool(tokenizer.bos)
    template = str(found.get("tokenizer.chat_template") or "")
    checks = (
        (bool(template) or not tokenizer.template, "it has no chat template"),
        (not template or template == tokenizer.template, "its chat template is not the one that was trained"),
        (stop is None or stop in ends, f"it does not stop at {_shown(tokenizer, stop)}, with which the template ends an answer"),
        (
            tokenizer.eos_id is None or tokenizer.eos_id in ends,
            f"it does not stop at {_shown(tokenizer, tokenizer.eos_id)}, the end of a text",
        ),
        (adds == begins, f"it {'begins' if adds else 'does not begin'} a text with a token of its own"),
        (not begins or found.get("tokenizer.ggml.bos_token_id") == tokenizer.bos_id, f"it does not begin a text with {tokenizer.bos}"),
    )
    return [said for holds, said in checks if not holds]


def _shown(tokenizer: Tokenizer, index: int | None) -> str:
    return "" if index is None else one_line(tokenizer.token(index), limit=40)


def _value(file: IO[bytes], kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        return _number(file, _NUMBERS[kind])
    inner, length = _number(file, "<I"), _number(file, "<Q")
    if inner in (_TEXT, _LIST):
        for _ in range(length):
            _value(file, inner)
    else:
        file.seek(length * struct.calcsize(_NUMBERS[inner]), 1)
    return length


def _number(file: IO[bytes], form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _text(file: IO[bytes]) -> str:
    length = _number(file, "<Q")
    data = file.read(min(length, _MOST))
    if len(data) != length:
        raise OverflowError("a text is cut off")
    return data.decode()
