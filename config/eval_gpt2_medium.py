# The loss of OpenAI's gpt2-medium (350 M parameters) on OpenWebText, as a baseline: nanoGPT reports 2.84 on its val split.
init_from = "gpt2-medium"
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
