"""The child in which llama.cpp reads a GGUF file and answers, line by line; see `llama`.

It works on the CPU with keys and values of 32 bits, so that what differs from the original comes from the file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_PIECE = 64
"""Tokens decoded at once; their logits are what memory holds beside the model: 67 MB for the largest vocabularies."""
_F32 = 0  # GGML_TYPE_F32


def answer(asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the loss of every row and the tokens of every text, in this order.

    Raises:
        ValueError: llama.cpp cannot read the file, or stops at a row.
    """
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.vocab_only = not asked["rows"]
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(asked["gguf"].encode(), settings)
    if not model:
        raise ValueError("llama.cpp did not load the file")
    vocab = llama_cpp.llama_model_get_vocab(model)
    if asked["rows"]:
        yield from _losses(model, llama_cpp.llama_vocab_n_tokens(vocab), asked["rows"])
    for text in asked["texts"]:
        yield {"tokens": _tokens(vocab, text.encode())}


def _losses(model: Any, width: int, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, float]]:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = max(len(row["ids"]) for row in rows)
    settings.n_batch = settings.n_ubatch = _PIECE
    settings.type_k = settings.type_v = _F32
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise ValueError("llama.cpp has no memory for the longest row")
    batch = llama_cpp.llama_batch_init(_PIECE, 0, 1)
    for row in rows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        found = [loss for start in range(0, len(row["ids"]) - 1, _PIECE) for loss in _piece(context, batch, width, row, start)]
        yield {"loss": sum(found) / len(found) if found else float("nan")}


def _piece(context: Any, batch: Any, width: int, row: Mapping[str, Any], start: int) -> list[float]:
    """Return the losses of the trained tokens that are predicted from the positions of one piece."""
    ids, trained = row["ids"], row["trained"]
    stop = min(start + _PIECE, len(ids) - 1)  # the last token predicts nothing that is known
    batch.n_tokens = stop - start
    for index in range(stop - start):
        batch.token[index], batch.pos[index] = ids[start + index], start + index
        batch.seq_id[index][0], batch.n_seq_id[index], batch.logits[index] = 0, 1, 1
    if llama_cpp.llama_decode(context, batch) != 0:
        raise ValueError("llama.cpp stopped at a row")
    logits_TV = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(stop - start, width))
    chosen = [index for index in range(stop - start) if trained[start + index + 1]]
    return [_loss(logits_TV[index].astype(np.float64), ids[start + index + 1]) for index in chosen]


def _loss(logits_V: np.ndarray[Any, Any], label: int) -> float:
    largest = logits_V.max()
    return float(largest + np.log(np.exp(logits_V - largest).sum()) - logits_V[label])


def _tokens(vocab: Any, text: bytes) -> list[int]:
    room = len(text) + 8
    found = (llama_cpp.llama_token * room)()
    number = llama_cpp.llama_tokenize(vocab, text, len(text), found, room, False, True)
    if number < 0:
        raise ValueError("llama.cpp reads more tokens than bytes")
    return list(found[:number])


def main(asked: Path, answered: Path) -> int:
    """Answer what is asked in one file in the other, a line as soon as it is known; return the exit code.

    No traceback is printed: llama.cpp has said before what it dislikes, and the parent shows the last line of an error.
    """
    try:
        with answered.open("w", encoding="utf-8") as out:
            for line in answer(json.loads(asked.read_text(encoding="utf-8"))):
                out.write(json.dumps(line) + "\n")
                out.flush()
    except ValueError as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
