"""A chat template in the language of Go, as Ollama wants it: learned from what the model's own template writes, and proved on it.

The model's template is rendered with marks in place of the turns. What it writes around them (before the first question,
between question and answer, between answer and question, before the next answer) is the whole of most templates, and so it
is written down. What comes out is rendered by `gorender`, which knows the language and nothing of this file, and has to be
what the model's template writes, for chats of every shape. A template that does more is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_tui.engine.data import Tokenizer
from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.export.gorender import render
from qlora_tui.engine.export.serving import Messages, first_token, prompt_text

_SYSTEM, _TURNS = "zqSystemqz", ("zqTurn0qz", "zqTurn1qz", "zqTurn2qz", "zqTurn3qz", "zqTurn4qz")
_LONG = ("A line of `code` with <b>marks</b> & 12 numbers. " * 40).strip()
_REFUSED = "its chat template does more than Ollama's language is known here to say"
_HINT = "export gguf and serve it with llama.cpp, which reads the model's own template"


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The text around turns. `late` says that the system text stands before the last question, else before the first."""

    head: str
    head_with_system: tuple[str, str]
    answer: str
    question: str
    tail: str
    late: bool
    late_around: tuple[str, str] = ("", "")


def translate(tokenizer: Tokenizer, *, adds_bos: bool) -> str:
    """Return the template of `tokenizer` for Ollama; without the first token of a text where the engine `adds_bos` itself.

    Raises:
        ModelError: it cannot be written in that language.
    """
    if not tokenizer.template:
        return "{{ .Prompt }}"
    written = _write(_learn(tokenizer), first_token(tokenizer) if adds_bos else "")
    for messages in probes():
        expected = prompt_text(tokenizer, messages)
        if expected is not None and without_bos(expected, tokenizer, adds_bos=adds_bos) != render(written, messages):
            raise ModelError(_REFUSED, hint=_HINT)
    return written


def without_bos(text: str, tokenizer: Tokenizer, *, adds_bos: bool) -> str:
    """Return a prompt without the token that the engine puts there itself."""
    return text.removeprefix(first_token(tokenizer)) if adds_bos else text


def probes() -> list[Messages]:
    """Return chats of every shape that a prompt can have: one question and several, with a system text and without, short and long."""
    system, turns = {"role": "system", "content": "Be brief."}, _chat("Why?", "Because.", "Sure?", "Yes.", "And?")
    long = [{**turn, "content": f"{turn['content']}\n\n  {_LONG}"} for turn in turns]
    return [[*lead, *said[:length]] for said in (turns, long) for length in (1, 3, 5) for lead in ([], [system])]


def _chat(*texts: str) -> Messages:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def _learn(tokenizer: Tokenizer) -> _Pieces:
    """Return what the template writes around the turns of a chat.

    Raises:
        ModelError: it leaves a turn out, or writes otherwise around the second than around the third.
    """
    first, long = _around(tokenizer, _chat(_TURNS[0]), _TURNS[:1]), _around(tokenizer, _chat(*_TURNS), _TURNS)
    system: Mapping[str, str] = {"role": "system", "content": _SYSTEM}
    asked = _around(tokenizer, [system, *_chat(_TURNS[0])], (_SYSTEM, _TURNS[0]))
    head, answer, question = long[0], long[1], long[2]
    pieces = _Pieces(head, (asked[0], asked[1]), answer, question, first[-1], late=False)
    try:
        _around(tokenizer, [system, *_chat(*_TURNS[:3])], (_SYSTEM, *_TURNS[:3]))
    except ModelError:
        late = _around(tokenizer, [system, *_chat(*_TURNS[:3])], (*_TURNS[:2], _SYSTEM, _TURNS[2]))
        before = late[2].removeprefix(question)
        return _Pieces(head, (asked[0], asked[1]), answer, question, first[-1], late=True, late_around=(before, late[3]))
    return pieces


def _around(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], marks: Sequence[str]) -> list[str]:
    text = prompt_text(tokenizer, messages)
    found = []
    for mark in marks:
        before, there, text = (text or "").partition(mark)
        if not there:
            raise ModelError(_REFUSED, hint=_HINT)
        found.append(before)
    return [*found, text or ""]


def _write(pieces: _Pieces, bos: str) -> str:
    first = "or (eq $i 0) (and (eq $i 1) $.System)"
    head = _text(pieces.head.removeprefix(bos))
    if pieces.late:
        begin = head
        before, after = map(_text, pieces.late_around)
        system = f"{{{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}}}{before}{{{{ $.System }}}}{after}{{{{ end }}}}"
    else:
        before, after = _text(pieces.head_with_system[0].removeprefix(bos)), _text(pieces.head_with_system[1])
        begin = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{head}{{{{ end }}}}"
        system = ""
    question = f"{{{{ if {first} }}}}{{{{ else }}}}{_text(pieces.question)}{{{{ end }}}}{system}{{{{ .Content }}}}"
    return (
        f"{begin}{{{{ range $i, $_ := .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{question}{{{{ else if eq .Role "assistant" }}}}{_text(pieces.answer)}{{{{ .Content }}}}{{{{ end }}}}'
        f"{{{{ end }}}}{_text(pieces.tail)}"
    )


def _text(text: str) -> str:
    """Return text so that it stands for itself, whatever the language makes of braces."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{{" in text else text
