# A rung of the race on docs/race.md: 4 layers, 64 wide, 5.4 M tokens.
#   python -m tools.race config/race_ladder.py config/race_4x64.py
# The winners of 3 x 48 are the defaults, but for the rates and DVA's momentum. DVA's one head may
# need more channels than there, so its qk_dim is chosen again, and so are GPT-2's heads, in a
# contender of its own.
name = "4x64"
n_layer = 4
n_head = 4
n_embd = 64
qk_dim = 16
seeds = 5
lrs = "1.2e-2,2.4e-2"
contenders = (
    "gpt2=gpt2:rotary=True,"
    + "dva=dva:momentum=0.9:qk_dim=32|64|16|128,"
    + "dva 128 wide in equal time=dva:n_embd=128:match=time:learning_rate=0.012,"
    + "gpt2 of other heads=gpt2:n_head=2|8|1:learning_rate=0.012,"
    + "gpt2 of 2 x 96 in equal time=gpt2:n_layer=2:n_head=6:n_embd=96:match=time,"
    + "gpt2 of 2 x 96 and 3 heads in equal time=gpt2:n_layer=2:n_head=3:n_embd=96:match=time"
    + ":learning_rate=6e-3|1.2e-2,"
    + "dva in equal time=dva:match=time,"
    + "gpt2 of 2 layers in equal time=gpt2 of other heads:n_layer=2:match=time,"
    + "dva of as many parameters 106 wide=dva:n_embd=106,"
    + "dva of 8 layers in equal time=dva:n_layer=8:match=time")
against = "gpt2 of 2 x 96 in equal time,gpt2 of other heads"
