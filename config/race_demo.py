# Is the demo's model as good as a GPT-2 that is tuned for its time? docs/race.md has the answer.
#   python prepare_data.py plays_char
#   python -m tools.race config/race_demo.py
# DVA's settings are those of config/demo.py, from 41 trials. GPT-2 has the same seconds, and its
# shape and settings are chosen here.
name = "demo"
results = "docs/race_demo"
dataset = "plays_char"
n_layer = 5
n_head = 4
n_embd = 96
qk_dim = 16
block_size = 128
batch_size = 12
max_iters = 1950
weight_decay = 0.2
embedding_lr = 2.0
beta2 = 0.99
dtype = "float32"
compile = False
seeds = 3
lrs = "7e-3,1.4e-2"
contenders = (
    "dva=dva:rotary=only:warmup=0.026:learning_rate=7e-3,"
    + "gpt2 in equal time=gpt2:rotary=only:warmup=0.026:match=time"
    + ":n_layer=5|3|2:n_embd=96|128|64:n_head=4|2|8:weight_decay=0.2|0.05")
