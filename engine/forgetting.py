"""General text to measure what a model forgets: passages that lie on every machine which can train at all.

Nothing is downloaded and nothing copied: the texts are those that installed packages bring along. Three kinds, so that no
single manner of writing decides: Python's own reference manual, what packages say about themselves, and their licences.
They differ from the demo's rows, which are docstrings. A base knows some of them by heart, and that is wanted: what was
learned well is where forgetting shows. Other versions of the packages bring slightly other texts, so figures of two machines
are not for comparing; base and tuned are always measured on the same ones.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from qlora_tui.engine.data import TokenRow

PASSAGES = 24
"""So many are measured, a third of each kind where all are there."""
PASSAGE_TOKENS = 96
"""Longer ones are cut off here: with `PASSAGES` that bounds the work to 2,304 tokens, twice."""
_CHARACTERS = 600
_LEAST_TOKENS = 16
_PROSE, _SHORTEST = 0.8, 300
_TOPICS = ("assignment", "attribute-access", "comparisons", "context-managers", "debugger", "naming", "objects", "typesseq")
_ABOUT = ("torch", "transformers", "datasets", "accelerate", "peft", "jinja2", "textual", "numpy")
_LICENCES = ("transformers", "numpy", "textual", "certifi", "typing-extensions", "torch", "regex", "tqdm")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text, what kind it is, and the package or topic that it is from."""

    kind: str
    source: str
    text: str


def passages() -> list[Passage]:
    """Return the passages, always in the same order; a package without its text is passed over."""
    return [*_cut(_manual()), *_cut(_descriptions()), *_cut(_licences())]


def rows_of(found: list[Passage], encode: Callable[[str], list[int]], begin: str, longest: int) -> list[TokenRow]:
    """Return `found` as rows whose every token is a target.

    Args:
        found: the passages; a row's number is its place among them, from 1.
        encode: text to token ids.
        begin: what the model's plain texts start with; nothing where it has no such token.
        longest: tokens of a row at most, where that is less than `PASSAGE_TOKENS`.
    """
    rows = []
    for number, passage in enumerate(found, 1):
        ids = encode(begin + passage.text)[: min(longest, PASSAGE_TOKENS)]
        if len(ids) >= _LEAST_TOKENS:
            rows.append(TokenRow(number, array("i", ids), b"\0" + b"\1" * (len(ids) - 1)))
    return rows


def _cut(texts: Iterator[Passage]) -> list[Passage]:
    """Return one passage of each text, from the first paragraph on with which it is prose, and no more than a third of all."""
    found = []
    for whole in texts:
        parts = _COMMENT.sub("", whole.text).replace("\r\n", "\n").split("\n\n")
        pieces = (text for place in range(1, len(parts)) if _is_prose(text := "\n\n".join(parts[place:])[:_CHARACTERS]))
        if text := next(pieces, ""):
            found.append(Passage(whole.kind, whole.source, text))
    return found[: PASSAGES // 3]


def _is_prose(text: str) -> bool:
    """Say whether `text` is long enough and mostly words: no grammar, badges or list of names."""
    words = sum(char.isalpha() or char == " " for char in text)
    return (
        len(text) > _SHORTEST
        and words >= _PROSE * len(text)
        and text.count("::=") + text.count("(c)") + text.count("http") + text.count("</") < 2
    )


def _manual() -> Iterator[Passage]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems put it into a package of its own
        return
    for name in _TOPICS:
        if name in topics:
            yield Passage("Python's reference manual", name, topics[name])


def _descriptions() -> Iterator[Passage]:
    for name in _ABOUT:
        try:
            about = metadata.metadata(name).json.get("description", "")
        except metadata.PackageNotFoundError:
            continue
        yield Passage("what packages say about themselves", name, str(about))


def _licences() -> Iterator[Passage]:
    for name in _LICENCES:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        place = next((file for file in files if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))), None)
        if place is None:
            continue
        try:
            yield Passage("licences", name, place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
