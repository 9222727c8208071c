# A race at the size of nanoGPT's character preset for a GPU, with few steps for two CPU cores.
#   python -m tools.race config/race_char_384.py
# On a GPU give it the preset's own length: --batch_size=64 --max_iters=5000 --dropout=0.2
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 16
max_iters = 300
beta2 = 0.99
