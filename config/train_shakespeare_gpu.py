# A 10M-parameter, character-level model of Shakespeare, for a GPU:
#     python train.py config/train_shakespeare_gpu.py
# On one H200, with an earlier version: validation 1.466 at update 700, in a run of 56 s. The run makes 16
# passes over the text, so dropout and patience are on.
dataset = 'shakespeare'
offline_dataset = 'pydoc'  # where Shakespeare can't be downloaded; '' stops instead

n_layer = 6
n_head = 6
n_kv_head = 2
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.2

max_iters = 1000
lr_schedule = 'linear'
warmup_iters = 50
eval_interval = 100
eval_iters = 0
patience = 4
