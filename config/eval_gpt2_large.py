# The loss of OpenAI's gpt2-large (774 M parameters) on OpenWebText, as a baseline: nanoGPT reports 2.67 on its val split.
init_from = "gpt2-large"
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
