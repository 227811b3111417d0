# The lowest loss on tiny Shakespeare that we know how to reach, in eight to ten minutes on two CPU cores:
#     python train.py config/train_shakespeare_best.py
dataset = 'shakespeare'
offline_dataset = 'pydoc'  # where Shakespeare can't be downloaded; '' stops instead

n_layer = 4
n_head = 3
n_kv_head = 1
n_embd = 192
block_size = 256
batch_size = 8

max_iters = 1600
warmup_iters = 10
lr_schedule = 'linear'
eval_interval = 400
eval_iters = 0
