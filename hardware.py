"""What this machine has, and what to use: device, dtype, compile, threads, processes, memory, speed.

    python hardware.py                  a table, and what train.py would use; --recommended: only the device
    python hardware.py --interactive    asks, and prints the flags to use
    python hardware.py --json           {python, torch, cores, problem, device, dtype, no_gpu, table}
"""
import ctypes
import gc
import math
import os
import platform
import re
import sys
import textwrap
import time
import timeit
import warnings
from contextlib import contextmanager, suppress
from json import dumps
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

json = False         # print the table as JSON
recommended = False  # print the device that train.py would use, and nothing else
interactive = False  # choose a device and a dtype

# Vendors' dense TFLOP/s in bfloat16 and float16, by torch's name less 'NVIDIA '; half an MI250X is a device
PEAKS = {
    'H100 80GB HBM3': 989, 'H100 PCIe': 756, 'H200': 989, 'A100-SXM4-40GB': 312, 'A100-SXM4-80GB': 312,
    'A100-PCIE-40GB': 312, 'A100 80GB PCIe': 312, 'L40S': 362, 'L4': 121, 'A10': 125, 'GeForce RTX 4090': 165,
    'GeForce RTX 3090': 71, 'Tesla T4': 65, 'Tesla V100-SXM2-16GB': 125, 'Tesla V100-SXM2-32GB': 125,
    'AMD Instinct MI300X': 1307, 'AMD Instinct MI250X': 191.5,
}

READINGS = 6  # of a text in a planned run; more overfit
EVALUATION_TOKENS = 4096  # in a batch of an evaluation; more if a micro-batch is larger
TRIAL_SECONDS = 20  # a trial makes no further update after so long
COMPILE_SECONDS = 60  # that compiling takes, about
CGROUP = '/sys/fs/cgroup'  # Linux's limits for this container
INSTALL = 'the Get Started page of pytorch.org has the pip line of a PyTorch for it'

def torch_release():
    """(2, 9) for 2.9.1, and for 2.9.0a0 of NVIDIA's containers, which torch itself orders before 2.9."""
    return tuple(int(number) for number in torch.__version__.split('.')[:2])

def version_problem():
    """'' or, in one line, that Python or PyTorch is too old."""
    if sys.version_info >= (3, 10) and torch_release() >= (2, 9):
        return ''
    here = f'Python {platform.python_version()}, PyTorch {torch.__version__}'
    return f'{here}: Python 3.10 and PyTorch 2.9 or later are needed'

def kind(device):
    return torch.device(device).type

def proc(path, field):
    """The value of a field in a file under Linux's /proc, sizes in bytes; '' where there is none."""
    with suppress(OSError), open(path, encoding='utf-8') as file:
        found = re.search(rf'^(?:{field})\s*: *(.*)$', file.read(), re.MULTILINE)
        value = found[1] if found else ''
        return 1024 * int(value[:-3]) if value.endswith(' kB') else value
    return ''

def synchronize(device):
    if kind(device) != 'cpu':
        torch.accelerator.synchronize(device)

def peak_memory(device):
    """The most bytes in use since reset_peak_memory(); 0 where the system doesn't say."""
    if kind(device) == 'cpu':
        return proc('/proc/self/status', 'VmHWM') or 0
    return torch.accelerator.max_memory_allocated(device)

def reset_peak_memory(device):
    if kind(device) != 'cpu':
        torch.accelerator.reset_peak_memory_stats(device)
    with suppress(OSError), open('/proc/self/clear_refs', 'w') as file:  # only Linux has it
        file.write('5')

def cgroup_bytes(*names):
    """The number in the first of these files that the container has; 0: no such file, or no limit."""
    for name in names:
        with suppress(OSError, ValueError), open(f'{CGROUP}/{name}', encoding='utf-8') as file:
            return int(file.read())  # ValueError: 'max', no limit
    return 0

def memory():
    """(free, total) bytes of the system, or of the container if it has less; 0: the system doesn't say."""
    free, total = proc('/proc/meminfo', 'MemAvailable') or 0, proc('/proc/meminfo', 'MemTotal') or 0
    limit = cgroup_bytes('memory.max', 'memory/memory.limit_in_bytes')
    if 0 < limit < total:
        used = cgroup_bytes('memory.current', 'memory/memory.usage_in_bytes')
        return min(free, limit - used), limit
    return free, total

def cores():
    """How many CPU cores this process may use: those of its affinity, or its container's quota if less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with suppress(OSError, ValueError), open(f'{CGROUP}/cpu.max', encoding='utf-8') as file:
        quota, period = map(int, file.read().split())  # ValueError: 'max', no limit
        count = min(count, math.ceil(quota / period))
    return count

def runs_on(capability, arch):
    """Whether code for arch runs on a card: sm_80 on 8.0 to 8.9, sm_90a on 9.0 alone, compute_80 from 8.0 on,
    sm_100f and compute_100f on 10.0 to 10.9 (CUDA Programming Guide, Compute Capabilities)."""
    form, number, suffix = re.fullmatch(r'(sm|compute)_(\d+)([af]?)', arch).groups()
    major, minor = divmod(int(number), 10)
    if suffix == 'a':
        return capability == (major, minor)
    if form == 'compute' and not suffix:  # PTX, which the driver compiles
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor

def card_problem(device):
    """'' or why PyTorch, which is built for devices of this kind, can't use this one"""
    if kind(device) != 'cuda' or torch.version.hip:
        return ''
    capability, archs = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    usable = [arch for arch in archs if runs_on(capability, arch)]
    if usable or not archs:
        return ''
    return 'compute capability %d.%d: this PyTorch is built for ' % capability + ', '.join(archs)

def devices():
    """(what PyTorch can use here, the best first and the CPU last; why there is no GPU, or '';
    {what PyTorch can't use here: why})"""
    gpu = torch.accelerator.current_accelerator()  # what this PyTorch is built for; cuda stands for ROCm, too
    built, reasons = 'the CPU alone', {}
    if gpu is not None:
        built = 'ROCm' if torch.version.hip else gpu.type.upper()
        if not torch.accelerator.is_available():
            reasons[built] = f'no {gpu.type} device that PyTorch can use, or its driver is missing or too old'
        elif gpu.type == 'mps' and torch_release() < (2, 13):
            # In half precision causal attention sees up to three future tokens (pytorch/pytorch#195910), and
            # before 2.11 that of short queries reads out of bounds (pytorch/pytorch#174861).
            reasons[built] = 'mps needs PyTorch 2.13 or later: attention has faults in earlier releases'
        else:
            names = [f'{gpu.type}:{i}' for i in range(torch.accelerator.device_count())]
            reasons = {name: card_problem(name) for name in names}
    there = [name for name, problem in reasons.items() if not problem]
    missing = {name: problem for name, problem in reasons.items() if problem}
    for name in ('CUDA', 'ROCm', 'MPS', 'XPU'):
        if name != built:
            missing[name] = f'this PyTorch is built for {built}'
    no_gpu = '' if there else next(iter(missing.values()))
    return [*there, 'cpu'], no_gpu, missing

def pick_device(wish='auto'):
    """The torch device for auto, cuda, cuda:1, xpu, mps or cpu; ValueError if it isn't there."""
    there, no_gpu, missing = devices()
    fits = [device for device in there if wish in ('auto', device, kind(device))]
    if fits:
        return fits[0].removesuffix(':0')
    why = no_gpu or missing.get(wish, 'not here')
    if not re.fullmatch(r'(cpu|cuda|mps|xpu)(:\d+)?', wish):
        why = 'unknown: the names are auto, cpu, cuda and cuda:1 (NVIDIA and AMD), mps (Apple), xpu (Intel)'
    flags = ' or '.join(f'--device={device}' for device in there)
    if torch.accelerator.current_accelerator() is None:
        flags += f'; for a GPU: {INSTALL}'
    raise ValueError(f'device {wish}: {why}; use {flags}')

def dtypes(device):
    """Those of float32, float16, bfloat16 that the hardware computes in, not those it emulates."""
    bfloat = True
    if kind(device) == 'cpu':
        bfloat = re.search(r'\b(avx512_bf16|amx_bf16|bf16)\b', proc('/proc/cpuinfo', 'flags|Features'))
    elif kind(device) == 'xpu':
        bfloat = torch.xpu.get_device_properties(device).has_bfloat16_conversions
    elif torch.version.hip:  # bfloat16 units: MI100, MI200, MI300, RDNA3 and later
        bfloat = re.match('gfx(908|90a|94|95|11|12)', torch.cuda.get_device_properties(device).gcnArchName)
    elif kind(device) == 'cuda':  # not torch.cuda.is_bf16_supported(): it counts emulation
        bfloat = torch.cuda.get_device_capability(device) >= (8, 0)
    there = ['float32'] if kind(device) == 'cpu' else ['float32', 'float16']
    return [*there, 'bfloat16'] if bfloat else there

def pick_dtype(device, wish='auto'):
    """bfloat16, float16 (which needs a GradScaler) or float32; ValueError if the device lacks it."""
    there = dtypes(device)
    if wish == 'auto':
        wish = 'float32'
        if 'bfloat16' in there and kind(device) != 'mps':  # Apple's GPUs are about as fast in float32
            wish = 'bfloat16'
        elif kind(device) == 'cuda' and torch.cuda.get_device_capability(device) >= (7, 0):  # tensor cores
            wish = 'float16'
    if wish not in there:
        name = device_name(device)
        raise ValueError(f'dtype {wish}: {device} ({name}) computes only in {", ".join(there)}')
    return wish

def set_up(device, threads=0):
    """TF32 for float32 products on a GPU; on the CPU malloc, and the number of threads (0: as many as are
    fastest now) -> the threads of torch."""
    if ':' in device:
        torch.get_device_module(device).set_device(device)
    precision = 'high'
    if kind(device) == 'cpu':
        # 'medium' hands float32 products to oneDNN: with AVX-512 as exact as MKL's and, on AMD, twice as
        # fast; with AMX they would become bfloat16.
        flags = proc('/proc/cpuinfo', 'flags')
        precision = 'medium' if 'avx512bw' in flags and 'amx' not in flags else 'highest'
    torch.set_float32_matmul_precision(precision)
    with suppress(OSError):  # where there is no glibc
        # Keeping freed tensors saves faulting their pages in again: 6 % of a step at 1.6M parameters.
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most that an older glibc allows,
        mallopt(-3, 1 << 30)  # and more where it is newer
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    torch.set_num_threads(threads or min(torch.get_num_threads(), cores()))
    if kind(device) == 'cpu' and not threads and not dist.is_initialized():
        pick_threads()
    return torch.get_num_threads()

def pick_threads():
    """Set the number of CPU threads, all, half or one, that is fastest now, in under a second. Where another
    program has a core, threads that wait for each other can be far slower than one."""
    most = torch.get_num_threads()
    if most == 1:
        return
    x = torch.randn(256, 256)  # small, as the products of a small model are
    products = {most: 0, (most + 1) // 2: 0, 1: 0}  # how many in three tenths of a second
    for threads in 3 * list(products):
        torch.set_num_threads(threads)
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            x @ x
            products[threads] += 1
    torch.set_num_threads(max(products, key=products.get))

def compile_problem(device):
    """'' when one tiny compiled training step works here, else why not, in one line."""
    if kind(device) == 'mps':
        return 'off on MPS'
    x = torch.arange(4096.).view(64, 64).to(device)
    weight = torch.ones_like(x, requires_grad=True)
    try:
        torch.compile(lambda x: torch.nn.functional.gelu(x @ weight))(x).sum().backward()
        return ''
    except Exception as error:  # it can be anything: no compiler, no Triton, an old card, a new Python
        return textwrap.shorten(f'{type(error).__name__}: {error}', 150)

def device_name(device):
    if kind(device) in ('cuda', 'xpu'):
        return torch.get_device_module(device).get_device_name(device)
    if kind(device) == 'mps':
        return 'Apple GPU'
    name = proc('/proc/cpuinfo', 'model name') or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f'{name}, {threads} thread{"" if threads == 1 else "s"}'

def peak_flops(device, dtype):
    """(FLOP/s, where from): the vendor's figure, or for float32 and unknown devices a measured one."""
    teraflops = PEAKS.get(device_name(device).removeprefix('NVIDIA '), 0)
    if teraflops and dtype != 'float32':
        return 1e12 * teraflops, 'vendor'
    return measure_flops(device, dtype), 'measured: a large matrix product'

def fastest(device, work):
    """Seconds, the least of twelve tries."""
    return min(timeit.repeat(lambda: (work(), synchronize(device)), number=1, repeat=12))

def measure_flops(device, dtype):
    """FLOP/s of a large matrix product of random numbers."""
    n = {'cpu': 512, 'mps': 4096}.get(kind(device), 8192)
    x = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    return 2 * n ** 3 / fastest(device, lambda: x @ x)

def measure_bandwidth(device):
    """Bytes/s of reading a tensor much larger than the caches."""
    x = torch.ones((64 if kind(device) == 'cpu' else 256) * 2 ** 20, device=device)
    return x.nbytes / fastest(device, x.sum)

def describe(device):
    """What a device is, in plain values; memory of 0: the system doesn't say."""
    free, total = memory()
    if kind(device) in ('cuda', 'xpu'):
        free, total = torch.get_device_module(device).mem_get_info(device)
    return {'device': device, 'name': device_name(device), 'dtypes': ' '.join(dtypes(device)),
            'memory_gib': round(total / 2 ** 30, 1), 'free_gib': round(free / 2 ** 30, 1)}

def report():
    there, no_gpu, _ = devices()
    device = pick_device()
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'cores': cores(),
            'problem': version_problem(), 'device': device, 'dtype': pick_dtype(device), 'no_gpu': no_gpu,
            'table': [describe(device) for device in there]}

def table():
    """The report for people, at most 100 columns wide; on a terminal devices are green, missing ones grey."""
    facts = report()
    _, _, missing = devices()
    green, grey, plain = '', '', ''
    if sys.stdout.isatty() and os.environ.get('TERM', 'dumb') != 'dumb' and not os.environ.get('NO_COLOR'):
        green, grey, plain = '\033[32m', '\033[90m', '\033[0m'
    lines = ['device  free memory    computes in              name (compute capability)', '-' * 100]
    for row in facts['table']:
        memory = f'{row["free_gib"]:.0f} of {row["memory_gib"]:.0f} GiB' if row['memory_gib'] else 'unknown'
        line = f'{row["device"]:8}{memory:15}{row["dtypes"]:25}{row["name"]}'
        if kind(row['device']) == 'cuda':
            line += ' (%d.%d)' % torch.cuda.get_device_capability(row['device'])
        lines.append(f'{green}{line[:100]}{plain}')
    for device, problem in missing.items():
        line = textwrap.fill(f'{device:8}{problem}', 100, subsequent_indent=' ' * 8)
        lines.append(f'{grey}{line}{plain}')
    advice = f'train.py would use {facts["device"]} (the first available) in {facts["dtype"]}'
    versions = f'Python {facts["python"]}, PyTorch {facts["torch"]}, {facts["cores"]} CPU cores'
    return '\n'.join([*lines, '', versions, facts['problem'] or advice])

# ----------------------------------------------------------------------------
# several processes, as torchrun starts them

def start_processes(device):
    """Join the processes that torchrun started -> (rank, how many, the device of this one)."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world_size == 1:
        return 0, 1, device
    if device == 'mps':
        if rank == 0:
            print('device  several processes cannot share an Apple GPU: training on the CPU')
        device = 'cpu'
    if device in ('cuda', 'xpu'):
        device = pick_device(f'{device}:{os.environ["LOCAL_RANK"]}')
    warnings.simplefilter('ignore', FutureWarning)  # of names that torch 2.9 does not have
    dist.init_process_group({'cuda': 'nccl', 'xpu': 'xccl'}.get(kind(device), 'gloo'))
    return rank, world_size, device

def share_gradients(model, device):
    """The model, whose backward averages the gradients of all processes if there are several."""
    if not dist.is_initialized():
        return model
    ids = None if device == 'cpu' else [torch.device(device)]
    return DistributedDataParallel(model, ids, broadcast_buffers=False, gradient_as_bucket_view=True)

def mean_over_processes(numbers, device):
    """Plain numbers, or lists of them, averaged over all processes."""
    if not dist.is_initialized():
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).tolist()

def from_rank_0(value):
    """The plain value that rank 0 has."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]

def end_processes():
    """Leave the other processes. What still holds their group would abort Python's exit now and then."""
    if dist.is_initialized():
        gc.unfreeze()
        gc.collect()
        dist.destroy_process_group()

# ----------------------------------------------------------------------------
# what fits, and how long it takes

def out_of_memory(error):
    """Whether it says so, in whatever words the device has for it."""
    words = "MemoryError|out of memory|can't allocate|ALLOC_FAILED"
    return bool(re.search(words, f'{type(error).__name__}: {error}'))

@contextmanager
def plain_memory_errors(advice):
    """Turn running out of memory inside into a ValueError with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(f'out of memory ({str(error)[:200]}): {advice}') from None

def fit(start, make_update, sequences, config, n_micro, run_seconds, rounds=3):
    """Try updates, and a batch of an evaluation, on throwaway models: start() -> (model, optimizer),
    make_update as in model.py, sequences(n) -> x, y. In a single process the micro-batches are halved where
    memory runs out. With compile=auto compiled updates, which take a minute to start, are tried as well if
    they can save more than that in a run of run_seconds(seconds of an update).
    -> what fits (batch_size, n_micro), compile and why it is off (not_compiled), seconds of each update
    (all_seconds), the least of them (seconds), and seconds_per_evaluated_token."""
    device, wish = config['device'], config['compile']

    def try_sizes(batch_size, n_micro, compiled):
        while True:
            reset_peak_memory(device)
            found = None
            try:
                found = try_updates(
                    start, make_update, sequences, batch_size, n_micro, device, compiled, rounds)
            except (RuntimeError, MemoryError) as error:
                if batch_size == 1 or dist.is_initialized() or not out_of_memory(error):
                    raise
            gc.collect()  # frees the model, parts of which live in cycles
            if kind(device) != 'cpu':
                torch.accelerator.empty_cache()
            if found:
                return found
            smaller = batch_size // 2 if batch_size % 2 == 0 else 1
            n_micro, batch_size = n_micro * batch_size // smaller, smaller
            print(f'out of memory: {n_micro} micro-batches of {batch_size} sequences make the same update')

    why_not = compile_problem(device) if wish == 'true' else ''
    trial = try_sizes(config['batch_size'], n_micro, compiled=wish == 'true' and not why_not)
    if wish == 'auto':
        hoped = 0.05 if kind(device) == 'cpu' else 0.25  # share of the time that compiling saves
        why_not = 'that would take longer than it saves'
        if hoped * run_seconds(trial.seconds) > COMPILE_SECONDS:
            why_not = compile_problem(device)
            compiled = try_sizes(trial.batch_size, trial.n_micro, compiled=True) if not why_not else trial
            if not why_not and compiled.seconds > 0.97 * trial.seconds:
                why_not = f'compiled updates take {compiled.seconds / trial.seconds:.0%} of the time'
            trial = trial if why_not else compiled
    trial.not_compiled = why_not
    return trial

def try_updates(start, make_update, sequences, batch_size, n_micro, device, compiled, rounds):
    model, optimizer = start()
    tried = min(n_micro, 2)  # more micro-batches take no more memory
    update = make_update(torch.compile(model) if compiled else model, optimizer, tried)
    x, y = sequences(tried * batch_size)
    warm_up, together = (1, 1) if kind(device) == 'cpu' else (4, 4)  # a GPU runs several without a wait
    all_seconds, began = [], time.perf_counter()
    for number in range(rounds):
        if number > 1 and time.perf_counter() - began > TRIAL_SECONDS:
            break
        begin, updates = time.perf_counter(), together if number > 0 else warm_up
        for _ in range(updates):
            update(x, y)
        synchronize(device)
        all_seconds.append((time.perf_counter() - begin) * n_micro / tried / updates)
    all_seconds = all_seconds[1:] or all_seconds  # the first round warms up
    x, y = sequences(max(batch_size, EVALUATION_TOKENS // x.size(1)))
    model.eval()
    begin = time.perf_counter()
    with torch.no_grad():
        model(x, y, return_logits=False)
    synchronize(device)
    evaluated_token = (time.perf_counter() - begin) / x.numel()
    least, evaluated_token = mean_over_processes([min(all_seconds, default=0.0), evaluated_token], device)
    return SimpleNamespace(
        batch_size=batch_size, n_micro=n_micro, compile='true' if compiled else 'false',
        all_seconds=all_seconds, seconds=least, seconds_per_evaluated_token=evaluated_token)

def set_accumulation(config, world_size):
    """Set config's tokens_per_update, if it is 0 -> the number of micro-batches in an update. ValueError if
    they do not divide it."""
    micro_tokens = config['batch_size'] * config['block_size'] * world_size
    wanted = config['tokens_per_update'] or micro_tokens
    if wanted % micro_tokens:
        near = max(1, wanted // micro_tokens) * micro_tokens
        raise ValueError(f'tokens_per_update {wanted:,} is not a multiple of {micro_tokens:,} (batch_size '
                         f'{config["batch_size"]} x block_size {config["block_size"]} x processes '
                         f'{world_size}): choose {near:,} or {near + micro_tokens:,}')
    config['tokens_per_update'] = wanted
    return wanted // micro_tokens

def check_memory(device, n_params):
    """ValueError where weights, gradients and Muon's momentum alone (AdamW takes a third more) do not fit."""
    least, there = 12 * n_params / 2**30, describe(device)['memory_gib']
    if 0 < there < least:
        raise ValueError(f'weights, gradients and optimizer take at least {least:,.1f} GiB, {device} has '
                         f'{there}: choose a smaller model')

def plan(config, n_tokens, vocab_size):
    """The settings of a run of config's minutes on a text of n_tokens. Measured for half a minute to ten
    minutes on two cores: best are about as many parameters as tokens that are read, 6 operations each, and
    no dropout. (20 tokens a parameter, https://arxiv.org/abs/2203.15556, are for endless text.)"""
    operations = 0.3 * measure_flops(config['device'], config['dtype']) * 60 * config['minutes']
    n_params = min((operations / 6) ** 0.5, READINGS * n_tokens)
    n_layer = 2
    while 12 * n_layer * (64 * n_layer) ** 2 + vocab_size * 64 * n_layer < n_params:
        n_layer += 2
    # 11 n_layer n_embd^2 + vocab_size n_embd = n_params
    n_embd = ((vocab_size**2 + 44 * n_layer * n_params) ** 0.5 - vocab_size) / (22 * n_layer)
    n_head = max(2, round(n_embd / 64))
    return dict(
        n_layer=n_layer, n_head=n_head, n_kv_head=1 if n_head % 2 else n_head // 2, n_embd=64 * n_head,
        block_size=64 if n_params < 4e5 else 128 if n_params < 1.2e6 else 256 if n_params < 2e7 else 1024,
        batch_size=max(8, round(n_params / 4e5)), lr_schedule='linear', warmup_iters=10, eval_iters=25)

def plan_length(seconds, trial, config, n_train, n_val):
    """max_iters and eval_interval for the seconds that are left, in at most READINGS passes over the text."""
    evaluations = max(1, min(4, int(config['minutes'])))
    rows = max(trial.batch_size, EVALUATION_TOKENS // config['block_size'])
    tokens = min(n_val, (config['eval_iters'] or n_val) * rows * config['block_size'])  # in an evaluation
    left = seconds - evaluations * tokens * trial.seconds_per_evaluated_token - 1
    affordable = int(left / (1.07 * trial.seconds))  # what the loop adds to a trial
    max_iters = max(1, min(affordable, READINGS * n_train // config['tokens_per_update']))
    return dict(max_iters=max_iters, eval_interval=math.ceil(max_iters / evaluations))

if __name__ == '__main__':
    from configurator import ask, configure, set_up_output
    set_up_output()
    globals().update(configure(__file__)[0])
    if interactive:
        device = ask('device', pick_device(), pick_device)
        dtype = ask('dtype', pick_dtype(device), lambda wish: pick_dtype(device, wish))
        print(f'--device={device} --dtype={dtype}')
    elif recommended:
        print(pick_device())
    elif json:
        print(dumps(report(), indent=2))
    else:
        print(table())
