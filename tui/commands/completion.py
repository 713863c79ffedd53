"""The script by which a shell asks this program what Tab may offer."""

from __future__ import annotations

import argparse

from qlora_tui.engine.errors import ExitCode
from qlora_tui.tui.cli import PROG
from qlora_tui.tui.printer import Streams

_HOW = {
    "bash": f'add to ~/.bashrc:  eval "$({PROG} completion bash)"',
    "zsh": f'add to ~/.zshrc, after compinit:  eval "$({PROG} completion zsh)"',
    "fish": f"once:  {PROG} completion fish > ~/.config/fish/completions/{PROG}.fish",
}


def completion(options: argparse.Namespace) -> int:
    """Print the script, and where it goes."""
    from argcomplete.shell_integration import shellcode

    streams = Streams()
    streams.data.write(shellcode([PROG], use_defaults=False, shell=options.shell) + "\n")
    if streams.data.terminal:
        streams.talk.line(_HOW[options.shell])
    return int(ExitCode.DONE)
