# A race on words, where a Bank of Values is at home: Shakespeare's plays with the first 4096 of
# GPT-2's tokens.
#   python prepare_data.py plays --tokenizer=gpt2:4096
#   python -m tools.race config/race_bpe.py --contenders=gpt2:rotary=True,dva,gpt2+bank,dva+bank
dataset = "plays"
n_layer = 6
n_head = 4
n_embd = 128
block_size = 128
batch_size = 8
gradient_accumulation_steps = 1
optimizer = "muon"
max_iters = 600
warmup_iters = 60
eval_interval = 200
