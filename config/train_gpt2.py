# GPT-2 (124 M) on OpenWebText, nanoGPT's setting: 491,520 tokens a step, made for 8 x A100 40GB.
# We have not run its 600,000 steps to the end.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
out_dir = "out-gpt2"
eval_interval = 1000
log_interval = 10
wandb_run_name = "gpt2-124M"
