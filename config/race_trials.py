# Small changes to the best DVA of 3 x 48 in GPT-2's time, on docs/race.md:
#   python docs/trials.py config/race_ladder.py config/race_trials.py
# All have the settings and the rate that the race chose for it.
name = "3x48"
results = "docs/trials"
n_layer = 3
n_head = 3
n_embd = 48
qk_dim = 16
seeds = 3
contenders = (
    "gpt2=gpt2:rotary=True:learning_rate=0.024,"
    + "dva 3 x 96=dva:momentum=0.9:n_embd=96:match=time:learning_rate=0.024,"
    + "two heads=heads:momentum=0.9:n_head=2:n_embd=96:match=time:learning_rate=0.024,"
    + "four heads=heads:momentum=0.9:n_head=4:n_embd=96:match=time:learning_rate=0.024,"
    + "GPT-2 block first=first:momentum=0.9:n_head=6:n_embd=96:match=time:learning_rate=0.024,"
    + "GPT-2 block last=last:momentum=0.9:n_head=6:n_embd=96:match=time:learning_rate=0.024,"
    + "attention alone=attention:n_head=3:n_embd=96:match=time:learning_rate=0.024|0.012,"
    + "values 144 wide=dva:momentum=0.9:n_embd=72:value_dim=144:match=time:learning_rate=0.024,"
    + "with a bank=dva+bank:momentum=0.9:n_embd=96:match=time:learning_rate=0.024:bank_lr=64")
against = "dva 3 x 96"
