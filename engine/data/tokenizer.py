"""The tokenizer of a model folder, read without torch and never shared.

One path serves preview, training and evaluation: text is rendered once with the model's chat template and
encoded once, with no special token added behind the template's back. Every load gives an object of its own,
because truncation and padding are changeable state inside the fast tokenizer and a second thread would change ours.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tui.engine.data.jinja import compiled, fixed_date
from qlora_tui.engine.errors import FenceError, ModelError
from qlora_tui.engine.text import one_line

if TYPE_CHECKING:
    from tokenizers import Encoding

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
_MORE_TEMPLATES = "additional_chat_templates"
OLDER_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


IMPORTING = threading.RLock()
"""Held while transformers is imported, by whichever thread: the second of two would find half of it and fail."""


class Tokenizer:
    """Chat text to token ids and back; `note` tells, in a sentence, what had to be assumed (empty: nothing)."""

    def __init__(self, inner: Any, *, folder: Path | None = None, note: str = "", chat_template: str = "auto") -> None:
        """Take over `inner`, a fast tokenizer of transformers, which nobody else may use from now on.

        `chat_template` is the run's: auto or chatml. `assumed` says that the template is ChatML only because the vocabulary
        has its tokens; then a prompt and its completion stay plain text.

        Raises:
            ModelError: ChatML is asked for and the vocabulary lacks its tokens.
        """
        from tokenizers.processors import ByteLevel

        self._inner = inner
        self._owner: threading.Thread | None = None
        self._backend = inner.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        # Only this step trims spaces off the reported offsets; without it every character belongs to its token.
        self._adds_bos = _adds_bos(inner)
        self._backend.post_processor = ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        self._folder = folder
        self.template, self.assumed, told = _template(inner, chat_template)
        self._tool_template = _tool_template(inner) if chat_template == "auto" else ""
        self.note = " ".join(part for part in (note, told) if part)
        self._special: Mapping[str, Any] = dict(inner.special_tokens_map)
        self._date = fixed_date()
        self._compiled: dict[str, Callable[..., str]] = {}
        self.eos_id: int | None = inner.eos_token_id
        self.bos_id: int | None = inner.bos_token_id
        pads = (inner.pad_token_id, inner.eos_token_id, 0)
        self.pad_id: int = next(pad for pad in pads if pad is not None)
        self.vocab_size: int = len(inner)
        added = inner.added_tokens_decoder
        self.added: Mapping[str, int] = {token.content: index for index, token in added.items()}
        self.control_ids = frozenset(index for index, token in added.items() if token.special) | ({self.eos_id} - {None})

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (), answer_next: bool = False) -> str:
        """Return the chat as the text the model sees; with `answer_next` it ends where an answer begins.

        A model with a template of its own for tools has it used when there are `tools`.

        Raises:
            ModelError: the model has no chat template.
            jinja2.TemplateError: the template refuses this chat.
        """
        if not self.template:
            raise ModelError("the model has no chat template", hint="choose an instruct model, or give rows with prompt and completion")
        template = self._tool_template if tools and self._tool_template else self.template
        if template not in self._compiled:
            self._compiled[template] = compiled(template)
        return self._compiled[template](
            messages=messages,
            tools=tools or None,
            documents=None,
            add_generation_prompt=answer_next,
            date_string=self._date,
            **self._special,
        )

    def claim(self) -> Tokenizer:
        """Bind this tokenizer to the calling thread and return it; what training reads belongs to the owner of the run."""
        self._owner = threading.current_thread()
        return self

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids and, for each, the characters of `text` it stands for.

        Raises:
            FenceError: another thread claimed this tokenizer, or somebody made it cut or pad behind its owner's back.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        if self._owner is not None:
            self._check(self._owner)
        return encoding.ids, encoding.offsets

    def encode_many(self, texts: Sequence[str]) -> Sequence[Encoding]:
        """Return what the tokenizer makes of each text, `ids` and `offsets` as of `encode`; other threads of Python run meanwhile.

        Its caller's own thread may be another than the owner's: rows are encoded ahead of where they are rendered.

        Raises:
            FenceError: somebody made the tokenizer cut or pad behind its owner's back.
            Exception: it cannot read one of them; which, it does not say.
        """
        found: Sequence[Encoding] = self._backend.encode_batch(texts, add_special_tokens=False)
        if self._owner is not None:
            self._check_settings()
        return found

    def _check(self, owner: threading.Thread) -> None:
        """Hold the claim; looked at after the work, so that what happened meanwhile is seen and the result is not used."""
        caller = threading.current_thread()
        if caller is not owner:
            raise FenceError(f"thread {caller.name!r} used the tokenizer that {owner.name!r} owns", hint="please report this")
        self._check_settings()

    def _check_settings(self) -> None:
        if self._backend.truncation is not None or self._backend.padding is not None:
            raise FenceError("the tokenizer of the training rows was made to cut or pad them", hint="please report this")

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

    def as_json(self) -> str:
        """Return vocabulary and rules in the form of tokenizer.json, with the tokens that only its other files name."""
        return str(self._backend.to_str())

    def digest(self) -> str:
        """Return a fingerprint of everything that decides what text and tokens a row becomes: vocabulary, rules, templates, stops."""
        state = blake2b(self._backend.to_str().encode(), digest_size=16)
        parts = (self.template, self._tool_template, self.assumed, self._adds_bos, self._special, sorted(self.stop_ids()))
        state.update(repr(parts).encode("utf-8", "replace"))
        return state.hexdigest()

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files as the model has them, and the chat template used, so that serving renders what was trained."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if self._folder and (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)
        if self.template:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        if self._tool_template:
            (folder / _MORE_TEMPLATES).mkdir(exist_ok=True)
            (folder / _MORE_TEMPLATES / "tool_use.jinja").write_text(self._tool_template, encoding="utf-8")


def load_tokenizer(folder: Path, chat_template: str = "auto") -> Tokenizer:
    """Read the tokenizer of a model folder; nothing is downloaded and no code of the model runs.

    `chat_template` is the run's: `auto`, the model's own, or `chatml`.

    Raises:
        ModelError: there is no tokenizer in it, or one that cannot say which characters a token stands for, or one without
            the tokens of the template asked for.
    """
    with IMPORTING:
        return _load(Path(folder), chat_template)


def _load(folder: Path, chat_template: str) -> Tokenizer:
    shown = one_line(folder)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(_from_json(folder), folder=folder, chat_template=chat_template)
    if not any((folder / name).is_file() for name in OLDER_FILES):
        raise ModelError("no tokenizer.json in it", hint="a model folder holds config.json, tokenizer.json and *.safetensors", where=shown)
    inner = _from_older_files(folder)
    if not inner.is_fast:
        raise ModelError(
            "its tokenizer has no fast version, so no mask can be made", hint="a model with tokenizer.json is needed", where=shown
        )
    note = "The model has no tokenizer.json: its older files were converted, which takes longer."
    return Tokenizer(inner, folder=folder, note=note, chat_template=chat_template)


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


def _template(inner: Any, wanted: str) -> tuple[str, bool, str]:
    """Return the chat template, whether it is only assumed, and the sentence about it if it is not simply the model's own."""
    found = inner.chat_template
    if isinstance(found, Mapping):
        found = found.get("default") or next(iter(found.values()), "")
    known = all(_is_one_token(inner, text) for text in _CHATML_TOKENS)
    if wanted == "chatml":
        if not known:
            raise ModelError(
                f"chat_template chatml needs the tokens {' and '.join(_CHATML_TOKENS)}, which the model's vocabulary lacks",
                hint="new tokens would have embeddings that were never trained; choose an instruct model, or give prompt and completion",
            )
        return _CHATML, False, "ChatML is used in place of the model's own chat template." if found else "ChatML is used, as asked for."
    if found:
        return str(found), False, ""
    if known:
        return _CHATML, True, "The model has no chat template but knows the ChatML tokens: ChatML is used for chats."
    return "", False, "The model has no chat template: prompt and completion are written one after the other, nothing between them."


def _tool_template(inner: Any) -> str:
    """Return the template a model keeps for chats with tools beside its usual one; empty if there is none."""
    found = inner.chat_template
    return str(found.get("tool_use") or "") if isinstance(found, Mapping) else ""


def _is_one_token(inner: Any, text: str) -> bool:
    """Say whether `text` is one token of the vocabulary and not merely made of several."""
    index = inner.get_vocab().get(text)
    return index is not None and list(inner.backend_tokenizer.encode(text, add_special_tokens=False).ids) == [index]


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
