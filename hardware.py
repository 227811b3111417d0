"""What this machine has, and what to use: device, dtype, compile, threads, processes, memory, speed.

    python hardware.py                  a table, and what train.py would use; --json: the same as JSON
    python hardware.py --interactive    asks, and prints the flags to use
"""
import ctypes
import gc
import math
import os
import platform
import re
import time
import warnings
from contextlib import contextmanager, suppress
from json import dumps
from statistics import median
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

json = False         # print {python, torch, cores, device, dtype, no_gpu, table} as JSON
recommended = False  # print the device that train.py would use, and nothing else
interactive = False  # choose a device and a dtype

# Dense TFLOP/s in bfloat16 and float16 by the data sheets; names are torch's without 'NVIDIA '
PEAKS = {
    'H100 80GB HBM3': 989, 'H100 PCIe': 756, 'H200': 989, 'A100-SXM4-40GB': 312, 'A100-SXM4-80GB': 312,
    'A100 80GB PCIe': 312, 'L4': 121, 'GeForce RTX 4090': 165, 'GeForce RTX 3090': 71, 'Tesla T4': 65,
    'Tesla V100-SXM2-16GB': 125, 'AMD Instinct MI300X': 1307,
}
READINGS = 6  # most passes over the text in a planned run, which has no dropout
EVALUATION_TOKENS = 4096  # in a batch of an evaluation; more if a micro-batch is larger

def version_problem():
    """'' or, in one line, that PyTorch is too old. NVIDIA's 2.9.0a0 comes before 2.9, but after 2.9.dev0."""
    return '' if torch.__version__ >= '2.9.dev0' else f'PyTorch {torch.__version__}: 2.9 or later is needed'

def kind(device):
    return torch.device(device).type

def devices():
    """(what PyTorch can use here: the GPUs, then the CPU; why there is no GPU, or '')."""
    gpu = torch.accelerator.current_accelerator()  # the kind this PyTorch is built for; cuda means ROCm, too
    archs = re.findall(r'sm_(\d+)', ' '.join(torch.cuda.get_arch_list()))  # empty without an NVIDIA card
    if gpu is None:
        problem = 'this PyTorch is built for the CPU alone: pytorch.org/get-started has GPU builds'
    elif not torch.accelerator.is_available():
        problem = f'PyTorch finds no {gpu.type} device, or its driver is missing or too old'
    elif gpu.type == 'mps' and torch.__version__ < '2.13.dev0':  # pytorch/pytorch#195910
        problem = 'mps needs PyTorch 2.13 or later: attention has faults in earlier releases'
    elif archs and torch.cuda.get_device_capability() < divmod(min(map(int, archs)), 10):
        problem = f'the card is too old for this PyTorch, which is built for sm_{", sm_".join(archs)}'
    else:
        return [*(f'{gpu.type}:{i}' for i in range(torch.accelerator.device_count())), 'cpu'], ''
    return ['cpu'], problem

def pick_device(wish='auto'):
    """The torch device for auto, cuda, cuda:1, xpu, mps or cpu; ValueError if it isn't there."""
    there, problem = devices()
    for device in there:
        if wish in ('auto', device, kind(device)):
            return device.removesuffix(':0')
    flags = ' or '.join(f'--device={device}' for device in there)
    raise ValueError(f'there is no device {wish} here: use {flags}' + (f' ({problem})' if problem else ''))

def search(pattern, path):
    """What the pattern captures in one of Linux's files about the machine; '' without a match."""
    with suppress(OSError), open(path, encoding='utf-8') as file:
        found = re.search(pattern, file.read())
        return found[1] if found else ''
    return ''

def dtypes(device):
    """The dtypes that the hardware computes in, not those it emulates; the best comes first."""
    if kind(device) == 'cpu':
        bfloat = search(r'\b(avx512_bf16|amx_bf16|bf16)\b', '/proc/cpuinfo')
        return ['bfloat16', 'float32'] if bfloat else ['float32']
    if kind(device) == 'mps':
        return ['float32', 'bfloat16', 'float16']  # Apple's GPUs are about as fast in float32
    card = torch.get_device_module(device).get_device_properties(device)
    if kind(device) == 'xpu':
        bfloat = card.has_bfloat16_conversions
    elif torch.version.hip:  # MI100, MI200, MI300, RDNA3 and later
        bfloat = re.match('gfx(908|90a|94|95|11|12)', card.gcnArchName)
    else:  # not torch.cuda.is_bf16_supported(): it counts emulation
        bfloat = card.major >= 8
    if bfloat:
        return ['bfloat16', 'float16', 'float32']
    tensor_cores = kind(device) == 'cuda' and card.major >= 7
    return ['float16', 'float32'] if tensor_cores else ['float32', 'float16']

def pick_dtype(device, wish='auto'):
    """bfloat16, float16 (which needs a GradScaler) or float32; ValueError if the device lacks it."""
    there = dtypes(device)
    if wish not in ('auto', *there):
        raise ValueError(f'{device} ({device_name(device)}) computes in {", ".join(there)}, not in {wish}')
    return there[0] if wish == 'auto' else wish

def device_name(device):
    if kind(device) in ('cuda', 'xpu'):
        return torch.get_device_module(device).get_device_name(device)
    if kind(device) == 'mps':
        return 'Apple GPU'
    name = search(r'model name\s*: (.*)', '/proc/cpuinfo') or platform.processor() or platform.machine()
    return f'{name}, threads: {torch.get_num_threads()}'

def cores():
    """The number of CPU cores that this process may use, by its affinity and its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    quota, _, period = search(r'^(\d+ \d+)', '/sys/fs/cgroup/cpu.max').partition(' ')  # microseconds
    return min(count, math.ceil(int(quota) / int(period))) if quota else count

def memory(device):
    """The bytes of a device; for a CPU at most those of its container. 0: the system doesn't say."""
    if kind(device) in ('cuda', 'xpu'):
        return torch.get_device_module(device).get_device_properties(device).total_memory
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') if hasattr(os, 'sysconf') else 0
    return min(total, int(search(r'^(\d+)', '/sys/fs/cgroup/memory.max') or total))

def report():
    """What this machine has, in plain values; 0 GiB: the system doesn't say."""
    there, no_gpu = devices()
    rows = [{'device': name, 'gib': round(memory(name) / 2**30, 1), 'dtypes': ' '.join(dtypes(name)),
             'name': device_name(name)} for name in there]
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'cores': cores(),
            'device': pick_device(), 'dtype': pick_dtype(pick_device()), 'no_gpu': no_gpu, 'table': rows}

def table():
    """The report for people."""
    facts = report()
    lines = ['{device:8}{gib:6} GiB  {dtypes:26}{name}'.format_map(row) for row in facts['table']]
    if facts['no_gpu']:
        lines.append('no GPU: {no_gpu}'.format_map(facts))
    lines.append('Python {python}, PyTorch {torch}, {cores} CPU cores'.format_map(facts))
    lines.append(version_problem() or 'train.py would use {device} in {dtype}'.format_map(facts))
    return '\n'.join(lines)

def set_up(device, threads=0):
    """Avoid a slow import; set up float32 products, malloc and CPU threads (0: as many as are fastest now)
    -> their number."""
    if ':' in device:
        torch.get_device_module(device).set_device(device)
    for name in ('add_param_group', 'zero_grad', 'state_dict', 'load_state_dict'):
        # torch excludes these from torch.compile, and imports the compiler for that, which takes seconds
        method = getattr(torch.optim.Optimizer, name)
        setattr(torch.optim.Optimizer, name, getattr(method, '__wrapped__', method))
    torch.set_float32_matmul_precision('high')  # TF32
    if kind(device) == 'cpu':
        # 'medium' hands float32 products to oneDNN: with AVX-512 as exact as MKL's and, on AMD, twice as
        # fast; with AMX they would become bfloat16.
        flags = search(r'flags\s*: (.*)', '/proc/cpuinfo')
        onednn = 'avx512bw' in flags and 'amx' not in flags
        torch.set_float32_matmul_precision('medium' if onednn else 'highest')
    with suppress(OSError):  # no glibc here
        # Keeping freed tensors saves faulting their pages in again: 6 % of a step at 1.6M parameters.
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most that an older glibc allows,
        mallopt(-3, 1 << 30)  # and more for a newer one
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    count = min(threads or torch.get_num_threads(), cores())
    if kind(device) == 'cpu' and count > 1 and not threads and not dist.is_initialized():
        count = pick_threads(count)
    torch.set_num_threads(count)
    return count

def pick_threads(most):
    """Measure which number of CPU threads is fastest now: all, half or one. While another program uses a
    core, threads that wait for each other can be far slower than one."""
    x = torch.randn(256, 256)  # small, like the products of a small model
    products = {most: 0, (most + 1) // 2: 0, 1: 0}  # how many each number of threads makes
    for threads in 3 * list(products):
        torch.set_num_threads(threads)
        end = time.perf_counter() + 0.04
        while time.perf_counter() < end:
            x @ x
            products[threads] += 1
    return max(products, key=products.get)

def compile_problem(device):
    """'' if one tiny compiled training step works here, else why not, in one line."""
    if kind(device) == 'mps':
        return 'off on MPS'
    weight = torch.ones(64, 64, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: torch.nn.functional.gelu(x @ x))(weight).sum().backward()
        return ''
    except Exception as error:  # it can be anything: no compiler, no Triton, an old card, a new Python
        return ' '.join(f'{type(error).__name__}: {error}'.split())[:150]

def synchronize(device):
    if kind(device) != 'cpu':
        torch.accelerator.synchronize(device)

def timed(device, work, calls=1):
    """The seconds that a call of work takes."""
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - begin) / calls

def measure_flops(device, dtype):
    """FLOP/s of a large matrix product of random numbers."""
    n = {'cpu': 512, 'mps': 4096}.get(kind(device), 8192)
    x = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    return 2 * n**3 / min(timed(device, lambda: x @ x) for _ in range(12))

def measure_bandwidth(device):
    """Bytes/s of reading a tensor much larger than the caches."""
    x = torch.ones((64 if kind(device) == 'cpu' else 256) * 2**20, device=device)
    return x.nbytes / min(timed(device, x.sum) for _ in range(12))

def peak_flops(device, dtype):
    """(FLOP/s, their source): the vendor's figure; for float32 and unknown devices a measured one."""
    teraflops = PEAKS.get(device_name(device).removeprefix('NVIDIA '))
    if teraflops and dtype != 'float32':
        return 1e12 * teraflops, 'vendor'
    return measure_flops(device, dtype), 'measured: a large matrix product'

# ----------------------------------------------------------------------------
# several processes, as torchrun starts them

def start_processes(device):
    """Join the processes that torchrun started -> (rank, how many, the device of this one)."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world_size > 1:
        if device in ('cuda', 'xpu', 'mps'):
            device = pick_device(f'{device}:{os.environ["LOCAL_RANK"]}')
        dist.init_process_group({'cuda': 'nccl', 'xpu': 'xccl'}.get(kind(device), 'gloo'))
    return rank, world_size, device

def share_gradients(model):
    """The model; with several processes its backward averages their gradients."""
    if not dist.is_initialized():
        return model
    warnings.simplefilter('ignore', FutureWarning)  # torch 2.13 has another name for broadcast_buffers
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

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
    """Leave the process group. Objects that still hold it would sometimes abort Python's exit."""
    if dist.is_initialized():
        gc.unfreeze()
        gc.collect()
        dist.destroy_process_group()

# ----------------------------------------------------------------------------
# what fits, and how long it takes

def peak_memory(device):
    """The most bytes in use: of a GPU since the last trial began, else of the process; 0: unknown."""
    if kind(device) == 'cpu':
        return 1024 * int(search(r'VmHWM:\s*(\d+)', '/proc/self/status') or 0)
    return torch.accelerator.max_memory_allocated(device)

def out_of_memory(error):
    """Whether the error says so, in whatever words the device has for it."""
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

def check_memory(device, n_params):
    """ValueError if weights, gradients and Muon's momentum alone (AdamW takes a third more) do not fit."""
    need, total = 12 * n_params / 2**30, memory(device) / 2**30
    if 0 < total < need:
        raise ValueError(f'this takes over {need:,.1f} GiB, {device} has {total:.1f}: use a smaller model')

def set_accumulation(config, world_size):
    """Set config's tokens_per_update if it is 0 -> the number of micro-batches in an update."""
    micro_tokens = config['batch_size'] * config['block_size'] * world_size
    n_micro, rest = divmod(config['tokens_per_update'] or micro_tokens, micro_tokens)
    if rest:
        near = max(1, n_micro) * micro_tokens
        raise ValueError(f'tokens_per_update {config["tokens_per_update"]:,} is not a multiple of batch_size '
                         f'x block_size x processes: choose {near:,} or {near + micro_tokens:,}')
    config['tokens_per_update'] = n_micro * micro_tokens
    return n_micro

def fit(start, make_update, sequences, config, n_micro, run_seconds, rounds, most_seconds=20):
    """Try updates, and a batch of an evaluation, on throwaway models: start() -> (model, optimizer),
    make_update as in model.py, sequences(n) -> x, y. A single process halves micro-batches until they fit.
    compile=auto also tries compiled updates, if run_seconds(seconds of an update) is long enough. A trial
    takes `rounds` updates (on a GPU: rounds of four), or fewer if they take over most_seconds. -> the
    batch_size and n_micro that fit, compile and why it is off (not_compiled), whether an update can be a CUDA
    graph, seconds of each update (all_seconds), their median (seconds), seconds_per_evaluated_token."""
    device, wish = config['device'], config['compile']
    # float16's scaler, checkpointing and DDP run Python code in each update
    needs_python = config['dtype'] == 'float16' or config['gradient_checkpointing'] or dist.is_initialized()

    def attempt(batch_size, n_micro, compiled):
        if kind(device) != 'cpu':
            torch.accelerator.reset_peak_memory_stats(device)
        try:
            graph = not needs_python and n_micro <= 8  # a long graph takes memory and saves little
            return try_updates(start, make_update, sequences, batch_size, n_micro, device, compiled, graph,
                               rounds, most_seconds)
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or dist.is_initialized() or not out_of_memory(error):
                raise
        finally:
            gc.collect()  # frees the model, parts of which live in cycles
            if kind(device) != 'cpu':
                torch.accelerator.empty_cache()
        smaller = batch_size // 2 if batch_size % 2 == 0 else 1
        n_micro = n_micro * batch_size // smaller
        print(f'out of memory: {n_micro} micro-batches of {smaller} sequences make the same update')
        return attempt(smaller, n_micro, compiled)

    problem = compile_problem(device) if wish == 'true' else ''
    trial = attempt(config['batch_size'], n_micro, compiled=wish == 'true' and not problem)
    if wish == 'auto':
        saves = run_seconds(trial.seconds) * (0.05 if kind(device) == 'cpu' else 0.25)  # seconds, roughly
        problem = 'compiling takes about a minute and would save less'
        if saves > 60:
            problem = compile_problem(device)
            if mean_over_processes([bool(problem)], device)[0] > 0:
                problem = problem or 'it fails in another process'
        if not problem:
            compiled = attempt(trial.batch_size, trial.n_micro, compiled=True)
            if compiled.seconds <= 0.97 * trial.seconds:
                return compiled
            problem = f'compiled updates take {compiled.seconds / trial.seconds:.0%} of the time of others'
    trial.not_compiled = problem
    return trial

def try_updates(start, make_update, sequences, batch_size, n_micro, device, compiled, graph, rounds,
                most_seconds):
    model, optimizer = start()
    tried = min(n_micro, 2)  # more micro-batches take no more memory
    update = make_update(torch.compile(model) if compiled else model, optimizer, tried, graph=graph)
    x, y = sequences(tried * batch_size)
    calls = 1 if kind(device) == 'cpu' else 4  # in a round: a GPU runs several without a wait
    times = []
    while len(times) < rounds and (len(times) < 2 or calls * sum(times) < most_seconds):
        times.append(timed(device, lambda: update(x, y), calls))
    all_seconds = [seconds * n_micro / tried for seconds in times[1:]]  # the first round warms up
    x_val, y_val = sequences(max(batch_size, EVALUATION_TOKENS // x.size(1)))
    model.eval()
    with torch.no_grad():
        evaluation = min(timed(device, lambda: model(x_val, y_val, return_logits=False)) for _ in range(2))
    means = mean_over_processes([median(all_seconds or [0.0]), evaluation / x_val.numel()], device)
    return SimpleNamespace(
        batch_size=batch_size, n_micro=n_micro, compile='true' if compiled else 'false', not_compiled='',
        graph=graph, all_seconds=all_seconds, seconds=means[0], seconds_per_evaluated_token=means[1])

def plan(config, given, n_tokens, vocab_size):
    """The settings of a run of config's minutes on a text of n_tokens. About half as many parameters as
    tokens read, without dropout, had the lowest loss after half a minute to five minutes on one or two cores;
    at most as many, if the text is short. (20 tokens a parameter, https://arxiv.org/abs/2203.15556, are for
    far longer runs.)"""
    operations = 0.3 * measure_flops(config['device'], config['dtype']) * 60 * config['minutes']
    n_params = min((operations / 12)**0.5, READINGS * n_tokens)  # 6 operations a parameter and token
    n_layer = max(1, given.get('n_layer', 2))
    while 'n_layer' not in given and 12 * n_layer * (64 * n_layer)**2 + vocab_size * 64 * n_layer < n_params:
        n_layer += 1
    # 11 n_layer n_embd^2 + vocab_size n_embd = n_params
    n_embd = ((vocab_size**2 + 44 * n_layer * n_params)**0.5 - vocab_size) / (22 * n_layer)
    n_head = given.get('n_head', max(2, round(given.get('n_embd', n_embd) / 64)))
    n_kv_head = 1 if n_head % 2 else n_head // 2
    return dict(
        n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=64 * n_head,
        block_size=64 if n_params < 3e5 else 128 if n_params < 8e5 else 256 if n_params < 1.4e7 else 1024,
        batch_size=max(8, round(n_params / 3e5)), lr_schedule='linear', warmup_iters=10)

def plan_length(seconds, trial, config, given, n_train, n_val):
    """max_iters, eval_interval and eval_iters for the seconds that are left: at most READINGS passes over the
    text, and up to eight evaluations of 5 to 25 batches (or the given eval_iters) in 5 % of the time."""
    update_seconds = 1.07 * trial.seconds  # a margin: the loop adds a few percent
    most_updates = max(1, READINGS * n_train // config['tokens_per_update'])
    batch_tokens = max(trial.batch_size, EVALUATION_TOKENS // config['block_size']) * config['block_size']
    batch_seconds = batch_tokens * trial.seconds_per_evaluated_token
    affordable = 0.05 * min(seconds, most_updates * update_seconds) / batch_seconds  # batches, in all
    eval_iters = given.get('eval_iters', min(25, max(5, int(affordable / 8))))
    batches = min(eval_iters or n_val, math.ceil(n_val / batch_tokens))  # in an evaluation; 0 reads all
    evaluations = min(8, max(1, int(affordable / batches)))
    left = seconds - evaluations * batches * batch_seconds - 1  # a second for the end of the run
    max_iters = given.get('max_iters', min(most_updates, max(1, int(left / update_seconds))))
    return dict(max_iters=max_iters, eval_interval=math.ceil(max_iters / evaluations), eval_iters=eval_iters)

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
