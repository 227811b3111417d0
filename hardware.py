"""
What this machine has, and what to use: device, dtype, autocast, compile, memory, speed.

    python hardware.py                  a table, and what train.py would pick; --recommended: only the device's name
    python hardware.py --check          a tiny training step on each device and dtype, compared with float32 on the CPU
    python hardware.py --interactive    asks, and prints the flags to use
    python hardware.py --json           {python, torch, cores, device, dtype, problem, table [{backend, device, name,
        memory_gib, free_gib, capability, dtypes, peak_tflops}, or {backend, device '', reason} where there is none]}
"""
import ctypes, io, logging, os, platform, re, sys, timeit
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import partial
from json import dumps

import torch

json = False         # print the table as JSON
recommended = False  # print the device that train.py would pick, and nothing else
interactive = False  # choose a device and a dtype
check = False        # try a training step on each device and dtype

# Vendors' dense TFLOP/s in bfloat16 and float16, by torch's exact name (less 'NVIDIA ') for a card, or half an MI250X.
PEAKS = {'H100 80GB HBM3': 989, 'H100 PCIe': 756, 'H200': 989, 'A100-SXM4-40GB': 312, 'A100-SXM4-80GB': 312,
         'A100-PCIE-40GB': 312, 'A100 80GB PCIe': 312, 'L40S': 362, 'L4': 121, 'A10': 125, 'GeForce RTX 4090': 165,
         'GeForce RTX 3090': 71, 'Tesla T4': 65, 'Tesla V100-SXM2-16GB': 125, 'Tesla V100-SXM2-32GB': 125,
         'AMD Instinct MI300X': 1307, 'AMD Instinct MI250X': 383 / 2}

def kind(device):
    return torch.device(device).type
def autocast(device, dtype):
    return nullcontext() if dtype == 'float32' else torch.autocast(kind(device), getattr(torch, dtype))

def proc(path, field):
    """What Linux says of a field in a file under /proc, sizes in bytes; '' elsewhere."""
    with suppress(OSError), open(path, encoding='utf-8') as file:
        value = (re.findall(rf'^(?:{field})\s*: *(.*)$', file.read(), re.MULTILINE) or [''])[0]
        return 1024 * int(value[:-3]) if value.endswith(' kB') else value
    return ''

def call(device, gpu, mps, linux=''):
    """What the module of the device says when its function of that name is called; for a CPU, what Linux says, or 0."""
    if kind(device) == 'cpu':
        return linux and proc('/proc/self/status', linux) or 0
    api = torch.get_device_module(device)
    return getattr(api, mps)() if kind(device) == 'mps' else getattr(api, gpu)(device)

synchronize = partial(call, gpu='synchronize', mps='synchronize')
peak_memory = partial(call, gpu='max_memory_allocated', mps='driver_allocated_memory', linux='VmHWM')

def reset_peak_memory(device):
    call(device, gpu='reset_peak_memory_stats', mps='empty_cache')
    with suppress(OSError), open('/proc/self/clear_refs', 'w') as file:  # only Linux has it
        file.write('5')

def backends():
    """[(CUDA, ROCm, XPU, MPS or CPU; a device, or ''; why there is none)], in the order in which auto looks."""
    rows, has, mps = [], torch.version, torch.backends.mps
    for name, word, built, api in [('CUDA', 'cuda', has.cuda, torch.cuda), ('ROCm', 'cuda', has.hip, torch.cuda),
                                   ('XPU', 'xpu', has.xpu, torch.xpu), ('MPS', 'mps', mps.is_built(), mps)]:
        cards = range(1 if word == 'mps' else api.device_count()) if built and api.is_available() else []
        if cards and name == 'CUDA':  # less those older than every one that this PyTorch was built for
            oldest = min([int(re.sub(r'\D', '', arch)) for arch in api.get_arch_list()], default=0)
            cards = [i for i in cards if int('%d%d' % api.get_device_capability(i)) >= oldest]
        reason = 'no card for it, or no driver' if built else f'this PyTorch is built without {name}'
        rows += [(name, word if word == 'mps' else f'{word}:{i}', '') for i in cards] or [(name, '', reason)]
    return [*rows, ('CPU', 'cpu', '')]

def pick_device(wish='auto'):
    """The torch device for auto, cuda, cuda:1, rocm, xpu, mps or cpu; ValueError naming what is there if it isn't."""
    found, name = backends(), wish.replace('rocm', 'cuda') if torch.version.hip else wish
    there = [device for _, device, _ in found if device]
    fits = [device for device in there if name in ('auto', kind(device))]
    if not fits and name not in there:
        why = ''.join(f'{reason}; ' for backend, _, reason in found if backend.lower() == wish)
        raise ValueError(f'device {wish}: {why}there is {", ".join(there)}')
    return fits[0].removesuffix(':0') if fits else name

def dtypes(device):
    """Which of float32, TF32, float16, bfloat16 the hardware computes in; what is only emulated does not count."""
    tf32, half, bfloat = False, kind(device) != 'cpu', kind(device) == 'mps'
    if kind(device) == 'cpu':
        bfloat = bool(re.search(r'\b(avx512_bf16|amx_bf16|bf16)\b', proc('/proc/cpuinfo', 'flags|Features')))
    elif kind(device) == 'xpu':
        bfloat = torch.xpu.get_device_properties(device).has_bfloat16_conversions
    elif kind(device) == 'cuda' and torch.version.hip:  # bfloat16 units: MI100, MI200, MI300, RDNA3 and later
        bfloat = bool(re.match('gfx(908|90a|94|95|11|12)', torch.cuda.get_device_properties(device).gcnArchName))
    elif kind(device) == 'cuda':  # not torch.cuda.is_bf16_supported(): it counts emulation
        capability = torch.cuda.get_device_capability(device)
        tf32, half, bfloat = capability >= (8, 0), capability >= (5, 3), capability >= (8, 0)
    return ['float32', *['TF32'] * tf32, *['float16'] * half, *['bfloat16'] * bfloat]

def pick_dtype(device, wish='auto'):
    """bfloat16, float16 (which needs a GradScaler) or float32; ValueError if the device doesn't compute in the wish."""
    there = [dtype for dtype in dtypes(device) if dtype != 'TF32']
    if wish == 'auto':  # Apple's GPUs are about as fast in float32, and nothing overflows
        tensor_cores = kind(device) == 'cuda' and torch.cuda.get_device_capability(device) >= (7, 0)
        wish = 'bfloat16' if 'bfloat16' in there and kind(device) != 'mps' else 'float16' if tensor_cores else 'float32'
    if wish not in there:
        raise ValueError(f'dtype {wish}: {device_name(device)} computes in {", ".join(there)}')
    return wish

def set_up(device, threads=0):
    """TF32 for float32 products on a GPU; on the CPU the number of threads (0: torch's own) and malloc's habits."""
    torch.set_num_threads(threads or torch.get_num_threads())
    # On a CPU 'medium' hands float32 products to oneDNN: with AVX-512 as exact as MKL's and, on AMD, twice as fast. With AMX
    flags = proc('/proc/cpuinfo', 'flags')  # they would be rounded to bfloat16.
    right = 'medium' if 'avx512bw' in flags and 'amx' not in flags else 'highest'
    torch.set_float32_matmul_precision(right if kind(device) == 'cpu' else 'high')
    with suppress(OSError, AttributeError):  # glibc's: keeping freed tensors saves faulting their pages in again,
        mallopt = ctypes.CDLL('libc.so.6').mallopt  # 6 % of the CPU time of a step at 1.6M parameters
        mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; an older glibc allows 32 MiB
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD

def train_step(device, dtype, wrap=lambda function: function):
    """One step of a tiny network -> its gradient, on the CPU. Nothing is random, so that no run's numbers change."""
    x = torch.arange(4096.).sin().view(64, 64).to(device)
    weight = (x / 8).requires_grad_()
    with autocast(device, dtype):
        y = wrap(lambda x: torch.nn.functional.gelu(x @ weight))(x)
    y.float().square().sum().backward()
    torch.optim.AdamW([weight], fused=True).step()
    return weight.grad.cpu()

def compile_problem(device):
    """'' when one tiny compiled training step works in this process, else why not, in one line. Prints nothing."""
    problem = 'off on MPS' if kind(device) == 'mps' else ''
    logging.disable()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            problem or train_step(device, 'float32', torch.compile)
        except Exception as error:  # it can be anything: no compiler, no Triton, an old card, a new Python
            problem = f'{type(error).__name__}: {error}'.partition('Set TORCHDYNAMO')[0]
    logging.disable(logging.NOTSET)
    return ' '.join(problem.split())[:150]

def device_name(device):
    if kind(device) in ('cuda', 'xpu'):
        return torch.get_device_module(device).get_device_name(device)
    name = proc('/proc/cpuinfo', 'model name') or platform.processor() or platform.machine()
    return 'Apple GPU' if kind(device) == 'mps' else f'{name}, {torch.get_num_threads()} threads'

def peak_flops(device, dtype):
    """(FLOP/s, 'vendor') from the table, or (0.0, 'unknown'), as it is for float32."""
    peak = 1e12 * PEAKS.get(device_name(device).removeprefix('NVIDIA '), 0)
    return (peak, 'vendor') if peak and dtype != 'float32' and dtype in dtypes(device) else (0.0, 'unknown')

def fastest(device, work):
    return min(timeit.repeat(lambda: (work(), synchronize(device)), number=1, repeat=12))  # seconds

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
    free, total = (torch.get_device_module(device).mem_get_info(device) if kind(device) in ('cuda', 'xpu') else
                   [proc('/proc/meminfo', field) or 0 for field in ('MemAvailable', 'MemTotal')])
    return {'name': device_name(device), 'memory_gib': round(total / 2 ** 30, 1), 'free_gib': round(free / 2 ** 30, 1),
            'capability': '%d.%d' % torch.cuda.get_device_capability(device) if kind(device) == 'cuda' else '',
            'dtypes': ' '.join(dtypes(device)), 'peak_tflops': peak_flops(device, 'float16')[0] / 1e12 or 'unknown'}

def report():
    rows = [{'backend': name, 'device': device, **(describe(device) if device else {'reason': reason})}
            for name, device, reason in backends()]
    old = tuple(map(int, re.findall(r'\d+', torch.__version__)[:2])) < (2, 9)
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'cores': os.cpu_count(),
            'problem': 'too old: PyTorch 2.9 on Python 3.10 is needed' if old else '',
            'device': pick_device(), 'dtype': pick_dtype(pick_device()), 'table': rows}

def table():
    """The report for people, coloured on a terminal."""
    facts, lines = report(), []
    for row in [{column: column for column in facts['table'][-1]}, *facts['table']]:
        line = ''.join(str(value).ljust(width) for value, width in zip(row.values(), (9, 8, 32, 12, 10, 12, 34, 0)))
        lines.append(f'\033[{31 if "reason" in row else 32}m{line}\033[0m' if sys.stdout.isatty() else line.rstrip())
    return '\n'.join([*lines, '', 'Python {python}, PyTorch {torch}, {cores} cores {problem}'.format(**facts),
                      'train.py would pick {device}, the first there, and {dtype}, the shortest it is fast in'.format(**facts)])

if __name__ == '__main__':
    from configurator import ask, configure
    globals().update(configure(__file__))
    if interactive:
        device = ask('device', pick_device(), pick_device)
        print(f'--device={device} --dtype={ask("dtype", pick_dtype(device), lambda wish: pick_dtype(device, wish))}')
    elif check:
        right = train_step('cpu', 'float32')
        for device, dtype in [(d, t) for _, d, _ in backends() if d for t in dtypes(d) if t != 'TF32']:
            off = float((train_step(device, dtype) - right).norm() / right.norm())
            seconds = fastest(device, lambda: train_step(device, dtype))
            print(f'{device:8}{dtype:10}{1000 * seconds:6.1f} ms, {off:.2%} off', flush=True)
            if not off <= 0.02:  # bfloat16 rounds by up to 0.4 %, several times
                sys.exit(f'{device} computes {dtype} wrong')
    else:
        print(pick_device() if recommended else dumps(report(), indent=2) if json else table())
