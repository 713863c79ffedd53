"""After TRL's SFTTrainer page and PEFT page: adapter, quantization and trainer made in a script."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

model_id, output_dir = "meta-llama/Llama-3.2-3B-Instruct", "out"
max_length = 2 * 1024


def main():
    dataset = load_dataset("trl-lib/Capybara", split="train")
    dataset = dataset.train_test_split(test_size=0.1, seed=3)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=quantization, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    peft_config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "lm_head"],
        modules_to_save=["embed_tokens"],
    )
    args = SFTConfig(
        output_dir=f"{output_dir}-sft",
        max_length=max_length,
        learning_rate=2.0e-4,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused",
        bf16=torch.cuda.is_bf16_supported(),
        warmup_ratio=0.03,
        assistant_only_loss=True,
        lr_scheduler_type="constant",
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()


if __name__ == "__main__":
    main()
