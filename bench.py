"""How fast: training (ms per update and where they go, tokens/s, MFU, memory), prefill and decoding.

    python bench.py --model_preset=small            # train.py's settings and flags, and those below
    python bench.py config/train_shakespeare.py --random_data=false
    python bench.py --report                        # a table for this machine, in up to ten minutes

Medians, with the least and the most in brackets; what is timed is waited for, warm-up does not count.
"""
import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import itertools
import subprocess
import sys
import time
from json import dumps, loads
from statistics import median

import torch

import hardware
import prepare
from configurator import check, choose, configure, plain_errors, set_up_output
from model import GPT, GPTConfig, config_from, make_optimizer, presets

# ----------------------------------------------------------------------------
# settings, on top of train.py's
vocab_size = 0  # 0: the preset's, or the data set's
random_data = True  # false: batches of `dataset`, read as train.py reads them
updates = 10  # timed updates, after two that are not
decode_batch = 1  # texts drawn at once
decode_tokens = 50  # tokens drawn, after block_size / 2 that are read
profile = False  # print the costliest operations of one update instead
json = False  # print the figures as JSON
report = False  # print a table of several models on this machine
# ----------------------------------------------------------------------------
PARTS = ('data', 'forward', 'backward', 'optimizer')  # of an update

def print_report():
    """The table. Each row is measured in a process of its own, so that its peak memory is its own."""
    gpt2 = ('--n_layer=12 --n_head=12 --n_kv_head=4 --n_embd=768 --mlp_ratio=3.1 --block_size=1024 '
            '--vocab_size=50304 --batch_size=16')
    models = [*(f'--model_preset={preset}' for preset in presets), gpt2]
    rows = [f'{model} --compile={on}' for model in models for on in ('false', 'true')]
    rows += [f'{gpt2} {flag}' for flag in ('--decode_batch=16', '--gradient_checkpointing')]
    if device == 'cpu':
        small = '--n_layer=4 --n_head=4 --n_kv_head=2 --n_embd=256'
        rows = [f'{small} --block_size={n} --batch_size={4096 // n}' for n in (128, 512, 2048)]
        rows += [f'--model_preset={preset} --batch_size=4 --block_size=256' for preset in list(presets)[:3]]
    print(f'{hardware.device_name(device)}, torch {torch.__version__}, {time.strftime("%Y-%m-%d")}\n')
    print('| settings | parameters | training tokens/s | MFU | peak GiB | decoding tokens/s | of bandwidth |')
    print('|---|---|---|---|---|---|---|')
    command = [sys.executable, __file__, '--json', f'--device={device}', '--updates=5', '--decode_tokens=20']
    for row in rows:
        done = subprocess.run([*command, *row.split()], capture_output=True, text=True)
        if done.returncode:  # out of memory, say
            print(f'| `{row}` | failed: {" ".join(done.stderr.split())[-80:]} | | | | | |')
            continue
        f = loads(done.stdout)
        print(f'| `{row}` | {f["parameters"] / 1e6:.1f}M | {f["tokens_per_sec"]:,.0f} | {f["mfu"]:.0%} '
              f'| {f["peak_memory"] / 2**30:.2f} | {f["decode_tokens_per_sec"]:,.0f} '
              f'| {f["bandwidth_share"]:.0%} |')

set_up_output()
sources = GPTConfig, os.path.join(os.path.dirname(__file__), 'train.py'), __file__
config = configure(*sources)
with plain_errors():
    choose(config, 'model_preset', presets)
    choose(config, 'compile', ('auto', 'true', 'false'))
    config = configure(*sources, saved={**presets[config['model_preset']], 'vocab_size': 0})
    globals().update(config)
    for name in ('updates', 'decode_batch', 'decode_tokens', 'batch_size'):
        check(config, name, 1, 10**9)
    device = hardware.pick_device(device)
    dtype = hardware.pick_dtype(device, dtype)
    hardware.set_up(device, threads)
    if report:
        print_report()
        sys.exit()
    data = None if random_data else prepare.load_dataset(dataset)
    default = data.meta['vocab_size'] if data else presets[model_preset]['vocab_size']
    model_config = config_from(config, vocab_size=vocab_size or default)
    torch.manual_seed(seed)
    model = raw_model = GPT(model_config).to(device)
    optimizer = make_optimizer(raw_model, optimizer, learning_rate, (beta1, beta2), muon_learning_rate,
                               muon_momentum, weight_decay)
    if compile == 'true':
        problem = hardware.compile_problem(device)
        if problem:
            raise ValueError(f'torch.compile does not work here: {problem}')
        model = torch.compile(model)
if data:
    batches = prepare.batches(data.train, 0, batch_size, batch_size, block_size, seed, device)
else:
    ids = torch.randint(model_config.vocab_size, (batch_size, block_size + 1), device=device)
    batches = itertools.repeat((ids[:, :-1], ids[:, 1:]))

def update():
    """One update; how long each of its PARTS took, in ms."""
    stamps = [time.perf_counter()]

    def done():
        hardware.synchronize(device)
        stamps.append(time.perf_counter())

    x, y = next(batches)
    done()
    with hardware.autocast(device, dtype):
        loss = model(x, y, return_logits=False)[1]
    done()
    loss.backward()
    done()
    torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or float('inf'))
    with hardware.autocast(device, dtype):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    done()
    return [1000 * (b - a) for a, b in itertools.pairwise(stamps)]

with plain_errors():  # of the data
    for _ in range(2):
        update()
if profile:
    with torch.profiler.profile() as profiler:
        update()
    by = 'self_cpu_time_total' if device == 'cpu' else 'self_device_time_total'
    print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))
    sys.exit()
hardware.reset_peak_memory(device)
times = [update() for _ in range(updates)]
ms = dict(zip(PARTS, zip(*times)))
ms['all'] = [sum(parts) for parts in times]
peak_memory = hardware.peak_memory(device)
peak, origin = hardware.peak_flops(device, dtype)
tokens_per_sec = batch_size * block_size / median(ms['all']) * 1000
mfu = raw_model.flops_per_token() * tokens_per_sec / peak

raw_model.eval().to(getattr(torch, dtype))
prompt = torch.randint(model_config.vocab_size, (decode_batch, block_size // 2), device=device)
stamps = [time.perf_counter()]
for new in raw_model.stream(prompt, decode_tokens + 3, temperature=0.8, top_k=200):
    new.tolist()  # as sample.py does: waits for the device
    stamps.append(time.perf_counter())
# the first two steps also lay out the weights or capture the graph
prefill, _, _, *steps = [1000 * (b - a) for a, b in itertools.pairwise(stamps)]
# at best a step takes as long as reading every weight once
weights, bandwidth = sum(p.nbytes for p in raw_model.parameters()), hardware.measure_bandwidth(device)
bandwidth_share = weights / (median(steps) / 1000) / bandwidth

f = dict(
    device=hardware.device_name(device), torch=torch.__version__, dtype=dtype,
    compiled=model is not raw_model, parameters=raw_model.n_params(), block_size=block_size,
    batch_size=batch_size, ms_per_update=ms, tokens_per_sec=tokens_per_sec, mfu=mfu, peak_flops=peak,
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
print(f'model     {f["parameters"] / 1e6:.2f}M parameters, {batch_size} x {block_size} tokens')
print(f'training  {tokens_per_sec:,.0f} tokens/s, MFU {mfu:.1%} of {peak / 1e12:.3g} TFLOP/s ({origin}), '
      f'peak memory {peak_memory / 2**30:.2f} GiB')
print(f'          ms per update {spread(ms["all"])}: {parts}')
print(f'prefill   {f["prefill_tokens_per_sec"]:,.0f} tokens/s, {decode_batch} x {block_size // 2} tokens')
print(f'decoding  {f["decode_tokens_per_sec"]:,.0f} tokens/s, {spread(steps)} ms a step at batch '
      f'{decode_batch}, context {block_size // 2}')
print(f'          reads {weights / 1e6:,.1f} MB a step, {bandwidth_share:.0%} of plain reading, '
      f'{bandwidth / 1e9:.1f} GB/s')
