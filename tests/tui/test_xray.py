"""The data page as an X-ray, the rows as they will be trained, and the same from the command line."""

from __future__ import annotations

import doctest
import json
import threading
from dataclasses import replace

import pytest
from conftest import write_model, write_tokenizer
from pty_screen import Terminal

from qlora_tui.engine import data, machine
from qlora_tui.engine.budget import estimate
from qlora_tui.engine.data import Piece, perplexity
from qlora_tui.engine.errors import Stopped
from qlora_tui.engine.padding import row_of_largest
from qlora_tui.engine.planner import choose
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.units import gib
from qlora_tui.tui import lengths
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.cli import main
from qlora_tui.tui.commands import planning
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.lengths import Lengths, split_rows
from qlora_tui.tui.screens import triage
from qlora_tui.tui.screens.desk import Desk, Outlook
from qlora_tui.tui.screens.go import summary
from qlora_tui.tui.screens.rows import RowsScreen, lines_of
from qlora_tui.tui.screens.wizard import WizardScreen
from qlora_tui.tui.screens.xray import found_lines, reading_line
from qlora_tui.tui.writtenrows import WrittenRow


class CardDesk(Desk):
    """The real desk on a known card."""

    def machine(self):
        return machine.find_card("RTX 4090")


def words(app: TunerApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def wizard_of(app: TunerApp) -> WizardScreen:
    return next(screen for screen in app.screen_stack if isinstance(screen, WizardScreen))


def app_of(run: RunConfig, desk: Desk | None = None, **more) -> TunerApp:
    return TunerApp(start=None, draft=run, follow=None, desk=desk or CardDesk(), **more)


async def to_data(pilot, until, app) -> None:
    for page in ("model", "data"):
        await pilot.press("enter")
        await until(pilot, lambda page=page: wizard_of(app).page.title == page)


def chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def run(tiny_model, chat_rows, write_jsonl) -> RunConfig:
    """Forty short rows, some over 40 tokens, one of which comes twice, and one that lists no messages."""
    path = write_jsonl([*chat_rows, chat_rows[3], {"messages": []}])
    return RunConfig(model_name_or_path=str(tiny_model), data=(str(path),), max_length=40, skip_bad_rows=True)


async def test_the_data_page_tells_lengths_limits_shares_and_copies(run, until):
    app = app_of(run)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "trained" in words(app))
        shown = words(app)
        measured = wizard_of(app).data_of_run().lengths
    assert "41 rows  1," in shown
    assert " tokens  messages: " in shown
    assert "turns     41 user, 41 assistant read, all of them written out" in shown
    assert " steps an epoch" in shown
    assert "triage    off; F3 finds" in shown
    assert "lengths   ▁" in shown or "lengths   ▂" in shown or "lengths   █" in shown
    assert f"at 40: {lengths.share(measured.over(40))} of rows are longer: dropped" in shown
    assert "128 would keep 99 %, +" in " ".join(shown.split())
    assert f"{lengths.share(measured.trained / sum(measured.tokens))} of the tokens" in shown
    assert "copies    1 exact" in shown
    assert "held out  about" in shown
    assert "row 42" in shown
    assert "F2 rows" in shown


async def test_a_larger_screen_has_a_bar_for_each_length(run, until):
    app = app_of(run)
    async with app.run_test(size=(120, 36)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "trained" in words(app))
        assert "33 - 48  ██" in words(app)
        assert "the answers and what ends them" in words(app)


async def test_rows_are_shown_as_they_will_be_trained(run, until):
    app = app_of(run)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "lengths" in words(app))
        await pilot.press("f2")
        await until(pilot, lambda: "1 of 41 usable" in words(app))
        shown = words(app)
        assert "row 1 · " in shown
        assert "% trained" in shown
        assert "\n   say 0<|im_end|>" in shown
        assert "\n ▌ abc 0<|im_end|>" in shown
        for key, place in (("right", 2), ("pagedown", 12), ("pageup", 2), ("left", 1), ("left", 1), ("end", 41), ("home", 1)):
            await pilot.press(key)
            await until(pilot, lambda place=place: f" {place} of 41 usable" in words(app))
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is wizard_of(app))
        assert wizard_of(app).run == run


async def test_ascii_marks_trained_text_at_the_margin_and_escapes_foreign_text(run, until, write_jsonl):
    row = chat("hi \x1b]52;c;AAAA\x07 [red]x[/] \u202e", "one\n  two é")
    app = app_of(replace(run, data=(str(write_jsonl([row] * 3, "hostile.jsonl")),)), ascii_only=True)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "lengths" in words(app))
        assert words(app).isascii()
        await pilot.press("f2")
        await until(pilot, lambda: "of 3 usable" in words(app))
        shown = words(app)
    assert shown.isascii()
    assert "   hi \\x1b]52;c;AAAA\\x07 [red]x[/] \\u202e<|im_end|>" in shown
    assert "\n > one " in shown
    assert "\n >   two ?<|im_end|>" in shown


async def test_before_the_data_are_read_the_key_says_so(run, until):
    app = app_of(replace(run, data=("nowhere.jsonl",)))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "nowhere.jsonl" in words(app) and "✖" in words(app))
        await pilot.press("f2")
        await until(pilot, lambda: "there is no row to show" in words(app))
        assert app.screen is wizard_of(app)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}",
            "the chat template leaves out or changes a turn of the user",
        ),
        ("{{ raise_exception('only one turn') }}", "the chat template refuses it (only one turn)"),
    ],
)
async def test_a_template_that_cannot_be_followed_is_told_and_nobody_goes_on(run, until, tmp_path, template, why):
    folder = tmp_path / "odd"
    write_tokenizer(folder, template)
    write_model(folder)
    app = app_of(replace(run, model_name_or_path=str(folder)))
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "no row can be written out" in words(app))
        shown = " ".join(words(app).split())
        assert f"✖ no row can be written out for this model: {why}" in shown
        assert "41 user, 41 assistant read; 0, 0 written out" in shown
        assert "these data cannot be used" in shown
        await pilot.press("enter")
        await pilot.pause()
        assert wizard_of(app).page.title == "data"


async def test_a_tokenizer_that_cannot_be_read_is_told(run, until, tmp_path):
    folder = tmp_path / "torn"
    write_tokenizer(folder)
    write_model(folder)
    (folder / "tokenizer.json").write_text("{}")
    app = app_of(replace(run, model_name_or_path=str(folder)))
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "cannot be read" in words(app))
        assert "guessed from characters" in words(app)
        await pilot.press("f2")
        await until(pilot, lambda: isinstance(app.screen, RowsScreen) and "cannot be read" in words(app))


async def test_rows_to_measure_that_are_trained_too_are_told(run, until, write_jsonl, chat_rows):
    fresh = [chat(f"quite another thing {n}", f"with other words {n} of its own") for n in range(6)]
    measured = write_jsonl([*chat_rows[:5], *fresh], "measured.jsonl")
    app = app_of(replace(run, eval_data=str(measured)))
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "leaks" in words(app))
        found = data.describe(wizard_of(app).run, data.load(run, lenient=True), None, eval_dataset=data.load_eval(wizard_of(app).run))
        assert f"leaks     {found['holdout']['leaks']} of those to measure on are also trained on" in words(app)
        assert found["holdout"]["leaks"] == wizard_of(app).data_of_run().leaks >= 5


async def test_what_many_rows_share_is_shown_with_its_text(run, until, write_jsonl):
    opening = "as a model I hold no view of my own but here is what I was told"
    rows = [chat(f"tell {n}", f"{opening} {n * n} and {n + 7}") for n in range(40)]
    app = app_of(replace(run, data=(str(write_jsonl(rows, "shared.jsonl")),), max_length=256))
    async with app.run_test(size=(120, 36)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "repeated" in words(app))
        assert f"repeated  in 100 % of rows, assistant: {opening}" in words(app)


async def test_f4_goes_through_what_becomes_of_rows_that_are_too_long(run, until):
    app = app_of(run)
    async with app.run_test(size=(120, 36)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "of rows are longer: dropped" in words(app))
        few = wizard_of(app).outlook.rows
        for chosen, told in (
            ("cut", "of rows are longer: cut, "),
            ("split", "of rows are longer: split by turns"),
            ("drop", "longer: dropped"),
        ):
            await pilot.press("f4")
            await until(pilot, lambda told=told: told in words(app))
            assert wizard_of(app).run.too_long == chosen
            assert (wizard_of(app).outlook.rows > few) == (chosen != "drop")


async def test_faults_scroll_where_they_do_not_fit(run, until, write_jsonl, chat_rows):
    bad = [{"messages": []}] * 12
    app = app_of(replace(run, data=(str(write_jsonl([*chat_rows, *bad], "bad.jsonl")),), skip_bad_rows=False))
    async with app.run_test(size=(60, 20)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "12 rows cannot be used" in words(app) and wizard_of(app).data_of_run().lengths.measured)
        await pilot.press("pagedown")
        await until(pilot, lambda: "triage" in words(app))
        await pilot.press("pageup")
        await until(pilot, lambda: "12 rows cannot be used" in words(app))


async def test_without_a_tokenizer_a_sentence_says_why_no_row_is_shown(run, until):
    app = app_of(replace(run, model_name_or_path="Qwen/Qwen3-8B"))
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "guessed from characters" in words(app))
        await pilot.press("f2")
        await until(pilot, lambda: "is not on this disk yet" in words(app))
        await pilot.press("right", "escape")
        await until(pilot, lambda: app.screen is wizard_of(app))


def test_a_row_the_template_cannot_write_says_so():
    lines = lines_of(WrittenRow(7, fault="no \x1b[2J"), 60, mark=">")
    assert lines[0].plain == " ✖ this row cannot be trained: no \\x1b[2J"


def test_a_line_is_broken_where_training_begins_and_ends():
    row = WrittenRow(1, 5, 2, (Piece("[INST] a [/INST]", False, False), Piece(" b\n\nc", True, False), Piece("</s>", True, True)))
    assert [line.plain for line in lines_of(row, 60, mark=">")] == ["   [INST] a [/INST]", " >  b", " > ", " > c</s>"]


def test_pieces_are_the_text_of_the_row(run, tiny_model):
    tokenizer = data.load_tokenizer(tiny_model)
    renderer = data.Renderer(tokenizer)
    for row in data.load(run).rows:
        tokens = renderer.tokens(row)
        found = data.pieces(tokens, tokenizer)
        assert "".join(piece.text for piece in found) == tokenizer.decode(list(tokens.input_ids))
        assert [piece.text for piece in found if piece.trained] == [row.chat.turns[-1].content, "<|im_end|>"]
        assert all(piece.special == (piece.text in ("<|im_start|>", "<|im_end|>")) for piece in found)


def test_pieces_keep_the_space_that_a_tokenizer_writes_before_a_word():
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz[]/\nINST"]
    backend = Backend(models.BPE(vocab={text: index for index, text in enumerate(known)}, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
        "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = data.Tokenizer(fast)
    row = data.Row(1, 1, data.Chat((data.Turn("user", "say so"), data.Turn("assistant", "yes it\nis"))))
    found = data.pieces(data.Renderer(tokenizer).tokens(row), tokenizer)
    assert [piece.text for piece in found] == ["<s>", "[INST] say so [/INST]", " yes it\nis", "</s>"]
    assert [piece.trained for piece in found] == [False, False, True, True]


async def test_a_reading_tells_how_far_it_is_and_ends_when_other_data_are_named(run, until):
    at_work, ended = threading.Event(), threading.Event()

    class SlowDesk(CardDesk):
        def look_at_data(self, run, progress=lambda done, total: None):
            from qlora_tui.tui.screens.desk import _stopping

            if "slow" not in run.data[0]:
                return DataLook(run.data, "messages", "", 5, 50)
            stopping = _stopping()
            progress(3 << 30, 4 << 30)
            at_work.set()
            try:
                while True:
                    stopping()
            except Stopped:
                ended.set()
                raise

    app = app_of(replace(run, data=("slow.jsonl",)), SlowDesk())
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "75 % of 4.0 GiB" in words(app))
        assert at_work.is_set()
        await pilot.press("home", "x")
        await until(pilot, ended.is_set)
        await pilot.press("backspace", "delete", "z")
        await until(pilot, lambda: "5 rows" in words(app))


async def test_counting_tokens_ends_when_other_data_are_named(run, until, monkeypatch):
    ended = threading.Event()

    class Counting(CardDesk):
        def measure(self, run, look):
            from qlora_tui.tui.screens.desk import _stopping

            stopping = _stopping()
            try:
                while True:
                    stopping()
            except Stopped:
                ended.set()
                raise

    app = app_of(run, Counting())
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "guessed from characters" in words(app))
        assert not ended.is_set()
        await pilot.press("home", "x")
        await until(pilot, ended.is_set)


def test_nothing_is_held_out_of_a_folder_that_brings_its_own_rows_to_measure(run, tmp_path, chat_rows):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, rows in (("train", chat_rows), ("valid", [chat(f"other {n}", f"yes {n}") for n in range(6)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = replace(run, data=(str(folder),), max_length=512)
    desk = CardDesk()
    look = desk.look_at_data(run)
    assert (look.rows, look.measured_on) == (40, 6)
    outlook = desk.outlook(run, look)
    assert outlook.steps_per_epoch == 3  # of 16 rows
    told = " ".join(" ".join(line.plain for line in summary(run, outlook, look, "x", 200)).split())
    assert "40 rows · measured on 6 rows of their own" in told
    assert "measured  6 rows of the file that comes for it; 40 to train" in "\n".join(line.plain for line in found_lines(look, run, 76, 20))
    own = planning.needs(run, desk.model(run), desk.machine())
    assert own.basis.startswith("6 steps")
    assert planning.needs(run, desk.model(run), desk.machine(), data.load(run).rows, 6).basis == own.basis


def test_the_split_follows_the_rule_of_the_run(run):
    assert split_rows(run, 30) == (27, 3)
    assert split_rows(run, 100_000) == (99_500, 500)
    assert split_rows(replace(run, max_samples=50), 1000) == (45, 5)
    assert split_rows(replace(run, val_set_size=0.0), 1000) == (1000, 0)
    assert split_rows(run, 1000, 70) == (1000, 70)


@pytest.mark.parametrize("size", [(76, 9), (56, 12), (116, 22), (36, 2)])
def test_every_line_fits_and_faults_leave_room_for_facts(run, size):
    width, height = size
    counted = Lengths(tuple(range(50, 150)), True, True, 0, (40,) * 100, 3000)
    faults = tuple(f"row {n}: \x1b[2J{'wide ' * 50}" for n in range(20))
    bins = ((49, 96, 47), (97, 192, 53))
    look = DataLook(run.data, "messages", "because " * 40, 100, 9000, counted, (), faults, 4000, histogram=bins, copies=(2, 3, 90))
    lines = found_lines(look, run, width, height, "+1.9 GiB")
    assert not any("\x1b" in line.plain for line in lines)
    if width > 70:
        assert max(line.cell_length for line in lines) <= width
        assert len(lines) <= max(height, 11)
        assert "held out" in lines[-1].plain or height > 20


def test_the_reading_line_knows_what_nobody_knows():
    assert reading_line(5, 0, 76).plain == "reading …"
    assert "50 % of 2.0 GiB" in reading_line(1 << 30, 2 << 30, 76).plain


@pytest.mark.parametrize("module", [lengths, perplexity, triage])
def test_examples_in_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


def test_the_command_tells_turns_steps_leaks_and_time(run, capsys, write_jsonl, chat_rows):
    fresh = [chat(f"quite another thing {n}", f"with other words {n} of its own") for n in range(6)]
    rows = write_jsonl([*chat_rows, chat("say", "no <|im_end|> yes"), {"messages": []}], "told.jsonl")
    measured = write_jsonl([*chat_rows[:5], *fresh], "measured.jsonl")
    named = ["data", str(rows), "--model", run.model_name_or_path, "--set", f"eval_data={measured}"]
    assert main([*named, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps_per_epoch"] == found["prepared"]["steps_per_epoch"] == 3
    assert found["turns_in"]["user"] == found["turns_out"]["user"] + 1 == 41
    assert found["holdout"]["leaks"] >= 5
    assert len(found["time"]["total_seconds"]) == 3
    assert main(named) == 0
    out = capsys.readouterr().out
    assert "turns      41 user, 41 assistant read, 40 user, 40 assistant written out; 40 trained" in out
    assert f"{found['holdout']['leaks']} more are also in the training rows and not measured" in out
    assert "3 steps an epoch; 0 rows dropped" in out
    assert "\ntime       " in out
    assert "refused    row 42, line 42: messages: the list of messages is empty" in out
    assert "refused    row 41, line 41: its text holds <|im_end|>" in out


def test_rows_that_share_a_fault_are_told_together(run, capsys, write_jsonl, chat_rows):
    rows = write_jsonl([{"messages": []}, {"messages": []}, *chat_rows[:2], {"messages": []}, *[{"messages": []}] * 3], "alike.jsonl")
    assert main(["data", str(rows)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("refused")]
    places = ("rows 1 to 2, lines 1 to 2", "rows 5 to 8, lines 5 to 8")
    assert told == [f"refused    {place}: messages: the list of messages is empty" for place in places]


async def test_columns_of_unknown_names_are_told_once_with_the_way_out(run, until, write_jsonl):
    odd = write_jsonl([{"ask": f"q {n}", "reply": f"a {n}"} for n in range(30)], "odd.jsonl")
    app = app_of(replace(run, data=(str(odd),)))
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "no row of it can be used" in words(app))
        shown = " ".join(words(app).split())
        assert "no row of it can be used: no known format fits: the rows hold the keys 'ask', 'reply'" in shown
        assert "--set data_columns=prompt=ASK,completion=REPLY" in shown
        assert shown.count("no known format fits") == 1
        assert "ctrl+o" not in shown


def test_a_longer_limit_costs_what_rows_that_can_meet_need_where_they_lie_end_to_end(home):
    card = machine.find_card("RTX 4090")
    rows = Lengths((400,) * 97 + (3000, 3000, 4000), measured=True, whole=True)
    asked = RunConfig(model_name_or_path="meta-llama/Llama-3.1-8B-Instruct", max_length=512, per_device_train_batch_size=4, packing="on")
    desk = CardDesk()
    spec = desk.model(asked)
    plan = choose(spec, asked, card, longest=400, lengths=rows.tokens)
    longer = replace(plan.run, max_length=3072)
    now = estimate(spec, plan.run, card, longest=400).total_bytes
    meet, each = (
        estimate(spec, longer, card, longest=most).total_bytes - now for most in (row_of_largest((3000, 3000, 400, 400), 4), 3000)
    )
    assert desk.limit_cost(asked, Outlook(plan), rows) == f"+{gib(meet)}, which does not fit"
    assert meet < 0.7 * each


def test_the_command_says_what_a_longer_limit_costs(run, capsys):
    arguments = ["data", run.data[0], "--model", run.model_name_or_path, "--set", "max_length=40", "--examples", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "at 40: " in out
    assert "128 would keep 99 %, +" in out
    assert "  > abc 0<|im_end|>" in out
    assert "\x1b" not in out


COMMAND = "import sys; from qlora_tui.tui.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_trained_tokens_are_coloured_unless_colours_are_unwelcome(run, home, no_color):
    named = ["data", run.data[0], "--model", run.model_name_or_path, "--examples", "1"]
    terminal = Terminal(COMMAND, *named, QLORA_TUI_HOME=str(home), NO_COLOR=no_color)
    try:
        assert terminal.wait() == 0
        seen = terminal.seen
    finally:
        terminal.close()
    if no_color:
        assert b"  > abc 0<|im_end|>" in seen
        assert b"\x1b[" not in seen
    else:
        assert b"  > \x1b[32mabc 0\x1b[0m\x1b[32m\x1b[2m<|im_end|>\x1b[0m" in seen
        assert b"\x1b[2m<|im_start|>\x1b[0muser" in seen


WIZARD = """
import sys
from qlora_tui.engine.padding import row_of_largest
from qlora_tui.engine.planner import choose
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.units import gib
from qlora_tui.tui.app import run_app
run = RunConfig(model_name_or_path=sys.argv[1], data=(sys.argv[2],), skip_bad_rows=True)
run_app(start=lambda run, reading: None, draft=run, follow=None, on_abort=lambda: None, ascii_only=False)
"""


def test_f2_of_a_real_terminal_opens_the_rows_in_colour(run, home, write_jsonl):
    path = write_jsonl([chat("hi \x1b]52;c;AAAA\x07 \x1b[2J", "yes")] * 3, "hostile.jsonl")
    terminal = Terminal(WIZARD, run.model_name_or_path, str(path), QLORA_TUI_HOME=str(home))
    try:
        terminal.read_until(b"as you said")
        terminal.type(b"\r")
        terminal.read_until(b"Which model?")
        terminal.type(b"\r")
        terminal.read_until(b"held out")
        start = len(terminal.seen)
        terminal.type(b"\x1bOQ")
        terminal.read_until(b"of 3 usable", anew=False)
        terminal.read_some()
        rows = terminal.seen[start:]
        assert b"hi \\x1b]52;c;AAAA" in rows
        assert b"\x1b]52" not in rows
        terminal.type(b"\x1b")
        terminal.read_until(b"go on")
        terminal.type(b"\x11")
        assert terminal.wait() == 0
    finally:
        terminal.close()


async def test_the_screen_of_rows_can_be_left_while_the_tokenizer_is_read(run, until, monkeypatch):
    gate = threading.Event()

    class Waiting(CardDesk):
        def written(self, run):
            gate.wait(20)
            return "too late"

    app = app_of(run, Waiting())
    async with app.run_test(size=(80, 24)) as pilot:
        await to_data(pilot, until, app)
        await until(pilot, lambda: "lengths" in words(app))
        await pilot.press("f2")
        await until(pilot, lambda: isinstance(app.screen, RowsScreen) and "reading the tokenizer" in words(app))
        await pilot.press("f2")
        await until(pilot, lambda: app.screen is wizard_of(app))
        gate.set()
        await pilot.pause()
