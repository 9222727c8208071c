# make demo: a small DVA model on Shakespeare's plays, character by character. It takes one to two
# minutes on two CPU cores and then writes lines that read like a play.
out_dir = "out-demo"
dataset = "plays_char"
block = "dva"
n_layer = 10
n_head = 4
n_embd = 96
block_size = 128
batch_size = 8
gradient_accumulation_steps = 1
optimizer = "muon"
learning_rate = 6e-3
min_lr = 6e-4
max_iters = 1800
lr_decay_iters = 1800
warmup_iters = 100
beta2 = 0.99
eval_interval = 300
eval_iters = 100
log_interval = 25
