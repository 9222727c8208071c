# make try: the model of docs/try.html, the page that needs no installation. It is smaller than the
# demo's, so that the page stays small, and trained for longer.
out_dir = "out-try"
dataset = "plays_char"
block = "dva"
rotary = "only"
n_layer = 7
n_embd = 80
qk_dim = 32
bank_layers = 2
block_size = 128
batch_size = 8
gradient_accumulation_steps = 1
optimizer = "muon"
learning_rate = 8e-3
min_lr = 4e-4
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99
eval_interval = 1000
eval_iters = 100
log_interval = 25
