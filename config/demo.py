# make demo: a small DVA model on Shakespeare's plays, character by character, which then writes
# lines that read like a play. It ends at 1.550 on the whole validation split, the mean of five
# seeds in float32. Few layers, queries of 16 channels and no learned positions make a step cheap;
# docs/speed.md says what else was tried.
out_dir = "out-demo"
dataset = "plays_char"
block = "dva"
n_layer = 5
n_head = 4
n_embd = 96
qk_dim = 16
rotary = "only"
block_size = 128
batch_size = 12
gradient_accumulation_steps = 1
optimizer = "muon"
learning_rate = 7e-3
embedding_lr = 2.0
min_lr = 1e-5
weight_decay = 0.2
max_iters = 1950
lr_decay_iters = 1950
warmup_iters = 50
beta2 = 0.99
eval_interval = 650
eval_iters = 67
eval_train = False
log_interval = 25
