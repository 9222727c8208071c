# DVA at the shapes of GPT-2 124M on OpenWebText: the same run as train_gpt2.py. A block has five
# C x C matrices and no MLP. --bank_layers=4 adds banks. We have not run it to its end.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_dva.py
out_dir = "out-dva"
block = "dva"
qk_dim = 768
eval_interval = 1000
log_interval = 10
wandb_run_name = "dva-75M"
