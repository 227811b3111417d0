"""Turn text into tokens, data/NAME/{train.bin, val.bin, meta.json}, and read batches from them.

    python prepare.py                                  # list the prepared data sets
    python prepare.py shakespeare                      # or pydoc: English that comes with Python
    python prepare.py my.txt more.txt --name=poems     # also folders, URLs, or - for standard input
    python prepare.py chat.jsonl --column=text         # each row is a document
    python prepare.py hf:owner/name                    # also hf:owner/name/configuration@split:column
    python prepare.py my.txt --tokenizer=out/best.pt   # use a checkpoint's tokenizer

The tokens decode to exactly the text, except that lines end with \\n and a byte order mark is dropped.
Documents (files, rows) are separated by the end-of-text token, or by a newline if the tokenizer has none.
Memory use is bounded; during preparation, a copy of the text is kept on disk.
"""
import os
import signal

if __name__ == '__main__':  # exit on Ctrl-C without a traceback, even while torch is being imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import base64
import functools
import glob
import hashlib
import heapq
import itertools
import json
import shutil
import time
from array import array
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
from filelock import FileLock  # comes with torch

from configurator import configure, plain_errors, printable, progress, set_up_output

# ----------------------------------------------------------------------------
# settings
sources = []  # shakespeare, pydoc, files, folders, URLs, hf:owner/name, or - for standard input
name = ''  # folder in data/; empty: made from the first source
column = 'text'  # column that holds the text, in sources with rows
shuffle = True  # shuffle the documents (always in the same way); false: keep their order
tokenizer = 'auto'  # auto, char, bpe (trained on this text), gpt2, or a data set or run to take it from
vocab_size = 0  # tokens in a bpe vocabulary, at least 257; 0: chosen from the size of the text
val_fraction = 0.1  # share of the text, from the end, kept for validation (at most 10 million characters)
max_mb = 0  # stop after about this many million bytes of text; 0: read all
overwrite = False  # replace a data set of the same name that was made from other sources or settings
# ----------------------------------------------------------------------------
DATA = Path('data')
GITHUB = 'https://raw.githubusercontent.com'
DOWNLOADS = {'shakespeare': f'{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'}
KNOWN = (*DOWNLOADS, 'pydoc')  # data sets that train.py prepares if they are missing
# how GPT-2 divides a text into words
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = '<|endoftext|>'
PIECE = 1 << 16  # characters encoded at a time: a million blanks in a row overflow tiktoken's stack
SMALL = 4 << 20  # 'auto' means char up to this many characters, if at most 256 of them are different
SAMPLE = 16 << 20  # characters that bpe is trained on, in evenly spaced pieces,
WORDS = 100_000  # and the number of words, the most frequent ones; both bound time and memory
VAL_MAX = 10_000_000  # characters: more makes an evaluation slower, not better
NGRAM_BYTES = {'train': 4 << 20, 'val': 1 << 20}  # bytes of each split that ngram_bits() reads

# ----------------------------------------------------------------------------
# tokenizers: a new one is a branch in Tokenizer and one in make_tokenizer

class Tokenizer:
    """Text <-> ids, from the plain dict in meta.json and in checkpoints"""

    def __init__(self, meta):
        self.kind = meta['kind']
        self.end_of_text = meta.get('end_of_text')
        if self.kind == 'char':
            self.ids = {c: i for i, c in enumerate(meta['chars'])}
            self.table = [c.encode() for c in meta['chars']]  # id -> bytes
        elif self.kind == 'hf':
            from tokenizers import Tokenizer as HF
            self.hf = HF.from_str(meta['json'])
            self.hf.encode_special_tokens = True  # the name of a special token in a text is text
        else:
            self.table = [base64.b64decode(token) for token in meta['ranks']]
            ranks, self.end_of_text = {token: i for i, token in enumerate(self.table)}, len(self.table)
            self.bpe = tiktoken.Encoding(self.kind, pat_str=meta['pattern'], mergeable_ranks=ranks,
                                         special_tokens={END_OF_TEXT: self.end_of_text})
            self.table.append(END_OF_TEXT.encode())
        self.vocab_size = meta['vocab_size'] if self.kind == 'hf' else len(self.table)
        self.ends = meta.get('ends') or [self.end_of_text]  # each of these ids ends a text
        self.dtype = np.dtype('<u2' if self.vocab_size <= 1 << 16 else '<u4')

    def encode(self, text):
        """str -> list of ids. The name of a special token in the text is text."""
        if self.kind == 'hf':
            return self.hf.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self.kind != 'char':
            return self.bpe.encode(text, disallowed_special=())
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            raise ValueError(f'the tokenizer does not know the character {error.args[0]!r}: '
                             'leave it out, or train on text that has it') from None

    def decode(self, ids):
        """ids -> str. Invalid UTF-8 becomes U+FFFD, an id of a padded vocabulary nothing."""
        if self.kind == 'hf':
            return self.hf.decode([int(i) for i in ids], skip_special_tokens=False)
        return b''.join([self.table[i] for i in ids if i < len(self.table)]).decode('utf-8', 'replace')

    def decode_stream(self, ids):
        """Yield text as soon as the ids so far end with a whole character, and the rest at the end."""
        held = []
        for id in ids:
            held.append(id)
            text = self.decode(held)
            if not text.endswith('\ufffd'):
                held.clear()
                yield text
        yield self.decode(held)

def train_bpe(counts, size):
    """Byte-pair encoding (Sennrich et al., arXiv:1508.07909): {word: how often} -> at most `size` tokens.
    A pair is identified by its merged bytes, as in tiktoken; a merge visits only the words that had it."""
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    times = list(counts.values())
    tokens = {bytes([b]): None for b in range(256)}  # an ordered set
    pairs, where = Counter(), defaultdict(set)  # merged bytes -> how often, and in which words

    def count(i, n):
        for a, b in zip(words[i], words[i][1:]):
            pairs[a + b] += n
            where[a + b].add(i)

    for i, n in enumerate(times):
        count(i, n)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while heap and heap[0][0] < -1 and len(tokens) < size:  # a pair that occurs once is not worth a token
        n, pair = heap[0]
        if -n != pairs[pair]:  # the count has changed since
            heapq.heapreplace(heap, (-pairs[pair], pair))
            continue
        heapq.heappop(heap)
        tokens[pair] = None
        grown = set()
        for i in where.pop(pair):
            word = words[i]
            count(i, -times[i])
            for j in range(len(word)):
                if b''.join(word[j:j + 2]) == pair:
                    word[j:j + 2] = [pair]
            count(i, times[i])
            grown.update(a + b for a, b in zip(word, word[1:]) if pair in (a, b))
        for other in grown:
            heapq.heappush(heap, (-pairs[other], other))
    return list(tokens)

def count_words(texts):
    """{word: how often}. Long words are cut, because the time for a word grows with its length squared."""
    counts = Counter()
    for text in filter(None, texts):  # None separates documents
        for word in regex.findall(PATTERN, text):
            counts.update(word[at:at + 32] for at in range(0, len(word), 32))
    return dict(counts.most_common(WORDS))

def make_tokenizer(kind, vocab_size, read, size):
    """-> the tokenizer's meta: made for the pieces of text that read() yields, `size` characters in all, or
    taken from a data set, a run folder or a checkpoint"""
    if kind == 'char' or (kind == 'auto' and size <= SMALL):
        chars = set()
        for piece in read():
            chars.update(piece or '\n')
        if kind == 'char' or len(chars) <= 256:
            return {'kind': 'char', 'chars': ''.join(sorted(chars))}
    if kind in ('auto', 'bpe'):
        counts = count_words(itertools.islice(read(), 0, None, 1 + size // SAMPLE))
        # a guess: ten times the text, twice the vocabulary (2,300 for 1 MB, 8,200 for 100 MB), and a token
        # for each character beyond ASCII, because Chinese, say, would be spelled in bytes otherwise
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
    if kind in data_sets():
        return load_dataset(kind).meta['tokenizer']
    if os.path.exists(kind):
        from model import load_checkpoint
        return load_checkpoint(kind)['tokenizer']
    raise ValueError(f'--tokenizer={kind} is not auto, char, bpe or gpt2, nor a prepared data set, a run '
                     'folder or a checkpoint')

def bpe_meta(kind, tokens):
    ranks = [base64.b64encode(token).decode() for token in tokens]
    return {'kind': kind, 'pattern': PATTERN, 'ranks': ranks, 'special': {END_OF_TEXT: len(ranks)}}

# ----------------------------------------------------------------------------
# sources -> documents, each an iterator over pieces of text

def find_parts(source, folder, new):
    """A source -> a list of paths, or of the hf: source itself; `folder` keeps downloads."""
    if source.startswith('hf:'):
        return [source]
    if source == 'pydoc':
        from pydoc_data.topics import topics
        path = new / 'pydoc.txt'
        path.write_text('\n\n'.join(text.strip() for _, text in sorted(topics.items())) + '\n', 'utf-8')
        return [path]
    if source in DOWNLOADS or source.startswith(('http://', 'https://')):
        return [download(source, folder, new / 'download')]
    source = '/dev/stdin' if source == '-' else source
    if os.path.exists(source) and not os.path.isdir(source):  # a file or a pipe
        return [Path(source)]
    pattern = f'{glob.escape(source)}/**/*.txt' if os.path.isdir(source) else source
    found = glob.glob(pattern, recursive=True)
    if not found:
        raise ValueError(f'{source} is not a file, a URL, a folder with .txt files, a pattern like '
                         '"src/**/*.py", shakespeare, pydoc, hf:owner/name, or - for standard input')
    return [Path(path) for path in sorted(found)]

def download(source, folder, part):
    """A URL or a name in DOWNLOADS -> the path of its text. ConnectionError if that can't be downloaded."""
    import requests  # here, because it takes 60 ms and sample.py does not need it
    url = DOWNLOADS.get(source, source)
    name = hashlib.sha256(url.encode()).hexdigest()[:16] + Path(url.split('?')[0]).suffix
    path = DATA / source / 'input.txt' if source in DOWNLOADS else folder / name
    if path.exists():
        return path
    print(f'downloading {url} ...', flush=True)
    try:
        with requests.get(url, stream=True, timeout=(3, 30)) as reply, open(part, 'wb') as file:
            reply.raise_for_status()
            for block in reply.iter_content(1 << 16):
                file.write(block)
    except requests.RequestException as error:
        why = printable(error) if isinstance(error, requests.HTTPError) else 'the connection failed'
        raise ConnectionError(f'{url} cannot be downloaded ({why}): try again, or put the text at {path} '
                              f'(mkdir -p {path.parent})') from None
    path.parent.mkdir(exist_ok=True)
    return Path(shutil.move(part, path))

def read_text(path):
    """The text of a UTF-8 file in pieces, without a byte order mark, every line ending with \\n. Pieces end
    with a line, so that no word is cut, unless a line is very long."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            while piece := file.read(PIECE) + file.readline(PIECE):
                yield piece
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not UTF-8 text: leave it out, or convert it, as in '
                         '"iconv -f ENCODING -t UTF-8 OLD > NEW"') from None

def read_json_lines(path):
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise ValueError(f'{path}: line {number:,} is not JSON ({error})') from None

def read_documents(part, column):
    """The documents of a path or hf: source, each an iterator over pieces of text"""
    if isinstance(part, str):
        from datasets import load_dataset as load
        form = r'hf:([^/@:]*/?[^/@:]*)/?([^@:]*)@?([^:]*):?(.*)'
        name, configuration, split, chosen = regex.fullmatch(form, part).groups()
        column = chosen or column
        rows = load(name, configuration or None, split=split or 'train', streaming=True)
    elif part.suffix == '.jsonl':
        rows = read_json_lines(part)
    else:
        yield read_text(part)
        return
    for number, row in enumerate(rows, 1):
        text = row.get(column, 0) if isinstance(row, dict) else 0
        if not isinstance(text, str | None):
            raise ValueError(f'{part}: row {number:,} has no text in column {column!r} (choose another with '
                             f'--column): {row!r:.200}')
        text = (text or '').replace('\r\n', '\n').replace('\r', '\n')
        yield [text[at:at + PIECE] for at in range(0, len(text), PIECE)]

# ----------------------------------------------------------------------------
# documents -> data/NAME/

def copy_text(documents, path, max_bytes):
    """Copy the documents, about max_bytes of them (0: all), to a file: a line of JSON for each piece, and
    null after each document. A pipe or the network can be read only once, the copy several times and in any
    order. -> where each document that is not empty begins in the file, and the number of characters"""
    begins, size = array('q'), 0
    with open(path, 'wb') as file:
        def has_room(_):
            return not 0 < max_bytes <= file.tell()

        for pieces in itertools.takewhile(has_room, documents):
            begin = file.tell()
            for piece in itertools.takewhile(has_room, pieces):
                line = json.dumps(piece, ensure_ascii=False) + '\n'
                file.write(line.encode('utf-8', 'replace'))  # a row may hold half of a surrogate pair
                size += len(piece)
            if file.tell() > begin:
                file.write(b'null\n')
                begins.append(begin)
            progress(f'{size / 1e6:,.0f} MB')
    return np.array(begins), size

def read_copy(path, begins):
    """The pieces that copy_text() wrote of the documents that begin there, and None between documents"""
    with open(path, 'rb') as file:
        for i, begin in enumerate(begins):
            if i > 0:
                yield None
            file.seek(begin)
            yield from map(json.loads, iter(file.readline, b'null\n'))

def split_pieces(pieces, n_train):
    """Pieces of text, None for a separator -> ('train', piece) for the first n_train characters of the text,
    ('val', piece) for the rest"""
    for piece in pieces:
        size = len(piece or '')
        if 0 < n_train < size:
            yield 'train', piece[:n_train]
            yield 'val', piece[n_train:]
        else:
            yield 'train' if n_train > 0 else 'val', piece
        n_train -= size

def in_order(function, items, workers):
    """map() in threads that run only a little ahead; errors surface here."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)

def ngram_bits(train, val):
    """How well tables counted on the bytes of `train` predict those of `val`, in bits per byte: {'1': without
    context, '3': with two bytes of context}. Smoothed by interpolation (Witten and Bell, 1991):
    p(c|ab) = (n(abc) + t(ab) p(c|b)) / (n(ab) + t(ab)), where t(ab) is the number of different bytes that
    follow ab; likewise p(c|b) from p(c), and p(c) from 1/256."""
    text = np.frombuffer(b'\0\0' + train + val, np.uint8).astype(np.int64)  # zeros precede it
    seen, new = slice(len(train)), slice(len(train), None)
    contexts = {'1': 0 * text[2:], '2': text[1:-1], '3': text[:-2] << 8 | text[1:-1]}
    chance, bits = 1 / 256, {}
    for n, context in contexts.items():
        gram = context << 8 | text[2:]
        grams, times = np.unique(gram[seen], return_counts=True)
        at = np.searchsorted(grams, gram[new]).clip(max=len(grams) - 1)
        n_gram = np.where(grams[at] == gram[new], times[at], 0)
        n_context = np.bincount(context[seen], minlength=1 << 16)[context[new]]
        t = np.bincount(grams >> 8, minlength=1 << 16)[context[new]].clip(min=1)  # 0 only if n_context is 0
        chance = (n_gram + t * chance) / (n_context + t)
        bits[n] = float(-np.log2(chance).mean())
    return {'1': bits['1'], '3': bits['3']}

def judged(bits, meta):
    """Bits per byte of the validation text, beside those of ngram_bits()"""
    single, triple = meta['ngram_bits'].values()
    return (f'{bits:.2f} bits per byte of the validation text; predicting each byte from byte frequencies '
            f'takes {single:.2f}, from the two bytes before it {triple:.2f}')

def write_tokens(new, coder, pieces):
    """Encode ('train' or 'val', piece), where a piece of None is a separator, into train.bin and val.bin
    -> what meta.json says of them"""
    def encode(item):
        split, text = item
        if text is None and coder.end_of_text is not None:
            return split, np.array([coder.end_of_text], coder.dtype), b''
        text = text or '\n'
        return split, np.array(coder.encode(text), coder.dtype), text.encode()

    tokens, sizes, sha = Counter(), Counter(), hashlib.sha256()
    beginnings = {'train': bytearray(), 'val': bytearray()}
    with open(new / 'train.bin', 'wb') as train, open(new / 'val.bin', 'wb') as val:
        files = {'train': train, 'val': val}
        for split, ids, text in in_order(encode, pieces, os.cpu_count() or 1):
            files[split].write(ids)
            tokens[split] += len(ids)
            sizes[split] += len(text)
            sha.update(text)
            beginnings[split] += text[:NGRAM_BYTES[split] - len(beginnings[split])]
            progress(f'{sizes.total() / 1e6:,.0f} MB')
    if min(tokens['train'], tokens['val']) < 2:
        raise ValueError(f'too little text: {tokens["train"]} training and {tokens["val"]} validation tokens')
    return {'vocab_size': coder.vocab_size, 'dtype': coder.dtype.name, 'tokens': tokens, 'bytes': sizes,
            'source_sha256': sha.hexdigest(), 'ngram_bits': ngram_bits(**beginnings)}

def fill(new, folder, meta):
    """Write train.bin, val.bin and meta.json to the folder `new`, from the sources and settings in meta."""
    settings = meta['settings']
    rng = np.random.default_rng(0)
    parts = [part for source in meta['sources'] for part in find_parts(source, folder, new)]
    if settings['shuffle']:
        rng.shuffle(parts)  # before max_mb leaves out the last ones
    documents = itertools.chain.from_iterable(read_documents(part, settings['column']) for part in parts)
    begins, size = copy_text(documents, new / 'text', settings['max_mb'] * 10**6)
    if settings['shuffle']:
        rng.shuffle(begins)  # rows, too
    read = functools.partial(read_copy, new / 'text', begins)
    meta['tokenizer'] = make_tokenizer(settings['tokenizer'], settings['vocab_size'], read, size)
    n_train = max(int(size * (1 - settings['val_fraction'])), size - VAL_MAX)
    meta |= write_tokens(new, Tokenizer(meta['tokenizer']), split_pieces(read(), n_train))
    (new / 'meta.json').write_text(json.dumps(meta), 'utf-8')

def prepare(sources, name=name, column=column, shuffle=shuffle, tokenizer=tokenizer, vocab_size=vocab_size,
            val_fraction=val_fraction, max_mb=max_mb, overwrite=overwrite):
    """-> the data set's folder. ValueError for a mistake of the user, ConnectionError if a download fails.
    One process at a time prepares a name; one that waited for it reuses the result if the settings match."""
    sources = [sources] if isinstance(sources, str) else list(sources)
    stem = Path(os.path.abspath(sources[0].split('?')[0])).stem
    name = name or regex.sub(r'[^\w-]+', '-', stem).strip('-')[:60] or 'text'
    if not regex.fullmatch(r'[\w-][\w.-]{0,99}', name):
        raise ValueError(f'{name!a} cannot name a data set: use letters, digits, _ and -')
    settings = dict(column=column, shuffle=shuffle, tokenizer=tokenizer, vocab_size=vocab_size,
                    val_fraction=val_fraction, max_mb=max_mb)
    folder = DATA / name
    new = DATA / f'.{name}.new'
    began = time.time()
    DATA.mkdir(exist_ok=True)
    with FileLock(DATA / f'.{name}.lock'):  # released when the process ends
        path = folder / 'meta.json'
        old = json.loads(path.read_text('utf-8')) if path.exists() else {}
        asked = {'sources': sources, **settings}
        made = {**asked, **old.get('settings', {}), 'sources': old.get('sources', sources)}
        changes = [f'{key}={made[key]}' for key in asked if made[key] != asked[key]]
        if old and not changes and path.stat().st_mtime > began:
            return folder
        if changes and not overwrite:
            raise ValueError(f'{folder} was made with {", ".join(changes)[:200]}: choose another --name, or '
                             'replace it with --overwrite (a run on it can then no longer be resumed)')
        shutil.rmtree(new, ignore_errors=True)  # of a preparation that was killed
        new.mkdir()
        try:
            fill(new, folder, {'sources': sources, 'settings': settings})
            folder.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)  # from here on the data set counts as missing
            for file in ('train.bin', 'val.bin', 'meta.json'):
                shutil.move(new / file, folder / file)  # the folder may be a link to another disk
        finally:
            shutil.rmtree(new)
    print(describe(name))
    return folder

def fetch(name, offline=''):
    """-> `name`, after preparing it if it is known but missing, or `offline` if its download fails"""
    try:
        if name in KNOWN and name not in data_sets():
            prepare(name)
        return name
    except ConnectionError as error:
        if not offline:
            raise ValueError(f'{error}; or train on your own text (python prepare.py my.txt), or on '
                             '--dataset=pydoc, which needs no network') from None
        print(f'{name} could not be fetched: {error}')
        print(f'training on {offline} instead, as offline_dataset says')
        return fetch(offline)

# ----------------------------------------------------------------------------
# data/NAME/ -> batches

def data_sets():
    """Names of what is prepared, the latest first."""
    paths = sorted(DATA.glob('[!.]*/meta.json'), key=os.path.getmtime, reverse=True)
    return [path.parent.name for path in paths]

def load_dataset(name):
    """poems or data/poems -> its meta, train and val: arrays of ids that stay on disk, and readable even if
    the files are replaced or deleted. ValueError where one is missing or damaged."""
    folder = DATA / Path(name).name
    try:
        meta = json.loads((folder / 'meta.json').read_text('utf-8'))
        train, val = (np.memmap(folder / f'{split}.bin', meta['dtype'], 'r') for split in ('train', 'val'))
        if {'train': len(train), 'val': len(val)} != meta['tokens'] or not meta['ngram_bits']:
            raise ValueError('cut short')
    except (OSError, KeyError, ValueError):
        text = folder.name if folder.name in KNOWN else f'TEXT.txt --name={folder.name}'
        raise ValueError(f'{folder} is missing or damaged (prepared: {", ".join(data_sets()) or "none"}): '
                         f'run "python prepare.py {text}"') from None
    return SimpleNamespace(meta=meta, train=train, val=val)

def known():
    """Names that train.py's --dataset takes: what is prepared, and what is prepared where it is missing."""
    return list(dict.fromkeys([*data_sets(), *KNOWN]))

def find(answer):
    """The name of a data set, prepared if it is missing, or the path of a text -> the name."""
    return answer if answer in data_sets() else prepare(answer).name

def text_id(data):
    """What a resumed run must find again: the text, and where validation begins in it."""
    return f'{data.meta["source_sha256"]} {data.meta["tokens"]["train"]}'

def check_fits(data, config):
    """ValueError unless the model of config can read the data set."""
    if config['vocab_size'] < data.meta['vocab_size']:
        raise ValueError(f'vocab_size is {config["vocab_size"]}, the data needs {data.meta["vocab_size"]}')
    for split, tokens in (('train', data.train), ('val', data.val)):
        if len(tokens) <= config['block_size']:
            raise ValueError(f'{split} has {len(tokens):,} tokens, block_size {config["block_size"]} needs '
                             f'{config["block_size"] + 1}: lower block_size or give more text')

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
    """Endless (x, y), each (rows, block_size) int64 on the device. Threads read two ahead, but not for the
    CPU, where a read takes 60 us, and handing it over more than that."""
    cuda = str(device).startswith('cuda')

    def read(row):
        starts = window_starts(row, rows, len(tokens), block_size, seed)
        ids = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
        pair = [torch.from_numpy(part.copy()) for part in (ids[:, :-1], ids[:, 1:])]
        return [part.pin_memory() for part in pair] if cuda else pair

    numbers = itertools.count(first_row, stride)
    for x, y in map(read, numbers) if str(device) == 'cpu' else in_order(read, numbers, 2):
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
    return (f'{DATA / name}: {size:,} bytes from {printable(" ".join(meta["sources"])[:99])}\n'
            f'{meta["tokenizer"]["kind"]} tokenizer, vocabulary of {meta["vocab_size"]:,}, '
            f'{size / (train + val):.2f} bytes per token\n'
            f'{train:,} tokens for training, {val:,} for validation')

if __name__ == '__main__':
    set_up_output()
    settings, _ = configure(__file__, allowed={'val_fraction': (0, 1)})
    with plain_errors():
        if settings['sources']:
            folder = prepare(**settings)
            print(f'next: python train.py --dataset={folder.name} --minutes=5')
        else:
            print(*map(describe, data_sets()), __doc__.rstrip(), sep='\n')
