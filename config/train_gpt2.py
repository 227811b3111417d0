# A model of GPT-2's size (124M class) on FineWeb-Edu, for 8 GPUs of 80 GB. First the data, then the run:
#     python prepare.py hf:HuggingFaceFW/fineweb-edu --name=fineweb-edu --tokenizer=gpt2 --max_mb=13000
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# On several machines share data/ and out_dir, and type on each:
#     export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#     torchrun --nnodes=2 --nproc_per_node=8 --max_restarts=3 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
#         train.py config/train_gpt2.py --resume
# 5000 updates of 524,288 tokens are 2.6 billion tokens, about 21 per parameter. Expect a validation loss near
# 3.2: that comes from published runs of this size, not from a run of this file.
dataset = 'fineweb-edu'

n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
mlp_ratio = 3.1
block_size = 1024
vocab_size = 50304  # GPT-2's 50,257, rounded up to a multiple of 64, which GPUs multiply faster
batch_size = 32  # sequences on each GPU; halved automatically where memory runs out on one GPU
tokens_per_update = 524288

max_iters = 5000
lr_schedule = 'linear'
learning_rate = 3e-3
muon_learning_rate = 0.02
muon_momentum = 0.95
beta2 = 0.95
weight_decay = 0.1
warmup_iters = 250
eval_interval = 250
eval_iters = 40
