# A race on words, which suit a Bank of Values: Shakespeare's plays with the first 4096 of GPT-2's
# tokens. A run of 600 steps is short, 0.4 tokens per parameter: config/race_ladder.py is not.
#   python prepare_data.py plays --tokenizer=gpt2:4096
#   python -m tools.race config/race_bpe.py --contenders=gpt2:rotary=True,dva,gpt2+bank,dva+bank
dataset = "plays"
n_layer = 6
n_head = 4
n_embd = 128
block_size = 128
batch_size = 8
max_iters = 600
