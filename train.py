"""Train a GPT.

    python train.py config/train_shakespeare.py                     # on whatever machine this is
    python train.py config/train_shakespeare.py --device=mps --max_iters=500
    python train.py --resume                                        # go on with the run in out/, its settings with it
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --interactive                                   # be asked, and get a config file
"""

import csv
import gc
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hardware
import prepare
from configurator import ask, configure, plain_errors, stop
from model import GPT, GPTConfig, load_checkpoint, load_model, make_optimizer, presets, save_checkpoint

# ----------------------------------------------------------------------------
# settings: change them here, in a config file, or by --name=value
# the run
out_dir = 'out'  # where ckpt.pt (latest), best.pt (lowest validation loss), log.csv and loss.png go
resume = False  # go on from out_dir/ckpt.pt; the settings come from there, config files and flags change them
init_from = ''  # start from this checkpoint's weights instead, shape and tokenizer with them; the optimizer starts anew
eval_only = False  # evaluate once and leave
dry_run = False  # check everything, time a few real steps, print the estimate; writes nothing
interactive = False  # be asked for the main settings; writes an ordinary config file
show_hardware = False  # print what this machine has, and leave
# data
dataset = 'shakespeare'  # folder in data/, made by prepare.py
offline_dataset = ''  # take this one, loudly, where dataset can't be downloaded; '' stops instead
batch_size = 16  # sequences in a micro-batch, on each process
tokens_per_update = 0  # tokens in one update, over all processes and micro-batches; 0: one micro-batch a process
# model; 0 takes the preset's value
model_preset = 'tiny'  # tiny, small, medium or large: about 10M, 25M, 80M, 350M parameters
n_layer = 0  # blocks
n_head = 0  # query heads
n_kv_head = 0  # key and value heads, a divisor of n_head; 0 with an n_head of one's own: the same
n_embd = 0  # width
block_size = 0  # context, tokens
mlp_ratio = 8 / 3  # hidden width over n_embd
dropout = 0.0  # 0.1 to 0.3 where the data is seen many times
bias = False  # biases in the linear layers
gradient_checkpointing = False  # a third more time for far less memory
# optimizer
optimizer = 'muon'  # muon: hidden matrices by Muon, the rest by AdamW; adamw: all by AdamW
learning_rate = 1e-2  # AdamW's peak
muon_learning_rate = 0.03  # Muon's peak
max_iters = 2000  # updates
weight_decay = 0.1  # on matrices
beta1 = 0.9  # AdamW
beta2 = 0.99  # AdamW; 0.95 for large batches
grad_clip = 1.0  # largest gradient norm; 0: off
decay_lr = True  # False: the learning rates stay at their peaks after the warm-up
lr_schedule = 'cosine'  # cosine, or linear: flat, then a straight line down over the last `cooldown` of the run
cooldown = 0.6  # of lr_decay_iters; for the linear schedule
warmup_iters = 20  # updates
lr_decay_iters = 0  # updates after which the learning rate is min_lr; 0: max_iters
min_lr = 0.0  # AdamW's learning rate at the end; Muon's falls in proportion
# reports
log_interval = 10  # updates
eval_interval = 250  # updates; also when checkpoints are saved
eval_iters = 200  # batches of the validation split an evaluation reads, evenly spaced; 0: all
patience = 0  # evaluations without a better validation loss before stopping; 0: never
sample_interval = 0  # evaluations between short samples from the model; 0: none
wandb_log = False  # also log to Weights & Biases (pip install wandb)
wandb_project = 'gpt'  # Weights & Biases
wandb_run_name = ''  # Weights & Biases
# machine
device = 'auto'  # auto, cpu, cuda, cuda:1, mps, xpu
dtype = 'auto'  # auto, float32, bfloat16, float16
compile = 'auto'  # auto, true, false: torch.compile
threads = 0  # CPU threads; 0: torch's choice
seed = 1337  # of weights, batches and dropout
# ----------------------------------------------------------------------------


def interview():
    """Ask for the main settings, write config/my_NAME.py, show what that run would take, and start it if told to."""
    def size(text):
        if text not in presets and not (len(text.split()) == 4 and text.replace(' ', '').isdecimal()):
            raise ValueError(f'one of {", ".join(presets)}, or four numbers')

    def length(text):
        if text not in lengths and not text.isdecimal():
            raise ValueError(f'one of {", ".join(lengths)}, or a number')

    lengths = {'quick': 200, 'short': 1000, 'medium': 5000, 'long': 20000}
    print(hardware.table())
    picked = ask('device', hardware.pick_device(), hardware.pick_device)
    ready = sorted(path.parent.name for path in prepare.DATA.glob('[!.]*/meta.json'))
    text = ask(f'data set: {", ".join(dict.fromkeys([*ready, "shakespeare", "pydoc"]))}, or the path of a text', (ready or ['shakespeare'])[0])
    if os.path.exists(text):
        with plain_errors():
            text = prepare.prepare([text]).name
    shape = ask(f'size: {", ".join(presets)}, or layers, heads, width and context', '4 6 192 128' if picked == 'cpu' else 'tiny', size)
    updates = ask('length: ' + ', '.join(f'{name} ({n:,})' for name, n in lengths.items()) + ', or a number of updates', 'quick', length)
    updates = lengths.get(updates) or int(updates)
    name = ask('name of the run', text)
    if shape in presets:
        lines = [f'model_preset = {shape!r}']
    else:
        lines = [f'{key} = {value}' for key, value in zip(('n_layer', 'n_head', 'n_embd', 'block_size'), shape.split())]
    path = os.path.join('config', f'my_{re.sub(r"[^A-Za-z0-9_-]+", "_", name)}.py')
    os.makedirs('config', exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
        file.write('\n'.join([f'# python train.py {path}', f'dataset = {text!r}', f'device = {picked!r}', *lines, f'max_iters = {updates}',
                              f'eval_interval = {max(1, updates // 8)}  # updates', "lr_schedule = 'linear'", '']))
    again = [sys.executable, __file__, path]
    print(f'\n{path} is written. What it would take:\n', flush=True)
    subprocess.run([*again, '--dry_run', '--max_iters=20'])
    if ask('start it', True):
        sys.exit(subprocess.run(again).returncode)
    print(f'later: python train.py {path}')
    sys.exit()


config = configure(__file__)
if config['resume']:  # the run's own settings are the defaults now
    with plain_errors():
        saved = load_checkpoint(os.path.join(config['out_dir'], 'ckpt.pt'))
    config = configure(__file__, saved=saved['config'])
globals().update(config)
if show_hardware:
    print(hardware.table())
    sys.exit()
if interactive:
    interview()
for low, high, names in (
    (1, 2**40, 'max_iters batch_size log_interval eval_interval'),
    (0, 2**40, 'tokens_per_update eval_iters warmup_iters lr_decay_iters patience sample_interval threads seed'),
    (0, 10, 'learning_rate muon_learning_rate weight_decay cooldown'),
    (0, learning_rate, 'min_lr'),
    (0, 1 - 1e-9, 'beta1 beta2 dropout'),
    (0, 1e9, 'grad_clip'),
):
    for name in names.split():
        if not low <= config[name] <= high:
            stop(f'{name} is {config[name]}: it must be from {low} to {high:g}')
for name, choices in dict(optimizer=('muon', 'adamw'), lr_schedule=('cosine', 'linear'), compile=('auto', 'true', 'false'), model_preset=tuple(presets)).items():
    if config[name] not in choices:
        stop(f"{name} is '{config[name]}': it must be {', '.join(choices[:-1])} or {choices[-1]}")
if resume and init_from:
    stop('resume goes on with a run, init_from starts a new one: give one of them')

# ----------------------------------------------------------------------------
# device, and the other processes if torchrun started several

rank, local_rank, world_size = (int(os.environ.get(name, value)) for name, value in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
master = rank == 0
say = print if master else lambda *args, **kwargs: None
with plain_errors():
    device = hardware.pick_device(device)
    if world_size > 1:
        if device in ('cuda', 'xpu'):
            device = hardware.pick_device(f'{device}:{local_rank}')
            getattr(torch, hardware.kind(device)).set_device(device)
        dist.init_process_group({'cuda': 'nccl', 'xpu': 'xccl'}.get(hardware.kind(device), 'gloo'))
    dtype = hardware.pick_dtype(device, dtype)
hardware.set_up(device, threads)

# ----------------------------------------------------------------------------
# data

KNOWN = (*prepare.DOWNLOADS, 'pydoc')  # what train.py prepares by itself
prepared = lambda name: (prepare.DATA / name / 'meta.json').exists()
with plain_errors():
    if master and not dry_run and dataset in KNOWN and not prepared(dataset):
        try:
            prepare.prepare([dataset])
        except ConnectionError as error:
            if not offline_dataset:
                stop(f'{error}; or train on text of your own (python prepare.py my.txt) or, without any network, with --dataset=pydoc')
            print(f'{dataset} could not be downloaded: {error}')
            print(f'Training on {offline_dataset} instead, which needs no network (offline_dataset; --offline_dataset= switches this off).')
            dataset = offline_dataset
            if not prepared(dataset):
                prepare.prepare([dataset])
    if world_size > 1:  # the others wait for it, and learn what it became
        chosen = [dataset]
        dist.broadcast_object_list(chosen)
        dataset = config['dataset'] = chosen[0]
    config['dataset'] = dataset
    data = prepare.load_dataset(dataset)

# ----------------------------------------------------------------------------
# model

if init_from and not resume:
    with plain_errors():
        saved = load_checkpoint(init_from)
if resume or init_from:
    shape, source = saved['model_config'], os.path.join(out_dir, 'ckpt.pt') if resume else init_from
    if saved['tokenizer'] != data.meta['tokenizer']:
        stop(f'{source} and data/{dataset} have different tokenizers: python prepare.py TEXT --tokenizer={source} makes data that fits')
    if resume and saved['dataset_sha256'] != data.meta['sha256']:
        stop(f'data/{dataset} is not what {source} was trained on (another sha256): --init_from={source} starts a new run from its weights')
else:
    shape = {**presets[model_preset], 'vocab_size': data.meta['vocab_size'], 'mlp_ratio': mlp_ratio, 'bias': bias}
wishes = {name: config[name] for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'block_size') if config[name]}
if n_head and not n_kv_head:
    wishes['n_kv_head'] = n_head
for name, value in wishes.items() if resume or init_from else ():
    if shape[name] != value:
        stop(f'{name} is {shape[name]} in {source} and cannot become {value}')
with plain_errors():
    gpt_config = GPTConfig(**{**shape, **wishes, 'dropout': dropout, 'gradient_checkpointing': gradient_checkpointing})
block_size = gpt_config.block_size
for split, tokens in (('train', data.train), ('val', data.val)):
    if len(tokens) <= block_size:
        stop(f'{split} has {len(tokens):,} tokens, block_size {block_size} needs {block_size + 1}: lower block_size or give more text')

torch.manual_seed(seed)
if resume or init_from:
    with plain_errors():
        model = load_model({**saved, 'model_config': asdict(gpt_config)})
else:
    model = GPT(gpt_config)
model.to(device)
optimizer = make_optimizer(model, optimizer, learning_rate, muon_learning_rate, (beta1, beta2), weight_decay, hardware.fused_adamw(device))
scaler = torch.amp.GradScaler(hardware.kind(device), enabled=dtype == 'float16')
step, tokens_seen, elapsed, val_loss, best_val_loss, best_step = 0, 0, 0.0, math.nan, math.inf, 0
if resume:
    with plain_errors():
        optimizer.load_state_dict(saved['optimizer'])
    for group, fresh in zip(optimizer.param_groups, (learning_rate if not g.get('muon') else muon_learning_rate for g in optimizer.param_groups)):
        group['peak_lr'] = fresh
    scaler.load_state_dict(saved['scaler'])
    step, tokens_seen, elapsed = saved['iter_num'], saved['tokens_seen'], saved['elapsed']
    val_loss, best_val_loss, best_step = saved['val_loss'], saved['best_val_loss'], saved['best_step']
    if step >= max_iters:
        stop(f'{source} has made all of its {step} updates: --max_iters=N goes on to N')

# tokens per update = micro-batches x processes x sequences x block_size
micro_tokens = world_size * batch_size * block_size
tokens_per_update = config['tokens_per_update'] = tokens_per_update or micro_tokens
if tokens_per_update % micro_tokens:
    near = max(1, tokens_per_update // micro_tokens) * micro_tokens
    stop(f'tokens_per_update {tokens_per_update:,} does not divide into micro-batches of {batch_size} x {block_size} tokens on {world_size} '
         f'process{"es" * (world_size > 1)}: take {near:,} or {near + micro_tokens:,}')
n_micro = tokens_per_update // micro_tokens

# ----------------------------------------------------------------------------
# what is in force

peak, peak_origin = hardware.peak_flops(device, dtype)
if not peak:
    peak, peak_origin = hardware.measure_flops(device, dtype), 'measured: a large matrix product'
problem = ''  # why not to compile
if compile == 'auto':  # compiling takes about a minute: it pays on runs of many
    run_seconds = model.flops_per_token() * tokens_per_update * (max_iters - step) / world_size / (0.3 * peak)
    worth = run_seconds > (1200 if device == 'cpu' else 60) and not dry_run
    problem = '' if worth else 'compiling would take longer than it saves'
if compile != 'false' and not problem:
    problem = hardware.compile_problem(device)
config['compile'] = 'false' if problem else {'auto': 'true'}.get(compile, compile)  # a resumed run keeps to it
engine = 'compiled' if config['compile'] == 'true' else f'eager ({problem})' if problem else 'eager'
n_val, n_train, c = len(data.val), len(data.train), gpt_config
say(f'device  {device}: {hardware.device_name(device)}' + f' x {world_size} processes' * (world_size > 1) + f'; {dtype}, {engine}')
say(f'data    {dataset}: {n_train:,} training and {n_val:,} validation tokens, {data.meta["tokenizer"]["kind"]}, vocabulary {c.vocab_size:,}')
say(f'model   {model.n_params() / 1e6:.2f}M parameters: {c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads on {c.n_kv_head}, context {block_size}')
say(f'update  {tokens_per_update:,} tokens = {n_micro} x {world_size} x {batch_size} x {block_size} (micro-batches, processes, sequences, tokens); '
    f'{max_iters:,} updates are {max_iters * tokens_per_update / n_train:.1f} epochs')
say(f'peak    {peak / 1e12:.3g} TFLOP/s ({peak_origin}); MFU is the share of it that the model uses: 30 to 60 % is good, below 10 % the '
    'model is too small for the device, or data or memory hold it up')
say(f'start   {"from " + source if resume or init_from else f"a loss of ln({c.vocab_size}) = {math.log(c.vocab_size):.3f} is a guess"}')

raw_model = model  # what is evaluated, sampled from and saved
if config['compile'] == 'true':
    model = torch.compile(model)
if world_size > 1:
    model = DistributedDataParallel(model, device_ids=[torch.device(device)] if device != 'cpu' else None, gradient_as_bucket_view=True)

# ----------------------------------------------------------------------------
# helpers


def learning_rate_scale(step):
    """The learning rate of update `step` (the first is 0) over its peak."""
    last = lr_decay_iters or max_iters
    floor = min_lr / learning_rate if learning_rate else 0.0
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return 1.0
    if lr_schedule == 'linear':
        return max(floor, min(1.0, (last - step) / max(1, cooldown * last)))
    done = min(1.0, (step - warmup_iters) / max(1, last - warmup_iters))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def training_batches():
    """Micro-batches of this process from the next update on. Sequences are numbered through the run, and an update takes the
    next tokens_per_update / block_size of them whichever way they are shared out."""
    return prepare.batches(data.train, tokens_seen // block_size + rank * batch_size, batch_size, world_size * batch_size, block_size, seed, device)


@torch.no_grad()
def evaluate():
    """Mean loss per token of the validation split, each process reading its share."""
    raw_model.eval()
    total = torch.zeros(2, dtype=torch.float64, device='cpu')  # sum of losses, tokens
    rows = max(2 * batch_size, 4096 // block_size)
    for x, y in itertools.islice(prepare.val_batches(data.val, block_size, rows, eval_iters), rank, None, world_size):
        with hardware.autocast(device, dtype):
            loss = raw_model(x.to(device), y.to(device), return_logits=False)[1]
        n = (y != -1).sum().item()
        total += torch.tensor([loss.item() * n, n], dtype=torch.float64)
    raw_model.train()
    if world_size > 1:
        total = total.to(device, torch.float32)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def state(**more):
    """A checkpoint, with `more` in it."""
    return dict(model=raw_model.state_dict(), model_config=asdict(gpt_config), config=config, tokenizer=data.meta['tokenizer'],
                dataset_sha256=data.meta['sha256'], iter_num=step, tokens_seen=tokens_seen, elapsed=elapsed + time.time() - began,
                val_loss=val_loss, best_val_loss=best_val_loss, best_step=best_step, scaler=scaler.state_dict(), **more)


def read_recent():
    """Mean loss and last gradient norm since the last call; ends the run at the first that is not finite, before anything
    is saved. Looking only now and then spares a GPU the wait at every update."""
    numbers = torch.stack([torch.stack(pair) for pair in recent]).float()
    if world_size > 1:
        dist.all_reduce(numbers)
        numbers /= world_size
    first = step - len(recent) + 1
    recent.clear()
    for i, (loss, norm) in enumerate(numbers.tolist()):
        if not math.isfinite(loss) or (not math.isfinite(norm) and not scaler.is_enabled()):
            sys.exit(f'update {first + i}: the loss is {loss}, the gradient norm {norm} (dtype {dtype}, learning rate {lr:.2e}); stopped, and nothing '
                     f'of it was saved. Try a lower learning rate, more warmup_iters, or --dtype=float32')
    return numbers[:, 0].mean().item(), numbers[-1, 1].item()


def plot():
    """out_dir/loss.png from log.csv."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use('Agg')
    from matplotlib import pyplot
    with open(log_path, encoding='utf-8', newline='') as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    figure, (top, low) = pyplot.subplots(2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(4, 1), layout='constrained')
    for name, style in (('train_loss', 'C0-'), ('val_loss', 'C1o-')):
        points = [(row['iter'], row[name]) for row in rows if name in row]
        top.plot(*zip(*points), style, label=name.replace('_', ' '), markersize=4, linewidth=1.5)
    top.axvline(best_step, color='0.7', linewidth=1, label=f'best: {best_val_loss:.4f} at {best_step}')
    top.set(ylabel='loss (nats per token)', title=f'{dataset}, {raw_model.n_params() / 1e6:.2f}M parameters')
    top.legend()
    low.plot([row['iter'] for row in rows], [row['lr'] for row in rows], 'C2-')
    low.set(xlabel='update', ylabel='learning rate', ylim=(0, None))
    figure.savefig(os.path.join(out_dir, 'loss.png'), dpi=110)
    pyplot.close(figure)


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}'


# ----------------------------------------------------------------------------
# ready: what can fail has failed by now, and nothing was written yet

began = time.time()
bytes_per_token = data.meta['bytes']['val'] / n_val
if eval_only:
    val_loss = evaluate()
    say(f'validation loss {val_loss:.4f}, {val_loss / math.log(2) / bytes_per_token:.4f} bits per byte')
    sys.exit()
log_path, ckpt_path, best_path = (os.path.join(out_dir, name) for name in ('log.csv', 'ckpt.pt', 'best.pt'))
columns = ('iter', 'elapsed_s', 'train_loss', 'val_loss', 'lr', 'grad_norm', 'tokens_per_sec')
if master and not dry_run:
    with plain_errors():
        if not resume and any(map(os.path.exists, (log_path, ckpt_path, best_path))):
            kept = next(name for i in itertools.count(1) if not os.path.exists(name := f'{out_dir.rstrip("/")}-{i}'))
            os.rename(out_dir, kept)
            print(f'kept    the run that was in {out_dir} is in {kept} now')
        os.makedirs(out_dir, exist_ok=True)
        needed, free = 28 * raw_model.n_params(), shutil.disk_usage(out_dir).free
        if needed > free:
            stop(f'{out_dir} has {free / 2**30:.2f} GiB free, the checkpoints need about {needed / 2**30:.2f}: free some, or take another --out_dir')
        rows = []
        if resume and os.path.exists(log_path):  # rows after the checkpoint, and one cut short, are made again
            with open(log_path, encoding='utf-8', newline='') as file:
                rows = [row for row in csv.reader(file) if len(row) == len(columns) and row[0].isdecimal() and int(row[0]) <= step]
        with open(log_path + '.part', 'w', encoding='utf-8', newline='') as file:
            csv.writer(file).writerows([columns, *rows])
        os.replace(log_path + '.part', log_path)
if wandb_log and master:
    try:
        import wandb
        wandb.init(project=wandb_project, name=wandb_run_name or out_dir, config=config)
    except ImportError:
        print('wandb is not installed (pip install wandb): not logging there')
        wandb_log = False

signals = []


def on_signal(number, frame):
    if signals:
        os._exit(128 + number)
    signals.append(number)
    say(f'\n{signal.Signals(number).name}: finishing this update and saving; once more stops at once', flush=True)


signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)

# ----------------------------------------------------------------------------
# the loop

batches = training_batches()
raw_model.train()
first_step, recent, worse, stopped_early = step, [], 0, False
logged_step, logged_at = step, time.time()
gc.collect()
gc.freeze()  # what lives until the end need not be looked through again and again
while step < max_iters and not stopped_early:
    # the learning rate
    scale = learning_rate_scale(step)
    lr = learning_rate * scale
    for group in optimizer.param_groups:
        group['lr'] = group['peak_lr'] * scale

    # accumulate the gradients of one update
    torch.manual_seed(seed + 1000003 * (step + 1) + rank)  # dropout depends on the update alone, not on what came before
    try:
        loss = torch.zeros((), device=device)
        for micro in range(n_micro):
            x, y = next(batches)
            if world_size > 1:
                model.require_backward_grad_sync = micro == n_micro - 1
            with hardware.autocast(device, dtype):
                micro_loss = model(x, y, return_logits=False)[1] / n_micro
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
    except torch.OutOfMemoryError:
        need = 16 * raw_model.n_params() / 2**30
        if batch_size == 1 or world_size > 1:
            sys.exit(f'out of memory at micro-batches of {batch_size} x {block_size}: weights, gradients and optimizer alone take about {need:.2f} GiB. '
                     'Try a smaller batch_size, block_size or model, or --gradient_checkpointing')
        batch_size, n_micro = (batch_size // 2, n_micro * 2) if batch_size % 2 == 0 else (1, n_micro * batch_size)
        say(f'out of memory: going on with micro-batches of {batch_size} sequences, {n_micro} to an update, which stays the same')
        optimizer.zero_grad(set_to_none=True)
        loss = micro_loss = x = y = None
        batches = training_batches()
        continue

    # the step
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step += 1
    tokens_seen += tokens_per_update
    recent.append((loss, norm))

    # log, and evaluate
    interrupted = bool(signals)
    if world_size > 1 and (step % log_interval == 0 or step == max_iters):  # the processes must agree on when to stop
        votes = torch.tensor(float(interrupted), device=device)
        dist.all_reduce(votes)
        interrupted = votes.item() > 0
    elif world_size > 1:
        interrupted = False
    evaluating = step % eval_interval == 0 or step == max_iters
    if not (evaluating or interrupted or step % log_interval == 0):
        continue
    train_loss, grad_norm = read_recent()
    seconds = (time.time() - logged_at) / (step - logged_step)
    speed = tokens_per_update / seconds
    mfu = raw_model.flops_per_token() * speed / (peak * world_size)
    row = [step, f'{elapsed + time.time() - began:.2f}', f'{train_loss:.6f}', '', f'{lr:.6g}', f'{grad_norm:.4f}', f'{speed:.0f}']
    say(f'{step:>{len(str(max_iters))}}/{max_iters}  loss {train_loss:.4f}  lr {lr:.1e}  norm {grad_norm:5.2f}  {1000 * seconds:6.1f} ms  '
        f'{speed:9,.0f} tokens/s  MFU {mfu:4.0%}  {clock((max_iters - step) * seconds)} left', flush=True)
    if dry_run and step - first_step >= 2 * log_interval:
        break
    if evaluating and not dry_run:
        val_loss = evaluate()
        row[3] = f'{val_loss:.6f}'
        better = val_loss < best_val_loss
        worse = 0 if better else worse + 1
        if better:
            best_val_loss, best_step = val_loss, step
        say(f'{"":{2 * len(str(max_iters)) + 1}}  validation {val_loss:.4f}, {val_loss / math.log(2) / bytes_per_token:.4f} bits per byte'
            + ('' if better else f'; rising since update {best_step}, whose {best_val_loss:.4f} is kept in {best_path}'), flush=True)
        stopped_early = bool(patience) and worse >= patience
    if master and not dry_run:
        with open(log_path, 'a', encoding='utf-8', newline='') as file:
            csv.writer(file).writerow(row)
        if wandb_log:
            wandb.log({name: float(value) for name, value in zip(columns, row) if value != ''}, step=step)

    # save
    if master and not dry_run and (evaluating or interrupted):
        with plain_errors():
            if evaluating and better:
                save_checkpoint(best_path, state())
            save_checkpoint(ckpt_path, state(optimizer=optimizer.state_dict()))
        if evaluating:
            plot()
        if evaluating and sample_interval and step // eval_interval % sample_interval == 0:
            prompt = next(prepare.val_batches(data.val, 16, 1))[0].to(device)
            ids = raw_model.generate(prompt, 200, temperature=0.8, generator=torch.Generator(device).manual_seed(seed))
            print(prepare.printable(prepare.Tokenizer(data.meta['tokenizer']).decode(ids[0].tolist())))
    if interrupted:
        break
    logged_step, logged_at = step, time.time()

# ----------------------------------------------------------------------------
# the end

minutes = clock(elapsed + time.time() - began)
memory = f'peak memory {hardware.peak_memory(device) / 2**30:.2f} GiB'
if dry_run:
    say(f'dry run: {max_iters - step} more updates like these take about {clock((max_iters - step) * seconds)}; {memory}; nothing was written')
elif interrupted:
    say(f'saved   {ckpt_path} at update {step}; go on with: python train.py --resume' + f' --out_dir={out_dir}' * (out_dir != 'out'))
else:
    if stopped_early:
        say(f'stopped at update {step}: no better validation loss for {patience} evaluations')
    say(f'done    in {minutes}, {memory}; {best_path} has the best validation loss, {best_val_loss:.4f} of update {best_step}')
    say('next    python sample.py' + f' --out_dir={out_dir}' * (out_dir != 'out') + ' --start="' + ('ROMEO:' if dataset == 'shakespeare' else 'The ') + '"')
    if not os.path.exists(os.path.join(out_dir, 'loss.png')):
        say('        (pip install matplotlib, and the next run draws loss.png)')
if world_size > 1:
    dist.destroy_process_group()
sys.exit(128 + signals[0] if interrupted and signals else 0)
