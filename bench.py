"""How fast: training (ms per update and where they go, tokens/s, MFU, memory), prefill and decoding.

    python bench.py --model_preset=small            # train.py's settings and flags, and those below
    python bench.py config/train_shakespeare.py --random_data=false
    python bench.py --n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --vocab_size=50304 --batch_size=4
    python bench.py --report                        # the README's table for this machine, in up to ten minutes

Medians, with the quartiles in brackets; what is timed is waited for, warm-up does not count.
"""
import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json as json_format
import re
import statistics
import subprocess
import sys
import time

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
decode_context = 0  # tokens that stand before the first one drawn; 0: half of block_size
decode_tokens = 50  # tokens drawn; 0: no prefill and no decoding
profile = False  # print the costliest operations of one update instead
json = False  # print the figures as JSON
report = False  # print the rows of the README's table for this machine
# ----------------------------------------------------------------------------

def measure(*flags):
    """The figures of another configuration, from a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, '--json', f'--device={device}', '--updates=5', '--decode_tokens=20']
    try:
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {'failed': 'not done in two minutes'}
    if done.returncode:  # a process that ran out of memory may have said nothing
        return {'failed': [f'exit status {done.returncode}', *done.stderr.strip().splitlines()][-1][:80]}
    return json_format.loads(done.stdout)

def report_rows():
    """Print the table; a row that fails says so, and the next one follows."""
    shape = '--n_layer=12 --n_head=12 --n_kv_head=4 --n_embd=768 --mlp_ratio=3.1 --block_size=1024'
    gpt2 = f'{shape} --vocab_size=50304 --batch_size=16'
    rows = [f'--model_preset={preset} --compile={on}' for preset in presets for on in ('false', 'true')]
    rows += [f'{gpt2} --compile={on}' for on in ('false', 'true')]
    rows += [f'{gpt2} {more}' for more in ('--decode_batch=16', '--gradient_checkpointing', '--dtype=float16')]
    config_file = 'config/train_shakespeare_gpu.py'
    if device == 'cpu':
        shape = '--n_layer=4 --n_head=4 --n_kv_head=2 --n_embd=256'
        rows = [f'{shape} --block_size={n} --batch_size={4096 // n}' for n in (128, 512, 2048)]
        presets_here = ('tiny', 'small', 'medium')
        rows += [f'--model_preset={preset} --batch_size=4 --block_size=256' for preset in presets_here]
        rows += [f'{rows[1]} {more}' for more in ('--decode_batch=16', '--gradient_checkpointing')]
        config_file = 'config/train_shakespeare_quick.py'
    print(f'{hardware.device_name(device)}, torch {torch.__version__}, {time.strftime("%Y-%m-%d")}\n')
    print('| settings | parameters | training tokens/s | MFU | peak GiB | decoding tokens/s | of bandwidth |')
    print('|---|---|---|---|---|---|---|', flush=True)
    for row in rows:
        f = measure(*row.split())
        if 'failed' in f:
            print(f'| `{row}` | {f["failed"]} | | | | | |', flush=True)
            continue
        print(f'| `{row}` | {f["parameters"] / 1e6:.1f}M | {f["tokens_per_sec"]:,.0f} | {f["mfu"]:.0%} '
              f'| {f["peak_memory"] / 2**30:.2f} | {f["decode_tokens_per_sec"]:,.0f} '
              f'| {f["bandwidth_share"]:.0%} |', flush=True)
    train = os.path.join(here, 'train.py')
    flags = ['--out_dir=out-report', f'--device={device}']
    command = [sys.executable, train, os.path.join(here, config_file), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    said = re.search('done .*', done.stdout)
    print(f'\n{config_file}: {said[0] if said else done.stderr.strip()[-200:]}')

set_up_output()
here = os.path.dirname(os.path.abspath(__file__))
sources = GPTConfig, os.path.join(here, 'train.py'), __file__
config = configure(*sources)
with plain_errors():
    choose(config, 'model_preset', presets)
    config = configure(*sources, saved={**presets[config['model_preset']], 'vocab_size': 0})
    globals().update(config)
    for name in ('updates', 'decode_batch', 'batch_size'):
        check(config, name, 1, 10**9)
    for name in ('decode_tokens', 'decode_context'):
        check(config, name, 0, 10**9)
    device = hardware.pick_device(device)
    dtype = hardware.pick_dtype(device, dtype)
    if ':' in device:
        torch.get_device_module(device).set_device(device)
    hardware.set_up(device, threads)
    if report:
        report_rows()
        sys.exit()
    data = None if random_data else prepare.load_dataset(dataset)
    default = data.meta['vocab_size'] if data else presets[model_preset]['vocab_size']
    model_config = config_from(config, vocab_size=vocab_size or default)
    torch.manual_seed(seed)
    model = raw_model = GPT(model_config).to(device)
    optimizer = make_optimizer(raw_model, optimizer, learning_rate, (beta1, beta2), muon_learning_rate,
                               muon_momentum, weight_decay)
    if compile.lower() == 'true':
        if problem := hardware.compile_problem(device):
            raise ValueError(f'torch.compile does not work here: {problem}')
        model = torch.compile(model)
context = decode_context or block_size // 2
if data:
    batches = prepare.batches(data.train, 0, batch_size, batch_size, block_size, seed, device)
else:
    ids = torch.randint(model_config.vocab_size, (batch_size, block_size + 1), device=device)
    batches = iter(lambda: (ids[:, :-1], ids[:, 1:]), None)
timed = {'data': [], 'forward': [], 'backward': [], 'optimizer': []}

def beat(name, work):
    """work()'s result; its seconds go to timed[name]."""
    begin = time.perf_counter()
    result = work()
    hardware.synchronize(device)
    timed[name].append(time.perf_counter() - begin)
    return result

def forward(x, y):
    with hardware.autocast(device, dtype):
        return model(x, y, return_logits=False)[1]

def step():
    torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or float('inf'))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

def update():
    x, y = beat('data', lambda: next(batches))
    loss = beat('forward', lambda: forward(x, y))
    beat('backward', loss.backward)
    beat('optimizer', step)

for _ in range(2):
    update()
hardware.reset_peak_memory(device)
if profile:
    with torch.profiler.profile() as profiler:
        update()
    by = 'self_cpu_time_total' if device == 'cpu' else 'self_device_time_total'
    print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))
    sys.exit()
timed = {name: [] for name in timed}
for _ in range(updates):
    update()
totals = [sum(parts) for parts in zip(*timed.values())]
peak, origin = hardware.peak_flops(device, dtype)
if not peak:
    peak, origin = hardware.measure_flops(device, dtype), 'measured: a large matrix product'
tokens_per_sec = batch_size * block_size / statistics.median(totals)
f = dict(
    device=hardware.device_name(device), torch=torch.__version__, dtype=dtype, compiled=model is not raw_model,
    parameters=raw_model.n_params(), block_size=block_size, batch_size=batch_size,
    tokens_per_sec=tokens_per_sec,
    mfu=raw_model.flops_per_token() * tokens_per_sec / peak, peak_flops=peak, peak_origin=origin,
    peak_memory=hardware.peak_memory(device),
    ms_per_update={name: [1000 * t for t in times] for name, times in dict(all=totals, **timed).items()},
)
if decode_tokens:
    del optimizer, batches
    raw_model.eval().to(getattr(torch, dtype))
    prompt = torch.randint(model_config.vocab_size, (decode_batch, context), device=device)
    stamps = []
    begin = time.perf_counter()
    for ids in raw_model.stream(prompt, decode_tokens + 3, temperature=0.8, top_k=200):
        ids.tolist()  # as sample.py does: waits for the device
        stamps.append(time.perf_counter())
    # the first steps also lay out the weights or capture the graph
    gaps = [b - a for a, b in zip(stamps[2:], stamps[3:])]
    gap = statistics.median(gaps)
    c = model_config
    positions = min(context + decode_tokens / 2, c.block_size)
    cached = 2 * c.n_layer * c.n_kv_head * c.head_dim * positions * prompt.size(0)  # numbers
    read = (raw_model.n_params() + cached) * raw_model.embedding.weight.element_size()
    bandwidth = hardware.measure_bandwidth(device)
    f.update(
        context=context, decode_batch=decode_batch, prefill_tokens_per_sec=prompt.numel() / (stamps[0] - begin),
        decode_tokens_per_sec=decode_batch / gap, ms_per_decode_step=[1000 * t for t in gaps],
        bytes_per_decode_step=read, bandwidth=bandwidth, bandwidth_share=read / gap / bandwidth,
    )

def spread(values):
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f'{middle:.2f} [{low:.2f} {high:.2f}]'

if json:
    print(json_format.dumps(f))
    sys.exit()
ms = {name: spread(times) for name, times in f['ms_per_update'].items()}
print(f"{f['device']}, torch {f['torch']}, {dtype}, {'compiled' if f['compiled'] else 'not compiled'}; "
      f"{f['parameters'] / 1e6:.2f}M parameters, {batch_size} x {block_size} tokens")
print(f"training  {tokens_per_sec:,.0f} tokens/s, MFU {f['mfu']:.1%} of {peak / 1e12:.3g} TFLOP/s ({origin}), "
      f"peak memory {f['peak_memory'] / 2**30:.2f} GiB")
print(f"          ms per update {ms.pop('all')}: " + ', '.join(f'{name} {text}' for name, text in ms.items()))
if decode_tokens:
    print(f"prefill   {f['prefill_tokens_per_sec']:,.0f} tokens/s, {decode_batch} x {context} tokens")
    print(f"decoding  {f['decode_tokens_per_sec']:,.0f} tokens/s, {spread(f['ms_per_decode_step'])} ms a step at "
          f"batch {decode_batch}, context {context}")
    print(f"          reads {read / 1e6:,.1f} MB a step, {f['bandwidth_share']:.0%} of the {bandwidth / 1e9:.1f} "
          'GB/s of plain reading')
