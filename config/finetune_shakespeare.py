# Fine-tune OpenAI's GPT-2 on Shakespeare's text: 20 steps of 32,768 tokens at a constant learning
# rate, about two passes over the text.
#   pip install safetensors
#   python prepare_data.py shakespeare
#   python train.py config/finetune_shakespeare.py
# nanoGPT's choice is gpt2-xl, the largest of four sizes: 25 GB for weights, gradients and
# AdamW before any activation. --init_from=gpt2 has a twelfth of them, and a shorter --block_size
# saves memory, too.
out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
wandb_project = "shakespeare"
wandb_run_name = "ft-gpt2-xl"
