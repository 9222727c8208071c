# The race of  python -m tools.race:  Tiny Shakespeare by character, nanoGPT's laptop size, Muon.
dataset = "shakespeare_char"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
gradient_accumulation_steps = 1
optimizer = "muon"
max_iters = 2000
warmup_iters = 100
beta2 = 0.99
eval_interval = 200
