# Tiny Shakespeare on a laptop's CPU, as fast as we can: below the loss at which nanoGPT's laptop
# run ends, 1.886 on the whole validation split, in a small part of that run's time.
out_dir = "out-speedrun"
dataset = "shakespeare_char"
device = "cpu"
compile = False
block = "dva"
n_layer = 4
n_embd = 128
qk_dim = 32
rotary = "only"
block_size = 64
batch_size = 24
gradient_accumulation_steps = 1
optimizer = "muon"
learning_rate = 1.5e-2
embedding_lr = 3.0
min_lr = 5e-4
max_iters = 170
lr_decay_iters = 170
warmup_iters = 20
beta2 = 0.99
eval_interval = 170
eval_iters = 73
eval_train = False
log_interval = 50
