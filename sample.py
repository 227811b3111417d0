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
import shutil
import sys
import tempfile
import time
from contextlib import suppress

import torch

import hardware
from configurator import check, checked, choose, configure, parse, plain_errors, read_block, set_up_output
from model import KVCache, load_checkpoint, load_model, to_hf, to_hf_config
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
COMMANDS = {'/temperature': 'temperature', '/top_k': 'top_k', '/top_p': 'top_p', '/tokens': 'max_new_tokens',
            '/seed': 'seed'}

set_up_output()
with suppress(AttributeError):  # Windows has none
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
    if coder.vocab_size > model.config.vocab_size:
        raise ValueError(f'{path}: its tokenizer has {coder.vocab_size} ids, its model {model.config.vocab_size}')
hardware.set_up(device, threads)
block_size = model.config.block_size
drawing = {name: config[name] for name in ('max_new_tokens', 'temperature', 'top_k', 'top_p')}
generator = torch.Generator(device)
generator.manual_seed(seed) if seed else generator.seed()
interrupted = []  # not empty: Ctrl-C was typed while a text was written in a talk

def note(text):
    print(text, file=sys.stderr, flush=True)  # stdout is the text alone

def about():
    trained = f'update {checkpoint["iter_num"]}, validation loss {checkpoint["val_loss"]:.4f}'
    if checkpoint['val_loss'] != checkpoint['val_loss']:  # nan
        trained = 'not evaluated yet'
    cpu = f', threads: {torch.get_num_threads()}' if device == 'cpu' else ''
    return f'{path}: {trained}; {model.n_params() / 1e6:.2f}M parameters; {device}, {dtype}{cpu}'

# ----------------------------------------------------------------------------
# text

def beginning():
    """What stands before a document: the end of another one, or else a line break, or else any token."""
    if coder.end_of_text is not None:
        return [coder.end_of_text]
    with suppress(ValueError):
        return coder.encode('\n')
    return [0]

def draw(ids, drawn, **options):
    """New tokens after ids, a list of num_samples ids at a time; they are also appended to drawn."""
    options |= dict(drawing, generator=generator, stop_token=coder.end_of_text)
    for new in model.stream(torch.tensor([ids]), **options):
        drawn.append(new.tolist())
        yield drawn[-1]
        if interrupted:
            break

def write(tokens):
    """Print ids as they come: whole characters, nothing that a terminal would obey, up to the stop string."""
    piece, held = coder.decoder(), ''
    for id in tokens:
        if id == coder.end_of_text:
            break
        held += piece(id)
        if stop and stop in held:
            print(printable(held[: held.index(stop)]), flush=True)
            return
        ready = max(0, len(held) - max(0, len(stop) - 1))  # the rest may be the beginning of the stop string
        print(printable(held[:ready]), end='', flush=True)
        held = held[ready:]
    print(printable(held + piece(None)), flush=True)

def set_drawing(command, text):
    """What /temperature 0.7 and its like ask for."""
    name = COMMANDS[command]
    chosen = {name: checked(command, parse(text, config[name]), config[name])}
    check(chosen, name, *RANGES[name])
    if name != 'seed':
        drawing.update(chosen)
    elif chosen['seed']:
        generator.manual_seed(chosen['seed'])

def show_help():
    comments = read_block(__file__)[1]
    for command, name in COMMANDS.items():
        print(f'{command + " NUMBER":20} {comments[name]}')
    print('/info                the model, the settings, and how much it has read\n'
          '/reset               forget the text so far\n'
          '/quit                or Ctrl-D; Ctrl-C stops a text\n'
          'anything else        is continued; \\n is a line break, an empty line goes on')

def talk():
    """A prompt, the text that follows, and again; the context stays, up to the window."""
    with suppress(ImportError):
        import readline  # history and editing in input(), where there is one
    note('It completes documents, it is not an assistant: type how one begins. Empty: go on; /help')
    cache, unread = None, []  # ids that the cache has not read yet
    while True:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            typed = input('\n> ')
            signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            os._exit(130)
        interrupted.clear()
        word, _, value = typed.partition(' ')
        try:
            if word == '/quit':
                return
            if word == '/reset':
                cache = None
            elif word == '/info':
                print(about())
                print(*[f'{name} {value},' for name, value in drawing.items()], end=' ')
                print(f'{cache.length if cache else 0:,} tokens read, of which the last {block_size:,} count')
            elif word in COMMANDS:
                set_drawing(word, value)
            elif word.startswith('/'):
                show_help()
            else:
                ids = coder.encode(typed.replace('\\n', '\n'))
                if cache is None:
                    unread = beginning()
                    cache = KVCache(model.config, 1, device, model.embedding.weight.dtype)
                drawn = []
                write(row[0] for row in draw(unread + ids, drawn, cache=cache))
                unread = drawn[-1]  # the cache has read all before it
        except ValueError as error:
            print(error)

# ----------------------------------------------------------------------------
# export

def splitter_name(splitter):
    """llama.cpp's name for how a tokenizer.json splits a text into words; None where it is not known here."""
    qwen = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r'|\s+(?!\S)|\s+')
    names = {('ByteLevel',): 'gpt-2', (PATTERN, 'ByteLevel'): 'gpt-2', ('Digits', 'ByteLevel'): 'smollm',
             (qwen, 'ByteLevel'): 'qwen2'}
    steps = splitter.get('pretokenizers', [splitter])
    return names.get(tuple(step.get('pattern', {}).get('Regex', step['type']) for step in steps))

def llama_vocabulary(tokenizer):
    """-> llama.cpp's name for how words are split, {token: id}, merges, special tokens, the id of the end;
    ValueError where llama.cpp cannot have such a tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel

    if coder.kind == 'char':  # each character is made of the letters for its bytes
        spell = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
        ids = {spell(character)[0][0]: id for character, id in coder.ids.items()}
        merges = {f'{token[:i]} {token[i]}': None for token in ids for i in range(1, len(token))}
        # llama.cpp wants an end, or it would be token 11, and a merge: no word has both a and 0
        end = len(ids)
        special = [{'content': END_OF_TEXT, 'id': end, 'special': True}]
        return 'gpt-2', ids, [*merges] or ['a 0'], special, end
    contents = json.loads(tokenizer.to_str())
    name = splitter_name(contents['pre_tokenizer'] or {'type': ''})
    if contents['model']['type'] != 'BPE' or name is None:
        raise ValueError("llama.cpp's name for this kind of tokenizer is not known here")
    merges = [pair if isinstance(pair, str) else ' '.join(pair) for pair in contents['model']['merges']]
    return name, contents['model']['vocab'], merges, contents['added_tokens'], coder.end_of_text

def write_gguf(path, weights, tokenizer):
    """The file that llama.cpp reads; ValueError, and no file, where it cannot have the tokenizer."""
    import gguf

    c, family, kinds = model.config, 'qwen3' if model.config.qk_norm else 'llama', gguf.TokenType
    splitter, ids, merges, special, end = llama_vocabulary(tokenizer)
    table = weights['model.embed_tokens.weight']
    if end == len(table):  # a new token: as rare as the rarest
        every = torch.arange(end)[None, :block_size]
        rarest = model(every, every)[0].mean((0, 1)).argmin()
        table = torch.cat((table, table[rarest][None]))
    tokens = [f'[PAD{i}]' for i in range(len(table))]
    types = [kinds.UNUSED] * len(table)
    for token, id in ids.items():
        tokens[id], types[id] = token, kinds.NORMAL
    for token in special:
        tokens[token['id']] = token['content']
        types[token['id']] = kinds.CONTROL if token['special'] else kinds.USER_DEFINED
    facts = dict(
        context_length=c.block_size, embedding_length=c.n_embd, block_count=c.n_layer, head_count=c.n_head,
        head_count_kv=c.n_kv_head, key_length=c.head_dim, value_length=c.head_dim, rope_dimension_count=c.head_dim,
        rope_freq_base=c.rope_theta, layer_norm_rms_eps=c.norm_eps, feed_forward_length=c.hidden_dim,
        tokenizer_model='gpt2', tokenizer_pre=splitter, token_list=tokens, token_types=types,
        token_merges=merges, add_bos_token=False)
    if end is not None:
        facts.update(bos_token_id=end, eos_token_id=end)
    writer = gguf.GGUFWriter(path, family)
    for name, value in facts.items():
        getattr(writer, f'add_{name}')(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], c.n_layer)
    for name, weight in {**weights, 'model.embed_tokens.weight': table}.items():
        heads = {'q_proj': c.n_head, 'k_proj': c.n_kv_head}.get(name.split('.')[-2])
        if family == 'llama' and heads:  # there RoPE turns neighbours, not half against half
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # (rows, ...) again
        raw_dtype = None
        if weight.dim() == 1:
            weight = weight.float()
        elif weight.dtype == torch.bfloat16:  # which numpy does not have
            weight, raw_dtype = weight.view(torch.uint8), gguf.GGMLQuantizationType.BF16
        writer.add_tensor(names.get_name(name, ('.weight', '.bias')), weight.numpy(), raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

@torch.no_grad()
def write_folder(folder):
    """The model and its tokenizer in the files of Hugging Face and of llama.cpp: made aside, then renamed."""
    try:
        import gguf
        from safetensors.torch import save_file
        tokenizer = export_tokenizer(checkpoint['tokenizer'])
    except ImportError:
        raise ValueError('--export needs more packages: pip install safetensors tokenizers gguf') from None
    shape, weights = to_hf_config(model.config), {}
    for group in to_hf(model.config, model.state_dict()).values():
        weights.update(group)
    parent = os.path.dirname(os.path.abspath(folder))
    needed = 2.1 * sum(weight.nbytes for weight in weights.values())
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(f'{folder} exists: choose a new folder for --export')
    if shutil.disk_usage(parent).free < needed:
        raise ValueError(f'{folder} needs {needed / 1e6:,.0f} MB, more than is free')
    end = coder.end_of_text
    name_of_end = None if end is None else tokenizer.id_to_token(end)
    special = dict(bos_token_id=end, eos_token_id=end, pad_token_id=None)
    tokenizer_config = dict(
        tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
        model_max_length=block_size, bos_token=name_of_end, eos_token=name_of_end)
    files = {'config.json': {**shape, **special, 'dtype': dtype}, 'generation_config.json': special,
             'tokenizer_config.json': tokenizer_config, 'tokenizer.json': json.loads(tokenizer.to_str())}
    with tempfile.TemporaryDirectory(prefix='.export-', dir=parent) as aside:
        new = os.path.join(aside, 'new')
        os.mkdir(new)
        for name, contents in files.items():
            with open(os.path.join(new, name), 'w', encoding='utf-8') as file:
                json.dump(contents, file, indent=2)
        save_file(weights, os.path.join(new, 'model.safetensors'), metadata={'format': 'pt'})
        note(f'{folder}: a Hugging Face folder, the weights in {dtype}')
        try:
            write_gguf(os.path.join(new, 'model.gguf'), weights, tokenizer)
            note(f'{folder}/model.gguf: the same for llama.cpp, ollama, LM Studio')
        except ValueError as error:
            note(f'without model.gguf: {error}')
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.replace(new, os.path.abspath(folder))
    if coder.kind == 'char':
        note('in other programs characters that the training text did not have are skipped')

# ----------------------------------------------------------------------------
# what was asked for

if export:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that what was made aside is removed
    try:
        with plain_errors():
            write_folder(export)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit()
with plain_errors():
    echo = '' if start.startswith('FILE:') else start
    text = ''.join(read_text(start[5:])) if start.startswith('FILE:') else start
    prompt = coder.encode(text) or beginning()
if device == 'cpu' and not threads:
    hardware.pick_threads()
note(about())
if interactive:
    talk()
    sys.exit()
if len(prompt) > block_size:
    note(f'the prompt has {len(prompt):,} tokens: the model sees the last {block_size} at a time')
began, drawn = time.perf_counter(), []
rows = draw(prompt, drawn, num_samples=num_samples)
texts = zip(*rows) if num_samples > 1 else [(row[0] for row in rows)]
for tokens in texts:
    print(printable(echo), end='', flush=True)
    write(tokens)
    if num_samples > 1:
        print('-' * 40)
note(f'{len(drawn) * num_samples / (time.perf_counter() - began):,.0f} tokens/s')
