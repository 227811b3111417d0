# The lowest loss on tiny Shakespeare that we know how to reach, in five to nine minutes on two CPU cores:
#     python train.py config/train_shakespeare_best.py
dataset = 'shakespeare'
offline_dataset = 'pydoc'  # where Shakespeare can't be downloaded; '' stops instead

n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 256
block_size = 256
batch_size = 8

max_iters = 1000
warmup_iters = 10
lr_schedule = 'linear'
eval_interval = 250
eval_iters = 0
