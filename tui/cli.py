"""The command line: what a user types, turned into one call of one command.

Only argparse is imported here, not even the table of keys: `--help` has to answer at once, also over a slow disk.
Every command imports its rooms when it is called, so `--no-ui` never loads the screens and facts never load torch.
"""

from __future__ import annotations

import argparse
import os
import sys

from qlora_tui.tui.arguments import ARGUMENTS
from qlora_tui.tui.commands import ANSWERER, CHILD, SCORER
from qlora_tui.tui.descriptors import hold_descriptors

TYPE_CHECKING = False  # the name that type checkers look for; importing typing itself would cost a fifth of `--help`
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import IO, Any, NoReturn

    from qlora_tui.engine.errors import ConfigError

PROG = "qlora-tui"

COMMANDS: Mapping[str, str] = {
    "demo": "fine-tune a small real model on real rows, start to end; a CPU will do",
    "attach": "the run screen on a running or finished run",
    "budget": "how much memory and time a run needs, before anything is loaded",
    "money": "what power, your card and a rented one cost: the prices that budgets and reports reckon with",
    "data": "what a dataset holds and what would be trained on",
    "presets": "ready-made runs, and how each fits this machine",
    "import": "a config of Axolotl, LLaMA-Factory, TRL or Unsloth as a run.toml, and what became of every setting",
    "runs": "past and present runs",
    "queue": "several runs, one after another; one that fails does not hold up the next",
    "eval": "base against tuned on held-out rows, or on other rows, once more",
    "judge": "base and tuned answers beside each other: which is better, by you or by an endpoint",
    "export": "an adapter, a merged model, or a file for llama.cpp or Ollama, proved to be what was trained",
    "serve": "the same screens in a browser, for this machine alone",
    "watch": "what the stability watch says about a finished log, ours or another tool's",
    "doctor": "what works here, and the one command that mends what does not",
    "completion": "the script that lets Tab complete commands, settings and runs in your shell",
}

PARTS: Mapping[str, Mapping[str, str]] = {
    "runs": {
        "compare": "settings, results and curves of two to six runs beside each other",
        "delete": "delete runs, or their checkpoints alone; says what goes and asks",
    },
    "queue": {
        "add": "check a run and put it at the end of the queue",
        "list": "what waits, runs and has ended (as `qlora-tui queue` alone)",
        "remove": "take runs out of the queue; their folders stay",
        "run": "work through the queue; Ctrl+C stops and saves the run under way and leaves the rest",
        "stop": "stop the run under way, saved, wherever the queue runs",
    },
}
"""Second words: commands within a command, which alone does what it is called."""

_HOMES: Mapping[str, tuple[str, str]] = {
    "": ("run", "run"),
    "demo": ("run", "demo"),
    "attach": ("attach", "attach"),
    "budget": ("facts", "budget"),
    "money": ("money", "money"),
    "data": ("facts", "data"),
    "presets": ("facts", "presets"),
    "runs": ("runs", "runs"),
    "runs compare": ("runs", "compare"),
    "runs delete": ("runs", "delete"),
    "queue": ("queue", "show"),
    "queue add": ("queue", "add"),
    "queue list": ("queue", "show"),
    "queue remove": ("queue", "remove"),
    "queue run": ("queue", "run"),
    "queue stop": ("queue", "stop"),
    "import": ("importing", "import_"),
    "export": ("export", "export"),
    "serve": ("serve", "serve"),
    "eval": ("eval", "evaluate"),
    "watch": ("watch", "watch"),
    "completion": ("completion", "completion"),
    "judge": ("judge", "judge"),
    "doctor": ("facts", "doctor"),
    CHILD: ("run", "child"),
    SCORER: ("run", "scores"),
    ANSWERER: ("judge", "answers"),
}
"""Where each command lives: a file of `commands/` and the function in it."""

ABOUT = """Fine-tune a language model on one GPU, from one terminal.

With no command: the wizard, filled in from the options, then the run screen."""

EXAMPLES = """examples:
  qlora-tui demo                                       see the whole job once, on any machine
  qlora-tui --preset chat-8b-24gb --data chats.jsonl   the wizard, mostly filled in
  qlora-tui --no-ui --model ./llama --data a.jsonl --set lora_r=32
  qlora-tui budget --preset chat-8b-24gb --card "RTX 4090"
  qlora-tui --resume last --max-time 2h                go on where a run stopped

exit codes: 0 done, 1 failed, 2 something to correct, 3 will not fit, 4 diverged, 130 stopped, 143 terminated
Every command has its own --help; `qlora-tui --help-keys` lists every key of --set."""


class Parser(argparse.ArgumentParser):
    """argparse without its habit to exit: a fault is one of our errors, with the nearest spelling."""

    def error(self, message: str) -> NoReturn:
        """Raise a usage error that points to the help of this very command."""
        from qlora_tui.engine.errors import ConfigError

        raise ConfigError(message, hint=f"see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; as a program (`argv` is None) leave the process once it is done."""
    hold_descriptors()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # here, so that every child of every command inherits it
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what Tab may offer
        from qlora_tui.tui import completing

        completing.answer()
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if argv is None:
        leave(code)
    return code


def leave(code: int) -> None:
    """End a process that trained or drew at once, by `os._exit`; return where it did neither.

    Interpreter shutdown with CUDA alive can hang or crash after everything was saved, and it waits for Textual's threads,
    which a terminal that is lost while the screen comes up leaves behind.
    """
    _flush()
    if "torch" in sys.modules or "textual" in sys.modules:
        os._exit(code)


def _run(arguments: list[str]) -> int:
    try:
        name, options = parse(arguments)
        return _command(name)(options)
    except SystemExit as done:  # help and version
        return int(done.code or 0)
    except KeyboardInterrupt:
        _say(f"{PROG}: interrupted before a run began; nothing was made")
        return 130
    except Exception as error:
        code = _tell(error)
        if code is None:
            raise
        return code


def _tell(error: Exception) -> int | None:
    """Say what went wrong and return the exit code; None for what is no error of ours but a fault in the program."""
    from qlora_tui.engine.errors import EngineError
    from qlora_tui.engine.text import redact, safe_text

    if not isinstance(error, EngineError):
        return None
    _say(f"{PROG}: {safe_text(redact(str(error)))}")
    return int(error.exit_code)


def parse(arguments: list[str]) -> tuple[str, argparse.Namespace]:
    """Return the command's name ("" for the wizard and run) and its options.

    Raises:
        ConfigError: an unknown command or option, or a value of the wrong type; the nearest spelling is named.
    """
    name, rest = ("", arguments)
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
        if name not in _HOMES:
            _refuse_command(name)
        if rest and rest[0] in PARTS.get(name, {}):
            name, rest = f"{name} {rest[0]}", rest[1:]
    parser = build(name)
    options, unknown = parser.parse_known_args(rest, argparse.Namespace(flags={}, faults=[], words=rest))
    if unknown:
        _refuse(parser, unknown[0])
    if options.faults:
        _refuse_values(options.faults)
    return name, options


def build(name: str) -> argparse.ArgumentParser:
    """Return the parser of one command; only this one is built, so that help is quick."""
    if not name:
        parser = Parser(
            prog=PROG,
            usage=f"{PROG} [COMMAND] [OPTIONS]",
            description=f"{ABOUT}\n\ncommands:\n" + "\n".join(f"  {command:<10} {text}" for command, text in COMMANDS.items()),
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
        parser.add_argument("--help-keys", action=_HelpKeys, nargs=0, help="print every key of --set and exit")
    else:
        first, _, second = name.partition(" ")
        about, parts = PARTS[first][second] if second else COMMANDS.get(name, ""), {} if second else PARTS.get(name, {})
        parser = Parser(
            prog=f"{PROG} {name}",
            description=about.capitalize() + ".",
            epilog="and:\n" + "\n".join(f"  {PROG} {name} {part:<8} {text}" for part, text in parts.items()) if parts else None,
            formatter_class=argparse.RawDescriptionHelpFormatter if parts else argparse.HelpFormatter,
            allow_abbrev=False,
        )
        parser = Parser(prog=f"{PROG} {name}", description=_sentence(COMMANDS.get(name, "")), allow_abbrev=False)
    ARGUMENTS[name](parser)
    return parser


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """Return the function of a command, importing its rooms only now."""
    import importlib

    file, function = _HOMES[name]
    found: Callable[[argparse.Namespace], int] = vars(importlib.import_module(f"qlora_tui.tui.commands.{file}"))[function]
    return found


def _refuse_command(name: str) -> NoReturn:
    """Refuse a first word that is no command, with the nearest one, or the option of that name."""
    from qlora_tui.engine.errors import ConfigError
    from qlora_tui.engine.spec import nearest
    from qlora_tui.engine.text import one_line

    options = [text for action in build("")._actions for text in action.option_strings]
    hint = nearest(name, list(COMMANDS)) or f"there are {', '.join(COMMANDS)}"
    hint = f"did you mean {PROG} --{name}?" if f"--{name}" in options else hint
    raise ConfigError(f"no command {one_line(name)!r}", hint=hint)


def _refuse(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    """Refuse what the parser does not know, with the nearest thing that it does."""
    from qlora_tui.engine.errors import ConfigError
    from qlora_tui.engine.spec import KEYS, nearest
    from qlora_tui.engine.text import one_line

    known = [text for action in parser._actions for text in action.option_strings]
    option = word.split("=", 1)[0]
    if not word.startswith("-"):
        parts = PARTS.get(parser.prog.removeprefix(f"{PROG} "), {})
        if parts:
            hint = nearest(word, list(parts)) or f"there are {', '.join(parts)}"
            raise ConfigError(f"unexpected {one_line(word)!r}", hint=hint)
        hint = f"put the command first: {PROG} {word} ..." if word in COMMANDS else f"see {parser.prog} --help"
        raise ConfigError(f"unexpected {one_line(word)!r}", hint=hint)
    key = option.lstrip("-").replace("-", "_")
    hint = f"say --set {key}=VALUE" if key in KEYS else nearest(option, known) or f"see {parser.prog} --help"
    raise ConfigError(f"unknown option {one_line(option)}", hint=hint)


def _refuse_values(faults: list[ConfigError]) -> NoReturn:
    from qlora_tui.engine.errors import ConfigErrors

    raise ConfigErrors([fault.problem for fault in faults]) if len(faults) > 1 else faults[0]


class _Version(argparse.Action):
    """`--version`; importing the metadata reader costs 40 ms, so nothing else does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        from importlib.metadata import version

        _say(f"{PROG} {version('qlora-tui')}", sys.stdout)
        parser.exit()


class _HelpKeys(argparse.Action):
    """`--help-keys`: the one table of keys as people read it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        from qlora_tui.engine.spec import KEYS

        group, lines = "", []
        for key in KEYS.values():
            if key.group != group:
                group = key.group
                lines.append(f"\n{group}")
            shown = ",".join(key.default) if isinstance(key.default, tuple) else str(key.default)
            lines.append(f"  {key.name:<30} {key.help} [{shown}]")
        _say("\n".join(lines), sys.stdout)
        parser.exit()


def _say(text: str, stream: IO[str] | None = None) -> None:
    try:
        print(text, file=stream or sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody is there to read it; the exit code still tells
        return


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader went away; the interpreter's own flush at exit must not fail aloud
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
        except (ValueError, AttributeError):  # closed, or never there
            continue
