# A rung of the race on docs/race.md: 2 layers, 32 wide, 1.2 M tokens.
#   python -m tools.race config/race_ladder.py config/race_2x32.py
# Both blocks are tuned here, with as many trials for each.
name = "2x32"
n_layer = 2
n_head = 2
n_embd = 32
qk_dim = 16
seeds = 5
lrs = "6e-3,1.2e-2,2.4e-2"
contenders = (
    "gpt2=gpt2:rotary=True:n_head=2|1|4"
    + ":weight_decay=0.1|0.03|0.3:embedding_lr=1|0.3|3:warmup=0.1|0.03|0.3:momentum=0.95|0.9|0.98,"
    + "dva=dva:qk_dim=16|8|32"
    + ":weight_decay=0.1|0.03|0.3:embedding_lr=1|0.3|3:warmup=0.1|0.03|0.3:momentum=0.95|0.9|0.98,"
    + "dva in equal time=dva:match=time,"
    + "dva 64 wide in equal time=dva:n_embd=64:match=time,"
    + "gpt2 of 1 layer in equal time=gpt2:n_layer=1:match=time,"
    + "gpt2 of 1 x 48 in equal time=gpt2:n_layer=1:n_embd=48:match=time,"
    + "gpt2 of 1 x 64 in equal time=gpt2:n_layer=1:n_embd=64:match=time,"
    + "dva of as many parameters 42 wide=dva:n_embd=42,"
    + "dva of 3 x 40 in equal time=dva:n_layer=3:n_embd=40:match=time,"
    + "dva of as many parameters 6 layers=dva:n_layer=6,"
    + "gpt2 AdamW=gpt2:optimizer=adamw:learning_rate=6e-3|1.2e-2|2.4e-2:warmup=0.1|0.03,"
    + "dva AdamW=dva:optimizer=adamw:learning_rate=6e-3|1.2e-2|2.4e-2:warmup=0.1|0.03,"
    + "gpt2 bank=gpt2+bank,"
    + "dva bank=dva+bank")
against = "gpt2 of 1 x 48 in equal time,gpt2 of 1 x 64 in equal time,gpt2 AdamW,gpt2 bank"
