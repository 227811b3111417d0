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
import warnings
from contextlib import contextmanager
from dataclasses import asdict

began = time.time()  # before the slow imports: elapsed_s counts them

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hardware
import prepare
from configurator import ask, configure, plain_errors, read_block, stop
from model import (GPT, GPTConfig, load_checkpoint, load_model, load_optimizer, make_optimizer, presets,
                   save_checkpoint)

# ----------------------------------------------------------------------------
# settings: change them here, in a config file, or by --name=value
# the run
out_dir = 'out'  # where ckpt.pt (latest), best.pt (lowest validation loss), log.csv and loss.png go
resume = False  # go on from out_dir/ckpt.pt with its settings, which config files and flags may change
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
mlp_ratio = 2.66  # hidden width over n_embd, rounded up to a multiple of 64
dropout = 0.0  # 0.1 to 0.3 where the data is seen many times
bias = False  # biases in the linear layers
gradient_checkpointing = False  # a third more time for far less memory
# optimizer
optimizer = 'muon'  # muon: hidden matrices by Muon, the rest by AdamW; adamw: all by AdamW
learning_rate = 1e-2  # AdamW's peak
muon_learning_rate = 0.02  # Muon's peak
muon_momentum = 0.85  # 0.95 for long runs of large updates
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

KNOWN = (*prepare.DOWNLOADS, 'pydoc')  # data sets that are prepared where they are missing


def interview():
    """Ask for the main settings, write config/my_NAME.py, show what that run would take, and start it if told to."""
    lengths = {'quick': 200, 'short': 1000, 'medium': 5000, 'long': 20000}

    def one_of(words, numbers):
        def check(text):
            if text not in words and not (text.replace(' ', '').isdecimal() and len(text.split()) == numbers):
                raise ValueError(f'one of {", ".join(words)}, or {numbers} number{"s" * (numbers > 1)}')
        return check

    print(hardware.table())
    chosen = dict(device=ask('device', hardware.pick_device(), hardware.pick_device))
    ready = sorted(path.parent.name for path in prepare.DATA.glob('[!.]*/meta.json'))
    text = ask(f'data set ({", ".join(dict.fromkeys([*ready, *KNOWN]))}) or the path of a text', (ready or KNOWN)[0])
    with plain_errors():
        chosen['dataset'] = text if text in ready else prepare.prepare([text]).name
    default = '4 6 192 128' if chosen['device'] == 'cpu' else 'tiny'
    size = ask(f'size ({", ".join(presets)}) or layers, heads, width, context', default, one_of(presets, 4))
    if size in presets:
        chosen['model_preset'] = size
    else:
        chosen |= zip(('n_layer', 'n_head', 'n_embd', 'block_size'), map(int, size.split()))
    known = ', '.join(f'{name}: {n}' for name, n in lengths.items())
    length = ask(f'length ({known}) or updates', 'quick', one_of(lengths, 1))
    chosen['max_iters'] = lengths.get(length) or int(length)
    chosen['eval_interval'] = max(1, chosen['max_iters'] // 8)
    path_of = lambda name: os.path.join('config', f'my_{re.sub(r"[^A-Za-z0-9_-]+", "_", name)}.py')

    def new(name):
        if os.path.exists(path_of(name)):
            raise ValueError(f'{path_of(name)} exists already')

    path = path_of(ask('name of the run', f'{chosen["dataset"]}-{chosen["max_iters"]}', new))
    os.makedirs('config', exist_ok=True)
    _, comments, _ = read_block(__file__)
    with open(path, 'w', encoding='utf-8') as file:
        file.write(f'# python train.py {path}; all settings: python train.py --help\n')
        file.writelines(f'{key} = {value!r}  # {comments[key]}\n' for key, value in chosen.items())
    print(f'\n{path} is written. A few real updates, to see what it takes:\n', flush=True)
    failed = subprocess.run([sys.executable, __file__, path, '--dry_run']).returncode
    if failed or not ask('\nstart it', True):
        print(f'later: python train.py {path}')
        sys.exit(failed)
    os.execv(sys.executable, [sys.executable, __file__, path])  # signals reach the run itself


signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # nothing to save yet
config = configure(__file__)
log_path, ckpt_path, best_path = (os.path.join(config['out_dir'], name) for name in ('log.csv', 'ckpt.pt', 'best.pt'))
if not config['resume'] and os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0':
    stop('torchrun --max_restarts needs train.py --resume: without it a restart would begin anew')
if 'RANK' in os.environ:  # a restart is the same command, so that the first start has --resume, too
    config['resume'] = config['resume'] and os.path.exists(ckpt_path)
if config['resume']:  # the run's own settings are the defaults now
    with plain_errors():
        saved = load_checkpoint(ckpt_path)
    config = {**configure(__file__, saved={**saved['config'], 'out_dir': config['out_dir']}), 'init_from': ''}
config['compile'] = config['compile'].lower()
globals().update(config)
sys.stdout.reconfigure(errors='backslashreplace')  # a terminal without some character must not end a run
if show_hardware:
    print(hardware.table())
    sys.exit()
if interactive:
    interview()
for low, high, names in (
    (1, 2**40, 'max_iters batch_size log_interval eval_interval'),
    (0, 2**40, 'tokens_per_update eval_iters warmup_iters lr_decay_iters patience sample_interval seed'),
    (0, 1024, 'threads'),
    (0, 10, 'learning_rate muon_learning_rate weight_decay'),
    (0, 1, 'cooldown'),
    (0, learning_rate, 'min_lr'),
    (0, 1 - 1e-9, 'beta1 beta2 muon_momentum dropout'),
    (0, 1e9, 'grad_clip'),
):
    for name in names.split():
        if not low <= config[name] <= high:
            stop(f'{name} is {config[name]}: it must be from {low} to {high:g}')
for name, choices in (
    ('optimizer', 'muon adamw'), ('lr_schedule', 'cosine linear'), ('compile', 'auto true false'),
    ('model_preset', ' '.join(presets)),
):
    if config[name] not in choices.split():
        stop(f"{name} is '{config[name]}': it must be one of {', '.join(choices.split())}")
if dry_run:
    log_interval = 2

# ----------------------------------------------------------------------------
# device, and the other processes if torchrun started several

rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0
say = print if master else lambda *args, **kwargs: None
with plain_errors():
    device = hardware.pick_device(device)
    if world_size > 1:
        if device in ('cuda', 'xpu'):
            device = hardware.pick_device(f'{device}:{os.environ["LOCAL_RANK"]}')
            getattr(torch, hardware.kind(device)).set_device(device)
        warnings.simplefilter('ignore', FutureWarning)  # of names that torch 2.13 would have otherwise and 2.9 not yet
        dist.init_process_group({'cuda': 'nccl', 'xpu': 'xccl'}.get(hardware.kind(device), 'gloo'))
    dtype = hardware.pick_dtype(device, dtype)
hardware.set_up(device, threads)

# ----------------------------------------------------------------------------
# data


def prepare_missing(name):
    if name in KNOWN and not (prepare.DATA / name / 'meta.json').exists():
        prepare.prepare([name])


with plain_errors():
    if master and not dry_run:
        try:
            prepare_missing(dataset)
        except ConnectionError as error:
            if not offline_dataset:
                stop(f'{error}; or train on your own text (python prepare.py my.txt) or on --dataset=pydoc, without a network')
            print(f'{dataset} could not be fetched: {error}')
            print(f'training on {offline_dataset} instead, as offline_dataset says; --offline_dataset= switches that off')
            dataset = offline_dataset
            prepare_missing(dataset)
    if world_size > 1:  # the others wait for it, and learn what it became
        here = saved['iter_num'] if resume else 0
        chosen = [dataset, here]
        dist.broadcast_object_list(chosen)
        dataset, there = chosen
        if here != there:
            stop(f'{ckpt_path} is of update {here} on rank {rank}, of {there} on rank 0: all machines need the same out_dir')
    config['dataset'] = dataset
    data = prepare.load_dataset(dataset)

# ----------------------------------------------------------------------------
# model

wishes = {name: config[name] for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'block_size') if config[name]}
if n_head and not n_kv_head:
    wishes['n_kv_head'] = n_head
if init_from:
    with plain_errors():
        saved = load_checkpoint(init_from)
if resume or init_from:
    source = init_from or ckpt_path
    shape = saved['model_config']
    for name, value in wishes.items():
        if shape[name] != value:
            stop(f'{name} is {shape[name]} in {source} and cannot become {value}')
    if saved['tokenizer'] != data.meta['tokenizer']:
        stop(f'{source} and data/{dataset} have different tokenizers: '
             f'"python prepare.py TEXT --tokenizer={source}" makes data that fits')
    for name in ('mlp_ratio', 'bias', 'model_preset', 'optimizer') if resume else ():
        if config[name] != saved['config'].get(name):
            stop(f'{name} is {saved["config"].get(name)} in {source} and cannot become {config[name]}')
    if resume and 'optimizer' not in saved:
        stop(f'{source} has no optimizer state (a copy of best.pt?): --init_from={source} starts a new run from its weights')
    if resume and saved['dataset_sha256'] != data.meta['sha256']:
        stop(f'data/{dataset} is not what {source} was trained on (another sha256): '
             f'--init_from={source} starts a new run from its weights')
else:
    given = dict(vocab_size=data.meta['vocab_size'], mlp_ratio=mlp_ratio, bias=bias)
    shape = {**presets[model_preset], **given, **wishes}
with plain_errors():
    gpt_config = GPTConfig(**{**shape, 'dropout': dropout, 'gradient_checkpointing': gradient_checkpointing})
block_size = gpt_config.block_size
for split, tokens in (('train', data.train), ('val', data.val)):
    if len(tokens) <= block_size:
        stop(f'{split} has {len(tokens):,} tokens, block_size {block_size} needs {block_size + 1}: '
             'lower block_size or give more text')
with torch.device('meta'):  # weights, gradients, and Muon's momentum; AdamW takes a third more
    least, memory = 12 * GPT(gpt_config).n_params() / 2**30, hardware.describe(device)['memory_gib']
if 0 < memory < least:
    stop(f'weights, gradients and optimizer take at least {least:,.1f} GiB, {device} has {memory}: take a smaller model')

torch.manual_seed(seed)
with plain_errors():
    model = load_model({**saved, 'model_config': asdict(gpt_config)}) if resume or init_from else GPT(gpt_config)
    model.to(device)
optimizer = make_optimizer(model, optimizer, learning_rate, (beta1, beta2), muon_learning_rate, muon_momentum, weight_decay)
scaler = torch.amp.GradScaler(hardware.kind(device), enabled=dtype == 'float16')
step, tokens_seen, elapsed, val_loss, best_val_loss, best_step = 0, 0, 0.0, math.nan, math.inf, 0
if resume:
    with plain_errors():
        load_optimizer(optimizer, saved['optimizer'])
    if saved['scaler']:
        scaler.load_state_dict(saved['scaler'])
    step, tokens_seen, elapsed = saved['iter_num'], saved['tokens_seen'], saved['elapsed']
    val_loss, best_val_loss, best_step = saved['val_loss'], saved['best_val_loss'], saved['best_step']
    if step >= max_iters and not eval_only:
        stop(f'{source} has made all of its {step} updates: --max_iters=N goes on to N')
saved = None

# tokens in an update = micro-batches x processes x sequences x block_size
micro_tokens = world_size * batch_size * block_size
tokens_per_update = config['tokens_per_update'] = tokens_per_update or micro_tokens
n_micro = tokens_per_update // micro_tokens
if tokens_per_update % micro_tokens:
    near = max(1, n_micro) * micro_tokens
    stop(f'tokens_per_update {tokens_per_update:,} is no multiple of batch_size {batch_size} x block_size {block_size} x '
         f'{world_size} process{"es" * (world_size > 1)}: take {near:,} or {near + micro_tokens:,}')

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
config['compile'] = 'false' if problem or compile == 'false' else 'true'  # a resumed run keeps to it
engine = 'compiled' if config['compile'] == 'true' else 'eager' + f' ({problem})' * bool(problem)
c = gpt_config
many = f' x {world_size} processes' * (world_size > 1)
say(f'device  {device}: {hardware.device_name(device)}{many}; {dtype}, {engine}')
say(f'data    {dataset}: {len(data.train):,} training and {len(data.val):,} validation tokens, '
    f'{data.meta["tokenizer"]["kind"]}, vocabulary {c.vocab_size:,}')
say(f'model   {model.n_params() / 1e6:.2f}M parameters: {c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads on '
    f'{c.n_kv_head}, context {block_size}')
say(f'update  {tokens_per_update:,} tokens = {n_micro} micro-batches x {world_size} processes x {batch_size} sequences x '
    f'{block_size}; {max_iters:,} updates are {max_iters * tokens_per_update / len(data.train):.1f} epochs')
say(f'MFU     is the share of {peak / 1e12:.3g} TFLOP/s ({peak_origin}) that the model uses: 30 to 60 % is good, '
    'below 10 % the model is too small for the device, or data or memory hold it up')
guess = f'guessing has a loss of ln({c.vocab_size}) = {math.log(c.vocab_size):.3f}'
say('start   ' + (f'from {source}, update {step}' if resume or init_from else guess))

raw_model = model  # what is evaluated, sampled from and saved
if config['compile'] == 'true':
    torch._dynamo.config.suppress_errors = True  # what can't be compiled after all runs eagerly, with torch's warning
    model = torch.compile(model)
if world_size > 1:
    model = DistributedDataParallel(model, device_ids=[torch.device(device)] if device != 'cpu' else None,
                                    broadcast_buffers=False, gradient_as_bucket_view=True)

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
    """Micro-batches of this process from the next update on. Sequences are numbered through the run, and an update takes
    the next tokens_per_update / block_size of them, whichever way they are shared out."""
    first = tokens_seen // block_size + rank * batch_size
    return prepare.batches(data.train, first, batch_size, world_size * batch_size, block_size, seed, device)


def what_is_left():
    """The checkpoint that a run which ends by an error leaves."""
    return f'{ckpt_path} is from before it, whole' if os.path.exists(ckpt_path) else 'there is no checkpoint yet'


def out_of_memory(error):
    """Whether it says so, in whatever words the device has for it."""
    return bool(re.search("MemoryError|out of memory|can't allocate|ALLOC_FAILED", f'{type(error).__name__}: {error}'))


@contextmanager
def last_words():
    """Where disk, data or memory give out inside: one line that says so, what is left, and what to try."""
    try:
        yield
    except OSError as error:
        stop(f'{error.filename}: {error.strerror}; {what_is_left()}' if error.filename else f'{error}; {what_is_left()}')
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        stop(f'out of memory at micro-batches of {batch_size} x {block_size}: {str(error)[:200]}; {what_is_left()}. Weights, '
             f'gradients and optimizer alone take {least:.2f} GiB or more: try a smaller batch_size, block_size or model, '
             'or --gradient_checkpointing')


@torch.no_grad()
def evaluate():
    """Mean loss per token of the validation split, each process reading its share, in batches that take less memory than
    an update of micro-batches of batch_size."""
    raw_model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, tokens
    rows, fit = (max(2 * size, 4096 // block_size) for size in (config['batch_size'], batch_size))
    every_batch = prepare.val_batches(data.val, block_size, rows, eval_iters)
    for batch in itertools.islice(every_batch, rank, None, world_size):
        for x, y in zip(*(part.split(fit) for part in batch)):
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
    return dict(
        model=raw_model.state_dict(), model_config=asdict(gpt_config), config=config, tokenizer=data.meta['tokenizer'],
        dataset_sha256=data.meta['sha256'], iter_num=step, tokens_seen=tokens_seen, elapsed=elapsed + time.time() - began,
        val_loss=val_loss, best_val_loss=best_val_loss, best_step=best_step, scaler=scaler.state_dict(), **more,
    )


def not_finite(at, what):
    sys.exit(not master or f'update {at}: {what} ({dtype}, learning rate {lr:.2e}): stopped; {what_is_left()}. '
             'Try a lower learning rate, more warmup_iters, or --dtype=float32')


def read_recent():
    """Mean loss and last gradient norm since the last call; ends the run at the first that is not finite, before anything
    is saved. Looking only now and then spares a GPU the wait at every update."""
    numbers = torch.stack([torch.stack(pair) for pair in recent]).float()  # (updates, 2)
    if world_size > 1:
        dist.all_reduce(numbers)
        numbers /= world_size
    first = step - len(recent) + 1
    recent.clear()
    for at, (loss, norm) in enumerate(numbers.tolist(), first):
        # float16's scaler meets infinite norms while it looks for its scale; below 1 it has not found one
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()) or scaler.get_scale() < 1:
            not_finite(at, f'loss {loss}, gradient norm {norm}')
    return numbers[:, 0].mean().item(), numbers[-1, 1].item()


def plot():
    """out_dir/loss.png from log.csv, where there is matplotlib."""
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
    try:
        figure.savefig(os.path.join(out_dir, 'loss.png'), dpi=110)
    except OSError as error:
        print(f'loss.png could not be drawn: {error}')
    pyplot.close(figure)


def bits_per_byte(loss):
    """Nats per token -> bits per UTF-8 byte of the validation text, which compares tokenizers."""
    return loss / math.log(2) * len(data.val) / data.meta['bytes']['val']


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}'


# ----------------------------------------------------------------------------
# ready: what can fail has failed by now, and nothing of the run was written yet

columns = ('iter', 'elapsed_s', 'train_loss', 'val_loss', 'lr', 'grad_norm', 'tokens_per_sec')
if eval_only:
    with last_words():
        val_loss = evaluate()
    say(f'validation loss {val_loss:.4f}, {bits_per_byte(val_loss):.4f} bits per byte')
    sys.exit()
writing = master and not dry_run
if writing:
    with plain_errors():
        os.makedirs(out_dir, exist_ok=True)
        # ckpt.pt with the optimizer, another written aside, best.pt
        needed, free = (12 if resume else 28) * raw_model.n_params(), shutil.disk_usage(out_dir).free
        if needed > free:
            stop(f'{out_dir} has {free / 2**30:.2f} GiB free, the checkpoints take about {needed / 2**30:.2f} GiB: '
                 'free some, or take another --out_dir')
        if not resume and any(map(os.path.exists, (log_path, ckpt_path, best_path))):
            older = next(path for i in itertools.count(1) if not os.path.exists(path := f'{out_dir.rstrip("/")}-{i}'))
            os.rename(out_dir, older)
            os.mkdir(out_dir)
            print(f'kept    the run that was in {out_dir} is in {older} now')
        rows = []
        if resume and os.path.exists(log_path):  # rows after the checkpoint, and one cut short, are made again
            with open(log_path, encoding='utf-8', newline='') as file:
                whole = [row for row in csv.reader(file) if len(row) == len(columns) and row[0].isdecimal()]
            rows = [row for row in whole if int(row[0]) <= step]
        with open(log_path + '.part', 'w', encoding='utf-8', newline='') as file:
            csv.writer(file).writerows([columns, *rows])
        os.replace(log_path + '.part', log_path)
if wandb_log and writing:
    try:
        import wandb
        wandb.init(project=wandb_project, name=wandb_run_name or out_dir, config=config)
    except ImportError:
        print('wandb is not installed (pip install wandb): not logging there')
        wandb_log = False

signals = []


def on_signal(number, frame):
    if signals and world_size == 1:  # torchrun repeats the signal
        os._exit(128 + number)
    if master and not signals:
        os.write(2, f'\n{signal.Signals(number).name}: finishing this update and saving; once more stops at once\n'.encode())
    signals.append(number)


signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)

# ----------------------------------------------------------------------------
# the loop

batches, recent, stopped_early, interrupted = training_batches(), [], False, False
first_step, logged_step, logged_at = step, step, time.time()
raw_model.train()
gc.collect()
gc.freeze()  # what lives until the end need not be looked through again and again
with last_words():
    while step < max_iters and not stopped_early and not interrupted:
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
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or world_size > 1 or not out_of_memory(error):
                raise
            smaller = batch_size // 2 if batch_size % 2 == 0 else 1
            n_micro, batch_size = n_micro * batch_size // smaller, smaller
            say(f'out of memory: micro-batches of {batch_size} sequences from here, {n_micro} of them to the same update')
            loss = micro_loss = x = y = None
            optimizer.zero_grad(set_to_none=True)
            batches = training_batches()
            continue

        # step
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens_seen += tokens_per_update
        recent.append((loss, norm))

        # evaluate and log
        evaluating, logging = step % eval_interval == 0 or step == max_iters, step % log_interval == 0
        interrupted = bool(signals)
        if world_size > 1:  # the processes stop at the same update
            votes = torch.tensor(float(interrupted), device=device)
            dist.all_reduce(votes)
            interrupted = votes.item() > 0
        interrupted = interrupted and step < max_iters
        if not (evaluating or logging or interrupted):
            continue
        train_loss, grad_norm = read_recent()
        seconds = (time.time() - logged_at) / (step - logged_step)
        speed = tokens_per_update / seconds
        mfu = raw_model.flops_per_token() * speed / (peak * world_size)
        since = elapsed + time.time() - began
        row = [step, f'{since:.2f}', f'{train_loss:.6f}', '', f'{lr:.6g}', f'{grad_norm:.4f}', f'{speed:.0f}']
        say(f'{step:>{len(str(max_iters))}}/{max_iters}  loss {train_loss:.4f}  lr {lr:.1e}  norm {grad_norm:5.2f}  '
            f'{1000 * seconds:6.1f} ms  {speed:9,.0f} tokens/s  MFU {mfu:4.0%}  '
            f'{clock((max_iters - step) * seconds)} left', flush=True)
        if dry_run and step - first_step >= 2 * log_interval:
            break
        if evaluating and not dry_run:
            val_loss = evaluate()
            if not math.isfinite(val_loss):
                not_finite(step, f'validation loss {val_loss}')
            row[3] = f'{val_loss:.6f}'
            better = val_loss < best_val_loss
            if better:
                best_val_loss, best_step = val_loss, step
            rising = f'; not better since update {best_step}: its {best_val_loss:.4f} is kept in {best_path}' * (not better)
            say(f'        validation {val_loss:.4f}, {bits_per_byte(val_loss):.4f} bits per byte{rising}', flush=True)
            stopped_early = 0 < patience <= (step - best_step) // eval_interval

        # save
        if writing:
            with open(log_path, 'a', encoding='utf-8', newline='') as file:
                csv.writer(file).writerow(row)
                file.flush()
                if evaluating or interrupted:  # the rows last as long as the checkpoint
                    os.fsync(file.fileno())
            if evaluating and better:
                save_checkpoint(best_path, state())
            if evaluating or interrupted:
                save_checkpoint(ckpt_path, state(optimizer=optimizer.state_dict()))
            if wandb_log:
                wandb.log({name: float(value) for name, value in zip(columns, row) if value != ''}, step=step)
            if evaluating:
                plot()
            if evaluating and sample_interval and step // eval_interval % sample_interval == 0:
                prompt = next(prepare.val_batches(data.val, 16, 1))[0]
                ids = raw_model.generate(prompt, 200, temperature=0.8, generator=torch.Generator(device).manual_seed(seed))
                print(prepare.printable(prepare.Tokenizer(data.meta['tokenizer']).decode(ids[0].tolist())))
        logged_step, logged_at = step, time.time()

# ----------------------------------------------------------------------------
# the end

where = f' --out_dir={out_dir}' * (out_dir != 'out')
memory = f'peak memory {hardware.peak_memory(device) / 2**30:.2f} GiB'
if dry_run:
    whole_run = clock((max_iters - first_step) * seconds)
    say(f'dry run: {max_iters - first_step} updates would take about {whole_run}, evaluation aside; {memory}; '
        'nothing was written')
elif interrupted:
    say(f'saved   {ckpt_path} at update {step}; go on with: python train.py --resume{where}')
else:
    if stopped_early:
        say(f'stopped at update {step}: no better validation loss in {patience} evaluations')
    say(f'done    in {clock(elapsed + time.time() - began)}, {memory}; the best validation loss is {best_val_loss:.4f}, '
        f'of update {best_step}: {best_path}')
    if not os.path.exists(os.path.join(out_dir, 'loss.png')):
        say('        (with matplotlib installed a run also draws loss.png)')
    say(f'next    python sample.py{where} --start="{"ROMEO:" if dataset == "shakespeare" else "The "}"')
if world_size > 1:
    model = batches = None  # what still holds the group when Python ends aborts now and then
    gc.unfreeze()
    gc.collect()
    dist.destroy_process_group()
sys.exit(128 + signals[0] if interrupted and signals else 0)
