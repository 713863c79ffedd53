"""Runs beside each other: what was set differently, what came of it, and their curves on one plot. No textual."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine import preset
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.journal import EVENTS
from qlora_tui.engine.runs import RUN_FILE, RunInfo, read_info
from qlora_tui.engine.spec import KEYS
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import count, gib, words
from qlora_tui.tui.follow import Follower
from qlora_tui.tui.printer import table
from qlora_tui.tui.state import RunState, spent

MOST = 6
"""Runs at once: more curves than colours that can be told apart help nobody."""
LETTERS = "ABCDEF"
_TELL_SECONDS = 0.3
_MEASURED_BY = (
    *("model_name_or_path", "revision", "data", "data_format", "data_columns", "data_weights", "chat_template", "mask_history"),
    *(
        "eval_data",
        "val_set_size",
        "max_samples",
        "too_long",
        "filter_duplicates",
        "perplexity_filter",
        "max_length",
        "skip_bad_rows",
        "seed",
    ),
)
"""The keys that decide which rows and tokens are held out: where one differs, held-out losses do not compare."""
_NO_RESULT = ("runs_dir", "notify", "report_to")
"""Keys that say nothing of what is trained."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One run: how it stands, its events folded, and its settings."""

    info: RunInfo
    state: RunState
    config: Mapping[str, Any]

    @property
    def loss(self) -> float | None:
        """Return the loss at the end, smoothed: one step's own is mostly chance."""
        return self.state.history.smooth

    @property
    def held_out(self) -> float | None:
        """Return the last held-out loss."""
        return self.state.evals[-1][1] if self.state.evals else None

    @property
    def base(self) -> float | None:
        """Return the base's held-out loss, as measured at step 0 or for the scorecard."""
        card = self.state.scorecard
        return self.state.base_loss if self.state.base_loss is not None or card is None else card.base_loss

    @property
    def seconds(self) -> float:
        """Return how long it worked, without the time between attempts."""
        return spent(self.state, self.state.t)


def look(folder: Path, tell: Callable[[float | None, str], object] = lambda share, text: None) -> Compared:
    """Read the run in `folder` to its end, telling how far; a million steps take some fifteen seconds."""
    follower = Follower(folder / EVENTS, folder.name)
    while follower.behind:
        follower.look(_TELL_SECONDS)
        tell(follower.share, f"reading {one_line(folder.name)}")
    return Compared(read_info(folder), follower.state, _config(folder, follower.state))


def differences(runs: Sequence[Compared]) -> dict[str, tuple[Any, ...]]:
    """Return the settings that are not the same in all runs, in the table's order; one that a run did not know has its default."""
    found = {}
    for name, key in KEYS.items():
        values = tuple(_comparable(run.config.get(name, key.default)) for run in runs)
        if name not in _NO_RESULT and any(value != values[0] for value in values):
            found[name] = values
    return found


def note(runs: Sequence[Compared]) -> str:
    """Return why held-out losses of these runs cannot be compared, or nothing."""
    apart = [name for name in differences(runs) if name in _MEASURED_BY]
    if not apart or sum(run.held_out is not None for run in runs) < 2:
        return ""
    return f"held-out losses are not of the same rows and tokens ({', '.join(apart)}): compare each with its own base"


def document(runs: Sequence[Compared]) -> dict[str, Any]:
    """Return what `runs compare --json` prints."""
    changed = [{"key": name, "values": list(values)} for name, values in differences(runs).items()]
    return {"runs": [_row(run) for run in runs], "differences": changed, "note": note(runs)}


def lines(runs: Sequence[Compared]) -> str:
    """Return the comparison for people: who is who, what came of each, what was set differently."""
    heads = LETTERS[: len(runs)]
    who = "".join(f"{letter}  {one_line(run.info.id)}  {run.info.state}\n" for letter, run in zip(heads, runs, strict=True))
    facts = [(label, *(text(run) for run in runs)) for label, text in _FACTS if any(text(run) for run in runs)]
    changed = [(name, *(_shown(value) for value in values)) for name, values in differences(runs).items()]
    parts = [who, table(("", *heads), facts)]
    parts.append(table(("set differently", *heads), changed) if changed else "all settings are the same\n")
    told = note(runs)
    return "\n".join([*parts, *([f"note: {told}\n"] if told else [])])


def _row(run: Compared) -> dict[str, Any]:
    card = run.state.scorecard
    return {
        "id": run.info.id,
        "state": run.info.state,
        "path": str(run.info.path),
        "started": run.info.started,
        "step": run.info.step,
        "total_steps": run.info.total_steps,
        "loss": run.loss,
        "held_out_loss": run.held_out,
        "base_loss": run.base,
        "drop": card.drop if card else None,
        "interval": list(card.interval) if card and card.interval else None,
        "verdict": card.verdict if card else "",
        "tokens_per_second": run.state.speed,
        "peak_bytes": run.state.peak_bytes,
        "seconds": run.seconds,
    }


def _config(folder: Path, state: RunState) -> Mapping[str, Any]:
    """Return the settings that the run began with; where it never began, those written down for it."""
    if state.config:
        return state.config
    try:
        return preset.read_file(folder / RUN_FILE)
    except ConfigError:
        return {}


def _comparable(value: Any) -> Any:
    """Return a value as it compares: a list as JSON keeps it is a tuple, and 1 is 1.0."""
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    return one_line(shown or "(empty)", limit=40)


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _drop(run: Compared) -> str:
    card = run.state.scorecard
    if card is None or card.drop is None:
        return ""
    return f"{card.drop:.4f}" + (f" ({card.interval[0]:.4f} to {card.interval[1]:.4f})" if card.interval else "")


_FACTS = (
    ("steps", lambda run: f"{run.info.step}/{run.info.total_steps}" if run.info.total_steps else ""),
    ("loss at the end", lambda run: _nats(run.loss)),
    ("held-out loss", lambda run: _nats(run.held_out)),
    ("its base", lambda run: _nats(run.base)),
    ("drop of rows", _drop),
    ("tokens a second", lambda run: count(round(run.state.speed)) if run.state.speed else ""),
    ("most memory", lambda run: gib(run.state.peak_bytes) if run.state.peak_bytes else ""),
    ("time", lambda run: words(run.seconds) if run.seconds >= 1 else ""),
)
"""What is shown of each run; a row that no run has anything for is left out."""
