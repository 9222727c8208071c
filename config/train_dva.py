# DVA at the shapes of GPT-2 124M on OpenWebText: the same run as train_gpt2.py, five C x C matrices a block, no MLP.
# 74.8 M parameters against 124.4 M; we have not run it to its end, so no loss is promised. --bank_layers=4 adds banks.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_dva.py
out_dir = "out-dva"
dataset = "openwebtext"
block = "dva"
qk_dim = 768
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
wandb_project = "owt"
wandb_run_name = "dva-75M"
