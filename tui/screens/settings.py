"""The settings of the numbers page: how each is shown, stepped with the arrows, and read from what is typed.

Types, bounds and help come from the one table of keys; only the short label, the ladder of usual values and words of
advice live here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import KEYS, RunConfig, values_of
from qlora_tui.engine.units import words
from qlora_tui.engine.values import Value, read_text

_FREE = "Costs neither memory nor time."


@dataclass(frozen=True, slots=True)
class Setting:
    """One field: a key, its short label, the values the arrows go through, and words of advice.

    `note` is the half-sentence beside the field. `effect` says what the key does to memory, time and quality; without it
    the key's help has to do.
    """

    name: str
    label: str
    note: str = ""
    ladder: tuple[float, ...] = ()
    effect: str = ""

    @property
    def help(self) -> str:
        """Return the sentence of the key's help."""
        return KEYS[self.name].help

    @property
    def letters(self) -> bool:
        """Say whether a value may begin with a letter, so that letters are no keys while the field has the focus."""
        return self.typed and KEYS[self.name].kind in ("list", "layers", "text")

    @property
    def typed(self) -> bool:
        """Say whether the field takes typing; a choice only takes arrows."""
        return not KEYS[self.name].choices and KEYS[self.name].kind != "flag"

    def shown(self, run: RunConfig) -> str:
        """Return the value as a person reads it."""
        return show(self.name, values_of(run)[self.name])

    def stepped(self, run: RunConfig, direction: int) -> RunConfig:
        """Return the run one value further; at the end of a ladder it stays as it is."""
        key, now = KEYS[self.name], values_of(run)[self.name]
        if key.kind == "flag":
            return _with(run, self.name, not now)
        if key.kind == "layers":
            ladder = ("auto", "true", "false")
            return _with(run, self.name, ladder[((ladder.index(str(now)) if now in ladder else 0) + direction) % len(ladder)])
        if key.choices:
            at = key.choices.index(str(now)) if str(now) in key.choices else 0
            return _with(run, self.name, key.choices[(at + direction) % len(key.choices)])
        if not self.ladder or not isinstance(now, (int, float)):
            return run
        beyond = (
            [step for step in self.ladder if step > now * (1 + 1e-9)] if direction > 0 else [x for x in self.ladder if x < now * (1 - 1e-9)]
        )
        if not beyond:
            return run
        chosen = min(beyond) if direction > 0 else max(beyond)
        return _with(run, self.name, int(chosen) if key.kind == "integer" else float(chosen))

    def read(self, run: RunConfig, text: str) -> RunConfig:
        """Return the run with what was typed.

        Raises:
            ConfigError: the text is not of the key's type, or out of its bounds.
        """
        changed = _with(run, self.name, read_text(KEYS[self.name], text))
        fault = next((problem for problem in problems(changed) if problem.where == self.name), None)
        if fault is not None:
            raise ConfigError(fault.message, hint=fault.hint)
        return changed


class Base(Setting):
    """How the base model is held: method and 4-bit type are one question to a person."""

    __slots__ = ()
    _OPTIONS: Sequence[tuple[str, str, str]] = (
        ("4-bit nf4", "qlora", "nf4"),
        ("4-bit fp4", "qlora", "fp4"),
        ("16-bit", "lora", ""),
        ("auto", "auto", ""),
    )

    def shown(self, run: RunConfig) -> str:
        """Return the kind of base."""
        return {"lora": "16-bit", "auto": "auto"}.get(run.method, f"4-bit {run.bnb_4bit_quant_type}")

    def stepped(self, run: RunConfig, direction: int) -> RunConfig:
        """Return the run with the next kind of base."""
        names = [name for name, _, _ in self._OPTIONS]
        _, method, kind = self._OPTIONS[(names.index(self.shown(run)) + direction) % len(names)]
        return dataclasses.replace(run, method=method, bnb_4bit_quant_type=kind or run.bnb_4bit_quant_type)


MAIN: tuple[Setting, ...] = (
    Setting(
        "lora_r",
        "rank",
        "what the adapter can learn",
        (2, 4, 8, 16, 32, 64, 128, 256),
        "Higher learns more detail, and few rows by heart; memory and time grow a little.",
    ),
    Setting(
        "max_length",
        "max length",
        "tokens; longer rows are dropped",
        (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
        "Memory and time grow with the longest rows; what is longer is dropped, cut or split, and not learned.",
    ),
    Setting(
        "per_device_train_batch_size",
        "rows at once",
        "more is faster, costs memory",
        (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64),
        "More is faster until the card is busy, and takes memory; with the same rows a step the result is the same.",
    ),
    Setting(
        "gradient_accumulation_steps",
        "batches a step",
        "rows a step, costs no memory",
        (1, 2, 4, 8, 16, 32, 64),
        "More rows a step: smoother and fewer steps, for no memory and hardly any time.",
    ),
    Setting(
        "num_train_epochs",
        "epochs",
        "most tasks peak after 1-2",
        (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 8, 10),
        "Time grows with it, memory does not; past one or two passes most tasks overfit.",
    ),
    Setting(
        "learning_rate",
        "learning rate",
        "1e-4 to 3e-4 is usual",
        (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3),
        "Costs neither memory nor time; too high diverges, too low learns nothing.",
    ),
    Setting(
        "gradient_checkpointing",
        "checkpointing",
        "less memory, about a third slower",
        effect="Recomputing activations saves most of their memory for up to a third more time; the result is the same.",
    ),
    Base(
        "method",
        "base model",
        "4-bit takes a quarter of the memory",
        effect="4 bits take a quarter of the weights' memory and a little quality; 16 bits are faster where they fit.",
    ),
)
MORE: tuple[Setting, ...] = (
    Setting("lora_alpha", "alpha", "one or two times the rank", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), _FREE),
    Setting("lora_dropout", "dropout", "0 is fine for most", (0.0, 0.05, 0.1, 0.2), "Against overfitting of few rows; learns slower."),
    Setting("lora_target_modules", "layers", "all-linear is the usual choice", effect="Attention alone saves memory and learns less."),
    Setting("use_rslora", "rsLoRA", "keeps high ranks learning", effect=_FREE),
    Setting("use_dora", "DoRA", "better at low ranks, slower", effect="Learns a little more at low ranks for clearly more time."),
    Setting("optim", "optimizer", "auto picks for the device", effect="8-bit state saves memory at no loss that can be measured."),
    Setting("lr_scheduler_type", "schedule", "how the learning rate falls", effect=_FREE),
    Setting("warmup_steps", "warm-up", "a share of the steps, or a count", (0.0, 0.03, 0.05, 0.1, 0.2), _FREE),
    Setting("weight_decay", "weight decay", "0 is fine for adapters", (0.0, 0.01, 0.1), _FREE),
    Setting("max_steps", "max steps", "0: by epochs", (0, 10, 30, 100, 300, 1000, 3000)),
    Setting("max_time", "max time", "stop and save after this; 0: no limit", (0.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0)),
    Setting("mask_history", "last answer", "trains on the last answer of a chat"),
    Setting("too_long", "too long", "what becomes of rows over max length"),
    Setting("filter_duplicates", "copies", "leave out copies of earlier rows"),
    Setting("perplexity_filter", "known answers", "leaves out what the base knows; 0: off", (0.0, 1.5, 2.0, 3.0, 5.0, 10.0)),
    Setting("perplexity_drop_most", "at most", "share of the rows that may go so", (0.05, 0.1, 0.2, 0.3, 0.5)),
    Setting("val_set_size", "held out", "a share, or a number of rows", (0.02, 0.05, 0.1, 0.2)),
    Setting("eval_steps", "measure every", "steps; 0: about five times a run", (0, 10, 20, 50, 100, 200, 500)),
    Setting("save_steps", "save every", "steps; 0: about ten times a run", (0, 10, 20, 50, 100, 200, 500)),
    Setting("bnb_4bit_use_double_quant", "double quant", "saves 0.37 bits a weight"),
    Setting("memory_limit_gib", "memory limit", "GiB; 0: all of the device", (0.0, 8.0, 12.0, 16.0, 24.0, 40.0, 48.0, 80.0)),
    Setting("seed", "seed", "same seed, same run", (0, 1, 2, 3, 42)),
)


def show(name: str, value: Value) -> str:
    """Return a value of the key `name` as a person reads it.

    >>> show("learning_rate", 2e-4), show("gradient_checkpointing", "true"), show("max_time", 5400.0)
    ('2e-4', 'all layers', '1 h 30 min')
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if KEYS[name].kind == "layers":
        return {"true": "all layers", "false": "off"}.get(str(value), str(value))
    if name == "per_device_train_batch_size" and not value:
        return "auto"
    if isinstance(value, tuple):
        return ", ".join(value)
    if KEYS[name].kind == "duration" and isinstance(value, (int, float)):
        return words(value) if value else "0"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-").replace("e+0", "e") if value >= 1e-3 or not value else _power(value)
    return str(value)


def _power(value: float) -> str:
    return f"{value:.2e}".replace("e-0", "e-").replace(".00e", "e").replace("0e-", "e-")


def _with(run: RunConfig, name: str, value: Value) -> RunConfig:
    return dataclasses.replace(run, **{name: value})  # type: ignore[arg-type]  # read and bounded by the table
