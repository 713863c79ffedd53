"""What an exported folder makes of a chat, and where it stops, read from its own files as a server reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from qlora_tui.engine.data import Chat, Tokenizer, load_tokenizer

Messages = list[Mapping[str, str]]


def versions(*names: str) -> str:
    """Return libraries with their versions, such as `transformers 5.24.0, peft 0.21.2`."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def asked(chat: Chat) -> Messages | None:
    """Return the turns before the last answer of a chat as messages, or None if there is none, or more than plain turns.

    Space around a text is taken off: nobody types it, and some templates drop it.
    """
    last = max((place for place, turn in enumerate(chat.turns) if turn.role == "assistant"), default=0)
    turns = chat.turns[:last]
    if chat.ids is not None or chat.verbatim or not turns or chat.tools:
        return None
    if any(turn.role == "tool" or turn.tool_calls or turn.thoughts for turn in turns):
        return None
    return [{"role": turn.role, "content": turn.content.strip()} for turn in turns]


def folded(messages: Sequence[Mapping[str, str]]) -> Messages:
    """Put a system turn before the first question, as training does for templates that take none."""
    if len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
        content = "\n\n".join(message["content"] for message in messages[:2] if message["content"])
        return [{"role": "user", "content": content}, *messages[2:]]
    return list(messages)


def prompt_text(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str | None:
    """Return the text that an answer to `messages` begins after; None where the template refuses them.

    Without a template it is the question alone, as rows of prompt and completion are trained.
    """
    if not tokenizer.template:
        return tokenizer.bos + messages[0]["content"] if len(messages) == 1 else None
    wanted = messages[0]["content"] if messages[0]["role"] == "system" else ""
    for turns in (messages, folded(messages)):
        try:
            text = tokenizer.render(turns, answer_next=True)
        except Exception:  # noqa: BLE001  (a template is a program: it raises what it likes)
            continue
        if wanted in text:
            return text
    return None


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a prompt; a template and a tokenizer that both begin a text begin it once."""
    ids = tokenizer.encode(text)[0]
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id else ids


def prompt_texts(chats: Sequence[Chat], write: Callable[[Messages], str | None]) -> list[str | None]:
    """Return what `write` makes of the turns before the last answer of each chat; None where there are none, or more than turns."""
    found = [asked(chat) for chat in chats]
    return [None if messages is None else write(messages) for messages in found]


def prompts_with(tokenizer: Tokenizer, chats: Sequence[Chat]) -> list[list[int] | None]:
    """Return the tokens before the last answer of each chat, by this tokenizer and its template.

    A prompt and its completion are no chat where the template is only assumed: they were trained without it.
    """
    texts = prompt_texts(chats, lambda messages: prompt_text(tokenizer, messages))
    return [
        None if text is None or (chat.plain and tokenizer.assumed) else prompt_ids(tokenizer, text)
        for chat, text in zip(chats, texts, strict=True)
    ]


def prompts_of_folder(folder: Path) -> Callable[[Sequence[Chat]], list[list[int] | None]]:
    """Return the same by the tokenizer that lies in `folder`."""
    tokenizer = load_tokenizer(folder)
    return lambda chats: prompts_with(tokenizer, chats)


def stops_of_folder(folder: Path) -> frozenset[int]:
    """Return the tokens that end an answer by the files of a model folder."""
    return load_tokenizer(folder).stop_ids()


def first_token(tokenizer: Tokenizer) -> str:
    """Return the text of the token that begins texts, whether this tokenizer puts it there itself or not; empty if it has none."""
    return next((text for text, index in tokenizer.added.items() if index == tokenizer.bos_id), "")
