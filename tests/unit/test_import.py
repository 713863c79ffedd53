"""`import`: every setting of a foreign config is accounted for, hostile files end in one sentence, and nothing is written over."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine import foreign, preset
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.foreign.huggingface import PEFT_CHOICE
from qlora_tui.engine.foreign.ledger import Imported
from qlora_tui.engine.foreign.source import Code, Source, flatten
from qlora_tui.engine.foreign.trainer import TRAINER_DEFAULTS
from qlora_tui.engine.foreign.writing import text_of
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import KEYS
from qlora_tui.tui.cli import main

Capture = pytest.CaptureFixture[str]
MOST_SECONDS_OF_HOSTILITY = 20


def put(folder: Path, text: str | bytes, name: str = "config.yml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def imported(folder: Path, text: str, name: str = "config.yml", tool: str = "") -> Imported:
    return foreign.load(put(folder, text, name), tool)


def entry(made: Imported, source: str) -> tuple[str, Any]:
    """Return the list that a setting is in and its entry; it is in one."""
    lists = {"mapped": made.mapped, "changed": made.changed, "dropped": made.dropped}
    found = [(name, one) for name, kept in lists.items() for one in kept if one.source == source]
    assert len(found) == 1, (source, found)
    return found[0]


def given_defaults(made: Imported) -> dict[str, Any]:
    return {one.key: one.to for one in made.defaults}


AXOLOTL = "base_model: m\nadapter: qlora\nload_in_4bit: true\nlearning_rate: 1e-4\nlora_r: 8\nlora_alpha: 16\nsequence_len: 2048\n"
UNSLOTH = "from unsloth import FastLanguageModel\nfrom trl import SFTConfig\nmodel = FastLanguageModel.from_pretrained('m')\n"
TRL = "model_name_or_path: m\ndataset_name: a/b\nuse_peft: true\n"
LLAMAFACTORY = "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ndataset: d\ntemplate: qwen\ncutoff_len: 512\n"

# the tables

FOREIGN = Path(foreign.__file__).parent
TABLES = [(path.stem, section) for path in sorted(FOREIGN.glob("*.toml")) for section in tomllib.loads(path.read_text())]


@pytest.mark.parametrize(("file", "section"), TABLES)
def test_a_table_names_every_setting_once_and_keys_that_there_are(file: str, section: str) -> None:
    found = tomllib.loads((FOREIGN / f"{file}.toml").read_text())[section]
    dropped = [name for part in ("harmless", "changes") for names in found.get(part, {}).values() for name in names.split()]
    assert len(dropped) == len(set(dropped))
    assert not set(dropped) & set(found.get("same", {}))
    assert set(found.get("same", {}).values()) <= set(KEYS)
    assert set(found) <= {"same", "harmless", "changes"}


# what is read


@pytest.mark.parametrize(
    ("text", "name", "title"),
    [
        (AXOLOTL, "a.yml", "Axolotl"),
        (LLAMAFACTORY, "b.yaml", "LLaMA-Factory"),
        (TRL, "c.yaml", "TRL"),
        ("model: m\ntraining: {max_seq_length: 5}\nlora: {lora_r: 8}\n", "d.yaml", "Unsloth"),
        (UNSLOTH, "e.py", "Unsloth"),
        ("from trl import SFTConfig\nSFTConfig(seed=1)\n", "f.py", "TRL"),
        ("trl sft --model_name_or_path m --dataset_name a/b", "g.sh", "TRL"),
        ("llamafactory-cli train model_name_or_path=m stage=sft", "h.sh", "LLaMA-Factory"),
    ],
)
def test_a_tool_is_known_by_its_settings_and_that_is_said(tmp_path: Path, text: str, name: str, title: str) -> None:
    made = imported(tmp_path, text, name)
    assert made.tool == title
    assert made.why


def test_the_tool_can_be_named(tmp_path: Path) -> None:
    text = "model_name_or_path: m\nlearning_rate: 1e-4\n"
    with pytest.raises(ConfigError, match=r"it holds model_name_or_path, learning_rate.*--from NAME"):
        imported(tmp_path, text)
    assert imported(tmp_path, text, tool="llamafactory").tool == "LLaMA-Factory"


def test_what_could_be_of_two_tools_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it could be of Axolotl or TRL; say which: --from axolotl"):
        imported(tmp_path, "load_in_4bit: true\n")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("base_model: m\nrl: dpo\n", "a.yml"),
        ("stage: dpo\nfinetuning_type: lora\n", "b.yml"),
        ("trl dpo --model_name_or_path m --dataset_name d", "c.sh"),
        ("from trl import DPOTrainer\nDPOTrainer(model='m')\n", "d.py"),
    ],
)
def test_other_kinds_of_training_are_refused(tmp_path: Path, text: str, name: str) -> None:
    with pytest.raises(ConfigError, match="only supervised fine-tuning is done here"):
        imported(tmp_path, text, name)


# what is done with it


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    made = imported(tmp_path, AXOLOTL)
    assert made.run.learning_rate == 1e-4  # YAML 1.1 reads 1e-4 as a text


def test_defaults_of_the_tool_are_taken_where_the_file_is_silent(tmp_path: Path) -> None:
    axolotl = imported(tmp_path, AXOLOTL)
    assert given_defaults(axolotl) == {
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1.0,
        "optim": "adamw_torch",
        "warmup_steps": 0.03,
        "val_set_size": 0.0,
        "lora_target_modules": ("q_proj", "v_proj"),
    }
    trl = imported(tmp_path, TRL, "trl.yml").run
    assert (trl.learning_rate, trl.max_length, trl.lr_scheduler_type, trl.warmup_steps, trl.too_long) == (2e-5, 1024, "linear", 0.0, "cut")
    assert (trl.lora_r, trl.lora_alpha, trl.lora_dropout, trl.method) == (16, 32, 0.05, "lora")
    assert (trl.per_device_train_batch_size, trl.gradient_accumulation_steps, trl.num_train_epochs) == (8, 1, 3.0)
    factory = imported(tmp_path, LLAMAFACTORY, "lf.yml").run
    assert (factory.learning_rate, factory.lora_r, factory.lora_alpha, factory.max_length, factory.too_long) == (5e-5, 8, 16, 512, "cut")
    unsloth = imported(tmp_path, UNSLOTH + "SFTConfig(max_steps=3)\n", "u.py").run
    assert (unsloth.method, unsloth.lora_r, unsloth.lora_alpha, unsloth.max_length, unsloth.seed) == ("qlora", 16, 16, 2048, 3407)
    assert (unsloth.per_device_train_batch_size, unsloth.gradient_accumulation_steps, unsloth.optim) == (4, 2, "adamw_8bit")


def test_training_arguments_keep_the_defaults_of_transformers(tmp_path: Path) -> None:
    run = imported(tmp_path, UNSLOTH + "TrainingArguments(max_steps=3)\n", "u.py").run
    assert (run.seed, run.per_device_train_batch_size, run.optim) == (42, 8, "adamw_torch")


def test_the_alpha_of_llamafactory_follows_its_rank(tmp_path: Path) -> None:
    assert imported(tmp_path, LLAMAFACTORY + "lora_rank: 24\n").run.lora_alpha == 48
    assert imported(tmp_path, LLAMAFACTORY + "lora_rank: 24\nlora_alpha: 8\n").run.lora_alpha == 8


@pytest.mark.parametrize(
    ("line", "kept", "key", "value"),
    [
        ("optimizer: adamw_bnb_8bit", "mapped", "optim", "adamw_8bit"),
        ("optimizer: paged_adamw_32bit", "changed", "optim", "adamw_torch"),
        ("optimizer: muon", "changed", "optim", "auto"),
        ("lr_scheduler: rex", "changed", "lr_scheduler_type", "cosine"),
        ("lr_scheduler: constant_with_warmup", "mapped", "lr_scheduler_type", "constant"),
        ("lora_target_linear: true", "mapped", "lora_target_modules", ("all-linear",)),
        ("val_set_size: 0.02", "mapped", "val_set_size", 0.02),
        ("sample_packing: true", "dropped", "", None),
        ("deepspeed: zero3.json", "dropped", "", None),
        ("flash_attention: false", "dropped", "", None),
        ("gradient_checkpointing: false", "mapped", "gradient_checkpointing", "false"),
        ("max_steps: -1", "mapped", "max_steps", 0),
        ("eval_steps: 0.1", "changed", "eval_steps", 0),
        ("excess_length_strategy: truncate", "mapped", "too_long", "cut"),
        ("num_epochs: many", "dropped", "", None),
        ("micro_batch_size: 100000", "dropped", "", None),
        ("warmup_ratio: 0.2", "mapped", "warmup_steps", 0.2),
    ],
)
def test_settings_of_axolotl(tmp_path: Path, line: str, kept: str, key: str, value: Any) -> None:
    where, one = entry(imported(tmp_path, AXOLOTL + line + "\n"), line.partition(":")[0])
    assert (where, one.key, one.to) == (kept, key, value)
    assert one.why or kept == "mapped"


def test_what_is_dropped_says_what_that_means(tmp_path: Path) -> None:
    made = imported(tmp_path, AXOLOTL + "sample_packing: true\nwandb_project: p\nlora_mlp_kernel: false\nnever_heard_of: 1\n")
    effects = {one.source: one.effect for one in made.dropped}
    assert effects == {"sample_packing": "changes", "wandb_project": "harmless", "lora_mlp_kernel": "harmless", "never_heard_of": "unknown"}


def test_a_constant_rate_of_theirs_has_no_warm_up(tmp_path: Path) -> None:
    made = imported(tmp_path, TRL + "lr_scheduler_type: constant\nwarmup_ratio: 0.1\n")
    assert (made.run.lr_scheduler_type, made.run.warmup_steps) == ("constant", 0.0)
    assert entry(made, "warmup_ratio")[0] == "changed"


def test_settings_that_do_not_go_together_here_are_changed_by_name(tmp_path: Path) -> None:
    made = imported(
        tmp_path, AXOLOTL + "peft_use_dora: true\nlora_dropout: 0.1\npeft_init_lora_weights: pissa\nwarmup_steps: 9\nmax_steps: 5\n"
    )
    assert {one.source for one in made.changed} >= {"lora_dropout", "peft_init_lora_weights", "warmup_steps"}
    assert [problem for problem in problems(made.run) if problem.where != "data"] == []


def test_names_of_llamafactory_are_looked_up_in_its_registry(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    put(tmp_path / "data", '{"d": {"file_name": "d.json"}}', "dataset_info.json")
    made = imported(tmp_path, LLAMAFACTORY)
    assert made.run.data == (f"{tmp_path}/data/dataset_info.json:d",)
    assert not [note for note in made.notes if "dataset_info" in note]


def test_a_dataset_with_another_shape_is_told_by_name(tmp_path: Path) -> None:
    rows = (
        "datasets:\n- path: a/b\n  type: chat_template\n  field_messages: talk\n  message_property_mappings: {role: who, content: said}\n"
    )
    run = imported(tmp_path, AXOLOTL + rows).run
    assert run.data == ("a/b",)
    assert (run.data_format, run.data_columns) == ("messages", ("messages=talk", "role=who", "content=said"))


@pytest.mark.parametrize(
    ("text", "name", "data"),
    [
        (AXOLOTL + "datasets: [{path: a/b, name: main, split: test}]\n", "a.yml", ("a/b@main:test",)),
        (
            AXOLOTL + "datasets: [{path: a/b, split: train}, {path: json, data_files: [x.jsonl, y.jsonl]}]\n",
            "a.yml",
            ("a/b", "x.jsonl", "y.jsonl"),
        ),
        (AXOLOTL + "pretraining_dataset: a/b\n", "a.yml", ("a/b",)),
        (TRL + "dataset_config: main\ndataset_train_split: train[:5%]\n", "t.yml", ("a/b@main:train[:5%]",)),
        (TRL + "dataset_config: 'two words'\n", "t.yml", ("a/b",)),
        (UNSLOTH + "load_dataset('openai/gsm8k', 'main', split='train')\n", "u.py", ("openai/gsm8k@main",)),
        (UNSLOTH + "load_dataset('csv', data_files={'train': ['a.csv', 'b.csv'], 'test': 'c.csv'})\n", "u.py", ("a.csv", "b.csv")),
        ("model: m\ntraining: {max_seq_length: 9}\ndata: {dataset: a/b, subset: en}\n", "u.yml", ("a/b@en",)),
        (LLAMAFACTORY + "dataset_dir: ONLINE\n", "l.yml", ("d",)),
    ],
)
def test_what_is_trained_on_is_named_as_it_is_here(tmp_path: Path, text: str, name: str, data: tuple[str, ...]) -> None:
    assert imported(tmp_path, text, name).run.data == data


def test_trl_measures_its_test_split_where_it_measures(tmp_path: Path) -> None:
    assert imported(tmp_path, TRL + "eval_strategy: steps\n").run.eval_data == "a/b:test"
    assert imported(tmp_path, TRL + "eval_strategy: epoch\ndataset_test_split: dev\n").run.eval_data == "a/b:dev"
    assert imported(tmp_path, TRL + "dataset_test_split: dev\n").run.eval_data == ""


def test_a_script_is_read_and_not_run(tmp_path: Path) -> None:
    text = (
        UNSLOTH
        + f"open({str(tmp_path / 'run')!r}, 'w')\nLR = 2e-4\nr = r = 16\nfor r in range(3): pass\n"
        + "FastLanguageModel.get_peft_model(model, r=r, lora_alpha=4 * 8, lora_dropout=drop())\n"
        + "args = dict(seed=7)\nSFTConfig(learning_rate=LR, num_train_epochs=-1 * -2, **args, **other)\n"
    )
    made = imported(tmp_path, text, "s.py")
    assert (made.run.learning_rate, made.run.lora_alpha, made.run.num_train_epochs, made.run.seed) == (2e-4, 32, 2.0, 7)
    assert entry(made, "FastLanguageModel.get_peft_model.r")[0] == "dropped"  # a loop gives it other values
    assert entry(made, "FastLanguageModel.get_peft_model.lora_dropout")[1].shown == "drop()"
    assert entry(made, "SFTConfig.**other")[1].effect == "unknown"
    assert not (tmp_path / "run").exists()


def test_a_notebook_is_read_cell_by_cell(tmp_path: Path) -> None:
    cells = ["%%capture\n!pip install x", "import unsloth", "broken (", "SFTConfig(seed=3)"]
    book = {
        "cells": [{"cell_type": "code", "source": [cell]} for cell in cells] + [{"cell_type": "markdown", "source": "SFTConfig(seed=4)"}]
    }
    made = imported(tmp_path, json.dumps(book), "n.ipynb")
    assert made.run.seed == 3
    assert any("cell 3" in note for note in made.notes)


def test_a_command_line_is_read_with_its_variables(tmp_path: Path) -> None:
    text = "# trl sft --seed 1\nM=org/model\nexport X=1\nCUDA_VISIBLE_DEVICES=0 trl sft --model_name_or_path $M \\\n"
    text += "  --seed=5 --lora-r 4 --dataset_name $D"
    made = imported(tmp_path, text, "t.sh")
    assert (made.run.model_name_or_path, made.run.seed, made.run.lora_r) == ("org/model", 5, 4)
    assert entry(made, "dataset_name")[1].shown == "$D"


# hostile files


def bomb(levels: int) -> str:
    return "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, levels))


def merge_bomb(levels: int) -> str:
    first = "a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(50)) + "}\n"
    return first + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], j{n}: 1}}\n" for n in range(1, levels))


HOSTILE: dict[str, tuple[str | bytes, str, str]] = {
    "aliases of aliases": (bomb(9), "c.yml", "stands for more than"),
    "merges of merges": (merge_bomb(9), "c.yml", "more than|none of its settings"),
    "thousands of aliases": ("a: &a [1]\nb: [" + "*a, " * 5000 + "]", "c.yml", "more than 100 aliases"),
    "a list in itself": ("a: &a [*a]", "c.yml", "stands for more than"),
    "a tag that runs": ("base_model: !!python/object/apply:os.system [touch RAN]", "c.yml", "could run code"),
    "a tag that imports": ("base_model: !!python/name:os.system", "c.yml", "could run code"),
    "a tag of its own": ("base_model: !my/tag 1", "c.yml", "could run code"),
    "a key that is a list": ("? [a, b]\n: 1", "c.yml", "unhashable"),
    "deep": ("[" * 50_000, "c.yml", "nested too deeply"),
    "deep JSON": ("[" * 50_000, "c.json", "nested too deeply"),
    "deep Python": ("x = " + "(" * 5_000, "c.py", "Python|nested too deeply"),
    "deep sums": ("SFTConfig(seed=" + "-" * 20_000 + "1)", "c.py", "nested too deeply"),
    "two documents": ("a: 1\n---\nb: 2", "c.yml", "another document"),
    "tabs": ("a:\n\t- b", "c.yml", "is no YAML"),
    "no UTF-8": (b"a: \xff", "c.yml", "UTF-8"),
    "a NUL": ("a: \x00", "c.yml", "is no YAML"),
    "an escape": ("\x1b]52;c;AAAA\x07: 1", "c.yml", "is no YAML"),
    "a long number": ("learning_rate: " + "9" * 5000, "c.yml", "holds a value that is none"),
    "no date": ("a: 2024-99-99", "c.yml", "holds a value that is none"),
    "nothing": ("", "c.yml", "is empty"),
    "a word": ("hello", "c.yml", "no settings by name"),
    "a list": ("- a\n- b", "c.yml", "no settings by name"),
    "no JSON": ("{'a': 1}", "c.json", "is no JSON"),
    "no notebook": ("[1]", "c.ipynb", "is no notebook"),
    "a script without a call": ("print('hi')", "c.py", "no call that sets a run up"),
    "an open quote": ("trl sft --seed '1", "c.sh", "cannot be read"),
    "no command": ("ls -l", "c.sh", "no command of a known tool"),
    "variables that double": ("A=xx\n" + "A=$A$A\n" * 60 + "trl sft --dataset_name $A", "c.sh", "no setting has so many"),
    "our own": ("seed = 1", "c.toml", "say qlora-tui --config"),
    "nothing known": ("foo: 1\nbar: 2", "c.yml", "it holds foo, bar"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_one_sentence(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    text, file, words = HOSTILE[name]
    put(tmp_path, text, file)
    with pytest.raises(ConfigError, match=words):
        foreign.load(Path(file))
    assert main(["import", file]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert len(said.err) < 600
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_a_file_of_100_mib_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.yml"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(ConfigError, match="100 MiB, and a config has a few KiB"):
        foreign.load(path)


@pytest.mark.parametrize("name", ["none.yml", ".", "a\0b.yml"])
def test_what_is_no_file_is_told(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        foreign.load(Path(name))


def test_odd_keys_and_numbers_are_settings_like_others(tmp_path: Path) -> None:
    text = AXOLOTL + 'lora_dropout: .nan\nmax_grad_norm: .inf\n1: a\n"1": b\nnull: c\noff: d\n2024-01-01: e\na.b: 1\na: {b: 2}\n'
    made = imported(tmp_path, text)
    for path in ("lora_dropout", "max_grad_norm", "1", "1 (2)", "null", "false", "2024-01-01", "a.b", "a.b (2)"):
        assert entry(made, path)[0] == "dropped"
    assert (made.run.lora_dropout, made.run.max_grad_norm) == (0.0, 1.0)


def test_a_key_set_twice_is_said(tmp_path: Path) -> None:
    made = imported(tmp_path, AXOLOTL + "seed: 1\nseed: 2\n")
    assert made.run.seed == 2
    assert any("seed is set twice" in note for note in made.notes)
    again = imported(tmp_path, '{"dataset_name": "a/b", "use_peft": true, "seed": 1, "seed": 2}', "c.json")
    assert any("seed is set twice" in note for note in again.notes)


SECRET = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("key", ["wandb_token", "hf_hub_token", "comet_api_key", "push_to_hub_token", "swanlab_api_key", "db_password"])
def test_a_secret_is_never_shown_or_written(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, AXOLOTL + f"{key}: {SECRET}\n")
    for words in (["--json", "--out", "a.toml"], ["--out", "b.toml"]):
        assert main(["import", "config.yml", *words]) == 0
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert "[redacted]" in said.out
    assert all(SECRET not in path.read_text() for path in tmp_path.glob("*.toml"))


@pytest.mark.parametrize(("text", "name"), [("model_revision: ''", "model_revision"), ("output_dir: ''", "output_dir")])
def test_an_empty_text_is_as_if_it_were_not_there(tmp_path: Path, text: str, name: str) -> None:
    made = imported(tmp_path, f"model_name_or_path: m\ndataset_name: a/b\n{text}\n", "c.yml", "trl")
    assert [one.source for one in made.dropped if one.source == name] == [name]
    assert (made.run.revision, made.run.runs_dir) == ("main", "runs")
    assert problems(made.run) == []


# any file at all

KNOWN = sorted({name for tool in foreign.TOOLS for name in (*tool.table.same, *tool.table.rules, *tool.table.changes, *tool.signs)})
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["auto", "1e-4", "qlora", "constant"])
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6
)
TREES = st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=6) | st.integers(), VALUES, max_size=8)


@settings(max_examples=300)
@given(tree=TREES, tool=st.sampled_from([tool.name for tool in foreign.TOOLS]), kind=st.sampled_from(["YAML", "Python", "command line"]))
def test_any_settings_are_accounted_for_and_make_a_file_that_reads_back(tree: dict[Any, Any], tool: str, kind: str) -> None:
    leaves = flatten(tree, "x")
    try:
        made = foreign.convert(Source(Path("x.yml"), kind, leaves), tool)
    except ConfigError:  # it is for another kind of training, as a test above has it
        return
    listed = [one.source for kept in (made.mapped, made.changed, made.dropped) for one in kept]
    assert sorted(listed) == sorted(leaves)
    text = text_of(made, "x.yml")
    assert preset.from_values(preset._read(text, "x")) == made.run
    assert {problem.message for problem in problems(made.run)} <= {"no model named", "no data named"}


@given(st.sampled_from(KNOWN), st.text(max_size=20))
def test_expressions_are_accounted_for(name: str, text: str) -> None:
    for tool in foreign.TOOLS:
        try:
            made = foreign.convert(Source(Path("x.py"), "Python", {name: Code(text)}), tool.name)
        except ConfigError:
            continue
        assert len(made.mapped) + len(made.changed) + len(made.dropped) == 1


RECORDED = [path.read_bytes() for path in sorted((Path(__file__).parents[1] / "recorded" / "foreign").glob("*/*.*"))]
SPOILED = st.tuples(st.sampled_from(RECORDED), st.integers(0, 4000), st.integers(0, 40), st.binary(max_size=6)).map(
    lambda parts: parts[0][: parts[1]] + parts[3] + parts[0][parts[1] + parts[2] :]
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=SPOILED | st.binary(max_size=60) | st.text(max_size=60).map(str.encode),
    ending=st.sampled_from([".yml", ".json", ".py", ".ipynb", ".sh"]),
)
def test_a_spoiled_file_is_read_or_refused(tmp_path: Path, data: bytes, ending: str) -> None:
    path = put(tmp_path, data, f"config{ending}")
    try:
        made = foreign.load(path)
    except ConfigError:
        return
    assert made.mapped or made.changed or made.dropped


# what is written


def run_import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(folder)
    put(folder, AXOLOTL + "sample_packing: true\noptimizer: lion\n")
    return lambda *words: main(["import", "config.yml", *words])


def test_the_run_says_where_changed_values_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert run_import(tmp_path, monkeypatch)() == 0
    text = (tmp_path / "run.toml").read_text()
    assert "# changed from optimizer = lion: lion is not here" in text
    assert "# Axolotl: default of Axolotl\nwarmup_steps = 0.03" in text
    assert "# sample_packing = true: rows are not joined" in text
    assert preset.resolve(config=tmp_path / "run.toml") == foreign.load(tmp_path / "config.yml").run
    said = capsys.readouterr().out
    assert "next: qlora-tui --config run.toml --dry-run" in said
    assert "data: no data named" in said


def test_a_file_that_is_there_stays_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    do = run_import(tmp_path, monkeypatch)
    put(tmp_path, "mine", "run.toml")
    assert do() == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "run.toml").read_text() == "mine"
    assert do("--force") == 0
    assert do("--out", "made/here.toml") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yml", "made", "run.toml"]
    put(tmp_path, "", "file")
    assert do("--out", "file/run.toml") == 2
    assert do("--out", ".", "--force") == 2


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert run_import(tmp_path, monkeypatch)("--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] is None
    assert {"tool", "why", "kind", "mapped", "changed", "dropped", "defaults", "notes", "config", "missing"} <= set(found)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]


@pytest.mark.parametrize("command", [["--no-ui"], ["budget"], ["serve"]])
def test_a_foreign_config_is_recognized_where_ours_is_expected(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run_import(tmp_path, monkeypatch)
    assert main([*command, "--config", "config.yml"]) == 2
    assert "this looks like a config of Axolotl; qlora-tui import config.yml makes a run.toml of it" in capsys.readouterr().err
    put(tmp_path, "a: [", "broken.yaml")
    assert main([*command, "--config", "broken.yaml"]) == 2
    assert "this is no TOML" in capsys.readouterr().err


# what other tools take for granted, by the packages that are installed here


def test_the_defaults_of_transformers_peft_and_bitsandbytes_are_those_of_the_installed_ones() -> None:
    import dataclasses

    from peft import LoraConfig
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT
    from transformers import BitsAndBytesConfig, TrainingArguments

    theirs = {one.name: one.default for one in dataclasses.fields(TrainingArguments)}
    for key, value in TRAINER_DEFAULTS.items():
        assert value == (theirs[key] if key != "optim" else str(theirs[key]).removesuffix("_fused")), key
    lora = LoraConfig()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 8, 0.0)
    assert all(OF_PEFT[kind] == list(PEFT_CHOICE) for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"))
    four = BitsAndBytesConfig(load_in_4bit=True)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("fp4", False)


@pytest.mark.parametrize("tool", ["trl", "llamafactory"])
def test_every_argument_of_the_trainer_is_known(tool: str) -> None:
    """None of them is "not known here": what a person may have set is told as harmless or not."""
    import dataclasses

    from transformers import TrainingArguments

    names = {one.name: "set" for one in dataclasses.fields(TrainingArguments)}
    made = foreign.convert(Source(Path("x.yml"), "YAML", names), tool)
    assert [one.source for one in made.dropped if one.effect == "unknown"] == []
