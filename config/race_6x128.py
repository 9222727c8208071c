# A rung of the race on docs/race.md: 6 layers, 128 wide, 27 M tokens.
#   python -m tools.race config/race_ladder.py config/race_6x128.py
# The winners of 3 x 48 are the defaults, but for the rates and DVA's momentum. DVA's qk_dim is
# chosen again, since at 4 x 64 a wider query helped.
name = "6x128"
n_layer = 6
n_head = 4
n_embd = 128
qk_dim = 64
choosing = 2
seeds = 2
lrs = "6e-3,1.2e-2,2.4e-2"
contenders = (
    "gpt2=gpt2:rotary=True,"
    + "dva=dva:momentum=0.9:qk_dim=64|32|128,"
    + "dva in equal time=dva:match=time,"
    + "dva 224 wide in equal time=dva:n_embd=224:match=time,"
    + "dva of 13 layers in equal time=dva:n_layer=13:match=time,"
    + "gpt2 of 3 layers in equal time=gpt2:n_layer=3:match=time,"
    + "gpt2 of 3 x 192 in equal time=gpt2:n_layer=3:n_embd=192:match=time,"
    + "dva of as many parameters 226 wide=dva:n_embd=226,"
    + "dva of as many parameters 18 layers=dva:n_layer=18")
against = "gpt2 of 3 x 192 in equal time"
