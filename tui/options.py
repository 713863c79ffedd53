"""What the command line's options do with their text: values of keys, read at once, and all faults kept to be told together."""

from __future__ import annotations

import argparse

TYPE_CHECKING = False  # see cli.py
if TYPE_CHECKING:
    from typing import Any


def count(text: str) -> int:
    """Read a whole number of at least 0."""
    if not text.strip().isdecimal():
        from qlora_tui.engine.text import one_line

        raise argparse.ArgumentTypeError(f"{one_line(text)!r} is not a whole number of at least 0")
    return int(text)


def dollars(text: str) -> float:
    """Read an amount of at least 0."""
    try:
        found = float(text.strip().removeprefix("$"))
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        from qlora_tui.engine.text import one_line

        raise argparse.ArgumentTypeError(f"{one_line(text)!r} is no amount of dollars")
    return found


def _note(namespace: argparse.Namespace, name: str, text: str, where: str) -> None:
    """Read `text` as the key called `name`; a fault is kept, so that all of a command line are told at once."""
    from qlora_tui.engine.errors import ConfigError
    from qlora_tui.engine.spec import find_key
    from qlora_tui.engine.values import read_text

    try:
        key = find_key(name, where=where)
        namespace.flags[key.name] = read_text(key, text, where=where)
    except ConfigError as error:
        namespace.faults.append(error)


class Flag(argparse.Action):
    """An option that names one key: its text is read as the key's type."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Note it."""
        _note(namespace, self.dest, str(values), option or self.dest)


class Data(argparse.Action):
    """`--data`, which adds up: a path is taken as it is, commas included."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Note it."""
        before: tuple[str, ...] = namespace.flags.get("data", ())
        namespace.flags["data"] = (*before, str(values))


class Switch(argparse.Action):
    """An option without a value that switches a key on."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Note it."""
        namespace.flags[self.dest] = True


class Set(argparse.Action):
    """`--set KEY=VALUE` for any key of the table."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Note it."""
        from qlora_tui.engine.errors import ConfigError
        from qlora_tui.engine.text import one_line

        name, equals, text = str(values).partition("=")
        if equals:
            _note(namespace, name.strip(), text, "--set")
        else:
            namespace.faults.append(ConfigError(f"{one_line(values)!r} has no `=`", hint="say --set lora_r=32", where="--set"))
