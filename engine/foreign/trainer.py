"""Arguments that TRL, LLaMA-Factory and Unsloth share: those of transformers' trainer and of PEFT's LoraConfig, by their own names.

Sources: the documentation of transformers' TrainingArguments and of PEFT's LoraConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

from qlora_tui.engine.foreign import huggingface as hf
from qlora_tui.engine.foreign.table import read
from qlora_tui.engine.values import Value

TRAINER_DEFAULTS: Mapping[str, Value] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "seed": 42,
}
"""What transformers' trainer takes for granted, where it decides what is trained."""


_STEPS, _SHARE = hf.warmup("lr_scheduler_type")
TRAINER = read(
    "trainer",
    "settings",
    rules={
        "optim": hf.optimizer,
        "lr_scheduler_type": hf.schedule,
        "warmup_steps": _STEPS,
        "warmup_ratio": _SHARE,
        "max_steps": hf.steps_at_most,
        "bf16": hf.brain_float,
        "fp16": hf.half_float,
        "gradient_checkpointing": hf.recompute,
        "adam_beta1": hf.as_here(0.9, "AdamW's first beta is 0.9"),
        "adam_beta2": hf.as_here(0.999, "AdamW's second beta is 0.999"),
        "adam_epsilon": hf.as_here(1e-8, "AdamW's epsilon is 1e-8"),
        "eval_strategy": hf.strategy("eval_steps", "eval_steps", "about five times a run"),
        "evaluation_strategy": hf.strategy("eval_steps", "eval_steps", "about five times a run"),
        "eval_steps": hf.every("eval_steps", "eval_strategy", "about five times a run"),
        "save_strategy": hf.strategy("save_steps", "save_steps", "about ten times a run"),
        "save_steps": hf.every("save_steps", "save_strategy", "about ten times a run"),
    },
)
"""Arguments of transformers' trainer, by their own names."""

ADAPTER = read("trainer", "adapter", rules={"target_modules": hf.layers, "init_lora_weights": hf.start_of_adapter, "bias": hf.no_bias})
"""Arguments of PEFT's LoraConfig, by their own names."""
