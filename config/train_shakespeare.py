# A character-level model of Shakespeare in three to six minutes on two CPU cores, seconds to a minute on a GPU:
#     python train.py config/train_shakespeare.py
dataset = 'shakespeare'
offline_dataset = 'pydoc'  # where Shakespeare can't be downloaded; '' stops instead

n_layer = 4
n_head = 3
n_kv_head = 1
n_embd = 192
block_size = 256
batch_size = 8

max_iters = 1100
warmup_iters = 10
lr_schedule = 'linear'
eval_interval = 275
eval_iters = 0
