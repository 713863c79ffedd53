"""After Unsloth's notebook on continued pretraining: embeddings trained too, rates of their own, files of the disk."""

from datasets import load_dataset
from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported

MODEL = "unsloth/mistral-7b-v0.3"
model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=4096, load_in_8bit=True, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(
    model,
    r=128,
    target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"],
    lora_alpha=32,
    use_rslora=True,
    loftq_config={"loftq_bits": 4},
    init_lora_weights="loftq",
)
dataset = load_dataset("json", data_files={"train": "korean.jsonl"}, split="train")
settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=8)
trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="story",
    max_seq_length=4096,
    args=UnslothTrainingArguments(
        **settings,
        num_train_epochs=1,
        warmup_ratio=0.1,
        learning_rate=5e-5,
        embedding_learning_rate=5e-6,
        bf16=is_bfloat16_supported(),
        optim="adamw_8bit",
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        seed=3407,
    ),
)
trainer.train()
