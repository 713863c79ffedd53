"""What a run is: one frozen record, and the one table of keys it is made of.

The command line, the wizard, presets, `run.toml` and the docs are all made from `KEYS`, so a key cannot
exist in one and be missing in another. Names are the Hugging Face family's where it has one. Nothing here
reads a disk or a model; what goes together is in `rules`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_tui.engine.columns import DATA_FORMATS
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.values import Key, Kind, Value

WATCHED = (
    "non_finite",
    "spike",
    "drift",
    "oscillation",
    "gradient",
    "overfitting",
    "memorisation",
    "not_learning",
    "throughput",
    "data_wait",
)
"""The detectors that can end a run or take it back."""
WATCH_STOP = ("spike",)

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Where a run's figures can also go."""

BUILTIN = "builtin:"
DEMO_MODEL = "builtin:smollm2-135m"
DEMO_DATA = "builtin:python-docs"


def _key(
    default: Any,
    group: str,
    text: str,
    *,
    kind: Kind | None = None,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """Declare a field and its row of the table in one place; `Any` because dataclasses need it so."""
    guessed: dict[type, Kind] = {str: "text", int: "integer", float: "number", bool: "flag", tuple: "list"}
    chosen = kind or guessed[type(default)]
    return field(default=default, metadata={"key": Key("", group, chosen, default, text, choices, low, high)})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything a person decides about a run; derived values and secrets never enter.

    `0` for a count that can be chosen (`max_steps`, `eval_steps`, `save_steps`) and `"auto"` mean "choose for me";
    the choice made is told in the `planned` event, never written back here.
    """

    model_name_or_path: str = _key("", "model", "Base model: a local folder, a hub id, or builtin:smollm2-135m.")
    revision: str = _key("main", "model", "Branch, tag or commit of a hub model.")
    method: str = _key(
        "qlora",
        "model",
        "qlora: 4-bit base. lora-8bit: one byte a weight, far closer to the original. lora: 16-bit base. auto: the widest that fits.",
        choices=("qlora", "lora-8bit", "lora", "auto"),
    )
    bnb_4bit_quant_type: str = _key(
        "nf4", "model", "4-bit type of a qlora base; fp4 loses about twice as much as nf4.", choices=("nf4", "fp4")
    )
    bnb_4bit_use_double_quant: bool = _key(True, "model", "Quantize the block constants too: saves 0.37 bits a weight.")
    dtype: str = _key(
        "auto",
        "model",
        "Type of computation. auto: bfloat16 where the device has it, float16 on older cards, else float32.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    attn_implementation: str = _key(
        "sdpa", "model", "Attention: sdpa uses the flash kernel where the model allows it.", choices=("sdpa", "eager")
    )

    lora_r: int = _key(16, "lora", "Rank: what the adapter can learn; memory grows with it.", low=1, high=1024)
    lora_alpha: int = _key(32, "lora", "Scale of the adapter; usually one or two times the rank.", low=1, high=4096)
    lora_dropout: float = _key(0.0, "lora", "Share of adapter inputs dropped in training.", low=0.0, high=0.9)
    lora_target_modules: tuple[str, ...] = _key(
        ("all-linear",), "lora", "Which linear layers get an adapter: all-linear or names such as q_proj."
    )
    init_lora_weights: str = _key(
        "default", "lora", "How the adapter starts: as no change, or pissa: from the base's main directions.", choices=("default", "pissa")
    )
    use_dora: bool = _key(False, "lora", "DoRA: learn length and direction apart; a little better at low ranks, slower.")
    use_rslora: bool = _key(False, "lora", "rsLoRA: scale by alpha / sqrt(rank), which keeps high ranks learning.")
    loraplus_lr_ratio: float = _key(1.0, "lora", "LoRA+: learning rate of B over that of A; 16 is usual, 1: off.", low=1.0, high=256.0)

    data: tuple[str, ...] = _key((), "data", "Training data: files (JSONL, CSV, Parquet ...), folders, hub datasets, builtin:python-docs.")
    data_format: str = _key("auto", "data", "Shape of the rows; auto decides and says why.", choices=DATA_FORMATS)
    data_columns: tuple[str, ...] = _key((), "data", "Columns whose names do not say what they are: FIELD=COLUMN, such as prompt=query.")
    data_weights: tuple[str, ...] = _key((), "data", "Share of each source in an epoch, in their order; empty: as large as they are.")
    chat_template: str = _key("auto", "data", "auto: the model's own. chatml: ChatML, for a model without.", choices=("auto", "chatml"))
    mask_history: bool = _key(False, "data", "Train on the last answer of each chat only.")
    eval_data: str = _key("", "data", "A file of its own to measure on; empty: rows are held out of data.")
    val_set_size: float = _key(0.1, "data", "Held out before training: a share below 1, or a number of rows.", low=0.0)
    max_samples: int = _key(0, "data", "Use only so many rows, chosen by seed (training and held-out together); 0: all.", low=0)
    too_long: str = _key(
        "drop", "data", "Rows over max_length: drop them, cut their end off, or split chats by turns.", choices=("drop", "cut", "split")
    )
    filter_duplicates: str = _key(
        "off",
        "data",
        "Leave out copies of earlier rows: exact ones, or also near ones (nine tenths of their words alike).",
        choices=("off", "exact", "near"),
    )
    perplexity_filter: float = _key(
        0.0,
        "data",
        "Leave out answers that the base already knows: those whose perplexity by the base is under this. 3 is usual, 0: off.",
        low=0.0,
        high=1000.0,
    )
    perplexity_drop_most: float = _key(
        0.2,
        "data",
        "Largest share of the training rows that perplexity_filter may leave out; more has to be confirmed here.",
        low=0.0,
        high=1.0,
    )
    max_length: int = _key(2048, "data", "Longest row in tokens; too_long says what becomes of longer ones.", low=16, high=1_048_576)
    skip_bad_rows: bool = _key(False, "data", "Go on without broken rows, counted, instead of stopping at the first.")

    per_device_train_batch_size: int = _key(
        0, "training", "Rows at once on the device; 0: as many as fit, with as many rows a step.", low=0, high=4096
    )
    gradient_accumulation_steps: int = _key(
        16, "training", "Batches summed before a step; rows a step = both multiplied. Costs no memory.", low=1, high=65_536
    )
    num_train_epochs: float = _key(2.0, "training", "Passes over the data; most tasks peak after 1-2.", low=0.0, high=1000.0)
    max_steps: int = _key(0, "training", "Stop after so many optimizer steps; 0: by epochs.", low=0)
    max_time: float = _key(
        0.0, "training", "Stop and save after this long, such as 2h; pauses count. 0: no limit.", kind="duration", low=0.0
    )
    until: str = _key("", "training", "Be done, measured and saved by then: 07:00, the next one, or 2026-11-28 07:00; empty: no limit.")
    learning_rate: float = _key(2e-4, "training", "Step size; 1e-4 to 3e-4 is usual for LoRA.", low=0.0, high=1.0)
    lr_scheduler_type: str = _key(
        "cosine", "training", "How the learning rate falls after warm-up.", choices=("cosine", "linear", "constant")
    )
    warmup_steps: float = _key(0.05, "training", "Warm-up: a share of all steps below 1, or a number of steps.", low=0.0)
    learning_rate_changes: tuple[str, ...] = _key(
        (), "training", "Changes on the way, as STEP:FACTOR: 121:0.5 halves the learning rate from step 121 on. A report lists a run's own."
    )
    weight_decay: float = _key(0.0, "training", "Pull of the adapter towards zero.", low=0.0, high=1.0)
    max_grad_norm: float = _key(1.0, "training", "Longest gradient; longer ones are scaled down. 0: never.", low=0.0)
    optim: str = _key(
        "auto",
        "training",
        "auto: 8-bit AdamW on CUDA, paged where memory is short; plain AdamW on CPU.",
        choices=("auto", "paged_adamw_8bit", "adamw_8bit", "adamw_torch"),
    )
    seed: int = _key(42, "training", "Decides the data order, the hold-out and the adapter's start.", low=0, high=2**32 - 1)

    gradient_checkpointing: str = _key(
        "auto",
        "memory",
        "Recompute activations: true (all layers: least memory, about a third slower), false, a number of layers, or auto.",
        kind="layers",
    )
    offload_checkpoints: str = _key(
        "auto",
        "memory",
        "Keep inputs of recomputed layers in pinned RAM, for long rows: on, off, or auto: only where nothing faster fits.",
        choices=("auto", "on", "off"),
    )
    loss_chunk_size: int = _key(0, "memory", "Tokens whose logits are held at once; 0: chosen by the vocabulary.", low=0, high=1_048_576)
    cuda_graphs: str = _key(
        "auto",
        "memory",
        "On CUDA, record micro-batches once and replay them: on, off, or auto: where launching kernels would take a quarter of their time.",
        choices=("auto", "on", "off"),
    )
    fused_layers: str = _key(
        "auto",
        "memory",
        "On CUDA, run each layer as a few fused operations: auto: for families that have them, off: as transformers has it.",
        choices=("auto", "off"),
    )
    grad_matmul: str = _key(
        "auto",
        "memory",
        "What gradients on an 8-bit base are multiplied in; auto: the fastest that this card was measured to do, else the usual.",
        choices=("auto", "16bit", "fp8", "int8"),
    )
    packing: str = _key(
        "auto",
        "memory",
        "Lay rows of a batch end to end instead of padding them: on, off, or auto: with fused layers, where padding would cost over 2 %.",
        choices=("auto", "on", "off"),
    )
    rehearsal: bool = _key(True, "memory", "Before step 1, run the longest batch and measure it; off only to save seconds on CUDA.")
    memory_limit_gib: float = _key(0.0, "memory", "Use no more of the device than this; also held by the allocator. 0: all of it.", low=0.0)

    max_temperature: float = _key(
        0.0, "safety", "Pause between steps while the GPU is hotter than this, in °C; goes on 5 below. 0: never.", low=0.0, high=120.0
    )
    end_if_hung: float = _key(
        0.0, "safety", "End the run when it shows no sign of life for this long, such as 30m; 0: only say so.", kind="duration", low=0.0
    )

    eval_steps: int = _key(0, "saving", "Measure the hold-out every so many steps; 0: about five times a run.", low=0)
    sample_prompts: tuple[str, ...] = _key(
        (), "saving", "Show what the model answers to these at every measurement and at the end; it changes nothing of the run."
    )
    final_checks: bool = _key(
        True,
        "saving",
        "At the end, also measure general text, some training rows, and answers after other questions: a few hold-outs' time.",
    )
    save_steps: int = _key(0, "saving", "Checkpoint every so many steps, and where the hold-out is best; 0: about ten times a run.", low=0)
    save_total_limit: int = _key(3, "saving", "Keep so many newest checkpoints; the last healthy one and the best stay besides.", low=1)
    watch_stop: tuple[str, ...] = _key(
        WATCH_STOP, "saving", "Detectors that stop the run when they are sure; the others tell. non_finite always stops."
    )
    watch_rollback: tuple[str, ...] = _key(
        (),
        "saving",
        "Detectors that go back to the last healthy checkpoint with half the learning rate, at most twice, and then stop.",
    )
    export_to: tuple[str, ...] = _key(
        (), "saving", "Exports to make at the end: adapter, merged, gguf, ollama; what they need is checked before the start."
    )
    export_type: str = _key(
        "", "saving", "Weights of gguf and ollama exports: f16 (also when empty), q8_0, or a smaller one of llama-quantize."
    )
    runs_dir: str = _key("runs", "saving", "Folder that holds the runs.")
    notify: tuple[str, ...] = _key(
        (),
        "saving",
        "Tell when the run has ended, however: bell, command:PROGRAM (facts in QLORA_RUN, QLORA_OUTCOME ...), webhook:$NAME or :URL.",
    )
    report_to: tuple[str, ...] = _key(
        (), "saving", "Show the figures there too: tensorboard, wandb, trackio; empty: nowhere. wandb sends them away."
    )


def _table() -> dict[str, Key]:
    return {item.name: dataclasses.replace(item.metadata["key"], name=item.name) for item in dataclasses.fields(RunConfig)}


KEYS: Mapping[str, Key] = _table()
"""The one table: every key by name, in the order in which people meet them."""

GROUPS: tuple[str, ...] = tuple(dict.fromkeys(key.group for key in KEYS.values()))


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint that names the closest known spelling, or nothing.

    >>> nearest("lora_rank", ["lora_r", "lora_alpha"])
    'did you mean lora_r?'
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    return f"did you mean {close[0]}?" if close else ""


def find_key(name: str, *, where: str = "") -> Key:
    """Return the key called `name`.

    Raises:
        ConfigError: no such key; the nearest one is named.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf not in KEYS:
        raise ConfigError(f"unknown key {leaf!r}", hint=nearest(leaf, list(KEYS)) or "qlora-tui --help-keys lists them all", where=where)
    return KEYS[leaf]


def from_values(values: Mapping[str, Value]) -> RunConfig:
    """Build a run from values already read; keys not named keep their defaults."""
    return RunConfig(**values)  # type: ignore[arg-type]  # checked by values.read_text/read_value against the same table


def values_of(run: RunConfig) -> dict[str, Value]:
    """Return every key and its value, in table order."""
    return {name: getattr(run, name) for name in KEYS}  # the table is made from the fields, so no name is guessed


def changed(run: RunConfig) -> dict[str, Value]:
    """Return only what differs from the defaults: what an equivalent command has to say."""
    return {name: value for name, value in values_of(run).items() if value != KEYS[name].default}


def checkpointed_of(run: RunConfig, layers: int) -> int:
    """Return how many of `layers` recompute their inside; all of them where the planner has not chosen yet."""
    if run.gradient_checkpointing in ("auto", "true"):
        return layers
    return 0 if run.gradient_checkpointing == "false" else min(int(run.gradient_checkpointing), layers)


def offloads(run: RunConfig) -> bool:
    """Say whether inputs of recomputed layers wait in RAM; not before it is said or chosen."""
    return run.offload_checkpoints == "on"


def rows_at_once(run: RunConfig) -> int:
    """Return the rows of one micro-batch; one where the planner has not chosen yet."""
    return max(1, run.per_device_train_batch_size)


def rows_per_step(run: RunConfig) -> int:
    """Return how many rows one optimizer step sees; the planner's choice of rows at once never changes it."""
    return rows_at_once(run) * run.gradient_accumulation_steps
