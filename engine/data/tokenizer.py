"""The tokenizer of a model folder, read without torch and never shared.

One path serves preview, training and evaluation: text is rendered once with the model's chat template and
encoded once, with no special token added behind the template's back. Every load gives an object of its own,
because truncation and padding are changeable state inside the fast tokenizer and a second thread would change ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.text import one_line

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
OLDER_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
_DATE = datetime(2024, 7, 26)
"""Templates that print today's date get this one: the same rows must give the same tokens tomorrow, or a resume is not exact."""

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Tokenizer:
    """Chat text to token ids and back; `note` tells, in a sentence, what had to be assumed (empty: nothing)."""

    def __init__(self, inner: Any, *, folder: Path | None = None, note: str = "") -> None:
        """Take over `inner`, a fast tokenizer of transformers, which nobody else may use from now on."""
        from tokenizers.processors import ByteLevel

        self._inner = inner
        self._backend = inner.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        # Only this step trims spaces off the reported offsets; without it every character belongs to its token.
        self._adds_bos = _adds_bos(inner)
        self._backend.post_processor = ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        self._folder = folder
        self.template, assumed = _template(inner)
        self.note = " ".join(part for part in (note, assumed) if part)
        self.eos_id: int | None = inner.eos_token_id
        self.bos_id: int | None = inner.bos_token_id
        pads = (inner.pad_token_id, inner.eos_token_id, 0)
        self.pad_id: int = next(pad for pad in pads if pad is not None)
        self.vocab_size: int = len(inner)
        added = inner.added_tokens_decoder
        self.added: Mapping[str, int] = {token.content: index for index, token in added.items()}
        self.control_ids = frozenset(index for index, token in added.items() if token.special) | ({self.eos_id} - {None})

    def render(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool = False) -> str:
        """Return the chat as the text the model sees; with `answer_next` it ends where an answer begins.

        Raises:
            ModelError: the model has no chat template.
            jinja2.TemplateError: the template refuses this chat.
        """
        if not self.template:
            raise ModelError("the model has no chat template", hint="choose an instruct model, or give rows with prompt and completion")
        text = self._inner.apply_chat_template(
            list(messages),
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=answer_next,
            date_string=_DATE.strftime("%d %b %Y"),
            strftime_now=_DATE.strftime,
        )
        return str(text)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids and, for each, the characters of `text` it stands for."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included, nothing tidied."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def token(self, index: int) -> str:
        """Return the text of one token, as a preview shows it."""
        return self.decode([index]) or str(self._backend.id_to_token(index) or "")

    @property
    def eos(self) -> str:
        """The end-of-text token as text; empty when the model has none."""
        return str(self._inner.eos_token or "")

    @property
    def bos(self) -> str:
        """The token that plain text starts with; empty when this tokenizer adds none."""
        return str(self._inner.bos_token or "") if self._adds_bos else ""

    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end an answer when the model is used: the tokenizer's and those of `generation_config.json`."""
        found = {self.eos_id} if self.eos_id is not None else set()
        for name in ("generation_config.json", "config.json"):
            value = _read_json(self._folder / name).get("eos_token_id") if self._folder else None
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
        return frozenset(found)

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files as the model has them, and the chat template used, so that serving renders what was trained."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if self._folder and (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)
        if self.template:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a model folder; nothing is downloaded and no code of the model runs.

    Raises:
        ModelError: there is no tokenizer in it, or one that cannot say which characters a token stands for.
    """
    folder = Path(folder)
    shown = one_line(folder)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(_from_json(folder), folder=folder)
    if not any((folder / name).is_file() for name in OLDER_FILES):
        raise ModelError("no tokenizer.json in it", hint="a model folder holds config.json, tokenizer.json and *.safetensors", where=shown)
    inner = _from_older_files(folder)
    if not inner.is_fast:
        raise ModelError(
            "its tokenizer has no fast version, so no mask can be made", hint="a model with tokenizer.json is needed", where=shown
        )
    return Tokenizer(inner, folder=folder, note="The model has no tokenizer.json: its older files were converted, which takes longer.")


def _from_json(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        with _quiet():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  (the Rust side raises plain Exception)
        raise ModelError(f"its tokenizer cannot be read ({one_line(error, limit=200)})", where=one_line(folder)) from None


def _from_older_files(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (a missing sentencepiece, a broken file: all end the same way)
        fault = f"it has no tokenizer.json and its older files cannot be read ({one_line(error, limit=200)})"
        raise ModelError(fault, hint="a model with tokenizer.json is needed", where=one_line(folder)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing advice into the screen while it loads."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _template(inner: Any) -> tuple[str, str]:
    """Return the chat template and the sentence about it, if it is not simply the model's own."""
    found = inner.chat_template
    if isinstance(found, Mapping):
        found = found.get("default") or next(iter(found.values()), "")
    if found:
        return str(found), ""
    vocabulary = inner.get_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return _CHATML, "The model has no chat template but knows the ChatML tokens: ChatML is used."
    return "", "The model has no chat template: prompt and completion are written one after the other, nothing between them."


def _adds_bos(inner: Any) -> bool:
    if inner.bos_token_id is None:
        return False
    return list(inner.backend_tokenizer.encode("a").ids)[:1] == [inner.bos_token_id]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
