"""Foreign text made safe to show: data, model output, file names and errors never reach a terminal raw.

Escape sequences in a dataset can write the clipboard, retitle the window or hide lines; Textual and plain
`print` both pass them through. Everything that is shown, journalled as text or logged goes through here once.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator

_KEPT = {"\n", "\t"}
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINER = "\u200d"  # zero-width joiner: needed inside emoji, harmless on its own
_MARKS = {"Mn", "Me"}
_MOST_MARKS = 8  # on one letter; no writing needs as many, and hundreds paint over the lines above and below
_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b")
_SECRET_NAMES = ("TOKEN", "API_KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "ACCESS_KEY", "WEBHOOK")
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")  # user and password, as proxies have them


def safe_text(text: object, *, limit: int = 20_000) -> str:
    r"""Return `text` with control, bidi and format characters shown as visible escapes.

    >>> safe_text("a\x1b]52;c;AAAA\x07b")
    'a\\x1b]52;c;AAAA\\x07b'
    """
    raw = text if isinstance(text, str) else str(text)
    cut = raw[:limit]
    shown = cut if cut.isascii() and cut.isprintable() else "".join(_visible_all(cut))
    return shown if len(raw) <= limit else f"{shown}… ({len(raw) - limit} more characters)"


def one_line(text: object, *, limit: int = 500) -> str:
    """Return `safe_text` with line breaks and tabs folded to single spaces, for a row of a log or table."""
    return " ".join(safe_text(text, limit=limit).split())


def redact(text: str) -> str:
    """Replace what looks like a credential, the value of every secret-named variable and a password in an address by `[redacted]`."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _is_secret(name.upper()):
            text = text.replace(value, "[redacted]")
    return _IN_ADDRESS.sub("[redacted]", _SECRET.sub("[redacted]", text))


def without_secrets(error: object, *, limit: int = 500) -> str:
    """Return an error of somebody else as one line without a secret; those go first, so that no cut leaves half of one."""
    return one_line(redact(str(error)), limit=limit)


def _is_secret(name: str) -> bool:
    return name.endswith("_KEY") or any(part in name for part in _SECRET_NAMES)


def _visible_all(text: str) -> Iterator[str]:
    marks = 0
    for char in text:
        category = unicodedata.category(char)
        marks = marks + 1 if category in _MARKS or char == _JOINER else 0
        kept = char in _KEPT or char == _JOINER or category not in _HIDDEN_CATEGORIES
        yield char if kept and marks <= _MOST_MARKS else _escape(ord(char))


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
