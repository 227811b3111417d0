"""Train a GPT.

    python train.py config/train_shakespeare.py                     # on whatever machine this is
    python train.py --dataset=poems --minutes=5                     # a model and a run of the size that fits
    python train.py --resume                                        # continue the run in out/
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --interactive                                   # answer questions, get a config file
    python train.py --status                                        # what is here, and what to type next
"""
import os
import signal

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # nothing to save yet

import contextlib
import csv
import gc
import glob
import itertools
import math
import re
import shlex
import shutil
import sys
import time
import warnings
from dataclasses import asdict, fields

began = time.time()  # before the slow imports: elapsed_s counts them

import filelock  # comes with torch
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hardware
import prepare
from configurator import ask, check, choose, configure, plain_errors, set_up_output, stop
from model import (GPT, GPTConfig, config_from, load_checkpoint, load_model, load_optimizer, make_optimizer,
                   presets, save_checkpoint)

# ----------------------------------------------------------------------------
# settings: change them here, in a config file, or by --name=value; the model's are the fields of GPTConfig
# the run
out_dir = 'out'  # where ckpt.pt (latest), best.pt (lowest validation loss), log.csv and loss.png go
resume = False  # continue from out_dir/ckpt.pt with its settings, which config files and flags may change
init_from = ''  # start from the weights of this checkpoint or Hugging Face folder, in its shape and tokenizer
minutes = 0.0  # choose the model and the run so that it takes so long on this machine; 0: as the settings say
eval_only = False  # evaluate once and exit
dry_run = False  # check everything, time a few real updates, print the estimate; writes nothing
interactive = False  # answer questions about the main settings; writes an ordinary config file
show_hardware = False  # print what this machine has and exit
status = False  # print what is installed, prepared and trained here, and exit
# data
dataset = 'shakespeare'  # folder in data/, made by prepare.py
offline_dataset = ''  # the data set to use where dataset can't be downloaded; '': stop instead
batch_size = 16  # sequences in a micro-batch, on each process
tokens_per_update = 0  # tokens in an update, of all processes together; 0: one micro-batch a process
# model
model_preset = 'tiny'  # tiny, small, medium, large (10M to 350M parameters): defaults of the model's settings
vocab_size = 0  # distinct tokens; 0: as many as the data set's tokenizer has
# optimizer
optimizer = 'muon'  # muon: the blocks' matrices by Muon, the rest by AdamW; adamw: all by AdamW
learning_rate = 1e-2  # AdamW's peak
muon_learning_rate = 0.02  # Muon's peak
muon_momentum = 0.85  # share of the old momentum that each update keeps; 0.95 for long runs of large updates
max_iters = 2000  # length of the run, in updates of the weights
weight_decay = 0.1  # how fast unused weights shrink; on matrices only
beta1 = 0.9  # AdamW: share of the old mean gradient that each update keeps
beta2 = 0.99  # AdamW: the same for the mean squared gradient; 0.95 for large batches
grad_clip = 1.0  # largest gradient norm; 0: no limit
decay_lr = True  # false: the learning rates stay at their peaks after the warm-up
lr_schedule = 'cosine'  # cosine, or linear: flat, then straight down over the last `cooldown` of the run
cooldown = 0.6  # share of lr_decay_iters; for the linear schedule
warmup_iters = 20  # updates over which the learning rates rise to their peaks
lr_decay_iters = 0  # updates after which the learning rate is min_lr; 0: max_iters
min_lr = 0.0  # AdamW's learning rate at the end; Muon's falls in proportion
# reports
log_interval = 10  # updates between lines of the log
eval_interval = 250  # updates between evaluations, and between saves
eval_iters = 200  # batches of the validation split that an evaluation reads, evenly spaced; 0: all
patience = 0  # evaluations without a better validation loss before stopping; 0: never
sample_interval = 0  # evaluations between short samples from the model; 0: none
wandb_log = False  # also log to Weights & Biases (pip install wandb)
wandb_project = 'gpt'  # name of the project there
wandb_run_name = ''  # name of the run there; '': out_dir
# machine
device = 'auto'  # auto, cpu, cuda, cuda:1, mps, xpu
dtype = 'auto'  # auto, float32, bfloat16, float16
compile = 'auto'  # torch.compile: auto (where it pays), true, false
threads = 0  # CPU threads; 0: as many as are fastest now
seed = 1337  # of weights, batches and dropout
# ----------------------------------------------------------------------------

KNOWN = (*prepare.DOWNLOADS, 'pydoc')  # data sets that are prepared where they are missing
READINGS = 6  # of a text, before a model knows it by heart
RUN_FILES = ('ckpt.pt', 'best.pt', 'log.csv', 'loss.png')
COLUMNS = ('iter', 'elapsed_s', 'train_loss', 'val_loss', 'lr', 'grad_norm', 'tokens_per_sec')
ANY, RATE, SHARE = (0, 10**12), (0, 10), (0, 0.999999)
RANGES = dict(
    max_iters=(1, 10**12), batch_size=(1, 10**12), log_interval=(1, 10**12), eval_interval=(1, 10**12),
    tokens_per_update=ANY, eval_iters=ANY, warmup_iters=ANY, lr_decay_iters=ANY, patience=ANY,
    sample_interval=ANY, seed=ANY, minutes=ANY, grad_clip=ANY, learning_rate=RATE, muon_learning_rate=RATE,
    weight_decay=RATE, beta1=SHARE, beta2=SHARE, muon_momentum=SHARE, cooldown=(0, 1), threads=(0, 1024),
)

def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}'

def alive(text):
    """On a terminal, a line that the next one replaces: that the program lives."""
    if master and sys.stdout.isatty():
        print(f'{text}\r', end='', flush=True)

def peak_memory():
    return f'peak memory {hardware.peak_memory(device) / 2**30:.2f} GiB'

def prepare_missing(name):
    if name in KNOWN and name not in prepare.data_sets():
        prepare.prepare([name])

def show_status():
    """Versions, device, data sets, runs, and the command that comes next."""
    print(hardware.table())
    known = ', '.join(prepare.data_sets()) or 'none yet (python prepare.py FILE makes one)'
    print(f'\ndata sets in data/: {known}')
    command = 'python train.py config/train_shakespeare_quick.py'
    for path in sorted(glob.glob('out*/ckpt.pt'), key=os.path.getmtime):
        folder = os.path.dirname(path)
        try:
            run = load_checkpoint(path)
        except ValueError as error:
            print(f'run in {folder}: {error}')
            continue
        wanted, loss = run['config']['max_iters'], f'best validation loss {run["best_val_loss"]:.4f}'
        if run['best_val_loss'] == math.inf:
            loss = 'not evaluated yet'
        print(f'run in {folder}: {run["config"]["dataset"]}, update {run["iter_num"]} of {wanted}, {loss}')
        script = 'train.py --resume' if run['iter_num'] < wanted else 'sample.py'
        command = f'python {script} --out_dir={shlex.quote(folder)}'
    print(f'next: {command}')

def interview():
    """Ask for the main settings, write config/my_NAME.py, and start that run if told to."""
    def prepared(name):
        if name not in prepare.data_sets():
            prepare.prepare([name])

    def above_zero(number):
        if not number > 0:
            raise ValueError('more than 0')

    def path_of(name):
        return os.path.join('config', f'my_{re.sub("[^A-Za-z0-9_-]+", "_", name)}.py')

    def is_new(name):
        if os.path.exists(path_of(name)):
            raise ValueError(f'{path_of(name)} exists already')

    print(hardware.table())
    known = list(dict.fromkeys([*prepare.data_sets(), *KNOWN]))
    device = ask('device', hardware.pick_device(), hardware.pick_device)
    answer = ask(f'data set ({", ".join(known)}) or the path of a text', known[0], prepared)
    dataset = answer if answer in prepare.data_sets() else prepare.make_name(answer)
    minutes = ask('minutes that training may take', 5.0, above_zero)
    name = ask('name of the run', dataset, is_new)
    path, out_dir = path_of(name), os.path.basename(path_of(name))[:-3].replace('my_', 'out-', 1)
    os.makedirs('config', exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
        file.write(f'# python train.py {path}; all settings: python train.py --help\n'
                   f'device = {device!r}\ndataset = {dataset!r}\n'
                   f'minutes = {minutes!r}\nout_dir = {out_dir!r}\n')
    print(f'{path} is written')
    if not ask('start it now', True):
        print(f'later: python train.py {path}')
        sys.exit()
    os.execv(sys.executable, [sys.executable, __file__, path])  # signals reach the run itself

# ----------------------------------------------------------------------------
# resolve the settings: defaults, of the preset or of the run that is continued, then config files, then flags

set_up_output()
if problem := hardware.version_problem():
    stop(problem)
config = configure(GPTConfig, __file__, saved={**presets['tiny'], 'vocab_size': 0})
for asked, answer in (('show_hardware', lambda: print(hardware.table())), ('status', show_status),
                      ('interactive', interview)):
    if config[asked]:
        with plain_errors():
            answer()
        sys.exit()
out_dir = config['out_dir']
log_path, ckpt_path, best_path = (os.path.join(out_dir, name) for name in ('log.csv', 'ckpt.pt', 'best.pt'))
if 'RANK' in os.environ:  # torchrun's restart is the same command, so that the first start has --resume, too
    if not config['resume'] and os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0':
        stop('torchrun --max_restarts needs train.py --resume: without it a restart would start from nothing')
    config['resume'] = config['resume'] and os.path.exists(ckpt_path)
with plain_errors():
    choose(config, 'model_preset', presets)
    saved, source, defaults = {}, '', {**presets[config['model_preset']], 'vocab_size': 0}
    if config['resume']:
        source, saved = ckpt_path, load_checkpoint(ckpt_path)
        defaults = {**saved['config'], 'out_dir': out_dir, 'init_from': ''}
    elif config['init_from']:
        source, saved = config['init_from'], load_checkpoint(config['init_from'])
        defaults = {**saved['model_config'], 'block_size': min(512, saved['model_config']['block_size'])}
config = {**configure(GPTConfig, __file__, saved=defaults), 'resume': config['resume']}
config['compile'] = config['compile'].lower()
globals().update(config)
with plain_errors():
    for name, (low, high) in RANGES.items():
        check(config, name, low, high)
    check(config, 'min_lr', 0, learning_rate)
    choose(config, 'optimizer', ('muon', 'adamw'))
    choose(config, 'lr_schedule', ('cosine', 'linear'))
    choose(config, 'compile', ('auto', 'true', 'false'))
    if lr_decay_iters:
        check(config, 'lr_decay_iters', warmup_iters + 1, 10**12)

# ----------------------------------------------------------------------------
# device, and the other processes if torchrun started several

rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0
say = print if master else lambda *args, **kwargs: None
with plain_errors():
    device = hardware.pick_device(device)
    if world_size > 1:
        if device == 'mps':
            say('device  several processes cannot share an Apple GPU: training on the CPU')
            device = 'cpu'
        if device in ('cuda', 'xpu'):
            device = hardware.pick_device(f'{device}:{os.environ["LOCAL_RANK"]}')
        warnings.simplefilter('ignore', FutureWarning)  # of names that torch 2.9 does not have
        dist.init_process_group({'cuda': 'nccl', 'xpu': 'xccl'}.get(hardware.kind(device), 'gloo'))
    dtype = hardware.pick_dtype(device, dtype)
hardware.set_up(device, threads)
if device == 'cpu' and threads == 0 and world_size == 1:
    threads = hardware.pick_threads()

# ----------------------------------------------------------------------------
# data

with plain_errors():
    if master and not dry_run:
        try:
            prepare_missing(dataset)
        except ConnectionError as error:
            if not offline_dataset:
                stop(f'{error}; or train on your own text (python prepare.py my.txt), or on --dataset=pydoc, '
                     'which needs no network')
            print(f'{dataset} could not be fetched: {error}')
            print(f'training on {offline_dataset} instead, as offline_dataset says')
            dataset = offline_dataset
            prepare_missing(dataset)
    if world_size > 1:  # the others wait for it, and learn what it became
        here = saved['iter_num'] if resume else 0
        chosen = [dataset, here]
        dist.broadcast_object_list(chosen)
        dataset, there = chosen
        if here != there:
            stop(f'{ckpt_path} is of update {here} on rank {rank}, of {there} on rank 0: '
                 'all machines need the same out_dir')
    config['dataset'] = dataset
    data = prepare.load_dataset(dataset)
text_id = f'{data.meta["source_sha256"]} {data.meta["tokens"]["train"]}'

# ----------------------------------------------------------------------------
# model

def settings_for(seconds):
    """The settings of a run of so many seconds on this text and device. Measured for half a minute to ten
    minutes on two cores: best are about as many parameters as tokens that are read, 6 operations each, and
    no dropout. (20 tokens a parameter, https://arxiv.org/abs/2203.15556, are for endless text.)"""
    operations = 0.3 * hardware.measure_flops(device, dtype) * seconds
    n_params = min((operations / 6) ** 0.5, READINGS * len(data.train))
    vocab = data.meta['vocab_size']
    n_layer = 2
    while 12 * n_layer * (64 * n_layer) ** 2 + vocab * 64 * n_layer < n_params:
        n_layer += 2
    # 11 n_layer n_embd^2 + vocab n_embd = n_params
    n_embd = ((vocab**2 + 44 * n_layer * n_params) ** 0.5 - vocab) / (22 * n_layer)
    n_head = max(2, round(n_embd / 64))
    return dict(
        n_layer=n_layer, n_head=n_head, n_kv_head=1 if n_head % 2 else n_head // 2, n_embd=64 * n_head,
        block_size=64 if n_params < 4e5 else 128 if n_params < 1.2e6 else 256 if n_params < 2e7 else 1024,
        batch_size=max(8, round(n_params / 4e5)), lr_schedule='linear', warmup_iters=10, eval_iters=25,
        max_iters=10**6, eval_interval=10**6,  # as there is time for, which is measured below
    )

dial = {}
if minutes and saved:
    say(f'note    --minutes sizes a new run: the one from {source} keeps its max_iters')
elif minutes:
    dial = settings_for(60 * minutes)
    chosen = configure(GPTConfig, __file__, saved={**defaults, **dial})
    config.update({name: chosen[name] for name in dial})
    globals().update({name: chosen[name] for name in dial})
with plain_errors():
    own = saved['model_config']['vocab_size'] if saved else data.meta['vocab_size']
    gpt_config = config_from(config, vocab_size=vocab_size or own)
    if saved and saved['tokenizer'] != data.meta['tokenizer']:
        raise ValueError(f'{source} and data/{dataset} have different tokenizers: '
                         f'"python prepare.py TEXT --tokenizer={source}" makes data that fits')
    for field in fields(gpt_config) if saved else ():
        before, now = saved['model_config'].get(field.name), getattr(gpt_config, field.name)
        shorter = field.name == 'block_size' and init_from and now < before  # positions are only rotations
        if now != before and not shorter and field.name not in ('dropout', 'gradient_checkpointing'):
            raise ValueError(f'{field.name} is {before} in {source} and cannot become {now}')
    if resume:
        anew = f'--init_from={source} starts a new run from its weights'
        if 'optimizer' not in saved:
            raise ValueError(f'{source} has no optimizer state (a copy of best.pt?): {anew}')
        if saved['config'].get('optimizer') != optimizer:
            raise ValueError(f'{source} was made by another optimizer: {anew}')
        if saved['dataset_sha256'] != text_id:
            raise ValueError(f'data/{dataset} is not what {source} was trained on (another sha256): {anew}')
    if gpt_config.vocab_size < data.meta['vocab_size']:
        raise ValueError(f'vocab_size is {vocab_size}, data/{dataset} has {data.meta["vocab_size"]} tokens')
    block_size = gpt_config.block_size
    for split, tokens in (('train', data.train), ('val', data.val)):
        if len(tokens) <= block_size:
            raise ValueError(f'{split} has {len(tokens):,} tokens, block_size {block_size} needs '
                             f'{block_size + 1}: lower block_size or give more text')
    with torch.device('meta'):  # weights, gradients, and Muon's momentum; AdamW takes a third more
        least, memory = 12 * GPT(gpt_config).n_params() / 2**30, hardware.describe(device)['memory_gib']
    if 0 < memory < least:
        raise ValueError(f'weights, gradients and optimizer take at least {least:,.1f} GiB, {device} has '
                         f'{memory}: choose a smaller model')
    torch.manual_seed(seed)
    model = load_model({**saved, 'model_config': asdict(gpt_config)}) if saved else GPT(gpt_config)
model.to(device)
raw_model = model  # what is evaluated, sampled from and saved
optimizer = make_optimizer(model, optimizer, learning_rate, (beta1, beta2), muon_learning_rate, muon_momentum,
                           weight_decay)
scaler = torch.amp.GradScaler(hardware.kind(device), enabled=dtype == 'float16')
step, tokens_seen, elapsed, val_loss, best_val_loss, best_step = 0, 0, 0.0, math.nan, math.inf, 0
if resume:
    step, tokens_seen, elapsed = saved['iter_num'], saved['tokens_seen'], saved['elapsed']
    val_loss, best_val_loss, best_step = saved['val_loss'], saved['best_val_loss'], saved['best_step']
    if step >= max_iters and not eval_only:
        stop(f'{source} has made {step} updates, all of max_iters {max_iters}: --max_iters=N goes on to N')
    if 0 < patience <= (step - best_step) // eval_interval and not eval_only:
        stop(f'{source} stopped at update {step}, out of patience: --patience=0 goes on')

# tokens in an update = micro-batches x processes x sequences x block_size
micro_tokens = world_size * batch_size * block_size
tokens_per_update = tokens_per_update or micro_tokens
n_micro = tokens_per_update // micro_tokens
if tokens_per_update % micro_tokens:
    near = max(1, n_micro) * micro_tokens
    stop(f'tokens_per_update {tokens_per_update:,} is not a multiple of {micro_tokens:,} (batch_size '
         f'{batch_size} x block_size {block_size} x processes {world_size}): choose {near:,} or '
         f'{near + micro_tokens:,}')

# ----------------------------------------------------------------------------
# a few real updates: whether they fit into memory, and how long they take

@contextlib.contextmanager
def last_words():
    """Where disk, data or memory give out inside: one line that says so, what is left, and what to try."""
    try:
        yield
    except OSError as error:
        where = f'{error.filename}: {error.strerror}' if error.filename else error
        stop(f'{where}; {what_is_left()}')
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        stop(f'out of memory at micro-batches of {batch_size} x {block_size}: {str(error)[:200]}; '
             f'{what_is_left()}. Weights, gradients and optimizer alone take {least:.2f} GiB or more: try a '
             'smaller batch_size, block_size or model, or --gradient_checkpointing')

def what_is_left():
    there = os.path.exists(ckpt_path)
    return f'{ckpt_path} is from before it, whole' if there else 'there is no checkpoint yet'

def out_of_memory(error):
    """Whether it says so, in whatever words the device has for it."""
    words = "MemoryError|out of memory|can't allocate|ALLOC_FAILED"
    return bool(re.search(words, f'{type(error).__name__}: {error}'))

def trial():
    """One update, of two micro-batches at most -> its seconds."""
    begin = time.perf_counter()
    for _ in range(min(n_micro, 2)):  # the second finds the gradients of the first in memory
        x, y = next(prepare.batches(data.train, 0, batch_size, batch_size, block_size, seed, device))
        with hardware.autocast(device, dtype):
            loss = model(x, y, return_logits=False)[1]
        loss.backward()
    with hardware.autocast(device, dtype):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    hardware.synchronize(device)
    return time.perf_counter() - begin

for group in optimizer.param_groups:
    group['lr'] = 0.0  # the trial changes no weight
seconds = 0.0  # of an update
while not seconds and not eval_only:
    with last_words():
        try:
            seconds = max(1, n_micro / 2) * min(trial() for _ in range(3))
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or world_size > 1 or not out_of_memory(error):
                raise
            optimizer.zero_grad(set_to_none=True)
            smaller = batch_size // 2 if batch_size % 2 == 0 else 1
            n_micro, batch_size = n_micro * batch_size // smaller, smaller
            say(f'out of memory: {n_micro} micro-batches of {batch_size} sequences make the same update')
optimizer.state.clear()
if world_size > 1:
    slowest = torch.tensor(seconds, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    seconds = slowest.item()
if dial and not eval_only:
    evaluations = max(1, min(4, int(minutes)))
    # a token of an evaluation takes about a third of one of training
    pause = seconds / 3 * min(len(data.val), (eval_iters or 10**6) * 4096) / tokens_per_update
    left = 60 * minutes - (time.time() - began) - evaluations * pause - 1
    enough = READINGS * len(data.train) // tokens_per_update
    if max_iters == dial['max_iters']:  # not given by a flag or a config file
        max_iters = max(1, min(int(left / (1.07 * seconds)), enough))  # what the loop adds to a trial
        if max_iters == enough:
            say(f'note    {READINGS} readings of so short a text are enough: more would learn it by heart')
    if eval_interval == dial['eval_interval']:
        eval_interval = math.ceil(max_iters / evaluations)
    flags = ' '.join(f'--{name}={globals()[name]}' for name in dial)
    say(f'plan    for {minutes:g} minutes, the same as: python train.py --dataset={dataset} {flags}')
if resume:
    with plain_errors():
        load_optimizer(optimizer, saved['optimizer'])
    scaler.load_state_dict(saved['scaler'])
saved = None
problem = ''  # why not to compile
if compile == 'auto':  # compiling takes about a minute: it pays on runs of many
    if seconds * (max_iters - step) < (1200 if device == 'cpu' else 120):
        problem = 'compiling would take longer than it saves'
if compile != 'false' and not problem:
    problem = hardware.compile_problem(device)
compile = 'false' if problem else compile.replace('auto', 'true')
# what a resumed run keeps to
config.update(minutes=0.0, threads=threads, max_iters=max_iters, eval_interval=eval_interval, compile=compile,
              tokens_per_update=tokens_per_update)
expected = seconds  # of an update
peak, peak_origin = hardware.peak_flops(device, dtype)

# ----------------------------------------------------------------------------
# what is in force

c = gpt_config
factors = {'micro-batches': n_micro, 'processes': world_size, 'sequences': batch_size, 'tokens': block_size}
product = ' x '.join(f'{n} {name}' for name, n in factors.items() if n > 1)
epochs = max_iters * tokens_per_update / len(data.train)
engine = 'compiled' if compile == 'true' else f'not compiled ({problem})' if problem else 'not compiled'
say(f'device  {device}: {hardware.device_name(device)}; {dtype}, {engine}')
say(f'data    {dataset}: {len(data.train):,} tokens to train on, {len(data.val):,} for validation; '
    f'{data.meta["tokenizer"]["kind"]} tokenizer, vocabulary {c.vocab_size:,}')
say(f'model   {model.n_params() / 1e6:.2f}M parameters: {c.n_layer} layers, {c.n_embd} wide, '
    f'{c.n_head} query heads, {c.n_kv_head} for keys and values, context {block_size}')
say(f'update  {tokens_per_update:,} tokens = {product}; '
    f'{max_iters:,} updates read the text {epochs:.2g} times')
say(f'MFU     is the share of {peak / 1e12:.3g} TFLOP/s ({peak_origin}) that the model uses: 30 to 60 % is')
say('        good, below 10 % the model is too small for the device, or something holds it up')
if resume or init_from:
    say(f'start   from {source}, update {step}')
else:
    say(f'start   guessing has a loss of ln({c.vocab_size}) = {math.log(c.vocab_size):.3f} nats a token')
if epochs > 20:
    say(f'note    reading a text {epochs:.0f} times may learn it by heart: fewer max_iters, or --patience=3')
if device == 'cpu' and seconds * (max_iters - step) > 3600:
    say(f'note    this takes about {clock(seconds * (max_iters - step))}; --minutes=10 chooses a run of ten')
if dry_run:
    say(f'dry run: {max_iters - step} updates would take about {clock(seconds * (max_iters - step))}, '
        f'evaluation aside; {peak_memory()}; nothing was written')
    sys.exit()
if compile == 'true':
    alive('compiling: a minute or so ...')
    torch._dynamo.config.suppress_errors = True  # what can't be compiled after all runs, with torch's warning
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

@torch.no_grad()
def evaluate():
    """Mean loss per token of the validation split, each process reading its share."""
    raw_model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, tokens
    every_batch = prepare.val_batches(data.val, block_size, max(batch_size, 4096 // block_size), eval_iters)
    for x, y in itertools.islice(every_batch, rank, None, world_size):
        with hardware.autocast(device, dtype):
            loss = raw_model(x.to(device), y.to(device), return_logits=False)[1]
        n = (y != -1).sum().item()
        total += torch.tensor([loss.item() * n, n], dtype=torch.float64)
    raw_model.train()
    if world_size > 1:
        total = total.to(device, torch.float32)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()

def bits_per_byte(loss):
    """Nats per token -> bits per UTF-8 byte of the validation text, which compares tokenizers."""
    return loss / math.log(2) * len(data.val) / data.meta['bytes']['val']

def state(**more):
    """A checkpoint, with `more` in it."""
    return dict(
        model=raw_model.state_dict(), model_config=asdict(gpt_config), config=config,
        tokenizer=data.meta['tokenizer'], dataset_sha256=text_id, iter_num=step, tokens_seen=tokens_seen,
        elapsed=elapsed + time.time() - began, val_loss=val_loss, best_val_loss=best_val_loss,
        best_step=best_step, scaler=scaler.state_dict(), **more,
    )

def signalled():
    """Whether this process or another one was told to stop: all do at the same update."""
    if world_size == 1:
        return bool(signals)
    votes = torch.tensor(float(bool(signals)), device=device)
    dist.all_reduce(votes)
    return votes.item() > 0

def read_recent():
    """Mean loss and last gradient norm since the last call; ends the run at the first that is not finite,
    before anything is saved. Looking only now and then spares one GPU the wait at every update."""
    numbers = torch.stack([torch.stack(pair) for pair in recent]).float()  # (updates, 2)
    if world_size > 1:
        dist.all_reduce(numbers)
        numbers /= world_size
    first = step - len(recent) + 1
    recent.clear()
    for at, (loss, norm) in enumerate(numbers.tolist(), first):
        # float16's scaler meets infinite norms while it looks for its scale; below 1 it has not found one
        good_norm = math.isfinite(norm) or scaler.is_enabled()
        if not math.isfinite(loss) or not good_norm or scaler.get_scale() < 1:
            not_finite(at, f'loss {loss}, gradient norm {norm}')
    return numbers[:, 0].mean().item(), numbers[-1, 1].item()

def not_finite(at, what):
    if not master:
        sys.exit(1)
    sys.exit(f'update {at}: {what} ({dtype}, learning rate {lr:.2e}): stopped; {what_is_left()}. '
             'Try a lower learning rate, more warmup_iters, or --dtype=float32')

def log_row(train_loss, grad_norm, seconds):
    """Print the line of an interval, whose updates took so many seconds each -> its row of log.csv."""
    global expected
    speed = tokens_per_update / seconds
    mfu = raw_model.flops_per_token() * speed / (peak * world_size)
    say(f'{step:>{len(str(max_iters))}}/{max_iters}  loss {train_loss:.4f}  lr {lr:.1e}  '
        f'norm {grad_norm:5.2f}  {1000 * seconds:6.1f} ms  {speed:9,.0f} tokens/s  MFU {mfu:4.0%}  '
        f'{clock((max_iters - step) * seconds)} left')
    if device == 'cpu' and world_size == 1 and step > first_step + 1 and seconds > 3 * expected:
        say(f'note    updates take {seconds / expected:.0f} times as long as at the start: another program '
            'uses the cores; if it goes on, Ctrl-C and then --resume --threads=1')
        expected = math.inf  # say it once
    since = elapsed + time.time() - began
    return [step, f'{since:.2f}', f'{train_loss:.6f}', '', f'{lr:.6g}', f'{grad_norm:.4f}', f'{speed:.0f}']

def write_log(row, lasting):
    """A row of log.csv; lasting: on the disk before the checkpoint is."""
    with open(log_path, 'a', encoding='utf-8', newline='') as file:
        csv.writer(file).writerow(row)
        file.flush()
        if lasting:
            os.fsync(file.fileno())
    if wandb_log:
        wandb.log({name: float(value) for name, value in zip(COLUMNS, row) if value != ''}, step=row[0])

def print_sample():
    prompt = next(prepare.val_batches(data.val, 16, 1))[0]
    generator = torch.Generator(device).manual_seed(seed)
    ids = raw_model.generate(prompt, 200, temperature=0.8, generator=generator)
    print(prepare.printable(prepare.Tokenizer(data.meta['tokenizer']).decode(ids[0].tolist())))

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
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    for name, style in (('train_loss', 'C0-'), ('val_loss', 'C1o-')):
        points = [(row['elapsed_s'], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), style, label=name.replace('_', ' '), markersize=4, linewidth=1.5)
    size = f'{raw_model.n_params() / 1e6:.2f}M parameters'
    title = f'{dataset}, {size}: {best_val_loss:.4f} at update {best_step}'
    axes.set(xlabel='seconds', ylabel='loss (nats per token)', title=title)
    axes.legend()
    figure.savefig(os.path.join(out_dir, 'loss.png'), dpi=110)
    pyplot.close(figure)

def open_run():
    """out_dir made ready: locked against other runs, an older run put aside, log.csv up to this update -> the
    lock."""
    os.makedirs(out_dir, exist_ok=True)
    lock = filelock.FileLock(os.path.join(out_dir, '.lock'))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        stop(f'another run is using {out_dir}: choose another --out_dir')
    # ckpt.pt with the optimizer, another written aside, best.pt
    needed, free = (12 if resume else 28) * raw_model.n_params(), shutil.disk_usage(out_dir).free
    if needed > free:
        stop(f'{out_dir} has {free / 2**30:.2f} GiB free, the checkpoints take about '
             f'{needed / 2**30:.2f} GiB: free some, or choose another --out_dir')
    older = [name for name in RUN_FILES if os.path.exists(os.path.join(out_dir, name))]
    if older and not resume:
        number = 1
        while os.path.exists(f'{os.path.abspath(out_dir)}-{number}'):
            number += 1
        aside = f'{os.path.abspath(out_dir)}-{number}'
        os.mkdir(aside)
        for name in older:
            shutil.move(os.path.join(out_dir, name), aside)
        print(f'kept    the run that was in {out_dir} is in {os.path.relpath(aside)} now')
    rows = [COLUMNS]
    if resume and os.path.exists(log_path):  # rows after the checkpoint, and one cut short, are made again
        with open(log_path, encoding='utf-8', newline='') as file:
            complete = [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[0].isdecimal()]
        rows += [row for row in complete if int(row[0]) <= step]
    with open(log_path + '.part', 'w', encoding='utf-8', newline='') as file:
        csv.writer(file).writerows(rows)
    os.replace(log_path + '.part', log_path)
    return lock

# ----------------------------------------------------------------------------
# ready: what can fail has failed by now, and nothing of the run was written yet

if eval_only:
    with last_words():
        val_loss = evaluate()
    say(f'validation loss {val_loss:.4f}, {bits_per_byte(val_loss):.4f} bits per byte')
    sys.exit()
if master:
    with plain_errors():
        lock = open_run()
if wandb_log and master:
    try:
        import wandb
        wandb.init(project=wandb_project, name=wandb_run_name or out_dir, config=config)
    except ImportError:
        print('wandb is not installed (pip install wandb): not logging there')
        wandb_log = False

signals = []

def on_signal(number, frame):
    signals.append(number)
    if len(signals) > 1 and world_size == 1:  # torchrun repeats the signal
        os._exit(128 + number)
    if master and len(signals) == 1:
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f'\n{name}: finishing this update and saving; once more stops at once\n'.encode())

for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(number, on_signal)

# ----------------------------------------------------------------------------
# the loop

# sequences are numbered through the run: an update takes the next ones, whichever way they are shared out
first_row = tokens_seen // block_size + rank * batch_size
stride = world_size * batch_size
batches = prepare.batches(data.train, first_row, batch_size, stride, block_size, seed, device)
recent, stopped_early, interrupted = [], False, False
first_step, logged_step, logged_at = step, step, time.time()
raw_model.train()
gc.collect()
gc.freeze()  # what lives until the end need not be looked through again and again
with last_words():
    while step < max_iters and not stopped_early and not interrupted:
        # set the learning rate
        scale = learning_rate_scale(step)
        lr = learning_rate * scale
        for group in optimizer.param_groups:
            group['lr'] = group['peak_lr'] * scale

        # accumulate the gradients of one update
        # dropout depends on the update alone, not on what came before
        torch.manual_seed(seed + 1000003 * (step + 1) + rank)
        loss = torch.zeros((), device=device)
        for micro in range(n_micro):
            x, y = next(batches)
            if world_size > 1:
                model.require_backward_grad_sync = micro == n_micro - 1
            with hardware.autocast(device, dtype):
                micro_loss = model(x, y, return_logits=False)[1] / n_micro
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        # step
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        with hardware.autocast(device, dtype):  # Muon's products
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens_seen += tokens_per_update
        recent.append((loss, norm))

        # log
        evaluating = step % eval_interval == 0 or step == max_iters
        interrupted = signalled() and step < max_iters
        if not (evaluating or interrupted or step % log_interval == 0):
            alive(f'update {step}')
            if step == first_step + 1:  # the first takes longer: it may compile
                logged_step, logged_at = step, time.time()
            continue
        train_loss, grad_norm = read_recent()
        row = log_row(train_loss, grad_norm, (time.time() - logged_at) / max(1, step - logged_step))

        # evaluate and save
        if evaluating:
            alive('evaluating ...')
            val_loss = evaluate()
            if not math.isfinite(val_loss):
                not_finite(step, f'validation loss {val_loss}')
            row[3] = f'{val_loss:.6f}'
            better, rising = val_loss < best_val_loss, ''
            if better:
                best_val_loss, best_step = val_loss, step
            else:
                rising = f'; not better since update {best_step}: {best_path} keeps its {best_val_loss:.4f}'
            say(f'        validation {val_loss:.4f}, {bits_per_byte(val_loss):.4f} bits per byte{rising}')
            stopped_early = 0 < patience <= (step - best_step) // eval_interval
        if master:
            write_log(row, lasting=evaluating or interrupted)
            if evaluating and better:
                save_checkpoint(best_path, state())
            if evaluating or interrupted:
                save_checkpoint(ckpt_path, state(optimizer=optimizer.state_dict()))
            if evaluating:
                plot()
            if evaluating and sample_interval and step // eval_interval % sample_interval == 0:
                print_sample()
        logged_step, logged_at = step, time.time()

# ----------------------------------------------------------------------------
# the end

where = f' --out_dir={shlex.quote(out_dir)}' if out_dir != 'out' else ''
if interrupted:
    say(f'saved   {ckpt_path} at update {step}; to continue: python train.py --resume{where}')
else:
    if stopped_early:
        say(f'stopped at update {step}: no better validation loss in {patience} evaluations')
    say(f'done    in {clock(elapsed + time.time() - began)}, {peak_memory()}; the best validation loss is '
        f'{best_val_loss:.4f}, of update {best_step}: {best_path}')
    if val_loss > train_loss + 1:
        say(f'note    the training loss is {train_loss:.2f}, far below validation: the model has learned the '
            'text by heart; more text, fewer updates or --dropout=0.2 help')
    if not os.path.exists(os.path.join(out_dir, 'loss.png')):
        say('        (with matplotlib installed a run also draws loss.png)')
    prompt = ' --start="ROMEO:"' if dataset == 'shakespeare' else ''
    say(f'next    python sample.py{where}{prompt}')
if world_size > 1:
    model = batches = None  # what still holds the group when Python ends aborts now and then
    gc.unfreeze()
    gc.collect()
    dist.destroy_process_group()
sys.exit(128 + signals[0] if interrupted and signals else 0)
