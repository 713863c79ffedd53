"""From a chat to tokens and the mask of what is trained: one path for training, preview and evaluation.

Chat templates are programs. They trim, add system prompts, and the rendering of a part of a chat need not be
the start of the rendering of the whole; and most carry no marks for answers. So the template is rendered once
with a mark in place of every turn, which shows the text around the turns; then with the real turns, which have
to fit that text exactly. A row that does not fit is refused with the reason, never guessed at.

Trained is an answer and the token that ends it, and nothing else: without the end token a model never learns
to stop. Spaces that come after the place where an answer begins are the model's to write, so they count too.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_tui.engine.data.chat import Chat, Row, Turn
from qlora_tui.engine.data.tokenizer import Tokenizer
from qlora_tui.engine.errors import BadRow, ModelError
from qlora_tui.engine.text import one_line

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row as the model sees it: its number, its token ids, and for each token 1 if it is a target to predict."""

    row: int
    input_ids: array[int]
    trained: bytes


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """The text of a template around the turns: `literals[k]` comes before the turn `order[k]`, the last one ends it.

    `leads` counts, by turn, the spaces before an answer that the model has to write itself.
    """

    order: tuple[int, ...]
    literals: tuple[str, ...]
    leads: tuple[int, ...]


class Renderer:
    """Renders rows for one tokenizer, keeping what it learned about the template; one instance a thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Learn how the template of `tokenizer` ends an answer."""
        self.tokenizer = tokenizer
        self.folds_system = False
        self._skeletons: dict[tuple[str, ...], _Skeleton | str] = {}
        self._leads: dict[str, int] = {}
        self._added = sorted(tokenizer.added, key=len, reverse=True)
        self._stops = [text for text, index in tokenizer.added.items() if index in tokenizer.stop_ids() | {tokenizer.eos_id}]
        self.ending = self._learn_ending() if tokenizer.template else ""

    def tokens(self, row: Row) -> TokenRow:
        """Render, encode and mask one row.

        Raises:
            BadRow: the reason why it cannot be trained; it counts rows of a kind, so it names no row.
        """
        text, contents, trained = self._plain(row.chat) if self._is_plain(row.chat) else self._chat(row.chat)
        try:
            ids, offsets = self.tokenizer.encode(text)
        except Exception as error:  # noqa: BLE001  (the Rust side raises plain Exception)
            raise BadRow(f"the tokenizer cannot read it ({one_line(error, limit=120)})") from None
        self._refuse_control_tokens(text, ids, offsets, contents)
        mask = _mask(offsets, trained)
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_id:
            ids, mask = ids[1:], mask[1:]
        if mask:
            mask[0] = 0  # nothing comes before the first token to predict it from
        if not any(mask):
            raise BadRow("no token of it would be trained")
        return TokenRow(row.number, array("i", ids), bytes(mask))

    def notes(self) -> tuple[str, ...]:
        """Return, in sentences, what a person should know about how these rows were rendered."""
        found = [self.tokenizer.note] if self.tokenizer.note else []
        if self.folds_system:
            found.append("The chat template takes no system turn: it was put before the first question.")
        if self.tokenizer.template and not self.ending:
            found.append(f"The chat template does not end the last answer: {self.tokenizer.eos} was added and is trained.")
        if stop := self._unknown_stop():
            found.append(f"Answers end with {stop}, no stop token by the model's files: whoever serves the adapter has to name it.")
        return tuple(found)

    def _unknown_stop(self) -> str:
        """Return the token that ends an answer if generation would not stop at it."""
        token = next((token for token in self._added if self.ending.endswith(token)), "")
        return token if token and token not in self._stops else ""

    def _is_plain(self, chat: Chat) -> bool:
        if self.tokenizer.template:
            return False
        if not chat.plain:
            raise BadRow(
                "the model has no chat template, so a chat cannot be written out",
                hint="choose an instruct model, or give prompt and completion",
            )
        return True

    def _plain(self, chat: Chat) -> tuple[str, list[Span], list[Span]]:
        prompt, answer = chat.turns[0].content, chat.turns[1].content
        start = len(self.tokenizer.bos) + len(prompt)
        end = start + len(answer)
        text = self.tokenizer.bos + prompt + answer + self._eos()
        return text, [(len(self.tokenizer.bos), start), (start, end)], [(start, len(text))]

    def _chat(self, chat: Chat) -> tuple[str, list[Span], list[Span]]:
        turns, skeleton = self._fit(chat.turns)
        text = self._render(turns)
        spans = _align(text, skeleton, turns)
        if spans is None:
            return self._rewritten(turns, text)
        trained = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant" or not turn.trained:
                continue
            start, end = spans[index]
            stop, text = self._end_of_answer(text, end)
            trained.append((start - skeleton.leads[index], stop))
        return text, list(spans.values()), trained

    def _fit(self, turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], _Skeleton]:
        """Return the turns as the template takes them: a system turn it does not know goes before the first question."""
        found = self._skeleton(turns)
        if isinstance(found, _Skeleton):
            return turns, found
        if len(turns) > 1 and turns[0].role == "system" and turns[1].role == "user":
            content = "\n\n".join(turn.content for turn in turns[:2] if turn.content.strip())
            folded = (Turn("user", content), *turns[2:])
            again = self._skeleton(folded)
            if isinstance(again, _Skeleton):
                self.folds_system = True
                return folded, again
        raise BadRow(found)

    def _skeleton(self, turns: Sequence[Turn]) -> _Skeleton | str:
        """Return what the template writes around turns of these roles, or the sentence that says why it cannot."""
        roles = tuple(turn.role for turn in turns)
        if roles not in self._skeletons:
            try:
                self._skeletons[roles] = self._learn(roles)
            except BadRow as error:
                self._skeletons[roles] = str(error)
        return self._skeletons[roles]

    def _learn(self, roles: tuple[str, ...]) -> _Skeleton:
        marked = [Turn(role, _mark(index)) for index, role in enumerate(roles)]  # type: ignore[arg-type]
        text = self._render(marked)
        places = {index: text.find(_mark(index)) for index in range(len(roles))}
        for index, role in enumerate(roles):
            if text.count(_mark(index)) != 1:
                raise BadRow(f"the chat template {'leaves out' if places[index] < 0 else 'repeats'} a turn of the {role}")
        order = sorted(places, key=lambda index: places[index])
        edges = [0, *(places[index] + len(_mark(index)) for index in order)]
        literals = [text[edge : places[index]] for edge, index in zip(edges, order, strict=False)] + [text[edges[-1] :]]
        leads = [0] * len(roles)
        for position, index in enumerate(order):
            if roles[index] == "assistant" and index:
                literal = literals[position]
                if literal not in self._leads:
                    self._leads[literal] = self._lead(marked[:index], literal)
                leads[index] = self._leads[literal]
        return _Skeleton(tuple(order), tuple(literals), tuple(leads))

    def _lead(self, before: Sequence[Turn], literal: str) -> int:
        """Count the spaces between the place where a model begins to answer and the answer itself."""
        try:
            prompt = self._render(before, answer_next=True)
        except BadRow:
            return 0
        mark = _mark(len(before) - 1)
        given = prompt[prompt.rfind(mark) + len(mark) :] if mark in prompt else None
        if given is None or not literal.startswith(given):
            return 0
        rest = literal[len(given) :]
        return len(rest) if rest.isspace() else 0

    def _learn_ending(self) -> str:
        """Return what the template writes after an answer, up to and with its end token; empty if it has none."""
        found = self._skeleton((Turn("user", ""), Turn("assistant", "")))
        if isinstance(found, str):
            return ""
        after = found.literals[-1]
        places = [(after.find(token), -len(token), token) for token in self._added if token in after]
        if not places:
            return ""
        place, _, token = min(places)
        return after[: place + len(token)]

    def _end_of_answer(self, text: str, end: int) -> tuple[int, str]:
        """Return where the trained part ends, and the text, which gains an end token if its last answer has none."""
        if self.ending and text.startswith(self.ending, end):
            return end + len(self.ending), text
        rest = text[end:]
        gap = len(rest) - len(rest.lstrip())
        for stop in self._stops:
            if rest.startswith(stop, gap):
                return end + gap + len(stop), text
        if rest.strip():
            return end, text
        text = text[:end] + self._eos()
        return len(text), text

    def _rewritten(self, turns: Sequence[Turn], text: str) -> tuple[str, list[Span], list[Span]]:
        """Find the last answer of a chat whose template rearranges it (thoughts, for one), by what is certain.

        That is: the text up to where the answer begins, the end token after it, and every character of the answer
        but spaces in between. Only a chat with one trained answer can be followed so.
        """
        sorry = BadRow("the chat template changes the text of a turn, so what to train cannot be told apart")
        answers = [turn for turn in turns if turn.role == "assistant" and turn.trained]
        if len(answers) != 1 or turns[-1] is not answers[0] or not self.ending:
            raise sorry
        prompt = self._render(turns[:-1], answer_next=True)
        start, end = len(prompt), text.rfind(self.ending)
        if not text.startswith(prompt) or end < start or text[end + len(self.ending) :].strip():
            raise sorry
        if text[start:end].split() != turns[-1].content.split() or any(turn.content.strip() not in prompt for turn in turns[:-1]):
            raise sorry
        return text, [(start, end)], [(start, end + len(self.ending))]

    def _render(self, turns: Sequence[Turn], *, answer_next: bool = False) -> str:
        messages: list[Mapping[str, str]] = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self.tokenizer.render(messages, answer_next=answer_next)
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001  (a template is a program: it raises what it likes)
            raise BadRow(f"the chat template refuses it ({one_line(error, limit=160)})") from None

    def _eos(self) -> str:
        if not self.tokenizer.eos:
            raise BadRow("neither the chat template nor the tokenizer has a token that ends an answer")
        return self.tokenizer.eos

    def _refuse_control_tokens(self, text: str, ids: Sequence[int], offsets: Sequence[Span], contents: Sequence[Span]) -> None:
        """Refuse text that holds a control token of the model: it would end a turn or begin one in the middle of a text."""
        for index, (start, end) in zip(ids, offsets, strict=True):
            if index not in self.tokenizer.control_ids or not any(first <= start < last for first, last in contents):
                continue
            written = text[start:end].strip()
            if self.tokenizer.added.get(written) == index:
                raise BadRow(f"its text holds {one_line(written, limit=40)}, a control token of this model", hint="remove it from the text")


def _mark(index: int) -> str:
    return f"zqTurn{index:06d}qz"


def _align(text: str, skeleton: _Skeleton, turns: Sequence[Turn]) -> dict[int, Span] | None:
    """Return where each turn lies in `text`; None if text and skeleton do not fit to the last character."""
    spans: dict[int, Span] = {}
    if not text.startswith(skeleton.literals[0]):
        return None
    place = len(skeleton.literals[0])
    for index, literal in zip(skeleton.order, skeleton.literals[1:], strict=True):
        last = index == skeleton.order[-1]
        found = _match(text, place, turns[index].content, literal, last=last)
        if found is None:
            return None
        spans[index] = found
        place = found[1] + len(literal)
    return spans


def _match(text: str, place: int, content: str, literal: str, *, last: bool) -> Span | None:
    for written in dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip(), content.strip("\n"), content.rstrip("\n"))):
        end = place + len(written)
        fits = text.startswith(written, place) and text.startswith(literal, end)
        if fits and (not last or end + len(literal) == len(text)):
            return place, end
    return None


def _mask(offsets: Sequence[Span], trained: Sequence[Span]) -> bytearray:
    """Mark each token that begins inside a trained span; both lists are in order of the text.

    A token that begins before an answer belongs to the prompt, which is given and not predicted.
    """
    mask = bytearray(len(offsets))
    spans = iter(sorted(trained))
    span = next(spans, None)
    for place, (start, end) in enumerate(offsets):
        while span and start >= span[1]:
            span = next(spans, None)
        if span is None:
            break
        mask[place] = start >= span[0] and end > start
    return mask
