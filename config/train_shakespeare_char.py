# nanoGPT's character model for one GPU: 6 layers, 384 wide, 10.7 M parameters (with --block=dva
# 3.1 M). It overfits past its best validation loss, which is about 1.47 for nanoGPT: best.pt keeps
# the best.
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99
eval_interval = 250
log_interval = 10
always_save_checkpoint = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"
