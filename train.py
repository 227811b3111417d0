"""Train a GPT.

    python train.py                                    # five minutes of Shakespeare, sized for this machine
    python train.py config/train_shakespeare.py        # a config file
    python train.py --dataset=poems --minutes=10       # a model and a run that fit text, machine and time
    python train.py --resume                           # continue the run in out/
    python train.py --interactive                      # answer questions, get a config file
    python train.py --status                           # what is prepared and trained here
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""
import os
import signal

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # nothing to save yet

import gc
import itertools
import math
import shlex
import sys
import time
from dataclasses import asdict
from unittest import mock

began = time.monotonic()  # before the slow imports: elapsed_s counts them

import torch

import configurator
import hardware
import prepare
from configurator import clock, configure, plain_errors, progress
from model import (GPT, GPTConfig, OPTIMIZERS, SCHEDULES, check_continues, check_model, config_from,
                   load_checkpoint, load_optimizer, make_update, presets, save_checkpoint,
                   scale_learning_rates, start_training, starting_point)

# ----------------------------------------------------------------------------
# settings: change them here, in a config file, or by --name=value; the model's are the fields of GPTConfig
# the run
out_dir = 'out'  # where ckpt.pt (latest), best.pt (lowest validation loss), log.csv and loss.png go
resume = False  # continue from out_dir/ckpt.pt with its settings, which config files and flags may change
init_from = ''  # start from the weights of this checkpoint or run folder, in its shape and tokenizer
minutes = 0.0  # choose a model and a run that take at most this long here; 0: use the settings as they are
eval_only = False  # evaluate once and exit
dry_run = False  # check settings and data, time a few real updates, print the estimate; writes nothing
interactive = False  # answer questions about the main settings; writes an ordinary config file
status = False  # print this machine, the data sets and the runs, and exit
# data
dataset = 'shakespeare'  # folder in data/, made by prepare.py
offline_dataset = ''  # the data set to use where dataset can't be downloaded; '': stop instead
batch_size = 16  # sequences in a micro-batch, on each process
tokens_per_update = 0  # tokens in an update, of all processes together; 0: one micro-batch a process
# model
model_preset = ''  # 10M to 350M parameters: other defaults for the model's settings; '': those of GPTConfig
vocab_size = 0  # distinct tokens; 0: as many as the data set's tokenizer has
# optimizer
optimizer = 'muon'  # muon: the blocks' matrices by Muon, the rest by AdamW; adamw: all
learning_rate = 1e-2  # AdamW's peak
muon_learning_rate = 0.02  # Muon's peak
muon_momentum = 0.85  # share of the old momentum that each update keeps; 0.95 for long runs of large updates
max_iters = 2000  # length of the run, in updates of the weights
weight_decay = 0.1  # each update shrinks matrices by this share times the learning rate
beta1 = 0.9  # AdamW: share of the old mean gradient that each update keeps
beta2 = 0.99  # AdamW: the same for the mean squared gradient; 0.95 for large batches
grad_clip = 1.0  # largest gradient norm; 0: no limit
decay_lr = True  # false: the learning rates stay at their peaks after the warm-up
lr_schedule = 'cosine'  # how the rates fall; linear: flat, then straight down in the `cooldown`
cooldown = 0.6  # last part of the run, as a share of it; for the linear schedule
warmup_iters = 20  # updates over which the learning rates rise to their peaks
lr_decay_iters = 0  # updates after which the learning rate is min_lr; 0: max_iters
min_lr = 0.0  # AdamW's learning rate at the end; Muon's falls in proportion
# reports
log_interval = 10  # updates between lines of the log
eval_interval = 250  # updates between evaluations, each after a save
eval_iters = 200  # batches of the validation split that an evaluation reads, evenly spaced; 0: all
patience = 0  # evaluations without a better validation loss before stopping; 0: never
sample_interval = 0  # evaluations between short samples from the model; 0: only one at the end
wandb_log = False  # also log to Weights & Biases (pip install wandb)
wandb_project = 'gpt'  # name of the project there
wandb_run_name = ''  # name of the run there; '': out_dir
# machine
device = 'auto'  # auto, cpu, cuda, cuda:1, mps, xpu
dtype = 'auto'  # of the arithmetic; weights are float32
compile = 'auto'  # torch.compile; auto: where it pays
threads = 0  # CPU threads; 0: as many as are fastest when the run starts
seed = 1337  # of weights, batches and dropout
# ----------------------------------------------------------------------------

ONE_OR_MORE, SHARE = (1, 10**12), (0, 0.999999)
ALLOWED = dict(
    model_preset=('', *presets), optimizer=OPTIMIZERS, lr_schedule=SCHEDULES,
    compile=('auto', 'true', 'false'), dtype=('auto', 'float32', 'bfloat16', 'float16'),
    batch_size=ONE_OR_MORE, max_iters=ONE_OR_MORE, log_interval=ONE_OR_MORE, eval_interval=ONE_OR_MORE,
    beta1=SHARE, beta2=SHARE, muon_momentum=SHARE, threads=(0, 1024))
SAVE_SECONDS = 300  # save at least this often; with several processes, at the next line of the log

# ----------------------------------------------------------------------------
# Resolve the settings. Until globals().update(config), read config['name']: plain names are the defaults.

configurator.set_up_output()
if len(sys.argv) == 1:
    print('no arguments: at most five minutes of Shakespeare (--minutes=5); --help lists the settings')
    sys.argv += ['--minutes=5', '--offline_dataset=pydoc']
config, given = configure(GPTConfig, __file__, allowed=ALLOWED)
with plain_errors():
    if problem := hardware.version_problem():
        raise ValueError(problem)
    if config['status']:
        configurator.show_status(hardware.table(), prepare.data_sets(), load_checkpoint)
        sys.exit()
    if config['interactive']:
        print(hardware.table())
        known, sizes, devices = prepare.known(), ['auto', *presets], hardware.devices()[0]
        questions = [
            ('dataset', 'data set, or the path of a text', known[0], prepare.find, known),
            ('minutes', 'minutes that training may take', 5.0),
            ('model_preset', 'size of the model (auto: what the minutes allow)', 'auto', None, sizes)]
        if len(devices) > 1:
            questions.append(('device', 'device', hardware.pick_device(), hardware.pick_device, devices))
        configurator.interview(__file__, questions)

    # below config files and flags: a preset, or the checkpoint that is resumed or started from
    ckpt_path, best_path = (os.path.join(config['out_dir'], name) for name in ('ckpt.pt', 'best.pt'))
    if 'RANK' in os.environ:  # torchrun restarts with the same command, so even the first start has --resume
        if not config['resume'] and os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0':
            raise ValueError('torchrun --max_restarts needs train.py --resume, or a restart would start over')
        config['resume'] = given['resume'] = config['resume'] and os.path.exists(ckpt_path)
    checkpoint, source, base = starting_point(config, given)
    config |= base | given

    # device, processes, data
    asked = dict(device=config['device'], dtype=config['dtype'])  # what a resumed run starts from
    rank, world_size, config['device'] = hardware.start_processes(hardware.pick_device(config['device']))
    config['dtype'] = hardware.pick_dtype(config['device'], config['dtype'])
    config['threads'] = hardware.set_up(config['device'], config['threads'])
    master = rank == 0
    if master and not config['dry_run']:
        config['dataset'] = prepare.fetch(config['dataset'], config['offline_dataset'])
    updates_made = checkpoint and checkpoint['iter_num']
    config['dataset'], updates_of_rank_0 = hardware.from_rank_0((config['dataset'], updates_made))
    if updates_made != updates_of_rank_0:
        raise ValueError(f'{ckpt_path} differs between machines: all need the same out_dir')
    data = prepare.load_dataset(config['dataset'])

    # plan: what --minutes decides, unless it is given
    planned, planning = {}, config['minutes'] and not checkpoint and not config['eval_only']
    if planning:
        planned = hardware.from_rank_0(hardware.plan(config, given, len(data.train), data.meta['vocab_size']))
        planned = {name: value for name, value in planned.items() if name not in base | given}
        config |= planned
    gpt_config = config_from(config, vocab_size=config['vocab_size'] or data.meta['vocab_size'])
    config |= asdict(gpt_config)
    if checkpoint:
        check_continues(checkpoint, source, config, data.meta, prepare.text_id(data))
    prepare.check_fits(data, config)
    # weights that are not filled take no memory; on the meta device, torch imports its compiler
    unfilled = mock.patch('torch.nn.init.normal_', lambda weight, *_, **__: weight)
    with unfilled, hardware.plain_memory_errors('use a smaller model'):
        n_params = GPT(gpt_config).n_params()
    hardware.check_memory(config['device'], n_params)
    n_micro = hardware.set_accumulation(config, world_size)

    # trial: the batch size that fits, and the time of an update
    def start():
        return start_training(gpt_config, config, checkpoint)

    def sequences(n):
        return next(prepare.batches(data.train, 0, n, n, config['block_size'], 0, config['device']))

    def run_seconds(seconds):
        updates = config['max_iters'] - (updates_made if config['resume'] else 0)
        return 60 * config['minutes'] if planning else seconds * updates

    with hardware.plain_memory_errors('choose a smaller block_size or model, or --gradient_checkpointing'):
        limits = dict(rounds=0 if config['eval_only'] else 3)
        if planning:
            limits = dict(rounds=20, most_seconds=3 * config['minutes'])
        trial = hardware.fit(start, make_update, sequences, config, n_micro, run_seconds, **limits)
    config.update(batch_size=trial.batch_size, compile=trial.compile)
    n_micro = trial.n_micro
    if planning:
        seconds = 60 * config['minutes'] - (time.monotonic() - began)
        length = hardware.plan_length(seconds, trial, config, given, len(data.train), len(data.val))
        length = {name: value for name, value in hardware.from_rank_0(length).items() if name not in given}
        planned |= length
        config |= length
        if n_micro > 1:
            planned['tokens_per_update'] = config['tokens_per_update']

globals().update(config)  # from here on no setting changes

def say(text):
    """Print a line; only rank 0 does."""
    if master:
        progress('')
        print(text)

def show(text, share=None):
    """Say what goes on, in a line that the next one replaces."""
    if master:
        progress(text, share)

engine = 'compiled' if compile == 'true' else 'not compiled'
engine += f' ({trial.not_compiled})' if trial.not_compiled else ''
epochs = max_iters * tokens_per_update / len(data.train)
say(f'device  {device}: {hardware.device_name(device)}; {dtype}, {engine}')
say(f'data    {dataset}: {len(data.train):,} tokens to train on, {len(data.val):,} for validation; '
    f'{data.meta["tokenizer"]["kind"]} tokenizer, vocabulary {vocab_size:,}')
say(f'model   {n_params / 1e6:.2f}M parameters: {n_layer} layers, {n_embd} wide, {n_head} query heads, '
    f'{n_kv_head} for keys and values, context {block_size}')
factors = {'micro-batches': n_micro, 'processes': world_size, 'sequences': batch_size, 'tokens': block_size}
product = ' x '.join(f'{n} {name}' for name, n in factors.items() if n > 1)
say(f'update  {tokens_per_update:,} tokens = {product}')
say(f'run     {max_iters:,} updates, {epochs:.2g} passes over the text')
if planning:
    names = dict.fromkeys(['dataset', *planned, *given])
    flags = shlex.join(f'--{name}={config[name]}' for name in names if name not in ('minutes', 'dry_run'))
    say(f'plan    for {minutes:g} minutes, the same as: python train.py {flags}')
if checkpoint:
    say(f'start   from {source}, update {updates_made}')
    if resume and checkpoint['config']['max_iters'] != max_iters:
        say('note    max_iters has changed: the learning rate follows the new schedule from here')
else:
    say(f'start   guessing has a loss of ln({vocab_size}) = {math.log(vocab_size):.3f} nats a token')
if epochs > 20:
    say('note    more than about 20 passes usually overfit: lower max_iters, or set --patience=3')
if dry_run:
    updates_left = max_iters - (updates_made if resume else 0)
    say(f'dry run: the run would take about {clock(trial.seconds * updates_left)} without evaluations; '
        f'peak memory {hardware.peak_memory(device) / 2**30:.2f} GiB; nothing was written')
    hardware.end_processes()
    sys.exit()

# ----------------------------------------------------------------------------
# model and optimizer, new or from the checkpoint

step, tokens_seen, seconds_before = 0, 0, 0.0  # updates and tokens so far; seconds of earlier processes
val_loss, val_step = math.nan, 0  # of the last evaluation
best_val_loss, best_step, evals_since_best = math.inf, 0, 0
with plain_errors(), hardware.plain_memory_errors('choose a smaller model'):
    raw_model, torch_optimizer = start()  # evaluation, samples and checkpoints use raw_model
    check_model(raw_model)
    scaler = torch.amp.GradScaler(hardware.kind(device), enabled=dtype == 'float16')
    if resume:
        load_optimizer(torch_optimizer, checkpoint['optimizer'])
        if checkpoint['scaler'] and scaler.is_enabled():
            scaler.load_state_dict(checkpoint['scaler'])
        step, tokens_seen = checkpoint['iter_num'], checkpoint['tokens_seen']
        seconds_before = checkpoint['elapsed']
        val_loss, val_step = checkpoint['val_loss'], checkpoint['val_step']
        best_val_loss, best_step = checkpoint['best_val_loss'], checkpoint['best_step']
        evals_since_best = checkpoint['evals_since_best']
    if master and not eval_only:
        # bytes: best.pt, ckpt.pt with the optimizer, and another ckpt.pt written aside
        folder = configurator.RunFolder(out_dir, resume, bytes_needed=(12 if resume else 28) * n_params)
        folder.resume_log(step, val_step)
        if wandb_log:
            folder.watch_with_wandb(wandb_project, wandb_run_name, config)
checkpoint = None  # frees its memory

# ----------------------------------------------------------------------------
# training: the learning rate, an evaluation

def learning_rate_scale(step):
    """The learning rate of update `step` (the first is 0) over its peak."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return 1.0
    floor = min(1.0, min_lr / learning_rate) if learning_rate else 0.0
    fall = SCHEDULES[lr_schedule](step, warmup_iters, lr_decay_iters or max_iters, cooldown)  # from 1 to 0
    return floor + (1 - floor) * fall

@torch.no_grad()
def evaluate():
    """Mean loss per token of the validation split, each process reading its share."""
    raw_model.eval()
    loss_sum, tokens = 0.0, 0
    rows = max(batch_size, hardware.EVALUATION_TOKENS // block_size)
    every_batch = prepare.val_batches(data.val, block_size, rows, eval_iters)
    for x, y in itertools.islice(every_batch, rank, None, world_size):
        loss = raw_model(x.to(device), y.to(device), return_logits=False)[1]
        counted = (y != -1).sum().item()
        loss_sum += loss.item() * counted
        tokens += counted
    raw_model.train()
    loss_sum, tokens = hardware.mean_over_processes([loss_sum, tokens], device)
    return loss_sum / tokens

# ----------------------------------------------------------------------------
# output: log, checkpoints, samples; only rank 0 writes

def bits_per_byte(loss):
    """Nats per token -> bits per UTF-8 byte of the validation text, comparable across tokenizers."""
    return loss / math.log(2) * len(data.val) / data.meta['bytes']['val']

def seconds_so_far():
    return seconds_before + time.monotonic() - began

def record(**columns):
    """A row of log.csv."""
    if master:
        folder.log(dict(iter=step, elapsed_s=round(seconds_so_far(), 2), **columns))

def save(path, **more):
    """A checkpoint, with `more` in it."""
    if master:
        save_checkpoint(path, dict(
            model=raw_model.state_dict(), model_config=asdict(gpt_config), config=config | asked,
            tokenizer=data.meta['tokenizer'], dataset_sha256=prepare.text_id(data), iter_num=step,
            tokens_seen=tokens_seen, elapsed=seconds_so_far(), val_loss=val_loss, val_step=val_step,
            best_val_loss=best_val_loss, best_step=best_step, evals_since_best=evals_since_best,
            val_bits_per_byte=bits_per_byte(val_loss), scaler=scaler.state_dict(), **more))

def save_latest():
    save(ckpt_path, optimizer=torch_optimizer.state_dict())

def read_losses():
    """Mean loss and last gradient norm since the last call. Reading waits for the GPU, so several are read at
    once. ValueError at the first that is not finite, before these weights are saved."""
    numbers = torch.stack(unread).float().tolist()  # (updates, 2): loss and gradient norm
    numbers = hardware.mean_over_processes(numbers, device)
    unread.clear()
    for at, (loss, norm) in enumerate(numbers, step + 1 - len(numbers)):
        # float16's scaler meets infinite norms while it looks for its scale; a scale below 1 has failed
        good_norm = math.isfinite(norm) or scaler.is_enabled()
        if not math.isfinite(loss) or not good_norm or scaler.get_scale() < 1:
            raise ValueError(f'update {at}: loss {loss}, gradient norm {norm} ({dtype}, learning rate '
                             f'{lr:.2e}): try a lower learning rate, more warmup_iters, or --dtype=float32')
    return sum(loss for loss, _ in numbers) / len(numbers), numbers[-1][1]

def survivors():
    saved = os.path.exists(ckpt_path)
    return f'{ckpt_path} holds the last update saved' if saved else 'nothing was saved yet'

def print_sample():
    prompt = torch.from_numpy(data.val[:1].astype('int64'))[None]
    generator = torch.Generator(device).manual_seed(seed)
    ids = raw_model.generate(prompt, 200, temperature=0.8, top_k=200, generator=generator)[0, 1:].tolist()
    text = prepare.printable(prepare.Tokenizer(data.meta['tokenizer']).decode(ids)).strip()
    print(f'sample  at update {step}:', *text.splitlines(), sep='\n    ')

if eval_only:
    with plain_errors(), hardware.plain_memory_errors('try a smaller batch_size'):
        val_loss = evaluate()
    say(f'validation loss {val_loss:.4f}, {bits_per_byte(val_loss):.4f} bits per byte')
    hardware.end_processes()
    sys.exit()

# ----------------------------------------------------------------------------
# the update, and the batches that it reads

model = torch.compile(raw_model) if compile == 'true' else raw_model
model = hardware.share_gradients(model)
update = make_update(model, torch_optimizer, n_micro, grad_clip, scaler, trial.graph)

# the run numbers its sequences, and each update reads the next ones, however many processes share them
rows_per_update = n_micro * batch_size
first_row = tokens_seen // block_size + rank * rows_per_update
stride = world_size * rows_per_update
batches = prepare.batches(data.train, first_row, rows_per_update, stride, block_size, seed, device)

# ----------------------------------------------------------------------------
# the loop

signals = configurator.catch_signals(quiet=not master)
peak, _ = hardware.peak_flops(device, dtype)
unread, stopped_early, interrupted = [], False, False
first_step = logged_step = step
logged_at = saved_at = time.monotonic()
gc.collect()
gc.freeze()  # setup objects live until exit: exempt them from garbage collection

with plain_errors(survivors), hardware.plain_memory_errors('try a smaller batch_size'):
    while not interrupted:
        # save and evaluate
        if step > val_step and (step % eval_interval == 0 or step == max_iters):
            save_latest()  # before the evaluation, during which the process may be killed
            show('evaluating ...')
            val_loss, val_step = evaluate(), step
            if not math.isfinite(val_loss):
                raise ValueError(f'update {step}: validation loss {val_loss}: try a lower learning rate')
            record(val_loss=f'{val_loss:.6f}')
            if val_loss < best_val_loss:
                best_val_loss, best_step, evals_since_best, note = val_loss, step, 0, ''
                save(best_path)
            else:
                evals_since_best += 1
                note = f'; not better since update {best_step}: {best_path} keeps its {best_val_loss:.4f}'
            line = f'        validation {val_loss:.4f}, {bits_per_byte(val_loss):.4f} bits per byte{note}'
            say(line if note else configurator.green(line))
            save_latest()
            if master:
                with configurator.watching('loss.png'):
                    folder.plot(f'{dataset}, {n_params / 1e6:.2f}M parameters: validation loss '
                                f'{best_val_loss:.4f} at update {best_step}')
            is_turn = sample_interval and step // eval_interval % sample_interval == 0
            if master and is_turn and step < max_iters:
                print_sample()
            stopped_early = 0 < patience <= evals_since_best
            logged_at = saved_at = time.monotonic()
        if step == max_iters or stopped_early:
            break

        # set the learning rate
        scale = learning_rate_scale(step)
        lr = learning_rate * scale
        scale_learning_rates(torch_optimizer, scale)

        # one update of the weights
        torch.manual_seed(seed + 1000003 * (step + 1) + rank)  # so that a resumed run draws the same dropout
        unread.append(torch.stack(update(*next(batches))))
        step += 1
        tokens_seen += tokens_per_update

        # log
        log_now = world_size == 1 and (signals or time.monotonic() - saved_at > SAVE_SECONDS)
        if not (log_now or step % log_interval == 0 or step % eval_interval == 0 or step == max_iters):
            show(f'update {step} of {max_iters}', step / max_iters)
            if step == first_step + 1:  # the first takes longer: it may compile
                logged_step, logged_at = step, time.monotonic()
            continue
        train_loss, grad_norm = read_losses()
        seconds = (time.monotonic() - logged_at) / (step - logged_step)
        speed = tokens_per_update / seconds
        mfu = raw_model.flops_per_token() * speed / (peak * world_size)
        say(f'{step:>{len(str(max_iters))}}/{max_iters}  loss {train_loss:.4f}  lr {lr:.1e}  '
            f'norm {grad_norm:5.2f}  {1000 * seconds:6.1f} ms  {speed:9,.0f} tokens/s  MFU {mfu:4.0%}  '
            f'{clock((max_iters - step) * seconds)} left')
        record(train_loss=f'{train_loss:.6f}', val_loss='', lr=f'{lr:.6g}', grad_norm=f'{grad_norm:.4f}',
               tokens_per_sec=round(speed))
        logged_step, logged_at = step, time.monotonic()

        # save, if the run is told to stop or the last checkpoint is old
        interrupted = hardware.mean_over_processes([len(signals)], device)[0] > 0 and step < max_iters
        if interrupted or time.monotonic() - saved_at > SAVE_SECONDS:
            save_latest()
            saved_at = time.monotonic()

# ----------------------------------------------------------------------------
# the end

out_dir_flag = f' --out_dir={shlex.quote(out_dir)}' if out_dir != 'out' else ''
if interrupted:
    say(f'saved   {ckpt_path} at update {step}; to continue: python train.py --resume{out_dir_flag}')
else:
    if stopped_early and step < max_iters:
        say(f'stopped at update {step}: no better validation loss in {patience} evaluations')
    memory = hardware.peak_memory(device) / 2**30
    say(f'done    in {clock(seconds_so_far())}, peak memory {memory:.2f} GiB; the best validation loss is '
        f'{best_val_loss:.4f}, of update {best_step}: {best_path}')
    if master:
        with configurator.watching('the sample'):
            print_sample()
    say(f'means   {prepare.judged(bits_per_byte(best_val_loss), data.meta)}')
    if not os.path.exists(os.path.join(out_dir, 'loss.png')):
        say('        (pip install matplotlib, and a run also draws loss.png)')
    flags = [flag for flag in sys.argv[1:] if not flag.startswith(('--max_iters=', '--minutes='))]
    if best_step < step:
        say('better  the model probably overfits: use more text, or more dropout, such as '
            f'--dropout={min(0.5, dropout + 0.2):g}')
    elif planning and epochs > 0.95 * hardware.READINGS:
        say(f'better  more text: with --minutes, a run makes at most {hardware.READINGS} passes over it')
    elif not resume:
        longer = f'--minutes={2 * minutes:g}' if planning else f'--max_iters={2 * max_iters}'
        say(f'better  python train.py {shlex.join([*flags, longer])}')
    prompt = ' --start="ROMEO:"' if dataset == 'shakespeare' else ''
    say(f'next    python sample.py{out_dir_flag}{prompt}')
model = update = None  # they hold the process group
hardware.end_processes()
sys.exit(128 + signals[0] if interrupted and signals else 0)
