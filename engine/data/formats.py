"""The formats there are, and how one is chosen: by scored evidence, told in a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qlora_tui.engine.data.alpaca import Alpaca
from qlora_tui.engine.data.chat import Format
from qlora_tui.engine.data.messages import Messages
from qlora_tui.engine.data.prompt_completion import PromptCompletion
from qlora_tui.engine.errors import DataError
from qlora_tui.engine.spec import nearest
from qlora_tui.engine.text import one_line

FORMATS: tuple[Format, ...] = (Messages(), Alpaca(), PromptCompletion())
"""Every format, in the order that breaks a tie."""


def detect(rows: Sequence[Mapping[str, object]], wanted: str = "auto") -> tuple[Format, str]:
    """Return the format of `rows` and the sentence that says why; `wanted` other than `auto` is obeyed.

    Raises:
        DataError: no format fits; the keys that were found and the known shapes are named.
    """
    if wanted != "auto":
        return _named(wanted), f"{wanted}, as data_format says"
    scores = [(form.score(rows), form) for form in FORMATS]
    best = max(score for score, _ in scores)
    if best <= 0:
        raise DataError(f"no known format fits: the rows hold {_keys(rows)}", hint=_shapes(rows))
    fitting = [form for score, form in scores if score == best]
    whole = sum(fitting[0].score([row]) == 1 for row in rows)
    why = f"{fitting[0].name}: {whole} of the {len(rows)} rows looked at fit"
    if len(fitting) > 1:
        why += f"; {' and '.join(form.name for form in fitting[1:])} would fit too: --set data_format=NAME chooses"
    return fitting[0], why


def _named(wanted: str) -> Format:
    for form in FORMATS:
        if form.name == wanted:
            return form
    raise DataError(
        f"no data format is called {one_line(wanted, limit=60)!r}", hint=f"known are {', '.join(form.name for form in FORMATS)}"
    )


def _keys(rows: Sequence[Mapping[str, object]]) -> str:
    counted = Counter(key for row in rows for key in row)
    names = ", ".join(repr(one_line(key, limit=40)) for key, _ in counted.most_common(6))
    return f"the keys {names}" if names else "no keys"


def _shapes(rows: Sequence[Mapping[str, object]]) -> str:
    known = ("messages", "instruction", "output", "prompt", "completion")
    close = next((f"{hint} " for row in rows[:1] for key in row if (hint := nearest(key, known))), "")
    return close + "known shapes: " + " or ".join(form.shape for form in FORMATS)
