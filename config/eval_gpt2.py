# The loss of OpenAI's gpt2 (124 M parameters) on OpenWebText, as a baseline: nanoGPT reports 3.12 on its val split.
init_from = "gpt2"
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
