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
from contextlib import suppress
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
max_mb = 0  # keep about this many million bytes; 0: all (a tokenizer may read more)
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
SMALL = 4 << 20  # bytes: up to here, and to 256 characters, 'auto' is the char tokenizer
SAMPLE = 16 << 20  # characters that bpe is trained on, from the beginning of each source,
WORDS = 100_000  # and how many of their words, the most frequent: time and memory depend on it
VAL_MAX = 10_000_000  # tokens: more makes an evaluation slower, not better
RETRY_WAITS = (1, 2)  # seconds: without a network the answer comes quickly

# ----------------------------------------------------------------------------
# tokenizers: another one is a branch in Tokenizer and one in make_tokenizer

class Tokenizer:
    """Text <-> ids, from the plain dict in meta.json and in checkpoints"""

    def __init__(self, meta):
        self.kind = meta['kind']
        self.end_of_text = None
        if self.kind == 'char':
            self.ids = {c: i for i, c in enumerate(meta['chars'])}
            self.table = [c.encode() for c in meta['chars']]  # id -> bytes
            self.vocab_size = len(self.table)
        elif self.kind == 'hf':
            from tokenizers import Tokenizer as HF
            self.hf = HF.from_str(meta['json'])
            self.hf.no_truncation()
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

    def encode(self, text):
        """str -> list of ids. Names of special tokens inside the text are text."""
        if self.kind == 'hf':
            return self.hf.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self.kind != 'char':
            return self.bpe.encode(text, disallowed_special=())
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            raise ValueError(f'the tokenizer does not know the character {error.args[0]!a}: '
                             'leave it out, or train on text that has it') from None

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 (a character cut in two) become U+FFFD, and an id beyond the
        table, as in a padded vocabulary, nothing."""
        if self.kind == 'hf':
            return self.hf.decode([int(i) for i in ids], skip_special_tokens=False)
        return b''.join([self.table[i] for i in ids if i < len(self.table)]).decode('utf-8', 'replace')

    def decoder(self):
        """-> piece(id), the text that this next id completes; piece(None), what is left over at the end"""
        if self.kind == 'hf':
            from tokenizers.decoders import DecodeStream
            stream = DecodeStream(skip_special_tokens=False)
            return lambda id: '' if id is None else stream.step(self.hf, id) or ''
        decode = codecs.getincrementaldecoder('utf-8')('replace').decode
        tokens = dict(enumerate(self.table))
        return lambda id: decode(tokens.get(id, b''), id is None)

def train_bpe(counts, size):
    """Byte-pair encoding (Sennrich et al., arXiv:1508.07909): {word: how often} -> at most `size` tokens.
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
    """{word: how often} in a sample of the text, for which each part is read up to its share. Long words are
    cut, as the time for one grows with its square."""
    counts, read = Counter(), 0
    for i, part in enumerate(parts, 1):
        for text in stream([part], ''):
            if read >= SAMPLE * i / len(parts):
                break
            for word in regex.findall(PATTERN, text):
                counts.update(word[at:at + 32] for at in range(0, len(word), 32))
            read += len(text)
    return dict(counts.most_common(WORDS))

def make_tokenizer(kind, vocab_size, parts):
    """-> the tokenizer's meta, made for this text or taken from a checkpoint, a folder or a data set"""
    size = sum(part.stat().st_size if isinstance(part, Path) else 10**9 for part in parts)  # a guess for rows
    if kind in ('auto', 'char'):
        chars, read = set(), 0
        for text in stream(parts, '\n'):
            chars.update(text)
            read += len(text.encode())
            if kind == 'auto' and read > SMALL:
                break
        else:
            size = read
            if kind == 'char' or len(chars) <= 256:
                return {'kind': 'char', 'chars': ''.join(sorted(chars))}
    if kind in ('auto', 'bpe'):
        counts = count_words(parts)
        # a guess: twice the vocabulary for ten times the text, 2,300 for 1 MB and 8,200 for 100 MB, and a
        # token for each character beyond ASCII, as Chinese would fall into single bytes otherwise
        others = {c for word in counts for c in word if c > '\x7f'}
        chosen = min(65536, round(size ** 0.3 / 8) * 256 + 256 + len(others))
        vocab_size = max(257, vocab_size or chosen)
        print(f'training a vocabulary of {vocab_size:,} tokens ...', flush=True)
        return bpe_meta('bpe', train_bpe(counts, vocab_size - 1))
    if kind == 'gpt2':
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except OSError:
            raise ConnectionError("GPT-2's vocabulary can't be downloaded: use --tokenizer=bpe, or set "
                                  'TIKTOKEN_CACHE_DIR to a folder that holds it') from None
        return bpe_meta('gpt2', [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)])
    from model import hf_tokenizer, load_checkpoint
    if os.path.exists(os.path.join(kind, 'tokenizer.json')):
        return hf_tokenizer(kind)
    if os.path.isfile(kind):
        return load_checkpoint(kind)['tokenizer']
    if kind in data_sets():
        return load_dataset(kind).meta['tokenizer']
    raise ValueError(f'--tokenizer={kind} is not auto, char, bpe or gpt2, nor a checkpoint, a folder with '
                     'tokenizer.json or a prepared data set')

def bpe_meta(kind, tokens):
    ranks = [base64.b64encode(token).decode() for token in tokens]
    return {'kind': kind, 'pattern': PATTERN, 'ranks': ranks, 'special': {END_OF_TEXT: len(ranks)}}

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

# ----------------------------------------------------------------------------
# where the text comes from

def printable(text):
    """The text with control characters and overrides of its direction as escapes: no terminal obeys them."""
    return regex.sub(r'(?![\n\t])[\p{Cc}\p{Cs}\u202a-\u202e\u2066-\u2069]',
                     lambda match: match[0].encode('unicode_escape').decode(), text)

def download(source, folder, part):
    """A URL or a name in DOWNLOADS -> the path of its text, which is fetched once, whole or not at all, by
    way of the file part. ConnectionError if that fails."""
    import requests  # here, because it takes 60 ms, and sample.py does without
    url, sha256 = DOWNLOADS.get(source, (source, None))
    kept = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:16]}.txt'
    path = DATA / source / 'input.txt' if sha256 else kept
    if path.exists():
        return path
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
    return part.rename(path)

def find_parts(source, folder, new):
    """What the user typed -> paths of texts, or ['hf:...']. What is made or fetched goes through `new`."""
    if source.startswith('hf:'):
        return [source]
    if source == 'pydoc':
        from pydoc_data.topics import topics
        path = new / 'pydoc.txt'
        path.write_bytes(('\n\n'.join(topics[key].strip() for key in sorted(topics)) + '\n').encode())
        return [path]
    if source in DOWNLOADS or source.startswith(('http://', 'https://')):
        return [download(source, folder, new / 'text')]
    if os.path.isdir(source):
        return find_texts(Path(source))
    if os.path.isfile(source):
        return [Path(source)]
    raise ValueError(f'{source} is not a file, folder or URL, nor shakespeare, pydoc or hf:owner/name')

def find_texts(folder):
    """The text files in a folder and below: no hidden ones and, in the current folder, no data/ or out*/."""
    ignored = r'(.*/)?\.'
    if folder.samefile('.'):
        ignored += rf'|{DATA}/|out[^/]*/'
    files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    files = [path for path in files if not regex.match(ignored, path.relative_to(folder).as_posix())]
    texts = []
    for path in files:
        with suppress(ValueError):  # not UTF-8
            if not any('\0' in text for text in read_text(path)):
                texts.append(path)
    print(f'{folder}: {len(texts):,} text files, {len(files) - len(texts):,} others that are left out')
    return texts

def make_name(source):
    """A path, URL or hf: source -> letters, digits, _ and - only, which can't lead out of data/."""
    stem = Path(os.path.abspath(source.split('?')[0])).stem
    return regex.sub(r'[^\w-]+', '-', stem).strip('-')[:60] or 'text'

def read_text(path):
    """The text of a file in pieces, every character as it stands there. They end where a line does, if lines
    are no longer than a piece: so no word is cut."""
    with open(path, encoding='utf-8', newline='') as file:
        try:
            while text := file.read(PIECE) + file.readline(PIECE):
                yield text
        except UnicodeDecodeError:
            raise ValueError(f'{path} is not UTF-8 text') from None

def read_rows(spec):
    """The rows of a Hugging Face data set (train split), streamed, each as a list of one text"""
    from datasets import load_dataset as load
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
    """The texts of all parts, files in pieces; the separator stands between documents, files and rows."""
    documents = ([read_text(part)] if isinstance(part, Path) else read_rows(part) for part in parts)
    for i, texts in enumerate(itertools.chain.from_iterable(documents)):
        if i > 0:
            yield separator
        yield from texts

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
    name = name or make_name(sources[0])
    if not regex.fullmatch(r'[\w-][\w.-]{0,99}', name):
        raise ValueError(f'{name!a} cannot name a data set: use letters, digits, _ and -')
    settings = dict(tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction, max_mb=max_mb)
    folder, new = DATA / name, DATA / f'.{name}.new'
    meta = {'sources': sources, 'settings': settings}
    began = time.time()
    DATA.mkdir(exist_ok=True)
    with FileLock(DATA / f'.{name}.lock'):  # it dies with the process
        try:
            there = load_dataset(name).meta
        except ValueError:  # missing or damaged
            there = {}
        if meta.items() <= there.items() and (folder / 'meta.json').stat().st_mtime > began:
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
    print(describe(name))
    print('to judge a model, look at the bits per byte of its evaluations: lower is better')
    print(f'next: python train.py --dataset={name} --minutes=5')
    return folder

def fill(new, parts, meta):
    """Text -> train.bin, val.bin and meta.json in the folder `new`; adds what it finds out to meta."""
    settings = meta['settings']
    meta['tokenizer'] = make_tokenizer(settings['tokenizer'], settings['vocab_size'], parts)
    coder = Tokenizer(meta['tokenizer'])
    total, size, sha = 0, 0, hashlib.sha256()

    def encode(text):
        if text is None:
            return np.array([coder.end_of_text], coder.dtype), b''
        return np.array(coder.encode(text), coder.dtype), text.encode()

    texts = stream(parts, '\n' if coder.end_of_text is None else None)
    with open(new / 'train.bin', 'wb') as file:
        for ids, data in in_order(encode, texts, os.cpu_count() or 1):
            file.write(ids)
            sha.update(data)
            total += len(ids)
            size += len(data)
            if sys.stdout.isatty():
                print(f'{size / 1e6:,.0f} MB\r', end='', flush=True)
            if 0 < settings['max_mb'] * 1e6 <= size:
                break
    n_train = max(int(total * (1 - settings['val_fraction'])), total - VAL_MAX)
    if min(n_train, total - n_train) < 2:
        raise ValueError(f'{", ".join(meta["sources"])}: too little text, {n_train:,} tokens for training '
                         f'and {total - n_train:,} for validation (val_fraction {settings["val_fraction"]})')
    val = np.fromfile(new / 'train.bin', coder.dtype, offset=n_train * coder.dtype.itemsize)
    val.tofile(new / 'val.bin')
    os.truncate(new / 'train.bin', n_train * coder.dtype.itemsize)
    val_size = len(coder.decode(val[val != coder.end_of_text]).encode())  # what separates is not in the text
    meta |= {'vocab_size': coder.vocab_size, 'dtype': coder.dtype.name,
             'tokens': {'train': n_train, 'val': len(val)},
             'bytes': {'train': size - val_size, 'val': val_size},
             'source_sha256': sha.hexdigest()}
    (new / 'meta.json').write_text(json.dumps(meta), 'utf-8')

# ----------------------------------------------------------------------------
# data/NAME/ -> batches

def data_sets():
    """Names of what is prepared, the latest first."""
    paths = sorted(DATA.glob('[!.]*/meta.json'), key=os.path.getmtime, reverse=True)
    return [path.parent.name for path in paths]

def load_dataset(name):
    """poems or data/poems -> its meta, train and val: arrays of ids that stay on disk, and readable even if
    the files are replaced or deleted. ValueError where one is missing or damaged."""
    folder = DATA / (Path(name).name if Path(name).parent == DATA else name)
    try:
        meta = json.loads((folder / 'meta.json').read_text('utf-8'))
        train, val = (np.memmap(folder / f'{split}.bin', meta['dtype'], 'r') for split in ('train', 'val'))
        if {'train': len(train), 'val': len(val)} != meta['tokens']:
            raise ValueError('cut short')
    except (OSError, KeyError, ValueError):
        there = ', '.join(data_sets()) or 'none'
        text = folder.name if folder.name in (*DOWNLOADS, 'pydoc') else f'TEXT.txt --name={folder.name}'
        raise ValueError(f'{folder} is missing or damaged (prepared: {there}): '
                         f'run "python prepare.py {text}"') from None
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
    n = max(n_tokens // block_size - 1, 1)
    rows = range(first_row, first_row + n_rows)
    return np.array([epoch_starts(row // n, n_tokens, block_size, seed)[row % n] for row in rows])

def batches(tokens, first_row, rows, stride, block_size, seed, device):
    """Endless (x, y), each (rows, block_size) int64 on the device. A thread reads ahead, but not for the CPU,
    where a read takes 60 us, and handing it over more than that."""
    cuda = str(device).startswith('cuda')

    def read(row):
        starts = window_starts(row, rows, len(tokens), block_size, seed)
        ids = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
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
        ids = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int64)
        y = np.where(at < len(tokens), ids, -1)[:, 1:]
        yield torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(y.copy())

# ----------------------------------------------------------------------------
# what the user sees

def describe(name):
    """Three lines about a data set"""
    meta = json.loads((DATA / name / 'meta.json').read_text('utf-8'))
    train, val, size = meta['tokens']['train'], meta['tokens']['val'], sum(meta['bytes'].values())
    return (f'{DATA / name}: {size:,} bytes from {" ".join(meta["sources"])[:99]}\n'
            f'{meta["tokenizer"]["kind"]} tokenizer, vocabulary of {meta["vocab_size"]:,}, '
            f'{size / (train + val):.2f} bytes per token\n'
            f'{train:,} tokens for training, {val:,} for validation')

def show_info(name):
    """What describe() says, and how both splits begin"""
    data = load_dataset(name)
    coder = Tokenizer(data.meta['tokenizer'])
    print(describe(Path(name).name))
    for split, ids in ('training', data.train[:300]), ('validation', data.val[:300]):
        print(f'\n--- the text for {split} begins\n{printable(coder.decode(ids))}')

if __name__ == '__main__':
    set_up_output()
    globals().update(configure(__file__))
    with plain_errors():
        if info:
            show_info(info)
        elif sources:
            prepare(sources, name, tokenizer, vocab_size, val_fraction, max_mb, overwrite)
        else:
            print(*map(describe, data_sets()), __doc__.rstrip(), sep='\n')
