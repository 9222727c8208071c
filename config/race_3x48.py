# A rung of the race on docs/race.md: 3 layers, 48 wide, 2.8 M tokens.
#   python -m tools.race config/race_ladder.py config/race_3x48.py
# Both blocks are tuned here, with as many trials for each, by the mean of two seeds: at 2 x 32 one
# was lucky with a high rate.
name = "3x48"
n_layer = 3
n_head = 3
n_embd = 48
qk_dim = 16
seeds = 5
choosing = 2
lrs = "1.2e-2,2.4e-2"
contenders = (
    "gpt2=gpt2:rotary=True:n_head=3|1|6"
    + ":weight_decay=0.1|0.03:embedding_lr=1|3:warmup=0.1|0.03:momentum=0.95|0.9,"
    + "dva=dva:qk_dim=16|8|32"
    + ":weight_decay=0.1|0.03:embedding_lr=1|3:warmup=0.1|0.03:momentum=0.95|0.9,"
    + "dva 96 wide in equal time=dva:n_embd=96:match=time,"
    + "gpt2 of 2 x 72 in equal time=gpt2:n_layer=2:n_embd=72:match=time,"
    + "dva of as many parameters 72 wide=dva:n_embd=72,"
    + "gpt2 of 2 layers in equal time=gpt2:n_layer=2:match=time,"
    + "dva in equal time=dva:match=time,"
    + "gpt2 AdamW=gpt2:optimizer=adamw:learning_rate=1.2e-2|2.4e-2:warmup=0.1|0.03,"
    + "dva AdamW=dva:optimizer=adamw:learning_rate=1.2e-2|2.4e-2:warmup=0.1|0.03,"
    + "dva 96 wide at 0.012 in equal time=dva:n_embd=96:match=time:learning_rate=0.012,"
    + "gpt2 bank=gpt2+bank,"
    + "dva bank=dva+bank")
against = "gpt2 of 2 x 72 in equal time,gpt2 AdamW,gpt2 bank"
