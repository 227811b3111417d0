"""What a trained model is used for: text from it, and the model itself to other programs.

    python sample.py --start="ROMEO:"
    python sample.py --start=FILE:prompt.txt --num_samples=4 --temperature=0.7 --top_p=0.9
    python sample.py --interactive              # type, read, continue
    python sample.py --export=my-gpt            # a Hugging Face folder, and in it model.gguf for llama.cpp and ollama
"""

import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C at any moment, also while torch is imported

import json
import sys
import tempfile
import time
from contextlib import suppress

import torch

import hardware
from configurator import check, checked, choose, configure, parse, plain_errors, read_block, set_up_output
from model import KVCache, load_checkpoint, load_model, to_hf, to_hf_config
from prepare import PATTERN, Tokenizer, export_tokenizer, printable, read_text

# ----------------------------------------------------------------------------
# settings
out_dir = 'out'  # folder of a run (best.pt, else ckpt.pt), a checkpoint, or a Hugging Face folder
start = ''  # text to continue, or FILE:path; empty: the beginning of a document
num_samples = 1  # texts, drawn in one batch
max_new_tokens = 500  # tokens in each text
temperature = 0.8  # 0: always the likeliest token; below 1: safer, above: wilder
top_k = 200  # draw from so many likeliest tokens; 0: from all
top_p = 1.0  # draw from the fewest tokens that have this probability together; 1: from all
stop = ''  # end a text where this stands in it
seed = 0  # of the draws; 0: other text each time
interactive = False  # type, read, continue; the model is loaded once
export = ''  # write the model to this new folder, for other programs
device = 'auto'  # auto, cpu, cuda, cuda:1, mps, xpu
dtype = 'auto'  # of weights and arithmetic: auto, float32, bfloat16, float16; auto exports float32
threads = 0  # CPU threads; 0: as many as are fastest now
# ----------------------------------------------------------------------------
set_up_output()
config = configure(__file__)
globals().update(config)
RANGES = dict(num_samples=(1, 2**16), max_new_tokens=(1, 2**40), temperature=(0, 100), top_k=(0, 2**40),
              top_p=(1e-9, 1), seed=(0, 2**62), threads=(0, 1024))
COMMANDS = {'/temperature': 'temperature', '/top_k': 'top_k', '/top_p': 'top_p', '/tokens': 'max_new_tokens', '/seed': 'seed'}
interrupted = []  # filled by Ctrl-C while a text is written in a talk
with suppress(AttributeError):  # Windows has none
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly


def note(text):
    print(text, file=sys.stderr, flush=True)  # stdout is the text alone


with plain_errors():
    for name, (low, high) in RANGES.items():
        check(config, name, low, high)
    if export:
        choose(config, 'dtype', ('auto', 'float32', 'bfloat16', 'float16'))
        device, dtype = 'cpu', 'float32' if dtype == 'auto' else dtype
    else:
        device = hardware.pick_device(device)
        dtype = hardware.pick_dtype(device, dtype)
    there = [name for name in ('best.pt', 'ckpt.pt') if os.path.exists(os.path.join(out_dir, name))]
    path = os.path.join(out_dir, there[0]) if there else out_dir
    if ':' in device:  # CUDA graphs are captured on the current device
        torch.get_device_module(device).set_device(device)
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint).to(device, getattr(torch, dtype)).eval()
    coder = Tokenizer(checkpoint['tokenizer'])
    if coder.vocab_size > model.config.vocab_size:
        raise ValueError(f'{path}: the tokenizer has {coder.vocab_size} ids, the model {model.config.vocab_size}')
hardware.set_up(device, threads)
if device == 'cpu' and not threads and not export and torch.get_num_threads() > 1:
    few = torch.zeros(1, 1, dtype=torch.int64)
    hardware.fastest_threads(lambda: model.generate(few, 4), torch.get_num_threads())
block_size = model.config.block_size
trained = f'update {checkpoint["iter_num"]}, validation loss {checkpoint["val_loss"]:.4f}'
if checkpoint['val_loss'] != checkpoint['val_loss']:
    trained = 'not evaluated yet'
about = f'{path}: {trained}; {model.n_params() / 1e6:.2f}M parameters; {device}, {dtype}'
if device == 'cpu':
    about += f', threads: {torch.get_num_threads()}'
drawing = {name: config[name] for name in ('max_new_tokens', 'temperature', 'top_k', 'top_p')}
generator = torch.Generator(device)
generator.manual_seed(seed) if seed else generator.seed()

# ----------------------------------------------------------------------------
# text


def beginning():
    """What stands before a document: the end of another one, or a line break, or where there is none any character."""
    if coder.end_of_text is not None:
        return [coder.end_of_text]
    try:
        return coder.encode('\n')
    except ValueError:
        return [0]


def draw(ids, drawn, **options):
    """New tokens after ids, a list of num_samples ids at a time; drawn collects them."""
    options |= dict(drawing, generator=generator, stop_token=coder.end_of_text)
    for new in model.stream(torch.tensor([ids]), **options):
        drawn.append(new.tolist())
        yield drawn[-1]
        if interrupted:
            break


def write(tokens):
    """Print ids as they come: no character cut in two, nothing a terminal would obey, ended before the stop string."""
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


def help_text():
    comments = read_block(__file__)[1]
    lines = [f'{command + " NUMBER":20} {comments[name]}' for command, name in COMMANDS.items()]
    lines += [f'{"/reset":20} forget the text so far', f'{"/info":20} the model, the settings, the length of the text',
              f'{"/quit":20} or Ctrl-D; Ctrl-C stops a text', f'{"anything else":20} is continued; \\n is a line break']
    return '\n'.join(lines)


def talk():
    """A prompt, the text that follows, and again; the context stays, up to the window."""
    with suppress(ImportError):
        import readline  # history and editing in input(), where there is one
    note(f'{about}\nIt completes documents, it is not an assistant: type how one begins. \\n: line break, empty: go on, /help')
    cache, unread = None, []  # ids that the cache has not read yet
    while True:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            typed = input('\n> ')
            interrupted.clear()
            signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            os._exit(130)
        word, _, value = typed.partition(' ')
        try:
            if word in COMMANDS:
                name = COMMANDS[word]
                chosen = {name: checked(word, parse(value, config[name]), config[name])}
                check(chosen, name, *RANGES[name])
                if name != 'seed':
                    drawing.update(chosen)
                elif chosen['seed']:
                    generator.manual_seed(chosen['seed'])
            elif word == '/reset':
                cache = None
            elif word == '/info':
                settings = ', '.join(f'{name} {value}' for name, value in drawing.items())
                print(f'{about}\n{settings}; {cache.length if cache else 0:,} tokens read, the last {block_size} count')
            elif word == '/quit':
                return
            elif word.startswith('/'):
                print(help_text())
            else:
                ids = coder.encode(typed.replace('\\n', '\n'))
                if cache is None:
                    cache, unread = KVCache(model.config, 1, device, model.embedding.weight.dtype), beginning()
                ids, drawn = unread + ids, []
                write(row[0] for row in draw(ids, drawn, cache=cache))
                unread = drawn[-1]  # the cache has read all others
        except ValueError as error:
            print(error)


# ----------------------------------------------------------------------------
# export


def pre_tokenizer_name(contents):
    """llama.cpp's name of how a tokenizer.json splits a text into words; None where it is not known here."""
    modern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r'|\s+(?!\S)|\s+')
    names = {('ByteLevel',): 'gpt-2', ('Digits', 'ByteLevel'): 'smollm', (PATTERN, 'ByteLevel'): 'gpt-2',
             (modern % '', 'ByteLevel'): 'qwen2', (modern % '{1,3}', 'ByteLevel'): 'llama-bpe'}
    splitter = contents['pre_tokenizer'] or {'type': None}
    parts = splitter.get('pretokenizers', [splitter])
    return names.get(tuple(part['pattern'].get('Regex') if 'pattern' in part else part['type'] for part in parts))


def write_gguf(path, weights, tokenizer):
    """The file that llama.cpp reads; where it cannot have this tokenizer, nothing, and the reason comes back."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    c, contents = model.config, json.loads(tokenizer.to_str())
    end, pre, merges = coder.end_of_text, 'gpt-2', {}
    if coder.kind == 'char':  # each character by the letters of its bytes, which merge
        ids = {ByteLevel(False, use_regex=False).pre_tokenize_str(char)[0][0]: id for char, id in coder.ids.items()}
        for token in ids:
            merges.update({(token[:i], token[i]): None for i in range(1, len(token))})
        merges = merges or {('a', '0'): None}  # there must be some; no word has these two
        # llama.cpp cannot do without an end: one whose logit is the mean of all is next to never drawn
        end, table = len(ids), weights['model.embed_tokens.weight']
        weights['model.embed_tokens.weight'] = torch.cat((table, table.float().mean(0, keepdim=True).to(table.dtype)))
        contents['added_tokens'] = [{'content': '<|endoftext|>', 'id': end, 'special': True}]
    else:
        ids, pre = contents['model']['vocab'], pre_tokenizer_name(contents)
        if contents['model']['type'] != 'BPE' or pre is None:
            return 'llama.cpp has no name for the way its tokenizer splits words'
        merges = contents['model']['merges']
    size = len(weights['model.embed_tokens.weight'])
    tokens = [f'[PAD{i}]' for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, id in ids.items():
        tokens[id], types[id] = token, gguf.TokenType.NORMAL
    for added in contents['added_tokens']:
        tokens[added['id']] = added['content']
        types[added['id']] = gguf.TokenType.CONTROL if added['special'] else gguf.TokenType.USER_DEFINED

    kind = 'qwen3' if c.qk_norm else 'llama'
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([' '.join(pair) for pair in merges])
    writer.add_add_bos_token(False)
    if end is not None:
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], c.n_layer)
    for name, weight in weights.items():
        if kind == 'llama' and ('.q_proj.' in name or '.k_proj.' in name):  # there RoPE turns neighbours
            heads = c.n_head if '.q_proj.' in name else c.n_kv_head
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
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


def write_folder(folder):
    """The model and its tokenizer as Hugging Face's and llama.cpp's files: made aside, then renamed."""
    try:
        import gguf
        from safetensors.torch import save_file
        tokenizer = export_tokenizer(checkpoint['tokenizer'])
    except ImportError:
        raise ValueError('--export needs more packages: pip install safetensors tokenizers gguf') from None
    folder = os.path.abspath(folder)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(f'{folder} exists: choose a new folder for --export')
    shape = to_hf_config(model.config)
    weights = {}
    for group in to_hf(model.config, model.state_dict()).values():
        weights.update({name: weight.contiguous() for name, weight in group.items()})
    end = coder.end_of_text
    special = {'bos_token_id': end, 'eos_token_id': end, 'pad_token_id': None}
    token = None if end is None else tokenizer.id_to_token(end)
    files = {
        'config.json': {**shape, **special, 'dtype': dtype},
        'generation_config.json': special,
        'tokenizer_config.json': {
            'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': token, 'eos_token': token,
            'model_max_length': block_size, 'clean_up_tokenization_spaces': False},
    }
    with tempfile.TemporaryDirectory(prefix='.export-', dir=os.path.dirname(folder)) as aside:
        new = os.path.join(aside, 'new')
        os.mkdir(new)
        for name, contents in files.items():
            with open(os.path.join(new, name), 'w', encoding='utf-8') as file:
                json.dump(contents, file, indent=2)
        tokenizer.save(os.path.join(new, 'tokenizer.json'))
        save_file(weights, os.path.join(new, 'model.safetensors'), metadata={'format': 'pt'})
        problem = write_gguf(os.path.join(new, 'model.gguf'), weights, tokenizer)
        if os.path.exists(folder):
            os.rmdir(folder)
        os.replace(new, folder)
    note(f'{folder}: for transformers and other programs, in {dtype}')
    note(f'without model.gguf: {problem}' if problem else f'{os.path.join(folder, "model.gguf")}: for llama.cpp, ollama, LM Studio')
    if coder.kind == 'char':
        note('these programs leave out characters that the tokenizer does not know')


# ----------------------------------------------------------------------------
# what was asked for

if export:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with plain_errors():
            write_folder(export)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit()
if interactive:
    talk()
    sys.exit()
echo = start
with plain_errors():
    if start.startswith('FILE:'):
        start, echo = ''.join(read_text(start[5:])), ''
    prompt = coder.encode(start) or beginning()
note(about)
if len(prompt) > block_size:
    note(f'the prompt has {len(prompt):,} tokens: the model sees the last {block_size} at a time')
began, drawn = time.perf_counter(), []
rows = draw(prompt, drawn, num_samples=num_samples)
if num_samples == 1:
    print(printable(echo), end='', flush=True)
    write(row[0] for row in rows)
else:
    for tokens in zip(*rows):
        print(printable(echo), end='', flush=True)
        write(tokens)
        print('-' * 40)
note(f'{len(drawn) * num_samples / (time.perf_counter() - began):,.0f} tokens/s')
