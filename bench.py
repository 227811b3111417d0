"""Measure speed: training (ms per update and where they go, tokens/s, MFU, memory), prefill and decoding.

    python bench.py --model_preset=small                # train.py's settings and flags, and those below
    python bench.py config/train_shakespeare.py         # that run, on its data
    python bench.py --record                            # the README's results and picture, in about an hour

Medians, with the least and the most in brackets; timings are synchronized, warm-up is excluded.
"""
import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import csv
import itertools
import subprocess
import sys
import tempfile
import time
from json import dumps
from statistics import mean, median

import torch

import hardware
import prepare
from configurator import configure, plain_errors, set_up_output
from model import (GPTConfig, OPTIMIZERS, config_from, load_checkpoint, load_model, make_update, presets,
                   start_training, starting_point)

# ----------------------------------------------------------------------------
# settings, on top of train.py's. Tokens are random unless a flag or config file sets dataset.
updates = 10  # timed updates (on a GPU: rounds of four); fewer if they take over 20 seconds
decode_batch = 1  # texts generated at once
decode_tokens = 50  # tokens generated, after a prompt of block_size / 2
json = False  # print the figures as JSON
record = False  # train three Shakespeare configs with three seeds each: a table, and assets/loss.png
# ----------------------------------------------------------------------------
PARTS = ('data', 'forward', 'backward', 'optimizer')  # of an update
RECORD = {  # config: its colour in the picture
    'config/train_shakespeare_quick.py': 'C0', 'config/train_shakespeare.py': 'C1',
    'config/train_shakespeare_best.py': 'C2'}
A100 = 1.4697  # nanoGPT's README: the best validation loss of its shakespeare_char config
ONE_OR_MORE = (1, 10**9)
ALLOWED = dict(
    model_preset=('', *presets), optimizer=OPTIMIZERS, compile=('auto', 'true', 'false'),
    batch_size=ONE_OR_MORE, updates=ONE_OR_MORE, decode_batch=ONE_OR_MORE, decode_tokens=ONE_OR_MORE)

def print_record():
    """The table of three configs, each trained with three seeds, and the losses of seed 1 as a picture."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axes = figure.subplots()
    print(f'{hardware.device_name(device)}, torch {torch.__version__}, {time.strftime("%Y-%m-%d")}\n')
    print('| `python train.py ...` | parameters | seeds 1, 2, 3 | mean | wall time |\n|---|---|---|---|---|')
    for path, colour in RECORD.items():
        losses, seconds = [], []
        for number in (1, 2, 3):
            with tempfile.TemporaryDirectory() as out:
                command = [sys.executable, train_script, path, f'--seed={number}', f'--out_dir={out}/run',
                           f'--device={device}', '--offline_dataset=']
                began = time.perf_counter()
                subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
                seconds.append(time.perf_counter() - began)
                state = load_checkpoint(f'{out}/run/ckpt.pt')
                losses.append(state['val_loss'])
                with open(f'{out}/run/log.csv', encoding='utf-8', newline='') as file:
                    rows = list(csv.DictReader(file))
            if number == 1:
                for name, options in (('train_loss', dict(linewidth=0.7, alpha=0.5)),
                                      ('val_loss', dict(marker='o', label=f'{path}, validation'))):
                    points = [(float(row['elapsed_s']), float(row[name])) for row in rows if row[name]]
                    axes.plot(*zip(*points), color=colour, **options)
        n_params = load_model(state).n_params()
        each = ', '.join(f'{loss:.3f}' for loss in losses)
        print(f'| `{path}` | {n_params / 1e6:.2f}M | {each} | {mean(losses):.3f} '
              f'| {min(seconds):.1f} to {max(seconds):.1f} s |')
    axes.axhline(A100, color='grey', linestyle='--', label="nanoGPT's 10.7M-parameter model on an A100")
    axes.set(xlabel=f'seconds on {hardware.device_name(device)}', ylabel='loss (nats per character)',
             ylim=(1.2, 2.8), title='tiny Shakespeare (thin lines: training)')
    axes.legend(fontsize=8)
    figure.savefig('assets/loss.png', dpi=110)

set_up_output()
train_script = os.path.join(os.path.dirname(__file__), 'train.py')
config, given = configure(GPTConfig, train_script, __file__, allowed=ALLOWED)
with plain_errors():
    config |= starting_point(config, given)[2] | given
    device = hardware.pick_device(config['device'])
    dtype = hardware.pick_dtype(device, config['dtype'])
    threads = hardware.set_up(device, config['threads'])
    config.update(device=device, dtype=dtype, threads=threads)
    if config['record']:
        print_record()
        sys.exit()
    data = prepare.load_dataset(config['dataset']) if 'dataset' in given else None
    default = presets.get(config['model_preset'], {}).get('vocab_size', GPTConfig.vocab_size)
    vocab_size = data.meta['vocab_size'] if data else default
    model_config = config_from(config, vocab_size=config['vocab_size'] or vocab_size)
    config['compile'] = given.get('compile', 'false')
globals().update(config)
block_size = model_config.block_size

def make():
    return start_training(model_config, config)

def sequences(n):
    if data:
        return next(prepare.batches(data.train, 0, n, n, block_size, seed, device))
    ids = torch.randint(model_config.vocab_size, (n, block_size + 1), device=device)
    return ids[:, :-1], ids[:, 1:]

def update_in_parts(model, optimizer, x, y):
    """One update, which pauses after each of its parts: forward, backward, optimizer."""
    loss = model(x, y, return_logits=False)[1]
    yield
    loss.backward()
    yield
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    yield

# ----------------------------------------------------------------------------
# training: whole updates, as CUDA graphs where train.py uses them, then their parts, each waited for

with plain_errors():  # of the data
    trial = hardware.fit(make, make_update, sequences, config, 1, lambda seconds: 600.0, updates + 1)
    if trial.not_compiled and compile == 'true':
        raise ValueError(f'torch.compile does not work here: {trial.not_compiled}')
peak_memory = hardware.peak_memory(device)
peak, origin = hardware.peak_flops(device, dtype)
model, optimizer = make()
tokens_per_sec = trial.batch_size * trial.n_micro * block_size / median(trial.all_seconds)
mfu = model.flops_per_token() * tokens_per_sec / peak
compiled = trial.compile == 'true'
trained = torch.compile(model) if compiled else model
ms = {part: [] for part in PARTS}
for _ in range(len(trial.all_seconds) + 1):
    stamps = [time.perf_counter()]
    micro_batch = sequences(trial.batch_size)
    hardware.synchronize(device)
    stamps.append(time.perf_counter())
    for _ in update_in_parts(trained, optimizer, *micro_batch):
        hardware.synchronize(device)
        stamps.append(time.perf_counter())
    for part, (a, b) in zip(PARTS, itertools.pairwise(stamps)):
        ms[part].append(1000 * (b - a))
ms = {part: times[1:] for part, times in ms.items()}  # the first warms up
ms['all'] = [1000 * seconds for seconds in trial.all_seconds]
model.eval().to(getattr(torch, dtype))
prompt = torch.randint(model_config.vocab_size, (decode_batch, block_size // 2), device=device)
list(model.stream(prompt, 1))  # warm-up
stamps = [time.perf_counter()]
for new in model.stream(prompt, decode_tokens + 5, temperature=0.8, top_k=200):
    new.tolist()  # as sample.py does: waits for the device
    stamps.append(time.perf_counter())
# the next four steps also capture the graph
prefill, _, _, _, _, *steps = [1000 * (b - a) for a, b in itertools.pairwise(stamps)]
# at best a step takes as long as reading every weight once
weights, bandwidth = sum(p.nbytes for p in model.parameters()), hardware.measure_bandwidth(device)
bandwidth_share = weights / (median(steps) / 1000) / bandwidth

f = dict(
    device=hardware.device_name(device), torch=torch.__version__, dtype=dtype,
    compiled=compiled, parameters=model.n_params(), block_size=block_size,
    batch_size=trial.batch_size, ms_per_update=ms, tokens_per_sec=tokens_per_sec, mfu=mfu, peak_flops=peak,
    peak_origin=origin, peak_memory=peak_memory,
    context=prompt.size(1), decode_batch=decode_batch, prefill_tokens_per_sec=1000 * prompt.numel() / prefill,
    decode_tokens_per_sec=1000 * decode_batch / median(steps), ms_per_decode_step=steps,
    bandwidth=bandwidth, bandwidth_share=bandwidth_share,
)
if json:
    print(dumps(f))
    sys.exit()

def spread(values):
    return f'{median(values):.2f} [{min(values):.2f} {max(values):.2f}]'

parts = ', '.join(f'{part} {spread(ms[part])}' for part in PARTS)
print(f'{f["device"]}, torch {f["torch"]}, {dtype}, compiled: {f["compiled"]}')
print(f'model     {f["parameters"] / 1e6:.2f}M parameters, {trial.batch_size} x {block_size} tokens')
print(f'training  {tokens_per_sec:,.0f} tokens/s, MFU {mfu:.1%} of {peak / 1e12:.3g} TFLOP/s ({origin}), '
      f'peak memory {peak_memory / 2**30:.2f} GiB')
print(f'          ms per update {spread(ms["all"])}; its parts, each waited for: {parts}')
print(f'prefill   {f["prefill_tokens_per_sec"]:,.0f} tokens/s, {decode_batch} x {block_size // 2} tokens')
print(f'decoding  {f["decode_tokens_per_sec"]:,.0f} tokens/s, {spread(steps)} ms a step at batch '
      f'{decode_batch}, context {block_size // 2}')
print(f'          reads {weights / 1e6:,.1f} MB a step, {bandwidth_share:.0%} of plain reading, '
      f'{bandwidth / 1e9:.1f} GB/s')
