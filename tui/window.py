"""What reaches the terminal beside the cells: the window's title, copies, and a hint for those who come over SSH.

Nothing foreign goes out of band: a title is made of our own words and of numbers, and is stripped to printable ASCII
all the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_tui.engine.places import place, replace_file
from qlora_tui.tui import words
from qlora_tui.tui.state import RunState

KEEP_TITLE = "\x1b[22;2t"
"""Have the terminal remember its title (XTWINOPS 22), which xterm, tmux, kitty, foot, VTE and others do."""
TITLE_BACK = "\x1b]2;\x07\x1b[23;2t"
"""Empty the title, for a terminal that remembered none, then put the old one back (XTWINOPS 23)."""
_LONGEST = 60
_COPY = "last-copy.txt"


def has_title(environment: Mapping[str, str]) -> bool:
    """Say whether the terminal has a title: the Linux console and real VTs would print it, or a part of it."""
    term = environment.get("TERM", "")
    return bool(term) and term not in ("linux", "dumb") and not term.startswith("vt")


def title(text: str) -> str:
    """Return the sequence that sets the window's title; nothing of `text` but printable ASCII goes into it."""
    return f"\x1b]2;{_plain(text)}\x07"


def run_title(state: RunState, now: float, *, lost: bool = False) -> str:
    """Return the title of a run, such as `qlora 43% loss 1.23 left 12 min`."""
    loss = state.history.smooth if state.history.smooth is not None else state.last.loss if state.last else None
    shown = f" loss {loss:.2f}" if loss is not None else ""
    if state.finished or lost:
        return _plain(f"qlora {state.finished.outcome.replace('_', ' ') if state.finished else 'crashed'}{shown}")
    if not state.last or not state.total_steps:
        return _plain(f"qlora {state.doing.name if state.doing else 'starting'}")
    left = ""
    if state.forecast and state.step < state.total_steps:
        left = f" left {words.duration(max(0.0, state.forecast.seconds_left[1] - max(0.0, now - state.forecast_at)))}"
    return _plain(f"qlora {100 * state.step // state.total_steps}%{shown}{left}")


def ssh_hint(environment: Mapping[str, str]) -> str:
    """Return what to tell somebody whose line may break; nothing where it cannot, or where tmux or screen holds it."""
    if not environment.get("SSH_CONNECTION") or environment.get("TMUX") or environment.get("STY"):
        return ""
    return "Over SSH without tmux: a lost line ends this screen, never the run; `qlora-tui attach` brings it back."


def keep_copy(text: str, folders: Sequence[Path]) -> Path | None:
    """Write `text` into the first of `folders` that can be written, else into the state folder; None if none can.

    A clipboard over a terminal is fire-and-forget: many ignore it, so what was copied can always be had from a file.
    """
    for folder in (*folders, place("state")):
        try:
            replace_file(folder / _COPY, text + "\n")
        except OSError:
            continue
        return folder / _COPY
    return None


def copy_words(path: Path | None) -> str:
    """Return what is said after a copy: whether the terminal took it cannot be known."""
    sent = "sent to the terminal's clipboard, if it allows that"
    return f"{sent}; also in {_near(path)}" if path else f"{sent}; no file could be written"


def _near(path: Path) -> str:
    """Return `path` as it is shortest from here."""
    try:
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    except OSError:  # the working folder is gone
        return str(path)


def _plain(text: str) -> str:
    return "".join(char for char in text if char.isascii() and char.isprintable())[:_LONGEST]
