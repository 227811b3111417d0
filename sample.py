"""Text from a trained model.

    python sample.py --start="ROMEO:"
    python sample.py --start=FILE:prompt.txt --num_samples=4 --temperature=0.7 --top_p=0.9
    python sample.py --interactive              # type, read, go on
"""

import codecs
import os
import signal
import sys
import time
from contextlib import suppress

import torch

import hardware
from configurator import checked, configure, parse, plain_errors
from model import KVCache, load_checkpoint, load_model
from prepare import Tokenizer, printable, read_text

# ----------------------------------------------------------------------------
# settings
out_dir = 'out'  # folder with best.pt, or ckpt.pt; or the path of a checkpoint
start = ''  # text to go on from, or FILE:path; empty: a document's beginning
num_samples = 1  # texts, drawn in one batch
max_new_tokens = 500  # tokens in each
temperature = 0.8  # 0: always the likeliest token; below 1: safer, above: wilder
top_k = 200  # draw from so many likeliest tokens; 0: all
top_p = 1.0  # draw from the fewest tokens that have this probability together; 1: all
stop = ''  # end a text where this stands in it
seed = 0  # of the draws; 0: other text each time
interactive = False  # type, read, go on; the model is loaded once
device = 'auto'  # auto, cpu, cuda, cuda:1, mps, xpu
dtype = 'auto'  # of weights and arithmetic: auto, float32, bfloat16, float16
threads = 0  # CPU threads; 0: torch's choice
# ----------------------------------------------------------------------------
config = configure(__file__)
globals().update(config)
ranges = dict(num_samples=(1, 2**16), max_new_tokens=(1, 2**40), temperature=(0, 100), top_k=(0, 2**40),
              top_p=(1e-9, 1), seed=(0, 2**62), threads=(0, 1024))
note = lambda text: print(text, file=sys.stderr, flush=True)  # stdout is the text alone
sys.stdout.reconfigure(errors='backslashreplace')
with suppress(AttributeError):  # Windows has none
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly


def check(name, value):
    low, high = ranges[name]
    if not low <= value <= high:
        raise ValueError(f'{name} is {value}: it must be from {low} to {high:g}')


with plain_errors():
    for name in ranges:
        check(name, config[name])
    device = hardware.pick_device(device)
    dtype = hardware.pick_dtype(device, dtype)
    paths = [out_dir] * os.path.isfile(out_dir) + [os.path.join(out_dir, name) for name in ('best.pt', 'ckpt.pt')]
    path = next(filter(os.path.exists, paths), paths[0])
    if ':' in device:  # CUDA graphs are captured on the current device
        torch.get_device_module(device).set_device(device)
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint).to(device, getattr(torch, dtype)).eval()
    coder = Tokenizer(checkpoint['tokenizer'])
    if coder.vocab_size != model.config.vocab_size:
        raise ValueError(f"{path}: the tokenizer has {coder.vocab_size} ids, the model {model.config.vocab_size}")
hardware.set_up(device, threads)
if device == 'cpu':
    model.lay_out_for_decoding()
block_size = model.config.block_size
about = (f'{path}: update {checkpoint["iter_num"]}, validation loss {checkpoint["val_loss"]:.4f}, '
         f'{model.n_params() / 1e6:.2f}M parameters; {device}, {dtype}')
drawing = {name: config[name] for name in ('max_new_tokens', 'temperature', 'top_k', 'top_p')}
generator = torch.Generator(device)
generator.manual_seed(seed) if seed else generator.seed()


def beginning():
    """What stands before a document: the end of another one, or a line break, or where there is none any character."""
    return [coder.end_of_text if coder.end_of_text is not None else coder.ids.get('\n', 0)]


def draw(ids, **options):
    """New tokens after ids, a list of num_samples ids at a time."""
    options |= dict(drawing, generator=generator, stop_token=coder.end_of_text)
    for new in model.stream(torch.tensor([ids]), **options):
        yield new.tolist()


def write(tokens):
    """Print ids as they come: no character cut in two, nothing a terminal would obey, ended before the stop string."""
    decode, held = codecs.getincrementaldecoder('utf-8')('replace').decode, ''
    for id in tokens:
        if id == coder.end_of_text:
            break
        held += decode(coder.token_bytes(id))
        if stop and stop in held:
            held = held[: held.index(stop)]
            break
        ready = max(0, len(held) - max(0, len(stop) - 1))  # the rest may be the beginning of the stop string
        print(printable(held[:ready]), end='', flush=True)
        held = held[ready:]
    print(printable(held + decode(b'', True)), flush=True)


def talk():
    """A prompt, the text that follows, and again; the context stays, up to the window."""
    with suppress(ImportError):
        import readline  # history and editing in input(), where there is one
    note(f'{about}\nIt completes documents, it is not an assistant: type how one begins. \\n: line break, empty: go on, /help')
    cache, unread = None, []  # ids that the cache has not read yet
    while True:
        try:
            word, _, value = (typed := input('\n> ')).partition(' ')
        except (EOFError, KeyboardInterrupt):
            print()
            return
        name = {'/tokens': 'max_new_tokens'}.get(word, word[1:])
        try:
            if word in ('/temperature', '/top_k', '/top_p', '/tokens', '/seed'):
                check(name, number := checked(word, parse(value, config[name]), config[name]))
                if name != 'seed':
                    drawing[name] = number
                elif number:
                    generator.manual_seed(number)
            elif word == '/reset':
                cache = None
            elif word == '/info':
                print(f'{about}\n{drawing}; {cache.position if cache else 0:,} tokens read, the last {block_size} count')
            elif word == '/quit':
                return
            elif word.startswith('/'):
                print('/temperature 0.9  /top_k 50  /top_p 0.9  /tokens 300  /seed 7  /reset  /info  /quit  Ctrl-C')
            else:
                ids = coder.encode(typed.replace('\\n', '\n'))
                if cache is None:
                    cache, unread = KVCache(model.config, 1, device, model.embedding.weight.dtype), beginning()
                ids, unread, before = unread + ids, [], cache.position
                try:
                    write(unread.append(id) or id for (id,) in draw(ids, cache=cache))
                except KeyboardInterrupt:
                    print()
                unread = unread[-1:] or ids[cache.position - before :]  # the cache has read all but the last
        except ValueError as error:
            print(error)


if interactive:
    talk()
    sys.exit()
with plain_errors():
    if start.startswith('FILE:'):
        start = ''.join(read_text(start[5:]))
    prompt = coder.encode(start) or beginning()
note(about)
if len(prompt) > block_size:
    note(f'the prompt has {len(prompt):,} tokens: the model sees the last {block_size} at a time')
began, drawn = time.perf_counter(), []
rows = (drawn.append(ids) or ids for ids in draw(prompt, num_samples=num_samples))
try:
    for tokens in zip(*rows) if num_samples > 1 else [(id for (id,) in rows)]:
        print(printable(start), end='', flush=True)
        write(tokens)
        print('-' * 40 + '\n' if num_samples > 1 else '', end='')
except KeyboardInterrupt:
    sys.exit(130)
note(f'{len(drawn) * num_samples / (time.perf_counter() - began):,.0f} tokens/s')
