"""
Text in, tokens out, and batches read back: data/NAME/ with train.bin, val.bin and meta.json.

    python prepare.py                                  # list what is prepared
    python prepare.py shakespeare                      # or pydoc: English that comes with Python
    python prepare.py my.txt more.txt --name=poems     # also folders, URLs, hf:owner/name:column
    python prepare.py my.txt --tokenizer=out/best.pt   # with a checkpoint's tokenizer
    python prepare.py --info=poems                     # figures and passages of a prepared data set

Tokens decode to exactly the text they were made from, and memory stays bounded. Between documents
(files, rows) stands the end-of-text token, or a newline if the tokenizer has none.
"""
import os
import signal

if __name__ == '__main__':  # Ctrl-C, also while torch is imported: data/ is unharmed at any moment
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import base64
import codecs
import functools
import hashlib
import heapq
import itertools
import json
import logging
import shutil
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
from filelock import FileLock  # comes with torch

from configurator import configure, plain_errors, set_up_output

# ----------------------------------------------------------------------------
# settings
sources = []  # what to prepare: shakespeare, pydoc, text files, folders, URLs, hf:owner/name[:column]
name = ''  # folder in data/; empty: made from the first source
tokenizer = 'auto'  # auto, char, bpe (trained on this text), gpt2; or that of a checkpoint, folder, data set
vocab_size = 0  # tokens in a bpe vocabulary, at least 257; 0: chosen to suit the text
val_fraction = 0.1  # share of the tokens, from the end, kept for validation (10 million at most)
max_mb = 0  # stop reading after about this many million characters; 0: read everything
overwrite = False  # replace a data set of the same name that was made from other sources
info = ''  # show this prepared data set
# ----------------------------------------------------------------------------
DATA = Path('data')
DOWNLOADS = {'shakespeare': (  # address, sha256
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')}
# how GPT-2 divides a text into words
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = '<|endoftext|>'
PIECE = 1 << 20  # characters read and encoded at a time
SMALL = 4  # pieces: up to here 'auto' considers the char tokenizer
SAMPLE = 32  # pieces that bpe is trained on, from the beginning of each source,
DISTINCT = 2 << 20  # or fewer: characters in the distinct words, which memory and time depend on
VAL_MAX = 10_000_000  # tokens: more makes an evaluation slower, not better
RETRY_WAITS = (1, 2)  # seconds: without a network the answer comes quickly

# ----------------------------------------------------------------------------
# tokenizers: another one is a branch in Tokenizer and one in make_tokenizer

class Tokenizer:
    """Text <-> ids, from the plain dict in meta.json and in checkpoints; ValueError if that is malformed."""

    def __init__(self, meta):
        self.end_of_text = None
        try:
            self.kind = meta['kind']
            if self.kind == 'char':
                self.ids = {c: i for i, c in enumerate(meta['chars'])}
                self.table = [c.encode() for c in meta['chars']]  # id -> bytes
                self.vocab_size = len(self.table)
            elif self.kind == 'hf':
                from tokenizers import Tokenizer as HF
                self.hf = HF.from_str(meta['json'])
                self.hf.no_truncation()
                self.hf.no_padding()
                self.hf.encode_special_tokens = True  # in a text their names are text
                self.vocab_size, self.end_of_text = meta['vocab_size'], meta['end_of_text']
            else:
                self.table = [base64.b64decode(token) for token in meta['ranks']]
                ranks, self.end_of_text = {token: i for i, token in enumerate(self.table)}, len(self.table)
                self.bpe = tiktoken.Encoding(self.kind, pat_str=meta['pattern'], mergeable_ranks=ranks,
                                             special_tokens={END_OF_TEXT: self.end_of_text})
                self.table.append(END_OF_TEXT.encode())
                self.vocab_size = len(self.table)
            self.dtype = np.dtype('<u2' if self.vocab_size <= 1 << 16 else '<u4')
        except ImportError:
            raise ValueError('this tokenizer needs the package tokenizers: pip install tokenizers') from None
        except Exception as error:  # the package tokenizers raises nothing narrower
            raise ValueError(f'the tokenizer is malformed ({type(error).__name__}: {error})') from None

    def encode(self, text):
        """str -> list of ids. Names of special tokens inside the text are text."""
        text.encode()  # refuses half a surrogate pair, which tiktoken would replace in silence
        if self.kind == 'hf':
            return self.hf.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self.kind != 'char':
            return self.bpe.encode(text, disallowed_special=())
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            raise ValueError(f'the tokenizer does not know the character {error.args[0]!a}: '
                             'leave it out, or train on text that has it') from None

    def decode_bytes(self, ids):
        """ids -> bytes; an id beyond the table, as in a padded vocabulary, gives none."""
        if self.kind == 'hf':
            return self.hf.decode([int(i) for i in ids], skip_special_tokens=False).encode()
        return b''.join([self.table[i] for i in ids if i < len(self.table)])

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decoder(self):
        """-> piece(id), the text that this next id completes; piece(None), what is left over at the end"""
        if self.kind != 'hf':
            decode = codecs.getincrementaldecoder('utf-8')('replace').decode
            return lambda id: decode(b'' if id is None else self.decode_bytes([id]), id is None)
        from tokenizers.decoders import DecodeStream
        stream, held = DecodeStream(skip_special_tokens=False), []

        def piece(id):
            text = self.decode(held) if id is None else stream.step(self.hf, id)
            held[:] = [] if text or id is None else [*held, id]
            return text or ''
        return piece

def train_bpe(counts, size):
    """Byte-pair encoding (Sennrich et al., arXiv:1508.07909): Counter of words -> up to `size` tokens, bytes.
    A pair is known by the bytes it makes, as in tiktoken; only words that hold it are looked at again."""
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    times = list(counts.values())
    tokens = {bytes([b]): None for b in range(256)}  # an ordered set
    pairs, where = Counter(), defaultdict(list)  # merged bytes -> how often, and in which words
    for i, word in enumerate(words):
        for a, b in zip(word, word[1:]):
            pairs[a + b] += times[i]
            where[a + b].append(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while heap and heap[0][0] < -1 and len(tokens) < size:  # what occurs once is not worth a token
        n, pair = heap[0]
        if -n != pairs[pair]:  # the count has changed since
            heapq.heapreplace(heap, (-pairs[pair], pair))
            continue
        heapq.heappop(heap)
        tokens[pair] = None
        grown = set()
        for i in set(where.pop(pair)):
            word = words[i]
            for a, b in zip(word, word[1:]):
                pairs[a + b] -= times[i]
            for j in range(len(word)):
                if b''.join(word[j:j + 2]) == pair:
                    word[j:j + 2] = [pair]
            for a, b in zip(word, word[1:]):
                pairs[a + b] += times[i]
                if pair in (a, b):
                    where[a + b].append(i)
                    grown.add(a + b)
        for other in grown:
            heapq.heappush(heap, (-pairs[other], other))
    return list(tokens)

def count_words(parts):
    """Words of a sample, from the beginning of each source, and how many characters that is."""
    counts, read, share = Counter(), 0, max(SAMPLE // len(parts), 1)
    for part in parts:
        for text in itertools.chain.from_iterable(itertools.islice(stream([part], '\n'), share)):
            words = regex.findall(PATTERN, text)
            counts.update(word[i:i + 32] for word in words for i in range(0, len(word), 32))
            read += len(text)
        if read >= SAMPLE * PIECE or sum(map(len, counts)) > DISTINCT:
            break
    return counts, read

def pick_vocab_size(size, counts):
    """A guess: twice the vocabulary for ten times the text (2,000 for 1 MB, 8,000 for 100 MB), and a token
    for each distinct character beyond ASCII, as Chinese would fall into single bytes otherwise."""
    others = {c for word in counts for c in word if c > '\x7f'}
    return min(round(size ** 0.3 / 8) * 256 + len(others) + 256, 1 << 16)

def make_tokenizer(kind, vocab_size, parts):
    """-> the tokenizer's meta, made for this text or taken from a checkpoint, a folder or a data set"""
    if kind in ('auto', 'char'):
        chars = set()
        for n_pieces, piece in enumerate(stream(parts, '\n'), 1):
            chars.update(*piece)
            if kind == 'auto' and (n_pieces > SMALL or len(chars) > 256):
                break
        else:
            return {'kind': 'char', 'chars': ''.join(sorted(chars))}
    if kind in ('auto', 'bpe'):
        counts, read = count_words(parts)
        size = sum(part.stat().st_size for part in parts if isinstance(part, Path))
        vocab_size = vocab_size or pick_vocab_size(max(size, read), counts)
        print(f'training a vocabulary of {vocab_size:,} tokens on {read:,} characters ...', flush=True)
        return bpe_meta('bpe', train_bpe(counts, vocab_size - 1))
    if kind == 'gpt2':
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except OSError:
            raise ConnectionError("GPT-2's vocabulary can't be downloaded: use --tokenizer=bpe, or set "
                                  'TIKTOKEN_CACHE_DIR to a folder that holds it') from None
        return bpe_meta('gpt2', [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)])
    if os.path.exists(os.path.join(kind, 'tokenizer.json')):
        from model import hf_tokenizer
        return hf_tokenizer(kind)
    try:
        if os.path.isfile(kind):
            return torch.load(kind, 'cpu', weights_only=True)['tokenizer']
        return load_dataset(kind).meta['tokenizer']
    except Exception as error:  # what is no checkpoint fails in many ways
        raise ValueError(f'--tokenizer={kind} is not auto, char, bpe or gpt2, nor a checkpoint, a folder '
                         f'with tokenizer.json or a prepared data set ({type(error).__name__})') from None

def bpe_meta(kind, tokens):
    ranks = [base64.b64encode(token).decode() for token in tokens]
    return {'kind': kind, 'pattern': PATTERN, 'ranks': ranks, 'special': {END_OF_TEXT: len(ranks)}}

def export_tokenizer(meta):
    """-> a tokenizers.Tokenizer that encodes and decodes as Tokenizer(meta) does. Only there <|endoftext|> in
    a text is the special token, and characters that a char tokenizer does not know are left out."""
    from tokenizers import AddedToken, Regex, Tokenizer as HF, decoders, models, pre_tokenizers
    coder = Tokenizer(meta)
    if coder.kind == 'hf':
        return coder.hf.from_str(meta['json'])
    if coder.kind == 'char':
        exported = HF(models.BPE(coder.ids, []))
        exported.decoder = decoders.Fuse()
        return exported
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes these bytes as they are in
    others = sorted(set(range(256)) - set(visible))  # Latin-1, the others as the characters from 256 on
    letters = {**{b: chr(b) for b in visible}, **{b: chr(256 + i) for i, b in enumerate(others)}}
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

# ----------------------------------------------------------------------------
# where the text comes from

def printable(text):
    """The text with control characters and overrides of its direction as escapes: no terminal obeys them."""
    return regex.sub('[^\n\t -~\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]',
                     lambda match: match[0].encode('unicode_escape').decode(), text)

def download(url, path, part, sha256=None):
    """url -> path, whole or not at all, by way of the file part. ConnectionError if no attempt succeeds."""
    import requests  # here, because it takes 60 ms, and sample.py does without
    print(f'fetching {url} ...', flush=True)
    for wait in (*RETRY_WAITS, None):
        try:
            with requests.get(url, stream=True, timeout=(3, 30)) as reply, open(part, 'wb') as file:
                reply.raise_for_status()
                for block in reply.iter_content(1 << 16):
                    file.write(block)
            break
        except requests.RequestException as error:
            if wait is None:
                why = error if isinstance(error, requests.HTTPError) else 'the connection failed'
                raise ConnectionError(f'{url} cannot be downloaded ({why}): '
                                      f'try again, or put the text at {path}') from None
            time.sleep(wait)
    if sha256 and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        raise ValueError(f'{url} sent a different text than expected: try again, or put the text at {path}')
    path.parent.mkdir(exist_ok=True)
    os.replace(part, path)

def find_parts(source, folder, new):
    """What the user typed -> paths of texts, or ['hf:...']. Downloads what is not there yet."""
    path = Path(source)
    if source.startswith('hf:'):
        return [source]
    if source == 'pydoc':
        from pydoc_data.topics import topics
        path = new / 'pydoc.txt'
        path.write_bytes(('\n\n'.join(topics[key].strip() for key in sorted(topics)) + '\n').encode())
    elif source in DOWNLOADS or source.startswith(('http://', 'https://')):
        url, sha256 = DOWNLOADS.get(source, (source, None))
        kept = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:16]}.txt'
        path = DATA / source / 'input.txt' if sha256 else kept
        if not path.exists():
            download(url, path, new / 'text', sha256)
    elif path.is_dir():
        return find_texts(path)
    elif not path.is_file():
        raise ValueError(f'{source} is not a file, folder or URL, nor shakespeare, pydoc or hf:owner/name')
    return [path]

def find_texts(folder):
    """The text files in a folder and below: no hidden ones and, in the current folder, no data/ or out*/."""
    texts, skipped, binary = [], [], 0
    for path in sorted(folder.rglob('*')):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith('.') for part in parts):
            continue
        if len(parts) > 1 and (parts[0] == DATA.name or parts[0].startswith('out')) and folder.samefile('.'):
            continue
        try:
            with open(path, 'rb') as file:
                if b'\0' in file.read(4096):
                    binary += 1
                    continue
            for _ in read_text(path):
                pass
            texts.append(path)
        except ValueError:
            skipped.append(path)
    note = f'; skipped {len(skipped):,} that are not UTF-8, the first {skipped[0]}' if skipped else ''
    print(printable(f'{folder}: {len(texts):,} text files, {binary:,} binary files left out{note}'))
    if not texts:
        raise ValueError(f'{folder}: there is no text in it')
    return texts

def make_name(source):
    """A path, URL or hf: source -> letters, digits, _ and - only, which can't lead out of data/."""
    path = Path(source.split('?')[0] if '://' in source else source.removeprefix('hf:').split(':')[0])
    return regex.sub(r'[^\w-]+', '-', path.stem or path.absolute().name).strip('-')[:60] or 'text'

def read_text(path):
    """The text of a file in pieces, every character as it stands there; cut before a space or newline that
    follows something else, where no token of PATTERN lies across. Other cuts may give a token more."""
    text, block = '', True
    with open(path, encoding='utf-8', newline='') as file:
        while block:
            try:
                block = file.read(PIECE)
            except UnicodeDecodeError:
                raise ValueError(f'{path} is not UTF-8 text') from None
            text += block
            match = regex.match(r'(?s).*\S(?=[ \n])', text) if block else None
            cut = match.end() if match else len(text)
            yield text[:cut]
            text = text[cut:]

def read_rows(spec):
    """The rows of a Hugging Face data set (train split), streamed, each as a list of one text"""
    try:
        from datasets import load_dataset as load
    except ImportError:
        raise ValueError('hf: needs the package datasets: pip install datasets') from None
    logging.disable()  # without a network, screens of retries
    name, _, column = spec.removeprefix('hf:').partition(':')
    column = column or 'text'
    try:
        for row in load(name, split='train', streaming=True):
            if not isinstance(row.get(column), str):
                raise ValueError(f'{spec}: no such text; write hf:{name}:COLUMN with one of {", ".join(row)}')
            yield [row[column]]
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f'{spec} cannot be read ({type(error).__name__}): '
                              'is there a network, and is the name right?') from None

def stream(parts, separator):
    """Pieces, lists of texts of about PIECE characters together; the separator stands between documents."""
    documents = ([read_text(part)] if isinstance(part, Path) else read_rows(part) for part in parts)
    piece, size = [], 0
    for i, texts in enumerate(itertools.chain.from_iterable(documents)):
        for text in itertools.chain([separator] if i else [], texts):
            piece.append(text)
            size += len(text or '')
            if size >= PIECE:
                yield piece
                piece, size = [], 0
    if piece:
        yield piece

def in_order(function, items, workers):
    """map() with threads that run only a little ahead; errors surface here."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)

# ----------------------------------------------------------------------------
# text -> data/NAME/

def prepare(sources, name=name, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction,
            max_mb=max_mb, overwrite=overwrite):
    """-> the data set's folder. ValueError for what a user can mend, ConnectionError where a download failed.
    One process at a time prepares a name; one that had to wait takes what is there, if it fits."""
    sources = [sources] if isinstance(sources, str) else list(sources)
    if not sources or '' in sources:
        raise ValueError('a source has an empty name: give a text file, a folder (. is this one) or a URL')
    name = name or make_name(sources[0])
    if not regex.fullmatch(r'[\w-][\w.-]{0,99}', name):
        raise ValueError(f'{name!a} cannot name a data set: use letters, digits, _ and -')
    if 0 != vocab_size < 257 or not 0 < val_fraction < 1 or max_mb < 0:
        raise ValueError(f'out of range: vocab_size {vocab_size} (0, or at least 257), '
                         f'val_fraction {val_fraction} (between 0 and 1) or max_mb {max_mb} (0 or more)')
    folder, new = DATA / name, DATA / f'.{name}.new'
    meta = {'sources': sources, 'settings': [tokenizer, vocab_size, val_fraction, max_mb]}
    began = time.time()
    DATA.mkdir(exist_ok=True)
    with FileLock(DATA / f'.{name}.lock'):  # it dies with the process
        there = read_meta(folder)
        if there == there | meta and (folder / 'meta.json').stat().st_mtime > began:
            return folder
        if there.get('sources', sources) != sources and not overwrite:
            raise ValueError(f'{folder} was made from {" ".join(there["sources"])[:99]}: '
                             'choose another --name, or replace it with --overwrite')
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            fill(new, [part for source in sources for part in find_parts(source, folder, new)], meta)
            folder.mkdir(exist_ok=True)
            (folder / 'meta.json').unlink(missing_ok=True)  # from here on the data set counts as missing
            for file in ('train.bin', 'val.bin', 'meta.json'):
                os.replace(new / file, folder / file)
        finally:
            shutil.rmtree(new)
    print(describe(folder, meta))
    print('to judge a model, look at the bits per byte of its evaluations: lower is better')
    print(f'next: python train.py --dataset={name} --minutes=5')
    return folder

def read_meta(folder):
    try:
        return json.loads((folder / 'meta.json').read_text('utf-8'))
    except (OSError, ValueError):  # missing, or damaged
        return {}

def describe(folder, meta):
    """Three lines about a data set"""
    train, val = meta['tokens']['train'], meta['tokens']['val']
    return (f'{folder}: {meta["characters"]:,} characters from {" ".join(meta["sources"])}\n'
            f'{meta["tokenizer"]["kind"]} tokenizer, vocabulary of {meta["vocab_size"]:,}, '
            f'{meta["characters"] / (train + val):.2f} characters per token\n'
            f'{train:,} tokens for training, {val:,} for validation')

def fill(new, parts, meta):
    """Text -> train.bin, val.bin and meta.json in the folder `new`; adds what it finds out to meta."""
    tokenizer, vocab_size, val_fraction, max_mb = meta['settings']
    meta['tokenizer'] = make_tokenizer(tokenizer, vocab_size, parts)
    coder = Tokenizer(meta['tokenizer'])
    total, characters, size, sha, began = 0, 0, 0, hashlib.sha256(), time.time()

    def encode(piece):
        ids = [[coder.end_of_text] if text is None else coder.encode(text) for text in piece]
        return np.fromiter(itertools.chain.from_iterable(ids), coder.dtype), ''.join(filter(None, piece))

    pieces = itertools.islice(stream(parts, '\n' if coder.end_of_text is None else None), max_mb or None)
    with open(new / 'train.bin', 'wb') as file:
        for ids, text in in_order(encode, pieces, os.cpu_count() or 1):
            file.write(ids)
            data = text.encode()
            total, characters, size = total + len(ids), characters + len(text), size + len(data)
            sha.update(data)
            if sys.stdout.isatty():
                print(f'{size / 1e6:,.0f} MB\r', end='', flush=True)
    if size > 1e6:
        print(f'encoded {size / 1e6:,.1f} MB at {size / 1e6 / (time.time() - began):.1f} MB/s')
    n_train = max(int(total * (1 - val_fraction)), total - VAL_MAX)
    if min(n_train, total - n_train) < 2:
        raise ValueError(f'{", ".join(meta["sources"])}: {total:,} tokens are too few to learn from')
    val = np.fromfile(new / 'train.bin', coder.dtype, offset=n_train * coder.dtype.itemsize)
    val.tofile(new / 'val.bin')
    os.truncate(new / 'train.bin', n_train * coder.dtype.itemsize)
    ids = val if coder.end_of_text is None else val[val != coder.end_of_text]
    val_size = sum(len(coder.decode_bytes(ids[i:i + 50_000])) for i in range(0, len(ids), 50_000))
    meta |= {'vocab_size': coder.vocab_size, 'dtype': coder.dtype.name, 'characters': characters,
             'tokens': {'train': n_train, 'val': len(val)},
             'bytes': {'train': size - val_size, 'val': val_size},
             'source_sha256': sha.hexdigest()}
    (new / 'meta.json').write_text(json.dumps(meta), 'utf-8')

# ----------------------------------------------------------------------------
# data/NAME/ -> batches

class Tokens:
    """The ids of a file, which stays open: a run goes on with it whatever becomes of its name. It is mapped
    again for each read, as pages once read would count as memory."""

    def __init__(self, path, dtype):
        self.file, self.dtype = open(path, 'rb'), dtype
        self.length = os.path.getsize(path) // dtype.itemsize

    def __len__(self):
        return self.length

    def read(self, starts, length):
        """(N,) int64 -> (N, length) int64"""
        ids = np.memmap(self.file, self.dtype, 'r')
        return ids[starts[:, None] + np.arange(length)].astype(np.int64)

def load_dataset(name):
    """A name in data/, or a folder -> its meta, train and val. ValueError for whatever is missing or wrong"""
    folder = Path(name) if os.path.isdir(name) and not (DATA / name).exists() else DATA / name
    typed = folder.name if folder.name in (*DOWNLOADS, 'pydoc') else f'TEXT.txt --name={folder.name}'
    if not (folder / 'meta.json').exists():
        there = ', '.join(sorted(path.parent.name for path in DATA.glob('[!.]*/meta.json'))) or 'none'
        raise ValueError(f'{folder} is missing (prepared: {there}): run "python prepare.py {typed}"')
    try:
        meta = json.loads((folder / 'meta.json').read_text('utf-8'))
        coder = Tokenizer(meta['tokenizer'])
        train, val = (Tokens(folder / f'{split}.bin', coder.dtype) for split in ('train', 'val'))
        if {'train': len(train), 'val': len(val)} != meta['tokens'] or coder.vocab_size != meta['vocab_size']:
            raise ValueError('its files do not fit together')
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f'{folder} is damaged ({error}): '
                         f'run "python prepare.py {typed}"') from None
    return SimpleNamespace(meta=meta, train=train, val=val)

@functools.lru_cache(maxsize=2)
def epoch_starts(epoch, n_tokens, block_size, seed):
    """Where the windows of an epoch begin: next to each other, from a random offset, shuffled"""
    n = max(n_tokens // block_size - 1, 1)
    rng = np.random.default_rng((seed, epoch))
    return rng.integers(n_tokens - n * block_size) + block_size * rng.permutation(n)

def window_starts(first_row, n_rows, n_tokens, block_size, seed):
    """(n_rows,) int64: where rows first_row, ... of the run begin. Nothing but the arguments counts."""
    if n_tokens <= block_size:
        raise ValueError(f'{n_tokens:,} tokens, but block_size {block_size} needs {block_size + 1}: lower it')
    rows = np.arange(first_row, first_row + n_rows)
    n = max(n_tokens // block_size - 1, 1)
    epochs = range(first_row // n, (first_row + n_rows - 1) // n + 1)
    starts = [epoch_starts(e, n_tokens, block_size, seed)[rows[rows // n == e] % n] for e in epochs]
    return np.concatenate(starts)

def batches(tokens, first_row, rows, stride, block_size, seed, device):
    """Endless (x, y), each (rows, block_size) int64 on the device. A thread reads ahead, but not for the CPU,
    where a read takes 60 us, and handing it over more than that."""
    cuda = str(device).startswith('cuda')

    def read(row):
        ids = tokens.read(window_starts(row, rows, len(tokens), block_size, seed), block_size + 1)
        pair = [torch.from_numpy(part.copy()) for part in (ids[:, :-1], ids[:, 1:])]
        return [part.pin_memory() for part in pair] if cuda else pair

    numbers = itertools.count(first_row, stride)
    for x, y in map(read, numbers) if str(device) == 'cpu' else in_order(read, numbers, 1):
        yield x.to(device, non_blocking=cuda), y.to(device, non_blocking=cuda)

def val_batches(tokens, block_size, rows, max_batches=0):
    """(x, y), each (rows, block_size) int64 on the CPU: each token but the first is a target once, -1 pads.
    With max_batches: of more windows than these hold, evenly spaced ones. All batches have the same shape."""
    n = -(-(len(tokens) - 1) // block_size)
    rows, picks = min(rows, n), min(n, max_batches * rows or n)
    picked = np.arange(picks) * n // picks * block_size
    picked = np.pad(picked, (0, -picks % rows), constant_values=len(tokens))
    for first in range(0, picks, rows):
        at = picked[first:first + rows, None] + np.arange(block_size + 1)  # (rows, block_size + 1)
        ids = tokens.read(np.minimum(at, len(tokens) - 1).ravel(), 1).reshape(at.shape)
        y = np.where(at < len(tokens), ids, -1)[:, 1:]
        yield torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(y.copy())

# ----------------------------------------------------------------------------
# what the user sees

def show_list():
    for path in sorted(DATA.glob('[!.]*/meta.json')):
        meta = read_meta(path.parent)
        if meta:
            about = (f'{path.parent.name:16}  {meta["tokenizer"]["kind"]:4}  {meta["vocab_size"]:7,} ids  '
                     f'{sum(meta["tokens"].values()):14,} tokens  from {" ".join(meta["sources"])}')
            print(printable(about)[:100])
    print(__doc__.rstrip())

def show_info(name):
    data = load_dataset(name)
    coder = Tokenizer(data.meta['tokenizer'])
    length = min(len(data.train), 400 if coder.kind == 'char' else 100)
    start = np.random.default_rng().integers(len(data.train) - length + 1)
    first, other = (coder.decode(data.train.read(np.array([at]), length)[0]) for at in (0, start))
    text = (f'{describe(DATA / name, data.meta)}\n\n--- how it begins\n{first}\n\n'
            f'--- a random passage, from token {start:,}\n{other}')
    for line in printable(text).split('\n'):
        print(*regex.findall('.{1,100}', line) or [''], sep='\n')

if __name__ == '__main__':
    set_up_output()
    globals().update(configure(__file__))
    with plain_errors():
        if info:
            show_info(info)
        elif sources:
            prepare(sources, name, tokenizer, vocab_size, val_fraction, max_mb, overwrite)
        else:
            show_list()
