"""How fast: training (ms per update and where they go, tokens/s, MFU, memory), prefill and decoding.

    python bench.py --model_preset=small            # train.py's settings and flags, and those below
    python bench.py config/train_shakespeare.py --random_data=false
    python bench.py --n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --vocab_size=50304 --batch_size=4
    python bench.py --growth                        # a table over block_size and over parameters

Medians, with the quartiles in brackets; what is timed is waited for, warm-up does not count.
"""

import json as json_format
import os
import statistics
import subprocess
import sys
import time

import torch

import hardware
import prepare
from configurator import configure, plain_errors, stop
from model import GPT, GPTConfig, KVCache, make_optimizer, presets

# ----------------------------------------------------------------------------
# settings, on top of train.py's
vocab_size = 0  # 0: the preset's, or the data set's
random_data = True  # False: batches of `dataset`, read as train.py reads them
updates = 10  # timed updates, after two that are not
decode_batch = 1  # texts drawn at once
decode_context = 0  # tokens that stand before the first one drawn; 0: half of block_size
decode_tokens = 50  # tokens drawn; 0: no prefill and no decoding
profile = False  # print the costliest operations of one update instead
json = False  # print the figures as JSON
growth = False  # a table over block_size and over parameters
# ----------------------------------------------------------------------------
here = os.path.dirname(os.path.abspath(__file__))
config = configure(os.path.join(here, 'train.py'), __file__)
globals().update(config)


def measure(*flags):
    """The figures of another configuration, from a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, *sys.argv[1:], '--growth=false', '--profile=false', '--decode_tokens=20', '--json', *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:  # a process that ran out of memory may have said nothing
        return {'failed': [f'exit status {done.returncode}', *done.stderr.strip().splitlines()][-1]}
    return json_format.loads(done.stdout)


if growth:
    print('| parameters | block_size | batch | training tokens/s | peak memory, GiB | decoding tokens/s |\n' + '|---' * 6 + '|')
    rows = [(4, 256, block) for block in (128, 256, 512, 1024, 2048, 4096)]
    rows += [(*size, 256) for size in ((4, 128), (4, 256), (6, 384), (8, 512), (16, 640), (28, 1024))]
    for layers, width, block in rows:
        batch = max(1, 4096 // block) if width < 512 else 4
        shape = dict(n_layer=layers, n_head=width // 64, n_kv_head=width // 128, n_embd=width, block_size=block, batch_size=batch)
        f = measure(*(f'--{name}={value}' for name, value in shape.items()), f'--vocab_size={vocab_size or 8192}')
        if 'failed' in f:
            print(f'| {layers} layers, {width} wide | {block} | {batch} | {f["failed"]} | | |', flush=True)
            continue
        print(f"| {f['parameters'] / 1e6:.1f}M | {block} | {batch} | {f['tokens_per_sec']:,.0f} | "
              f"{f['peak_memory'] / 2**30:.2f} | {f['decode_tokens_per_sec']:,.0f} |", flush=True)
    sys.exit()

with plain_errors():
    device = hardware.pick_device(device)
    dtype = hardware.pick_dtype(device, dtype)
    data = None if random_data else prepare.load_dataset(dataset)
    wishes = {name: config[name] for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'block_size') if config[name]}
    if model_preset not in presets or compile.lower() not in ('auto', 'true', 'false'):
        raise ValueError(f'model_preset {model_preset} or compile {compile}: one of {", ".join(presets)}; auto, true or false')
    shape = {**presets[model_preset], **wishes}
    if n_head and not n_kv_head:
        shape['n_kv_head'] = n_head
    shape['vocab_size'] = data.meta['vocab_size'] if data else vocab_size or shape['vocab_size']
    model_config = GPTConfig(**shape, mlp_ratio=mlp_ratio, dropout=dropout, bias=bias,
                             gradient_checkpointing=gradient_checkpointing)
if min(updates, decode_batch, batch_size) < 1 or min(decode_tokens, decode_context) < 0:
    stop('updates, decode_batch and batch_size must be at least 1, decode_tokens and decode_context at least 0')
hardware.set_up(device, threads)
torch.manual_seed(seed)
block_size = model_config.block_size
context = decode_context or block_size // 2
model = GPT(model_config).to(device)
raw_model = model
if compile.lower() == 'true':
    if problem := hardware.compile_problem(device):
        stop(f'torch.compile does not work here: {problem}')
    model = torch.compile(model)
with plain_errors():
    optimizer = make_optimizer(raw_model, optimizer, learning_rate, (beta1, beta2), muon_learning_rate, muon_momentum,
                               weight_decay)
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
seconds = statistics.median(totals)
peak, origin = hardware.peak_flops(device, dtype)
if not peak:
    peak, origin = hardware.measure_flops(device, dtype), 'measured: a large matrix product'
tokens_per_sec = batch_size * block_size / seconds
figures = dict(
    device=hardware.device_name(device), torch=torch.__version__, dtype=dtype, compiled=model is not raw_model,
    parameters=raw_model.n_params(), block_size=block_size, batch_size=batch_size, tokens_per_sec=tokens_per_sec,
    mfu=raw_model.flops_per_token() * tokens_per_sec / peak, peak_flops=peak, peak_origin=origin,
    peak_memory=hardware.peak_memory(device),
    ms_per_update={name: [1000 * t for t in times] for name, times in dict(all=totals, **timed).items()},
)
if decode_tokens:
    del optimizer, batches
    raw_model.eval().to(getattr(torch, dtype))
    if device == 'cpu':
        raw_model.lay_out_for_decoding()
    prompt = torch.randint(model_config.vocab_size, (decode_batch, context), device=device)
    stream = raw_model.stream(prompt, decode_tokens + 3, temperature=0.8, top_k=200)
    stamps = []
    begin = time.perf_counter()
    for ids in stream:
        ids.tolist()  # as sample.py does: waits for the device
        stamps.append(time.perf_counter())
    gaps = [b - a for a, b in zip(stamps[2:], stamps[3:])]  # the first steps also capture the graph, where there is one
    gap = statistics.median(gaps)
    weight_bytes = sum(p.numel() * p.element_size() for p in raw_model.parameters())
    cache = KVCache(model_config, 1, 'meta', getattr(torch, dtype))
    cache_bytes = 2 * cache.k.nbytes * min(1.0, (context + decode_tokens / 2) / block_size)
    bandwidth = hardware.measure_bandwidth(device)
    read = weight_bytes + decode_batch * cache_bytes
    figures.update(
        context=context, decode_batch=decode_batch, prefill_tokens_per_sec=decode_batch * context / (stamps[0] - begin),
        decode_tokens_per_sec=decode_batch / gap, ms_per_decode_step=[1000 * t for t in gaps], bytes_per_decode_step=read,
        bandwidth=bandwidth, bandwidth_share=read / gap / bandwidth,
    )

if json:
    print(json_format.dumps(figures))
    sys.exit()


def spread(values):
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f'{middle:.2f} [{low:.2f} {high:.2f}]'


f = figures
ms = {name: spread(times) for name, times in f['ms_per_update'].items()}
print(f"{f['device']}, torch {f['torch']}, {dtype}, {'compiled' if f['compiled'] else 'eager'}; "
      f"{f['parameters'] / 1e6:.2f}M parameters, {batch_size} x {block_size} tokens")
print(f"training  {f['tokens_per_sec']:,.0f} tokens/s, MFU {f['mfu']:.1%} of {peak / 1e12:.3g} TFLOP/s ({origin}), "
      f"peak memory {f['peak_memory'] / 2**30:.2f} GiB")
print(f"          ms per update {ms.pop('all')}: " + ', '.join(f'{name} {text}' for name, text in ms.items()))
if decode_tokens:
    print(f"prefill   {f['prefill_tokens_per_sec']:,.0f} tokens/s, {decode_batch} x {context} tokens")
    print(f"decoding  {f['decode_tokens_per_sec']:,.0f} tokens/s, {spread(f['ms_per_decode_step'])} ms a step at batch "
          f"{decode_batch}, context {context}; reads {read / 1e6:,.1f} MB a step, {f['bandwidth_share']:.0%} of the "
          f"{bandwidth / 1e9:.1f} GB/s of plain reading")
