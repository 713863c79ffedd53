"""All that the wizard asks of the engine, in one place; no torch behind any of it.

Tests put another desk in its place. What reads a disk for long or asks a network is marked "slow": the wizard
calls it on a thread of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from textual.worker import NoActiveWorker, get_current_worker

from qlora_tui.engine import forecast, hub, lengthy, machine, models, money, planner, preset
from qlora_tui.engine.budget import Budget, estimate
from qlora_tui.engine.changes import Asked
from qlora_tui.engine.errors import ConfigError, EngineError, Stopped
from qlora_tui.engine.fixes import Fix, fixes, tips
from qlora_tui.engine.forecast import Before
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.measured import correction_now
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import is_folder, place, replace_file
from qlora_tui.engine.planner import Plan
from qlora_tui.engine.spec import BUILTIN, DEMO_MODEL, RunConfig, from_values, rows_per_step
from qlora_tui.engine.text import one_line
from qlora_tui.tui.datalook import DataLook, look_of, passages, with_lengths
from qlora_tui.tui.lengths import (
    Lengths,
    cost_words,
    measure,
    renderer_of,
    tokenizer_folder,
    triage_remark,
    used_rows,
)
from qlora_tui.tui.probe import Probed, probe
from qlora_tui.tui.scoring import Scored, answers_of, score, scored_by
from qlora_tui.tui.screens.shelves import ModelChoice, cached, folders, shape_of
from qlora_tui.tui.writtenrows import WrittenRows

if TYPE_CHECKING:
    from qlora_tui.engine.data import Row

DRAFT = "draft.toml"
_REMEMBERED = 1.0
"""Seconds for which the disk is not asked again for one model: a key is drawn in a few milliseconds, and asks many times."""
_USUAL_ROWS = 1000
_USUAL_SHARE = 4
"""Rows of which a time is told before data are named, and the part of `max_length` that they are taken to be long."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A ready-made run to begin from; `card` is what it was made for, `goal` one of `preset.GOALS`."""

    name: str
    title: str
    why: str
    card: str
    run: RunConfig
    goal: str = ""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run would need: memory with the planner's choices made, and time where the data are known.

    Without data there is `typical`: the time of `assumed`, rows that are made up to have a figure at all.
    """

    plan: Plan
    time: Before | None = None
    steps: int = 0
    steps_per_epoch: int = 0
    rows: int = 0
    """Rows to train on; 0 where the data are not known."""
    held: int = 0
    """Rows to measure on."""
    remarks: tuple[str, ...] = ()
    typical: Before | None = None
    assumed: str = ""
    work: forecast.Work | None = None

    @property
    def budget(self) -> Budget:
        """Return the memory of the planned run."""
        return self.plan.budget


@dataclass(slots=True)
class Desk:
    """The engine, as the wizard sees it."""

    _machine: Machine | None = None
    _specs: dict[tuple[str, str], ModelSpec] = field(default_factory=dict)
    _shapes: dict[str, tuple[float, ModelSpec | None]] = field(default_factory=dict)
    _rows: dict[tuple[str, ...], Sequence[Row]] = field(default_factory=dict)
    _repeated: dict[tuple[str, ...], tuple[tuple[float, str, str], ...]] = field(default_factory=dict)
    _scored: dict[tuple[object, ...], Scored] = field(default_factory=dict)

    def machine(self) -> Machine:
        """Return this machine, looked at once."""
        if self._machine is None:
            self._machine = machine.look()
        return self._machine

    def presets(self) -> list[Ready]:
        """Return the ready-made runs, those that cannot be read left out."""
        found = []
        for name in preset.names():
            try:
                ready = preset.load(name)
                run = preset.resolve(preset=name, config=None, flags={})
            except EngineError:
                continue
            found.append(Ready(name, ready.title, ready.why, ready.card, run, ready.goal))
        return found

    def model(self, run: RunConfig) -> ModelSpec | None:
        """Return the shape of the run's model where it is known without asking a network."""
        name = run.model_name_or_path
        if not name:
            return None
        known = self._specs.get((name, run.revision))
        if known is None:
            now = time.monotonic()
            asked, known = self._shapes.get(name, (-_REMEMBERED, None))
            if now - asked >= _REMEMBERED:
                known = shape_of(name)
                self._shapes = {name: (now, known)}
        return known

    def look_up(self, name: str, revision: str) -> ModelSpec:
        """Return the shape of any model; slow, may ask the hub.

        Raises:
            EngineError: there is no such model, it is not supported, or the hub cannot be reached.
        """
        known = models.find(name) if not is_folder(name) else None
        if known is None and name.startswith(BUILTIN):
            raise ConfigError(f"no built-in model {name!r}", hint=f"there is {DEMO_MODEL}")
        spec = known or models.from_folder(hub.small_files(name, revision).folder)
        self._specs[name, revision] = spec
        return spec

    def models(self) -> list[ModelChoice]:
        """Return models on this disk first, then the catalogue, smallest first; slow, reads this folder and the hub's cache."""
        found = self.folders(".")
        found += [ModelChoice(name, spec, "on disk") for name, spec in cached()]
        demo = models.find_entry(DEMO_MODEL)
        if demo is not None:
            ready = tokenizer_folder(RunConfig(model_name_or_path=DEMO_MODEL)) is not None
            found.append(ModelChoice(DEMO_MODEL, demo.spec, "on disk" if ready else "fetch 94 MB", demo.licence))
        here = {choice.name for choice in found}
        listed = sorted(models.entries(), key=lambda entry: entry.spec.params)
        for entry in listed:
            if entry.spec.name not in here:
                found.append(ModelChoice(entry.spec.name, entry.spec, "to fetch", entry.licence, entry.gated))
        return found

    def folders(self, where: str) -> list[ModelChoice]:
        """Return models in folders in and under `where`; slow, reads the disk."""
        return [ModelChoice(name, spec, "this folder" if where == "." else "on disk") for name, spec in folders(where)]

    def least(self, run: RunConfig) -> Budget | None:
        """Return the least memory that `run` can do with, or None while its model is not known; the planner may spend more on speed."""
        spec = self.model(run)
        try:
            return estimate(spec, run, self.machine(), correction=correction_now(self.machine().name)) if spec else None
        except EngineError:
            return None

    def checkpoint_bytes(self, run: RunConfig) -> int:
        """Return about how large one checkpoint of `run` is; 0 while its model is not known."""
        from qlora_tui.engine.preflight import checkpoint_bytes  # it needs the room of data, which nobody waits for before this

        spec = self.model(run)
        return checkpoint_bytes(run, spec) if spec else 0

    def look_at_data(self, run: RunConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> DataLook:
        """Return what the run's data hold; slow, reads all of them; `progress` gets bytes read and bytes in all, 0 where nobody knows.

        Raises:
            Stopped: the answer is no longer wanted.
        """
        from qlora_tui.engine import data

        stopping = _stopping()
        try:
            found = data.load(run, lenient=True, stopping=stopping, progress=progress)
            apart = data.load_eval(run, lenient=True, stopping=stopping)
        except Stopped:
            raise
        except EngineError as error:
            where = f": {error.problem.where}" if error.problem.where else ""
            return DataLook(run.data, problem=f"{error.problem.message}{where}", hint=error.problem.hint)
        except (OSError, ValueError, ImportError) as error:
            return DataLook(run.data, problem=f"{type(error).__name__}: {error}")
        self._rows = {run.data: found.rows}  # of the latest data alone: they may be large
        return look_of(run, found, apart, stopping)

    def measure(self, run: RunConfig, look: DataLook) -> DataLook | None:
        """Return `look` with what many rows share, and lengths counted by the model's tokenizer where there is one; slow.

        Raises:
            Stopped: the answer is no longer wanted.
        """
        rows = self._rows.get(look.names)
        if not rows:
            return None
        stopping = _stopping()
        if look.names not in self._repeated:
            self._repeated = {look.names: passages(rows, stopping)}
        look = replace(look, repeated=self._repeated[look.names])
        lengths = measure(rows, run, stopping=stopping)
        return with_lengths(look, lengths) if lengths else look

    def limit_cost(self, run: RunConfig, outlook: Outlook | None, lengths: Lengths) -> str:
        """Return what the limit that keeps 99 % of the rows costs in memory, all else as planned; empty where that is not known."""
        spec, limit = self.model(run), lengths.keeps(0.99)
        if spec is None or outlook is None:
            return ""
        planned, longest = outlook.plan.run, lengths.fitted(run).longest_trained(run.max_length)
        asked = Asked(spec, planned, self.machine(), longest, lengths.tokens, correction_now(self.machine().name))
        return cost_words(spec, planned, limit, lambda most: asked.after({"max_length": most}))

    def written(self, run: RunConfig) -> WrittenRows | str:
        """Return the run's rows as they will be trained, or the sentence that says why that cannot be; slow, reads the tokenizer."""
        rows = self._rows.get(run.data)
        if not rows:
            return "the data have not been read yet" if rows is None else "there is no row that can be used"
        if not run.model_name_or_path:
            return "rows are written out by the model's own template: choose a model first"
        try:
            renderer = renderer_of(run)
        except EngineError as error:
            return f"the model: {one_line(error.problem.message, limit=300)}"
        if renderer is None:
            name = one_line(run.model_name_or_path, limit=80)
            return f"rows are written out by the model's own template, and the tokenizer of {name} is not on this disk yet"
        return WrittenRows(rows, renderer)

    def score(self, run: RunConfig, say: Callable[[str, int, int], object], stopping: Callable[[], bool]) -> Scored:
        """Let the base score the answers of `run` in another process, and remember what it found; slow.

        Raises:
            EngineError: it could not be done, or it was stopped.
        """
        found = score(replace(run, perplexity_filter=0.0), say=say, stopping=stopping)
        self._scored = {scored_by(run): found}  # of the latest data alone
        return found

    def scored(self, run: RunConfig) -> Scored | None:
        """Return how well the base knows the answers of `run`, where that was found out."""
        return self._scored.get(scored_by(run))

    def answers(self, run: RunConfig, rows: Sequence[int]) -> dict[int, str]:
        """Return the last answers of some rows by the rows' numbers."""
        return answers_of(self._rows.get(run.data, ()), rows)

    def outlook(self, run: RunConfig, look: DataLook | None = None) -> Outlook | None:
        """Return what `run` would need, or None while its model is not known."""
        spec = self.model(run)
        if spec is None:
            return None
        try:
            plan = self._plan(spec, run, look)
        except EngineError:
            return None
        if look is None:
            return self._typical(spec, plan)
        if not look.rows or look.problem or look.unwritable:
            return Outlook(plan)
        lengths = look.lengths.fitted(run)
        each = lengths.mean(run.max_length)
        rows, held = used_rows(run, look.lengths, look.rows, look.measured_on, look.copies[0])
        scored = self.scored(run) if run.perplexity_filter else None
        rows = max(1, scored.rows - scored.gone(run)) if scored else rows
        per_epoch = max(1, math.ceil(rows / rows_per_step(run)))
        steps = run.max_steps or max(1, math.ceil(per_epoch * run.num_train_epochs))
        each = each or min(look.tokens / look.rows, run.max_length)
        work = forecast.Work(int(each * rows), steps, per_epoch, int(each * held), lengths.tokens, rows, held)
        taken = forecast.before_work(spec, plan.run, self.machine(), work)
        longest, chat = lengths.longest_trained(run.max_length), lengths.longest_chat
        told = lengthy.remarks(spec, plan.run, self.machine(), taken, longest=longest, longest_chat=chat, asked=run, work=work)
        told += lengthy.shorter_words(lengthy.shorter(spec, plan.run, self.machine(), taken, work))
        unknown = "" if scored else triage_remark(run)
        return Outlook(plan, taken, steps, per_epoch, rows, held, (*told, *([unknown] if unknown else [])), work=work)

    def _typical(self, spec: ModelSpec, plan: Plan) -> Outlook:
        """Return the outlook of a run whose data nobody has named: its time is that of so many rows of a length that is usual for it."""
        run, each = plan.run, max(16, plan.run.max_length // _USUAL_SHARE)
        trained, held = used_rows(run, Lengths(), _USUAL_ROWS)
        per_epoch = max(1, math.ceil(trained / rows_per_step(run)))
        steps = run.max_steps or max(1, math.ceil(per_epoch * run.num_train_epochs))
        taken = forecast.before(
            spec,
            run,
            self.machine(),
            tokens_per_epoch=each * trained,
            steps=steps,
            steps_per_epoch=per_epoch,
            holdout_tokens=each * held,
        )
        rows = min(_USUAL_ROWS, run.max_samples or _USUAL_ROWS)
        return Outlook(plan, typical=taken, assumed=f"{rows:,} rows of {each:,} tokens")

    def bill(self, run: RunConfig, outlook: Outlook | None) -> str:
        """Return what the run costs in one line, nothing where its time is not known; it plans for another card, so not at every key."""
        spec = self.model(run)
        found = money.before_run(spec, run, self.machine(), outlook.time, outlook.work) if spec and outlook else None
        return money.short(found) if found else ""

    def gated(self, run: RunConfig) -> bool:
        """Say whether the run's model is known to need a licence accepted on the hub."""
        entry = models.find_entry(run.model_name_or_path)
        return entry is not None and entry.gated

    def card_bytes(self, card: str) -> int:
        """Return the memory of the card called `card`; 0 where it is none, which any machine is enough for."""
        try:
            return machine.find_card(card).total_bytes if card else 0
        except EngineError:
            return 0

    def remedies(self, run: RunConfig, look: DataLook | None = None) -> list[Fix]:
        """Return what makes the run fit, cheapest first, or faster where it fits already."""
        spec = self.model(run)
        if spec is None:
            return []
        lengths = look.lengths if look else Lengths()
        longest = lengths.fitted(run).longest_trained(run.max_length)
        try:
            plan = self._plan(spec, run, look)
            if plan.budget.fits and not plan.budget.tight:
                return tips(spec, plan.run, self.machine(), longest=longest, lengths=lengths.tokens)
            return fixes(spec, plan.run, self.machine(), longest=longest, lengths=lengths.tokens)
        except EngineError:
            return []

    def probe(self, run: RunConfig, rows: int, say: Callable[[str, int, int], object], stopping: Callable[[], bool]) -> Probed:
        """Make the test run with the planner's choices; slow.

        Raises:
            EngineError: it could not be made, or it was stopped.
        """
        outlook = self.outlook(run)
        return probe(outlook.plan.run if outlook else run, rows, say=say, stopping=stopping)

    def _plan(self, spec: ModelSpec, run: RunConfig, look: DataLook | None) -> Plan:
        lengths = look.lengths.fitted(run) if look else Lengths()
        longest, mean = lengths.longest_trained(run.max_length), lengths.mean(run.max_length) or None
        return planner.choose(spec, run, self.machine(), longest=longest, mean=mean, lengths=lengths.tokens)

    def save_draft(self, run: RunConfig) -> None:
        """Keep an unfinished run for the next time; a disk that is full or read-only only loses the draft."""
        try:
            replace_file(place("state") / DRAFT, preset.to_toml(run))
        except OSError:
            return

    def load_draft(self) -> RunConfig | None:
        """Return the run that was left unfinished; None if there is none that can be read."""
        try:
            return from_values(preset.read_file(place("state") / DRAFT))
        except (OSError, EngineError):
            return None

    def drop_draft(self) -> None:
        """Forget the unfinished run: it has been started."""
        try:
            (place("state") / DRAFT).unlink(missing_ok=True)
        except OSError:
            return


def _stopping() -> Callable[[], None]:
    """Return what ends a long reading once its answer is no longer wanted: other data are named, or the screen is left."""
    try:
        worker = get_current_worker()
    except NoActiveWorker:
        return lambda: None

    def stopping() -> None:
        if worker.is_cancelled:
            raise Stopped("the reading was given up")

    return stopping
