#!/bin/bash
# After the command line form of LLaMA-Factory's example (examples/train_lora/*.sh).
set -x
MODEL=Qwen/Qwen2.5-7B-Instruct

CUDA_VISIBLE_DEVICES=0 llamafactory-cli train \
    --stage sft \
    --do_train \
    --model_name_or_path ${MODEL} \
    --quantization_bit 8 \
    --finetuning_type lora \
    --lora_rank 16 \
    --lora_target q_proj,k_proj,v_proj,o_proj \
    --pissa_init true \
    --dataset owner_rows \
    --template qwen \
    --cutoff_len 1024 \
    --output_dir ${OUT} \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-4 \
    --num_train_epochs 3.0 \
    --lr_scheduler_type polynomial \
    --optim adafactor \
    --warmup_steps 0 \
    --bf16 \
    --report_to wandb \
    --run_name my-run
