"""After Unsloth's chat notebooks: a template by name, SFTConfig, and training on responses alone."""

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastModel
from unsloth.chat_templates import get_chat_template, standardize_data_formats, train_on_responses_only

model, tokenizer = FastModel.from_pretrained(
    model_name="unsloth/gemma-3-4b-it",
    max_seq_length=1024,
    load_in_4bit=False,
    load_in_8bit=False,
    full_finetuning=False,
    token=None,
)
model = FastModel.get_peft_model(
    model,
    finetune_vision_layers=False,
    finetune_language_layers=True,
    finetune_attention_modules=True,
    finetune_mlp_modules=False,
    r=8,
    lora_alpha=8,
    lora_dropout=0,
    bias="none",
    random_state=3407,
)
tokenizer = get_chat_template(tokenizer, chat_template="gemma-3")
dataset = standardize_data_formats(load_dataset("mlabonne/FineTome-100k", split="train"))
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    eval_dataset=None,
    args=SFTConfig(
        dataset_text_field="text",
        per_device_train_batch_size=2,
        num_train_epochs=1,
        warmup_ratio=0.05,
        learning_rate=2e-4,
        optim="adamw_8bit",
        lr_scheduler_type="linear",
        report_to="none",
    ),
)
trainer = train_on_responses_only(
    trainer,
    instruction_part="<start_of_turn>user\n",
    response_part="<start_of_turn>model\n",
)
trainer.train()
