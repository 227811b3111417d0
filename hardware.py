"""What this machine has, and what to use: device, dtype, autocast, compile, threads, memory, speed.

    python hardware.py                  a table, and what train.py would use; --recommended: only the device
    python hardware.py --interactive    asks, and prints the flags to use
    python hardware.py --json           {python, torch, cores, problem, device, dtype, no_gpu, table}
"""
import ctypes
import os
import platform
import re
import sys
import textwrap
import time
import timeit
from contextlib import nullcontext, suppress
from json import dumps

import torch

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

def version_problem():
    """'' or, in one line, that Python or PyTorch is too old."""
    if sys.version_info >= (3, 10) and torch.__version__ >= (2, 9):
        return ''
    here = f'Python {platform.python_version()}, PyTorch {torch.__version__}'
    return f'{here}: Python 3.10 and PyTorch 2.9 or later are needed'

def kind(device):
    return torch.device(device).type

def autocast(device, dtype):
    return nullcontext() if dtype == 'float32' else torch.autocast(kind(device), getattr(torch, dtype))

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

def devices():
    """(what PyTorch can use here, the best first and the CPU last; why there is no GPU, or '')"""
    gpu = torch.accelerator.current_accelerator()  # what this PyTorch is built for; cuda stands for ROCm, too
    if gpu is None:
        return ['cpu'], 'this PyTorch is built for the CPU alone'
    if not torch.accelerator.is_available():
        return ['cpu'], f'no {gpu.type} device that PyTorch can use, or its driver is missing or too old'
    if gpu.type == 'mps' and torch.__version__ < (2, 13):
        # In half precision causal attention sees up to three future tokens (pytorch/pytorch#195910), and
        # before 2.11 that of short queries reads out of bounds (pytorch/pytorch#174861).
        return ['cpu'], 'mps needs PyTorch 2.13 or later: attention has faults in earlier releases'
    names = [f'{gpu.type}:{i}' for i in range(torch.accelerator.device_count())]
    if torch.version.cuda:  # not the cards that are older than all that this PyTorch is built for
        oldest = min((int(re.sub(r'\D', '', arch)) for arch in torch.cuda.get_arch_list()), default=0)
        names = [name for name in names if int('%d%d' % torch.cuda.get_device_capability(name)) >= oldest]
    return [*names, 'cpu'], '' if names else 'this PyTorch is built for newer cards'

def pick_device(wish='auto'):
    """The torch device for auto, cuda, cuda:1, xpu, mps or cpu; ValueError if it isn't there."""
    there, no_gpu = devices()
    fits = [device for device in there if wish in ('auto', device, kind(device))]
    if not fits:
        flags = ' or '.join(f'--device={device}' for device in there)
        raise ValueError(f'device {wish}: {no_gpu or "not here"}; use {flags}')
    return fits[0].removesuffix(':0')

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
    """TF32 for float32 products on a GPU; on the CPU the number of threads (0: torch's own) and malloc."""
    if ':' in device:
        torch.get_device_module(device).set_device(device)
    torch.set_num_threads(threads or torch.get_num_threads())
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

def pick_threads():
    """The number of CPU threads, all, half or one, that is fastest now: tried for under a second, then set.
    Where another program has a core, threads that wait for each other can be far slower than one."""
    most = torch.get_num_threads()
    if most == 1:
        return 1
    x = torch.randn(256, 256)  # small, as the products of a small model are
    products = {most: 0, (most + 1) // 2: 0, 1: 0}  # how many in three tenths of a second
    for threads in 3 * list(products):
        torch.set_num_threads(threads)
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            x @ x
            products[threads] += 1
    best = max(products, key=products.get)
    torch.set_num_threads(best)
    return best

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
    free, total = proc('/proc/meminfo', 'MemAvailable') or 0, proc('/proc/meminfo', 'MemTotal') or 0
    if kind(device) in ('cuda', 'xpu'):
        free, total = torch.get_device_module(device).mem_get_info(device)
    return {'device': device, 'name': device_name(device), 'dtypes': ' '.join(dtypes(device)),
            'memory_gib': round(total / 2 ** 30, 1), 'free_gib': round(free / 2 ** 30, 1)}

def report():
    there, no_gpu = devices()
    device = pick_device()
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'cores': os.cpu_count(),
            'problem': version_problem(), 'device': device, 'dtype': pick_dtype(device), 'no_gpu': no_gpu,
            'table': [describe(device) for device in there]}

def table():
    """The report for people, at most 100 columns wide."""
    facts = report()
    lines = ['device  free memory    computes in              name', '-' * 100]
    for row in facts['table']:
        memory = f'{row["free_gib"]:.0f} of {row["memory_gib"]:.0f} GiB' if row['memory_gib'] else 'unknown'
        lines.append(f'{row["device"]:8}{memory:15}{row["dtypes"]:25}{row["name"]}'[:100])
    if facts['no_gpu']:
        lines.append(f'no GPU: {facts["no_gpu"]}')
    advice = f'train.py would use {facts["device"]} (the first available) in {facts["dtype"]}'
    versions = f'Python {facts["python"]}, PyTorch {facts["torch"]}, {facts["cores"]} CPU cores'
    return '\n'.join([*lines, '', versions, facts['problem'] or advice])

if __name__ == '__main__':
    from configurator import ask, configure, set_up_output
    set_up_output()
    globals().update(configure(__file__))
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
