# A character-level model of Shakespeare in about six minutes on two CPU cores, in seconds on a GPU:
#     python train.py config/train_shakespeare.py
dataset = 'shakespeare'
offline_dataset = 'pydoc'  # where Shakespeare can't be downloaded; '' stops instead

n_layer = 4
n_head = 2
n_kv_head = 1
n_embd = 128
block_size = 256
batch_size = 8

max_iters = 1800
warmup_iters = 10
lr_schedule = 'linear'
eval_interval = 450
eval_iters = 0
