# The loss of OpenAI's gpt2-medium (350 M parameters) on OpenWebText, for which nanoGPT's README
# gives a figure to compare with. Nothing is written.
init_from = "gpt2-medium"
batch_size = 8
eval_iters = 500
eval_only = True
