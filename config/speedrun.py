# Tiny Shakespeare on a laptop's CPU, as fast as we can: below the loss at which nanoGPT's laptop
# run ends, 1.886 on the whole validation split, in a small part of that run's time.
out_dir = "out-speedrun"
dataset = "shakespeare_char"
device = "cpu"
compile = False
block = "dva"
n_layer = 4
n_embd = 128
block_size = 64
batch_size = 24
gradient_accumulation_steps = 1
optimizer = "muon"
learning_rate = 1.5e-2
min_lr = 5e-4
max_iters = 190
lr_decay_iters = 190
warmup_iters = 20
beta2 = 0.99
eval_interval = 190
eval_iters = 73
eval_train = False
log_interval = 50
