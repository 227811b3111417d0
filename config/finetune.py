# Continue from a small public model with your own text in its tokens:
#     hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M
#     python sample.py --from_hf=SmolLM2-135M
#     python prepare.py my.txt --name=mine --tokenizer=out-SmolLM2-135M
#     python train.py config/finetune.py --init_from=out-SmolLM2-135M --dataset=mine
# or from a model of your own (--init_from=out, --tokenizer=out; --learning_rate=1e-3).
# The rate was chosen on SmolLM2-135M and tiny Shakespeare, in 20 updates of 512 tokens: validation went from
# 4.08 to 3.79 at 3e-5, to 3.64 at 1e-4, to 3.65 at 3e-4 and only to 3.94 at 1e-3. Muon did no better and
# takes longer on small updates.
out_dir = 'out-finetuned'
batch_size = 8

optimizer = 'adamw'
learning_rate = 1e-4
weight_decay = 0.0
max_iters = 200
warmup_iters = 10
lr_schedule = 'linear'
cooldown = 1.0
eval_interval = 50
eval_iters = 0
patience = 2
