# A rung of the race on docs/race.md: 5 layers, 96 wide, 13 M tokens.
#   python -m tools.race config/race_ladder.py config/race_5x96.py
# The winners of 3 x 48 are the defaults, but for the rates and DVA's momentum. DVA's qk_dim is
# chosen again, since at 4 x 64 a wider query helped.
name = "5x96"
n_layer = 5
n_head = 6
n_embd = 96
qk_dim = 32
choosing = 2
seeds = 3
lrs = "6e-3,1.2e-2,2.4e-2"
contenders = (
    "gpt2=gpt2:rotary=True,"
    + "dva=dva:momentum=0.9:qk_dim=64|32|128,"
    + "dva in equal time=dva:match=time,"
    + "dva 176 wide in equal time=dva:n_embd=176:match=time,"
    + "dva of 11 layers in equal time=dva:n_layer=11:match=time,"
    + "gpt2 of 2 layers in equal time=gpt2:n_layer=2:match=time,"
    + "gpt2 of 2 x 144 in equal time=gpt2:n_layer=2:n_embd=144:match=time,"
    + "dva of as many parameters 170 wide=dva:n_embd=170,"
    + "dva of as many parameters 17 layers=dva:n_layer=17")
against = "gpt2 of 2 x 144 in equal time"
