# The loss of OpenAI's gpt2-xl (1558 M parameters) on OpenWebText, for which nanoGPT's README
# gives a figure to compare with. Nothing is written.
init_from = "gpt2-xl"
batch_size = 8
eval_iters = 500
eval_only = True
