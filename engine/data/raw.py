"""A row as it was found in a file, before any format has looked at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_tui.engine.errors import BadRow

MAX_ROW_BYTES = 16 * 2**20
"""A longer row is refused unread: no row of text to train on is that long, and a hostile one must not fill the memory."""

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as found: its line (None where there are no lines) and its fields, or what is wrong with it."""

    line: int | None
    fields: Mapping[str, object] | BadRow


def too_long(limit: int) -> BadRow:
    """Return what is said about a line of more than `limit` bytes."""
    return BadRow(f"the line is longer than {limit // 2**20} MiB", hint="one row a line; is a line break missing?")
