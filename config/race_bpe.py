# A race on GPT-2's tokens, where a Bank of Values is at home: Shakespeare's plays (python prepare_data.py plays), 1.4 M tokens.
#   python -m tools.race config/race_bpe.py --contenders=gpt2,dva,gpt2+bank,dva+bank,gpt2+bank:bank_lr=100,dva+bank:bank_lr=10
dataset = "plays"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 8
gradient_accumulation_steps = 1
optimizer = "muon"
max_iters = 400
warmup_iters = 40
eval_interval = 200
compile = True
