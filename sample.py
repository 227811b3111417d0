"""What a trained model is used for: text from it, and the model itself for other programs.

    python sample.py --start="ROMEO:"
    python sample.py --start=FILE:prompt.txt --num_samples=4 --temperature=0.7 --top_p=0.9
    python sample.py --interactive              # type, read, continue
    python sample.py --export=my-gpt            # a Hugging Face folder, and in it model.gguf for llama.cpp
"""

import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C at any moment, also while torch is imported

import json
import math
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

import hardware
from configurator import check, checked, choose, configure, parse, plain_errors, set_up_output
from model import load_checkpoint, load_model, to_hf, to_hf_config
from prepare import END_OF_TEXT, PATTERN, Tokenizer, export_tokenizer, printable, read_text

# ----------------------------------------------------------------------------
# settings
out_dir = 'out'  # folder of a run (its best.pt, or else ckpt.pt), a checkpoint, or a Hugging Face folder
start = ''  # text to continue, or FILE:path; empty: the beginning of a document
num_samples = 1  # texts, drawn in one batch
max_new_tokens = 500  # tokens in each text
temperature = 0.8  # 0: always the likeliest token; below 1: safer, above: wilder
top_k = 200  # draw from this many likeliest tokens; 0: from all
top_p = 1.0  # draw from the fewest tokens that have this probability together; 1: from all
stop = ''  # end a text where this stands in it
seed = 0  # of the draws; 0: other text each time
interactive = False  # type, read, continue; the model is loaded once
export = ''  # write the model to this new folder, for other programs
device = 'auto'  # auto, cpu, cuda, cuda:1, mps, xpu
dtype = 'auto'  # of weights and arithmetic: auto, float32, bfloat16, float16; auto exports float32
threads = 0  # CPU threads; 0: as many as are fastest now
# ----------------------------------------------------------------------------
RANGES = dict(num_samples=(1, 2**16), max_new_tokens=(1, 2**40), temperature=(0, 100), top_k=(0, 2**40),
              top_p=(1e-9, 1), seed=(0, 2**62), threads=(0, 1024))

set_up_output()
if hasattr(signal, 'SIGPIPE'):  # Windows has none
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
config = configure(__file__)
globals().update(config)
with plain_errors():
    for name, (low, high) in RANGES.items():
        check(config, name, low, high)
    choose(config, 'dtype', ('auto', 'float32', 'bfloat16', 'float16'))
    if export:
        device, dtype = 'cpu', 'float32' if dtype == 'auto' else dtype
    else:
        device = hardware.pick_device(device)
        dtype = hardware.pick_dtype(device, dtype)
    if ':' in device:  # CUDA graphs are captured on the current device
        torch.get_device_module(device).set_device(device)
    runs = [os.path.join(out_dir, name) for name in ('best.pt', 'ckpt.pt')]
    path = next(filter(os.path.exists, runs), out_dir)
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint).to(device, getattr(torch, dtype)).eval()
    coder = Tokenizer(checkpoint['tokenizer'])
    # what stands before a document: the end of another one, or else a line break, or else any token
    beginning = [0]
    with suppress(ValueError):
        beginning = coder.encode('\n')
    if coder.end_of_text is not None:
        beginning = [coder.end_of_text]
    shown = text = start
    if start.startswith('FILE:'):
        shown, text = '', ''.join(read_text(start[5:]))
    prompt = coder.encode(text) or beginning
hardware.set_up(device, threads)
block_size = model.config.block_size
drawing = {name: config[name] for name in ('max_new_tokens', 'temperature', 'top_k', 'top_p')}
generator = torch.Generator(device).manual_seed(seed or time.time_ns())

def note(text):
    print(text, file=sys.stderr, flush=True)  # stdout is the text alone

# ----------------------------------------------------------------------------
# text

def draw(ids, drawn, num_samples=1):
    """New tokens after the last block_size ids, for all texts at a time; they are also appended to drawn."""
    options = dict(drawing, num_samples=num_samples, generator=generator, stop_token=coder.end_of_text)
    for new in model.stream(torch.tensor([ids[-block_size:]]), **options):
        drawn.append(new.tolist())
        yield drawn[-1]

def write(tokens):
    """Print ids as they come: whole characters, nothing that a terminal would obey, up to the stop string."""
    piece, held = coder.decoder(), ''
    for id in tokens:
        if id == coder.end_of_text:
            break
        held += piece(id)
        if stop and stop in held:
            break
        ready = max(0, len(held) + 1 - len(stop))  # the rest may be the beginning of the stop string
        print(printable(held[:ready]), end='', flush=True)
        held = held[ready:]
    held += piece(None)
    if stop:
        held = held.partition(stop)[0]
    print(printable(held), flush=True)

def talk():
    """A prompt, the text that follows, and again, all one text; /NAME NUMBER changes a setting of drawing."""
    with suppress(ImportError):
        import readline  # history and editing in input(), where there is one
    note('It completes documents, it is not an assistant: type how one begins. Empty: go on; /help')
    context = list(prompt)
    while True:
        typed = input('\n> ')
        command, _, value = typed.removeprefix('/').partition(' ')
        try:
            if not typed.startswith('/'):
                context += coder.encode(typed.replace('\\n', '\n'))
                drawn = []
                with suppress(KeyboardInterrupt):
                    write(row[0] for row in draw(context, drawn))
                context += [row[0] for row in drawn]
            elif command == 'quit':
                return
            elif command == 'reset':
                context = list(prompt)
            elif command in drawing:
                chosen = {command: checked(command, parse(value, drawing[command]), drawing[command])}
                check(chosen, command, *RANGES[command])
                drawing.update(chosen)
            else:
                print(*[f'/{name} {value}' for name, value in drawing.items()], sep='\n')
                print('/reset forgets the text so far; /quit or Ctrl-D ends; Ctrl-C stops a text\n'
                      'anything else is continued: \\n is a line break, an empty line goes on')
        except ValueError as error:
            print(error)

# ----------------------------------------------------------------------------
# export

# llama.cpp's names for how a tokenizer.json splits a text into words
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r'|\s+(?!\S)|\s+')
SPLITTERS = {('ByteLevel',): 'gpt-2', (PATTERN, 'ByteLevel'): 'gpt-2', ('Digits', 'ByteLevel'): 'smollm',
             (QWEN, 'ByteLevel'): 'qwen2'}

def spell(contents):
    """Turn a char tokenizer.json's contents into what llama.cpp knows: each character is made, by merges, of
    GPT-2's letters for its bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    ids = {letters.pre_tokenize_str(character)[0][0]: id for character, id in coder.ids.items()}
    merges = {f'{token[:i]} {token[i]}': None for token in ids for i in range(1, len(token))}
    # llama.cpp wants an end, or it would be token 11, and a merge: no word has both a and 0
    contents['model'].update(vocab=ids, merges=[*merges] or ['a 0'])
    contents['added_tokens'] = [{'content': END_OF_TEXT, 'id': len(ids), 'special': True}]
    contents['pre_tokenizer'] = {'type': 'ByteLevel'}

def write_gguf(path, weights, tokenizer):
    """The file that llama.cpp reads; none where it cannot have the tokenizer."""
    import gguf
    c, end, contents = model.config, coder.end_of_text, json.loads(tokenizer.to_str())
    family = 'qwen3' if c.qk_norm else 'llama'
    if coder.kind == 'char':
        spell(contents)
        end = contents['added_tokens'][0]['id']
    splitter = contents['pre_tokenizer'] or {}
    steps = splitter.get('pretokenizers', [splitter])
    split_by = SPLITTERS.get(tuple(step.get('pattern', {}).get('Regex', step.get('type')) for step in steps))
    if split_by is None:
        note("without model.gguf: llama.cpp's name for this kind of tokenizer is not known here")
        return
    table = weights['model.embed_tokens.weight']
    if end == len(table):  # a new token: as rare as the rarest
        every = torch.arange(end)[None, :block_size]
        rarest = model(every, every)[0].mean((0, 1)).argmin()
        table = torch.cat((table, table[rarest][None]))
    tokens = [f'[PAD{i}]' for i in range(len(table))]
    types = [gguf.TokenType.UNUSED] * len(table)
    for token, id in contents['model']['vocab'].items():
        tokens[id], types[id] = token, gguf.TokenType.NORMAL
    for token in contents['added_tokens']:
        tokens[token['id']] = token['content']
        types[token['id']] = gguf.TokenType.CONTROL if token['special'] else gguf.TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else ' '.join(pair) for pair in contents['model']['merges']]
    facts = dict(
        context_length=c.block_size, embedding_length=c.n_embd, block_count=c.n_layer,
        head_count=c.n_head, head_count_kv=c.n_kv_head, key_length=c.head_dim, value_length=c.head_dim,
        rope_dimension_count=c.head_dim, rope_freq_base=c.rope_theta, layer_norm_rms_eps=c.norm_eps,
        feed_forward_length=c.hidden_dim,
        tokenizer_model='gpt2', tokenizer_pre=split_by, token_list=tokens, token_types=types,
        token_merges=merges, add_bos_token=False)
    if end is not None:
        facts.update(bos_token_id=end, eos_token_id=end)
    writer = gguf.GGUFWriter(path, family)
    for name, value in facts.items():
        getattr(writer, f'add_{name}')(value)
    kinds = gguf.GGMLQuantizationType
    stored_as = kinds[dtype.upper().replace('FLOAT', 'F')]  # F32, BF16 or F16
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], c.n_layer)
    for name, weight in {**weights, 'model.embed_tokens.weight': table}.items():
        heads = {'q_proj': c.n_head, 'k_proj': c.n_kv_head}.get(name.split('.')[-2])
        if family == 'llama' and heads:  # there RoPE turns neighbours, not half against half
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # (rows, ...) again
        kind = stored_as if weight.dim() > 1 else kinds.F32
        numbers = gguf.quants.quantize(weight.float().numpy(), kind)
        writer.add_tensor(names.get_name(name, ('.weight', '.bias')), numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    note('in it model.gguf, the same for llama.cpp, ollama, LM Studio')

@torch.no_grad()
def write_folder(folder):
    """The model and its tokenizer in the files of Hugging Face and of llama.cpp: made aside, then renamed."""
    from safetensors.torch import save_file
    import gguf  # here, so that what is missing is missed before anything is written
    tokenizer = export_tokenizer(checkpoint['tokenizer'])
    if folder.exists():
        raise ValueError(f'{folder} exists: choose a new folder for --export')
    shape, weights = to_hf_config(model.config), {}
    for group in to_hf(model.config, model.state_dict()).values():
        weights.update(group)
    end = coder.end_of_text
    name_of_end = None if end is None else tokenizer.id_to_token(end)
    special = dict(bos_token_id=end, eos_token_id=end, pad_token_id=None)
    tokenizer_config = dict(
        tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
        model_max_length=block_size, bos_token=name_of_end, eos_token=name_of_end)
    files = {'config.json': {**shape, **special, 'dtype': dtype}, 'generation_config.json': special,
             'tokenizer_config.json': tokenizer_config, 'tokenizer.json': json.loads(tokenizer.to_str())}
    with tempfile.TemporaryDirectory(prefix='.export-', dir=folder.parent) as aside:
        new = Path(aside) / 'new'
        new.mkdir()
        for name, facts in files.items():
            (new / name).write_text(json.dumps(facts, indent=2), encoding='utf-8')
        save_file(weights, new / 'model.safetensors', metadata={'format': 'pt'})
        note(f'{folder}: a Hugging Face folder, the weights in {dtype}')
        write_gguf(new / 'model.gguf', weights, tokenizer)
        new.rename(folder)

# ----------------------------------------------------------------------------
# what was asked for

if export:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # which removes what was made aside
    with plain_errors():
        write_folder(Path(export))
    sys.exit()
if device == 'cpu' and not threads:
    hardware.pick_threads()
trained = f'update {checkpoint["iter_num"]}, validation loss {checkpoint["val_loss"]:.4f}'
if math.isnan(checkpoint['val_loss']):
    trained = 'not evaluated yet'
size = f'{model.n_params() / 1e6:.2f}M parameters'
note(f'{path}: {trained}; {size}; {dtype} on {hardware.device_name(device)}')
if interactive:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(EOFError, KeyboardInterrupt):
        talk()
    print()
    sys.exit()
if len(prompt) > block_size:
    note(f'the prompt has {len(prompt):,} tokens: the model sees the last {block_size} at a time')
began, drawn = time.perf_counter(), []
rows = draw(prompt, drawn, num_samples)
texts = zip(*rows) if num_samples > 1 else [(row[0] for row in rows)]
for tokens in texts:
    print(printable(shown), end='', flush=True)
    write(tokens)
    if num_samples > 1:
        print('-' * 40)
note(f'{len(drawn) * num_samples / (time.perf_counter() - began):,.0f} tokens/s')
