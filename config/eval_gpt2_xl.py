# The loss of OpenAI's gpt2-xl (1558 M parameters) on OpenWebText, as a baseline: nanoGPT reports 2.54 on its val split.
init_from = "gpt2-xl"
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
