"""
Text in, tokens out, and batches read back: data/NAME/ with train.bin, val.bin and meta.json.

    python prepare.py                                  # list what is prepared
    python prepare.py shakespeare                      # or pydoc: English that comes with Python
    python prepare.py my.txt more.txt --name=poems     # also folders, URLs, or - for standard input
    python prepare.py chat.jsonl --column=text         # a document in each row; also .csv, .parquet
    python prepare.py hf:owner/name                    # also hf:owner/name/configuration@split:column
    python prepare.py my.txt --tokenizer=out/best.pt   # with a checkpoint's tokenizer
    python prepare.py --info=poems                     # figures and passages of a prepared data set

Tokens decode to exactly the text, except that lines end with \\n and a byte order mark is dropped.
The end-of-text token separates documents (files, rows), or a newline if the tokenizer has none.
Memory stays bounded; during the work the disk holds a copy of the text.
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
from array import array
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
from filelock import FileLock  # comes with torch

from configurator import checked, configure, plain_errors, printable, set_up_output

# ----------------------------------------------------------------------------
# settings
sources = []  # shakespeare, pydoc, files of text or rows, folders, URLs, hf:owner/name, - (standard input)
name = ''  # folder in data/; empty: made from the first source
column = 'text'  # the column that holds the text, for sources with rows
shuffle = True  # shuffle the documents, always in the same way; false: keep their order
tokenizer = 'auto'  # auto, char, bpe (trained on this text), gpt2; or the one of this data set or run
vocab_size = 0  # tokens in a bpe vocabulary, at least 257; 0: chosen to suit the text
val_fraction = 0.1  # share of the text, from the end, kept for validation (10 million characters at most)
max_mb = 0  # read about this many million bytes of text; 0: all
overwrite = False  # replace a data set of the same name that was made from other sources or settings
info = ''  # show this prepared data set
# ----------------------------------------------------------------------------
DATA = Path('data')
DOWNLOADS = {'shakespeare': (  # address, sha256
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')}
KNOWN = (*DOWNLOADS, 'pydoc')  # data sets that train.py prepares where they are missing
# how GPT-2 divides a text into words
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = '<|endoftext|>'
PIECE = 1 << 16  # characters encoded at a time: a million blanks in a row overflow tiktoken's stack
SMALL = 4 << 20  # characters: up to here, and to 256 different ones, 'auto' is the char tokenizer
SAMPLE = 16 << 20  # characters that bpe is trained on, in evenly spaced pieces,
WORDS = 100_000  # and how many of their words, the most frequent: time and memory depend on it
VAL_MAX = 10_000_000  # characters: more makes an evaluation slower, not better
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
            self.hf.encode_special_tokens = True  # in a text their names are text
            self.vocab_size, self.end_of_text = meta['vocab_size'], meta['end_of_text']
        else:
            self.table = [base64.b64decode(token) for token in meta['ranks']]
            ranks, self.end_of_text = {token: i for i, token in enumerate(self.table)}, len(self.table)
            self.bpe = tiktoken.Encoding(self.kind, pat_str=meta['pattern'], mergeable_ranks=ranks,
                                         special_tokens={END_OF_TEXT: self.end_of_text})
            self.table.append(END_OF_TEXT.encode())
            self.vocab_size = len(self.table)
        self.ends = meta.get('ends') or [self.end_of_text]  # any of these ids ends a text
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
            raise ValueError(f'the tokenizer does not know the character {error.args[0]!r}: '
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
            held = []  # ids whose last character may be incomplete

            def piece(id):
                if id is not None:
                    held.append(id)
                text = self.decode(held)
                if id is not None and text.endswith('\ufffd'):
                    return ''
                held.clear()
                return text

            return piece
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

def count_words(texts):
    """{word: how often}. Long words are cut, as the time for one grows with its square."""
    counts = Counter()
    for text in texts:
        for word in regex.findall(PATTERN, text):
            counts.update(word[at:at + 32] for at in range(0, len(word), 32))
    return dict(counts.most_common(WORDS))

def make_tokenizer(kind, vocab_size, read, size):
    """-> the tokenizer's meta, made for the text that read(separator) yields, of `size` characters, or taken
    from a data set, a run folder or a checkpoint"""
    if kind == 'char' or (kind == 'auto' and size <= SMALL):
        chars = set()
        for piece in read('\n'):
            chars.update(piece)
        if kind == 'char' or len(chars) <= 256:
            return {'kind': 'char', 'chars': ''.join(sorted(chars))}
    if kind in ('auto', 'bpe'):
        counts = count_words(itertools.islice(read('\n'), 0, None, 1 + size // SAMPLE))
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
# where the text comes from

def download(source, folder, part):
    """A URL or a name in DOWNLOADS -> the path of its text, which is fetched once, whole or not at all, by
    way of the file part. ConnectionError if that fails."""
    import requests  # here, because it takes 60 ms, and sample.py does without
    url, sha256 = DOWNLOADS.get(source, (source, None))
    kept = hashlib.sha256(url.encode()).hexdigest()[:16] + Path(url.split('?')[0]).suffix
    path = DATA / source / 'input.txt' if sha256 else folder / kept
    if path.exists():
        return path
    shown = printable(url)
    print(f'fetching {shown} ...', flush=True)
    try:
        with requests.get(url, stream=True, timeout=(3, 30)) as reply, open(part, 'wb') as file:
            reply.raise_for_status()
            for block in reply.iter_content(1 << 16):
                file.write(block)
    except requests.RequestException as error:
        why = printable(error) if isinstance(error, requests.HTTPError) else 'the connection failed'
        raise ConnectionError(f'{shown} cannot be downloaded ({why}): '
                              f'try again, or put the text at {path} (mkdir -p {path.parent})') from None
    if sha256 and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        raise ValueError(f'{shown} sent a different text than expected: try again, or put the text at {path}')
    path.parent.mkdir(exist_ok=True)
    return Path(shutil.move(part, path))  # data/shakespeare may be on another disk

def is_text(part):
    return isinstance(part, Path) and part.suffix.lower() not in ('.jsonl', '.csv', '.parquet')

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
        return [download(source, folder, new / 'download')]
    if source == '-':
        return [Path('/dev/stdin')]
    if os.path.isdir(source):
        return find_texts(Path(source))
    if os.path.exists(source):  # a file, or a pipe
        return [Path(source)]
    raise ValueError(f'{printable(source)} is not a file, folder or URL, nor shakespeare, pydoc, '
                     'hf:owner/name or - for standard input')

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
            if is_text(path) and not any('\0' in piece for piece in read_text(path)):
                texts.append(path)
    others = len(files) - len(texts)
    print(f'{printable(folder)}: {len(texts):,} text files, {others:,} others that are left out '
          '(.jsonl, .csv and .parquet are read if you name the file)')
    return texts

def make_name(source):
    """A path, URL or hf: source -> letters, digits, _ and - only, which can't lead out of data/."""
    stem = Path(os.path.abspath(source.split('?')[0])).stem
    return regex.sub(r'[^\w-]+', '-', stem).strip('-')[:60] or 'text'

@contextmanager
def open_text(path):
    """The file, read without a byte order mark and with \\n as the end of every line"""
    try:
        with open(path, encoding='utf-8-sig') as file:
            yield file
    except UnicodeDecodeError:
        raise ValueError(f'{printable(path)} is not UTF-8 text: convert it, as in '
                         '"iconv -f ENCODING -t UTF-8 OLD > NEW"') from None

def read_text(path):
    """The text of a file in pieces. They end where a line does, if lines are no longer than a piece: so no
    word is cut."""
    with open_text(path) as file:
        while text := file.read(PIECE) + file.readline(PIECE):
            yield text

def read_json_lines(path):
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            row = None
            with suppress(ValueError):
                row = json.loads(line)
            if isinstance(row, dict):
                yield row
            elif line.strip():
                raise ValueError(f'{printable(path)}: line {number:,} is not a JSON object')

def stream_rows(source, *arguments, **options):
    """The rows of datasets.load_dataset(*arguments, **options). If the connection fails, it tries again and
    continues with the next row. ConnectionError if that fails, too."""
    from datasets import load_dataset as load
    logging.disable()  # without a network, screens of retries
    done = 0
    for wait in (*RETRY_WAITS, None):
        try:
            for row in itertools.islice(load(*arguments, streaming=True, **options), done, None):
                done += 1
                yield row
            return
        except (OSError, RuntimeError) as error:
            if wait is None:
                raise ConnectionError(f'{source} cannot be read after row {done:,} ({type(error).__name__}): '
                                      'check network and name, or read less with --max_mb') from None
            time.sleep(wait)

def read_rows(part, column):
    """The texts in a column of a file with rows or of hf:..., each as a list of pieces"""
    shown, empty = printable(part), 0
    if not isinstance(part, Path):
        form = r'hf:([^/@:]*/?[^/@:]*)/?([^@:]*)@?([^:]*):?(.*)'
        name, configuration, split, chosen = regex.fullmatch(form, part).groups()
        column = chosen or column
        rows = stream_rows(shown, name, configuration or None, split=split or 'train')
    elif part.suffix.lower() == '.jsonl':
        rows = read_json_lines(part)
    else:
        rows = stream_rows(shown, part.suffix.lower()[1:], data_files=str(part), split='train')
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column, 0), str | None):
            raise ValueError(f'{shown}: row {number:,} has no text in column {column!r}: choose one of '
                             f'{printable(", ".join(row))} with --column')
        text = (row[column] or '').replace('\r\n', '\n').replace('\r', '\n')
        empty += not text
        yield [text[at:at + PIECE] for at in range(0, len(text), PIECE)]
    if empty:
        print(f'{shown}: {empty:,} rows without text are left out')

def gather(parts, column, max_bytes, path):
    """Copies the text of all parts, about max_bytes of it (0: all), to path: a line of JSON for
    each piece, and null after each document. So it can be read again and in any order, also if it came from
    a pipe or the network. -> where documents that are not empty begin in the file, and their characters"""
    documents = ([read_text(part)] if is_text(part) else read_rows(part, column) for part in parts)
    begins, size = array('q'), 0
    with open(path, 'wb') as file:
        for pieces in itertools.chain.from_iterable(documents):
            begin = file.tell()
            for piece in pieces:
                line = json.dumps(piece, ensure_ascii=False) + '\n'
                file.write(line.encode('utf-8', 'replace'))  # a row may hold half of a surrogate pair
                size += len(piece)
                if 0 < max_bytes <= file.tell():
                    break
            if file.tell() > begin:
                file.write(b'null\n')
                begins.append(begin)
            show_progress(size)
            if 0 < max_bytes <= file.tell():
                break
    return np.array(begins), size

def stream(path, begins, separator):
    """The pieces that gather() wrote, of the documents that begin there; the separator between documents"""
    with open(path, 'rb') as file:
        for i, begin in enumerate(begins):
            if i > 0:
                yield separator
            file.seek(begin)
            yield from map(json.loads, iter(file.readline, b'null\n'))

def split(pieces, n_train):
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

def prepare(sources, name=name, column=column, shuffle=shuffle, tokenizer=tokenizer, vocab_size=vocab_size,
            val_fraction=val_fraction, max_mb=max_mb, overwrite=overwrite):
    """-> the data set's folder. ValueError for what a user can mend, ConnectionError where a download failed.
    One process at a time prepares a name; one that had to wait reuses the result if the settings match."""
    sources = [sources] if isinstance(sources, str) else list(sources)
    name = name or make_name(sources[0])
    if not regex.fullmatch(r'[\w-][\w.-]{0,99}', name):
        raise ValueError(f'{name!a} cannot name a data set: use letters, digits, _ and -')
    settings = dict(column=column, shuffle=shuffle, tokenizer=tokenizer, vocab_size=vocab_size,
                    val_fraction=val_fraction, max_mb=max_mb)
    checked('val_fraction', val_fraction, 0.1, (0, 1))
    checked('max_mb', max_mb, 0)
    if vocab_size:
        checked('vocab_size', vocab_size, 0, (257, 2**31))
    folder = DATA / name
    new = folder / '.new'  # inside, as the folder may be on another disk than data/
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
        asked = {'sources': sources, **settings}
        made = {**asked, **there.get('settings', {}), 'sources': there.get('sources', sources)}
        changes = [f'{key}={printable(made[key])}' for key in asked if made[key] != asked[key]]
        if changes and not overwrite:
            raise ValueError(f'{folder} was made with {", ".join(changes)[:200]}: choose another --name, or '
                             'replace it with --overwrite (a run on it can then no longer be resumed)')
        folder.resolve().mkdir(exist_ok=True)  # resolved: a link may lead to a folder that is still missing
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            fill(new, [part for source in sources for part in find_parts(source, folder, new)], meta)
            (folder / 'meta.json').unlink(missing_ok=True)  # from here on the data set counts as missing
            for file in ('train.bin', 'val.bin', 'meta.json'):
                os.replace(new / file, folder / file)
        finally:
            shutil.rmtree(new)
            with suppress(OSError):  # it is not empty
                folder.rmdir()
    print(describe(name))
    return folder

def fetch(name, offline=''):
    """-> the data set to train on: name, which is prepared if it is missing and a known one, or offline if it
    can't be downloaded"""
    if Path(name).parent == DATA:  # data/poems
        name = Path(name).name
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

def show_progress(size):
    if sys.stdout.isatty():
        print(f'{size / 1e6:,.0f} MB\r', end='', flush=True)

def fill(new, parts, meta):
    """Text -> train.bin, val.bin and meta.json in the folder `new`; adds what it finds out to meta."""
    settings = meta['settings']
    rng = np.random.default_rng(0)
    if settings['shuffle']:
        rng.shuffle(parts)  # before max_mb leaves out the last ones
    begins, size = gather(parts, settings['column'], settings['max_mb'] * 10**6, new / 'text')
    if settings['shuffle']:
        rng.shuffle(begins)  # rows, too
    read = functools.partial(stream, new / 'text', begins)
    meta['tokenizer'] = make_tokenizer(settings['tokenizer'], settings['vocab_size'], read, size)
    coder = Tokenizer(meta['tokenizer'])

    def encode(item):
        name, text = item
        if text is None and coder.end_of_text is not None:
            return name, np.array([coder.end_of_text], coder.dtype), b''
        text = text or '\n'
        return name, np.array(coder.encode(text), coder.dtype), text.encode()

    n_train = max(int(size * (1 - settings['val_fraction'])), size - VAL_MAX)
    items = split(read(None), n_train)
    tokens, sizes, sha = Counter(), Counter(), hashlib.sha256()
    with open(new / 'train.bin', 'wb') as train, open(new / 'val.bin', 'wb') as val:
        files = {'train': train, 'val': val}
        for name, ids, data in in_order(encode, items, os.cpu_count() or 1):
            files[name].write(ids)
            tokens[name] += len(ids)
            sizes[name] += len(data)
            sha.update(data)
            show_progress(sizes.total())
    if min(tokens['train'], tokens['val']) < 2:
        shown = printable(' '.join(meta['sources']))[:99]
        raise ValueError(f'{shown}: too little text, {tokens["train"]:,} tokens for training and '
                         f'{tokens["val"]:,} for validation')
    documents = 'the text'
    if len(begins) > 1:
        documents = f'{len(begins):,} documents{", shuffled" if settings["shuffle"] else ""}'
    validation = f'the last {100 * (1 - n_train / size):.2g}% of {documents}'
    meta |= {'vocab_size': coder.vocab_size, 'dtype': coder.dtype.name, 'tokens': tokens, 'bytes': sizes,
             'validation': validation, 'source_sha256': sha.hexdigest()}
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
        text = folder.name if folder.name in KNOWN else f'TEXT.txt --name={folder.name}'
        raise ValueError(f'{printable(folder)} is missing or damaged (prepared: {there}): '
                         f'run "python prepare.py {printable(text)}"') from None
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
        raise ValueError(f'vocab_size is {config["vocab_size"]}, the data set has {data.meta["vocab_size"]} '
                         'tokens')
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
    validation = meta.get('validation', 'the end of the text')
    return (f'{DATA / name}: {size:,} bytes from {printable(" ".join(meta["sources"])[:99])}\n'
            f'{meta["tokenizer"]["kind"]} tokenizer, vocabulary of {meta["vocab_size"]:,}, '
            f'{size / (train + val):.2f} bytes per token\n'
            f'{train:,} tokens for training, {val:,} for validation ({validation})')

def show_info(name):
    """What describe() says, and how both splits begin"""
    data = load_dataset(name)
    coder = Tokenizer(data.meta['tokenizer'])
    print(describe(Path(name).name))
    for split, ids in ('training', data.train[:300]), ('validation', data.val[:300]):
        print(f'\n--- the text for {split} begins\n{printable(coder.decode(ids))}')

if __name__ == '__main__':
    set_up_output()
    settings, _ = configure(__file__)
    info = settings.pop('info')
    with plain_errors():
        if info:
            show_info(info)
        elif settings['sources']:
            folder = prepare(**settings)
            print('to judge a model, look at the bits per byte of its evaluations: lower is better')
            print(f'next: python train.py --dataset={folder.name} --minutes=5')
        else:
            print(*map(describe, data_sets()), __doc__.rstrip(), sep='\n')
