"""What an endpoint is asked and how its reply is read: our own short prompt, and a verdict that is there or is not."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Literal

from qlora_tui.engine.judge.kept import Answered, Said

Message = dict[str, str]
_PROMPT = Path(__file__).with_name("prompt.json")
_VERDICT = re.compile(r"[*`\s]*(?:VERDICT:)?[*`\s]*(A|B|TIE)[*`.\s]*", re.IGNORECASE)
_NAMED = re.compile(r"VERDICT:", re.IGNORECASE)


def messages(answer: Answered, first: Literal["base", "tuned"]) -> list[Message]:
    """Return the question about a pair, with the answer of `first` as A.

    The marks around foreign text hold a digest of that text, so nothing in it can forge the end of its part.
    """
    prompt = _prompt()
    sides = {"base": (answer.base, answer.cut[0]), "tuned": (answer.tuned, answer.cut[1])}
    other = "tuned" if first == "base" else "base"
    a, b = (f"{text}\n{prompt['cut']}" if cut else text for text, cut in (sides[first], sides[other]))
    told = prompt["user"].format(mark=answer.pair[:10], prompt=answer.prompt, a=a, b=b)
    return [{"role": "system", "content": prompt["system"]}, {"role": "user", "content": _sendable(told)}]


def read_verdict(reply: str, first: Literal["base", "tuned"]) -> Said:
    """Return whom a reply prefers: its last line must be a verdict, and it must hold no second one.

    >>> read_verdict("VERDICT: A", "tuned"), read_verdict("A is better because B ...", "tuned")
    ('tuned', 'unclear')
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    found = _VERDICT.fullmatch(lines[-1]) if lines else None
    if found is None or len(_NAMED.findall(reply)) > 1:
        return "unclear"
    said = found[1].upper()
    if said == "TIE":
        return "tie"
    return first if said == "A" else ("tuned" if first == "base" else "base")


def size_of(question: list[Message]) -> int:
    """Return the bytes of a question's text."""
    return sum(len(message["content"].encode()) for message in question)


@functools.cache
def _prompt() -> dict[str, str]:
    found: dict[str, str] = json.loads(_PROMPT.read_text(encoding="utf-8"))
    return found


def _sendable(text: str) -> str:
    """Return `text` without lone surrogates, which no server can read."""
    return text.encode("utf-8", "replace").decode("utf-8")
