"""A chat written out by a model's own template, and where in that text each turn lies.

Chat templates are programs. They trim, add system prompts and dates, drop thoughts, and the rendering of a part of
a chat need not be the start of the rendering of the whole; and most carry no marks for answers. So a template is
first rendered with a mark in place of every turn, which shows the text around the turns, its frame; the real chat
has to fit that frame to the last character.

Some answers change what is around them: thoughts, tool calls. Then only the other turns are marked, and each answer
is found alone: the chat is rendered once more with a mark instead of that answer, and the texts before and after
the mark have to be the start and the end of the real one. What lies between must hold the whole answer, word for word.
A row that fits neither way is refused with the reason, never guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_tui.engine.data.chat import Chat, Turn
from qlora_tui.engine.data.tokenizer import Tokenizer
from qlora_tui.engine.data.whole import CLOSE, OPEN, missing_part
from qlora_tui.engine.errors import BadRow, ModelError
from qlora_tui.engine.text import one_line

Span = tuple[int, int]
Tools = tuple[Mapping[str, object], ...]

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What templates call the thoughts of an answer; each gets them, and writes those it knows."""
_MOST_FRAMES = 2048


@dataclass(frozen=True, slots=True)
class Written:
    """A text, the parts of it that come from the data, and the parts to train; both in order, in characters.

    `loose` are texts of the data that a template may write in another spelling, so that they have no place of their own.
    """

    text: str
    given: Sequence[Span]
    trained: Sequence[Span]
    loose: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Frame:
    """The text of a template around the turns: `literals[k]` comes before the turn `order[k]`, the last one ends it.

    `leads` counts, by turn, the spaces before an answer that the model has to write itself.
    """

    order: tuple[int, ...]
    literals: tuple[str, ...]
    leads: Mapping[int, int]


class Template:
    """Writes chats with one tokenizer's template, keeping what it learned about it; one instance a thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Learn how the template of `tokenizer` ends an answer."""
        self.tokenizer = tokenizer
        self.folds_system = False
        self.drops_thoughts = False
        self._frames: dict[tuple[str, ...], _Frame | str] = {}
        self._leads: dict[str, int] = {}
        self._probes: dict[str, bool] = {}
        self._added = sorted(tokenizer.added, key=len, reverse=True)
        self._stops = [text for text, index in tokenizer.added.items() if index in tokenizer.stop_ids() | {tokenizer.eos_id}]
        self.beginning, self.ending = self._learn_ends()
        self._endings = [ending for ending in (self.ending, self._inner_ending()) if ending]
        self.closing = self._endings[-1] if self._endings else tokenizer.eos
        self._opener: str | None = None

    def write(self, chat: Chat) -> Written:
        """Write a chat out and say where its turns and the answers to train are.

        Raises:
            BadRow: the template refuses the chat, leaves a part of it out or changes it.
        """
        self._refuse_unwritable(chat)
        simple = not chat.tools and not any(turn.tool_calls or turn.thoughts for turn in chat.turns)
        turns, frame = self._fit(chat, simple=simple)
        text = self._render(turns, chat.tools)
        spans = _align(text, frame, turns)
        if spans is None or not simple:
            return self._followed(turns, chat.tools, text)
        trained = []
        for index, turn in enumerate(turns):
            if turn.role == "assistant" and turn.trained:
                start, end = spans[index]
                stop, text = self._end_of_answer(text, end)
                trained.append((start - frame.leads.get(index, 0), stop))
        return Written(text, list(spans.values()), trained)

    def unknown_stop(self) -> str:
        """Return the token that ends an answer if generation would not stop at it; else an empty text."""
        token = next((token for token in self._added if self.ending.endswith(token)), "")
        return token if token and token not in self._stops else ""

    def _fit(self, chat: Chat, *, simple: bool) -> tuple[tuple[Turn, ...], _Frame]:
        """Return the turns as the template takes them: a system turn it does not know goes before the first question."""
        turns = chat.turns
        found = self._frame(turns) if simple else self._frame_around(turns, chat.tools)
        if isinstance(found, _Frame):
            return turns, found
        if len(turns) > 1 and turns[0].role == "system" and turns[1].role == "user":
            content = "\n\n".join(turn.content for turn in turns[:2] if turn.content.strip())
            folded = (replace(turns[1], content=content), *turns[2:])
            again = self._frame(folded) if simple else self._frame_around(folded, chat.tools)
            if isinstance(again, _Frame):
                self.folds_system = True
                return folded, again
        raise BadRow(found)

    def _frame(self, turns: Sequence[Turn]) -> _Frame | str:
        """Return what the template writes around turns of these roles, or the sentence that says why it cannot."""
        key = tuple(f"{turn.role}\0{turn.name}\0{turn.tool_call_id}" if turn.name or turn.tool_call_id else turn.role for turn in turns)
        if key not in self._frames:
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            try:
                self._frames[key] = self._learn(turns, (), range(len(turns)))
            except BadRow as error:
                self._frames[key] = str(error)
        return self._frames[key]

    def _frame_around(self, turns: Sequence[Turn], tools: Tools) -> _Frame | str:
        """Return the frame of one chat whose answers stay as they are."""
        try:
            return self._learn(
                turns, tools, [index for index, turn in enumerate(turns) if turn.role != "assistant" and turn.content.strip()]
            )
        except BadRow as error:
            return str(error)

    def _learn(self, turns: Sequence[Turn], tools: Tools, marked: Sequence[int]) -> _Frame:
        shown = [replace(turn, content=_mark(index)) if index in marked else turn for index, turn in enumerate(turns)]
        text = self._render(shown, tools)
        places = {index: text.find(_mark(index)) for index in marked}
        for index in marked:
            if text.count(_mark(index)) != 1:
                raise BadRow(
                    f"the chat template {'leaves out or changes' if places[index] < 0 else 'repeats'} a turn of the {turns[index].role}"
                )
        order = sorted(places, key=lambda index: places[index])
        edges = [0, *(places[index] + len(_mark(index)) for index in order)]
        literals = [text[edge : places[index]] for edge, index in zip(edges, order, strict=False)] + [text[edges[-1] :]]
        leads: dict[int, int] = {}
        for literal, index in zip(literals, order, strict=False):
            if turns[index].role == "assistant" and index:
                if literal not in self._leads:
                    self._leads[literal] = self._lead(shown[:index], literal)
                leads[index] = self._leads[literal]
        return _Frame(tuple(order), tuple(literals), leads)

    def _lead(self, before: Sequence[Turn], literal: str) -> int:
        """Count the spaces between the place where a model begins to answer and the answer itself."""
        prompt = self._tried(before, (), answer_next=True)
        mark = _mark(len(before) - 1)
        if prompt is None or mark not in prompt:
            return 0
        given = prompt[prompt.rfind(mark) + len(mark) :]
        rest = literal[len(given) :] if literal.startswith(given) else ""
        return len(rest) if rest.isspace() else 0

    def _learn_ends(self) -> tuple[str, str]:
        """Return what a chat begins with, and what comes after the last answer up to and with its end token; empty if it has none."""
        found = self._frame((Turn("user", ""), Turn("assistant", "")))
        return ("", "") if isinstance(found, str) else (found.literals[0], self._up_to_token(found.literals[-1]))

    def _inner_ending(self) -> str:
        """Return the same of an answer that is followed by a question, whose end token may only come with that question."""
        found = self._frame((Turn("user", ""), Turn("assistant", ""), Turn("user", ""), Turn("assistant", "")))
        if isinstance(found, str) or found.order != (0, 1, 2, 3):
            return ""
        opening, between = found.literals[0], found.literals[2]
        shared = 0  # what also stands before the first question opens a question and ends no answer
        while shared < min(len(opening), len(between)) and opening[-1 - shared] == between[-1 - shared]:
            shared += 1
        return self._up_to_token(between[: len(between) - shared])

    def _up_to_token(self, text: str) -> str:
        places = [(text.find(token), -len(token), token) for token in self._added if token in text]
        if not places:
            return ""
        place, _, token = min(places)
        return text[: place + len(token)]

    def _end_of_answer(self, text: str, end: int) -> tuple[int, str]:
        """Return where the trained part ends, and the text, which gains an end token if its last answer has none."""
        for ending in self._endings:
            if text.startswith(ending, end):
                return end + len(ending), text
        rest = text[end:]
        gap = len(rest) - len(rest.lstrip())
        for stop in self._stops:
            if rest.startswith(stop, gap):
                return end + gap + len(stop), text
        if rest.strip():
            return end, text
        if not self.closing:
            raise BadRow("neither the chat template nor the tokenizer has a token that ends an answer")
        return end + len(self.closing), text[:end] + self.closing

    def _followed(self, turns: Sequence[Turn], tools: Tools, text: str) -> Written:
        """Find the answers of a chat that does not fit the frame of its roles, one by one."""
        frame = self._frame_around(turns, tools)
        if isinstance(frame, str):
            raise BadRow(frame)
        spans = _align(text, frame, turns)
        if spans is None:
            raise _sorry("")
        answers = {index: self._locate(turns, tools, index, text) for index, turn in enumerate(turns) if turn.role == "assistant"}
        _refuse_ignored(tools, text, sorted([*spans.values(), *answers.values()]))
        trained = []
        for index, (start, end) in answers.items():
            if turns[index].trained:
                stop, text = self._end_of_answer(text, end)
                trained.append((start, stop))
        said = [turns[index] for index in answers]
        loose = [part for turn in said for part in (turn.content.replace(OPEN, "").replace(CLOSE, ""), turn.thoughts)]
        loose += [json.dumps(part, ensure_ascii=False) for part in (*(call for turn in said for call in turn.tool_calls), *tools)]
        return Written(text, list(spans.values()), trained, loose)

    def _locate(self, turns: Sequence[Turn], tools: Tools, index: int, text: str) -> Span:
        """Return where an answer lies, without its end token.

        Raises:
            BadRow: it cannot be told apart, or a part of it is missing there.
        """
        fault = ""
        for find in (self._instead, self._between_parts):
            found = find(turns, tools, index, text)
            if found is None:
                continue
            fault, dropped = missing_part(turns[index], text[found[0] : found[1]])
            if not fault:
                self.drops_thoughts |= dropped
                return found
        raise _sorry(fault)

    def _instead(self, turns: Sequence[Turn], tools: Tools, index: int, text: str) -> Span | None:
        """Find an answer between the texts around a mark that takes its place."""
        mark = _mark(index)
        other = self._tried([*turns[:index], Turn("assistant", mark), *turns[index + 1 :]], tools)
        before, found, after = (other or "").partition(mark)
        if not found or mark in after or not text.endswith(after):
            return None
        prompt = self._tried(turns[:index], tools, answer_next=True) or ""
        place = len(prompt) if prompt and before.startswith(prompt) else before.rfind(self._opening()) + len(self._opening())
        if text.startswith(before):
            start = place if before[place:].isspace() else len(before)
        else:
            start = place if text.startswith(before[:place]) else -1
        end = len(text) - len(after)
        return (start, end) if 0 < start <= end else None

    def _between_parts(self, turns: Sequence[Turn], tools: Tools, index: int, text: str) -> Span | None:
        """Find an answer after the chat before it, where that is the start of the whole and so is the chat up to its end."""
        prompt, whole = self._tried(turns[:index], tools, answer_next=True), self._tried(turns[: index + 1], tools)
        if not prompt or not whole or not whole.startswith(prompt):
            return None
        ending = next((ending for ending in self._endings if whole.rfind(ending) >= len(prompt)), "")
        end = whole.rfind(ending) if ending else len(whole)
        if not text.startswith(whole[:end]) or whole[end + len(ending) :].strip() not in ("", self.tokenizer.eos):
            return None
        return len(prompt), end

    def _opening(self) -> str:
        """Return what the template adds to make the model answer."""
        if self._opener is None:
            question = [Turn("user", _mark(0))]
            bare, asked = self._tried(question, ()) or "", self._tried(question, (), answer_next=True) or ""
            self._opener = asked[len(bare) :] if asked.startswith(bare) else ""
        return self._opener

    def _refuse_unwritable(self, chat: Chat) -> None:
        """Refuse what the template knows nothing of: it would be passed over in silence."""
        if chat.tools and not self._knows("tools"):
            raise BadRow(
                "the chat template writes no tool definitions", hint="remove tools from the row, or choose a model trained for them"
            )
        if any(turn.thoughts for turn in chat.turns) and not self._knows("thoughts"):
            raise BadRow("the chat template writes no thoughts", hint="remove reasoning_content, or write it into the content")

    def _knows(self, what: str) -> bool:
        """Say whether the template writes tool definitions, or thoughts, by rendering a mark as one."""
        if what not in self._probes:
            mark, turns, tools = _mark(9), [Turn("user", "a")], ()
            if what == "tools":
                text = self._tried(
                    turns, ({"type": "function", "function": {"name": mark, "description": "a", "parameters": _NO_ARGUMENTS}},)
                )
            else:
                text = self._tried([*turns, Turn("assistant", "b", thoughts=mark)], tools)
            self._probes[what] = mark in (text or "")
        return self._probes[what]

    def _tried(self, turns: Sequence[Turn], tools: Tools, *, answer_next: bool = False) -> str | None:
        try:
            return self._render(turns, tools, answer_next=answer_next)
        except BadRow:
            return None

    def _render(self, turns: Sequence[Turn], tools: Tools, *, answer_next: bool = False) -> str:
        try:
            return self.tokenizer.render([_message(turn) for turn in turns], tools=tools, answer_next=answer_next)
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001  (a template is a program: it raises what it likes)
            raise BadRow(f"the chat template refuses it ({one_line(error, limit=160)})") from None


_NO_ARGUMENTS: Mapping[str, object] = {"type": "object", "properties": {}}


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if not (turn.tool_calls or turn.name or turn.tool_call_id or turn.thoughts):
        return message
    if turn.tool_calls:
        message["tool_calls"] = [dict(call) for call in turn.tool_calls]
    extra = {"name": turn.name, "tool_call_id": turn.tool_call_id, **dict.fromkeys(_THOUGHTS, turn.thoughts)}
    message |= {key: value for key, value in extra.items() if value}
    return message


def _mark(index: int) -> str:
    return f"zqTurn{index:06d}qz"


def _sorry(fault: str) -> BadRow:
    return BadRow(fault or "the chat template changes the text of a turn, so what to train cannot be told apart")


def _refuse_ignored(tools: Tools, text: str, turns: Sequence[Span]) -> None:
    """Refuse a text that says nothing of a tool around its turns, or turns that do not follow one another."""
    gaps = [(end, start) for (_, end), (start, _) in zip([(0, 0), *turns], [*turns, (len(text), 0)], strict=True)]
    if any(start > end for start, end in gaps):
        raise _sorry("")
    around = "\0".join(text[start:end] for start, end in gaps)
    for tool in tools:
        function = tool.get("function")
        name = str((function if isinstance(function, Mapping) else tool).get("name"))
        if name not in around:
            raise _sorry(f"the chat template leaves out the tool {one_line(name, limit=60)}")


def _align(text: str, frame: _Frame, turns: Sequence[Turn]) -> dict[int, Span] | None:
    """Return where each turn of the frame lies in `text`; None if text and frame do not fit to the last character."""
    spans: dict[int, Span] = {}
    if not text.startswith(frame.literals[0]):
        return None
    place = len(frame.literals[0])
    for index, literal in zip(frame.order, frame.literals[1:], strict=True):
        found = _match(text, place, turns[index], literal, last=index == frame.order[-1])
        if found is None:
            return None
        spans[index] = found
        place = found[1] + len(literal)
    return spans


def _match(text: str, place: int, turn: Turn, literal: str, *, last: bool) -> Span | None:
    for written in _spellings(turn):
        end = place + len(written)
        fits = text.startswith(written, place) and text.startswith(literal, end)
        if fits and (not last or end + len(literal) == len(text)):
            return place, end
    return None


def _spellings(turn: Turn) -> Iterator[str]:
    """Yield the ways a template may write a text: as it is, trimmed, and what a tool gave back also as JSON writes it."""
    content = turn.content
    yield content
    yield from (content.strip(), content.rstrip(), content.lstrip(), content.strip("\n"), content.rstrip("\n"))
    if turn.role == "tool":
        yield json.dumps(content, ensure_ascii=False)[1:-1]
        yield json.dumps(content)[1:-1]
