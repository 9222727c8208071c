# Tiny Shakespeare on two CPU cores: below 1.4697 on the whole validation split, the loss that
# nanoGPT's README reaches with its preset for characters in about three minutes of an A100.
# A narrow DVA with short queries takes many cheap steps; docs/race.md says what else was tried.
out_dir = "out-speedrun-a100"
dataset = "shakespeare_char"
device = "cpu"
compile = False
block = "dva"
n_layer = 8
n_head = 6
n_embd = 192
qk_dim = 32
rotary = "only"
block_size = 256
batch_size = 16
gradient_accumulation_steps = 1
optimizer = "muon"
learning_rate = 7e-3
embedding_lr = 3.0
min_lr = 1e-5
weight_decay = 0.8
max_iters = 750
lr_decay_iters = 750
warmup_iters = 20
beta2 = 0.99
eval_interval = 750
eval_iters = 28
eval_train = False
log_interval = 50
