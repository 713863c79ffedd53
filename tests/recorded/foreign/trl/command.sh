# After the command lines at the top of TRL's SFT scripts.
accelerate launch --config_file zero3.yaml trl/scripts/sft.py \
    --model_name_or_path mistralai/Mistral-7B-v0.3 \
    --dataset_name HuggingFaceH4/no_robots \
    --dataset_config default \
    --dtype bfloat16 \
    --attn_implementation flash_attention_2 \
    --use_peft \
    --lora_r 32 --lora_alpha=16 --lora_dropout 0.1 \
    --lora_target_modules q_proj k_proj v_proj \
    --load_in_8bit \
    --assistant_only_loss \
    --loss_type nll \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine_with_min_lr \
    --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' \
    --max-length 4096 \
    --optim paged_adamw_8bit \
    --seed 7
