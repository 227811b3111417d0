"""The specification: settings, hardware, data, model, training, sampling. Run it with: python -m pytest

Killing a run at 200 random moments takes a quarter of an hour and is asked for: KILLS=200 python -m pytest -m long -s
or in parts side by side, each with moments of its own: KILLS=50 PART=1 python -m pytest -m long -s & KILLS=50 PART=2 ...
"""
import csv
import faulthandler
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F
from _pytest.faulthandler import fault_handler_stderr_fd_key
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import configurator
import hardware
import model as gpt
import prepare
from model import GPT, GPTConfig, KVCache, create_model, load_checkpoint, load_model, sample, save_checkpoint
from prepare import Tokenizer, load_dataset

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def seeded(request):
    """Each test starts from one seed, ends pytest after two minutes, and leaves torch's settings as they were."""
    if not request.node.get_closest_marker('long'):
        faulthandler.dump_traceback_later(120, exit=True, file=request.config.stash[fault_handler_stderr_fd_key])
    precision = torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    faulthandler.cancel_dump_traceback_later()

# ----------------------------------------------------------------------------
# data

WORDS = 'The quick brown fox, 12 of them, didn\'t jump over the dog.\nשלום עולם e\u0301 👩‍👩‍👧 naïve\r\n\t'
NASTY = '\ufeff\x1b[2J' + WORDS * 20 + '\0 \x1b[31m <|endoftext|> \u2028 \U0010ffff 中文字'
NASTY += ' ' * 30 + '\n\n' * 5 + 'end'
ODD = ''.join(map(chr, [*range(32), *range(127, 161)])) + '\u0301\u0627\u200d\u2028\u3000\ufeff\U0010ffff'

@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Here data/ is, while the test runs; failed downloads are tried again at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, 'RETRY_WAITS', (0, 0))
    return tmp_path

def data_make(text=NASTY, **settings):
    """Prepares the text -> (data set, its tokenizer, all of its ids)"""
    Path('in.txt').write_bytes(text.encode() if isinstance(text, str) else text)
    data = load_dataset(prepare.prepare('in.txt', **settings))
    return data, Tokenizer(data.meta['tokenizer']), data_ids(data)

def data_ids(data):
    return np.concatenate([tokens.read(np.arange(len(tokens)), 1)[:, 0] for tokens in (data.train, data.val)])

def data_refusal(function, *arguments, **settings):
    with pytest.raises(ValueError) as caught:
        function(*arguments, **settings)
    assert '\n' not in str(caught.value)
    return str(caught.value)

@pytest.mark.parametrize('tokenizer', ['char', 'bpe', 'gpt2'])
def test_any_text_round_trips_exactly(data_dir, tokenizer):
    try:
        data, coder, ids = data_make(tokenizer=tokenizer, vocab_size=300)
    except ConnectionError as error:
        pytest.skip(str(error))
    assert coder.decode(ids) == NASTY and coder.decode(coder.encode(WORDS)) == WORDS
    assert sum(data.meta['bytes'].values()) == len(NASTY.encode()) and coder.end_of_text not in ids
    assert tokenizer != 'gpt2' or coder.vocab_size == 50257 and coder.encode('hello world') == [31373, 995]

def test_bpe_merges_what_a_plain_count_would_merge():
    words = Counter({'low': 5, 'lower': 2, 'newest': 6, 'widest': 3, 'aaaaa': 2})
    split, expected = {word: [c.encode() for c in word] for word in words}, []
    for _ in range(9):
        pairs = Counter()
        for word, n in words.items():
            for a, b in zip(split[word], split[word][1:]):
                pairs[a + b] += n
        expected.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for parts in split.values():
            for i in range(len(parts)):
                if b''.join(parts[i:i + 2]) == expected[-1]:
                    parts[i:i + 2] = [expected[-1]]
    assert prepare.train_bpe(words, 256 + 9)[256:] == expected

@pytest.mark.parametrize('meta', [
    None, {}, {'kind': 'char'}, {'kind': 'bpe', 'ranks': ['!']}, {'kind': 'hf', 'json': '{'}])
def test_a_malformed_tokenizer_is_refused(meta):
    assert 'malformed' in data_refusal(Tokenizer, meta)

@pytest.mark.parametrize('source', ['out.pt', 'first', 'data/first'])
def test_the_tokenizer_of_a_checkpoint_or_a_data_set_can_be_taken(data_dir, source):
    meta = data_make('The dog.\n' * 50, name='first')[0].meta['tokenizer']
    torch.save({'tokenizer': meta}, 'out.pt')
    assert data_make('The dog.' * 50, tokenizer=source)[0].meta['tokenizer'] == meta
    assert "does not know the character 'z'" in data_refusal(data_make, 'zoo' * 50, tokenizer=source)

@pytest.fixture(scope='module', params=['char', 'bpe', 'gpt2'])
def data_meta(request):
    """The meta of a tokenizer of each kind of ours"""
    words = Counter(prepare.regex.findall(prepare.PATTERN, WORDS * 5 + ODD * 3))
    if request.param == 'char':
        return {'kind': 'char', 'chars': ''.join(sorted({*NASTY, *ODD}))}
    if request.param == 'bpe':
        return prepare.bpe_meta('bpe', prepare.train_bpe(words, 400))
    try:
        return prepare.make_tokenizer('gpt2', 0, [])
    except ConnectionError as error:
        pytest.skip(str(error))

def data_hf(meta, padding=9):
    """One of our tokenizers as that of another library, its vocabulary padded"""
    coder = Tokenizer(meta)
    return {'kind': 'hf', 'json': prepare.export_tokenizer(meta).to_str(), 'end_of_text': coder.end_of_text,
            'vocab_size': coder.vocab_size + padding}

def test_an_exported_tokenizer_encodes_and_decodes_as_ours(data_meta):
    random.seed(0)
    coder, taken = Tokenizer(data_meta), Tokenizer(data_hf(data_meta))
    exported = prepare.export_tokenizer(data_meta)
    assert exported.get_vocab_size() == coder.vocab_size == taken.vocab_size - 9
    assert coder.end_of_text == exported.token_to_id('<|endoftext|>')
    exported.encode_special_tokens = True
    known = data_meta.get('chars') or [chr(c) for c in range(0xd800)]
    kinds = [ODD, ' \n\t ', [c for c in "abcXYZ012'!?,.sdmtlvre" if c in known], known]
    texts = [''.join(random.choice(random.choice(kinds)) for _ in range(40)) for _ in range(500)]
    for text in (NASTY, ODD, *texts):
        ids = coder.encode(text)
        assert exported.encode(text, add_special_tokens=False).ids == ids == taken.encode(text)
        assert exported.decode(ids, skip_special_tokens=False) == text == taken.decode(ids)

@pytest.mark.parametrize('kind', ['ours', 'hf'])
def test_text_that_is_decoded_id_by_id_is_the_same_text(data_meta, kind):
    random.seed(0)
    coder = Tokenizer(data_meta if kind == 'ours' else data_hf(data_meta))
    some = [[random.randrange(coder.vocab_size + 9) for _ in range(30)] for _ in range(200)]
    for ids in (coder.encode(WORDS), *some):
        piece = coder.decoder()
        pieces = [piece(id) for id in ids]
        assert ''.join([*pieces, piece(None)]) == coder.decode(ids)
    cut = coder.encode('\U0010ffff')[:-1]
    assert [*map(coder.decoder(), cut)] == [''] * len(cut)

def test_a_script_without_spaces_gets_tokens_for_its_characters(data_dir):
    text = ''.join(random.Random(0).choices([chr(c) for c in range(0x4e00, 0x4e00 + 200)], k=8_000))
    _, coder, ids = data_make(text, tokenizer='bpe')
    assert coder.vocab_size > 450 and len(ids) < 1.1 * len(text)

def test_data_are_prepared_with_the_tokenizer_of_a_hugging_face_folder(data_dir, monkeypatch):
    meta = data_hf(prepare.bpe_meta('bpe', prepare.train_bpe(Counter(WORDS.split()), 300)))
    monkeypatch.setattr(gpt, 'hf_tokenizer', lambda folder: meta)
    Path('smol').mkdir()
    Path('smol/tokenizer.json').touch()
    data, coder, ids = data_make(tokenizer='smol')
    assert data.meta['tokenizer'] == meta and coder.decode(ids) == NASTY
    assert sum(data.meta['bytes'].values()) == len(NASTY.encode())

def test_the_vocabulary_follows_the_text():
    sizes = [prepare.pick_vocab_size(size, ['the', 'dog']) for size in (10**4, 10**6, 10**8, 10**10)]
    assert sizes == sorted(sizes) and 500 < sizes[0] < 1000 and 7000 < sizes[2] < 9000

@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'\x80\x02cos\nsystem\n(S"touch hacked"\ntR.'])
def test_what_is_no_tokenizer_is_refused_and_not_run(data_dir, content):
    Path('x.pt').write_bytes(content)
    assert '--tokenizer=x.pt is not auto' in data_refusal(data_make, tokenizer='x.pt')
    assert not Path('hacked').exists()

def test_text_in_pieces_gives_the_same_tokens_as_in_one(data_dir, monkeypatch):
    monkeypatch.setattr(prepare, 'PIECE', 50)
    text = WORDS * 30 + '\n  \n\n x\x1c y\u3000 z' * 9 + ' ' + 'x' * 500
    _, coder, ids = data_make(text, tokenizer='bpe', vocab_size=400)
    assert coder.decode(ids) == text and ids.tolist()[:700] == coder.encode(text)[:700]

@pytest.mark.parametrize('tokenizer, between', [('bpe', '<|endoftext|>'), ('char', '\n')])
def test_documents_are_separated(data_dir, tokenizer, between):
    Path('a.txt').write_text('A quick fox')
    Path('b.txt').write_text('The dog')
    data = load_dataset(prepare.prepare(['a.txt', 'b.txt', 'a.txt'], tokenizer=tokenizer))
    decoded = Tokenizer(data.meta['tokenizer']).decode(data_ids(data))
    assert decoded == between.join(['A quick fox', 'The dog', 'A quick fox'])

def test_a_folder_is_read_without_hidden_files_data_and_runs(data_dir, capsys):
    read = ['sub/a.txt', 'sub/output/b.txt']
    for name in (*read, 'data/old/input.txt', 'out-2/log.csv', '.venv/x.txt', '.hidden'):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path('sub/c.txt').write_bytes(b'fine' * 99 + b'\xff')
    Path('sub/d.png').write_bytes(b'\0')
    data = load_dataset(prepare.prepare('sub/..', name='all', tokenizer='char'))
    assert Tokenizer(data.meta['tokenizer']).decode(data_ids(data)) == '\n'.join(read)
    assert 'skipped 2 that are not UTF-8 text, the first' in capsys.readouterr().out
    assert prepare.find_texts(Path('data/old')) == [Path('data/old/input.txt')]

def test_rows_of_a_hugging_face_data_set_are_documents(data_dir, monkeypatch):
    def load(name, split, streaming):
        assert (name, split, streaming) == ('owner/tales', 'train', True)
        return iter([{'id': 1, 'tale': 'A quick fox'}, {'id': 2, 'tale': 'The dog'}])
    monkeypatch.setitem(sys.modules, 'datasets', SimpleNamespace(load_dataset=load))
    data = load_dataset(prepare.prepare('hf:owner/tales:tale', tokenizer='bpe'))
    assert Tokenizer(data.meta['tokenizer']).decode(data_ids(data)) == 'A quick fox<|endoftext|>The dog'
    message = data_refusal(prepare.prepare, 'hf:owner/tales', name='other')
    assert 'hf:owner/tales:COLUMN with one of id, tale' in message

def test_a_missing_package_is_named(data_dir, monkeypatch):
    meta = data_hf({'kind': 'char', 'chars': 'ab'})
    for package in 'datasets', 'tokenizers':
        monkeypatch.setitem(sys.modules, package, None)
    assert 'pip install datasets' in data_refusal(prepare.prepare, 'hf:owner/tales')
    assert 'pip install tokenizers' in data_refusal(Tokenizer, meta)

@pytest.mark.parametrize('text, expected', [
    (b'', 'too few'), (b'abc', 'too few'), ('abc'.encode('utf-16'), 'not UTF-8'),
    (b'x' * 70 + b'\xff' + b'y' * 70, 'not UTF-8'), (b'x' * 70 + '中'.encode()[:2], 'not UTF-8')])
def test_a_bad_text_is_refused_and_leaves_nothing(data_dir, monkeypatch, text, expected):
    monkeypatch.setattr(prepare, 'PIECE', 32)
    message = data_refusal(data_make, text)
    assert expected in message and 'in.txt' in message and os.listdir('data') == ['.in.lock']

@pytest.mark.parametrize('source, expected', [
    ('', 'empty name'), ('.', 'no text'), ('no.txt', 'is not a file')])
def test_nothing_to_read_is_refused(data_dir, source, expected):
    assert expected in data_refusal(prepare.prepare, source)

def test_other_sources_do_not_replace_a_data_set_unasked(data_dir):
    data_make('ab' * 200)
    Path('other.txt').write_text('cd' * 200)
    assert '--overwrite' in data_refusal(prepare.prepare, 'other.txt', name='in')
    assert data_make('ef' * 200)[1].decode([0]) == 'e'  # another text, of the same name
    prepare.prepare('other.txt', name='in', overwrite=True)
    assert load_dataset('in').meta['sources'] == ['other.txt']

def test_what_is_shown_is_narrow_and_never_controls_the_terminal(data_dir, capsys):
    data_make()
    prepare.show_list()
    prepare.show_info('in')
    shown = capsys.readouterr().out
    assert max(map(len, shown.split('\n'))) <= 100 and '{' not in shown and '\x1b' not in shown
    assert 'quick' in shown and 'python train.py --dataset=in --minutes=5' in shown
    assert prepare.printable('a\x1b[2J\r\u202e\ud800\n\t é👩‍👧') == 'a\\x1b[2J\\r\\u202e\\ud800\n\t é👩‍👧'

@pytest.mark.parametrize('name', ['../x', '/tmp/x', '.x', 'a/b', '..', 'a\\b', 'x' * 200])
def test_a_name_cannot_lead_out_of_data(data_dir, name):
    assert 'name' in data_refusal(data_make, name=name)
    for source in (name, f'http://x/{name}?q'):
        assert re.fullmatch(r'[\w-]+', prepare.make_name(source))

def test_a_text_put_there_by_hand_is_taken_and_kept(data_dir):
    Path('data/shakespeare').mkdir(parents=True)
    Path('data/shakespeare/input.txt').write_text(WORDS * 9, 'utf-8', newline='')
    for _ in range(2):
        prepare.prepare('shakespeare')
        assert load_dataset('shakespeare').meta['characters'] == len(WORDS) * 9

@pytest.mark.parametrize('place, name, left', [
    (prepare, 'make_tokenizer', 'ab'), (os, 'truncate', 'ab'), (os, 'replace', '')])
def test_a_preparation_cut_short_leaves_the_old_data_or_none(data_dir, monkeypatch, place, name, left):
    data_make('ab' * 200)
    with monkeypatch.context() as patch, suppress(ZeroDivisionError):
        patch.setattr(place, name, lambda *_: 1 / 0)
        data_make('cd' * 200)
    if left:
        assert load_dataset('in').meta['tokenizer']['chars'] == left
    else:
        assert 'missing' in data_refusal(load_dataset, 'in')
    assert data_make('ef' * 200)[1].decode([0]) == 'e'

def test_of_two_preparations_at_once_one_prepares_and_both_succeed(data_dir, monkeypatch):
    Path('in.txt').write_text('ab' * 200)
    real, made = prepare.fill, []

    def fill(*arguments):
        made.append(1)
        time.sleep(0.3)  # the other has begun by now
        real(*arguments)
    monkeypatch.setattr(prepare, 'fill', fill)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(prepare.prepare, ['in.txt'] * 2)] == [Path('data/in')] * 2
    assert len(made) == 1 and load_dataset('in').meta['characters'] == 400

def test_a_run_goes_on_when_its_data_are_deleted(data_dir):
    data, _, ids = data_make()
    shutil.rmtree('data')
    assert np.array_equal(data_ids(data), ids)

@pytest.mark.parametrize('path, change', [
    ('train.bin', lambda b: b[:-2]), ('val.bin', None), ('val.bin', lambda b: b''), ('meta.json', None),
    ('meta.json', lambda b: b[:40])])
def test_a_damaged_data_set_is_refused_with_the_command_that_mends_it(data_dir, path, change):
    data_make('ab' * 200)
    file = Path('data/in', path)
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    message = data_refusal(load_dataset, 'in')
    assert 'data/in is missing or damaged' in message and '"python prepare.py TEXT.txt --name=in"' in message

def test_an_epoch_reads_every_window_once_and_the_next_one_another_way():
    starts = prepare.window_starts(0, 2 * 9, 1000, 100, seed=1)  # 9 windows an epoch
    for epoch in (starts[:9], starts[9:]):
        assert np.array_equal(np.diff(np.sort(epoch)), [100] * 8)
        assert 0 <= epoch.min() and epoch.max() + 101 <= 1000
    assert not np.array_equal(starts[:9] - starts[:9].min(), starts[9:] - starts[9:].min())
    assert len({int(prepare.window_starts(9 * e, 9, 1000, 100, seed=1).min()) for e in range(20)}) > 10

def test_the_windows_of_a_step_do_not_depend_on_who_asks():
    whole = prepare.window_starts(16, 16, 1000, 100, seed=1)
    prepare.epoch_starts.cache_clear()
    parts = [prepare.window_starts(row, 4, 1000, 100, seed=1) for row in (28, 24, 20, 16)]
    assert np.array_equal(whole, np.concatenate(parts[::-1]))
    assert not np.array_equal(whole, prepare.window_starts(16, 16, 1000, 100, seed=2))

def test_batches_are_the_windows_with_targets_one_further(data_dir):
    tokens = data_make(WORDS * 30)[0].train
    for i, (x, y) in enumerate(itertools.islice(prepare.batches(tokens, 6, 3, 12, 16, 1, 'cpu'), 5)):
        expected = tokens.read(prepare.window_starts(6 + 12 * i, 3, len(tokens), 16, 1), 17)
        assert x.dtype == torch.int64
        assert np.array_equal(x, expected[:, :-1]) and np.array_equal(y, expected[:, 1:])

@pytest.mark.parametrize('n, block_size, rows', [(401, 16, 4), (400, 16, 4), (17, 16, 4), (5, 16, 3)])
def test_validation_predicts_every_token_after_the_first_once(data_dir, n, block_size, rows):
    np.arange(n, dtype='<u2').tofile('val.bin')
    tokens = prepare.Tokens(Path('val.bin'), np.dtype('<u2'))
    pairs = list(prepare.val_batches(tokens, block_size, rows))
    assert torch.cat([y[y >= 0] for x, y in pairs]).tolist() == list(range(1, n))
    assert all(torch.equal(y[y >= 0], x[y >= 0] + 1) for x, y in pairs)
    assert len(list(prepare.val_batches(tokens, block_size, rows, 2))) <= 2

@pytest.fixture
def data_server(data_dir, monkeypatch):
    """What the server answers, in turn: (status, text)"""
    answers = []

    def get(url, **options):
        reply = requests.Response()
        reply.status_code, text = answers.pop(0)
        reply.raw = io.BytesIO(text)
        return reply
    monkeypatch.setattr(requests, 'get', get)
    return answers

def test_a_url_is_read_after_errors_and_kept(data_server):
    data_server += [(500, b''), (503, b''), (200, WORDS.encode())]
    for tokenizer in 'char', 'bpe':
        data = load_dataset(prepare.prepare('https://a/words.txt?raw', tokenizer=tokenizer))
        assert data.meta['characters'] == len(WORDS) and not data_server

@pytest.mark.parametrize('answer, error, expected', [
    ((404, b''), ConnectionError, '404'), ((200, b'another text'), ValueError, 'different')])
def test_a_bad_server_leaves_no_file(data_server, answer, error, expected):
    data_server += [answer] * 3
    with pytest.raises(error, match=expected):
        prepare.prepare('shakespeare')
    assert os.listdir('data') == ['.shakespeare.lock']
