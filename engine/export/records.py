"""What was exported of a run: a record in every exported folder, and the list of them in the run's own."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from qlora_tui.engine.export.files import ADAPTER_FILES
from qlora_tui.engine.export.target import RECORD, Json, Source
from qlora_tui.engine.places import locked, replace_file
from qlora_tui.engine.shelf import digest_of

HOME, LIST = "export", "exports.json"
"""In the run's folder: where exports go unless they are sent elsewhere, and the list of all."""
_MOST = 50


def read_list(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the run in `folder`, oldest first; none if there is no list that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / LIST).read_text(encoding="utf-8"))
        if isinstance(found, list) and all(isinstance(record, dict) for record in found):
            return found
    return []


def remember(folder: Path, record: Json) -> None:
    """Add a record to the run's list; it takes the place of an older one of the same folder."""
    with locked(folder / LIST):
        kept = [other for other in read_list(folder) if other.get("path") != record["path"]][-_MOST:]
        replace_file(folder / LIST, json.dumps([*kept, record], indent=2) + "\n")


def proved(source: Source, name: str, kind: str = "") -> Path | None:
    """Return the run's own export of this target, if it is of the adapter as it is now and the gate let it pass."""
    folder = source.folder / HOME / name
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        same = record["adapter_sha256"] == adapter_digest(source) and record["type"] == kind
        whole = all((folder / file).stat().st_size == size for file, size in record["files"].items())
        return folder if same and whole and record["parity"]["passed"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def adapter_digest(source: Source) -> str:
    """Return the SHA-256 of the run's adapter."""
    return digest_of(source.adapter / ADAPTER_FILES[1])
