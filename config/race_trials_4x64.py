# Small changes to DVA where GPT-2 has learned to copy, on docs/race.md:
#   python docs/trials.py config/race_ladder.py config/race_trials_4x64.py
# All have the settings and the rate that the race chose for the DVA that they begin with. The
# runs and times of the first three are those of docs/race/4x64.
name = "4x64"
results = "docs/trials"
n_layer = 4
n_head = 4
n_embd = 64
qk_dim = 16
seeds = 2
contenders = (
    "gpt2=gpt2:rotary=True:learning_rate=0.012,"
    + "dva 4 x 64=dva:qk_dim=64:momentum=0.9:learning_rate=0.012,"
    + "dva 4 x 128=dva:qk_dim=64:momentum=0.9:n_embd=128:match=time:learning_rate=0.012,"
    + "two heads 4 x 64=heads:n_head=2:qk_dim=32:momentum=0.9:learning_rate=0.012,"
    + "four heads 4 x 64=heads:n_head=4:qk_dim=16:momentum=0.9:learning_rate=0.012,"
    + "GPT-2 block last=last:n_head=2:qk_dim=64:momentum=0.9:n_embd=128:match=time"
    + ":learning_rate=0.012,"
    + "two heads=heads:n_head=2:qk_dim=32:momentum=0.9:n_embd=128:match=time:learning_rate=0.012,"
    + "values 192 wide=dva:qk_dim=64:momentum=0.9:n_embd=96:value_dim=192:match=time"
    + ":learning_rate=0.012,"
    + "with a bank=dva+bank:qk_dim=64:momentum=0.9:n_embd=128:match=time:learning_rate=0.012"
    + ":bank_lr=64")
against = "dva 4 x 64,dva 4 x 128"
