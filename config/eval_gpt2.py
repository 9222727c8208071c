# The loss of OpenAI's gpt2 (124 M parameters) on OpenWebText. nanoGPT reports 3.12 on its
# validation split. Nothing is written.
init_from = "gpt2"
batch_size = 8
eval_iters = 500
eval_only = True
