# The first words in ten to twenty seconds: a small character-level model of Shakespeare on two CPU cores:
#     python train.py config/train_shakespeare_quick.py
dataset = 'shakespeare'
offline_dataset = 'pydoc'  # where Shakespeare can't be downloaded; '' stops instead

n_layer = 2
n_head = 2
n_kv_head = 1
n_embd = 128
block_size = 64
batch_size = 12

max_iters = 260
muon_learning_rate = 0.03
muon_momentum = 0.8
warmup_iters = 5
lr_schedule = 'linear'
eval_interval = 260
eval_iters = 0
