"""Generate text from a trained model, export it, or convert a downloaded one.

    python sample.py --start="ROMEO:"
    python sample.py --start=FILE:prompt.txt --num_samples=4 --temperature=0.7 --top_p=0.9
    python sample.py --interactive           # type, read, continue
    python sample.py --to_hf=my-gpt          # write a Hugging Face folder, and in it model.gguf for llama.cpp
    python sample.py --from_hf=SmolLM2-135M  # convert a downloaded folder to the run folder out-SmolLM2-135M
"""
import os
import signal

if __name__ == '__main__':  # Ctrl-C at any moment, also while torch is imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import math
import re
import shlex
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import hardware
from configurator import checked, configure, plain_errors, printable, set_up_output, unknown
from model import (FIELDS, GPT, GPTConfig, LIMITS, checkpoint_path, load_checkpoint, load_model,
                   save_checkpoint)
from prepare import END_OF_TEXT, PATTERN, Tokenizer, read_text

# ----------------------------------------------------------------------------
# settings
out_dir = 'out'  # folder of a run (its best.pt, or else ckpt.pt), or a checkpoint
start = ''  # text to continue, with \n for a line break, or FILE:path; empty: the beginning of a document
num_samples = 1  # texts, drawn in one batch
max_new_tokens = 500  # tokens in each text
temperature = 0.8  # 0: always the likeliest token; below 1: safer, above: wilder
top_k = 200  # draw from this many likeliest tokens; 0: from all
top_p = 1.0  # draw from the fewest tokens that have this probability together; 1: from all
min_p = 0.0  # draw from the tokens at least this many times as likely as the likeliest; 0: from all
repetition_penalty = 1.0  # make tokens that the text has already less likely, as 1.1 does; 1: do not
stop = ''  # end a text where this stands in it; \n is a line break
seed = 0  # of the draws; 0: other text each time
interactive = False  # type, read, continue; the model is loaded once
to_hf = ''  # export the model to this new folder, for other programs
from_hf = ''  # convert this Hugging Face folder to the run folder out-NAME
device = 'auto'  # auto, cpu, cuda, cuda:1, mps, xpu
dtype = 'auto'  # of weights and arithmetic: auto, float32, bfloat16, float16; auto exports float32
threads = 0  # CPU threads; 0: as many as are fastest now
# ----------------------------------------------------------------------------
ALLOWED = dict(LIMITS, threads=(0, 1024), dtype=('auto', 'float32', 'bfloat16', 'float16'))

# ----------------------------------------------------------------------------
# text

def note(text):
    print(printable(text), file=sys.stderr, flush=True)  # stdout is the text alone

def typed(text):
    r"""The text that a user typed: \n is a line break, \t a tab, and bytes that are not UTF-8 are U+FFFD."""
    return re.sub('[\ud800-\udfff]+', '\ufffd', text.replace(r'\n', '\n').replace(r'\t', '\t'))

def known(coder, text):
    """The text without the characters that a char tokenizer does not know, which a note names. ValueError if
    nothing is left."""
    if coder.kind != 'char' or coder.ids.keys() >= set(text):
        return text
    strange = ' '.join(sorted(set(text) - coder.ids.keys()))[:100]
    kept = ''.join(c for c in text if c in coder.ids)
    if not kept:
        raise ValueError(f'the model does not know {strange}: it was trained on text without')
    note(f'left out, because the model does not know it: {strange}')
    return kept

def read_start(coder):
    """The part of `start` to print, and its ids. An empty one becomes the token before a document: the end of
    another document, or else a line break, or else any token."""
    if start.startswith('FILE:'):
        shown, text = '', known(coder, ''.join(read_text(os.path.expanduser(start.removeprefix('FILE:')))))
    else:
        shown = text = known(coder, typed(start))
    ids = coder.encode(text)
    if not ids and coder.end_of_text is not None:
        ids = [coder.end_of_text]
    if not ids:
        with suppress(ValueError):  # the tokenizer may not know a line break
            ids = coder.encode('\n')
    return shown, ids or [0]

def draw(model, coder, ids, drawn, **options):
    """Yield the next ids, one for each text, until every text has ended; append them to drawn, too."""
    ended = set()
    for new in model.stream(torch.tensor([ids[-model.config.block_size:]]), **options):
        drawn.append(new.tolist())
        yield drawn[-1]
        ended.update(i for i, id in enumerate(drawn[-1]) if id in coder.ends)
        if len(ended) == len(drawn[-1]):
            break

def write(coder, ids):
    """Print ids as they come: whole characters, control characters as escapes, up to an end or the stop
    string."""
    piece, held = coder.decoder(), ''
    for id in ids:
        if id in coder.ends:
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

def write_texts(model, coder, prompt, shown, options):
    """Print num_samples continuations of the prompt, each behind the text that is shown of it."""
    began, drawn = time.perf_counter(), []
    rows = draw(model, coder, prompt, drawn, num_samples=num_samples, **options)
    texts = zip(*rows) if num_samples > 1 else [(row[0] for row in rows)]
    for ids in texts:
        print(printable(shown), end='', flush=True)
        write(coder, ids)
        if num_samples > 1:
            print('-' * 40)
    note(f'{len(drawn) * num_samples / (time.perf_counter() - began):,.0f} tokens/s')

def talk(model, coder, prompt, options):
    """A prompt, the text that follows, and again, all one text; /NAME NUMBER changes an option."""
    with suppress(ImportError):
        import readline  # history and editing in input(), where there is one
    note('It completes documents, it is not an assistant: type how one begins. Empty: go on; /help')
    context = list(prompt)
    numbers = [name for name in options if name in LIMITS]
    commands = [f'/{name}' for name in (*numbers, 'reset', 'help', 'quit')]
    while True:
        line = input('\n> ')
        command, _, value = line.removeprefix('/').partition(' ')
        try:
            if not line.startswith('/'):
                context += coder.encode(known(coder, typed(line)))
                drawn = []
                with suppress(KeyboardInterrupt):
                    write(coder, (row[0] for row in draw(model, coder, context, drawn, **options)))
                context += [row[0] for row in drawn]
            elif command == 'quit':
                return
            elif command == 'reset':
                context = list(prompt)
            elif command in ('', 'help'):
                print(*[f'/{name} {options[name]}' for name in numbers], sep='\n')
                print('/reset forgets the text so far; /quit or Ctrl-D ends; Ctrl-C stops a text\n'
                      'anything else is continued: \\n is a line break, an empty line goes on')
            elif command in numbers:
                default = options[command]
                options[command] = checked(command, value, default, LIMITS[command])
            else:
                raise ValueError(unknown(f'/{command}', commands, 'command', '/help lists them'))
        except ValueError as error:
            print(printable(error))

def generate():
    """Load the model, then write texts or talk."""
    with plain_errors():
        place = hardware.pick_device(device)
        precision = hardware.pick_dtype(place, dtype)
        path = checkpoint_path(out_dir)
        checkpoint = load_checkpoint(path)
        model = load_model(checkpoint).to(place, getattr(torch, precision)).eval()
        coder = Tokenizer(checkpoint['tokenizer'])
        shown, prompt = read_start(coder)
    hardware.set_up(place, threads)
    trained = f'update {checkpoint["iter_num"]}, validation loss {checkpoint["val_loss"]:.4f}'
    if math.isnan(checkpoint['val_loss']):
        trained = 'not evaluated yet'
    note(f'{path}: {trained}; {model.n_params() / 1e6:.2f}M parameters; {precision} on '
         f'{hardware.device_name(place)}')
    generator = torch.Generator(place).manual_seed(seed or time.time_ns())
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                   min_p=min_p, repetition_penalty=repetition_penalty, generator=generator)
    if interactive:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(EOFError, KeyboardInterrupt):
            talk(model, coder, prompt, options)
        print()
        return
    block_size = model.config.block_size
    if len(prompt) > block_size:
        note(f'the prompt has {len(prompt):,} tokens: the model sees the last {block_size} at a time')
    write_texts(model, coder, prompt, shown, options)

# ----------------------------------------------------------------------------
# exchange with Hugging Face, as a Llama or a Qwen3, and llama.cpp; sampling does not use this section

# our modules and theirs; one matrix of ours may hold several of theirs, one below the other
MODULES = {
    'embedding': ['embed_tokens'],
    'attention_norm': ['input_layernorm'],
    'attention.qkv': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
    'attention.q_norm': ['self_attn.q_norm'],
    'attention.k_norm': ['self_attn.k_norm'],
    'attention.proj': ['self_attn.o_proj'],
    'mlp_norm': ['post_attention_layernorm'],
    'mlp.up': ['mlp.gate_proj', 'mlp.up_proj'],
    'mlp.down': ['mlp.down_proj'],
    'norm': ['norm'],
}
# fields of GPTConfig and of config.json, and what config.json always says
SIZES = dict(block_size='max_position_embeddings', vocab_size='vocab_size', n_layer='num_hidden_layers',
             n_head='num_attention_heads', n_kv_head='num_key_value_heads', n_embd='hidden_size',
             head_dim='head_dim', rope_theta='rope_theta', norm_eps='rms_norm_eps', bias='attention_bias')
FIXED = dict(hidden_act='silu', tie_word_embeddings=True, use_sliding_window=False)
# fields of GPTConfig that export_config handles by hand, or that only training uses
OTHERS = {'mlp_ratio', 'use_rms_norm', 'use_swiglu', 'qk_norm', 'dropout', 'gradient_checkpointing'}

def split_weights(config, weights):
    """A GPT's weights -> {our name: {their name: tensor}}, without the head, which is the embedding again."""
    heads = (config.n_head, config.n_kv_head, config.n_kv_head)
    rows = {'attention.qkv': [n * config.head_dim for n in heads], 'mlp.up': [config.hidden_dim] * 2}
    result = {}
    for name, tensor in weights.items():
        module, kind = name.rsplit('.', 1)
        prefix = 'model'
        if module.startswith('blocks.'):
            _, layer, module = module.split('.', 2)
            prefix = f'model.layers.{layer}'
        if module == 'head':
            if tensor.data_ptr() != weights['embedding.weight'].data_ptr():
                raise ValueError('the head is not the embedding: only tied embeddings can be exported')
            continue
        if module not in MODULES:
            raise ValueError(f'neither Llama nor Qwen3 has a place for {name}')
        if sum(rows.get(module, [])) not in (0, len(tensor)):
            raise ValueError(f'{name} has {len(tensor)} rows, not {sum(rows[module])}')
        parts = tensor.split(rows.get(module, len(tensor)))
        result[name] = {f'{prefix}.{theirs}.{kind}': part for theirs, part in zip(MODULES[module], parts)}
    return result

def join_weights(config, theirs):
    """{their name: tensor} -> a GPT's weights in float32. ValueError names a tensor that is missing, has
    another shape, or has no place here."""
    with torch.device('meta'):
        groups = split_weights(config, GPT(config).state_dict())
    expected = {name: part.shape for group in groups.values() for name, part in group.items()}
    for name, shape in expected.items():
        if name not in theirs:
            raise ValueError(f'{name} is missing')
        if theirs[name].shape != shape or not theirs[name].is_floating_point():
            raise ValueError(f'{name} is {theirs[name].dtype} {tuple(theirs[name].shape)}, '
                             f'not floating-point {tuple(shape)}')
    for name in sorted(theirs.keys() - expected.keys()):
        if name == 'lm_head.weight':
            if not torch.equal(theirs[name].float(), theirs['model.embed_tokens.weight'].float()):
                raise ValueError(f'{name} is not the embedding, although tie_word_embeddings is true')
        elif not name.endswith('.inv_freq'):  # RoPE's frequencies, which old folders hold
            raise ValueError(f'this model has no place for {name}')
    weights = {}
    for name, group in groups.items():
        weights[name] = torch.cat([theirs[part].float() for part in group])
    weights['head.weight'] = weights['embedding.weight']
    return weights

def export_config(c):
    """GPTConfig -> what config.json says of the shape; ValueError names what neither Llama nor Qwen3 can
    be."""
    if not c.use_rms_norm or not c.use_swiglu or (c.bias and c.qk_norm):
        raise ValueError(f'use_rms_norm {c.use_rms_norm}, use_swiglu {c.use_swiglu}, bias {c.bias}, qk_norm '
                         f'{c.qk_norm}: Llama and Qwen3 have RMSNorm, SwiGLU, and not both bias and qk_norm')
    if not c.qk_norm and c.n_embd % c.n_head:
        raise ValueError(f'n_embd {c.n_embd} does not divide into n_head {c.n_head}, as a Llama has it')
    for field in fields(c):
        value = getattr(c, field.name)
        if field.name not in SIZES and field.name not in OTHERS and value != field.default:
            raise ValueError(f'{field.name} is {value}: neither Llama nor Qwen3 has it')
    sizes = {theirs: getattr(c, ours) for ours, theirs in SIZES.items()}
    family = dict(model_type='llama', architectures=['LlamaForCausalLM'], mlp_bias=c.bias)
    if c.qk_norm:
        family = dict(model_type='qwen3', architectures=['Qwen3ForCausalLM'])
    rope = {'rope_type': 'default', 'rope_theta': c.rope_theta}
    return {**family, **sizes, **FIXED, 'intermediate_size': c.hidden_dim, 'rope_parameters': rope}

def convert_config(theirs):
    """What config.json says -> GPTConfig; ValueError names what a GPT of this program cannot be."""
    qwen3 = theirs.get('model_type') == 'qwen3'
    rope = {**(theirs.get('rope_scaling') or {}), **(theirs.get('rope_parameters') or {})}
    rope.setdefault('rope_type', rope.get('type'))
    defaults = dict(
        model_type=None, hidden_act='silu', tie_word_embeddings=False, use_sliding_window=False,
        layer_types=[], num_key_value_heads=32 if qwen3 else 0, head_dim=128 if qwen3 else 0,
        rms_norm_eps=1e-6, rope_theta=10000.0, rope_type='default', partial_rotary_factor=1.0,
        attention_bias=False, mlp_bias=False, quantization_config=None)
    c = defaults | {name: value for name, value in (theirs | rope).items() if value is not None}
    right = FIXED | dict(
        model_type='qwen3' if qwen3 else 'llama', layer_types=['full_attention'] * len(c['layer_types']),
        rope_type='default', partial_rotary_factor=1.0, attention_bias=not qwen3 and c['mlp_bias'],
        quantization_config=None)
    for name, value in right.items():
        if c[name] != value:
            raise ValueError(f'{name} is {c[name]!r:.60}, which a GPT of this program cannot have')
    for name in (*SIZES.values(), 'intermediate_size'):
        if name not in c:
            raise ValueError(f'config.json has no {name}')
    config = GPTConfig(**{ours: c[name] for ours, name in SIZES.items()}, qk_norm=qwen3)
    hidden = c['intermediate_size']
    if type(hidden) is not int or hidden % 64 or not 0 < hidden < 2**24:
        raise ValueError(f'intermediate_size is {hidden!r:.60}: it must be a multiple of 64')
    return replace(config, mlp_ratio=hidden / config.n_embd)

def read_json(path, **kinds):
    """The dict in a JSON file, empty where there is no file. ValueError where it is damaged, or a field is
    not of its kind."""
    if not path.exists():
        return {}
    try:
        contents = json.loads(path.read_text('utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path.name} is damaged ({type(error).__name__})') from None
    if not isinstance(contents, dict):
        raise ValueError(f'{path.name} is damaged ({type(contents).__name__} where an object belongs)')
    for name, kind in kinds.items():
        if not isinstance(contents.get(name), kind | None):
            raise ValueError(f'{path.name} is damaged ({name} is {contents[name]!r:.60})')
    return contents

def steps(part):
    """A normalizer, pre_tokenizer or decoder in a tokenizer.json -> the list of its steps"""
    for name in ('normalizers', 'pretokenizers', 'decoders'):
        if part and name in part:
            return part[name]
    return [part] if part else []

def plain_tokenizer(contents):
    """Reduce a tokenizer.json to what determines its ids: files saved by different versions become equal.
    ValueError names a part that is not supported: ids must decode to the exact text, piece by piece."""
    from tokenizers import Tokenizer as HF
    try:
        hf = HF.from_str(json.dumps(contents))
    except Exception as error:  # tokenizers has no class for it
        raise ValueError(f'tokenizer.json is not a tokenizer ({error})') from None
    hf.no_padding()
    hf.no_truncation()
    if hf.encode('').ids:
        raise ValueError('tokenizer.json adds tokens to every text (BOS?), which is not supported')
    contents = json.loads(hf.to_str())  # with the fields that older files leave out
    model = contents['model']
    options = ('byte_fallback', 'continuing_subword_prefix', 'end_of_word_suffix', 'dropout')
    used = {model['type'], *(name for name in options if model.get(name))}
    for step in steps(contents['normalizer']):
        used.add(step['type'])
    for step in steps(contents['pre_tokenizer']):
        used.add('add_prefix_space' if step.get('add_prefix_space') else step['type'])
        if step['type'] == 'ByteLevel':
            step['trim_offsets'] = True  # changes offsets, not ids
    for step in steps(contents['decoder']):
        used.add(step['type'])
        if step['type'] == 'ByteLevel':
            step.update(add_prefix_space=True, trim_offsets=True, use_regex=True)  # decoding ignores them
    strange = used - {'BPE', 'NFC', 'Split', 'Digits', 'ByteLevel', 'Fuse'}
    if strange or not contents['decoder']:
        what = ', '.join(sorted(strange)) or 'no decoder'
        raise ValueError(f'tokenizer.json has {what}: only byte-level BPE is supported, as of GPT-2, SmolLM2 '
                         'and Qwen3; SentencePiece is not')
    kept = {name: model[name] for name in ('type', 'vocab', 'unk_token', 'fuse_unk', 'ignore_merges')}
    kept['merges'] = [pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges']]
    return contents | {'model': kept, 'post_processor': None}

def convert_tokenizer(folder):
    """A Hugging Face folder's tokenizer, as meta.json and checkpoints hold it. It includes the ids that end,
    begin and pad a text, and the chat template."""
    contents = plain_tokenizer(read_json(folder / 'tokenizer.json'))
    ids = contents['model']['vocab'] | {token['content']: token['id'] for token in contents['added_tokens']}
    size = max(ids.values()) + 1
    config, generation = read_json(folder / 'config.json'), read_json(folder / 'generation_config.json')
    names = read_json(folder / 'tokenizer_config.json', pad_token=str | dict, chat_template=str | list)
    begin, ends = config.get('bos_token_id'), []
    for end in (config.get('eos_token_id'), generation.get('eos_token_id')):
        ends += end if isinstance(end, list) else [end]
    for id in (begin, *ends):
        if id is not None and (type(id) is not int or not 0 <= id < size):
            raise ValueError(f'config.json: a text begins or ends with {id!r:.60}, which is no token')
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    pad = names.get('pad_token')
    pad = ids.get(pad.get('content') if isinstance(pad, dict) else pad, config.get('pad_token_id'))
    template = names.get('chat_template')
    if (folder / 'chat_template.jinja').exists():
        template = (folder / 'chat_template.jinja').read_text('utf-8')
    return {'kind': 'hf', 'json': json.dumps(contents, sort_keys=True), 'vocab_size': size,
            'end_of_text': ends[0] if ends else None, 'ends': ends, 'begin': begin,
            'pad': pad if pad in ids.values() else None, 'chat_template': template}

def read_weights(folder):
    """{name: tensor} of all the safetensors files of a Hugging Face folder"""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    weights = {}
    for path in sorted(folder.glob('model*.safetensors')):
        try:
            weights.update(load_file(path))
        except SafetensorError as error:
            raise ValueError(f'{path.name} is damaged ({error})') from None
    return weights

def convert(folder):
    """Write the Llama or Qwen3 in a Hugging Face folder as out-NAME/best.pt, and print the next commands."""
    name = folder.resolve().name
    for file in ('config.json', 'tokenizer.json', 'model*.safetensors'):
        if not any(folder.glob(file)):
            raise ValueError(f'there is no {folder / file}: '
                             f'run "hf download OWNER/{name} --local-dir {folder}" first')
    out = Path(f'out-{name}')
    for path in (out / 'best.pt', out / 'ckpt.pt'):
        if path.exists():
            raise ValueError(f'{path} exists: rename or delete {out} to convert {folder} again')
    try:
        config = convert_config(read_json(
            folder / 'config.json', rope_scaling=dict, rope_parameters=dict, layer_types=list))
        tokenizer = convert_tokenizer(folder)
        if tokenizer['vocab_size'] > config.vocab_size:
            raise ValueError(f'tokenizer.json has {tokenizer["vocab_size"]} ids, not {config.vocab_size}')
        weights = join_weights(config, read_weights(folder))
    except ValueError as error:
        raise ValueError(f'{folder}: {error}') from None
    state = {name: kind() for name, kind in FIELDS.items()}
    state |= dict(model=weights, model_config=asdict(config), tokenizer=tokenizer, val_loss=math.nan,
                  best_val_loss=math.inf)
    out.mkdir(exist_ok=True)
    save_checkpoint(out / 'best.pt', state)
    run = shlex.quote(str(out))
    print(f'{out / "best.pt"} is written. Next, sample from it, or finetune it on your own text:\n'
          f'    python sample.py --out_dir={run}\n'
          f'    python prepare.py my.txt --name=mine --tokenizer={run}/best.pt\n'
          f'    python train.py config/finetune.py --init_from={run}/best.pt --dataset=mine')

def export_tokenizer(meta):
    """-> a tokenizers.Tokenizer that encodes and decodes as Tokenizer(meta) does. Only there <|endoftext|> in
    a text is the special token, and characters that a char tokenizer does not know are left out."""
    from tokenizers import AddedToken, Regex, Tokenizer as HF, decoders, models, pre_tokenizers
    coder = Tokenizer(meta)
    if coder.kind == 'hf':
        return coder.hf
    if coder.kind == 'char':
        exported = HF(models.BPE(coder.ids, []))
        exported.decoder = decoders.Fuse()
        return exported
    # GPT-2 writes bytes that are printable in Latin-1 as these characters, others as those from 256 on
    letters = {b: chr(b) for b in range(33, 256) if chr(b).isprintable()}
    others = [b for b in range(256) if b not in letters]
    letters |= {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = [''.join(letters[b] for b in token) for token in coder.table[:-1]]
    ids = {token: i for i, token in enumerate(tokens)}
    splits = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))]
    merges = [(a, b) for a, b in splits if a in ids and b in ids]  # any two tokens that make up a third merge
    exported = HF(models.BPE(ids, merges, ignore_merges=True))  # a word that is a token is one
    words = pre_tokenizers.Split(Regex(meta['pattern']), 'isolated')
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    exported.pre_tokenizer = pre_tokenizers.Sequence([words, as_letters])
    exported.decoder = decoders.ByteLevel()
    exported.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return exported

# llama.cpp's names for how a tokenizer.json splits a text into words
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r'|\s+(?!\S)|\s+')
SPLITTERS = {('ByteLevel',): 'gpt-2', (PATTERN, 'ByteLevel'): 'gpt-2', ('Digits', 'ByteLevel'): 'smollm',
             (QWEN, 'ByteLevel'): 'qwen2'}

def spell(contents, characters):
    """Turn a char tokenizer.json's contents into what llama.cpp knows: each character is made, by merges, of
    GPT-2's letters for its bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    ids = {letters.pre_tokenize_str(character)[0][0]: id for character, id in characters.items()}
    merges = {f'{token[:i]} {token[i]}': None for token in ids for i in range(1, len(token))}
    # llama.cpp wants an end, or it would be token 11, and a merge: no word has both a and 0
    contents['model'].update(vocab=ids, merges=[*merges] or ['a 0'])
    contents['added_tokens'] = [{'content': END_OF_TEXT, 'id': len(ids), 'special': True}]
    contents['pre_tokenizer'] = {'type': 'ByteLevel'}

def write_gguf(path, model, weights, meta, begin, end):
    """Write the file that llama.cpp reads; without one where it does not know the tokenizer."""
    import gguf
    c, coder = model.config, Tokenizer(meta)
    contents = json.loads(export_tokenizer(meta).to_str())
    family = 'qwen3' if c.qk_norm else 'llama'
    if coder.kind == 'char':
        spell(contents, coder.ids)
        begin = end = contents['added_tokens'][0]['id']
    words = [step.get('pattern', {}).get('Regex', step['type']) for step in steps(contents['pre_tokenizer'])]
    split_by = SPLITTERS.get(tuple(words))
    if split_by is None:
        note("without model.gguf: llama.cpp's name for this kind of tokenizer is not known here")
        return
    table = weights['model.embed_tokens.weight']
    if end == len(table):  # a new token: as rare as the rarest
        every = torch.arange(end)[None, :c.block_size]
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
        token_merges=merges, add_bos_token=False,
        bos_token_id=begin, eos_token_id=end, pad_token_id=meta.get('pad'),
        chat_template=meta.get('chat_template'))
    writer = gguf.GGUFWriter(path, family)
    for name, value in facts.items():
        if value is not None:
            getattr(writer, f'add_{name}')(value)
    kinds = gguf.GGMLQuantizationType
    stored_as = {torch.float32: kinds.F32, torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}[table.dtype]
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
def export(folder):
    """Write the model of out_dir and its tokenizer to a new folder, for Hugging Face and llama.cpp. The files
    are made in a temporary folder, which is renamed at the end."""
    from safetensors.torch import save_file
    import gguf  # here, so that what is missing is missed before anything is written
    if folder.exists():
        raise ValueError(f'{folder} exists: choose a new folder for --to_hf')
    checkpoint = load_checkpoint(out_dir)
    meta, stored = checkpoint['tokenizer'], 'float32' if dtype == 'auto' else dtype
    model = load_model(checkpoint).to(getattr(torch, stored)).eval()
    coder, tokenizer = Tokenizer(meta), export_tokenizer(meta)
    shape, weights = export_config(model.config), {}
    for group in split_weights(model.config, model.state_dict()).values():
        weights.update(group)
    end = coder.end_of_text
    begin = meta.get('begin', end)
    ends = coder.ends if len(coder.ends) > 1 else end
    special = dict(bos_token_id=begin, eos_token_id=ends, pad_token_id=meta.get('pad'))
    tokenizer_config = dict(
        tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
        model_max_length=model.config.block_size, chat_template=meta.get('chat_template'))
    for name, id in dict(bos_token=begin, eos_token=end, pad_token=meta.get('pad')).items():
        tokenizer_config[name] = None if id is None else tokenizer.id_to_token(id)
    files = {'config.json': {**shape, **special, 'dtype': stored}, 'generation_config.json': special,
             'tokenizer_config.json': tokenizer_config, 'tokenizer.json': json.loads(tokenizer.to_str())}
    with tempfile.TemporaryDirectory(prefix='.export-', dir=folder.parent) as aside:
        new = Path(aside) / 'new'
        new.mkdir()
        for name, facts in files.items():
            (new / name).write_text(json.dumps(facts, indent=2), encoding='utf-8')
        save_file(weights, new / 'model.safetensors', metadata={'format': 'pt'})
        (new / 'model.safetensors').chmod((new / 'config.json').stat().st_mode)  # it was for the owner alone
        note(f'{folder}: a Hugging Face folder, the weights in {stored}')
        write_gguf(new / 'model.gguf', model, weights, meta, begin, end)
        new.rename(folder)

# ----------------------------------------------------------------------------
# what was asked for

if __name__ == '__main__':
    set_up_output()
    if hasattr(signal, 'SIGPIPE'):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    globals().update(configure(__file__, allowed=ALLOWED)[0])
    stop = typed(stop)
    with plain_errors():
        if from_hf:
            convert(Path(from_hf))
        elif to_hf:
            signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # which removes what was made aside
            export(Path(to_hf))
    if not (from_hf or to_hf):
        generate()
