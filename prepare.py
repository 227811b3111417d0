"""
Text in, tokens out, and batches read back from there: data/NAME/ with train.bin, val.bin and meta.json.

    python prepare.py                                    # what is prepared, what can be
    python prepare.py shakespeare                        # or pydoc: English that every Python carries, needs no network
    python prepare.py my.txt more.txt --name=poems       # also folders, URLs of text files, hf:owner/name:column
    python prepare.py my.txt --tokenizer=out/best.pt     # with a checkpoint's tokenizer, to go on from its weights
    python prepare.py --info=poems                       # numbers and passages of a prepared data set

Every text round-trips exactly, line ends and byte order marks too; what is not UTF-8 is refused. Between documents
(files, rows) stands the end-of-text token, or a newline where characters are the tokens. Memory stays bounded however
long the text is: about 150 MB and 30 MB for each core, over what PyTorch takes to import.
"""
import base64
import codecs
import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urljoin, urlsplit

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch

from configurator import configure, plain_errors, stop

# -----------------------------------------------------------------------------
sources = []        # what to prepare: shakespeare, pydoc, text files, folders, URLs, hf:owner/name[:column]
name = ''           # folder in data/, made from the first source where not given
tokenizer = 'auto'  # char | bpe (trained on this text) | gpt2 | auto | that of a checkpoint (path) or data set (name)
vocab_size = 8192   # of bpe, end-of-text token included: 512 to 65536, more for more text
val_fraction = 0.1  # of the tokens, from the end, are for validation (10 million at most)
max_mb = 0          # read only so many million characters, from the beginning, of streams without end (0: all)
info = ''           # name of a prepared data set to look at
# -----------------------------------------------------------------------------

DATA = Path('data')
DOWNLOADS = {'shakespeare': (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')}
# GPT-2's. None of its tokens holds a whitespace character after another kind of character: see read_text.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = '<|endoftext|>'
PIECE = 1 << 20              # bytes read, and characters encoded, at a time
SMALL = 4                    # pieces: up to here 'auto' considers the char tokenizer
SAMPLE = 32                  # pieces that bpe is trained on, from the beginning of each source
SHARD = 400                  # pieces in a file: about 100 million tokens of bpe; an interrupted run keeps whole files
VAL_MAX = 10_000_000         # tokens: more makes an evaluation slower, not better
CHECKED = 30_000_000         # tokens: up to here load_dataset verifies each
DOWNLOAD_LIMIT = 20 * 10**9  # bytes
RETRY_WAITS = (1, 2)         # seconds: without a network the answer comes quickly
PATIENCE = 30                # seconds before a slow server is given up
PRESETS = {'tiny': 10, 'small': 25, 'medium': 80, 'large': 350}  # million parameters, about: see model.py


# -----------------------------------------------------------------------------
# tokenizers

class Tokenizer:
    """Text <-> ids, from the plain dict in meta.json and in checkpoints; ValueError if that is malformed."""

    def __init__(self, meta):
        try:
            self.kind = meta['kind']
            if self.kind == 'char':
                self.table, special, needed = [c.encode() for c in meta['chars']], {}, set()  # id -> bytes
                self.ids = {c: i for i, c in enumerate(meta['chars'])}
            else:
                self.table = [base64.b64decode(token, validate=True) for token in meta['ranks']]
                special, needed = dict(meta['special']), {bytes([b]) for b in range(256)}
                self.bpe = tiktoken.Encoding(self.kind, pat_str=meta['pattern'], special_tokens=special,
                                             mergeable_ranks={token: i for i, token in enumerate(self.table)})
            distinct = set(self.table)
            if not distinct or len(distinct) < len(self.table) or not needed <= distinct \
                    or special not in ({}, {END_OF_TEXT: len(self.table)}):
                raise ValueError('tokens are missing, or there twice')
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f'the tokenizer is malformed ({type(error).__name__}: {error})') from None
        self.end_of_text = special.get(END_OF_TEXT)
        self.table += [token.encode() for token in special]
        self.vocab_size = len(self.table)
        self.dtype = np.dtype('<u2' if self.vocab_size <= 1 << 16 else '<u4')

    def encode(self, text):
        """str -> list of ids. Names of special tokens inside the text are text."""
        text.encode()  # refuses half a surrogate pair, which tiktoken would replace in silence
        if self.kind != 'char':
            return self.bpe.encode(text, disallowed_special=())
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            raise ValueError(f'the tokenizer does not know the character {error.args[0]!a}: leave it out, or train on '
                             'text that has it') from None

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return b''.join([self.table[i] for i in ids]).decode('utf-8', 'replace')

    def token_bytes(self, id):
        return self.table[id]


def train_bpe(counts, size):
    """Byte-pair encoding (Sennrich et al., arXiv:1508.07909): Counter of words -> at most `size` tokens, bytes.

    A pair is known by the bytes it makes, as for tiktoken. Only words that hold the merged pair are looked at again.
    """
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    times = list(counts.values())
    tokens = {bytes([b]): None for b in range(256)}             # an ordered set
    pairs, where, changed = Counter(), defaultdict(set), set()  # merged bytes -> how often, and in which words

    def count(i, sign):
        for a, b in zip(words[i], words[i][1:]):
            pairs[a + b] += sign * times[i]
            where[a + b].add(i)
            changed.add(a + b)

    for i in range(len(words)):
        count(i, 1)
    heap = [(-pairs[pair], pair) for pair in changed]
    heapq.heapify(heap)
    while heap and heap[0][0] < -1 and len(tokens) < size:  # what occurs once is not worth a token
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:  # the count has changed since
            continue
        tokens[pair] = None
        changed.clear()
        for i in where.pop(pair):
            count(i, -1)
            rest, words[i] = iter(zip(words[i], [*words[i][1:], b''])), []
            for a, b in rest:
                words[i].append(pair if a + b == pair else a)
                if a + b == pair and b:
                    next(rest)
            count(i, 1)
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
    return list(tokens)


def make_tokenizer(kind, vocab_size, parts):
    """-> the tokenizer's meta"""
    if kind not in ('auto', 'char', 'bpe', 'gpt2'):
        return load_tokenizer(kind)
    if kind in ('auto', 'char'):
        pieces = stream(parts, '\n') if kind == 'char' else itertools.islice(stream(parts, '\n'), SMALL + 1)
        alphabets = [set().union(*(text for _, text in piece)) for piece in pieces]
        chars = set().union(*alphabets)
        if kind == 'char' or len(alphabets) <= SMALL and len(chars) <= 256:
            return {'kind': 'char', 'chars': ''.join(sorted(chars))}
    if kind == 'gpt2':
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except OSError:
            raise ConnectionError("GPT-2's vocabulary can't be downloaded: set TIKTOKEN_CACHE_DIR to a folder with it, "
                                  'or use --tokenizer=bpe') from None
        tokens = [gpt2.decode_single_token_bytes(i) for i in range(50256)]
    else:
        counts, read, share = Counter(), 0, max(SAMPLE // len(parts), 1)
        for piece in (piece for part in parts for piece in itertools.islice(stream([part], '\n'), share)):
            for _, text in piece:
                counts.update(regex.findall(PATTERN, text))
                read += len(text)
            if read >= SAMPLE * PIECE:
                break
        print(f'training a vocabulary of {vocab_size:,} on {read:,} characters ...', flush=True)
        tokens = train_bpe(Counter({word[:64]: n for word, n in counts.items()}), vocab_size - 1)
    ranks = [base64.b64encode(token).decode() for token in tokens]
    return {'kind': 'gpt2' if kind == 'gpt2' else 'bpe', 'pattern': PATTERN, 'ranks': ranks,
            'special': {END_OF_TEXT: len(ranks)}}


def load_tokenizer(source):
    """The tokenizer of a checkpoint or of a prepared data set, for text that a trained model shall go on with."""
    try:
        if os.path.isfile(source):
            return torch.load(source, map_location='cpu', weights_only=True)['tokenizer']
        return load_dataset(source).meta['tokenizer']
    except Exception as error:  # what is no checkpoint fails in many ways
        raise ValueError(f'--tokenizer={source}: not auto, char, bpe or gpt2, a checkpoint or a prepared data set '
                         f'({type(error).__name__})') from None


# -----------------------------------------------------------------------------
# where the text comes from

def printable(text):
    """The text with control characters and overrides of its direction as escapes, so that no terminal obeys them."""
    return re.sub('[^\n\t -~\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]',
                  lambda match: match[0].encode('unicode_escape').decode(), text)


@contextmanager
def whole(path):
    """A file to write, which gets its name when all of it is on the disk."""
    part = path.with_name(f'{path.name}.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, 'w+b') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def progress(what, total):
    """-> a function to call with the bytes done so far, which prints them now and then, and the time left."""
    began = shown = time.time()

    def show(done):
        nonlocal shown
        if time.time() - shown > 5:
            shown = time.time()
            seconds = (total - done) * (shown - began) / max(done, 1)
            left = f' of {total / 1e6:,.0f}, {seconds:,.0f} s left' if total else ''
            print(f'{what}: {done / 1e6:,.0f} MB{left}', flush=True)
    return show


def stay_secure(response, **_):
    target = urljoin(response.url, response.headers.get('location', ''))
    if response.is_redirect and response.url.startswith('https:') and not target.startswith('https:'):
        raise ValueError(f'{response.url} leads from https to {target}: not followed')


def download(url, path, sha256=''):
    """url -> path, whole or not at all. ConnectionError where the network is at fault, else ValueError."""
    import requests  # here, because it takes 60 ms, and sample.py does without
    from urllib3.exceptions import HTTPError
    etag = None  # the version that the file holds the beginning of
    with whole(path) as file:
        for wait in (*RETRY_WAITS, None):
            headers = {'Range': f'bytes={file.tell()}-', 'If-Range': etag} if etag and file.tell() else {}
            try:
                with requests.get(url, headers={'Accept-Encoding': 'identity', **headers}, stream=True, timeout=(3, 30),
                                  hooks={'response': stay_secure}) as reply:
                    if reply.status_code == 429 or reply.status_code >= 500:
                        raise requests.RequestException(f'it answered {reply.status_code}')
                    if reply.status_code == 200:  # all of it, from the beginning
                        file.seek(0)
                        file.truncate()
                    elif not reply.headers.get('content-range', '').startswith(f'bytes {file.tell()}-'):
                        raise ValueError(f'{url} answered {reply.status_code} {reply.reason}')
                    etag, start, began = reply.headers.get('etag'), file.tell(), time.time()
                    total = start + int(reply.headers.get('content-length', -start))
                    show = progress('fetching', total)
                    while max(file.tell(), total) <= DOWNLOAD_LIMIT and (block := reply.raw.read1(1 << 16)):
                        file.write(block)
                        show(file.tell())
                        if file.tell() - start < 1000 * (time.time() - began - PATIENCE):
                            raise requests.RequestException('it sends less than 1 kB a second')
                break
            except (requests.RequestException, HTTPError) as error:
                if isinstance(error, ValueError):  # an address that no attempt will mend
                    raise
                if wait is None or isinstance(error, requests.ConnectTimeout):
                    why = error if type(error) is requests.RequestException else 'the connection failed'
                    raise ConnectionError(f'{url} cannot be downloaded ({why}): try again, or put the text at {path}'
                                          ) from None
                time.sleep(wait)
        if max(file.tell(), total) > DOWNLOAD_LIMIT:
            raise ValueError(f'{url} is larger than the limit of {DOWNLOAD_LIMIT:,} bytes')
        file.flush()
        if sha256 and hash_files(file.name) != sha256:
            raise ValueError(f'{url} sent another text than expected (its sha256 is not {sha256[:12]}...)')


def hash_files(*paths):
    sha = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as file:
            while block := file.read(PIECE):
                sha.update(block)
    return sha.hexdigest()


def find_parts(source, folder):
    """What the user typed -> what to read, in order: paths, or 'hf:...' as it is. Downloads what is not there yet."""
    path = Path(source)
    if source.startswith('hf:'):
        return [source]
    if source in DOWNLOADS:
        path, (url, sha256) = DATA / source / 'input.txt', DOWNLOADS[source]
        if not path.exists():
            download(url, path, sha256)
        elif hash_files(path) != sha256:
            print(f'{path} is not the usual text of that name (another sha256), and is taken as it is')
    elif source == 'pydoc':
        from pydoc_data.topics import topics
        path = DATA / source / 'input.txt'
        with whole(path) as file:
            file.write(('\n\n'.join(topics[key].strip() for key in sorted(topics)) + '\n').encode())
    elif source.startswith(('http://', 'https://')):
        path = folder / f'{hashlib.sha256(source.encode()).hexdigest()[:16]}.txt'
        if not path.exists():
            download(source, path)
    elif path.is_dir():
        found = [p for p in sorted(path.rglob('*')) if p.is_file() and '/.' not in f'/{p.relative_to(path).as_posix()}']
        texts = [p for p in found if b'\0' not in open(p, 'rb').read(4096)]
        print(printable(f'{source}: {len(texts)} text files, {len(found) - len(texts)} other files left out'))
        return texts
    elif not path.is_file():
        raise ValueError(f'{source} is no file or folder, nor {", ".join(DOWNLOADS)}, pydoc, a URL or hf:owner/name')
    return [path]


def make_name(source):
    """A path, URL or hf: source -> letters, digits, _ and - only, which can't lead out of data/."""
    path = urlsplit(source).path if '://' in source else source.removeprefix('hf:').split(':')[0]
    return re.sub(r'[^\w-]+', '-', Path(path).stem or Path(path).absolute().name).strip('-')[:60] or 'text'


def read_text(path):
    """The text of a file in pieces, every character as it stands there.

    It is cut before a space or newline that follows something else, where no token can lie across. Where a megabyte has
    no such place it is cut anyway: a token more, and the same text when decoded.
    """
    decode, text, data = codecs.getincrementaldecoder('utf-8')().decode, '', True
    with open(path, 'rb') as file:
        while data:
            data = file.read(PIECE)
            try:
                text += decode(data, not data)
            except UnicodeDecodeError as error:
                byte, offset = error.object[error.start], file.tell() - len(error.object) + error.start
                raise ValueError(f'{path} is not UTF-8 text (byte {byte:#04x} at offset {offset})') from None
            match = re.match(r'(?s).*\S(?=[ \n])', text) if data else None
            cut = match.end() if match else len(text)
            yield text[:cut]
            text = text[cut:]


def read_rows(spec):
    """The rows of a Hugging Face data set (train split), streamed."""
    try:
        from datasets import load_dataset as load
    except ImportError:
        raise ValueError('hf: needs the package datasets: pip install datasets') from None
    name, _, column = spec.removeprefix('hf:').partition(':')
    column = column or 'text'
    for row in load(name, split='train', streaming=True):
        if not isinstance(row.get(column), str):
            raise ValueError(f'{spec}: no text in column {column}; write hf:{name}:COLUMN with one of {", ".join(row)}')
        yield row[column]


def stream(parts, separator):
    """Pieces, lists of (part, text) of about PIECE characters together; the separator stands between documents."""
    piece, size = [], 0
    documents = ((p, texts) for p in parts for texts in (zip(read_rows(p)) if isinstance(p, str) else [read_text(p)]))
    for i, (part, texts) in enumerate(documents):
        for text in itertools.chain([separator] * (i > 0), texts):
            piece.append((part, text))
            size += len(text or '')
            if size >= PIECE:
                yield piece
                piece, size = [], 0
    if piece:
        yield piece


def in_order(function, items, workers):
    """map() with threads that run only a little ahead (tiktoken works without Python's lock); errors surface here."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


# -----------------------------------------------------------------------------
# text -> data/NAME/

def prepare(sources, name=name, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction, max_mb=max_mb):
    """-> the data set's folder. ValueError for what a user can mend, ConnectionError where a download failed.

    All is written in data/NAME/new-..., and put in place at the end. What an interrupted run with the same sources and
    settings has left there, its tokenizer and whole shards, is used again.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    name = name or make_name(sources[0])
    if not re.fullmatch(r'[\w-][\w.-]{0,99}', name):
        raise ValueError(f'{name!a} cannot be the name of a data set: use letters, digits, _ and -')
    if not (257 <= vocab_size <= 1 << 20 and 0 < val_fraction < 1 and max_mb >= 0):
        raise ValueError(f'out of range: vocab_size {vocab_size} (257 to {1 << 20}), val_fraction {val_fraction} '
                         f'(between 0 and 1) or max_mb {max_mb} (0 or more)')
    folder = DATA / name
    put_in_place(folder)
    parts = [part for source in sources for part in find_parts(source, folder)]
    if not any(isinstance(part, str) or part.stat().st_size for part in parts):
        raise ValueError(f'{", ".join(sources)}: no text in there')
    versions = [(str(part), isinstance(part, Path) and part.stat().st_mtime) for part in parts]
    key = hashlib.sha256(repr((versions, tokenizer, vocab_size, max_mb)).encode()).hexdigest()
    new = folder / f'new-{key[:8]}'
    record = new / 'tokenizer.json'
    if not record.exists():
        for unfinished in folder.glob('new-*'):
            shutil.rmtree(unfinished)
        made = make_tokenizer(tokenizer, vocab_size, parts)
        with whole(record) as file:
            file.write(json.dumps(made).encode())
    meta = {'sources': sources, 'tokenizer': json.loads(record.read_text('utf-8'))}
    coder = Tokenizer(meta['tokenizer'])
    text = write_shards(parts, coder, new, max_mb)

    record.unlink()  # from here on the shards are changed: the end of the last ones becomes val.bin
    shards, begin, val = sorted(new.glob('train_*.bin')), 0, []
    total = sum(path.stat().st_size for path in shards) // coder.dtype.itemsize
    n_train = max(int(total * (1 - val_fraction)), total - VAL_MAX)
    if len(text.distinct) < 2 or min(n_train, total - n_train) < 2:
        shutil.rmtree(new)
        raise ValueError(f'{", ".join(sources)}: too little to learn from: {text.characters:,} characters, '
                         f'{len(text.distinct)} of them distinct, {n_train:,} + {total - n_train:,} tokens')
    for path in shards:
        size = path.stat().st_size
        kept = min(max(n_train * coder.dtype.itemsize - begin, 0), size)  # bytes
        val.append(np.fromfile(path, coder.dtype, offset=kept))
        os.truncate(path, kept) if kept else path.unlink()
        begin += size
    if len(shards) == 1:
        shards[0].rename(new / 'train.bin')
    val = np.concatenate(val)
    with whole(new / 'val.bin') as file:
        file.write(val.tobytes())
    times = enumerate(np.bincount(val).tolist())
    val_bytes = sum(n * len(coder.table[id]) for id, n in times if id != coder.end_of_text)
    meta |= {'vocab_size': coder.vocab_size, 'dtype': coder.dtype.name, 'characters': text.characters,
             'tokens': {'train': n_train, 'val': len(val)},
             'bytes': {'train': text.bytes - val_bytes, 'val': val_bytes},
             'source_sha256': text.sha.hexdigest(),
             'sha256': hash_files(*sorted(new.glob('train*.bin')), new / 'val.bin')}
    with whole(new / 'meta.json') as file:
        file.write(json.dumps(meta).encode())
    new.rename(folder / 'ready')
    put_in_place(folder)

    odd = sorted(c for c in text.distinct if not c.isprintable() and c not in '\t\n' or c == '\ufffd')
    fits = [preset for preset, millions in PRESETS.items() if 20 * millions <= 4 * n_train / 1e6]
    print(f'{folder}: {text.characters:,} characters, {len(text.distinct):,} of them distinct -> {total:,} tokens\n'
          f'tokenizer {coder.kind}; vocabulary {coder.vocab_size:,}; {text.characters / total:.2f} characters a token\n'
          f'train {n_train:,} tokens, val {len(val):,}')
    if odd:
        print('kept as they are:', ascii(''.join(odd[:20])), 'and more' * (len(odd) > 20))
    print(f'feeds --model_preset={fits[-1]} (20 tokens a parameter, in up to 4 epochs)' if fits else
          'feeds a model of about a million parameters, like config/train_shakespeare.py: a larger one overfits')
    print(f'next: python train.py --dataset={name}')
    return folder


def write_shards(parts, coder, new, max_mb):
    """The text as tokens in train_00000.bin, ... -> its characters, bytes, distinct characters and sha256.

    The text of shards that are whole already is only read: that is quick, and the numbers come out the same.
    """
    seen = SimpleNamespace(characters=0, bytes=0, distinct=set(), sha=hashlib.sha256())
    done = len(list(new.glob('train_*.bin')))
    files = [part for part in parts if isinstance(part, Path)]
    show = progress('tokenizing', sum(path.stat().st_size for path in files) if len(files) == len(parts) else 0)
    separator = '\n' if coder.end_of_text is None else None

    def read():
        for i, piece in enumerate(itertools.islice(stream(parts, separator), max_mb or None)):
            text = ''.join(text or '' for _, text in piece)
            data = text.encode()
            seen.sha.update(data)
            seen.distinct.update(text)
            seen.characters += len(text)
            seen.bytes += len(data)
            show(seen.bytes)
            if i >= done * SHARD:
                yield piece

    def encode(piece):
        ids = []
        for part, text in piece:
            try:
                ids.append(np.array([coder.end_of_text] if text is None else coder.encode(text), coder.dtype))
            except ValueError as error:
                raise ValueError(f'{part}: {error}') from None
        return b''.join(ids)

    numbered = enumerate(in_order(encode, read(), os.cpu_count() or 1), done * SHARD)
    for i, shard in itertools.groupby(numbered, lambda pair: pair[0] // SHARD):
        with whole(new / f'train_{i:05d}.bin') as file:
            file.writelines(data for _, data in shard)
    return seen


def put_in_place(folder):
    """NAME/ready, a complete data set, takes the place of that in NAME; what a crash cuts short, the next call ends."""
    ready = folder / 'ready'
    if (ready / 'meta.json').exists():  # so nothing has been moved yet
        for path in folder.glob('*.bin'):
            path.unlink()
        os.replace(ready / 'meta.json', folder / 'meta.json')
    if ready.exists():
        for path in ready.iterdir():
            os.replace(path, folder / path.name)
        ready.rmdir()


# -----------------------------------------------------------------------------
# data/NAME/ -> batches

class Tokens:
    """One stream of ids over memory-mapped files, mapped anew now and then: pages once read would count as memory."""

    def __init__(self, paths, dtype):
        self.paths, self.dtype = paths, dtype
        self.map()
        self.ends = np.cumsum([len(ids) for ids in self.maps])

    def map(self):
        self.maps, self.rows_read = [np.memmap(path, self.dtype, 'r').view(np.ndarray) for path in self.paths], 0

    def __len__(self):
        return int(self.ends[-1])

    def read(self, starts, length):
        """(N,) int64 -> (N, length) int64; a window may lie across files."""
        self.rows_read += len(starts)
        if self.rows_read > 1024:
            self.map()
        at = starts[:, None] + np.arange(length)        # (N, length)
        file = np.searchsorted(self.ends, at, 'right')  # (N, length)
        ids = np.empty(at.shape, np.int64)
        for i in np.flatnonzero(np.bincount(file.ravel())):
            here = file == i
            ids[here] = self.maps[i][at[here] - self.ends[i]]  # negative: counted from the file's end
        return ids


def load_dataset(name):
    """A name in data/, or a folder -> its meta, train and val. ValueError for whatever is missing or wrong."""
    folder = Path(name) if os.path.isdir(name) and not (DATA / name).exists() else DATA / name
    typed = folder.name if folder.name in (*DOWNLOADS, 'pydoc') else f'TEXT.txt --name={folder.name}'
    try:
        put_in_place(folder)
        data = SimpleNamespace(meta=json.loads((folder / 'meta.json').read_text('utf-8')))
        coder = Tokenizer(data.meta['tokenizer'])
        data.train = Tokens(sorted(folder.glob('train*.bin')) or [folder / 'train.bin'], coder.dtype)
        data.val = Tokens([folder / 'val.bin'], coder.dtype)
        counts = {'train': len(data.train), 'val': len(data.val)}
        if counts != data.meta['tokens'] or not data.meta['bytes']['val'] > 0:
            raise ValueError(f'there are {counts} tokens, not {data.meta["tokens"]}: cut short, or of another data set')
        if data.meta['vocab_size'] != coder.vocab_size:
            raise ValueError(f'vocab_size is {data.meta["vocab_size"]}, but the tokenizer has {coder.vocab_size}')
        for tokens in (data.train, data.val):
            largest = tokens.read(np.linspace(0, len(tokens) - 1, 10_000).astype(np.int64), 1).max()
            if largest >= coder.vocab_size:
                raise ValueError(f'{tokens.paths[0].name} holds the id {largest}, the vocabulary {coder.vocab_size}')
        if sum(counts.values()) <= CHECKED and hash_files(*data.train.paths, *data.val.paths) != data.meta['sha256']:
            raise ValueError('the tokens are not those that meta.json was written for')
    except FileNotFoundError as error:
        raise ValueError(f'{error.filename} is missing: run "python prepare.py {typed}" first') from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f'{folder} is no sound data set ({type(error).__name__}: {error}): '
                         f'run "python prepare.py {typed}" again') from None
    return data


@functools.lru_cache(maxsize=2)
def epoch_starts(epoch, n_tokens, block_size, seed):
    """Where the windows of an epoch begin, in reading order: next to each other, from a random offset, shuffled."""
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
    return np.concatenate([epoch_starts(e, n_tokens, block_size, seed)[rows[rows // n == e] % n] for e in epochs])


def batches(tokens, first_row, rows, stride, block_size, seed, device):
    """Endless (x, y), each (rows, block_size) int64 on the device. A thread reads ahead, but not for the CPU: there a
    read takes 60 us, and handing it over more than that."""
    cuda = str(device).startswith('cuda')

    def read(row):
        ids = tokens.read(window_starts(row, rows, len(tokens), block_size, seed), block_size + 1)
        pair = [torch.from_numpy(part.copy()) for part in (ids[:, :-1], ids[:, 1:])]
        return [part.pin_memory() for part in pair] if cuda else pair

    numbers = itertools.count(first_row, stride)
    for x, y in map(read, numbers) if str(device) == 'cpu' else in_order(read, numbers, 1):
        yield x.to(device, non_blocking=cuda), y.to(device, non_blocking=cuda)


def val_batches(tokens, block_size, rows, max_batches=0):
    """(x, y), each (rows, block_size) int64 on the CPU: every token after the first is a target once; -1 is padding.

    With max_batches: of more windows than these hold, evenly spaced ones. All batches have the same shape.
    """
    n = -(-(len(tokens) - 1) // block_size)
    rows, picks = min(rows, n), min(n, max_batches * rows or n)
    picked = np.pad(np.arange(picks) * n // picks * block_size, (0, -picks % rows), constant_values=len(tokens))
    for first in range(0, picks, rows):
        at = picked[first:first + rows, None] + np.arange(block_size + 1)  # (rows, block_size + 1)
        ids = tokens.read(np.minimum(at, len(tokens) - 1).ravel(), 1).reshape(at.shape)
        y = np.where(at < len(tokens), ids, -1)[:, 1:]
        yield torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(y.copy())


# -----------------------------------------------------------------------------
# what the user sees

def show_list():
    for path in sorted(DATA.glob('*/meta.json')):
        try:
            meta, size = json.loads(path.read_text('utf-8')), sum(p.stat().st_size for p in path.parent.glob('*.bin'))
            about = (f'{meta["tokenizer"]["kind"]:5} {meta["vocab_size"]:9,} ids {sum(meta["tokens"].values()):14,} '
                     f'tokens {size / 1e6:9,.1f} MB  from {" ".join(meta["sources"])[:60]}')
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
            about = 'its meta.json cannot be read'
        print(printable(f'{path.parent.name:20} {about}'))
    print(__doc__[__doc__.index('\n\n'):__doc__.index('\n\nEvery')])


def show_info(name):
    data, rng = load_dataset(name), np.random.default_rng()
    coder = Tokenizer(data.meta.pop('tokenizer'))
    for key, value in data.meta.items():
        print(printable(f'{key:13}  {value}'))
    length = min(len(data.train), 400 if coder.kind == 'char' else 100)
    for title, start in ('first', 0), ('a random', rng.integers(len(data.train) - length + 1)):
        passage = coder.decode(data.train.read(np.array([start]), length)[0])
        print(f'\n--- {title} passage, from token {start:,}\n{printable(passage)}')
    title, tokens = 'characters', coder.table[:2000]
    if coder.kind != 'char':
        title, tokens = 'longest tokens', sorted(coder.table[:coder.end_of_text], key=len)[:-31:-1]
    print(f'\n--- {title}\n' + '  '.join(repr(printable(token.decode('utf-8', 'replace'))) for token in tokens))


if __name__ == '__main__':
    globals().update(configure(__file__))
    sys.stdout.reconfigure(errors='backslashreplace')
    with plain_errors():
        try:
            if info:
                show_info(info)
            elif sources:
                prepare(sources, name, tokenizer, vocab_size, val_fraction, max_mb)
            else:
                show_list()
        except KeyboardInterrupt:
            stop('interrupted: data/ is unharmed, and the same command goes on from the last whole shard')
