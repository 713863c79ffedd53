"""The options of every command, one function a command.

Only argparse is imported here, as in `cli`: `--help` has to answer at once.
"""

from __future__ import annotations

import argparse

from qlora_tui.tui.commands import ANSWERER, CHILD, SCORER
from qlora_tui.tui.options import Data, Flag, Set, Switch, count, dollars

TYPE_CHECKING = False  # see cli.py
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


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


def _money_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prices", metavar="KEY=VALUE", nargs="*", help="keep a price: electricity=0.31, rent=3-5; KEY= goes back to what ships"
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


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RUN", help="an id, a path or `last`")
    parser.add_argument("--to", metavar="TARGET", required=True, help="adapter, merged (16 bits), gguf or ollama")
    parser.add_argument("--out", metavar="DIR", default="", help="where to: a new or empty folder (default: export/TARGET in the run's)")
    parser.add_argument(
        "--type", metavar="TYPE", default="", help="weights of gguf and ollama: f16 (default), q8_0; smaller by llama-quantize"
    )
    parser.add_argument("--unchecked", action="store_true", help="do not compare it with the adapter, where memory is too short for that")
    _flag(parser, "--runs-dir", "runs_dir", "DIR", "folder that holds the runs (default: runs)")
    _json(parser)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RUN", nargs="?", default="last", help="an id, a path or `last` (the default)")
    _flag(
        parser,
        "--data",
        "eval_data",
        "PATH",
        "measure these rows instead of those that the run held out; rows that it trained on are left out",
    )
    parser.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out loss instead of the last adapter")
    parser.add_argument(
        "--checks", action="store_true", help="also other questions (manner), general text (forgetting), rows trained on (overfitting)"
    )
    _flag(parser, "--runs-dir", "runs_dir", "DIR", "folder that holds the runs (default: runs)")
    _json(parser)


def _runs_arguments(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--runs-dir", "runs_dir", "DIR", "only the runs in this folder (default: runs, and those begun elsewhere)")
    _json(parser)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="RUN", nargs="+", help="two to six runs: ids, paths or `last`")
    _flag(parser, "--runs-dir", "runs_dir", "DIR", "folder that holds the runs (default: runs)")
    _json(parser)


def _delete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="RUN", nargs="+", help="ids or paths")
    parser.add_argument("--only-checkpoints", action="store_true", help="keep adapter, report and log; such a run cannot be resumed")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    _flag(parser, "--runs-dir", "runs_dir", "DIR", "folder that holds the runs (default: runs)")
    _json(parser)


def _queue_add_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--resume", metavar="RUN", default="", help="go on with a run: an id, a path or `last`")
    _json(parser)


def _queue_remove_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", type=count, nargs="*", help="numbers from `qlora-tui queue`")
    parser.add_argument("--ended", action="store_true", help="all that have ended")
    _json(parser)


def _queue_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stop-on-error", action="store_true", help="leave the rest queued once a run ends in an error")
    parser.add_argument("--detach", action="store_true", help="in a process of its own; return at once")
    _json(parser)


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="your shell")


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RUN", nargs="?", default="last", help="an id, a path or `last` (the default)")
    _flag(parser, "--runs-dir", "runs_dir", "DIR", "folder that holds the runs (default: runs)")
    parser.add_argument("--rows", metavar="N", type=count, default=0, help="so many held-out prompts, drawn by seed (default 50)")
    parser.add_argument("--tokens", metavar="N", type=count, default=0, help="cut an answer off after so many tokens (default 256)")
    parser.add_argument("--no-ui", action="store_true", help="no screen: make the answers and tell what is judged; never reads stdin")
    _json(parser)
    _screen_arguments(parser)
    far = parser.add_argument_group("judging by an OpenAI-compatible endpoint (off unless named; rows leave this machine)")
    far.add_argument("--by", choices=("me", "endpoint"), default="", help="who judges (default: me, or the endpoint where one is named)")
    far.add_argument("--endpoint", metavar="URL", default="", help="such as https://api.openai.com/v1")
    far.add_argument("--judge-model", metavar="NAME", default="", help="the model that judges there")
    far.add_argument("--key-env", metavar="NAME", default="", help="the environment variable that holds the key (default OPENAI_API_KEY)")
    far.add_argument("--max-cost", metavar="USD", type=dollars, help="stop before it could cost more, in all (default: the estimate shown)")
    far.add_argument("--price-in", metavar="USD", type=dollars, help="price of a million tokens sent; remembered for this model")
    far.add_argument("--price-out", metavar="USD", type=dollars, help="price of a million tokens received; remembered as well")
    far.add_argument("--yes-send-data", action="store_true", help="send the prompts and answers shown without asking")
    far.add_argument("--allow-plain-http", action="store_true", help="http:// to another machine too, where anybody on the way reads along")


def _answerer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder")
    parser.add_argument("rows", type=count)
    parser.add_argument("tokens", type=count)


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="YAML, JSON, a script (.py), a notebook (.ipynb) or a command line (.sh); never run")
    tools = ("axolotl", "llamafactory", "trl", "unsloth")
    parser.add_argument("--from", dest="origin", choices=tools, default="", help="whose config it is, where that is not clear from it")
    parser.add_argument("--out", metavar="RUN.TOML", default="run.toml", help="where the run goes (default run.toml)")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.add_argument("--dry-run", action="store_true", help="show everything, write nothing")
    _json(parser)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _child_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder")


def _flag(parser: Any, option: str, key: str, metavar: str, text: str) -> None:
    parser.add_argument(option, action=Flag, dest=key, metavar=metavar, help=text)


ARGUMENTS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "": _run_arguments,
    "demo": _run_arguments,
    "attach": _attach_arguments,
    "budget": _budget_arguments,
    "money": _money_arguments,
    "data": _data_arguments,
    "presets": _presets_arguments,
    "runs": _runs_arguments,
    "runs compare": _compare_arguments,
    "runs delete": _delete_arguments,
    "queue": _json,
    "queue add": _queue_add_arguments,
    "queue list": _json,
    "queue remove": _queue_remove_arguments,
    "queue run": _queue_run_arguments,
    "queue stop": lambda parser: None,
    "import": _import_arguments,
    "export": _export_arguments,
    "serve": _serve_arguments,
    "eval": _eval_arguments,
    "watch": _watch_arguments,
    "completion": _completion_arguments,
    "judge": _judge_arguments,
    "doctor": _json,
    CHILD: _child_arguments,
    SCORER: _child_arguments,
    ANSWERER: _answerer_arguments,
}
"""What adds a command's options to its parser."""
