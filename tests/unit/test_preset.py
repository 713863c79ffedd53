from __future__ import annotations

import importlib.resources
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine import budget, machine, models, places, preset
from qlora_tui.engine.errors import ConfigError, ConfigErrors
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import KEYS, RunConfig, from_values

GIB = 1 << 30
LAPTOP = machine.Machine("laptop", "cpu", 8 * GIB, 2 * GIB, cores=4)


def one_value(key):
    if key.choices:
        return st.sampled_from(key.choices)
    low, high = max(key.low, 0), min(key.high, 1e9)
    kinds = {
        "integer": st.integers(int(low), int(high)),
        "number": st.floats(low, high, allow_nan=False),
        "duration": st.floats(low, high, allow_nan=False),
        "flag": st.booleans(),
        "layers": st.sampled_from(("auto", "true", "false", "1", "12")),
        "list": st.lists(st.text(st.characters(codec="utf-8")), max_size=3).map(tuple),
        "text": st.text(st.characters(codec="utf-8")),
    }
    return kinds[key.kind]


def write(folder, text, name="run.toml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.fixed_dictionaries({name: one_value(key) for name, key in KEYS.items()}))
def test_a_run_written_as_toml_reads_back_the_same(tmp_path, values):
    run = from_values(values)
    assert from_values(preset.read_file(write(tmp_path, preset.to_toml(run)))) == run


def test_a_written_run_holds_every_key_with_its_help():
    text = preset.to_toml(RunConfig())
    for key in KEYS.values():
        assert f"# {key.help}\n{key.name} = " in text


@pytest.mark.parametrize("name", preset.names())
def test_every_preset_reads_has_no_problem_and_fits_its_card(name):
    found = preset.load(name)
    run = preset.resolve(preset=name)
    assert found.title
    assert found.why.endswith(".")
    assert [problem.where for problem in problems(run)] in ([], ["data"])
    spec = models.find(run.model_name_or_path)
    device = machine.find_card(found.card) if found.card else LAPTOP
    needed = budget.estimate(spec, run, device)
    assert needed.fits
    assert not needed.tight
    assert not models.find_entry(run.model_name_or_path).gated
    assert run.max_length <= spec.max_position_embeddings


@pytest.mark.parametrize("name", preset.names())
def test_every_key_of_a_preset_has_its_reason(name):
    lines = (importlib.resources.files("qlora_tui.presets") / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    about = next(place for place, line in enumerate(lines) if place and line.startswith("["))
    bare = [line for before, line in itertools.pairwise(lines[about:]) if "=" in line.split("#")[0] and not before.startswith("# ")]
    assert bare == []


@pytest.mark.parametrize("name", preset.names())
def test_every_preset_answers_a_goal(name):
    assert preset.load(name).goal in [goal.name for goal in preset.GOALS]


def test_every_goal_has_a_preset_for_a_small_card():
    eight = machine.find_card("RTX 4060 8GB")
    for goal in preset.GOALS:
        runs = [preset.resolve(preset=name) for name in preset.names() if preset.load(name).goal == goal.name]
        assert any(budget.estimate(models.find(run.model_name_or_path), run, eight).fits for run in runs), goal.name


def test_the_demo_is_what_it_promises():
    run = preset.resolve(preset="demo")
    assert (run.max_samples, run.val_set_size, run.max_steps) == (264, 24, 30)
    assert run.per_device_train_batch_size * run.gradient_accumulation_steps == 8
    assert (run.lora_r, run.learning_rate, run.max_length, run.gradient_checkpointing) == (16, 5e-4, 512, "false")


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean chat-8b-24gb"):
        preset.load("chat-8b-24g")


def test_keys_may_stand_in_any_table(tmp_path):
    text = "seed = 7\n[lora]\nlora_r = 8\n[anything]\nmax_length = 64\n[data]\ndata = ['a.jsonl']\n[preset]\ntitle = 'x'\n"
    assert preset.read_file(write(tmp_path, text)) == {"seed": 7, "lora_r": 8, "max_length": 64, "data": ("a.jsonl",)}


def test_dotted_keys_and_inline_tables_are_read(tmp_path):
    assert preset.read_file(write(tmp_path, "lora.lora_r = 8\ntraining = {seed = 3}\n")) == {"lora_r": 8, "seed": 3}


def test_all_faults_are_listed_with_file_line_and_key(tmp_path):
    path = write(tmp_path, '# seed = "no"\nlora_rank = 8\n\n[training]\nseed = "seven"\nlearning_rate = "2e-4"\n')
    with pytest.raises(ConfigErrors) as caught:
        preset.read_file(path)
    first, second, third = (str(problem) for problem in caught.value.problems)
    assert first.startswith(f"{path}:2: unknown key 'lora_rank'; did you mean lora_r")
    assert second.startswith(f"{path}:5: seed = 'seven' is not a whole number")
    assert third.startswith(f"{path}:6: learning_rate")


def test_a_key_given_twice_names_both_lines(tmp_path):
    path = write(tmp_path, "seed = 1\n[training]\nseed = 2\n")
    with pytest.raises(ConfigErrors, match=r"run\.toml:3: seed is set twice; the first is in line 1"):
        preset.read_file(path)


def test_a_table_under_a_keys_name_is_a_wrong_type(tmp_path):
    path = write(tmp_path, "[lora_r]\nvalue = 8\n")
    with pytest.raises(ConfigErrors, match=r"run\.toml:1: lora_r"):
        preset.read_file(path)


@pytest.mark.parametrize("text", ["seed 7", "seed = ", "seed = 2e-4x", "[training"])
def test_what_is_no_toml_is_refused_with_its_line(tmp_path, text):
    with pytest.raises(ConfigError, match=r"run\.toml.*not valid TOML") as caught:
        preset.read_file(write(tmp_path, text + "\n"))
    assert caught.value.exit_code == 2


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        preset.read_file(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="a folder"):
        preset.read_file(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"runs_dir = '\xff'")
    with pytest.raises(ConfigError, match="UTF-8"):
        preset.read_file(tmp_path / "latin.toml")


def test_later_wins_and_origins_tell_who_did(tmp_path):
    user = places.place("config") / "config.toml"
    user.parent.mkdir(parents=True)
    user.write_text("lora_r = 2\nseed = 1\nmax_length = 100\nruns_dir = 'mine'\n")
    config = write(tmp_path, "seed = 3\n")
    chosen = {"preset": "demo", "config": config, "flags": {"lora_alpha": 5}}
    run = preset.resolve(**chosen)
    assert (run.lora_r, run.seed, run.max_length, run.runs_dir, run.lora_alpha) == (16, 3, 512, "mine", 5)
    told = preset.origins(**chosen)
    assert told["runs_dir"] == str(user)
    assert (told["lora_r"], told["seed"], told["lora_alpha"], told["eval_data"]) == ("preset demo", str(config), "flags", "default")


def test_without_anything_the_defaults_hold():
    assert preset.resolve() == RunConfig()
