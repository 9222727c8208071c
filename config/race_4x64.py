# A rung of the race on docs/race.md: 4 layers, 64 wide, 5.4 M tokens.
#   python -m tools.race config/race_ladder.py config/race_4x64.py
# The winners of 3 x 48 belong here. Until it is finished, GPT-2's warm-up is that of 2 x 32.
name = "4x64"
n_layer = 4
n_head = 4
n_embd = 64
qk_dim = 32
choosing = 2
seeds = 3
lrs = "6e-3,1.2e-2,2.4e-2"
contenders = (
    "gpt2=gpt2:rotary=True:warmup=0.03,"
    + "dva=dva,"
    + "dva in equal time=dva:match=time,"
    + "dva 128 wide in equal time=dva:n_embd=128:match=time,"
    + "dva of 8 layers in equal time=dva:n_layer=8:match=time,"
    + "gpt2 of 2 layers in equal time=gpt2:n_layer=2:match=time,"
    + "gpt2 of 2 x 96 in equal time=gpt2:n_layer=2:n_embd=96:match=time,"
    + "dva of as many parameters 106 wide=dva:n_embd=106,"
    + "dva of as many parameters 12 layers=dva:n_layer=12")
against = "gpt2 of 2 x 96 in equal time"
