"""Model files from the hub, by commit: asked for once, briefly, and never with code of theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A folder that holds a model's small files; `complete` says that the weights lie there too."""

    folder: Path
    commit: str = ""
    complete: bool = False
