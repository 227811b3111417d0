# Go on from a trained model with other text, in its tokens; its shape comes with it, the optimizer starts anew:
#     python prepare.py my.txt --name=mine --tokenizer=out/best.pt
#     python train.py config/finetune.py --init_from=out/best.pt --dataset=mine
out_dir = 'out-finetuned'
batch_size = 8

max_iters = 200
lr_schedule = 'linear'
cooldown = 1.0
learning_rate = 1e-3
muon_learning_rate = 0.005
weight_decay = 0.0
warmup_iters = 10
eval_interval = 50
eval_iters = 0
patience = 2
