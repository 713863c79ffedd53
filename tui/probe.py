"""The test run of the article: a few real rows through real steps, so that hours are not guessed.

It is the product's own run in a process and a folder of its own: what is measured is what will be run. The folder
goes away; what stays is what this machine learned of its speed, which every later estimate rests on.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.engine import child, preset
from qlora_tui.engine.errors import EngineError, ExitCode, WontFit
from qlora_tui.engine.events import Finished, Phase, Stepped
from qlora_tui.engine.journal import EVENTS, Tail
from qlora_tui.engine.spec import RunConfig, rows_at_once
from qlora_tui.engine.units import count, gib, words

WARM_STEPS = 2
"""Steps left out of the figure: kernels are chosen and memory is claimed in them."""
_HELD_OUT = 1e-6  # a share, whose least is a tenth of few rows and 20 of many: enough to time a measurement
_LEAST_STEPS = 6


@dataclass(frozen=True, slots=True)
class Probed:
    """What the test run measured. `rows` are those of the steps counted, in `seconds` of training."""

    rows: int
    tokens: int
    seconds: float
    shortest: tuple[int, float]
    longest: tuple[int, float]
    peak_bytes: int

    @property
    def seconds_per_token(self) -> float:
        """Return seconds of one real token."""
        return self.seconds / self.tokens


def probe(
    run: RunConfig,
    rows: int,
    *,
    say: Callable[[str, int, int], object] = lambda phase, done, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Probed:
    """Train on `rows` rows of `run` in another process and measure it; nothing of it is kept but its speed.

    Args:
        run: what would be trained, with the planner's choices made, so that the same batches are measured.
        rows: how many rows go through.
        say: hears the phase, and how far it is, several times a second.
        stopping: asked several times a second; true ends it.

    Raises:
        Stopped: `stopping()` became true.
        WontFit: the longest batch does not fit.
        EngineError: the run itself said why it could not be.
    """
    with tempfile.TemporaryDirectory(prefix="qlora-tui-probe-") as folder:
        runs = Path(folder) / "runs"
        config = Path(folder) / "run.toml"
        config.write_text(preset.to_toml(dataclasses.replace(small(run, rows), runs_dir=str(runs))), encoding="utf-8")
        heard = _Heard(runs, say)
        command = [sys.executable, "-m", "qlora_tui.tui", "--no-ui", "--json", "--config", str(config)]
        ended = child.run(command, doing="measuring the speed", stopping=stopping, watch=heard.look)
        heard.look()
        if heard.finished is None or heard.finished.exit_code:
            raise refusal(heard.finished, ended, "the test run", "--probe")
        return heard.measured()


def small(run: RunConfig, rows: int) -> RunConfig:
    """Return `run` cut down to `rows` rows: few micro-batches a step, no checkpoint on the way, and few rows to measure at both ends.

    Rows that meet in a step are alike in length, so a step of one micro-batch would pad more than those of the run do.
    """
    from qlora_tui.engine.data import train_alone

    at_once = rows_at_once(run)
    parts = max(1, min(run.gradient_accumulation_steps, rows // (at_once * _LEAST_STEPS)))
    return dataclasses.replace(
        run,
        gradient_accumulation_steps=parts,
        per_device_train_batch_size=at_once,
        max_steps=max(WARM_STEPS + 2, math.ceil(rows / (at_once * parts))),
        max_time=0.0,
        until="",
        max_samples=0,
        val_set_size=_HELD_OUT,
        data=tuple(map(train_alone, run.data)),
        eval_data="",
        eval_steps=1 << 30,
        save_steps=1 << 30,
        notify=(),
        report_to=(),
        sample_prompts=(),
        final_checks=False,
        export_to=(),
        export_type="",
    )


def probe_lines(probed: Probed) -> list[str]:
    """Return what the test run measured, for people."""
    rate = 1 / probed.seconds_per_token
    ends = " and ".join(f"{1 / each:,.0f} tokens/s at {tokens:,} tokens a row" for tokens, each in (probed.shortest, probed.longest))
    return [f"test    {count(probed.rows)} rows in {words(probed.seconds)}: {rate:,.0f} tokens/s ({ends}); peak {gib(probed.peak_bytes)}"]


class _Heard:
    """What the test run has told so far."""

    def __init__(self, runs: Path, say: Callable[[str, int, int], object]) -> None:
        self._runs, self._say = runs, say
        self._tail: Tail | None = None
        self.steps: list[Stepped] = []
        self.finished: Finished | None = None

    def look(self) -> None:
        """Read on in the journal once there is one."""
        if self._tail is None:
            journals = list(self._runs.glob(f"*/{EVENTS}"))
            if not journals:
                return
            self._tail = Tail(journals[0])
        for record in self._tail.records():
            match record.event:
                case Phase(name=name, state="begin", total=total):
                    self._say(name, 0, total or 0)
                case Stepped() as step:
                    self.steps.append(step)
                    self._say("train", step.step, step.total_steps)
                case Finished() as finished:
                    self.finished = finished

    def measured(self) -> Probed:
        """Return the figures of the steps after the first ones."""
        counted = self.steps[WARM_STEPS:]
        each = sorted((step.tokens / max(1, len(step.rows)), step.seconds / step.tokens) for step in counted)
        part = max(1, len(each) // 4)
        return Probed(
            rows=sum(len(step.rows) for step in counted),
            tokens=sum(step.tokens for step in counted),
            seconds=sum(step.seconds for step in counted),
            shortest=_middle(each[:part]),
            longest=_middle(each[-part:]),
            peak_bytes=max(step.memory_peak_bytes for step in self.steps),
        )


def _middle(points: list[tuple[float, float]]) -> tuple[int, float]:
    return round(statistics.median(tokens for tokens, _ in points)), statistics.median(seconds for _, seconds in points)


def refusal(finished: Finished | None, ended: child.Ended, what: str, where: str) -> EngineError:
    """Return the error for `what`, a run in a process of its own that ended badly, in the words of that run."""
    said = finished.reason if finished else ended.last_words
    if (finished is not None and finished.exit_code == ExitCode.WILL_NOT_FIT) or ended.code == ExitCode.WILL_NOT_FIT:
        return WontFit(f"{what} does not fit: {said}", where=where)
    return EngineError(f"{what} could not be made: {said}", where=where)
