# The loss of OpenAI's gpt2-medium (350 M parameters) on OpenWebText. nanoGPT reports 2.84 on its
# validation split. Nothing is written.
init_from = "gpt2-medium"
batch_size = 8
eval_iters = 500
eval_only = True
