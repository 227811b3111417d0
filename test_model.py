"""The specification: settings, hardware, data, model, training, sampling. Run it with: python -m pytest

Killing a run at 200 random moments takes a quarter of an hour and is asked for: KILLS=200 python -m pytest -m long -s
or in parts side by side, each with moments of its own: KILLS=50 PART=1 python -m pytest -m long -s & KILLS=50 PART=2 ...
"""
import csv
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import configurator
import hardware
import model as gpt
import prepare
from model import GPT, GPTConfig, KVCache, create_model, load_checkpoint, load_model, sample, save_checkpoint
from prepare import Tokenizer, load_dataset

HERE = Path(__file__).parent

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

# ----------------------------------------------------------------------------
# settings

SETTINGS_BLOCK = '''"""Trains a thing."""
import os
out_dir = 'out'        # where checkpoints go
batch_size = 12        # sequences in a micro-batch
learning_rate = 1e-3   # per update
compile = False        # use torch.compile, ''' + 'which takes a while ' * 9 + '''
LIMIT, here = 3, os.getcwd()
configure(__file__)
later = 1'''

@pytest.fixture
def settings(tmp_path, monkeypatch):
    """settings(*arguments) -> what configure makes of them and the block above."""
    monkeypatch.chdir(tmp_path)
    Path('script.py').write_text(SETTINGS_BLOCK)
    return lambda *arguments: configurator.configure('script.py', argv=list(arguments))

def settings_refusal(capsys, settings, *arguments):
    """The one line on stderr with which these arguments are refused."""
    with pytest.raises(SystemExit) as error:
        settings(*arguments)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == '' and err.count('\n') == 1 and err[:-1].strip().isprintable()
    return err

def settings_file(text, name='c.py'):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name

def test_only_lower_case_literals_before_configure_are_settings(settings):
    assert settings() == {'out_dir': 'out', 'batch_size': 12, 'learning_rate': 1e-3, 'compile': False}

def test_a_flag_wins_wherever_it_stands_and_a_later_file_may_compute(settings):
    a, b = settings_file('import math\n_x = 3\nbatch_size *= _x', 'a.py'), settings_file('batch_size += 1', 'b.py')
    orders = [(a, b), ('--batch_size=4', a), (a, '--batch_size=4')]
    assert [settings(*order)['batch_size'] for order in orders] == [37, 4, 4]

@pytest.mark.parametrize('flag, value', [
    ('--out_dir=a=b', 'a=b'), ('--out_dir=', ''), ('--out_dir=--x y', '--x y'), ('--batch_size=1_000', 1000),
    ('--learning_rate=1', 1.0), ('--compile', True), ('--compile=0', False)])
def test_a_flag_is_read_as_its_settings_type(settings, flag, value):
    read = settings(flag)[flag[2:].partition('=')[0]]
    assert read == value and type(read) is type(value)

@pytest.mark.parametrize('arguments, says', [
    (['--batchsize=3'], 'batch_size'), (['--batch_size=1e3'], 'whole number'), (['--batch_size=' + '9' * 30], 'whole'),
    (['--learning_rate=nan'], 'a number'), (['--compile=maybe'], 'true or false'),
    (['--out_dir', 'runs'], 'write --out_dir=runs'), (['--compile', 'False'], 'write --compile=False'),
    (['-c'], '--name=value'), (['shakespeare'], 'config file'), (['--LIMIT=2'], 'no setting'),
    (['--out_dir=\udcff'], 'text'), (['--\x1b\nx=1'], 'setting'), (['nowhere.py'], 'c.py'), (['d.py'], 'directory')])
def test_a_mistaken_flag_is_refused_in_one_line(settings, capsys, arguments, says):
    os.makedirs('d.py')
    os.makedirs('config')
    settings_file('', 'config/c.py')
    assert says in settings_refusal(capsys, settings, *arguments)

@pytest.mark.parametrize('text, says', [
    ('batchsize = 3', "line 1: there is no setting 'batchsize': did you mean"), ('\nbatch_size = 2.0', 'line 2'),
    ('batch_size = "3"', 'whole number'), ('batch_size = True', 'whole number'), ('compile = 1', 'true or false'),
    ('out_dir = 3', 'text'), ('learning_rate = 10 ** 400', 'a number'), ('\n1 / 0', 'line 2: ZeroDivisionError'),
    ('\n\nx = = 1', 'line 3: SyntaxError: invalid'), ('exit(0)', 'SystemExit'), ('import batch_size', 'No module'),
    (b'\xff\xfe\0', 'SyntaxError'), (b'\n' * 9000 + b'\xff', 'Decode'), ('def batch_size(): pass', 'whole number')])
def test_a_mistaken_config_file_is_refused_in_one_line(settings, capsys, text, says):
    line = settings_refusal(capsys, settings, settings_file(text))
    assert says in line and line.startswith('c.py')

def test_several_hundred_malformed_inputs_end_in_one_line_or_the_right_types(settings, capsys):
    rng, types_of = random.Random(0), lambda result: [type(value) for value in result.values()]
    pieces = ['--', '-', '=', *settings(), '3', '1e3', 'nan', '\0', '\n', '\u202e', '"', "'", '[' * 300, '\udc80', 'é',
              '_', '.py', '/', 'import', 'x', '9' * 5000, '\\', '# coding: nope\n', ';', 'raise ', '\t', ':']
    for i in range(600):
        word = ''.join(rng.choices(pieces, k=rng.randint(1, 6)))
        try:
            argument = '--' + word if i % 2 else settings_file(word.encode('utf-8', 'surrogateescape'))
            assert types_of(settings(argument)) == types_of(settings())
        except SystemExit as error:
            err = capsys.readouterr().err
            assert error.code == 2 and err.count('\n') == 1 and err[:-1].isprintable(), word

def test_help_shows_each_setting_with_default_and_comment_within_120_columns(settings, capsys):
    with pytest.raises(SystemExit) as error:
        settings('--help')
    out = capsys.readouterr().out
    assert error.value.code == 0 and out.startswith('Trains a thing.') and max(map(len, out.splitlines())) <= 120
    assert '--out_dir=out          where checkpoints go\n  --batch_size=12' in out

# ----------------------------------------------------------------------------
# hardware

@pytest.fixture
def hardware_stub(monkeypatch):
    """hardware_stub(cuda=2, capability=(9, 0), ...) answers for torch, whatever this machine has."""
    def stub(cuda=0, xpu=0, mps=False, hip=None, capability=(9, 0), name='card', gfx='', bf16=True, flags='', archs=[]):
        built = dict(hip=hip, cuda='12.8' if cuda and not hip else None, xpu='2025' if xpu else None)
        facts = SimpleNamespace(gcnArchName=gfx, has_bfloat16_conversions=bf16)
        same = dict(get_device_name=name, mem_get_info=(2 ** 30, 2 ** 31), get_device_properties=facts,
                    get_device_capability=capability, get_arch_list=archs)
        monkeypatch.setattr(torch, 'version', SimpleNamespace(**built))
        for api, answers in [(torch.cuda, dict(same, is_available=cuda > 0, device_count=cuda)),
                             (torch.xpu, dict(same, is_available=xpu > 0, device_count=xpu)),
                             (torch.backends.mps, dict(is_available=mps, is_built=mps))]:
            for query, answer in answers.items():
                monkeypatch.setattr(api, query, lambda device=None, answer=answer: answer, raising=False)
        real = hardware.proc
        monkeypatch.setattr(hardware, 'proc', lambda path, field: flags if 'flags' in field else real(path, field))
    return stub

@pytest.mark.parametrize('facts, device, dtype', [
    (dict(cuda=1, xpu=1, mps=True), 'cuda', 'bfloat16'), (dict(cuda=1, capability=(7, 5)), 'cuda', 'float16'),
    (dict(cuda=1, capability=(6, 1)), 'cuda', 'float32'), (dict(cuda=1, hip='6.4', gfx='gfx942:x'), 'cuda', 'bfloat16'),
    (dict(cuda=1, hip='6.4', gfx='gfx1030'), 'cuda', 'float16'), (dict(mps=True), 'mps', 'float32'),
    (dict(xpu=1, mps=True), 'xpu', 'bfloat16'), (dict(xpu=1, bf16=False), 'xpu', 'float32'), ({}, 'cpu', 'float32'),
    (dict(cuda=1, capability=(5, 0), archs=['sm_75', 'compute_90a']), 'cpu', 'float32'),
    (dict(cuda=1, capability=(12, 0), archs=['sm_90', 'sm_100']), 'cuda', 'bfloat16'),
    (dict(flags='avx2 avx512_bf16'), 'cpu', 'bfloat16'), (dict(flags='asimd bf16'), 'cpu', 'bfloat16')])
def test_auto_takes_the_best_device_and_only_a_real_dtype(hardware_stub, facts, device, dtype):
    hardware_stub(**facts)
    assert (hardware.pick_device(), hardware.pick_dtype(device)) == (device, dtype)

@pytest.mark.parametrize('facts, wish, says', [
    (dict(cuda=2), 'cuda:7', 'cuda:0, cuda:1, cpu'), ({}, 'cuda', 'without CUDA'), ({}, 'rocm', 'without ROCm'),
    (dict(cuda=1), 'rocm', 'cuda:0'), ({}, 'mps', 'MPS'), ({}, 'tpu', 'there is cpu'), ({}, '', 'cpu')])
def test_a_device_that_is_not_there_is_refused_with_what_is(hardware_stub, facts, wish, says):
    hardware_stub(**facts)
    with pytest.raises(ValueError, match=says):
        hardware.pick_device(wish)

@pytest.mark.parametrize('name, dtype, teraflops', [
    ('NVIDIA H200', 'bfloat16', 989), ('NVIDIA H100 PCIe', 'float16', 756), ('NVIDIA A100-SXM4-40GB', 'float32', 0),
    ('Tesla T4', 'float16', 65), ('Tesla T4', 'bfloat16', 0), ('NVIDIA H100', 'bfloat16', 0),
    ('NVIDIA A100-SXM4-40GB MIG 3g.20gb', 'bfloat16', 0), ('NVIDIA L40', 'bfloat16', 0)])
def test_a_peak_is_the_exact_cards_or_unknown(hardware_stub, name, dtype, teraflops):
    hardware_stub(cuda=1, name=name, capability=(7, 5) if 'T4' in name else (9, 0))
    expected = (pytest.approx(teraflops * 1e12), 'vendor') if teraflops else (0.0, 'unknown')
    assert hardware.peak_flops('cuda', dtype) == expected

def test_the_table_and_its_plain_values_agree(hardware_stub):
    hardware_stub(cuda=2, name='NVIDIA L4', capability=(8, 9))
    facts, text = json.loads(json.dumps(hardware.report())), hardware.table()
    cards = [row for row in facts['table'] if row['backend'] == 'CUDA']
    assert facts['device'] == 'cuda' and len(cards) == text.count('NVIDIA L4') == 2
    assert cards[1]['dtypes'] == 'float32 TF32 float16 bfloat16' and cards[1]['peak_tflops'] == 121
    assert '\033' not in text and all(row.get('reason', '') in text for row in facts['table'])

def test_a_compiler_that_fails_is_one_quiet_line(monkeypatch, capsys):
    def fail(function):
        print('noise')
        raise RuntimeError('no compiler\nhere')
    monkeypatch.setattr(torch, 'compile', fail)
    assert hardware.compile_problem('cpu') == 'RuntimeError: no compiler here'
    assert 'MPS' in hardware.compile_problem('mps') and capsys.readouterr().out == ''

@pytest.mark.parametrize('flag, prints', [('--recommended', 'cpu\n'), ('--check', 'float32'), ('--json', '"MPS"')])
def test_the_command_answers_each_flag(hardware_stub, monkeypatch, capsys, flag, prints):
    hardware_stub()
    monkeypatch.setattr(sys, 'argv', ['hardware.py', flag])
    runpy.run_path(hardware.__file__, run_name='__main__')
    assert prints in capsys.readouterr().out

# ----------------------------------------------------------------------------
# data

WORDS = 'The quick brown fox, 12 of them, didn\'t jump over the lazy dog.\nשלום עולם e\u0301 👩‍👩‍👧 naïve\r\n\t'
NASTY = '\ufeff\x1b[2J' + WORDS * 20 + '\0 \x1b[31m <|endoftext|> \u2028 \U0010ffff 中文字' + ' ' * 30 + '\n\n' * 5 + 'end'
SERVED = WORDS.encode() * 50

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
    None, {}, {'kind': 'char'}, {'kind': 'char', 'chars': ''}, {'kind': 'char', 'chars': 'aa'},
    {'kind': 'bpe', 'pattern': '(', 'ranks': [], 'special': {}}, {'kind': 'bpe', 'ranks': ['!'], 'special': 3}])
def test_a_malformed_tokenizer_is_refused(meta):
    assert 'malformed' in data_refusal(Tokenizer, meta)

@pytest.mark.parametrize('source', ['out.pt', 'first', 'data/first'])
def test_the_tokenizer_of_a_checkpoint_or_a_data_set_can_be_taken(data_dir, source):
    meta = data_make('The dog.\n' * 50, name='first')[0].meta['tokenizer']
    torch.save({'tokenizer': meta}, 'out.pt')
    assert data_make('The dog.' * 50, tokenizer=source)[0].meta['tokenizer'] == meta
    message = data_refusal(data_make, 'zoo' * 50, tokenizer=source)
    assert "in.txt: the tokenizer does not know the character 'z'" in message

@pytest.mark.parametrize('content', [b'', b'text', b'PK\x03\x04', b'\x80\x02cos\nsystem\n(S"touch hacked"\ntR.', None])
def test_what_is_no_tokenizer_is_refused_and_not_run(data_dir, content):
    if content is not None:
        Path('x.pt').write_bytes(content)
    assert '--tokenizer=x.pt: not auto' in data_refusal(data_make, tokenizer='x.pt') and not Path('hacked').exists()

def test_text_in_pieces_gives_the_same_tokens_as_in_one(data_dir, monkeypatch):
    monkeypatch.setattr(prepare, 'PIECE', 50)
    text = WORDS * 30 + '\n  \n\n x\x1c y\u3000 z' * 9 + ' ' + 'x' * 500
    _, coder, ids = data_make(text, tokenizer='bpe', vocab_size=400)
    assert coder.decode(ids) == text and ids.tolist()[:700] == coder.encode(text)[:700]

@pytest.mark.parametrize('tokenizer, between', [('bpe', '<|endoftext|>'), ('char', '\n')])
def test_documents_are_separated(data_dir, tokenizer, between):
    Path('texts/.git').mkdir(parents=True)
    for name, data in ('b.txt', b'The dog'), ('a.txt', b'A quick fox'), ('c.png', b'\0\1'), ('.git/config', b'no'):
        Path('texts', name).write_bytes(data)
    data = load_dataset(prepare.prepare(['texts', 'texts/a.txt'], tokenizer=tokenizer))
    decoded = Tokenizer(data.meta['tokenizer']).decode(data_ids(data))
    assert decoded == between.join(['A quick fox', 'The dog', 'A quick fox'])

def test_rows_of_a_hugging_face_data_set_are_documents(data_dir, monkeypatch):
    def load(name, split, streaming):
        assert (name, split, streaming) == ('owner/tales', 'train', True)
        return iter([{'id': 1, 'tale': 'A quick fox'}, {'id': 2, 'tale': 'The dog'}])
    monkeypatch.setitem(sys.modules, 'datasets', SimpleNamespace(load_dataset=load))
    data = load_dataset(prepare.prepare('hf:owner/tales:tale', tokenizer='bpe'))
    assert Tokenizer(data.meta['tokenizer']).decode(data_ids(data)) == 'A quick fox<|endoftext|>The dog'
    assert data.meta['sources'] == ['hf:owner/tales:tale'] and Path('data/tales/meta.json').exists()
    assert 'hf:owner/tales:COLUMN with one of id, tale' in data_refusal(prepare.prepare, 'hf:owner/tales')
    monkeypatch.setitem(sys.modules, 'datasets', None)  # not installed
    assert 'pip install datasets' in data_refusal(prepare.prepare, 'hf:owner/tales:tale', name='other')

@pytest.mark.parametrize('text, expected', [
    (b'', 'no text'), (b'aaaa' * 99, 'too little'), (b'abc', 'too little'), ('abc'.encode('utf-16'), 'offset 0'),
    (b'x' * 70 + b'\xff' + b'y' * 70, 'in.txt is not UTF-8 text (byte 0xff at offset 70)'),
    (b'x' * 70 + '中'.encode()[:2], 'offset 70')])
def test_a_bad_text_is_refused_with_file_and_offset(data_dir, monkeypatch, text, expected):
    monkeypatch.setattr(prepare, 'PIECE', 32)
    message = data_refusal(data_make, text)
    assert expected in message and 'in.txt' in message

def test_odd_characters_are_reported_and_never_printed_raw(data_dir, capsys):
    data_make()
    prepare.show_list()
    prepare.show_info('in')
    shown = capsys.readouterr().out
    assert "kept as they are: '\\x00\\r\\x1b" in shown and 'python train.py --dataset=in' in shown
    assert 'quick' in shown and '\x1b' not in shown and '\0' not in shown
    assert prepare.printable('a\x1b[2J\r\x9b\u202e\ud800\n\t é👩‍👧') == 'a\\x1b[2J\\r\\x9b\\u202e\\ud800\n\t é👩‍👧'

@pytest.mark.parametrize('name', ['../x', '/tmp/x', '.x', 'a/b', '..', 'a\\b', 'x' * 200])
def test_a_name_cannot_lead_out_of_data(data_dir, name):
    assert 'name' in data_refusal(data_make, name=name)
    for source in (name, f'http://x/{name}?q'):
        assert re.fullmatch(r'[\w-]+', prepare.make_name(source))

def test_a_text_put_there_by_hand_is_taken_and_kept(data_dir, capsys):
    Path('data/shakespeare').mkdir(parents=True)
    Path('data/shakespeare/input.txt').write_text(WORDS * 9, 'utf-8', newline='')
    for _ in range(2):
        assert prepare.prepare('shakespeare') == Path('data/shakespeare')
    assert Path('data/shakespeare/input.txt').exists() and 'not the usual text' in capsys.readouterr().out

def test_shards_are_one_stream_and_an_interrupted_run_goes_on(data_dir, monkeypatch):
    monkeypatch.setattr(prepare, 'PIECE', 100)
    expected, _, whole = data_make(WORDS * 100, name='whole', tokenizer='bpe')
    monkeypatch.setattr(prepare, 'SHARD', 9)
    replace = os.replace
    with monkeypatch.context() as patch, suppress(ZeroDivisionError):
        patch.setattr(os, 'replace', lambda a, b: 1 / 0 if b.name == 'train_00003.bin' else replace(a, b))
        data_make(WORDS * 100, name='shards', tokenizer='bpe')
    monkeypatch.setattr(prepare, 'train_bpe', None)  # the vocabulary is there already
    assert len(list(Path('data/shards').glob('new-*/*.bin'))) == 3
    data = load_dataset(prepare.prepare('in.txt', name='shards', tokenizer='bpe'))
    assert len(data.train.paths) > 5 and np.array_equal(data_ids(data), whole)
    assert all(data.meta[key] == expected.meta[key] for key in ('source_sha256', 'bytes', 'characters'))
    starts = np.arange(len(data.train) - 250)
    assert np.array_equal(data.train.read(starts, 250), whole[starts[:, None] + np.arange(250)])

@pytest.mark.parametrize('moment', range(8))
def test_preparing_again_never_leaves_less_than_a_whole_data_set(data_dir, moment, monkeypatch):
    data_make('ab' * 200)
    Path('data/in/input.txt').write_text('mine')
    calls = itertools.count()
    with monkeypatch.context() as patch, suppress(ZeroDivisionError):
        for place, name in (os, 'replace'), (Path, 'rename'), (Path, 'unlink'):
            def counted(*arguments, real=getattr(place, name), **options):
                return 1 / 0 if next(calls) == 2 * moment else real(*arguments, **options)
            patch.setattr(place, name, counted)
        data_make('cd' * 200)
    assert load_dataset('in').meta['tokenizer']['chars'] in ('ab', 'cd')
    assert Path('data/in/input.txt').read_text() == 'mine'
    assert data_make('ef' * 200)[1].decode([0]) == 'e' and not list(Path('data/in').glob('new-*'))

@pytest.mark.parametrize('path, change, expected', [
    ('train.bin', lambda b: b[:-2], 'cut short'), ('train.bin', lambda b: b[2:4] + b[2:], 'not those'),
    ('train.bin', lambda b: b'\xff\xff' + b[2:], 'holds the id 65535'), ('val.bin', None, 'missing'),
    ('val.bin', lambda b: b[:-1], 'no sound'), ('val.bin', lambda b: b'', 'no sound'), ('meta.json', None, 'missing'),
    ('meta.json', lambda b: b'[' * 5000, 'RecursionError'), ('meta.json', lambda b: b[:40], 'no sound'),
    ('meta.json', lambda b: b.replace(b'"vocab_size": 2', b'"vocab_size": 3'), 'vocab_size is 3')])
def test_a_damaged_data_set_is_refused_with_the_command_that_mends_it(data_dir, path, change, expected):
    data_make('ab' * 200)
    file = Path('data/in', path)
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    message = data_refusal(load_dataset, 'in')
    assert expected in message and 'run "python prepare.py TEXT.txt --name=in"' in message

def test_an_epoch_reads_every_window_once_and_the_next_one_another_way():
    starts = prepare.window_starts(0, 2 * 9, 1000, 100, seed=1)  # 9 windows an epoch
    for epoch in (starts[:9], starts[9:]):
        assert np.array_equal(np.diff(np.sort(epoch)), [100] * 8) and 0 <= epoch.min() and epoch.max() + 101 <= 1000
    assert not np.array_equal(starts[:9], starts[9:]) and not np.array_equal(starts[:9], np.sort(starts[:9]))
    assert len({int(prepare.window_starts(9 * e, 9, 1000, 100, seed=1).min()) for e in range(20)}) > 10  # offsets

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
        assert x.dtype == torch.int64 and np.array_equal(x, expected[:, :-1]) and np.array_equal(y, expected[:, 1:])

@pytest.mark.parametrize('n, block_size, rows', [(401, 16, 4), (400, 16, 4), (17, 16, 4), (5, 16, 3), (2, 1, 1)])
def test_validation_predicts_every_token_after_the_first_once(data_dir, n, block_size, rows):
    np.arange(n, dtype='<u2').tofile('val.bin')
    tokens = prepare.Tokens([Path('val.bin')], np.dtype('<u2'))
    pairs = list(prepare.val_batches(tokens, block_size, rows))
    assert torch.cat([y[y >= 0] for x, y in pairs]).tolist() == list(range(1, n))
    assert all(torch.equal(y[y >= 0], x[y >= 0] + 1) for x, y in pairs)
    assert len(list(prepare.val_batches(tokens, block_size, rows, 2))) <= 2

@pytest.fixture
def data_server(data_dir):
    """-> (address, replies, ranges): each request runs the next of `replies`, the last of them for ever."""
    replies, ranges = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            ranges.append((self.headers.get('Range'), self.headers.get('If-Range')))
            with suppress(OSError):  # the other side has heard enough
                (replies.pop(0) if len(replies) > 1 else replies[0])(self)

        def log_message(self, *_):
            pass
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}/a.txt', replies, ranges
        httpd.shutdown()

def data_reply(status=200, body=SERVED, length=None, wait=0, times=1, **headers):
    def send(request):
        request.send_response(status)
        for key, value in ({'Content-Length': length or len(body) * times, 'ETag': '"1"'} | headers).items():
            request.send_header(key.replace('_', '-'), value)
        request.end_headers()
        for _ in range(times):
            request.wfile.write(body)
            time.sleep(wait)
    return send

@pytest.mark.parametrize('replies', [
    [data_reply(500, b''), data_reply(body=SERVED[:900], length=len(SERVED)),
     data_reply(206, SERVED[900:], Content_Range=f'bytes 900-{len(SERVED) - 1}/{len(SERVED)}')],
    [data_reply(body=b'another version' * 9, length=len(SERVED)), data_reply(ETag='"2"')]])
def test_a_download_survives_errors_and_goes_on_where_it_was_cut(data_server, replies):
    url, served, ranges = data_server
    served += replies
    prepare.download(url, Path('a.txt'))
    assert Path('a.txt').read_bytes() == SERVED and os.listdir() == ['a.txt'] and ranges[-1][1] == '"1"'

@pytest.mark.parametrize('error, last, expected', [
    (ValueError, data_reply(404, b''), 'answered 404'), (ConnectionError, data_reply(503, b''), '503'),
    (ConnectionError, data_reply(body=b'', length=99), 'cannot be downloaded'),
    (ValueError, data_reply(body=b'wrong'), 'another text'), (ValueError, data_reply(length=10**6), 'limit'),
    (ConnectionError, data_reply(body=b'x' * 50, wait=0.1, times=3), 'less than 1 kB'),
    (ValueError, data_reply(206, b'x', Content_Range='bytes 7-7/8'), 'answered 206'),
    (ValueError, data_reply(302, b'', Location='file:///etc/passwd'), 'file:///etc/passwd')])
def test_a_bad_server_leaves_no_file(data_server, monkeypatch, error, last, expected):
    monkeypatch.setattr(prepare, 'DOWNLOAD_LIMIT', 50_000)
    monkeypatch.setattr(prepare, 'PATIENCE', -1 if 'kB' in expected else 30)
    data_server[1].append(last)
    with pytest.raises(error, match=expected):
        prepare.download(data_server[0], Path('a.txt'), '0' * 64)
    assert os.listdir() == [] if error is ValueError else not Path('a.txt').exists()

def test_a_killed_download_goes_on_in_the_next_process(data_server):
    url, served, ranges = data_server
    text = SERVED * 50

    def rest(request):
        begin = int(request.headers['Range'][len('bytes='):-1])
        data_reply(206, text[begin:], Content_Range=f'bytes {begin}-{len(text) - 1}/{len(text)}')(request)
    served += [data_reply(body=text[:200_000], length=len(text), wait=9), rest]
    part, code = Path('a.txt.part'), 'import pathlib, prepare; prepare.download(sys.argv[1], pathlib.Path("a.txt"))'
    code = 'import sys; sys.modules["torch"] = sys; ' + code  # which would take seconds to import
    with subprocess.Popen([sys.executable, '-c', code, url], env={**os.environ, 'PYTHONPATH': str(HERE)}) as process:
        while not part.exists() or part.stat().st_size < 100_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert os.path.getsize(part) < len(text) and not Path('a.txt').exists()
    prepare.download(url, Path('a.txt'))
    assert Path('a.txt').read_bytes() == text and os.listdir() == ['a.txt']
    assert len(ranges) == 2 and ranges[1][0] > 'bytes=1' and ranges[1][1] == '"1"'

def test_a_download_killed_before_it_got_its_name_ends_well(data_server):
    url, served, ranges = data_server
    served += [data_reply(416, b''), data_reply()]
    Path('a.txt.part').write_bytes(SERVED)
    Path('a.txt.etag').write_text('"1"')
    prepare.download(url, Path('a.txt'))
    assert Path('a.txt').read_bytes() == SERVED and ranges[0] == (f'bytes={len(SERVED)}-', '"1"')

def test_no_redirect_leads_from_https_to_http(data_server, monkeypatch):
    def send(_, request, **options):
        answer = requests.Response()
        answer.url, answer.request, answer.raw = request.url, request, io.BytesIO()
        answer.status_code, answer.headers['location'] = 302, data_server[0]
        return answer
    monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', send)
    assert data_server[0] in data_refusal(prepare.download, 'https://a/b', Path('a.txt'))

# ----------------------------------------------------------------------------
# model

TINY = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
DEVICES = ['cpu', *([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])]

def tiny(seed=0, device='cpu', **changes):
    """A small model whose every weight matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**TINY, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.eval().to(device)

def ids(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))

def plain(model, x):
    """Logits (B, T, vocab_size) of the model, in plain lines; each position sees the last block_size, at any length."""
    c, T = model.config, x.size(1)
    seen = torch.ones(T, T).tril().triu(1 - c.block_size).bool()

    def normed(x):
        if c.use_rms_norm:
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    def turned(x):  # (B, T, heads, head_dim), as complex numbers whose parts are the two halves
        half = x.size(-1) // 2
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((z.real, z.imag), dim=-1)

    h = model.embedding.weight[x]
    for block in model.blocks:
        heads = block.attention.qkv(normed(h)).unflatten(-1, (-1, c.head_dim))  # (B, T, all heads, head_dim)
        q, k, v = heads.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
        q, k = (turned(normed(t) if c.qk_norm else t) for t in (q, k))
        y = []
        for head in range(c.n_head):
            shared = head // (c.n_head // c.n_kv_head)
            scores = q[:, :, head] @ k[:, :, shared].mT / c.head_dim**0.5  # (B, T, T)
            y.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, :, shared])
        h = h + block.attention.proj(torch.cat(y, dim=-1))
        up = block.mlp.up(normed(h))
        a, b = up[..., : c.hidden_dim], up[..., c.hidden_dim :]
        h = h + block.mlp.down(a * a.sigmoid() * b if c.use_swiglu else F.gelu(up))
    return normed(h) @ model.embedding.weight.T

@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@pytest.mark.parametrize('options', [{}, dict(qk_norm=False, bias=True, use_rms_norm=False, use_swiglu=False)])
def test_the_model_and_its_gradients_equal_plain_lines(n_kv_head, options):
    model, x, targets = tiny(n_kv_head=n_kv_head, **options), ids(2, 16), ids(2, 16, seed=2)
    targets[:, 12:] = -1  # do not count
    logits, expected = model(x, x)[0], plain(model, x)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)  # float32 sums of 32 to 128 terms
    losses = model(x, targets, return_logits=False)[1], F.cross_entropy(expected[:, :12].mT, targets[:, :12])
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)

@pytest.mark.parametrize('device', DEVICES)
def test_a_future_token_cannot_change_an_earlier_logit(device):
    model, x = tiny(device=device), ids(2, 16).to(device)
    changed = x.clone()
    changed[:, 10] = (x[:, 10] + 1) % 50
    before, after = model(x, x)[0], model(changed, x)[0]
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=(0, 2)).min() > 0

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('rows', [7, 4000])  # 4000 x 5000 logits are made in slices
def test_the_loss_without_logits_equals_cross_entropy(rows, device):
    x, w = (torch.randn(n, 8, device=device, requires_grad=True) for n in (rows, 5000))
    targets = torch.randint(5000, (rows,), device=device)
    targets[::3] = -1
    ours, plain = gpt.LinearCrossEntropy.apply(x, w, targets), F.cross_entropy(x @ w.T, targets, ignore_index=-1)
    torch.testing.assert_close(ours, plain)
    for got, wanted in zip(torch.autograd.grad(2 * ours, (x, w)), torch.autograd.grad(2 * plain, (x, w))):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-3)  # sums of 4000 terms in another order

def test_rope_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(at_q, at_k):
        return (gpt.rotate(q, *gpt.rope_table(at_q, 1, 8)) * gpt.rotate(k, *gpt.rope_table(at_k, 1, 8))).sum()

    for shift in (1, 100, 10_000_000):  # float32 angles would be off by half a turn at the last
        torch.testing.assert_close(score(7, 3), score(7 + shift, 3 + shift), atol=1e-5, rtol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3

@pytest.mark.parametrize('name, millions', [('tiny', 10), ('small', 25), ('medium', 80), ('large', 350)])
def test_presets_have_the_size_they_promise(name, millions):
    with torch.device('meta'):
        model = create_model(name)
    c = model.config
    per_layer = c.n_embd * (c.n_head + 2 * c.n_kv_head) * c.head_dim + c.n_embd**2 + 3 * c.n_embd * c.hidden_dim
    assert model.n_params() == c.vocab_size * c.n_embd + c.n_layer * per_layer
    assert model.n_params() == pytest.approx(millions * 1e6, rel=0.1)
    assert c.head_dim in (64, 128) and c.n_kv_head < c.n_head

@pytest.mark.parametrize('changes, words', [
    (dict(n_embd=100, n_head=12), 'n_embd 100 does not divide into n_head 12'), (dict(n_kv_head=3), 'n_kv_head 3'),
    (dict(n_layer=0), 'n_layer is 0'), (dict(dropout=1.0), 'dropout is 1.0'), (dict(n_embd=12, n_head=4), 'even')])
def test_an_impossible_shape_is_refused_with_its_numbers(changes, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**TINY, **changes})

def test_the_loss_starts_near_log_vocab_size():
    model, x = create_model('tiny', vocab_size=500, n_layer=3), torch.randint(500, (4, 65))
    assert model(x[:, :-1], x[:, 1:])[1].item() == pytest.approx(math.log(500), abs=0.1)

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_one_batch_can_be_memorised(kind):
    model, x = GPT(GPTConfig(**TINY)), ids(4, 17)
    optimizer = gpt.make_optimizer(model, kind, 1e-2, (0.9, 0.95), 0.02, 0.95, 0.0)
    for _ in range(80):
        loss = model(x[:, :-1], x[:, 1:], return_logits=False)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1

def test_gradient_checkpointing_changes_no_gradient_and_keeps_less():
    x, gradients, kept = ids(8, 17), [], []
    for on in (False, True):
        model = tiny(gradient_checkpointing=on, n_layer=4).train()
        sizes = {}
        pack = lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(x[:, :-1], x[:, 1:])[1]
        kept.append(sum(sizes.values()))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < 0.5 * kept[0]

def test_muon_makes_the_step_of_torch_optim_muon():
    start = [torch.randn(64, 32), torch.randn(64, 32), torch.randn(16, 48)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = (gpt.Muon([dict(params=ours, muon=True, momentum=0.95)], lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn='original'))
    for _ in range(3):
        gradients = [torch.randn_like(w) for w in start]
        for params, optimizer in zip((ours, theirs), optimizers):
            for p, g in zip(params, gradients):
                p.grad = g.clone()
            optimizer.step()
    for a, b, w in zip(ours, theirs, start):  # torch's computes in bfloat16, 8 bits: a few per cent of the way gone
        assert (a - b).norm() < 0.05 * (a - w).norm()

def test_matrices_decay_and_nothing_else_does():
    model = tiny(bias=True)
    for kind, part in ('adamw', model), ('muon', model.blocks):
        decaying = {p for p in part.parameters() if p.dim() == 2}
        groups = gpt.make_optimizer(model, kind, 1e-3, (0.9, 0.95), 0.02, 0.95, 0.1).param_groups
        assert {p for g in groups if g['weight_decay'] for p in g['params']} == decaying
        assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))

def test_autocast_and_float32_agree():
    model, x = tiny(), ids(2, 17)
    with torch.autocast('cpu', torch.bfloat16):
        low = model(x[:, :-1], x[:, 1:], return_logits=False)[1]
    low.backward()
    loss = model(x[:, :-1], x[:, 1:])[1]
    assert low.item() == pytest.approx(loss.item(), rel=0.01)  # bfloat16 keeps 8 bits
    assert all(p.grad.isfinite().all() for p in model.parameters())

# ----------------------------------------------------------------------------
# checkpoints

def checkpoint(model, **changes):
    return dict({name: kind() for name, kind in gpt.FIELDS.items()}, model=model.state_dict(),
                model_config=vars(model.config).copy()) | changes

def test_a_checkpoint_comes_back_equal_and_the_tied_weights_are_one_tensor(tmp_path):
    model, x = tiny(), ids(2, 16)
    save_checkpoint(str(tmp_path / 'c.pt'), checkpoint(model))
    again = load_model(load_checkpoint(str(tmp_path / 'c.pt'))).eval()
    assert torch.equal(model(x, x)[0], again(x, x)[0]) and os.listdir(tmp_path) == ['c.pt']
    again.embedding.weight.data[3] += 1  # moves input and output alike
    assert torch.equal(again(x, x)[0], again.trunk(x, (again.cos, again.sin)) @ again.embedding.weight.T)
    assert sum(p.numel() == 50 * 32 for p in again.parameters()) == 1

class Hostile:
    def __reduce__(self):
        return Path.touch, (Path('hostile_code_has_run'),)

SPOILS = {
    'empty': lambda whole: b'', 'text': lambda whole: b'hello', 'cut': lambda whole: whole[: len(whole) // 2],
    'one bit': lambda whole: whole[:9999] + bytes([whole[9999] ^ 1]) + whole[10000:],
    'hostile': {'model': Hostile()}, 'hostile legacy': {'model': Hostile()}, 'no model': {'model': 7},
    'of another program': {'weights': torch.ones(3)}, 'missing': None, 'a directory': os.mkdir,
    'of another shape': {'model_config': {**TINY, 'n_embd': 64}}}

@pytest.mark.parametrize('how', SPOILS)
def test_a_spoilt_checkpoint_is_refused_in_one_line_and_runs_nothing(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path, spoil, good = Path('c.pt'), SPOILS[how], checkpoint(tiny())
    if isinstance(spoil, dict):
        whole = spoil if 'of another program' in how else good | spoil
        torch.save(whole, path, _use_new_zipfile_serialization='legacy' not in how)
    elif spoil is os.mkdir:
        spoil(path)
    elif spoil:
        torch.save(good, path)
        path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        load_model(load_checkpoint('c.pt'))
    assert '\n' not in str(caught.value) and not Path('hostile_code_has_run').exists()

# ----------------------------------------------------------------------------
# training: the scripts, as they are used

TEXT = 'The quick brown fox, 12 of them, jumps over the lazy dog.\n'
TINY_RUN = """# 40 updates of two micro-batches; every third is an evaluation and a save
dataset, device, dtype, compile, threads = 'plain', 'cpu', 'float32', 'false', 1
n_layer, n_head, n_kv_head, n_embd, block_size, dropout = 2, 2, 1, 32, 16, 0.1
batch_size, tokens_per_update, max_iters, warmup_iters, cooldown = 4, 128, 40, 4, 0.5
log_interval, eval_interval, eval_iters = 1, 3, 2
"""

def script(name, *arguments):
    return [sys.executable, str(HERE / name), *map(str, arguments)]

def run(command, cwd, status=0, **options):
    """The command as a process, which must end with this status -> (stdout, stderr)"""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == status, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return done.stdout, done.stderr

def broken_and_resumed(folder, number, *flags):
    """A run gets the signal at its first line of figures, and is resumed -> (status, last line) of its first life"""
    command = script('train.py', 'tiny.py', *flags)
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if '/40 ' in line:
                process.send_signal(number)
                break
        last = process.stdout.read().splitlines()[-1]
    run(script('train.py', '--resume', flags[-1], '--eval_interval=7'), folder)
    return process.returncode, last

@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    """A folder with a data set and finished runs: muon, adamw, and cut-..., which were interrupted and resumed."""
    folder = tmp_path_factory.mktemp('runs')
    (folder / 'missing').mkdir()
    (folder / 'missing/matplotlib.py').write_text('raise ImportError')  # optional, and slow to import
    (folder / 'tiny.py').write_text(TINY_RUN)
    (folder / 'plain.txt').write_text(TEXT * 200)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv('OMP_NUM_THREADS', '1')
        patch.setenv('PYTHONPATH', str(folder / 'missing'))
        with pytest.MonkeyPatch.context() as there:
            there.chdir(folder)
            prepare.prepare('plain.txt')
        muon, adamw = ['--optimizer=muon'], ['--optimizer=adamw', '--lr_schedule=linear']
        cut = [pool.submit(broken_and_resumed, folder, signal.SIGINT, *muon, '--out_dir=cut-muon'),
               pool.submit(broken_and_resumed, folder, signal.SIGTERM, *adamw, '--out_dir=cut-adamw')]
        for kind in muon, adamw:
            pool.submit(run, script('train.py', 'tiny.py', *kind, '--out_dir=' + kind[0][12:]), folder).result()
        yield SimpleNamespace(folder=folder, muon=cut[0].result(), adamw=cut[1].result())

@pytest.fixture
def place(runs, tmp_path, monkeypatch):
    """The current folder: the tiny config, its data set, and the run with Muon in out/."""
    shutil.copytree(runs.folder / 'data', tmp_path / 'data')
    shutil.copytree(runs.folder / 'muon', tmp_path / 'out')
    shutil.copy(runs.folder / 'tiny.py', tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def call(place, monkeypatch, capsys):
    """call('train.py', '--key=value', status=0) -> (stdout, stderr) of the script run in this process: that spares the
    imports, and its parts can be replaced."""
    for owner, name in (signal, 'signal'), (gc, 'freeze'):
        monkeypatch.setattr(owner, name, lambda *_: None)
    monkeypatch.setattr(sys, 'stdin', None)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)

    def call(name, *arguments, status=0):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(HERE / name), run_name='__main__')
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        out, err, code = (out, f'{err}{code}\n', 1) if isinstance(code, str) else (out, err, code)
        assert code == status, out + err
        return out, err
    return call

def log_of(folder):
    with open(folder / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))

def column(folder, name):
    return [float(row[name]) for row in log_of(folder) if row[name]]

def assert_same_state(a, b):
    """Weights and optimizer state of two ckpt.pt, bit for bit."""
    a, b = (load_checkpoint(str(folder / 'ckpt.pt')) for folder in (a, b))
    assert a['iter_num'] == b['iter_num'] and a['model'].keys() == b['model'].keys()
    assert all(torch.equal(weight, b['model'][name]) for name, weight in a['model'].items())
    for p, state in a['optimizer']['state'].items():
        assert all(torch.equal(value, b['optimizer']['state'][p][name]) for name, value in state.items())

@pytest.mark.parametrize('kind, by_hand', [  # updates 1 and 4 of 4 that warm up, the one after, 22 and the last, 40
    ('muon', [0.2, 0.8, 1, *((1 + math.cos(math.pi * done / 36)) / 2 for done in (17, 35))]),
    ('adamw', [0.2, 0.8, 1, 19 / 20, 1 / 20])])
def test_the_learning_rate_follows_the_schedule(runs, kind, by_hand):
    lr = column(runs.folder / kind, 'lr')
    assert [lr[n - 1] / 0.01 for n in (1, 4, 5, 22, 40)] == pytest.approx(by_hand, rel=1e-5)  # six digits are logged

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_a_run_makes_its_updates_and_keeps_the_latest_and_the_best(runs, kind):
    folder = runs.folder / kind
    latest, best = (load_checkpoint(str(folder / name)) for name in ('ckpt.pt', 'best.pt'))
    assert column(folder, 'iter') == list(range(1, 41))
    assert latest['iter_num'] == 40 and latest['tokens_seen'] == 40 * 128
    assert {int(s['step']) for s in latest['optimizer']['state'].values() if 'exp_avg' in s} == {40}
    assert [int(row['iter']) for row in log_of(folder) if row['val_loss']] == [*range(3, 40, 3), 40]
    assert 'optimizer' not in best and best['val_loss'] == pytest.approx(min(column(folder, 'val_loss')), abs=1e-6)
    assert column(folder, 'train_loss')[-1] < 0.7 * column(folder, 'train_loss')[0]

@pytest.mark.parametrize('kind, status', [('muon', 130), ('adamw', 143)])
def test_an_interrupted_and_resumed_run_equals_an_unbroken_one_bit_for_bit(runs, kind, status):
    code, last = getattr(runs, kind)
    unbroken, cut = runs.folder / kind, runs.folder / f'cut-{kind}'
    assert code == status and f'python train.py --resume --out_dir=cut-{kind}' in last
    assert_same_state(unbroken, cut)
    assert [column(cut, name) for name in ('iter', 'train_loss', 'lr')] == [
        column(unbroken, name) for name in ('iter', 'train_loss', 'lr')]

def survive(kills, folder):
    """Runs until done, killed so many times at random moments. Returns how many updates were lost each time."""
    rng, lost, seen, text, ckpt = random.Random(os.environ.get('PART', kills)), [], 0, '', folder / 'out/ckpt.pt'
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    for life in range(kills + 1):
        command = script('train.py', '--resume' if ckpt.exists() else 'tiny.py', f'--max_iters={20 * kills}')
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment) as process:
            if life < kills:
                text = ''.join(process.stdout.readline() for _ in range(rng.randint(1, 20)))  # 6 or so precede update 1
                time.sleep(rng.uniform(0, 0.06))  # seconds: two or three updates, or the middle of a save
                process.kill()
            text = text * (life < kills) + process.stdout.read()
        assert process.returncode == (-signal.SIGKILL if life < kills else 0), text
        seen = max([seen, *map(int, re.findall(r'^ *(\d+)/', text, re.M))])
        lost.append(seen - (load_checkpoint(str(ckpt))['iter_num'] if ckpt.exists() else 0))
        print(f'{len(lost)} of {kills} kills: update {seen}, {lost[-1]} lost', flush=True)
    return lost

@pytest.mark.parametrize('kills', [2, pytest.param(int(os.environ.get('KILLS', 200)), marks=pytest.mark.long)])
def test_a_killed_run_loses_at_most_one_interval_and_ends_the_same(place, runs, kills):
    shutil.rmtree('out')
    lost = survive(kills, place)
    if kills > 2:
        run(script('train.py', 'tiny.py', '--out_dir=unbroken', f'--max_iters={20 * kills}'), place)
    unbroken = place / 'unbroken' if kills > 2 else runs.folder / 'muon'
    print(f'{kills} kills; updates lost: ' + ', '.join(f'{lost.count(n)} times {n}' for n in sorted(set(lost))))
    assert max(lost) <= 3
    assert_same_state(unbroken, place / 'out')
    assert column(place / 'out', 'train_loss') == column(unbroken, 'train_loss')

def patch_training(monkeypatch, change):
    """From now on a model in training returns change(x, its loss)."""
    forward = GPT.forward

    def changed(self, x, *arguments, **options):
        logits, loss = forward(self, x, *arguments, **options)
        return logits, change(x, loss) if self.training else loss
    monkeypatch.setattr(GPT, 'forward', changed)

def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_bad(call, place, monkeypatch):
    calls = itertools.count(1)
    patch_training(monkeypatch, lambda x, loss: loss * math.nan if next(calls) == 9 else loss)  # in update 5
    out, err = call('train.py', 'tiny.py', '--log_interval=10', status=1)
    assert err.startswith('update 5: loss nan') and err.count('\n') == 1 and 'float32' in err and 'learning rate' in err
    assert_whole_of_update(3, place / 'out')

def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(call, place, monkeypatch):
    calls = itertools.count(1)

    def spoil(x, loss):
        if next(calls) == 9:  # in update 5
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss
    patch_training(monkeypatch, spoil)
    assert re.match(r'update 5: loss \d\.\d+, gradient norm nan', call('train.py', 'tiny.py', status=1)[1])
    assert_whole_of_update(3, place / 'out')

def assert_whole_of_update(n, folder):
    saved = [load_checkpoint(str(folder / name)) for name in ('ckpt.pt', 'best.pt')]
    assert all(s['iter_num'] == n and all(p.isfinite().all() for p in s['model'].values()) for s in saved)

def test_out_of_memory_halves_the_micro_batch_and_not_the_update(call, place, monkeypatch):
    flags, rows = ['tiny.py', '--max_iters=6', '--dropout=0'], 2

    def limited(x, loss):
        if len(x) > rows:
            raise torch.OutOfMemoryError('simulated')
        return loss
    call('train.py', *flags, '--out_dir=whole')
    patch_training(monkeypatch, limited)
    out, _ = call('train.py', *flags)
    assert re.search('out of memory.* 2 sequences.* 4 ', out)
    whole, halved = (column(place / name, 'train_loss') for name in ('whole', 'out'))
    assert halved == pytest.approx(whole, rel=1e-4)  # float32 sums in another order, over six updates
    rows = 0
    assert re.search(r'out of memory.* 1 x 16.* no checkpoint yet.* GiB', call('train.py', *flags, status=2)[1])

@pytest.mark.parametrize('owner, name, flags', [(gpt, 'inverse_root', []), (torch.optim.AdamW, 'step', []),
                                                (prepare, 'val_batches', []), (prepare, 'val_batches', ['--eval_only'])])
@pytest.mark.parametrize('error, says', [(torch.OutOfMemoryError('of 9 GiB'), 'out of memory at micro-batches of 4 x 16: of'),
                                         (FileNotFoundError(2, 'gone', 'val.bin'), 'val.bin: gone')])
def test_no_memory_or_no_data_later_is_one_line_and_no_half_update_is_saved(call, place, monkeypatch, owner, name, flags,
                                                                           error, says):
    real, calls = getattr(owner, name), itertools.count(0 if flags else -13)

    def fail(*arguments, **options):
        if next(calls) >= 0:
            raise error
        return real(*arguments, **options)
    monkeypatch.setattr(owner, name, fail)
    err = call('train.py', 'tiny.py', *flags, status=2)[1]
    assert err.startswith(says) and err.count('\n') == 1 and (flags or 'out/ckpt.pt is from before it' in err)
    saved = load_checkpoint('out/ckpt.pt')
    steps = {int(s['step']) for s in saved['optimizer']['state'].values() if 'exp_avg' in s}
    assert steps == {saved['iter_num']} and (flags or saved['iter_num'] < 40)

def test_a_data_set_that_vanishes_during_the_run_does_not_end_it(call, place, monkeypatch):
    calls = itertools.count(1)
    patch_training(monkeypatch, lambda x, loss: loss if next(calls) != 9 else shutil.rmtree('data') or loss)
    call('train.py', 'tiny.py', '--max_iters=9')
    assert not Path('data').exists() and load_checkpoint('out/ckpt.pt')['iter_num'] == 9

def test_a_second_ctrl_c_stops_at_once(runs, tmp_path):
    shutil.copytree(runs.folder / 'data', tmp_path / 'data')
    command = script('train.py', runs.folder / 'tiny.py', f'--tokens_per_update={128 * 10 ** 6}')  # an update of hours
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / 'out/log.csv').exists():  # after it come the handlers
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == '\n' and 'once more stops at once' in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130 and os.listdir(tmp_path / 'out') == ['log.csv']

@pytest.mark.parametrize('owner, name, flags, says', [
    (shutil, 'disk_usage', ['tiny.py'], 'GiB free'), (os, 'fsync', ['--resume', '--max_iters=50'], 'No space left')])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(call, monkeypatch, owner, name, flags, says):
    def full(_):
        if name == 'fsync':
            raise OSError(28, 'No space left on device')
        return SimpleNamespace(free=0)
    monkeypatch.setattr(owner, name, full)
    err = call('train.py', *flags, status=2)[1]
    assert says in err and err.count('\n') == 1 and load_checkpoint('out/ckpt.pt')['iter_num'] == 40
    assert [str(path) for path in Path().glob('out*/*ckpt*')] == ['out/ckpt.pt']

@pytest.mark.parametrize('users, changes', [
    (3, dict(val_loss='1')), (3, dict(iter_num=None)), (3, dict(tokens_seen=-1)), (3, dict(elapsed=math.nan)),
    (3, dict(config=[])), (3, dict(dataset_sha256=0)), (3, dict(tokenizer='char')), (3, dict(tokenizer={'kind': 'char'})),
    (3, dict(model={})), (3, dict(model={'embedding.weight': 'x'})), (3, dict(model_config={'n_layer': '2'})),
    (3, dict(model_config={'width': 3})), (3, dict(model_config={**TINY, 'n_layer': 10 ** 9})),
    (3, dict(model_config={**TINY, 'mlp_ratio': math.inf})), (1, dict(config={'n_layer': 'two'})),
    (1, dict(config={'dataset': 'plain', 'device': 'cpu'})),
    (1, dict(optimizer=7)), (1, dict(optimizer={'state': {}, 'param_groups': []})), (1, dict(optimizer={})),
    (1, 'step'), (1, 'exp_avg')])
def test_a_checkpoint_with_an_odd_field_is_refused_by_all_who_read_it(call, place, users, changes):
    saved = load_checkpoint('out/ckpt.pt')
    if isinstance(changes, str):
        entry = next(entry for entry in saved['optimizer']['state'].values() if changes in entry)
        entry[changes] = torch.ones(3)
        changes = {}
    torch.save(saved | changes, 'out/ckpt.pt')
    os.remove('out/best.pt')
    for command in [('train.py', '--resume', '--max_iters=50'), ('train.py', 'tiny.py', '--init_from=out/ckpt.pt',
                    '--out_dir=other'), ('sample.py',)][:users]:
        assert call(*command, status=2)[1].count('\n') == 1
    assert not Path('other').exists() and len(log_of(place / 'out')) == 40

def test_a_row_of_the_log_that_a_crash_cut_short_is_made_again(call, place):
    with open('out/log.csv', 'a') as file:
        file.write('41,2.5,1.2')
    call('train.py', '--resume', '--max_iters=42')
    assert column(place / 'out', 'iter') == [*range(1, 43)]

def test_starting_over_keeps_the_old_run(call, place):
    for i in range(2):
        assert f'is in out-{i + 1} now' in call('train.py', 'tiny.py', '--max_iters=1')[0]
    assert [load_checkpoint(f'{name}/ckpt.pt')['iter_num'] for name in ('out-1', 'out-2', 'out')] == [40, 1, 1]

REFUSALS = [
    ('train.py', '--max_iters=0', 'max_iters is 0'), ('train.py', '--learning_rate=11', 'learning_rate is 11'),
    ('train.py', '--optimizer=sgd', 'muon, adamw'), ('train.py', '--model_preset=huge', 'tiny, small, medium, large'),
    ('train.py', '--tokens_per_update=200', 'take 192 or 256'), ('train.py', '--n_head=3', 'n_embd 32'),
    ('train.py', '--n_embd=1000000', 'at least'),
    ('train.py', '--block_size=5000', 'val has 1,160 tokens'), ('train.py', '--dataset=nothing', 'python prepare.py'),
    ('train.py', '--device=tpu', 'device tpu'), ('train.py', '--dtype=float16', 'float16'),
    ('train.py', '--out_dir=tiny.py', 'tiny.py'), ('train.py', '--init_from=tiny.py', 'not a checkpoint'),
    ('train.py', '--init_from=out', 'no checkpoint out'), ('train.py', '--out_dir=tiny.py/x', 'tiny.py/x'),
    ('train.py', '--resume --init_from=out/best.pt', 'all of its 40'), ('train.py', '--resume', 'all of its 40 updates'),
    ('train.py', '--resume --out_dir=nothing', 'no checkpoint'), ('train.py', '--resume --n_layer=3', 'n_layer is 2'),
    ('train.py', '--resume --dataset=words', 'different tokenizers'),
    ('train.py', '--resume --dataset=more', 'another sha256'),
    ('sample.py', '--out_dir=nothing', 'no checkpoint'), ('sample.py', '--temperature=-1', 'temperature is -1'),
    ('sample.py', '--top_k=-1', 'top_k'), ('sample.py', '--top_p=0', 'top_p'),
    ('sample.py', '--num_samples=0', 'num_samples'), ('sample.py', '--max_new_tokens=0', 'max_new_tokens'),
    ('sample.py', '--start=FILE:nothing', 'nothing: No such file'),
    ('sample.py', '--start=FILE:out/best.pt', 'best.pt is not UTF-8'),
    ('sample.py', '--start=né', "'\\xe9'"), ('sample.py', '--device=tpu', 'device tpu'),
    ('train.py', '--interactive', 'no answer'), ('prepare.py', 'tiny.py --val_fraction=0', 'val_fraction 0'),
    ('prepare.py', 'tiny.py --vocab_size=256', 'vocab_size 256'), ('bench.py', '--updates=0', 'updates'),
    ('bench.py', '--n_embd=33 --n_head=2', 'n_embd 33'),
    ('prepare.py', 'nothing.txt', 'nothing.txt is no file'), ('prepare.py', '--info=nothing', 'python prepare.py')]

@pytest.mark.parametrize('name, flags, says', REFUSALS)
def test_a_script_refuses_in_one_line_before_anything_is_written(call, place, name, flags, says):
    if 'sha256' in says or 'tokenizers' in says:
        Path('in.txt').write_text(TEXT * 300)
        prepare.prepare('in.txt', name='more')
        prepare.prepare('in.txt', name='words', tokenizer='bpe', vocab_size=300)
    before = sorted(place.rglob('*'))
    out, err = call(name, *['tiny.py'] * (name == 'train.py' and 'resume' not in flags), *flags.split(), status=2)
    assert says in err and err.count('\n') == 1 and 'kept' not in out and sorted(place.rglob('*')) == before

@pytest.mark.parametrize('flags', [['--dry_run'], ['--resume', '--max_iters=80', '--dry_run'], ['--show_hardware'],
                                   ['--init_from=out/best.pt', '--eval_only'], ['--resume', '--eval_only']])
def test_looking_writes_nothing(call, place, flags):
    before = {path: path.stat().st_mtime_ns for path in place.rglob('*')}
    out, _ = call('train.py', *['tiny.py'] * ('--resume' not in flags), *flags)
    assert {path: path.stat().st_mtime_ns for path in place.rglob('*')} == before
    losses = [f'validation loss {load_checkpoint(f"out/{name}.pt")["val_loss"]:.4f}' for name in ('best', 'ckpt')]
    assert any(words in out for words in [*losses, 'nothing was written', 'train.py would pick'])

def test_the_settings_of_a_run_go_on_with_it(call):
    assert 'update 40' in call('train.py', '--resume', '--max_iters=42')[0]
    config = load_checkpoint('out/ckpt.pt')['config']  # out_dir was another one then
    assert [config[name] for name in ('dropout', 'eval_interval', 'max_iters', 'out_dir')] == [0.1, 3, 42, 'out']

def test_patience_stops_a_run_that_no_longer_gets_better(call, place):
    out, _ = call('train.py', 'tiny.py', '--learning_rate=0', '--muon_learning_rate=0', '--patience=2')
    assert 'stopped at update 9' in out and column(place / 'out', 'iter')[-1] == 9

@pytest.mark.long  # compiling takes a minute
def test_a_compiled_run_agrees_with_an_eager_one(call, place):
    if problem := hardware.compile_problem('cpu'):
        pytest.skip(problem)
    for name, on in ('eager', 'false'), ('compiled', 'true'):
        call('train.py', 'tiny.py', '--max_iters=6', '--dropout=0', f'--compile={on}', f'--out_dir={name}')
    eager, compiled = (column(place / name, 'train_loss') for name in ('eager', 'compiled'))
    assert compiled == pytest.approx(eager, rel=1e-4)  # float32 sums in another order, over six updates

def test_samples_and_wandb_are_there_when_asked_for(call, monkeypatch):
    logged = []
    wandb = SimpleNamespace(init=lambda **options: logged.append(options), log=lambda row, step: logged.append(row))
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    out, _ = call('train.py', 'tiny.py', '--max_iters=7', '--wandb_log', '--sample_interval=2')
    assert logged[0]['config']['max_iters'] == 7 and [row['iter'] for row in logged[1:]] == list(range(1, 8))
    data = load_dataset('plain')
    beginning = Tokenizer(data.meta['tokenizer']).decode(data.val.read(np.array([0]), 16)[0])
    assert out.count(f'{beginning}') == 2  # of the evaluations, at 3, 6 and 7, the second and the last
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert 'wandb is not installed' in call('train.py', 'tiny.py', '--max_iters=1', '--wandb_log')[0]

def test_finetuning_takes_shape_and_tokenizer_from_the_checkpoint(call, place):
    Path('other.txt').write_text('The lazy dog, 12 of them.\n' * 200)
    prepare.prepare('other.txt', tokenizer='out/best.pt')
    Path('finetune.py').write_text(''.join(line for line in TINY_RUN.splitlines(True) if 'n_layer' not in line))
    call('train.py', 'finetune.py', '--dataset=other', '--init_from=out/best.pt', '--max_iters=3', '--out_dir=tuned')
    assert column(place / 'tuned', 'train_loss')[0] < 0.8 * column(place / 'out', 'train_loss')[0]
    assert column(place / 'tuned', 'iter') == [1, 2, 3] and column(place / 'tuned', 'lr')[0] == 0.002
    assert 'update 3' in call('train.py', '--resume', '--out_dir=tuned', '--max_iters=4')[0]
    one, other = (load_checkpoint(f'{name}/ckpt.pt') for name in ('out', 'tuned'))
    assert one['tokenizer'] == other['tokenizer'] and {**one['model_config'], 'dropout': 0.0} == other['model_config']

def test_without_a_network_the_run_trains_on_pydoc_and_every_record_says_so(call, place, monkeypatch):
    for name in ('HTTP_PROXY', 'HTTPS_PROXY', 'http_proxy', 'https_proxy', 'ALL_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # nobody listens there
    monkeypatch.setattr(prepare, 'RETRY_WAITS', (0, 0))
    flags = ['tiny.py', '--dataset=shakespeare', '--max_iters=1', '--eval_interval=1']
    assert 'python prepare.py' in call('train.py', *flags, '--offline_dataset=', status=2)[1]
    assert log_of(place / 'out')[-1]['iter'] == '40'  # the old run was not put away
    out, _ = call('train.py', *flags, '--offline_dataset=pydoc')
    assert 'shakespeare could not be fetched' in out and 'training on pydoc instead' in out and 'data    pydoc' in out
    assert load_checkpoint('out/ckpt.pt')['config']['dataset'] == 'pydoc'

def test_the_picture_is_drawn_where_matplotlib_is_there(call, place, monkeypatch):
    monkeypatch.delitem(sys.modules, 'matplotlib')
    pytest.importorskip('matplotlib')
    call('train.py', 'tiny.py', '--max_iters=3')
    assert Path('out/loss.png').read_bytes().startswith(b'\x89PNG')

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='this PyTorch is built without gloo')

def as_rank(rank, n, port, flags):
    """train.py as one of n processes that torchrun started; counts how often gradients are summed over them."""
    summed = []

    class Counting(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.register_comm_hook(None, lambda _, bucket: summed.append(1) or allreduce_hook(None, bucket))
    torch.nn.parallel.DistributedDataParallel = Counting
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    sys.modules['matplotlib'], sys.argv = None, ['train.py', *flags]
    try:
        runpy.run_path(str(HERE / 'train.py'), run_name='__main__')
    finally:
        Path(f'summed-{rank}').write_text(str(len(summed)))

def train_as(n, *flags):
    """train.py in n processes, forked from one that has imported torch: torchrun takes seconds longer."""
    multiprocessing.set_forkserver_preload(['torch._dynamo', 'requests', 'pytest'])
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(as_rank, (n, port, flags), n, start_method='forkserver')

def assert_same_losses(one, other):
    """Of two runs whose float32 sums are in another order, which grows from update to update."""
    assert column(other, 'iter') == column(one, 'iter')
    for name, rel in ('train_loss', 1e-3), ('val_loss', 1e-3), ('grad_norm', 1e-2):
        assert column(other, name) == pytest.approx(column(one, name), rel=rel)

@pytest.fixture
def shared(place):
    """Flags of a run that 1, 2 and 4 processes can share: without dropout, evaluations of three batches"""
    Path('long.txt').write_text(TEXT * 4000)
    prepare.prepare('long.txt')
    return ['tiny.py', '--dataset=long', '--dropout=0', '--decay_lr=false', '--batch_size=1', '--eval_interval=10',
            '--eval_iters=3']

@needs_gloo
@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_two_and_four_processes_make_the_updates_of_one(call, shared, place, kind):
    flags = [*shared, f'--optimizer={kind}', '--max_iters=30']
    call('train.py', *flags, '--out_dir=1')
    for n in 2, 4:
        train_as(n, *flags, f'--out_dir={n}')
        assert_same_losses(place / '1', place / str(n))
        # once an update, at the last of its 4 or 2 micro-batches
        assert [Path(f'summed-{rank}').read_text() for rank in range(n)] == ['30'] * n

DIES = TINY_RUN + """
import os, signal, threading, time
def die():
    while not os.path.exists('2/ckpt.pt'):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if (os.environ.get('RANK'), os.environ.get('TORCHELASTIC_RESTART_COUNT')) == ('1', '0'):
    threading.Thread(target=die, daemon=True).start()
"""

@needs_gloo
def test_torchrun_restarts_a_run_and_its_sigterm_saves_it_for_one_process_or_four(call, shared, place):
    Path('tiny.py').write_text(DIES)
    flags = [*shared, '--max_iters=4000', '--eval_interval=5']
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max_restarts=1', HERE / 'train.py']
    apart = {**os.environ, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1', 'OMP_NUM_THREADS': '1'}
    with (open('err', 'w') as err, subprocess.Popen([sys.executable, *command, *flags, '--out_dir=2', '--resume'], env=apart,
                                                    stdout=subprocess.PIPE, stderr=err, text=True) as process):
        said = ''
        for line in process.stdout:
            said += line
            if '/4000 ' in line and said.count('start ') == 2:
                process.terminate()
                break
        said += process.stdout.read()
    # the one that was killed, or the other one that missed it first
    assert re.search(r'failed \(exitcode: (-9\) local_rank: 1|1\) local_rank: 0)', Path('err').read_text())
    assert [said.count(text) for text in ('start   guessing', 'start   from', 'saved   ')] == [1, 1, 1], said  # rank 0 alone
    shutil.copytree('2', '4')
    assert 'update ' in call('sample.py', '--out_dir=2', '--max_new_tokens=5')[1]
    last = f'--max_iters={load_checkpoint("2/ckpt.pt")["iter_num"] + 6}'
    call('train.py', *flags, last, '--out_dir=1')
    call('train.py', '--resume', last, '--out_dir=2')
    train_as(4, '--resume', last, '--out_dir=4')
    for n in '24':
        assert_same_losses(place / '1', place / n)
    assert not list(place.glob('2-*'))  # a restart puts nothing away

def test_the_questions_end_in_a_config_file_that_runs(call, place):
    answers = ['tpu', 'cpu', 'plain', '2 2 32', '2 2 32 16', '40', 'mine', 'n']  # 1st and 4th are asked again
    out, _ = run(script('train.py', '--interactive'), place, input='\n'.join(answers) + '\n')
    assert 'config/my_mine.py is written' in out and 'nothing was written' in out
    call('train.py', 'config/my_mine.py', '--max_iters=2', '--batch_size=4')
    saved = load_checkpoint('out/ckpt.pt')
    assert saved['config']['eval_interval'] == 5 and saved['model_config']['n_embd'] == 32 and saved['iter_num'] == 2

# ----------------------------------------------------------------------------
# generation

@torch.no_grad()
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('chunks', [[53], [1] * 53, [15, 1, 1, 36], [16, 37], [5, 11, 20, 17], [40] + [1] * 13])
def test_cached_equals_uncached_whatever_the_chunks_and_past_the_window(chunks, device):
    model, x = tiny(device=device), ids(3, 53).to(device)
    expected, cache, end = plain(tiny(), x.cpu()), KVCache(model.config, 3, device, torch.float32), 0
    for n in chunks:
        logits = model(x[:, end : end + n], cache=cache)[0]
        end += n
        # float32, sums in another order
        torch.testing.assert_close(logits[:, 0].cpu(), expected[:, end - 1], atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('T', [1, 15, 16, 17, 40])
def test_greedy_generation_follows_the_banded_forward_at_every_length(T, device):
    model, x = tiny(device=device), ids(2, T).to(device)
    out = model.generate(x, 30, temperature=0)
    assert torch.equal(out[:, :T], x) and out.shape == (2, T + 30)
    assert torch.equal(plain(tiny(), out.cpu())[:, T - 1 : -1].argmax(-1), out[:, T:].cpu())
    assert torch.equal(out, model.generate(x, 30, temperature=0))  # the second call starts from nothing, too

def test_samples_of_one_prompt_share_its_prefill_and_still_differ():
    model, x = tiny(), ids(1, 9)
    many = model.generate(x, 12, num_samples=5, generator=torch.Generator().manual_seed(0))
    repeated = model.generate(x.expand(5, -1), 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(many, repeated) and len(set(map(tuple, many.tolist()))) == 5

def test_a_row_that_stopped_stays_stopped_and_the_text_ends_with_the_last():
    model = tiny()
    out = model.generate(ids(1, 3), 200, num_samples=3, stop_token=7, generator=torch.Generator().manual_seed(0))[:, 3:]
    for row in out.tolist():
        assert 7 in row and set(row[row.index(7) :]) == {7}
    assert out.size(1) == max(row.index(7) for row in out.tolist()) + 1 < 200

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('options, expected', [
    (dict(), [0.5, 0.25, 0.15, 0.1]),
    (dict(top_k=2), [2 / 3, 1 / 3, 0, 0]),
    (dict(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),  # 0.5 does not reach 0.6, 0.5 + 0.25 does
    (dict(top_p=0.5), [1, 0, 0, 0]),
    (dict(temperature=0.5), [n / 0.345 for n in (0.25, 0.0625, 0.0225, 0.01)]),  # squares, renormalised
    (dict(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),  # of the top_k's 0.9: 0.75 / 0.9 reaches 0.8
    (dict(temperature=0), [1, 0, 0, 0]),
])
def test_draws_follow_the_distribution_computed_by_hand(options, expected, device):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(20000, 1).to(device)
    drawn = sample(logits, generator=torch.Generator(device).manual_seed(0), **options)
    share = torch.bincount(drawn.cpu(), minlength=4) / 20000
    assert (share - torch.tensor(expected)).abs().max() < 0.015  # four standard errors
    assert all(share[i] == 0 for i, p in enumerate(expected) if p == 0)

# ----------------------------------------------------------------------------
# sampling, and the benchmark

@pytest.fixture
def speaker(call, monkeypatch):
    """speaker(text, *flags): what sample.py prints for a model of single bytes that says this text."""
    Path('in.txt').write_text(TEXT * 20)
    data = load_dataset(prepare.prepare('in.txt', tokenizer='bpe', vocab_size=257))
    coder = Tokenizer(data.meta['tokenizer'])
    model = tiny(vocab_size=257)
    save_checkpoint('bytes.pt', checkpoint(model, tokenizer=data.meta['tokenizer']))

    def speak(text, *flags):
        def stream(*_, num_samples, **__):
            for id in [*coder.encode(text), coder.end_of_text, *coder.encode('after its end')]:
                yield torch.full((num_samples,), id)
        monkeypatch.setattr(GPT, 'stream', stream)
        return call('sample.py', '--out_dir=bytes.pt', *flags)[0]
    return speak

def test_what_is_printed_ends_at_the_end_has_whole_characters_and_no_escape_codes(speaker):
    assert speaker('naïve 👩‍👩‍👧 שלום', '--start=A ') == 'A naïve 👩‍👩‍👧 שלום\n'
    assert speaker('a\x1b[2Jb\x9b\u202ec') == 'a\\x1b[2Jb\\x9b\\u202ec\n'

@pytest.mark.parametrize('stop, rest', [
    ('ROMEO:', 'Hey!\n'), ('!', 'Hey'), ('RO', 'Hey!\n'), ('ROMEO?', 'Hey!\nROMEO: ho')])
def test_a_text_ends_before_the_stop_string_wherever_the_tokens_cut_it(speaker, stop, rest):
    assert speaker('Hey!\nROMEO: ho', f'--stop={stop}') == rest + '\n'
    assert speaker('Hey!\nROMEO: ho', f'--stop={stop}', '--num_samples=2') == (rest + '\n' + '-' * 40 + '\n') * 2

def test_sampling_needs_the_checkpoint_alone(runs, tmp_path):
    shutil.copy(runs.folder / 'muon/best.pt', tmp_path)
    (tmp_path / 'prompt.txt').write_text('The quick ' * 5)  # longer than the window
    flags = ['--out_dir=best.pt', '--start=FILE:prompt.txt', '--max_new_tokens=30', '--num_samples=2', '--seed=1']
    out, err = run(script('sample.py', *flags), tmp_path)
    texts = out.split('-' * 40 + '\n')
    assert len(texts) == 3 and texts[0] != texts[1]
    assert all(len(text) == 81 and text.startswith('The quick ' * 5) for text in texts[:2])
    assert 'update ' in err and 'sees the last 16' in err

def test_equal_seeds_give_equal_text_and_no_seed_gives_other_text(call):
    texts = [call('sample.py', '--max_new_tokens=40', *flags)[0] for flags in (['--seed=3'], ['--seed=3'], [], [])]
    assert texts[0] == texts[1] and len(set(texts)) == 3

def test_a_talk_keeps_its_context_and_answers_mistakes(call, place):
    typed = ['/temperature 0', '/tokens 20', 'The quick', '', '/top_p 7', '/tokens many', '/nonsense', '/info', 'é',
             '/reset', '/info', '/quit']
    out, err = run(script('sample.py', '--interactive'), place, input='\n'.join(typed))
    answers = [answer.rstrip('\n') for answer in out.split('\n> ')]
    straight, _ = call('sample.py', '--temperature=0', '--max_new_tokens=40', '--start=\nThe quick')
    assert answers[3] + answers[4] == straight.rstrip('\n').removeprefix('\nThe quick')
    assert 'not an assistant' in err and 'top_p is 7' in answers[5] and 'many' in answers[6] and '/reset' in answers[7]
    assert '49 tokens' in answers[8] and "'\\xe9'" in answers[9] and '0 tokens' in answers[11]

def test_the_benchmark_measures_what_it_says(place):
    flags = ['--json', '--updates=3', '--decode_tokens=5', '--random_data=false']
    figures = json.loads(run(script('bench.py', 'tiny.py', *flags), place)[0])
    assert figures['parameters'] == load_model(load_checkpoint('out/best.pt')).n_params()
    assert all(len(figures['ms_per_update'][name]) == 3 for name in ('all', 'data', 'forward', 'backward', 'optimizer'))
    assert all(figures[name] > 0 for name in ('tokens_per_sec', 'mfu', 'peak_memory', 'prefill_tokens_per_sec',
                                              'decode_tokens_per_sec', 'bandwidth_share'))
