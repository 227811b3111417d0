# The first words in ten to fifteen seconds: a small character-level model of Shakespeare on two CPU cores:
#     python train.py config/train_shakespeare_quick.py
dataset = 'shakespeare'
offline_dataset = 'pydoc'  # where Shakespeare can't be downloaded; '' stops instead

n_layer = 2
n_head = 3
n_kv_head = 1
n_embd = 96
block_size = 64
batch_size = 16

max_iters = 220
muon_learning_rate = 0.03
muon_momentum = 0.8
warmup_iters = 5
lr_schedule = 'linear'
eval_interval = 220
eval_iters = 0
