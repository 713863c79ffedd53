"""The tokenizer inside a GGUF file: tokens with their kinds, how text is cut, what starts and ends a text, the template.

llama.cpp has no rules of a tokenizer file; it has two algorithms. One merges bytes after cutting text by a pattern
that it knows under a name, the other (SentencePiece) merges characters by the score of what comes out. Which name a
tokenizer has is found by watching it cut: the same pieces as a known pattern on a text full of hard cases. A tokenizer
that cuts, normalizes or merges in a way of its own is refused, because its file would read other tokens than were trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer as Backend

from qlora_tui.engine.data import Tokenizer
from qlora_tui.engine.data.template import Template
from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.export.gguf_cuts import PROBE, cut, known_cuts
from qlora_tui.engine.text import one_line

_SPACE = "\u2581"  # SentencePiece's visible space
_BYTES = tuple(f"<0x{number:02X}>" for number in range(256))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens in the order of their ids with their kinds, and what the algorithm of llama.cpp named `model` needs beside."""

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    space_prefix: bool = False


def add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
    """Write the vocabulary padded to the rows of the embedding, the special tokens and the chat template.

    Raises:
        ModelError: the tokenizer works in a way that llama.cpp does not know, or has more tokens than the embedding.
    """
    vocabulary = read_vocabulary(tokenizer, int(facts["vocab_size"]))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    _add_specials(writer, tokenizer, facts, vocabulary)
    if tokenizer.template:
        writer.add_chat_template(tokenizer.template)


def _add_specials(writer: GGUFWriter, tokenizer: Tokenizer, facts: Mapping[str, Any], vocabulary: Vocabulary) -> None:
    """Write the tokens that begin and end a text, and the one with which the template ends an answer."""
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else facts.get("bos_token_id")
    if isinstance(bos, int) and bos < len(vocabulary.tokens):
        writer.add_bos_token_id(bos)
    eos = tokenizer.eos_id if tokenizer.eos_id is not None else min(tokenizer.stop_ids(), default=None)
    if eos is not None:
        writer.add_eos_token_id(eos)
    stop = stop_id(tokenizer)
    if stop is not None:
        writer.add_eot_token_id(stop)
    if tokenizer.pad_id != tokenizer.eos_id:
        writer.add_pad_token_id(tokenizer.pad_id)
    if TokenType.UNKNOWN in vocabulary.kinds:
        writer.add_unk_token_id(vocabulary.kinds.index(TokenType.UNKNOWN))
    writer.add_add_bos_token(bool(tokenizer.bos))
    writer.add_add_eos_token(False)


def stop_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token with which the chat template ends an answer; None if it ends it with none."""
    closing = Template(tokenizer).closing if tokenizer.template else tokenizer.eos
    ends = [token for token in tokenizer.added if token and closing.endswith(token)]
    return tokenizer.added[max(ends, key=len)] if ends else None


def read_vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """Return the vocabulary of `tokenizer` with unused tokens up to `rows`.

    Raises:
        ModelError: as `add_vocabulary`.
    """
    text = tokenizer.as_json()
    rules = json.loads(text)
    model = rules["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise _refused(f"of the kind {one_line(model.get('type'), limit=40)}")
    tokens, kinds = _tokens(rules, rows)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    backend = Backend.from_str(text)
    if model.get("byte_fallback"):
        return _by_score(tokenizer, backend, tokens, kinds, model["vocab"], merges)
    if any(" " in part for merge in merges for part in merge):
        raise _refused("with spaces inside its merges")
    return Vocabulary("gpt2", _name_of_cut(backend, model), tokens, kinds, merges=[" ".join(merge) for merge in merges])


def _tokens(rules: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return text and kind of every id. An added token is matched in the text as it is written, so its spaces are spaces."""
    model, added = rules["model"], rules["added_tokens"]
    unknown, fallback = model.get("unk_token"), bool(model.get("byte_fallback"))
    found: dict[int, tuple[str, int]] = {}
    for token, index in model["vocab"].items():
        kind = TokenType.BYTE if fallback and token in _BYTES else TokenType.UNKNOWN if token == unknown and fallback else TokenType.NORMAL
        found[index] = (token, kind)
    for token in added:
        if found.get(token["id"], ("", 0))[1] == TokenType.UNKNOWN:
            continue
        if token["special"]:
            found[token["id"]] = (token["content"], TokenType.CONTROL)
        else:
            found[token["id"]] = (token["content"].replace(_SPACE, " ") if fallback else token["content"], TokenType.USER_DEFINED)
    if max(found) >= rows:
        raise ModelError(f"the tokenizer has {max(found) + 1} tokens and the model {rows} embeddings")
    every = [found.get(index) or (f"[PAD{index}]", TokenType.UNUSED) for index in range(rows)]
    if len({token for token, _ in every}) != rows:
        raise _refused("with two tokens of the same text")
    return [token for token, _ in every], [int(kind) for _, kind in every]


def _name_of_cut(backend: Any, model: Mapping[str, Any]) -> str:
    """Return the name under which llama.cpp knows how this tokenizer cuts text before it merges bytes."""
    normal = backend.normalizer.normalize_str(PROBE) if backend.normalizer else PROBE
    if normal != PROBE or backend.pre_tokenizer is None:
        raise _refused("that changes text before it reads it" if normal != PROBE else "that does not cut text before it merges")
    pieces = cut(backend.pre_tokenizer, PROBE)
    whole_words = bool(model.get("ignore_merges"))
    for name, (whole, reference) in known_cuts().items():
        if whole == whole_words and pieces == reference:
            return name
    raise _refused("that cuts text in a way of its own")


def _by_score(
    tokenizer: Tokenizer, backend: Any, tokens: list[str], kinds: list[int], vocab: Mapping[str, int], merges: list[tuple[str, ...]]
) -> Vocabulary:
    """Return the vocabulary of a SentencePiece tokenizer; the earlier a merge stands in its list, the higher the score of its result."""
    if any(token not in vocab for token in _BYTES):
        raise _refused("without a token for every byte")
    text = "a b  c\n\td  e\u0301 \uff21"
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normal)] if backend.pre_tokenizer else [normal]
    spaced = text.replace(" ", _SPACE)
    if pieces not in ([spaced], [_SPACE + spaced]):
        raise _refused("that cuts or changes text before it merges")
    _refuse_unscored(vocab, merges, tokens, kinds)
    scores = [-float(len(merges))] * len(tokens)
    for rank in range(len(merges) - 1, -1, -1):
        scores[vocab["".join(merges[rank])]] = -float(rank)
    return Vocabulary("llama", "default", tokens, kinds, scores=scores, space_prefix=_prefixes(tokenizer, tokens))


def _refuse_unscored(vocab: Mapping[str, int], merges: list[tuple[str, ...]], tokens: list[str], kinds: list[int]) -> None:
    """Refuse a tokenizer with pairs that make a token and are not merged: llama.cpp would merge them.

    Tokens that are matched before, whole, do not count.
    """
    known = set(merges)
    for token, index in vocab.items():
        if kinds[index] != TokenType.NORMAL:
            continue
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in vocab and right in vocab and (left, right) not in known:
                raise _refused(
                    f"that does not merge {one_line(left, limit=20)!r} and {one_line(right, limit=20)!r}, though the result is a token"
                )


def _prefixes(tokenizer: Tokenizer, tokens: Sequence[str]) -> bool:
    """Say whether a space is put before text that follows a special token, as in a chat; without a template, before any text."""
    before = (tokenizer.bos or tokenizer.eos) if tokenizer.template else ""
    ids, _ = tokenizer.encode(before + "a")
    return tokens[ids[1 if before else 0]].startswith(_SPACE)


def _refused(how: str) -> ModelError:
    return ModelError(f"a tokenizer {how} cannot be written as GGUF here", hint="llama.cpp's own convert_hf_to_gguf.py may know it")
