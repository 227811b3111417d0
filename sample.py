"""Generate text from a trained model, export it, or convert a downloaded one.

    python sample.py --start="ROMEO:"
    python sample.py --start=FILE:prompt.txt --num_samples=4 --temperature=0.7 --top_p=0.9
    python sample.py --interactive           # continue what you type
    python sample.py --to_hf=my-gpt          # write a Hugging Face folder, and in it model.gguf for llama.cpp
    python sample.py --from_hf=SmolLM2-135M  # convert a downloaded folder to the run folder out-SmolLM2-135M
"""
import os
import signal

if __name__ == '__main__':  # exit on Ctrl-C without a traceback, even while torch is being imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import itertools
import json
import math
import re
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import hardware
from configurator import checked, configure, plain_errors, printable, set_up_output
from model import (FIELDS, GPT, GPTConfig, LIMITS, checkpoint_path, load_checkpoint, load_model,
                   save_checkpoint)
from prepare import END_OF_TEXT, PATTERN, Tokenizer, read_text

# ----------------------------------------------------------------------------
# settings
out_dir = 'out'  # folder of a run (its best.pt, or else ckpt.pt), or a checkpoint
start = ''  # text to continue (\n is a line break), or FILE:path; empty: begin a document
num_samples = 1  # texts, drawn in one batch
max_new_tokens = 500  # tokens in each text
temperature = 0.8  # 0: always the likeliest token; below 1: safer, above: wilder
top_k = 200  # draw from this many likeliest tokens; 0: from all
top_p = 1.0  # draw from the fewest tokens that have this probability together; 1: from all
min_p = 0.0  # draw from the tokens at least this many times as likely as the likeliest; 0: from all
repetition_penalty = 1.0  # above 1, such as 1.1, tokens that are in the text already become less likely
stop = ''  # end a text before this string; \n is a line break
seed = 0  # of the draws; 0: different text each time
interactive = False  # continue what you type, again and again
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
    print(printable(text), file=sys.stderr, flush=True)  # stdout gets only the text

def typed(text):
    r"""The text that a user typed: \n means a line break, \t a tab; invalid UTF-8 becomes U+FFFD."""
    return re.sub('[\ud800-\udfff]+', '\ufffd', text.replace(r'\n', '\n').replace(r'\t', '\t'))

def known(coder, text):
    """The text without characters that a char tokenizer does not know. ValueError if nothing is left."""
    if coder.kind != 'char' or coder.ids.keys() >= set(text):
        return text
    strange = ' '.join(sorted(set(text) - coder.ids.keys()))[:100]
    kept = ''.join(c for c in text if c in coder.ids)
    if not kept:
        raise ValueError(f'the model does not know {strange}: its training text had none')
    note(f'left out, because the model does not know it: {strange}')
    return kept

def read_start(coder):
    """-> the part of `start` to print, and its ids. An empty start becomes the id that precedes a document:
    the end of another one or, with a char tokenizer, a line break."""
    if start.startswith('FILE:'):
        shown, text = '', known(coder, ''.join(read_text(os.path.expanduser(start.removeprefix('FILE:')))))
    else:
        shown = text = known(coder, typed(start))
    ids = coder.encode(text)
    if not ids and coder.kind == 'char':
        ids = [coder.ids.get('\n', 0)]
    return shown, ids or [coder.end_of_text or 0]

def draw(model, coder, ids, drawn, **options):
    """Yield the next ids, one for each text, until every text has ended; also append them to drawn."""
    ended = set()
    for new in model.stream(torch.tensor([ids[-model.config.block_size:]]), **options):
        drawn.append(new.tolist())
        yield drawn[-1]
        ended.update(i for i, id in enumerate(drawn[-1]) if id in coder.ends)
        if len(ended) == len(drawn[-1]):
            break

def write(coder, ids):
    """Print the text of ids as they come, up to an end or the stop string."""
    held = ''
    for text in coder.decode_stream(itertools.takewhile(lambda id: id not in coder.ends, ids)):
        held += text
        if stop and stop in held:
            break
        ready = max(0, len(held) + 1 - len(stop))  # the rest may be the beginning of the stop string
        print(printable(held[:ready]), end='', flush=True)
        held = held[ready:]
    print(printable(held.partition(stop)[0] if stop else held), flush=True)

def write_texts(model, coder, prompt, shown, options):
    """Print num_samples continuations of the prompt, each after the part of it that is shown."""
    began, drawn = time.perf_counter(), []
    rows = draw(model, coder, prompt, drawn, num_samples=num_samples, **options)
    texts = zip(*rows) if num_samples > 1 else [(row[0] for row in rows)]
    for ids in texts:
        print(printable(shown), end='', flush=True)
        write(coder, ids)
        if num_samples > 1:
            print('-' * 40)
    note(f'{len(drawn) * num_samples / (time.perf_counter() - began):,.0f} tokens/s')

HELP = """/reset forgets the text so far; /quit or Ctrl-D ends; Ctrl-C stops a text
anything else is continued: \\n is a line break, an empty line goes on"""

def talk(model, coder, prompt, options):
    """Read text and continue it, again and again, all as one text; /NAME NUMBER changes an option."""
    with suppress(ImportError):
        import readline  # gives input() history and editing
    note('The model continues documents, it is not an assistant: type how one begins. Help: /help')
    context = list(prompt)
    numbers = [name for name in options if name in LIMITS]
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
            elif command in numbers:
                default = options[command]
                options[command] = checked(command, value, default, LIMITS[command])
            else:
                print(*[f'/{name} {options[name]}' for name in numbers], HELP, sep='\n')
        except ValueError as error:
            print(printable(error))

def generate():
    """Load the model, then write texts or talk."""
    place = hardware.pick_device(device)
    precision = hardware.pick_dtype(place, dtype)
    path = checkpoint_path(out_dir)
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint).to(place, getattr(torch, precision)).eval()
    coder = Tokenizer(checkpoint['tokenizer'])
    shown, prompt = read_start(coder)
    hardware.set_up(place, threads)
    trained = f'update {checkpoint["iter_num"]}, validation loss {checkpoint["val_loss"]:.4f}'
    if 'val_bits_per_byte' in checkpoint:
        trained += f', {checkpoint["val_bits_per_byte"]:.4f} bits per byte'
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
# Convert from and to Hugging Face's Llama and Qwen3, and to llama.cpp. Sampling does not use this section.

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
# byte -> the letter that spells it in a byte-level vocabulary: GPT-2 moves unprintable bytes to 256 and up
LETTERS = {b: chr(b) for b in range(33, 256) if chr(b).isprintable()}
LETTERS |= {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*LETTERS}))}
# llama.cpp's name for each way in which a tokenizer.json splits a text into words
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r'|\s+(?!\S)|\s+')
SPLITTERS = {('ByteLevel',): 'gpt-2', (PATTERN, 'ByteLevel'): 'gpt-2', ('Digits', 'ByteLevel'): 'smollm',
             (QWEN, 'ByteLevel'): 'qwen2'}

def split_weights(config, weights):
    """A GPT's weights -> {our name: {their name: tensor}}, without the head, which is the embedding."""
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
    """{their name: tensor} -> a GPT's weights in float32. ValueError names a tensor that does not fit."""
    with torch.device('meta'):
        groups = split_weights(config, GPT(config).state_dict())
    expected = {name: part.shape for group in groups.values() for name, part in group.items()}
    found = {name: part.shape for name, part in theirs.items() if name != 'lm_head.weight'}  # tied
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(f'{name} is {found.get(name, "missing")}, not {expected.get(name, "allowed")}')
    weights = {name: torch.cat([theirs[part].float() for part in group]) for name, group in groups.items()}
    weights['head.weight'] = weights['embedding.weight']
    return weights

def export_config(c):
    """GPTConfig -> the shape in config.json. ValueError names what neither Llama nor Qwen3 has."""
    if not c.use_rms_norm or not c.use_swiglu or (c.bias and c.qk_norm):
        raise ValueError(f'use_rms_norm {c.use_rms_norm}, use_swiglu {c.use_swiglu}, bias {c.bias}, qk_norm '
                         f'{c.qk_norm}: Llama and Qwen3 have RMSNorm, SwiGLU, and not both bias and qk_norm')
    if not c.qk_norm and c.n_embd % c.n_head:
        raise ValueError(f'n_embd {c.n_embd} is not divisible by n_head {c.n_head}, as a Llama has it')
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
    """The contents of config.json -> GPTConfig. ValueError names what a GPT of this program cannot be."""
    qwen3 = theirs.get('model_type') == 'qwen3'
    rope = {**(theirs.get('rope_scaling') or {}), **(theirs.get('rope_parameters') or {})}
    rope.setdefault('rope_type', rope.get('type'))
    c = dict(model_type=None, tie_word_embeddings=False, num_key_value_heads=0, head_dim=0, rms_norm_eps=1e-6,
             rope_theta=10000.0, attention_bias=False, mlp_bias=False, layer_types=[])
    c |= {name: value for name, value in (theirs | rope).items() if value is not None}
    required = FIXED | dict(
        model_type='qwen3' if qwen3 else 'llama', rope_type='default', partial_rotary_factor=1.0,
        layer_types=['full_attention'] * len(c['layer_types']), quantization_config=None,
        attention_bias=not qwen3 and c['mlp_bias'])
    for name, value in required.items():
        if c.get(name, value) != value:
            raise ValueError(f'{name} is {c[name]!r:.60}, which is not supported')
    for name in (*SIZES.values(), 'intermediate_size'):
        if name not in c:
            raise ValueError(f'config.json has no {name}')
    if c['intermediate_size'] % 64:
        raise ValueError(f'intermediate_size is {c["intermediate_size"]}: it must be a multiple of 64')
    config = GPTConfig(**{ours: c[theirs] for ours, theirs in SIZES.items()}, qk_norm=qwen3)
    return replace(config, mlp_ratio=c['intermediate_size'] / config.n_embd)

def read_json(path):
    """The dict in a JSON file, empty if there is no file"""
    return json.loads(path.read_text('utf-8')) if path.exists() else {}

def steps(part):
    """A normalizer, pre_tokenizer or decoder in a tokenizer.json -> the list of its steps"""
    for name in ('normalizers', 'pretokenizers', 'decoders'):
        if part and name in part:
            return part[name]
    return [part] if part else []

def load_tokenizer(contents):
    """The text of a tokenizer.json -> a tokenizers.Tokenizer. ValueError names a part that is not supported:
    ids must decode to exactly the text, piece by piece."""
    from tokenizers import Tokenizer as HF
    hf = HF.from_str(contents)
    hf.no_padding()
    hf.no_truncation()
    if hf.encode('').ids:
        raise ValueError('tokenizer.json adds tokens to every text (BOS?), which is not supported')
    contents = json.loads(hf.to_str())  # with the fields that older files leave out
    model, splitter, decoder = contents['model'], steps(contents['pre_tokenizer']), steps(contents['decoder'])
    options = ('byte_fallback', 'continuing_subword_prefix', 'end_of_word_suffix', 'dropout')
    used = {model['type'], *(name for name in options if model.get(name))}
    used.update(step['type'] for step in (*steps(contents['normalizer']), *splitter, *decoder))
    used.update('add_prefix_space' for step in splitter if step.get('add_prefix_space'))
    strange = used - {'BPE', 'NFC', 'Split', 'Digits', 'ByteLevel', 'Fuse'}
    if strange or not decoder:
        what = ', '.join(sorted(strange)) or 'no decoder'
        raise ValueError(f'tokenizer.json has {what}: only byte-level BPE is supported, as of GPT-2, SmolLM2 '
                         'and Qwen3; SentencePiece is not')
    return hf

def convert_tokenizer(folder):
    """A Hugging Face folder's tokenizer as meta.json and checkpoints hold it, with the ids that begin and end
    a text, and the chat template"""
    hf = load_tokenizer((folder / 'tokenizer.json').read_text('utf-8'))
    config, ends = read_json(folder / 'config.json'), []
    for settings in (config, read_json(folder / 'generation_config.json')):
        end = settings.get('eos_token_id')
        ends += end if isinstance(end, list) else [end]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    template = read_json(folder / 'tokenizer_config.json').get('chat_template')
    if (folder / 'chat_template.jinja').exists():
        template = (folder / 'chat_template.jinja').read_text('utf-8')
    return {'kind': 'hf', 'json': hf.to_str(), 'vocab_size': max(hf.get_vocab().values()) + 1,
            'end_of_text': ends[0] if ends else None, 'ends': ends, 'begin': config.get('bos_token_id'),
            'chat_template': template}

def convert(folder):
    """Write the Llama or Qwen3 in a Hugging Face folder as out-NAME/best.pt, and print the next commands."""
    from safetensors.torch import load_file
    name = folder.resolve().name
    if not (folder / 'config.json').exists():
        raise ValueError(f'there is no {folder / "config.json"}: '
                         f'run "hf download OWNER/{name} --local-dir {folder}" first')
    out = Path(f'out-{name}')
    if out.exists():
        raise ValueError(f'{out} exists: rename or delete it to convert {folder} again')
    config, tokenizer = convert_config(read_json(folder / 'config.json')), convert_tokenizer(folder)
    if tokenizer['vocab_size'] > config.vocab_size:
        raise ValueError(f'tokenizer.json has {tokenizer["vocab_size"]} ids, not {config.vocab_size}')
    weights = {}
    for path in folder.glob('model*.safetensors'):
        weights |= load_file(path)
    state = {name: kind() for name, kind in FIELDS.items()}
    state |= dict(model=join_weights(config, weights), model_config=asdict(config), tokenizer=tokenizer,
                  val_loss=math.nan, best_val_loss=math.inf)
    save_checkpoint(out / 'best.pt', state)
    run = shlex.quote(str(out))
    print(f'wrote {out / "best.pt"}. Next, sample from it, or finetune it on your own text:\n'
          f'    python sample.py --out_dir={run}\n'
          f'    python prepare.py my.txt --name=mine --tokenizer={run}/best.pt\n'
          f'    python train.py config/finetune.py --init_from={run}/best.pt --dataset=mine')

def export_tokenizer(meta):
    """-> a tokenizers.Tokenizer that encodes and decodes as Tokenizer(meta) does, except that <|endoftext|>
    in a text is the special token, and unknown characters are left out."""
    from tokenizers import AddedToken, Regex, Tokenizer as HF, decoders, models, pre_tokenizers
    coder = Tokenizer(meta)
    if coder.kind == 'hf':
        return coder.hf
    if coder.kind == 'char':
        exported = HF(models.BPE(coder.ids, []))
        exported.decoder = decoders.Fuse()
        return exported
    tokens = [''.join(LETTERS[b] for b in token) for token in coder.table[:-1]]
    ids = {token: i for i, token in enumerate(tokens)}
    splits = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))]
    merges = [(a, b) for a, b in splits if a in ids and b in ids]  # any two tokens that make up a third merge
    exported = HF(models.BPE(ids, merges, ignore_merges=True))  # a word that is a token is one
    exported.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(meta['pattern']), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    exported.decoder = decoders.ByteLevel()
    exported.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return exported

def spell(characters):
    """{character: id} of a char tokenizer -> the tokenizer.json that llama.cpp needs: a byte-level vocabulary
    whose merges spell each character, and an end, which would be token 11 otherwise"""
    ids = {''.join(LETTERS[b] for b in character.encode()): id for character, id in characters.items()}
    merges = {(token[:i], token[i]): None for token in ids for i in range(1, len(token))}
    return {'model': {'vocab': ids, 'merges': [*merges] or [('a', '0')]},  # it needs one: no word has a and 0
            'added_tokens': [{'content': END_OF_TEXT, 'id': len(ids), 'special': True}],
            'pre_tokenizer': {'type': 'ByteLevel'}}

def write_gguf(path, model, weights, meta, begin, end):
    """Write the file that llama.cpp reads, unless it does not know the tokenizer."""
    import gguf
    c, contents = model.config, json.loads(export_tokenizer(meta).to_str())
    if meta['kind'] == 'char':
        contents = spell(Tokenizer(meta).ids)
        begin = end = contents['added_tokens'][0]['id']
    words = [step.get('pattern', {}).get('Regex', step['type']) for step in steps(contents['pre_tokenizer'])]
    split_by = SPLITTERS.get(tuple(words))
    if split_by is None:
        note('without model.gguf: llama.cpp has no name known here for this kind of tokenizer')
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
    facts = dict(
        context_length=c.block_size, embedding_length=c.n_embd, block_count=c.n_layer,
        head_count=c.n_head, head_count_kv=c.n_kv_head, key_length=c.head_dim, value_length=c.head_dim,
        rope_dimension_count=c.head_dim, rope_freq_base=c.rope_theta, layer_norm_rms_eps=c.norm_eps,
        feed_forward_length=c.hidden_dim, tokenizer_model='gpt2', tokenizer_pre=split_by, token_list=tokens,
        token_types=types, token_merges=[' '.join(pair) for pair in contents['model']['merges']],
        add_bos_token=False, bos_token_id=begin, eos_token_id=end, chat_template=meta.get('chat_template'))
    family = 'qwen3' if c.qk_norm else 'llama'
    writer = gguf.GGUFWriter(path, family)
    for name, value in facts.items():
        if value is not None:
            getattr(writer, f'add_{name}')(value)
    kinds = gguf.GGMLQuantizationType
    stored_as = {torch.float32: kinds.F32, torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}[table.dtype]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], c.n_layer)
    for name, weight in {**weights, 'model.embed_tokens.weight': table}.items():
        heads = {'q_proj': c.n_head, 'k_proj': c.n_kv_head}.get(name.split('.')[-2])
        if family == 'llama' and heads:  # there RoPE rotates neighbours, not half against half
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
    are written to NAME.part, which is renamed at the end."""
    from safetensors.torch import save_file
    import gguf  # a missing package is reported before anything is written
    if folder.exists():
        raise ValueError(f'{folder} exists: choose a new folder for --to_hf')
    checkpoint = load_checkpoint(out_dir)
    meta, stored = checkpoint['tokenizer'], 'float32' if dtype == 'auto' else dtype
    model = load_model(checkpoint).to(getattr(torch, stored)).eval()
    coder, tokenizer = Tokenizer(meta), export_tokenizer(meta)
    shape, weights = export_config(model.config), {}
    for group in split_weights(model.config, model.state_dict()).values():
        weights |= group
    begin, end = meta.get('begin', coder.end_of_text), coder.end_of_text
    special = dict(bos_token_id=begin, eos_token_id=None if end is None else coder.ends)
    tokenizer_config = dict(
        tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
        model_max_length=model.config.block_size, chat_template=meta.get('chat_template'),
        bos_token=None if begin is None else tokenizer.id_to_token(begin),
        eos_token=None if end is None else tokenizer.id_to_token(end))
    files = {'config.json': {**shape, **special, 'dtype': stored}, 'generation_config.json': special,
             'tokenizer_config.json': tokenizer_config, 'tokenizer.json': json.loads(tokenizer.to_str())}
    new = folder.with_name(f'{folder.name}.part')
    new.mkdir(exist_ok=True)
    for name, facts in files.items():
        (new / name).write_text(json.dumps(facts, indent=2), encoding='utf-8')
    save_file(weights, new / 'model.safetensors', metadata={'format': 'pt'})
    note(f'{folder}: a Hugging Face folder, the weights in {stored}')
    write_gguf(new / 'model.gguf', model, weights, meta, begin, end)
    new.rename(folder)

# ----------------------------------------------------------------------------
# what the flags ask for

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
            export(Path(to_hf))
        else:
            generate()
