# The race of  python -m tools.race:  Tiny Shakespeare by character, nanoGPT's laptop size, Muon.
dataset = "shakespeare_char"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
max_iters = 2000
warmup = 0.05
beta2 = 0.99
