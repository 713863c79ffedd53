"""The command line: what a user types, turned into one call of one command.

Only argparse is imported here, not even the table of keys: `--help` has to answer at once, also over a slow disk.
Every command imports its rooms when it is called, so `--no-ui` never loads the screens and facts never load torch.
"""

from __future__ import annotations

import argparse
import os
import sys

from qlora_tui.tui.commands import CHILD, SCORER
from qlora_tui.tui.descriptors import hold_descriptors
from qlora_tui.tui.options import Data, Flag, Set, Switch, count

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
    "data": "what a dataset holds and what would be trained on",
    "presets": "ready-made runs, and how each fits this machine",
    "runs": "past and present runs",
    "serve": "the same screens in a browser, for this machine alone",
    "watch": "what the stability watch says about a finished log, ours or another tool's",
    "doctor": "what works here, and the one command that mends what does not",
}

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
    _say(f"{PROG}: {redact(safe_text(error))}")
    return int(error.exit_code)


def parse(arguments: list[str]) -> tuple[str, argparse.Namespace]:
    """Return the command's name ("" for the wizard and run) and its options.

    Raises:
        ConfigError: an unknown command or option, or a value of the wrong type; the nearest spelling is named.
    """
    name, rest = ("", arguments)
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
        if name not in (*COMMANDS, CHILD, SCORER):
            _refuse_command(name)
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
            description=f"{ABOUT}\n\ncommands:\n" + "\n".join(f"  {command:<9} {text}" for command, text in COMMANDS.items()),
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
        parser.add_argument("--help-keys", action=_HelpKeys, nargs=0, help="print every key of --set and exit")
    else:
        parser = Parser(prog=f"{PROG} {name}", description=COMMANDS.get(name, "").capitalize() + ".", allow_abbrev=False)
    _ARGUMENTS[name](parser)
    return parser


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    how = parser.add_argument_group("how to run")
    how.add_argument("--resume", metavar="RUN", default="", help="go on with a run: an id, a path or `last`")
    how.add_argument("--no-ui", action="store_true", help="no screen: lines on stdout; never reads stdin")
    how.add_argument("--detach", action="store_true", help="run in a process of its own and return at once")
    how.add_argument("--dry-run", action="store_true", help="check and show everything, make nothing")
    how.add_argument("--json", action="store_true", help="machine-readable: events, one a line (implies --no-ui)")
    _screen_arguments(parser)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides a run: where the settings come from, and the flags that name one of them."""
    what = parser.add_argument_group("what to train (later wins: defaults, your config, preset, config file, flags)")
    what.add_argument("--preset", metavar="NAME", default="", help="start from a ready-made run; see qlora-tui presets")
    what.add_argument("--config", metavar="FILE", default="", help="a run.toml")
    _flag(what, "--model", "model_name_or_path", "DIR_OR_HUB_ID", "the base model: a folder, a hub id or builtin:smollm2-135m")
    what.add_argument("--data", action=Data, metavar="PATH_OR_ID", help="JSONL file, hub dataset or builtin:python-docs; repeat for more")
    _flag(what, "--max-steps", "max_steps", "N", "stop after N optimizer steps")
    _flag(what, "--max-time", "max_time", "TIME", "stop and save after this long: 90m, 2h")
    _flag(what, "--until", "until", "TIME", "be done and saved by then: 07:00")
    what.add_argument("--skip-bad-rows", action=Switch, nargs=0, dest="skip_bad_rows", help="leave broken rows out, counted")
    _flag(what, "--runs-dir", "runs_dir", "DIR", "folder that holds the runs (default: runs)")
    what.add_argument("--set", action=Set, metavar="KEY=VALUE", help="any setting, such as lora_r=32; repeatable")


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    _screen_arguments(parser)
    site = parser.add_argument_group("server")
    site.add_argument("--attach", metavar="RUN", default="", help="every tab shows this run: an id, a path or `last`")
    site.add_argument("--readonly", action="store_true", help="with --attach: look only, no key changes the run")
    site.add_argument("--port", metavar="N", type=count, default=8417, help="where to listen (default 8417; 0: any free port)")
    site.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="127.0.0.1 (default) or ::1; no other is served")


def _screen_arguments(parser: argparse.ArgumentParser) -> None:
    screen = parser.add_argument_group("screen")
    screen.add_argument("--no-mouse", action="store_true", help="leave the mouse to the terminal (selecting text)")
    screen.add_argument("--theme", choices=("auto", "dark", "light"), default="", help="colours; otherwise as chosen last")
    screen.add_argument("--ascii", action="store_true", help="draw with plain characters")


def _attach_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RUN", nargs="?", default="last", help="an id, a path or `last` (the default)")
    parser.add_argument("--readonly", action="store_true", help="look only: no key changes the run")
    parser.add_argument("--no-ui", action="store_true", help="no screen: lines on stdout until the run ends")
    parser.add_argument("--json", action="store_true", help="the events, one a line (implies --no-ui)")
    _flag(parser, "--runs-dir", "runs_dir", "DIR", "folder that holds the runs (default: runs)")
    _screen_arguments(parser)


def _budget_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--card", metavar="NAME", default="", help='another card than the one here, such as "RTX 4090"')
    parser.add_argument(
        "--probe", metavar="N", type=count, default=0, help="first train on N real rows, keep nothing, and measure the speed"
    )
    _json(parser)


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="?", default="", help="JSONL file, hub dataset or builtin:python-docs")
    parser.add_argument("--examples", metavar="N", type=count, default=0, help="show N rows and which parts are trained on")
    parser.add_argument("--perplexity", action="store_true", help="let the base score every answer: which it knows, which it finds absurd")
    _config_arguments(parser)
    _json(parser)


def _presets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="show this one, key by key")
    _json(parser)


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", metavar="LOG", help="a run, events.jsonl, trainer_state.json, or a CSV of step,loss[,grad_norm,eval_loss]")
    parser.add_argument("--batch", metavar="N", type=count, default=0, help="rows a step, where the log does not say")
    parser.add_argument("--warmup", metavar="N", type=count, default=0, help="warm-up steps, where the log does not say")
    _json(parser)


def _runs_arguments(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--runs-dir", "runs_dir", "DIR", "only the runs in this folder (default: runs, and those begun elsewhere)")
    _json(parser)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _child_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder")


_ARGUMENTS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "": _run_arguments,
    "demo": _run_arguments,
    "attach": _attach_arguments,
    "budget": _budget_arguments,
    "data": _data_arguments,
    "presets": _presets_arguments,
    "runs": _runs_arguments,
    "serve": _serve_arguments,
    "watch": _watch_arguments,
    "doctor": _json,
    CHILD: _child_arguments,
    SCORER: _child_arguments,
}


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """Return the function of a command, importing its rooms only now."""
    if name in ("", "demo", CHILD, SCORER):
        from qlora_tui.tui.commands import run

        return {"": run.run, "demo": run.demo, CHILD: run.child, SCORER: run.scores}[name]
    if name == "attach":
        from qlora_tui.tui.commands import attach

        return attach.attach
    if name == "serve":
        from qlora_tui.tui.commands import serve

        return serve.serve
    if name == "watch":
        from qlora_tui.tui.commands import watch

        return watch.watch
    from qlora_tui.tui.commands import facts

    return facts.COMMANDS[name]


def _refuse_command(name: str) -> NoReturn:
    """Refuse a first word that is no command, with the nearest one."""
    from qlora_tui.engine.errors import ConfigError
    from qlora_tui.engine.spec import nearest
    from qlora_tui.engine.text import one_line

    hint = nearest(name, list(COMMANDS)) or f"there are {', '.join(COMMANDS)}"
    raise ConfigError(f"no command {one_line(name)!r}", hint=hint)


def _refuse(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    """Refuse what the parser does not know, with the nearest thing that it does."""
    from qlora_tui.engine.errors import ConfigError
    from qlora_tui.engine.spec import KEYS, nearest
    from qlora_tui.engine.text import one_line

    known = [text for action in parser._actions for text in action.option_strings]
    option = word.split("=", 1)[0]
    if not word.startswith("-"):
        hint = f"put the command first: {PROG} {word} ..." if word in COMMANDS else f"see {parser.prog} --help"
        raise ConfigError(f"unexpected {one_line(word)!r}", hint=hint)
    key = option.lstrip("-").replace("-", "_")
    hint = f"say --set {key}=VALUE" if key in KEYS else nearest(option, known) or f"see {parser.prog} --help"
    raise ConfigError(f"unknown option {one_line(option)}", hint=hint)


def _flag(parser: Any, option: str, key: str, metavar: str, text: str) -> None:
    parser.add_argument(option, action=Flag, dest=key, metavar=metavar, help=text)


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
