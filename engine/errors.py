"""Everything that can go wrong, as a tree.

EngineError
├── ConfigError        an option, key or value that cannot be used
├── DataError          a dataset that cannot be read or holds nothing to train on
│   └── BadRow         one row, with its number
├── ModelError         a model that is missing, unreadable or not supported
├── FetchError         a hub or package index that could not be reached
├── WontFit            the budget or the card says no
├── SpaceError         no room on the disk, or a folder that cannot be written
├── CheckpointError    a checkpoint that is missing, damaged or belongs to another run
├── JournalError       a run folder that cannot be read, or that another process holds
├── FenceError         the wrong thread or the wrong moment: the run stops rather than go on wrong
├── Stopped            a person asked to stop while something long was under way
└── Diverged           training became non-finite and was stopped

A person reads `str(error)`: what happened, where, and what to do. The program reads `exit_code`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the process tells the shell; a script can act on it."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    WILL_NOT_FIT = 3
    DIVERGED = 4
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, as a person reads it: where, what, and what to do about it."""

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        """Return one line: `where: message; hint`."""
        line = f"{self.where}: {self.message}" if self.where else self.message
        return f"{line}; {self.hint}" if self.hint else line


class EngineError(Exception):
    """Base of all our errors: a sentence, an optional hint, an optional place."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "", where: str = "") -> None:
        """Keep the parts apart so that a screen can lay them out and a log can print them in one line."""
        self.problem = Problem(where, message, hint)
        super().__init__(str(self.problem))


class ConfigError(EngineError):
    """An option, key or value that cannot be used."""

    exit_code = ExitCode.USAGE


class ConfigErrors(ConfigError):
    """Several faults of one configuration, all listed at once so that nobody fixes them one run at a time."""

    def __init__(self, problems: list[Problem]) -> None:
        """Join the problems, one a line."""
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class DataError(EngineError):
    """A dataset that cannot be read or that holds nothing to train on."""

    exit_code = ExitCode.USAGE


class BadRow(DataError):
    """One row that cannot be used; `row` counts from 1, `field` is the key at fault."""

    def __init__(self, message: str, *, row: int = 0, field: str = "", hint: str = "", where: str = "") -> None:
        """Remember the row and the field; reports list them."""
        self.row, self.field = row, field
        super().__init__(message, hint=hint, where=where)


class ModelError(EngineError):
    """A model that is missing, unreadable or not supported."""

    exit_code = ExitCode.USAGE


class FetchError(EngineError):
    """A hub or package index that could not be reached."""


class WontFit(EngineError):
    """The budget, or the card itself, says that the run does not fit."""

    exit_code = ExitCode.WILL_NOT_FIT


class SpaceError(EngineError):
    """No room on the disk, or a folder that cannot be written."""

    exit_code = ExitCode.USAGE


class CheckpointError(EngineError):
    """A checkpoint that is missing, damaged, or belongs to another run."""

    exit_code = ExitCode.USAGE


class JournalError(EngineError):
    """A run folder that cannot be read, or that another process holds."""

    exit_code = ExitCode.USAGE


class FenceError(EngineError):
    """The wrong thread or the wrong moment touched the model: the run stops rather than go on wrong."""


class Stopped(EngineError):
    """A person asked to stop while a fetch or another long wait was under way; nothing half-made is left behind."""

    exit_code = ExitCode.INTERRUPTED


class Diverged(EngineError):
    """Training became non-finite and was stopped."""

    exit_code = ExitCode.DIVERGED
