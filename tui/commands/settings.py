"""The settings that a command line names: preset, config file and flags, as one run."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from qlora_tui.engine import preset
from qlora_tui.engine.errors import ConfigError, EngineError
from qlora_tui.engine.places import is_here
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line

_FOREIGN = (".yml", ".yaml", ".json", ".py", ".ipynb", ".sh")


def resolved(options: argparse.Namespace) -> RunConfig:
    """Return the run that `options` describe; later wins: defaults, the user's config, preset, config file, flags.

    Raises:
        ConfigError: a file has faults, a preset does not exist, or the config is another tool's: then the tool is named.
    """
    config = Path(options.config) if options.config else None
    if config is not None and config.suffix.lower() in _FOREIGN and is_here(config):
        raise _other(config)
    return preset.resolve(preset=options.preset or None, config=config, flags=options.flags)


def _other(config: Path) -> ConfigError:
    from qlora_tui.engine import foreign  # reads YAML, which no other command needs

    told = "this is no TOML, as our configs are"
    try:
        told = f"this looks like a config of {foreign.title_of(config)}"
    except EngineError:
        pass
    return ConfigError(told, hint=f"qlora-tui import {one_line(shlex.quote(str(config)))} makes a run.toml of it", where=one_line(config))
