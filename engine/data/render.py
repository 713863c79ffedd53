"""From a row to tokens and the mask of what is trained: one path for training, preview and evaluation.

Trained is an answer and the token that ends it, and nothing else: without the end token a model never learns
to stop. Spaces that come after the place where an answer begins are the model's to write, so they count too.
`template` says where the answers are in a chat's text; here the text becomes tokens. Where a token would reach over
the border of prompt and answer, the text is cut there: so it is tokenized when the model answers, too.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_tui.engine.data.chat import Chat, Row
from qlora_tui.engine.data.template import Span, Template, Written
from qlora_tui.engine.data.tokenizer import Tokenizer
from qlora_tui.engine.errors import BadRow, FenceError
from qlora_tui.engine.text import one_line

Encoded = tuple[list[int], list[Span]]
"""Token ids, and for each the characters it stands for."""
_THOUGHT_TOKENS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row as the model sees it: its number, its token ids (of 32 bits, "i"), and for each token 1 if it is a target to predict."""

    row: int
    input_ids: array[int]
    trained: bytes


class Renderer:
    """Renders rows for one tokenizer, keeping what it learned about the template; one instance a thread."""

    def __init__(self, tokenizer: Tokenizer, *, mask_history: bool = False) -> None:
        """Learn how the template of `tokenizer` ends an answer; with `mask_history` only the last answer of a chat is trained."""
        self.tokenizer = tokenizer
        self.mask_history = mask_history
        self._template = Template(tokenizer) if tokenizer.template else None
        self._added_ids = frozenset(tokenizer.added.values())
        control = [text for text, index in tokenizer.added.items() if index in tokenizer.control_ids and text not in _THOUGHT_TOKENS]
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")

    def tokens(self, row: Row) -> TokenRow:
        """Render, encode and mask one row.

        Raises:
            BadRow: the reason why it cannot be trained; it counts rows of a kind, so it names no row.
        """
        written = self.begin(row.chat)
        return self.finish(row, written, None if written is None else self._encode(written.text))

    def begin(self, chat: Chat) -> Written | None:
        """Write a chat out as the text that is to be encoded; None if it is no single text but token ids, or pieces.

        Raises:
            BadRow: as `tokens`.
        """
        return None if chat.ids is not None or chat.verbatim == "segments" else self._written(chat)

    def finish(self, row: Row, written: Written | None, encoded: Encoded | None) -> TokenRow:
        """Mask a row of which `begin` gave `written`, and the tokenizer `encoded` of its text.

        Raises:
            BadRow: as `tokens`.
        """
        if written is None or encoded is None:
            ids, mask = self._given(row.chat.ids) if row.chat.ids is not None else self._pieces(row.chat.segments)
        else:
            ids, mask = self._placed(written, *encoded)
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
        if self._template is None:
            return tuple(found)
        if self._template.folds_system:
            found.append("The chat template takes no system turn: it was put before the first question.")
        if not self._template.ending:
            found.append(f"The chat template does not end the last answer: {self._template.closing} was added and is trained.")
        if self._template.drops_thoughts:
            found.append("The chat template leaves out thoughts of answers: what it leaves out is not trained.")
        if self.tokenizer.bos and not self._template.beginning.startswith(self.tokenizer.bos):
            found.append(f"The chat template does not begin with {self.tokenizer.bos}, as other texts do: rows are trained without it.")
        if stop := self._template.unknown_stop():
            found.append(f"Answers end with {stop}, no stop token by the model's files: whoever serves the adapter has to name it.")
        return tuple(found)

    def _given(self, given: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[list[int], bytearray]:
        """Take token ids as they are, if they are this model's."""
        ids, trained = given
        if len(ids) != len(trained):
            raise BadRow(f"{len(ids)} token ids and {len(trained)} labels do not belong together")
        unknown = next((index for index in ids if not 0 <= index < self.tokenizer.vocab_size), None)
        if unknown is not None:
            raise BadRow(
                f"token id {unknown} is none of this model's {self.tokenizer.vocab_size}", hint="the row was made with another tokenizer"
            )
        return list(ids), bytearray(map(bool, trained))

    def _pieces(self, segments: Sequence[tuple[str, bool]]) -> tuple[list[int], bytearray]:
        """Encode each piece on its own, so that what is trained ends exactly where the data says."""
        ids: list[int] = []
        mask = bytearray()
        for text, trained in segments:
            found, _ = self._encode(text)
            ids += found
            mask += bytes([trained]) * len(found)
        return ids, mask

    def _written(self, chat: Chat) -> Written:
        begin = len(self.tokenizer.bos)
        if chat.verbatim:
            text = self.tokenizer.bos + chat.turns[0].content
            return Written(text + self._eos(), [(begin, len(text))], [(begin, len(text + self._eos()))])
        if chat.plain and (self._template is None or self.tokenizer.assumed):
            prompt, answer = chat.turns[0].content, chat.turns[1].content
            start = begin + len(prompt)
            text = self.tokenizer.bos + prompt + answer
            return Written(text + self._eos(), [(begin, start), (start, len(text))], [(start, len(text + self._eos()))])
        if self._template is None:
            raise BadRow(
                "the model has no chat template, so a chat cannot be written out",
                hint="choose an instruct model, or give prompt and completion",
            )
        return self._template.write(self._last_only(chat) if self.mask_history else chat)

    def _last_only(self, chat: Chat) -> Chat:
        """Return the chat with its last answer trained only.

        Raises:
            BadRow: the data says not to train that one.
        """
        answers = [index for index, turn in enumerate(chat.turns) if turn.role == "assistant"]
        if answers and not chat.turns[answers[-1]].trained:
            raise BadRow("mask_history trains the last answer only, and the row marks it as not to be trained")
        turns = tuple(replace(turn, trained=index == answers[-1]) if index in answers else turn for index, turn in enumerate(chat.turns))
        return replace(chat, turns=turns)

    def _placed(self, written: Written, ids: list[int], offsets: list[Span]) -> tuple[list[int], bytearray]:
        self._refuse_control_tokens(written, ids, offsets)
        borders = sorted({place for span in written.trained for place in span if self._crossing(place, ids, offsets)})
        if borders:
            ids, offsets = self._cut(written, borders, ids, offsets)
        return ids, _mask(offsets, written.trained)

    def _encode(self, text: str) -> Encoded:
        try:
            return self.tokenizer.encode(text)
        except FenceError:
            raise
        except Exception as error:  # noqa: BLE001  (the Rust side raises plain Exception)
            raise BadRow(f"the tokenizer cannot read it ({one_line(error, limit=120)})") from None

    def _crossing(self, place: int, ids: Sequence[int], offsets: Sequence[Span]) -> bool:
        """Say whether a token begins before this place of the text and ends after it; an added token that takes spaces along may."""
        index = bisect_left(offsets, (place, -1)) - 1
        return index >= 0 and offsets[index][1] > place and ids[index] not in self._added_ids

    def _cut(self, written: Written, borders: Sequence[int], ids: Sequence[int], offsets: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Encode the text in parts that end at the borders, and make sure that the parts say the same as the whole.

        Tokenizers that begin every text with a space cannot be cut. Then a token over the border counts to the prompt,
        if it takes nothing of the answer but spaces.
        """
        found: list[int] = []
        places: list[Span] = []
        for start, end in zip([0, *borders], [*borders, len(written.text)], strict=True):
            part, spans = self._encode(written.text[start:end])
            found += part
            places += [(first + start, last + start) for first, last in spans]
        if self.tokenizer.decode(found) == self.tokenizer.decode(ids):
            return found, places
        for place in borders:
            token = offsets[bisect_left(offsets, (place, -1)) - 1]
            if written.text[place : token[1]].strip() and any(place == start for start, _ in written.trained):
                raise BadRow("the answer begins in the middle of a token", hint="end the prompt with a space or a new line")
        return list(ids), list(offsets)

    def _eos(self) -> str:
        if not self.tokenizer.eos:
            raise BadRow("the tokenizer has no token that ends a text")
        return self.tokenizer.eos

    def _refuse_control_tokens(self, written: Written, ids: Sequence[int], offsets: Sequence[Span]) -> None:
        """Refuse text that holds a control token of the model: it would end a turn or begin one in the middle of a text."""
        control = self.tokenizer.control_ids
        for first, last in written.given:
            begin, stop = bisect_left(offsets, (first, -1)), bisect_left(offsets, (last, -1))
            if control.isdisjoint(ids[begin:stop]):
                continue
            for place in range(begin, stop):
                start, end = offsets[place]
                text = written.text[start:end].strip()
                if ids[place] in control and self.tokenizer.added.get(text) == ids[place]:
                    raise _holds(text)
        for part in written.loose:
            if found := self._control.search(part):
                raise _holds(found.group())


def _holds(token: str) -> BadRow:
    return BadRow(f"its text holds {one_line(token, limit=40)}, a control token of this model", hint="remove it from the text")


def _mask(offsets: Sequence[Span], trained: Sequence[Span]) -> bytearray:
    """Mark each token that begins inside a trained span; both lists are in order of the text."""
    mask = bytearray(len(offsets))
    for first, last in trained:
        start, stop = bisect_left(offsets, (first, -1)), bisect_left(offsets, (last, -1))
        mask[start:stop] = bytes([end > begin for begin, end in offsets[start:stop]])
    return mask
