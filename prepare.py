"""
Text in, tokens out, and batches read back from there: data/NAME/ with train.bin, val.bin and meta.json.

    python prepare.py                                    # what is prepared, what can be
    python prepare.py shakespeare                        # or pydoc: English that every Python carries, needs no network
    python prepare.py my.txt more.txt --name=poems       # also folders, URLs of text files, hf:owner/name:column
    python prepare.py my.txt --tokenizer=out/best.pt     # with a checkpoint's tokenizer, to go on from its weights
    python prepare.py --info=poems                       # numbers and passages of a prepared data set

Every text round-trips exactly, line ends and byte order marks too; what is not UTF-8 is refused. Between documents
(files, rows) stands the end-of-text token, or a newline where characters are the tokens. Memory stays bounded however
long the text is.
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
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

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
SAMPLE = 32                  # pieces that bpe is trained on, from the beginning of each source,
DISTINCT = 2 << 20           # or fewer: characters in the distinct words there, which memory and time depend on
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
        self.end_of_text = None
        try:
            self.kind = meta['kind']
            if self.kind == 'char':
                self.table, needed = [c.encode() for c in meta['chars']], set()  # id -> bytes
                self.ids = {c: i for i, c in enumerate(meta['chars'])}
            else:
                self.table = [base64.b64decode(token, validate=True) for token in meta['ranks']]
                self.end_of_text, needed = len(self.table), {bytes([b]) for b in range(256)}
                self.bpe = tiktoken.Encoding(self.kind, pat_str=meta['pattern'],
                                             mergeable_ranks={token: i for i, token in enumerate(self.table)},
                                             special_tokens={END_OF_TEXT: self.end_of_text})
            distinct = set(self.table)
            if not distinct or len(distinct) < len(self.table) or not needed <= distinct:
                raise ValueError('tokens are missing, or there twice')
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f'the tokenizer is malformed ({type(error).__name__}: {error})') from None
        if self.end_of_text is not None:
            self.table.append(END_OF_TEXT.encode())
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
    tokens = {bytes([b]): None for b in range(256)}     # an ordered set
    pairs, where = Counter(), defaultdict(list)         # merged bytes -> how often, and in which words
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
    for piece in (piece for part in parts for piece in itertools.islice(stream([part], '\n'), share)):
        for _, text in piece:
            counts.update(word[:64] for word in regex.findall(PATTERN, text))
            read += len(text)
        if read >= SAMPLE * PIECE or sum(map(len, counts)) > DISTINCT:
            break
    return counts, read


def make_tokenizer(kind, vocab_size, parts):
    """-> the tokenizer's meta"""
    if kind in ('auto', 'char'):
        pieces = itertools.islice(stream(parts, '\n'), None if kind == 'char' else SMALL + 1)
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
    elif kind in ('auto', 'bpe'):
        counts, read = count_words(parts)
        print(f'training a vocabulary of {vocab_size:,} on {read:,} characters ...', flush=True)
        tokens, kind = train_bpe(counts, vocab_size - 1), 'bpe'
    else:
        try:
            is_file = os.path.isfile(kind)
            return (torch.load(kind, 'cpu', weights_only=True) if is_file else load_dataset(kind).meta)['tokenizer']
        except Exception as error:  # what is no checkpoint fails in many ways
            raise ValueError(f'--tokenizer={kind}: not auto, char, bpe or gpt2, a checkpoint or a prepared data set '
                             f'({type(error).__name__})') from None
    ranks = [base64.b64encode(token).decode() for token in tokens]
    return {'kind': kind, 'pattern': PATTERN, 'ranks': ranks, 'special': {END_OF_TEXT: len(ranks)}}


# -----------------------------------------------------------------------------
# where the text comes from

def printable(text):
    """The text with control characters and overrides of its direction as escapes, so that no terminal obeys them."""
    return re.sub('[^\n\t -~\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]',
                  lambda match: match[0].encode('unicode_escape').decode(), text)


def write(path, chunks):
    """Chunks of bytes -> a file, which gets its name when all of it is on the disk."""
    part = path.with_name(f'{path.name}.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, 'wb') as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def fetch(url, part, version):
    """One request for what is missing in the file `part`, of the same version (ETag) as what is there, else for all."""
    import requests  # here, because it takes 60 ms, and sample.py does without
    etag = version.read_text('utf-8') if part.exists() and version.exists() else ''
    done = part.stat().st_size if etag else 0
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={done}-', 'If-Range': etag} if done else {})
    with requests.Session() as session:
        if url.startswith('https:'):
            del session.adapters['http://']  # so that no redirect leads there: InvalidSchema
        with session.get(url, headers=headers, stream=True, timeout=(3, 30)) as reply:
            if reply.status_code == 416:  # no such range: nothing is missing, or that version is gone
                version.unlink(missing_ok=True)
            if reply.status_code in (416, 429) or reply.status_code >= 500:
                raise requests.RequestException(f'it answered {reply.status_code}')
            if reply.status_code == 200:
                done = 0
            elif not reply.headers.get('content-range', '').startswith(f'bytes {done}-'):
                raise ValueError(f'{url} answered {reply.status_code} {reply.reason}')
            total, fresh, began = done + int(reply.headers.get('content-length', -done)), 0, time.time()
            print(f'fetching {url} ({total / 1e6:,.1f} MB)' if total else f'fetching {url}', flush=True)
            with open(part, 'ab' if done else 'wb') as file:  # emptied before it counts as another version
                version.write_text(reply.headers.get('etag', ''), 'utf-8')
                while max(done + fresh, total) <= DOWNLOAD_LIMIT and (block := reply.raw.read(1 << 12)):
                    fresh += file.write(block)
                    if fresh < 1000 * (time.time() - began - PATIENCE):
                        raise requests.RequestException('it sends less than 1 kB a second')
                os.fsync(file.fileno())
            if max(done + fresh, total) > DOWNLOAD_LIMIT:
                part.unlink()
                version.unlink()
                raise ValueError(f'{url} is larger than the limit of {DOWNLOAD_LIMIT:,} bytes')


def download(url, path, sha256=''):
    """url -> path, whole or not at all. ConnectionError where the network is at fault, else ValueError.

    What was interrupted stays in NAME.part, and its version in NAME.etag: the next attempt goes on from there, be it of
    this process or of a later one.
    """
    import requests
    from urllib3.exceptions import HTTPError
    part, version = (path.with_name(path.name + suffix) for suffix in ('.part', '.etag'))
    path.parent.mkdir(parents=True, exist_ok=True)
    for wait in (*RETRY_WAITS, None):
        try:
            fetch(url, part, version)
            break
        except (requests.RequestException, HTTPError) as error:
            if isinstance(error, ValueError):  # an address that no attempt will mend
                raise
            if wait is None or isinstance(error, requests.ConnectTimeout):
                why = error if type(error) is requests.RequestException else 'the connection failed'
                raise ConnectionError(f'{url} cannot be downloaded ({why}): try again, or put the text at {path}'
                                      ) from None
            time.sleep(wait)
    version.unlink(missing_ok=True)
    if sha256 and hash_files(part) != sha256:
        part.unlink()
        raise ValueError(f'{url} sent another text than expected (its sha256 is not {sha256[:12]}...)')
    os.replace(part, path)


def sha256_of(text):
    return hashlib.sha256(text.encode()).hexdigest()


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
    if source == 'pydoc':
        from pydoc_data.topics import topics
        path = DATA / source / 'input.txt'
        write(path, [('\n\n'.join(topics[key].strip() for key in sorted(topics)) + '\n').encode()])
    elif source in DOWNLOADS or source.startswith(('http://', 'https://')):
        url, sha256 = DOWNLOADS.get(source, (source, ''))
        path = DATA / source / 'input.txt' if sha256 else folder / f'{sha256_of(url)[:16]}.txt'
        if not path.exists():
            download(url, path, sha256)
        elif sha256 and hash_files(path) != sha256:
            print(f'{path} is not the usual text of that name (another sha256), and is taken as it is')
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
    coding = tokenizer, os.path.isfile(tokenizer) and os.stat(tokenizer).st_mtime, vocab_size
    new = folder / f'new-{sha256_of(repr((versions, coding, max_mb)))[:8]}'
    record = new / 'tokenizer.json'
    if not record.exists():
        for unfinished in folder.glob('new-*'):
            shutil.rmtree(unfinished)
        write(record, [json.dumps(make_tokenizer(tokenizer, vocab_size, parts)).encode()])
    meta = {'sources': sources, 'tokenizer': json.loads(record.read_text('utf-8'))}
    coder = Tokenizer(meta['tokenizer'])
    text = write_shards(parts, coder, new, max_mb)

    record.unlink()  # from here on the shards are changed: the end of the last ones becomes val.bin
    shards = sorted(new.glob('train_*.bin'))
    ends = list(itertools.accumulate(path.stat().st_size // coder.dtype.itemsize for path in shards))
    total = ends[-1]
    n_train = max(int(total * (1 - val_fraction)), total - VAL_MAX)
    if len(text.distinct) < 2 or min(n_train, total - n_train) < 2:
        shutil.rmtree(new)
        raise ValueError(f'{", ".join(sources)}: too little to learn from: {text.characters:,} characters, '
                         f'{len(text.distinct)} of them distinct, {n_train:,} + {total - n_train:,} tokens')
    val = []
    for path, end in zip(shards, ends):
        kept = max(path.stat().st_size - max(end - n_train, 0) * coder.dtype.itemsize, 0)
        val.append(np.fromfile(path, coder.dtype, offset=kept))
        os.truncate(path, kept) if kept else path.unlink()
    if len(shards) == 1:
        shards[0].rename(new / 'train.bin')
    val = np.concatenate(val)
    write(new / 'val.bin', [val])
    val_bytes = sum(n * len(coder.table[id]) for id, n in enumerate(np.bincount(val)) if id != coder.end_of_text)
    meta |= {'vocab_size': coder.vocab_size, 'dtype': coder.dtype.name, 'characters': text.characters,
             'tokens': {'train': n_train, 'val': len(val)},
             'bytes': {'train': text.bytes - int(val_bytes), 'val': int(val_bytes)},
             'source_sha256': text.sha.hexdigest(),
             'sha256': hash_files(*sorted(new.glob('train*.bin')), new / 'val.bin')}
    write(new / 'meta.json', [json.dumps(meta).encode()])
    new.rename(folder / 'ready')
    put_in_place(folder)

    odd = sorted(c for c in text.distinct if not c.isprintable() and c not in '\t\n' or c == '\ufffd')
    fits = [preset for preset, millions in PRESETS.items() if 20 * millions <= 4 * n_train / 1e6]
    print(f'{folder}: {text.characters:,} characters, {len(text.distinct):,} of them distinct\n'
          f'tokenizer {coder.kind}; vocabulary {coder.vocab_size:,}\n'
          f'{total:,} tokens ({text.characters / total:.2f} characters each): '
          f'train {n_train:,}, val {len(val):,}')
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

    def read():
        for piece in itertools.islice(stream(parts, '\n' if coder.end_of_text is None else None), max_mb or None):
            text = ''.join(text or '' for _, text in piece)
            data = text.encode()
            seen.sha.update(data)
            seen.distinct.update(text)
            seen.characters += len(text)
            seen.bytes += len(data)
            yield piece

    def encode(piece):
        ids = []
        for part, text in piece:
            try:
                ids.append(np.array([coder.end_of_text] if text is None else coder.encode(text), coder.dtype))
            except ValueError as error:
                raise ValueError(f'{part}: {error}') from None
        return b''.join(ids)

    for i, numbered in itertools.groupby(enumerate(read()), lambda pair: pair[0] // SHARD):
        path = new / f'train_{i:05d}.bin'
        if not path.exists():
            write(path, in_order(encode, (piece for _, piece in numbered), os.cpu_count() or 1))
        if i:  # a small text is quick
            print(f'{seen.bytes / 1e6:,.0f} MB of text are tokens in {i + 1} files', flush=True)
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
    """One stream of ids over files, which stay open (a run goes on with them whatever becomes of their names), and are
    mapped anew for each read: pages once read would count as memory."""

    def __init__(self, paths, dtype):
        self.paths, self.files, self.dtype = paths, [open(path, 'rb') for path in paths], dtype
        self.ends = np.cumsum([os.path.getsize(path) // dtype.itemsize for path in paths])

    def __len__(self):
        return int(self.ends[-1])

    def read(self, starts, length):
        """(N,) int64 -> (N, length) int64; a window may lie across files."""
        at = starts[:, None] + np.arange(length)        # (N, length)
        file = np.searchsorted(self.ends, at, 'right')  # (N, length)
        ids = np.empty(at.shape, np.int64)
        for i in np.flatnonzero(np.bincount(file.ravel())):
            here = file == i
            ids[here] = np.memmap(self.files[i], self.dtype, 'r')[at[here] - self.ends[i]]  # from the file's end
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
