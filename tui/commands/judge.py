"""Which answers are better: the side by side screen, or an endpoint that is asked, with a word about money and data first."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qlora_tui.engine import judge as room
from qlora_tui.engine.errors import ConfigError, ConfigErrors, ExitCode
from qlora_tui.engine.judge import Endpoint, Pairs, Prices, Todo
from qlora_tui.engine.runs import claim, find_run
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import count
from qlora_tui.tui import answering
from qlora_tui.tui.commands.lines import write_report
from qlora_tui.tui.commands.run import can_draw
from qlora_tui.tui.printer import Output, Streams

_FAR = ("judge_model", "key_env", "max_cost", "price_in", "price_out", "yes_send_data", "allow_plain_http")
_SHOWN_ROWS = 5


def judge(options: argparse.Namespace) -> int:
    """Let the person judge on the screen, or an endpoint where one is named; without either tell what is known."""
    folder = claim(find_run(options.name, Path(str(options.flags.get("runs_dir", "runs"))).expanduser()))
    answering.check(folder)
    streams, far = Streams(), _endpoint(options)
    if far is None and not (options.no_ui or options.json) and can_draw():
        return _on_screen(options, folder, streams)
    try:
        _make(options, folder, streams)
        code = int(ExitCode.DONE) if far is None else _ask(options, folder, far, streams)
    except KeyboardInterrupt:
        streams.talk.line("stopped; what was answered and judged so far is kept")
        code = int(ExitCode.INTERRUPTED)
    _tell(folder, streams, as_json=options.json)
    return code


def answers(options: argparse.Namespace) -> int:
    """Let base and tuned answer; this is the process that `tui.answering` starts."""
    from qlora_tui.engine import child
    from qlora_tui.engine.session import settle_libraries

    settle_libraries()
    try:
        with room.alone(Path(options.folder), room.ANSWERS):
            _answer(Path(options.folder), options.rows, options.tokens)
    except ConfigErrors as error:
        return child.say_why(ConfigError(str(error)))
    except answering.KINDS as error:
        return child.say_why(error)
    return int(ExitCode.DONE)


def _answer(folder: Path, rows: int, tokens: int) -> None:
    from qlora_tui.engine import data, machine, preflight, preset, resume
    from qlora_tui.engine.runs import RUN_FILE
    from qlora_tui.engine.spec import from_values
    from qlora_tui.engine.train.answers import Asking, answer

    run = resume.trained_with(folder) or from_values(preset.read_file(folder / RUN_FILE))
    files, spec = preflight.find_model(run)
    asking = Asking(
        run=run,
        folder=folder,
        files=files,
        positions=spec.max_position_embeddings,
        machine=machine.limited(machine.look(), run),
        dataset=data.load(run),
        eval_dataset=data.load_eval(run),
        rows=rows,
        tokens=tokens,
    )
    for _ in answer(asking):
        pass


def _endpoint(options: argparse.Namespace) -> Endpoint | None:
    """Return the endpoint that the options name, checked before anything is made; None where a person judges.

    Raises:
        ConfigError: something about it is missing, wrong, or said without an endpoint.
    """
    if options.by == "me" and options.endpoint:
        raise ConfigError("--by me and --endpoint contradict each other", hint="leave one of them out", where="--by")
    if not options.endpoint:
        if options.by == "endpoint":
            raise ConfigError("no endpoint named", hint="say --endpoint URL and --judge-model NAME", where="--by")
        said = next((name for name in _FAR if vars(options)[name] not in ("", None) and vars(options)[name] is not False), "")
        if said:
            raise ConfigError("it is about an endpoint, and none is named", hint="say --endpoint URL", where=f"--{said.replace('_', '-')}")
        return None
    if not options.judge_model.strip():
        raise ConfigError("no model named to judge", hint="say --judge-model NAME", where="--judge-model")
    if (options.price_in is None) != (options.price_out is None):
        raise ConfigError("a price needs both directions", hint="say --price-in and --price-out", where="--price-in")
    url = room.address(options.endpoint, plain_http=options.allow_plain_http)
    key = room.key_from(options.key_env, loopback=room.is_loopback(url))
    return Endpoint(url, options.judge_model.strip(), key, reply_tokens=room.reply_tokens())


def _make(options: argparse.Namespace, folder: Path, streams: Streams) -> None:
    rows, tokens = answering.wanted(room.read_pairs(folder), options.rows, options.tokens)
    answering.make(folder, rows, tokens, _teller(streams.talk), lambda: False)


def _teller(talk: Output) -> Callable[[int, int], None]:
    """Return what says on stderr how far the answers are: at first, and every tenth of them."""
    told: tuple[int, int] | None = None

    def say(done: int, total: int) -> None:
        nonlocal told
        now = (done * 10 // total if total else 0, total)
        if now != told:
            told = now
            talk.line(f"base and tuned answer: {done} of {total} prompts" if total else "loading the model")

    return say


def _ask(options: argparse.Namespace, folder: Path, endpoint: Endpoint, streams: Streams) -> int:
    """Say what would be sent and what it may cost, ask, and let the endpoint judge."""
    pairs = room.read_pairs(folder)
    free = room.is_loopback(endpoint.url) and options.max_cost is None
    prices = room.prices_of(endpoint.model, options.price_in, options.price_out, free=free)
    left = room.todo(pairs, endpoint.name)
    if not left:
        streams.talk.line(f"{endpoint.name} has judged all of these pairs")
        return int(ExitCode.DONE)
    spent = pairs.dollars(endpoint.name)
    estimate = prices.estimate(room.size_of(step.question) for step in left)
    cap = options.max_cost if options.max_cost is not None else spent + estimate
    for line in _what_goes(pairs, left, endpoint, prices, (spent, estimate, cap)):
        streams.talk.line(line)
    if not _agreed(options, streams.talk):
        return int(ExitCode.INTERRUPTED)
    room.keep_prices(endpoint.model, prices)
    done = room.judge(folder, endpoint, prices, cap, wait=_waiter(streams.talk), say=_counter(streams.talk))
    if done.error is not None:
        streams.talk.line(f"{endpoint.name} stopped after {done.replies} of {len(left)} replies; they are kept")
        raise done.error
    if done.early:
        streams.talk.line(f"stopped after {done.replies} of {len(left)} replies: {done.early}; they are kept, and the same command goes on")
    return int(ExitCode.DONE)


def _what_goes(pairs: Pairs, left: list[Todo], endpoint: Endpoint, prices: Prices, money: tuple[float, float, float]) -> list[str]:
    """Return what leaves this machine, whereto, and what it may cost at most."""
    rows = list({step.answer.row: step.answer for step in left}.values())
    size = sum(room.size_of(step.question) for step in left)
    spent, estimate, cap = money
    place = "this machine itself" if room.is_loopback(endpoint.url) else "another machine"
    lines = [
        f"To {endpoint.host} ({place}), for {one_line(endpoint.model, limit=100)} to judge:",
        f"  {count(len(rows))} held-out prompts with both answers, {count(len(left))} questions, {count(-(-size // 1024))} KiB"
        f"{', with a key' if endpoint.key else ', without a key'}",
    ]
    lines += [f"  row {answer.row}: {one_line(answer.prompt, limit=60)}" for answer in rows[:_SHOWN_ROWS]]
    if len(rows) > _SHOWN_ROWS:
        lines.append(f"  and {len(rows) - _SHOWN_ROWS} more; all are in {room.ANSWERS} of the run")
    known = sum(answer.same for answer in pairs.answers)
    lines += [f"  {'1 pair of equal answers is' if known == 1 else f'{known} pairs of equal answers are'} not sent"] if known else []
    lines.append(f"  at most about ${estimate:.2f} ({prices.words}); it stops before ${cap:.2f} in all, ${spent:.2f} of it spent already")
    return lines


def _agreed(options: argparse.Namespace, talk: Output) -> bool:
    """Say whether the rows may be sent.

    Raises:
        ConfigError: nobody can be asked, and nobody said so before.
    """
    if options.yes_send_data:
        return True
    if options.no_ui or options.json or not (sys.stdin and sys.stdin.isatty()):
        raise ConfigError("nothing is sent without a word from you", hint="say --yes-send-data", where="--endpoint")
    talk.write("send them? [y/N] ")
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    talk.line("nothing was sent")
    return False


def _waiter(talk: Output) -> Callable[[float], None]:
    def wait(seconds: float) -> None:
        talk.line(f"the endpoint is busy; again in {seconds:.0f} s")
        time.sleep(seconds)

    return wait


def _counter(talk: Output) -> Callable[[int, int, float], None]:
    """Return what says on stderr every tenth of the replies."""
    told = -1

    def say(done: int, total: int, dollars: float) -> None:
        nonlocal told
        if done * 10 // total != told:
            told = done * 10 // total
            talk.line(f"judged {done} of {total} questions, ${dollars:.2f}")

    return say


def _tell(folder: Path, streams: Streams, *, as_json: bool) -> None:
    """Tell what is judged so far, and write it into the report."""
    write_report(folder, streams)
    if as_json:
        streams.data.document(room.document(folder))
        return
    pairs = room.read_pairs(folder)
    asked = pairs.sheet.rows if pairs.sheet else 0
    how = f", {one_line(pairs.sheet.base)}, {pairs.sheet.tokens} tokens at most" if pairs.sheet else ""
    streams.data.line(f"answers  {len(pairs.answers)} of {asked} held-out prompts{how}")
    for found in room.tallies(pairs):
        name = "you" if found.by == room.ME else one_line(found.by)
        counts = f"{found.wins} tuned, {found.ties + found.same} tie, {found.losses} base"
        left = [f"{number} {what}" for what, number in (("skipped", found.skipped), ("unclear", found.unclear)) if number]
        cost = [f"${found.dollars:.2f}"] if found.dollars else []
        streams.data.line(f"judged   {name}: {room.words_of(found)} ({', '.join([counts, *left, *cost])})")
    if not pairs.judges():
        streams.talk.line(f"nothing is judged yet; qlora-tui judge {one_line(folder.name)} shows the answers beside each other")


def _on_screen(options: argparse.Namespace, folder: Path, streams: Streams) -> int:
    from qlora_tui.tui import opening, preferences

    opening.begin()
    from qlora_tui.tui.app import run_app
    from qlora_tui.tui.screens.sidebyside import SideBySideScreen

    rows, tokens = answering.wanted(room.read_pairs(folder), options.rows, options.tokens)
    shown = run_app(
        start=None,
        draft=None,
        follow=None,
        screen=lambda ascii_only: SideBySideScreen(folder, rows, tokens, ascii_only=ascii_only),
        mouse=not options.no_mouse,
        ascii_only=options.ascii,
        preferences=preferences.read(options.theme),
    )
    if shown.kind == "crashed":
        streams.talk.line(f"the screen failed: {shown.detail}; what was judged is kept")
        return int(ExitCode.FAILED)
    _tell(folder, streams, as_json=False)
    return int(ExitCode.DONE)
