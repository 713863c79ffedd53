"""The ways of cutting text into words that llama.cpp knows by name, and a text on which no two of them agree."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, pre_tokenizers

Pieces = tuple[str, ...]

PROBE = (
    "I'll, I'LL we've 'tis it's\u2019 a  b   c\n\n\t d \r\n  e\n 1 12 123 1234 12345.67 x1y22z333 \u00b2\u00bd\u0664\u0665 "
    "CamelCase HTTPServer ofX aB \u4e2d\u6587\u8bf4 \u0440\u0443\u0421 \u0939\u093f\u0928\u094d\u0926\u0940 \ud55c\uae00 "
    "\U0001f680\U0001f468\u200d\U0001f469 "
    "if (a[i] != b){\n\treturn x/y;//\n}\n#!@$%  ... ,\n\n\n/ end  \n   "
)
"""Contractions in both cases, runs of digits and of spaces, line ends, mixed case, scripts with marks, emoji, code."""

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_REST = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)


@functools.cache
def known_cuts() -> Mapping[str, tuple[bool, Pieces]]:
    """Return, by llama.cpp's name, whether a word that is a token is taken whole, and the pieces of `PROBE`."""
    three_digits = cut(_by_pattern(rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), PROBE)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single_digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return {
        "llama-bpe": (True, three_digits),
        "smaug-bpe": (False, three_digits),
        "qwen2": (False, cut(_by_pattern(rf"{_SHORT}|{_WORDS}|\p{{N}}|{_REST}"), PROBE)),
        "tekken": (True, cut(_by_pattern(rf"{_CASED}|\p{{N}}|{_CASED_REST}"), PROBE)),
        "smollm": (False, cut(single_digits, PROBE)),
        "gpt-2": (False, cut(gpt2, PROBE)),
    }


def cut(splitter: Any, text: str) -> Pieces:
    """Return the pieces that a pre-tokenizer makes of `text`."""
    return tuple(piece for piece, _ in splitter.pre_tokenize_str(text))


def _by_pattern(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)
