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


@pytest.fixture(scope='session', autouse=True)
def signals_arrive():
    """Also where pytest itself runs in the background of a shell script, which ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, 'SIGHUP'):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

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

from dataclasses import dataclass

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

def test_a_field_that_a_subclass_adds_to_a_dataclass_is_a_setting_with_its_comment(settings, capsys):
    @dataclass
    class Capped(GPTConfig):
        soft_cap: float = 30.0  # largest logit
    configure = lambda *argv: configurator.configure(Capped, 'script.py', argv=list(argv))
    assert configure('--soft_cap=20')['soft_cap'] == 20 and configure()['n_embd'] == GPTConfig.n_embd
    with pytest.raises(SystemExit):
        configure('--help')
    assert re.search(r'Settings of Capped(.|\n)*\n  --soft_cap=30.0 +largest logit', capsys.readouterr().out)

def test_saved_settings_take_the_place_of_the_defaults_and_strangers_are_ignored(settings):
    saved = {'batch_size': 5, 'out_dir': 'there', 'gone': 1}
    config = configurator.configure('script.py', argv=['--out_dir=here'], saved=saved)
    assert (config['batch_size'], config['out_dir'], 'gone' in config) == (5, 'here', False)

def test_a_flag_wins_wherever_it_stands_and_a_later_file_may_compute(settings):
    a = settings_file('import math\n_x = 3\nbatch_size *= _x', 'a.py')
    b = settings_file('batch_size += 1', 'b.py')
    orders = [(a, b), ('--batch_size=4', a), (a, '--batch_size=4')]
    assert [settings(*order)['batch_size'] for order in orders] == [37, 4, 4]

@pytest.mark.parametrize('flag, value', [
    ('--out_dir=a=b', 'a=b'), ('--out_dir=', ''), ('--out_dir=--x y', '--x y'), ('--batch_size=1_000', 1000),
    ('--learning_rate=1', 1.0), ('--compile', True), ('--compile=0', False)])
def test_a_flag_is_read_as_its_settings_type(settings, flag, value):
    read = settings(flag)[flag[2:].partition('=')[0]]
    assert read == value and type(read) is type(value)

@pytest.mark.parametrize('arguments, says', [
    (['--batchsize=3'], 'batch_size'), (['--batch_size=1e3'], 'whole number'), (['--LIMIT=2'], 'no setting'),
    (['--learning_rate=nan'], 'a number'), (['--compile=maybe'], 'true or false'), (['-c'], 'no setting'),
    (['--out_dir', 'runs'], 'write --out_dir=VALUE'), (['--compile', 'False'], 'config file'),
    (['shakespeare'], 'config file'), (['--\x1b\nx=1'], 'setting'), (['nowhere.py'], 'config file'),
    (['d.py'], 'config file')])
def test_a_mistaken_flag_is_refused_in_one_line(settings, capsys, arguments, says):
    os.makedirs('d.py')
    assert says in settings_refusal(capsys, settings, *arguments)

@pytest.mark.parametrize('text, says', [
    ('batchsize = 3', "no setting 'batchsize': did you mean"), ('batch_size = 2.0', 'batch_size must be'),
    ('batch_size = True', 'whole number'), ('compile = 1', 'true or false'), ('out_dir = 3', 'text'),
    ('learning_rate = 10 ** 400', 'a number'), ('\n1 / 0', 'line 2: ZeroDivisionError'),
    ('\nx = = 1', 'line 2'), ('exit(0)', 'SystemExit'), ('import batch_size', 'No module'),
    (b'\xff', 'SyntaxError'), ('_own = 1\nimport math\nmine = None', "no setting 'mine'")])
def test_a_mistaken_config_file_is_refused_in_one_line(settings, capsys, text, says):
    line = settings_refusal(capsys, settings, settings_file(text))
    assert says in line and line.startswith('c.py')

def test_ctrl_c_while_a_config_file_runs_is_not_the_files_mistake(settings):
    with pytest.raises(KeyboardInterrupt):
        settings(settings_file('raise KeyboardInterrupt'))

def test_help_shows_each_setting_with_default_and_comment_within_100_columns(settings, capsys):
    with pytest.raises(SystemExit) as error:
        settings('--help')
    out = capsys.readouterr().out
    assert error.value.code == 0 and max(map(len, out.splitlines())) <= 100
    assert re.search(r'thing.\n\nSettings of script.*\n  --out_dir=out +where checkpoints go\n  --batch', out)

def test_ranges_and_choices_name_the_setting_its_value_and_what_it_must_be():
    config = {'optimizer': 'sgd', 'top_p': math.nan}
    with pytest.raises(ValueError, match='top_p is nan: it must be from 0 to 1'):
        configurator.check(config, 'top_p', 0, 1)
    with pytest.raises(ValueError, match="optimizer is 'sgd': it must be one of muon, adamw"):
        configurator.choose(config, 'optimizer', ['muon', 'adamw'])

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has it')
@pytest.mark.parametrize('code, redirection, status, says', [
    ("print('é\\udcff')", '>/dev/full', 2, 'stdout: No space left on device\n'),
    ("print('no line break', end='')", '>/dev/full', 2, 'stdout: No space left on device\n'),
    ("print(1); sys.stdout.flush(); print(2, file=sys.stderr)", '>&-', 0, '2\n'),
    ("print(1); print(2, file=sys.stderr); configurator.stop('bad')", '>&- 2>&-', 2, '')])
def test_a_full_stdout_is_one_line_and_a_closed_one_is_ignored(code, redirection, status, says):
    script = f'import sys, configurator; configurator.set_up_output(); {code}'
    run = subprocess.run(['sh', '-c', f'"$0" -c "$1" {redirection}', sys.executable, script], cwd=HERE,
                         capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (status, says)

@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='Windows has none')
def test_a_program_whose_terminal_has_gone_runs_on():
    script = 'import sys, configurator as c; c.set_up_output(); input(); print(1); print(2, file=sys.stderr)'
    terminal, end = os.openpty()
    with subprocess.Popen([sys.executable, '-c', script], cwd=HERE, stdin=subprocess.PIPE, stdout=end,
                          stderr=subprocess.PIPE, text=True) as run:
        os.close(end)
        os.close(terminal)
        assert run.communicate('go\n', timeout=60)[1] == '2\n' and run.returncode == 0

def test_a_question_is_asked_until_the_answer_will_do_and_stops_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('many\n0\n\n'))
    check = lambda value: configurator.check({'n_layer': value}, 'n_layer', 1, 9)
    assert configurator.ask('layers', 4, check) == 4
    assert re.search('must be a whole number(.|\n)*n_layer is 0', capsys.readouterr().out)
    with pytest.raises(SystemExit, match='2'):
        configurator.ask('layers', 4)
    assert capsys.readouterr().err.startswith('no answer')

# ----------------------------------------------------------------------------
# hardware

@pytest.fixture
def hardware_stub(monkeypatch):
    """hardware_stub(cuda=2, capability=(9, 0), ...) answers for torch, whatever this machine has."""
    def stub(cuda=0, xpu=0, mps=0, hip=None, capability=(9, 0), name='card', gfx='', bf16=True, flags='',
             archs=(), torch_version='2.13.0', driver=True):
        built = dict(hip=hip, cuda='12.8' if cuda and not hip else None, xpu='2025' if xpu else None)
        facts = SimpleNamespace(gcnArchName=gfx, has_bfloat16_conversions=bf16)
        same = dict(get_device_name=name, mem_get_info=(2 ** 30, 2 ** 31), get_device_properties=facts,
                    get_device_capability=capability, get_arch_list=archs)
        monkeypatch.setattr(torch, 'version', SimpleNamespace(**built))
        monkeypatch.setattr(torch, '__version__', type(torch.__version__)(torch_version))
        for api, answers in [(torch.cuda, dict(same, device_count=cuda, is_available=cuda > 0 and driver)),
                             (torch.xpu, dict(same, device_count=xpu, is_available=xpu > 0)),
                             (torch.mps, dict(device_count=mps)),
                             (torch.backends.mps, dict(is_built=mps > 0))]:
            for query, answer in answers.items():
                monkeypatch.setattr(api, query, lambda device=None, answer=answer: answer, raising=False)
        proc = hardware.proc
        answer = lambda path, field: flags if 'flags' in field else proc(path, field)
        monkeypatch.setattr(hardware, 'proc', answer)
    return stub

@pytest.mark.parametrize('facts, device, dtype', [
    (dict(cuda=1, xpu=1, mps=1), 'cuda', 'bfloat16'), (dict(cuda=1, capability=(7, 5)), 'cuda', 'float16'),
    (dict(cuda=1, capability=(6, 1)), 'cuda', 'float32'), (dict(xpu=1, mps=1), 'xpu', 'bfloat16'),
    (dict(cuda=1, hip='6.4', gfx='gfx942:'), 'cuda', 'bfloat16'), (dict(xpu=1, bf16=False), 'xpu', 'float32'),
    (dict(cuda=1, hip='6.4', gfx='gfx1030'), 'cuda', 'float16'), (dict(mps=1), 'mps', 'float32'),
    (dict(mps=1, torch_version='2.12.1'), 'cpu', 'float32'), ({}, 'cpu', 'float32'),
    (dict(cuda=1, driver=False), 'cpu', 'float32'),
    (dict(cuda=1, capability=(5, 0), archs=('sm_75', 'compute_90a')), 'cpu', 'float32'),
    (dict(cuda=1, capability=(12, 0), archs=('sm_90', 'sm_100')), 'cuda', 'bfloat16'),
    (dict(flags='avx2 avx512_bf16'), 'cpu', 'bfloat16'), (dict(flags='asimd bf16'), 'cpu', 'bfloat16')])
def test_auto_takes_the_best_device_and_only_a_real_dtype(hardware_stub, facts, device, dtype):
    hardware_stub(**facts)
    assert (hardware.pick_device(), hardware.pick_dtype(device)) == (device, dtype)

@pytest.mark.parametrize('facts, wish, says', [
    (dict(cuda=2), 'cuda:7', 'cuda:0 or --device=cuda:1 or --device=cpu'), ({}, 'cuda', 'without CUDA'),
    ({}, 'rocm', 'without ROCm'), (dict(cuda=1), 'rocm', 'cuda:0'), ({}, 'tpu', 'cpu'), ({}, '', 'cpu'),
    (dict(mps=1, torch_version='2.12.1'), 'mps', 'needs PyTorch 2.13.*use --device=cpu')])
def test_a_device_that_is_not_there_is_refused_with_what_is(hardware_stub, facts, wish, says):
    hardware_stub(**facts)
    with pytest.raises(ValueError, match=says):
        hardware.pick_device(wish)

def test_a_dtype_that_the_device_lacks_is_refused_with_those_it_has(hardware_stub):
    hardware_stub()
    with pytest.raises(ValueError, match=r'^dtype float16: cpu \(.* threads?\) computes only in float32$'):
        hardware.pick_dtype('cpu', 'float16')

@pytest.mark.parametrize('name, dtype, teraflops', [
    ('NVIDIA H200', 'bfloat16', 989), ('NVIDIA H100 PCIe', 'float16', 756), ('NVIDIA L40', 'bfloat16', 0),
    ('NVIDIA A100-SXM4-40GB', 'float32', 0), ('NVIDIA A100-SXM4-40GB MIG 3g.20gb', 'bfloat16', 0),
    ('Tesla T4', 'float16', 65), ('Tesla T4', 'bfloat16', 0), ('NVIDIA H100', 'bfloat16', 0)])
def test_a_peak_is_the_exact_cards_or_unknown(hardware_stub, name, dtype, teraflops):
    hardware_stub(cuda=1, name=name, capability=(7, 5) if 'T4' in name else (9, 0))
    expected = (pytest.approx(teraflops * 1e12), 'vendor') if teraflops else (0.0, 'unknown')
    assert hardware.peak_flops('cuda', dtype) == expected

def test_the_table_and_its_plain_values_agree(hardware_stub):
    hardware_stub(cuda=2, name='NVIDIA A100-SXM4-40GB MIG 3g.20gb with a long name', capability=(8, 9))
    facts, text = json.loads(json.dumps(hardware.report())), hardware.table()
    cards = [row for row in facts['table'] if row['backend'] == 'CUDA']
    assert facts['device'] == 'cuda' and len(cards) == text.count('NVIDIA A100-SXM4-40GB MIG 3g.20gb') == 2
    assert cards[1]['dtypes'] == 'float32 float16 bfloat16' and cards[1]['memory_gib'] == 2
    assert all(row.get('reason', '') in text for row in facts['table'])
    assert max(map(len, text.splitlines())) <= 100
    assert text.endswith('train.py would use cuda (the first available) in bfloat16')

@pytest.mark.parametrize('python, pytorch, old', [
    ((3, 10), '2.9+cpu', False), ((3, 14), '2.14.1', False), ((3, 9), '2.9.0', True), ((3, 12), '2.8', True)])
def test_too_old_a_python_or_pytorch_is_named_in_one_line(hardware_stub, monkeypatch, python, pytorch, old):
    hardware_stub(torch_version=pytorch)
    monkeypatch.setattr(sys, 'version_info', python)
    line = hardware.version_problem()
    assert (f'PyTorch {pytorch}: ' in line) == old and '\n' not in line
    assert line in hardware.table() and hardware.report()['problem'] == line

@pytest.mark.parametrize('slow, best', [(1, 2), (2, 1)])
def test_the_number_of_threads_is_the_one_that_is_faster_now(monkeypatch, slow, best):
    class Matrix:
        def __matmul__(self, other):
            time.sleep(0.02 if torch.get_num_threads() == slow else 0.001)
    monkeypatch.setattr(torch, 'randn', lambda *shape: Matrix())
    torch.set_num_threads(2)
    began = time.perf_counter()
    assert hardware.pick_threads() == best == torch.get_num_threads()
    assert time.perf_counter() - began < 1

def test_a_compiler_that_fails_is_one_quiet_line(monkeypatch, capsys):
    def fail(function):
        print('noise')
        raise RuntimeError('no compiler\nhere')
    monkeypatch.setattr(torch, 'compile', fail)
    assert hardware.compile_problem('cpu') == 'RuntimeError: no compiler here'
    assert 'MPS' in hardware.compile_problem('mps') and capsys.readouterr().out == ''

@pytest.mark.parametrize('flag, prints', [
    ('--recommended', 'cpu\n'), ('--json', '"MPS"'), ('--interactive', '--device=cpu --dtype=')])
def test_the_command_answers_each_flag(hardware_stub, monkeypatch, capsys, flag, prints):
    hardware_stub()
    monkeypatch.setattr(sys, 'argv', ['hardware.py', flag])
    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n\n'))
    runpy.run_path(hardware.__file__, run_name='__main__')
    assert prints in capsys.readouterr().out

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
    assert '1 binary files left out; skipped 1 that are not UTF-8, the first' in capsys.readouterr().out
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
    assert re.match('data/in is (missing|damaged)', message) and '"python prepare.py TEXT.txt --name=in"' in message

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
# ----------------------------------------------------------------------------
# model

TINY = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
RATES = (1e-2, (0.9, 0.95), 0.02, 0.95, 0.1)  # learning rate, betas, Muon's rate and momentum, weight decay
DEVICES = ['cpu']
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)

def tiny(seed=0, device='cpu', **changes):
    """A small model whose every weight matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**TINY, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.0 if p.dim() > 1 else 1.0, std=0.15)
    return model.eval().to(device)

def update(model, optimizer):
    x = ids(4, 17)
    loss = model(x[:, :-1], x[:, 1:], return_logits=False)[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss

def ids(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))

def plain(model, x):
    """Logits (B, T, vocab_size) of the model, in plain lines; each position sees the last block_size."""
    c, T = model.config, x.size(1)
    seen = torch.ones(T, T).tril().triu(1 - c.block_size).bool()

    def normed(x, norm):
        if c.use_rms_norm:
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * norm.weight
        return x if norm.bias is None else x + norm.bias

    def turned(x):  # (B, T, heads, head_dim), as complex numbers whose parts are the two halves
        half = x.size(-1) // 2
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((z.real, z.imag), dim=-1)

    h = model.embedding.weight[x]
    for block in model.blocks:
        heads = block.attention.qkv(normed(h, block.attention_norm))
        heads = heads.unflatten(-1, (-1, c.head_dim))  # (B, T, all heads, head_dim)
        q, k, v = heads.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
        if c.qk_norm:
            q, k = normed(q, block.attention.q_norm), normed(k, block.attention.k_norm)
        q, k = turned(q), turned(k)
        y = []
        for head in range(c.n_head):
            shared = head // (c.n_head // c.n_kv_head)
            scores = q[:, :, head] @ k[:, :, shared].mT / c.head_dim**0.5  # (B, T, T)
            y.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, :, shared])
        h = h + block.attention.proj(torch.cat(y, dim=-1))
        up = block.mlp.up(normed(h, block.mlp_norm))
        a, b = up[..., : c.hidden_dim], up[..., c.hidden_dim :]
        h = h + block.mlp.down(a * a.sigmoid() * b if c.use_swiglu else F.gelu(up))
    return normed(h, model.norm) @ model.head.weight.T

@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@pytest.mark.parametrize('options', [
    {}, dict(qk_norm=False, bias=True, use_rms_norm=False, use_swiglu=False), dict(gradient_checkpointing=True),
    dict(block_size=600)], ids=str)  # over 512 positions, a CPU's attention is another
def test_the_model_and_its_gradients_equal_plain_lines(n_kv_head, options):
    model = tiny(n_kv_head=n_kv_head, **options).train()
    x, targets = ids(2, model.config.block_size), ids(2, model.config.block_size, seed=2)
    targets[:, 12:15] = -1  # do not count
    logits, expected = model(x, x)[0], plain(model, x)
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)  # float32 sums of 32 to 600 terms
    losses = model(x, targets, return_logits=False)[1], F.cross_entropy(expected.mT, targets, ignore_index=-1)
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

def test_rope_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(at_q, at_k):
        q_turns, k_turns = (gpt.rope(torch.tensor([at]), GPTConfig(**TINY)) for at in (at_q, at_k))
        return (gpt.rotate(q, *q_turns) * gpt.rotate(k, *k_turns)).sum()

    for shift in (1, 100, 10_000_000):  # float32 angles would be off by half a turn at the last
        torch.testing.assert_close(score(7, 3), score(7 + shift, 3 + shift), atol=1e-5, rtol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3

@pytest.mark.parametrize('name, millions', [('tiny', 10), ('small', 25), ('medium', 80), ('large', 350)])
def test_presets_have_the_size_they_promise(name, millions):
    with torch.device('meta'):
        model = create_model(name)
    c = model.config
    per_layer = c.n_embd * (c.n_head + 2 * c.n_kv_head) * c.head_dim + c.n_embd**2 + 3 * c.n_embd * c.hidden_dim
    gains = c.n_layer * (2 * c.n_embd + 2 * c.head_dim) + c.n_embd
    assert model.n_params() == c.vocab_size * c.n_embd + c.n_layer * per_layer + gains
    assert model.n_params() == pytest.approx(millions * 1e6, rel=0.1)
    assert c.head_dim in (64, 128) and c.n_kv_head < c.n_head

@pytest.mark.parametrize('changes, words', [
    (dict(n_embd=100, n_head=12), 'n_embd 100 does not divide into n_head 12'), (dict(n_kv_head=3), 'n_kv_head 3'),
    (dict(n_layer=0), 'n_layer is 0'), (dict(dropout=1.0), 'dropout is 1.0'), (dict(n_embd=12, n_head=4), 'even'),
    (dict(mlp_ratio=1e300), 'mlp_ratio is 1e'), (dict(mlp_ratio=math.inf), 'mlp_ratio is inf'),
    (dict(mlp_ratio=math.nan), 'mlp_ratio is nan'), (dict(n_embd=2**40), 'n_embd is 1099511627776'),
    (dict(n_layer=10**6), 'n_layer is 1000000'), (dict(block_size=10**9), 'block_size is 1000000000'),
    (dict(n_embd=32.0), 'n_embd is 32.0'), (dict(n_layer=True), 'n_layer is True'),
    (dict(n_embd=2**23, mlp_ratio=2.0**23), 'hidden_dim'),  # 2^69 weights
    (dict(n_head=2**23, head_dim=2**23), 'head_dim')])
def test_an_impossible_shape_is_refused_quickly_with_its_numbers(changes, words, tmp_path):
    save_checkpoint(tmp_path / 'c.pt', checkpoint(tiny(), model_config={**TINY, **changes}))
    before = time.monotonic()
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**TINY, **changes})
    with pytest.raises(ValueError, match='invalid model_config.*' + words):
        load_checkpoint(tmp_path / 'c.pt')
    assert time.monotonic() - before < 0.1

def test_the_loss_starts_near_log_vocab_size():
    model, x = create_model('tiny', vocab_size=500, n_layer=3), torch.randint(500, (4, 65))
    assert model(x[:, :-1], x[:, 1:])[1].item() == pytest.approx(math.log(500), abs=0.1)

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_one_batch_can_be_memorised(kind):
    model = GPT(GPTConfig(**TINY))
    optimizer = gpt.make_optimizer(model, kind, *RATES)
    for _ in range(80):
        loss = update(model, optimizer)
    assert loss < 0.1

def test_gradient_checkpointing_keeps_less():
    x, kept = ids(8, 17), []
    for on in (False, True):
        model, sizes = tiny(gradient_checkpointing=on, n_layer=4).train(), {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x[:, :-1], x[:, 1:])
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]

def test_muon_makes_the_step_of_torch_optim_muon(monkeypatch):
    def inverse_root(gram):  # as torch's Muon has it; ours is checked below
        root = torch.eye(gram.size(1))
        for _ in range(5):
            p = 3.4445 * torch.eye(gram.size(1)) - 4.775 * gram + 2.0315 * gram @ gram
            root, gram = p @ root, p @ gram @ p
        return root

    monkeypatch.setattr(gpt, 'inverse_root', inverse_root)
    start = [torch.randn(64, 32), torch.randn(64, 32), torch.randn(16, 48)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = (gpt.Muon([dict(params=ours, muon=True, momentum=0.95)], lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn='original'))
    for _ in range(3):
        gradients = [torch.randn_like(w) for w in start]
        for params, optimizer in zip((ours, theirs), optimizers):
            for p, g in zip(params, gradients):
                p.grad = g.clone()
            optimizer.step()
    for a, b, w in zip(ours, theirs, start):  # torch's is in bfloat16: a few per cent
        assert (a - b).norm() < 0.05 * (a - w).norm()

def test_muon_makes_a_matrix_nearly_orthogonal():
    u, v = (torch.linalg.qr(torch.randn(3, n, 32))[0] for n in (32, 80))
    sizes = torch.logspace(-2, 0, 32)  # two decades of singular values
    x = (u * sizes @ v.mT) / sizes.norm()
    made = u.mT @ gpt.inverse_root(x @ x.mT) @ x @ v
    values = made.diagonal(dim1=1, dim2=2)
    assert 0.4 < values.min() and values.max() < 1.6
    torch.testing.assert_close(made, values.diag_embed(), atol=1e-3, rtol=0)

def test_matrices_decay_and_nothing_else_does():
    model = tiny(bias=True)
    for kind, part in ('adamw', model), ('muon', model.blocks):
        decaying = {p for p in part.parameters() if p.dim() == 2}
        groups = gpt.make_optimizer(model, kind, *RATES).param_groups
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

def test_float64_and_float32_agree():
    model, x = tiny(), ids(2, 17)
    loss = model(x[:, :-1], x[:, 1:])[1].item()
    wide = model.double()(x[:, :-1], x[:, 1:], return_logits=False)[1]
    wide.backward()
    assert wide.item() == pytest.approx(loss, rel=1e-6)
    assert all(p.grad.dtype == torch.float64 for p in model.parameters())

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_generating_between_updates_changes_no_update(kind):
    weights = []
    for generates in (False, True):
        model = tiny()
        optimizer = gpt.make_optimizer(model, kind, *RATES)
        for _ in range(3):
            update(model.train(), optimizer)
            model.eval()
            if generates:
                model.generate(ids(1, 3), 3)
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights))

# ----------------------------------------------------------------------------
# fast paths

VARIANTS = [
    dict(), dict(n_kv_head=1), dict(n_kv_head=4), dict(use_swiglu=False), dict(use_rms_norm=False), dict(bias=True),
    dict(use_rms_norm=False, use_swiglu=False, bias=True, qk_norm=False), dict(dropout=0.2),
    dict(gradient_checkpointing=True), dict(gradient_checkpointing=True, dropout=0.2)]

def assert_fast_paths_change_nothing(monkeypatch, compute, tolerance, module=gpt):
    """compute() -> tensors, the same without the fast paths and with all of them, but for rounding."""
    results = []
    monkeypatch.setattr(module, 'LARGE', 0)
    monkeypatch.setattr(module, 'MANY_LOGITS', 0)
    for fast in (False, True):
        monkeypatch.setattr(module, 'FAST', fast)
        torch.manual_seed(0)  # dropout draws the same numbers in the same order
        results.append(compute())
    for plain, fast in zip(*results, strict=True):
        assert plain.dtype == fast.dtype and (plain - fast).norm() <= tolerance * plain.norm()

@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_fast_paths_change_neither_logits_nor_loss_nor_gradients(monkeypatch, options, dtype, tolerance):
    model, x, targets = tiny(block_size=300, **options).train(), ids(2, 300), ids(2, 300, seed=2)
    targets[0, 100:] = -1  # do not count

    def compute():
        with torch.autocast('cpu', dtype, enabled=dtype == torch.bfloat16):
            logits = model(x, targets)[0]
            loss = model(x, targets, return_logits=False)[1]
            with torch.no_grad():
                evaluated = model(x, targets, return_logits=False)[1]
        gradients = torch.autograd.grad(2 * loss, list(model.parameters()))
        if dtype == torch.bfloat16:  # the smallest of them are mostly rounding
            gradients = [torch.cat([gradient.flatten() for gradient in gradients])]
        return logits, loss, evaluated, *gradients

    assert_fast_paths_change_nothing(monkeypatch, compute, tolerance)

@torch.no_grad()
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize('options', VARIANTS[:7], ids=str)
def test_fast_paths_change_no_cached_logit(monkeypatch, options, dtype, tolerance):
    model, x = tiny(**options).to(dtype), ids(2, 40)
    torch.set_num_threads(2)  # the row's product is shared out

    def compute():
        gpt.fast_layout(model, by_columns=True)
        cache, alone = (KVCache(model.config, rows, 'cpu', dtype) for rows in (2, 1))
        chunks = x.split([5, 1, 1, 20, 1, 1, 11], dim=1)
        return [model(ids, cache=cache)[0] for ids in chunks] + [model(ids[:1], cache=alone)[0] for ids in chunks]

    assert_fast_paths_change_nothing(monkeypatch, compute, tolerance)

def test_fast_paths_refuse_second_derivatives(monkeypatch):
    monkeypatch.setattr(gpt, 'MANY_LOGITS', 0)
    x = torch.randn(3, 8, requires_grad=True)
    for y in gpt.fast_rms_norm(x, 1e-6), gpt.fast_loss(gpt.token_loss, x[None], ids(1, 3) % 8, tiny(vocab_size=8)):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='once_differentiable'):
            first.sum().backward()

# ----------------------------------------------------------------------------
# experiments: what a reader adds to the model

def start(*shape):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(5))

class Head(gpt.GPT):
    """A head of its own, with a change that is learned beside it, and a soft cap on the logits."""
    def __init__(self, config):
        super().__init__(config)
        self.head.weight = nn.Parameter(start(config.vocab_size, config.n_embd))
        self.change = nn.Parameter(start(config.vocab_size, config.n_embd))

    def logits(self, x):
        return 2 * torch.tanh(F.linear(x, self.head.weight + self.change) / 2)

class Experts(gpt.Block):
    """Three experts in one 3-D weight, after a gain."""
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.experts = nn.Parameter(start(3, config.n_embd, config.n_embd))
        self.gain = nn.Parameter(start(config.n_embd))

    def forward(self, x, *others):
        return super().forward(x, *others) + torch.einsum('btc,ecd->btd', x * self.gain, self.experts)

class ReLU2(gpt.MLP):
    """Another activation, with a scale that is learned."""
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(start())

    def project(self, x):
        return self.down(self.scale * F.relu(x).square())

@pytest.fixture
def experiment(monkeypatch):
    for name, changed in dict(GPT=Head, Block=Experts, MLP=ReLU2).items():
        monkeypatch.setattr(gpt, name, changed)
    return gpt.GPT(GPTConfig(**TINY, use_swiglu=False))

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_whatever_parameter_is_added_is_trained_and_survives_a_resume(experiment, kind, tmp_path):
    before = {name: p.detach().clone() for name, p in experiment.named_parameters()}
    for name in ('head.weight', 'change', 'blocks.1.experts', 'blocks.1.gain', 'blocks.1.mlp.scale'):
        assert torch.equal(before[name], start(*before[name].shape))
    optimizer = gpt.make_optimizer(experiment, kind, *RATES)
    update(experiment, optimizer)
    assert all((p != before[name]).any() for name, p in experiment.named_parameters())
    save_checkpoint(tmp_path / 'c.pt', checkpoint(experiment, optimizer=optimizer.state_dict()))
    state = load_checkpoint(tmp_path / 'c.pt')
    resumed = load_model(state)
    resumed_optimizer = gpt.make_optimizer(resumed, kind, *RATES)
    gpt.load_optimizer(resumed_optimizer, state['optimizer'])
    update(experiment, optimizer)
    update(resumed, resumed_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(experiment.parameters(), resumed.parameters(), strict=True))

def test_an_experiment_is_the_same_in_training_evaluation_decoding_and_fast_paths(experiment, monkeypatch):
    x = ids(40, 17)  # more than one slice of the loss
    experiment.blocks[0].attention.requires_grad_(False)
    trained = [p for p in experiment.parameters() if p.requires_grad]

    def compute():
        logits = experiment(x[:, :-1], x[:, 1:])[0]
        loss = experiment(x[:, :-1], x[:, 1:], return_logits=False)[1]
        with torch.no_grad():
            evaluated = experiment(x[:, :-1], x[:, 1:], return_logits=False)[1]
            cache = KVCache(experiment.config, 40, 'cpu', torch.float32)
            cached = [experiment(ids, cache=cache)[0] for ids in x[:, :-1].split([9, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(cached, dim=1), logits[:, [8, 9, 15]])
        torch.testing.assert_close(evaluated, loss)
        return logits, loss, *torch.autograd.grad(loss, trained)

    assert_fast_paths_change_nothing(monkeypatch, compute, 2e-5)

def edited(*changes):
    """model.py as a module, after each (old, new) text of a reader's edit."""
    source, module = (HERE / 'model.py').read_text(), ModuleType('edited')
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    exec(compile(source, 'edited', 'exec'), vars(module))
    return module

@torch.no_grad()
def test_alibi_is_a_mask_for_each_head_that_is_always_made(monkeypatch):
    slopes = '0.5 ** torch.arange(1.0, config.n_head + 1, device=keys.device)[:, None, None]'
    alibi = edited(('visible, 0.0, -math.inf', f'visible, -{slopes} * distance, -math.inf'),
                   ('if keys is not positions:', 'if True:'))
    model, x = alibi.GPT(alibi.GPTConfig(**TINY)).eval(), ids(2, 40)
    model.load_state_dict(tiny().state_dict())

    def compute():
        cache, steps = (alibi.KVCache(model.config, 2, 'cpu', torch.float32) for _ in range(2))
        uncached = model(x[:, :16])[0]
        cached = [model(chunk, cache=cache)[0] for chunk in x.split([7, 9, 13, 1, 10], dim=1)]
        by_steps = [model(chunk, cache=steps)[0] for chunk in x.split(1, dim=1)]
        torch.testing.assert_close(cached[1], uncached)
        torch.testing.assert_close(by_steps[-1], cached[-1])
        assert (uncached - tiny()(x[:, :16])[0]).abs().max() > 0.1
        return uncached, *cached, *by_steps

    assert_fast_paths_change_nothing(monkeypatch, compute, 1e-5, alibi)

def test_a_parameter_in_no_group_or_in_two_is_an_error(monkeypatch):
    model = tiny()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match='embedding.weight is in 0 groups'):
        patch.setattr(gpt, 'Muon', lambda groups, make=gpt.Muon, **options: make(groups[:1], **options))
        gpt.make_optimizer(model, 'muon', *RATES)
    model.blocks[1].mlp.up.weight = model.blocks[0].mlp.up.weight
    with pytest.raises(ValueError, match='blocks.0.mlp.up.weight is in 2 groups'), pytest.warns(UserWarning):
        gpt.make_optimizer(model, 'muon', *RATES)

# ----------------------------------------------------------------------------
# checkpoints

def checkpoint(model, **changes):
    fields = {name: kind() for name, kind in gpt.FIELDS.items()}
    return fields | dict(model=model.state_dict(), model_config=vars(model.config).copy()) | changes

def test_a_checkpoint_comes_back_equal_and_the_tied_weights_are_one_tensor(tmp_path):
    model, x = tiny(), ids(2, 16)
    save_checkpoint(tmp_path / 'c.pt', checkpoint(model))
    again = load_model(load_checkpoint(tmp_path / 'c.pt')).eval()
    assert torch.equal(model(x, x)[0], again(x, x)[0]) and os.listdir(tmp_path) == ['c.pt']
    again.embedding.weight.data[3] += 1  # moves input and output alike
    assert torch.equal(again(x, x)[0], again.trunk(x) @ again.embedding.weight.T)
    assert sum(p.numel() == 50 * 32 for p in again.parameters()) == 1

class Hostile:
    def __reduce__(self):
        return Path.touch, (Path('hostile_code_has_run'),)

def one_bit(whole):
    at = len(whole) // 2
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]

def compressed(whole):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()

SPOILS = {
    'empty': lambda whole: b'', 'text': lambda whole: b'hello', 'cut': lambda whole: whole[: len(whole) // 2],
    'one bit': one_bit, 'compressed': compressed,
    'hostile': {'model': Hostile()}, 'hostile legacy': {'model': Hostile()}, 'no model': {'model': 7},
    'of another program': {'weights': torch.ones(3)}, 'missing': None, 'a directory': os.mkdir,
    'of another shape': {'model_config': {**TINY, 'n_embd': 64}},
    'of words': {'model': {'embedding.weight': 'word'}}}

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

MAKERS = {
    'muon': lambda model: gpt.make_optimizer(model, 'muon', *RATES),
    'adamw': lambda model: gpt.make_optimizer(model, 'adamw', *RATES),
    'SGD': lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    'Adagrad': lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    'Adafactor': lambda model: torch.optim.Adafactor(model.parameters(), lr=0.1)}

def state_after_an_update(kind):
    model = tiny()
    optimizer = MAKERS[kind](model)
    update(model, optimizer)
    return optimizer.state_dict()

@pytest.mark.parametrize('kind', MAKERS)
def test_the_state_of_any_optimizer_is_loaded_equal(kind):
    saved, optimizer = state_after_an_update(kind), MAKERS[kind](tiny())
    gpt.load_optimizer(optimizer, saved)
    loaded = optimizer.state_dict()
    assert loaded['param_groups'] == saved['param_groups'] and loaded['state'].keys() == saved['state'].keys()
    for number, values in saved['state'].items():
        torch.testing.assert_close(loaded['state'][number], values, rtol=0, atol=0)

def test_an_optimizer_keeps_its_own_options_and_refuses_the_state_of_another():
    saved, optimizer = state_after_an_update('adamw'), gpt.make_optimizer(tiny(), 'adamw', 0.5, *RATES[1:])
    gpt.load_optimizer(optimizer, saved)
    assert {group['lr'] for group in optimizer.param_groups} == {0.5}
    with pytest.raises(ValueError, match='does not fit'):
        gpt.load_optimizer(MAKERS['SGD'](tiny()), saved)

@pytest.mark.parametrize('spoil', [
    lambda t: t.to_sparse(), lambda t: t[:1], lambda t: t.sum(), lambda t: t.expand(3, -1, -1),
    lambda t: t.flatten()], ids=['sparse', 'narrow', 'one number', '3-D', 'flat'])
@pytest.mark.parametrize('kind, name', [('muon', 'momentum_buffer'), ('adamw', 'exp_avg')])
def test_optimizer_state_of_another_shape_is_refused(kind, name, spoil):  # a fused step writes past its end
    saved = state_after_an_update(kind)
    saved['state'][0][name] = spoil(saved['state'][0][name])
    with pytest.raises(ValueError, match='optimizer state does not fit its weights') as caught:
        gpt.load_optimizer(MAKERS[kind](tiny()), saved)
    assert '\n' not in str(caught.value)

def test_optimizer_state_is_laid_out_in_memory_as_its_weights():  # a fused step goes by memory
    saved, optimizer = state_after_an_update('adamw'), MAKERS['adamw'](tiny())
    saved['state'][0]['exp_avg'] = saved['state'][0]['exp_avg'].t().contiguous().t()
    saved['state'][1]['exp_avg'] = torch.ones(()).expand_as(saved['state'][1]['exp_avg'])
    gpt.load_optimizer(optimizer, saved)
    for p, values in optimizer.state.items():
        assert values['exp_avg'].stride() == p.stride()
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

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

def run(command, cwd, **options):
    """The command as a process, which must succeed -> (stdout, stderr)"""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, **options)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    return done.stdout, done.stderr

def call_script(name, *arguments, status=0, typed='', **modules):
    """The script (the current folder's, if it has one) in this process, which spares the imports and lets
    a test replace its parts; it must end with this status -> (stdout, stderr)"""
    path = Path(name) if Path(name).exists() else HERE / name
    out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, 'argv', [name, *map(str, arguments)])
        patch.setattr(sys, 'stdin', io.StringIO(typed))
        patch.setattr(gc, 'freeze', lambda: None)
        for module, stand_in in {'matplotlib': None, **modules}.items():  # slow to import and to draw
            patch.setitem(sys.modules, module, stand_in)
        try:
            runpy.run_path(str(path), run_name='__main__')
        except SystemExit as error:
            code = error.code or 0
        finally:
            for number, handler in handlers.items():
                if signal.getsignal(number) != handler:
                    signal.signal(number, handler)
    gc.collect()  # its variables, which hold files and the lock of out_dir
    if isinstance(code, str):
        err.write(f'{code}\n')
        code = 1
    said, complained = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert code == status, said + complained
    return said, complained

def patch_training(patch, change):
    """From now on a model in training returns change(x, its loss)."""
    forward = GPT.forward

    def changed(self, x, *arguments, **options):
        logits, loss = forward(self, x, *arguments, **options)
        return logits, change(x, loss) if self.training else loss
    patch.setattr(GPT, 'forward', changed)

def at_forward(patch, n, action):
    """In the n-th forward of training (two make an update) action(loss) is called; it may return another."""
    calls = itertools.count(1)

    def change(x, loss):
        changed = action(loss) if next(calls) == n else None
        return loss if changed is None else changed
    patch_training(patch, change)

@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    """A folder with a data set and finished runs: muon, adamw, and cut-..., interrupted and resumed."""
    folder = tmp_path_factory.mktemp('runs')
    (folder / 'tiny.py').write_text(TINY_RUN)
    (folder / 'plain.txt').write_text(TEXT * 200)
    last = {}
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through again and again
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with redirect_stdout(io.StringIO()):
            prepare.prepare('plain.txt')
        for kind, number, schedule in ('muon', signal.SIGINT, 'cosine'), ('adamw', signal.SIGTERM, 'linear'):
            flags = ['tiny.py', f'--optimizer={kind}', f'--lr_schedule={schedule}']
            call_script('train.py', *flags, f'--out_dir={kind}')
            with pytest.MonkeyPatch.context() as cut:
                at_forward(cut, 15, lambda loss: signal.raise_signal(number))  # in update 8
                out, _ = call_script('train.py', *flags, f'--out_dir=cut-{kind}', status=128 + number)
            last[kind] = out.splitlines()[-1]
            call_script('train.py', '--resume', f'--out_dir=cut-{kind}', '--eval_interval=7')
    return SimpleNamespace(folder=folder, last=last)

@pytest.fixture
def place(runs, tmp_path, monkeypatch):
    """The current folder: the tiny config, its data set, and the run with Muon in out/."""
    shutil.copytree(runs.folder / 'data', tmp_path / 'data')
    shutil.copytree(runs.folder / 'muon', tmp_path / 'out')
    shutil.copy(runs.folder / 'tiny.py', tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def call(place):
    return call_script

def as_script(name, arguments, stdout):
    """The body of started()."""
    if stdout:
        os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        sys.stdout = open(1, 'w')
    else:
        os.close(1)
        sys.stdout = None  # as Python does
    sys.stderr = open('err', 'w')
    sys.modules['matplotlib'], sys.argv = None, [name, *arguments]
    runpy.run_path(str(HERE / name), run_name='__main__')

multiprocessing.set_forkserver_preload(['torch._dynamo', 'requests', 'pytest'])

@contextmanager
def started(name, *arguments, stdout='said'):
    """The script in a process of its own, forked from one that has imported torch; killed at the end."""
    context = multiprocessing.get_context('forkserver')
    process = context.Process(target=as_script, args=(name, arguments, stdout), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()

def log_of(folder):
    with open(folder / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))

def column(folder, name):
    return [float(row[name]) for row in log_of(folder) if row[name]]

def update_of(path):
    return load_checkpoint(str(path))['iter_num']

def assert_same_state(a, b):
    """Weights and optimizer state of two ckpt.pt, bit for bit."""
    a, b = (load_checkpoint(str(folder / 'ckpt.pt')) for folder in (a, b))
    assert a['iter_num'] == b['iter_num'] and a['model'].keys() == b['model'].keys()
    assert all(torch.equal(weight, b['model'][name]) for name, weight in a['model'].items())
    assert a['optimizer']['state'].keys() == b['optimizer']['state'].keys() != set()
    for p, state in a['optimizer']['state'].items():
        assert all(torch.equal(value, b['optimizer']['state'][p][name]) for name, value in state.items())

@pytest.mark.parametrize('kind, by_hand', [  # of updates 1 and 4 of the warm-up, 5, 22 and 40, the last
    ('muon', [0.2, 0.8, 1, *((1 + math.cos(math.pi * done / 36)) / 2 for done in (17, 35))]),
    ('adamw', [0.2, 0.8, 1, 19 / 20, 1 / 20])])
def test_the_learning_rate_follows_the_schedule(runs, kind, by_hand):
    lr = column(runs.folder / kind, 'lr')
    shares = [lr[n - 1] / 0.01 for n in (1, 4, 5, 22, 40)]
    assert shares == pytest.approx(by_hand, rel=1e-5)  # six digits are logged

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_a_run_makes_its_updates_and_keeps_the_latest_and_the_best(runs, kind):
    folder = runs.folder / kind
    latest, best = (load_checkpoint(str(folder / name)) for name in ('ckpt.pt', 'best.pt'))
    assert column(folder, 'iter') == list(range(1, 41))
    assert latest['iter_num'] == 40 and latest['tokens_seen'] == 40 * 128
    assert [int(row['iter']) for row in log_of(folder) if row['val_loss']] == [*range(3, 40, 3), 40]
    lowest = min(column(folder, 'val_loss'))
    assert best['val_loss'] == pytest.approx(lowest, abs=1e-6) and 'optimizer' not in best
    assert column(folder, 'train_loss')[-1] < 0.7 * column(folder, 'train_loss')[0]

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_an_interrupted_and_resumed_run_equals_an_unbroken_one_bit_for_bit(runs, kind):
    unbroken, cut = runs.folder / kind, runs.folder / f'cut-{kind}'
    assert runs.last[kind].endswith(f'update 8; to continue: python train.py --resume --out_dir=cut-{kind}')
    assert_same_state(unbroken, cut)
    for name in 'iter', 'train_loss', 'lr':
        assert column(cut, name) == column(unbroken, name)

def test_the_state_of_any_optimizer_resumes_bit_for_bit(call, place, monkeypatch):
    def sgd(model, kind, learning_rate, *_):
        optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9)
        optimizer.param_groups[0]['peak_lr'] = learning_rate
        return optimizer
    monkeypatch.setattr(gpt, 'make_optimizer', sgd)
    call('train.py', 'tiny.py', '--max_iters=9', '--out_dir=whole')
    call('train.py', 'tiny.py', '--max_iters=5', '--lr_decay_iters=9')
    call('train.py', '--resume', '--max_iters=9')
    assert_same_state(place / 'whole', place / 'out')

def updates_lost(kills, *flags):
    """Runs until done, killed so many times at random moments -> how many updates were lost each time"""
    rng, lost, seen = random.Random(os.environ.get('PART', kills)), [], 0
    said, checkpoint = Path('said'), Path('out/ckpt.pt')
    for life in range(kills + 1):
        said.write_text('')
        with started('train.py', '--resume' if checkpoint.exists() else 'tiny.py', *flags) as process:
            lines = rng.randint(1, 20) if life < kills else math.inf  # 6 or so precede update 1
            while process.is_alive() and said.read_text().count('\n') < lines:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.06))  # seconds: two or three updates, or the middle of a save
        assert process.exitcode == (-signal.SIGKILL if life < kills else 0), Path('err').read_text()
        seen = max([seen, *map(int, re.findall(r'^ *(\d+)/', said.read_text(), re.M))])
        lost.append(seen - (update_of(checkpoint) if checkpoint.exists() else 0))
        print(f'kill {len(lost)} of {kills}: update {seen}, {lost[-1]} lost', flush=True)
    return lost

MANY = int(os.environ.get('KILLS', 200))

@pytest.mark.parametrize('kills', [2, pytest.param(MANY, marks=pytest.mark.long)])
def test_a_killed_run_loses_at_most_one_interval_and_ends_the_same(call, place, kills):
    shutil.rmtree('out')
    flag = f'--max_iters={20 * kills}'
    assert max(updates_lost(kills, flag)) <= 3
    call('train.py', 'tiny.py', '--out_dir=unbroken', flag)
    assert_same_state(place / 'unbroken', place / 'out')
    assert column(place / 'out', 'train_loss') == column(place / 'unbroken', 'train_loss')

@pytest.mark.parametrize('at_entry, status, last', [(signal.SIG_DFL, 129, 5), (signal.SIG_IGN, 0, 9)])
def test_a_closed_terminal_saves_the_run_and_nohup_keeps_it_going(call, monkeypatch, at_entry, status, last):
    at_forward(monkeypatch, 9, lambda loss: signal.raise_signal(signal.SIGHUP))  # in update 5
    before = signal.signal(signal.SIGHUP, at_entry)
    try:
        call('train.py', 'tiny.py', '--max_iters=9', status=status)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert update_of('out/ckpt.pt') == last

def test_a_second_ctrl_c_stops_at_once_even_while_the_first_is_answered(call, monkeypatch):
    def write(_, text):
        assert b'once more stops at once' in text
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(os, '_exit', sys.exit)
    monkeypatch.setattr(os, 'write', write)
    at_forward(monkeypatch, 9, lambda loss: signal.raise_signal(signal.SIGINT))  # in update 5
    call('train.py', 'tiny.py', status=130)
    assert update_of('out/ckpt.pt') == 3

@pytest.mark.parametrize('moments', [6, pytest.param(100, marks=pytest.mark.long)])
def test_ctrl_c_at_any_moment_of_the_start_is_no_traceback(place, moments):
    rng = random.Random(moments)
    commands = [script('train.py', 'tiny.py', '--max_iters=1000000'),
                script('sample.py', '--max_new_tokens=1000000'),
                script('prepare.py', 'pydoc', '--tokenizer=bpe')]
    for command in itertools.islice(itertools.cycle(commands), moments):
        moment = rng.uniform(0.02, 1.5)  # seconds; importing torch takes about two
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(command, **pipes) as process:
            try:
                time.sleep(moment)
                process.send_signal(signal.SIGINT)
                said = process.communicate(timeout=60)[1]
            finally:
                process.kill()
        code = process.returncode
        reached = [int(n) for n in re.findall(rf'{re.escape(str(HERE))}.*, line (\d+)', said)]
        too_early = code in (1, -signal.SIGINT) and max(reached, default=0) < 20  # Python itself was starting
        assert too_early or (code == 130 and 'Traceback' not in said), (command, moment, code, said)

@pytest.mark.parametrize('stdout, status', [('', 0), ('/dev/full', 2)])
def test_a_closed_stdout_does_not_stop_a_run_and_a_full_one_does_in_one_line(place, stdout, status):
    with started('train.py', 'tiny.py', '--max_iters=3', stdout=stdout) as process:
        process.join(60)
        assert process.exitcode == status
    said = Path('err').read_text()
    assert update_of('out/ckpt.pt') == 3 if status == 0 else said == 'stdout: No space left on device\n'

def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(call, place, runs, monkeypatch):
    refused, real = [], prepare.val_batches

    def evaluate(*arguments):
        if not refused:
            refused.append(call('train.py', 'tiny.py', status=2)[1])
        return real(*arguments)
    monkeypatch.setattr(prepare, 'val_batches', evaluate)
    call('train.py', 'tiny.py')
    assert refused == ['another run is using out: choose another --out_dir\n'] and not Path('out-2').exists()
    assert_same_state(runs.folder / 'muon', place / 'out')
    assert column(place / 'out', 'train_loss') == column(runs.folder / 'muon', 'train_loss')

def test_three_runs_started_at_once_in_a_fresh_clone_share_one_preparation(place):
    shutil.rmtree('data')
    flags = ['tiny.py', '--dataset=pydoc', '--max_iters=1']
    with ExitStack() as stack:
        names = 'abc'
        runs = [started('train.py', *flags, f'--out_dir={name}', stdout=f'said-{name}') for name in names]
        processes = [stack.enter_context(run) for run in runs]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [update_of(f'{name}/ckpt.pt') for name in names] == [1, 1, 1]
    assert sum('char tokenizer, vocabulary of' in Path(f'said-{name}').read_text() for name in names) == 1

@pytest.mark.parametrize('spoil, says', [
    (lambda loss: loss * math.nan, 'loss nan'),
    (lambda loss: loss + (0 * loss).sqrt(), r'loss \d\.\d+, gradient norm nan')])  # the slope at 0: inf
def test_what_is_not_finite_stops_the_run_and_saves_nothing_bad(call, monkeypatch, spoil, says):
    at_forward(monkeypatch, 9, spoil)  # in update 5
    err = call('train.py', 'tiny.py', '--log_interval=10', status=1)[1]
    assert re.match(f'update 5: {says}', err) and err.count('\n') == 1 and 'lower learning rate' in err
    for saved in load_checkpoint('out/ckpt.pt'), load_checkpoint('out/best.pt'):
        assert saved['iter_num'] == 3 and all(p.isfinite().all() for p in saved['model'].values())

@pytest.mark.parametrize('threads', [0, 1])  # 0: updates are tried before the first
def test_out_of_memory_halves_the_micro_batch_and_not_the_update(call, place, monkeypatch, threads):
    flags, rows = ['tiny.py', '--max_iters=6', '--dropout=0', f'--threads={threads}'], 2

    def limited(x, loss):
        if len(x) > rows:
            raise torch.OutOfMemoryError('simulated')
        return loss
    call('train.py', *flags, '--out_dir=whole')
    patch_training(monkeypatch, limited)
    out, _ = call('train.py', *flags)
    assert re.search('out of memory.* 4 micro-batches of 2 sequences', out)
    whole, halved = (column(place / name, 'train_loss') for name in ('whole', 'out'))
    assert halved == pytest.approx(whole, rel=1e-4)  # float32 sums in another order, over six updates
    rows = 0
    err = call('train.py', *flags, '--out_dir=none', status=2)[1]
    assert re.search(r'out of memory.* 1 x 16.* no checkpoint yet.* GiB', err)

@pytest.mark.parametrize('owner, name, error, says', [
    (gpt, 'inverse_root', MemoryError('9 GiB'), 'out of memory at micro-batches of 4 x 16: 9'),
    (torch.optim.AdamW, 'step', MemoryError('9 GiB'), 'out of memory at micro-batches of 4 x 16: 9'),
    (prepare, 'val_batches', FileNotFoundError(2, 'gone', 'val.bin'), 'val.bin: gone')])
def test_no_memory_or_data_is_one_line_and_saves_no_half_update(call, monkeypatch, owner, name, error, says):
    real, calls = getattr(owner, name), itertools.count(1)

    def fail(*arguments, **options):
        if next(calls) > 13:
            raise error
        return real(*arguments, **options)
    monkeypatch.setattr(owner, name, fail)
    err = call('train.py', 'tiny.py', status=2)[1]
    assert err.startswith(says) and err.count('\n') == 1 and 'out/ckpt.pt is from before it' in err
    saved = load_checkpoint('out/ckpt.pt')
    steps = {int(s['step']) for s in saved['optimizer']['state'].values() if 'exp_avg' in s}
    assert steps == {saved['iter_num']} and saved['iter_num'] < 40

@pytest.mark.parametrize('owner, name, flags, says', [
    (shutil, 'disk_usage', ['tiny.py'], 'GiB free'),
    (os, 'fsync', ['--resume', '--max_iters=50'], 'No space left')])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(call, monkeypatch, owner, name, flags, says):
    def full(_):
        if name == 'fsync':
            raise OSError(28, 'No space left on device')
        return SimpleNamespace(free=0)
    monkeypatch.setattr(owner, name, full)
    err = call('train.py', *flags, status=2)[1]
    assert says in err and err.count('\n') == 1 and update_of('out/ckpt.pt') == 40
    assert [str(path) for path in Path().glob('out*/*ckpt*')] == ['out/ckpt.pt']

@pytest.mark.parametrize('changes', [
    dict(val_loss='1'), dict(tokenizer={'kind': 'char'}), dict(model={'embedding.weight': 'x'}),
    dict(model_config={'n_layer': 10 ** 6}), dict(config={'n_layer': 'two'}), dict(optimizer={})])
def test_a_checkpoint_with_an_odd_field_is_refused_in_one_line(call, place, changes):
    torch.save(load_checkpoint('out/ckpt.pt') | changes, 'out/ckpt.pt')
    os.remove('out/best.pt')
    commands = [('train.py', '--resume', '--max_iters=50')]
    if not changes.keys() & {'config', 'optimizer'}:  # which only --resume reads
        commands += [('train.py', 'tiny.py', '--init_from=out/ckpt.pt', '--out_dir=b'), ('sample.py',)]
    for command in commands:
        assert call(*command, status=2)[1].count('\n') == 1
    assert not Path('b').exists() and len(log_of(place / 'out')) == 40

def test_a_row_of_the_log_that_a_crash_cut_short_is_made_again(call, place):
    with open('out/log.csv', 'a') as file:
        file.write('41,2.5,1.2')
    call('train.py', '--resume', '--max_iters=42')
    assert column(place / 'out', 'iter') == [*range(1, 43)]

def test_starting_over_puts_the_old_run_aside_and_nothing_else(call):
    Path('out/notes.txt').write_text('mine')
    os.rename('out', 'other disk')
    os.symlink('other disk', 'out')
    for i in range(2):
        assert f'is in out-{i + 1} now' in call('train.py', 'tiny.py', '--max_iters=1')[0]
    assert [update_of(f'{name}/ckpt.pt') for name in ('out-1', 'out-2', 'out')] == [40, 1, 1]
    assert sorted(os.listdir('out-1')) == ['best.pt', 'ckpt.pt', 'log.csv'] and Path('out').is_symlink()
    assert Path('other disk/notes.txt').read_text() == 'mine'

REFUSALS = [
    ('train.py tiny.py --max_iters=0', 'max_iters is 0'), ('train.py tiny.py --optimizer=sgd', 'muon, adamw'),
    ('train.py tiny.py --lr_decay_iters=4', 'lr_decay_iters'), ('train.py tiny.py --device=tpu', 'tpu'),
    ('train.py tiny.py --tokens_per_update=200', '192 or 256'), ('train.py tiny.py --n_head=3', 'n_embd 32'),
    ('train.py tiny.py --n_embd=1099511627776', 'n_embd'), ('train.py tiny.py --n_layer=1000000', 'n_layer'),
    ('train.py tiny.py --mlp_ratio=1e300', 'mlp_ratio'), ('train.py tiny.py --n_embd=1000000', 'at least'),
    ('train.py tiny.py --block_size=5000', '1,160 tokens'), ('train.py tiny.py --dtype=float16', 'float16'),
    ('train.py tiny.py --out_dir=.', 'tiny.py, which'), ('train.py tiny.py --out_dir=tiny.py', 'tiny.py'),
    ('train.py tiny.py --out_dir=config', 'mine.py, which'),
    ('train.py tiny.py --out_dir=data', 'meta.json, which'),
    ('train.py tiny.py --init_from=tiny.py', 'not a checkpoint'),
    ('train.py tiny.py --dataset=nothing', 'python prepare.py'), ('train.py --interactive', 'no answer'),
    ('train.py --resume', 'made 40 updates'), ('train.py --resume --out_dir=nothing', 'no checkpoint'),
    ('train.py --resume --qk_norm=false', 'qk_norm'), ('train.py --resume --n_layer=3', 'n_layer is 2'),
    ('train.py --resume --optimizer=adamw', 'another optimizer'), ('train.py --resume --dataset=more', 'sha256'),
    ('train.py --resume --dataset=words', 'different tokenizers'),
    ('sample.py --out_dir=nothing', 'no checkpoint'), ('sample.py --temperature=-1', 'temperature is -1'),
    ('sample.py --start=FILE:nothing', 'nothing'), ('bench.py --updates=0', 'updates'),
    ('prepare.py --info=nothing', 'python prepare.py')]

@pytest.mark.parametrize('command, says', REFUSALS)
def test_a_script_refuses_in_one_line_before_anything_is_written(call, place, command, says):
    os.mkdir('config')
    shutil.copy('tiny.py', 'config/mine.py')
    if command.endswith(('more', 'words')):
        Path('in.txt').write_text(TEXT * 300)
        prepare.prepare('in.txt', name='more')
        prepare.prepare('in.txt', name='words', tokenizer='bpe', vocab_size=300)
    before = sorted(place.rglob('*'))
    out, err = call(*command.split(), status=2)
    assert says in err and err.count('\n') == 1 and 'kept' not in out and sorted(place.rglob('*')) == before

@pytest.mark.parametrize('flags, says', [
    (['tiny.py', '--dry_run'], 'nothing was written'),
    (['--resume', '--max_iters=80', '--dry_run'], 'nothing was written'),
    (['tiny.py', '--init_from=out/best.pt', '--eval_only'], 'validation loss {best:.4f}'),
    (['--resume', '--eval_only'], 'validation loss {ckpt:.4f}'),
    (['--show_hardware'], 'train.py would use'), (['--status'], 'best validation loss {best:.4f}')])
def test_looking_writes_nothing(call, place, flags, says):
    before = {path: path.stat().st_mtime_ns for path in place.rglob('*')}
    out, _ = call('train.py', *flags)
    assert {path: path.stat().st_mtime_ns for path in place.rglob('*')} == before
    losses = {name: load_checkpoint(f'out/{name}.pt')['val_loss'] for name in ('best', 'ckpt')}
    assert says.format(**losses) in out

def test_status_lists_data_sets_and_runs_and_what_to_type_next(call):
    out, _ = call('train.py', '--status')
    assert re.search(r'data sets.* plain\nrun in out: plain, update 40 of 40', out)
    assert out.endswith('next: python sample.py --out_dir=out\n')
    save_checkpoint('out/ckpt.pt', load_checkpoint('out/ckpt.pt') | {'iter_num': 20})
    assert call('train.py', '--status')[0].endswith('next: python train.py --resume --out_dir=out\n')

def test_a_terminal_shows_that_a_run_lives_and_a_file_does_not(call):
    terminal, other_end = os.openpty()
    flags = ['tiny.py', '--max_iters=3', '--log_interval=10']
    with started('train.py', *flags, stdout=os.ttyname(other_end)) as process:
        process.join(60)
    assert b'update 1\r' in os.read(terminal, 10000) and '\r' not in call('train.py', *flags)[0]
    os.close(terminal)
    os.close(other_end)

def test_a_run_that_may_learn_by_heart_says_so_before_it_starts(call):
    before = call('train.py', 'tiny.py', '--max_iters=4000', '--dry_run')[0].partition('/4000 ')[0]
    assert before.count('learn it by heart') == 1
    assert 'by heart' not in call('train.py', 'tiny.py', '--max_iters=400', '--dry_run')[0]

def test_the_settings_of_a_run_go_on_with_it(call):
    assert 'update 40' in call('train.py', '--resume', '--max_iters=42')[0]
    config = load_checkpoint('out/ckpt.pt')['config']  # out_dir was another one then
    kept = {'dropout': 0.1, 'eval_interval': 3, 'max_iters': 42, 'out_dir': 'out'}
    assert config == config | kept

def test_patience_stops_a_run_that_no_longer_gets_better_and_resuming_it_too(call, place):
    out, _ = call('train.py', 'tiny.py', '--learning_rate=0', '--muon_learning_rate=0', '--patience=2')
    assert 'stopped at update 9' in out
    assert 'patience' in call('train.py', '--resume', status=2)[1]
    assert column(place / 'out', 'iter')[-1] == 9
    assert 'stopped at update 12' in call('train.py', '--resume', '--patience=3')[0]

def test_a_field_added_to_the_configuration_is_a_setting_everywhere(call, monkeypatch):
    for path in HERE.glob('*.py'):
        if not path.name.startswith('test_'):
            shutil.copy(path, '.')
            monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.syspath_prepend('.')
    first = '    block_size: int = 256'
    field = '    soft_cap: float = 30.0  # largest logit\n'
    Path('model.py').write_text(Path('model.py').read_text().replace(first, field + first))
    assert re.search(r'--soft_cap=30.0 +largest logit', call('train.py', '--help')[0])
    call('train.py', 'tiny.py', '--max_iters=1', '--soft_cap=20')
    assert torch.load('out/ckpt.pt')['model_config']['soft_cap'] == 20
    assert 'soft_cap is 20.0' in call('train.py', '--resume', '--max_iters=2', '--soft_cap=25', status=2)[1]
    call('train.py', '--resume', '--max_iters=2')

@pytest.mark.long  # compiling takes a minute
def test_a_compiled_run_agrees_with_an_eager_one(call, place):
    if problem := hardware.compile_problem('cpu'):
        pytest.skip(problem)
    for name, on in ('eager', 'false'), ('compiled', 'true'):
        call('train.py', 'tiny.py', '--max_iters=6', '--dropout=0', f'--compile={on}', f'--out_dir={name}')
    eager, compiled = (column(place / name, 'train_loss') for name in ('eager', 'compiled'))
    assert compiled == pytest.approx(eager, rel=1e-4)  # float32 sums in another order, over six updates

def test_samples_and_wandb_are_there_when_asked_for(call):
    logged = []
    wandb = SimpleNamespace()
    wandb.init = lambda config, **_: logged.append(config)
    wandb.log = lambda row, **_: logged.append(row)
    out, _ = call('train.py', 'tiny.py', '--max_iters=7', '--wandb_log', '--sample_interval=2', wandb=wandb)
    assert logged[0]['max_iters'] == 7 and [row['iter'] for row in logged[1:]] == list(range(1, 8))
    data = load_dataset('plain')
    beginning = Tokenizer(data.meta['tokenizer']).decode(data.val.read(np.array([0]), 16)[0])
    assert out.count(beginning) == 2  # of the evaluations, at 3, 6 and 7, the second and the last
    out, _ = call('train.py', 'tiny.py', '--max_iters=1', '--wandb_log', wandb=None)
    assert 'wandb is not installed' in out

def test_finetuning_takes_shape_and_tokenizer_from_the_checkpoint(call, place):
    Path('other.txt').write_text('The lazy dog, 12 of them.\n' * 200)
    prepare.prepare('other.txt', tokenizer='out/best.pt')
    lines = [line for line in TINY_RUN.splitlines() if 'n_layer' not in line]
    Path('finetune.py').write_text('\n'.join(lines))
    flags = ['finetune.py', '--dataset=other', '--init_from=out/best.pt', '--max_iters=3']
    call('train.py', *flags, '--out_dir=tuned')
    assert column(place / 'tuned', 'train_loss')[0] < 0.8 * column(place / 'out', 'train_loss')[0]
    assert column(place / 'tuned', 'iter') == [1, 2, 3] and column(place / 'tuned', 'lr')[0] == 0.002
    assert 'update 3' in call('train.py', '--resume', '--out_dir=tuned', '--max_iters=4')[0]
    one, other = (load_checkpoint(f'{name}/ckpt.pt') for name in ('out', 'tuned'))
    assert one['tokenizer'] == other['tokenizer'] and one['model_config'] == other['model_config']

@pytest.fixture
def offline(monkeypatch):
    for name in 'HTTP_PROXY', 'HTTPS_PROXY', 'http_proxy', 'https_proxy', 'ALL_PROXY':
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # nobody listens there
    monkeypatch.setattr(prepare, 'RETRY_WAITS', (0, 0))

def test_without_a_network_the_run_trains_on_pydoc_and_every_record_says_so(call, place, offline):
    flags = ['tiny.py', '--dataset=shakespeare', '--max_iters=1', '--eval_interval=1']
    assert 'python prepare.py' in call('train.py', *flags, '--offline_dataset=', status=2)[1]
    assert log_of(place / 'out')[-1]['iter'] == '40'  # the old run was not put away
    out, _ = call('train.py', *flags, '--offline_dataset=pydoc')
    assert 'shakespeare could not be fetched' in out and 'training on pydoc instead' in out
    assert load_checkpoint('out/ckpt.pt')['config']['dataset'] == 'pydoc'

def test_the_picture_is_drawn_where_matplotlib_is_there(call):
    call('train.py', 'tiny.py', '--max_iters=3', matplotlib=pytest.importorskip('matplotlib'))
    assert Path('out/loss.png').read_bytes().startswith(b'\x89PNG')

def test_the_questions_end_in_a_config_file_that_runs(call, offline, monkeypatch):
    def dry_run(command):
        assert command[2:] == ['config/my_run.py', '--dry_run']
        call('train.py', *command[2:], '--threads=1', '--compile=false', '--batch_size=4')
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, 'run', dry_run)
    answers = ['tpu', 'cpu', 'nothing', 'shakespeare', 'plain', 'many', '0', '2', '2', '33', '32', '40']
    out, _ = call('train.py', '--interactive', typed='\n'.join([*answers, 'my run', 'n']))
    for question, times in ('device', 2), ('data set', 3), ('minutes', 2), ('width', 2), ('start it', 1):
        assert len(re.findall(fr'{question}[^\[\n]* \[', out)) == times  # a wrong answer is asked again
    settings = dict(device='', dataset='', minutes=1.0, n_layer=0, n_head=0, n_embd=0, max_iters=0)
    settings |= dict(n_kv_head=0, out_dir='')
    config = configurator.run_config('config/my_run.py', settings)
    assert list(config.values()) == ['cpu', 'plain', 0.0, 2, 2, 32, 40, 2, 'out-run']

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='PyTorch was built without')

def as_rank(rank, n, port, flags):
    """train.py as one of n processes that torchrun started; counts how often they sum their gradients."""
    summed = []

    def sum_up(_, bucket):
        summed.append(bucket)
        return allreduce_hook(None, bucket)

    class Counting(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.register_comm_hook(None, sum_up)
    torch.nn.parallel.DistributedDataParallel = Counting
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    try:
        as_script('train.py', flags, f'said-{rank}')
    finally:
        Path(f'summed-{rank}').write_text(str(len(summed)))

def train_as(n, *flags):
    """train.py in n processes, forked from one that has imported torch: torchrun takes seconds longer."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    start = torch.multiprocessing.start_processes
    start(as_rank, (n, port, flags), n, start_method='forkserver', daemon=True)

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
    return ['tiny.py', '--dataset=long', '--dropout=0', '--decay_lr=false', '--batch_size=1',
            '--eval_interval=5', '--eval_iters=3']

@needs_gloo
@pytest.mark.parametrize('kind, n', [('muon', 4), ('adamw', 2)])
def test_several_processes_make_the_updates_of_one(call, shared, place, kind, n):
    flags = [*shared, f'--optimizer={kind}', '--max_iters=10']
    call('train.py', *flags, '--out_dir=1')
    train_as(n, *flags, f'--out_dir={n}')
    assert_same_losses(place / '1', place / str(n))
    # once an update, at the last of its micro-batches
    assert [Path(f'summed-{rank}').read_text() for rank in range(n)] == ['10'] * n
    assert f'{n} processes x ' in Path('said-0').read_text()

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
def test_torchrun_restarts_a_run_and_its_sigterm_saves_it_for_one_process_too(call, shared, place):
    Path('tiny.py').write_text(DIES)
    flags = [*shared, '--optimizer=adamw', '--max_iters=4000']
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    apart = {**os.environ, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1', 'OMP_NUM_THREADS': '1'}
    command, said = [*torchrun, '--max_restarts=1', HERE / 'train.py', *flags, '--out_dir=2', '--resume'], ''
    pipes = dict(stdout=subprocess.PIPE, stderr=open('err', 'w'), text=True)
    with subprocess.Popen(command, env=apart, **pipes) as process:
        try:
            for line in process.stdout:
                said += line
                if '/4000 ' in said.partition('start   from')[2]:
                    break
        finally:
            process.terminate()
            said += process.stdout.read()
    # the one that was killed, or the other one that missed it first
    assert re.search(r'failed \(exitcode: (-9\) local_rank: 1|1\) local_rank: 0)', Path('err').read_text())
    for text in 'start   guessing', 'start   from', 'saved   ':  # by rank 0 alone
        assert said.count(text) == 1, said
    last = f'--max_iters={update_of("2/ckpt.pt") + 6}'
    call('train.py', *flags, last, '--out_dir=1')
    call('train.py', '--resume', last, '--out_dir=2')
    assert_same_losses(place / '1', place / '2')
    assert not list(place.glob('2-*'))  # a restart puts nothing away
# ----------------------------------------------------------------------------
# generation

class Recorder(TorchDispatchMode):
    """Stands in for a CUDA graph: notes the operations, and replays them on the same tensors. As on CUDA nothing is
    changed while it takes notes, and nothing may wait for a value."""
    def __init__(self):
        super().__init__()
        self.notes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        kwargs = kwargs or {}
        result = args[0] if function._schema.is_mutable else function(*args, **kwargs)
        self.notes.append((function, args, kwargs, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.notes:
            for kept, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(new) and new.data_ptr() != kept.data_ptr():  # neither a view nor in place
                    kept.copy_(new)

ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of logits of about 1: sums in another order; 8 bits
WAYS = {}
for device in DEVICES:
    WAYS[f'{device} float32'] = device, torch.float32
    WAYS[f'{device} bfloat16'] = device, torch.bfloat16

@pytest.fixture(params=[*WAYS, 'captured'])
def way(request, monkeypatch):
    """A model's device and dtype; 'captured': the steps that CUDA would take, on the CPU."""
    if request.param != 'captured':
        return WAYS[request.param]
    side = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = dict(CUDAGraph=Recorder, graph=lambda graph, **options: graph, device=nullcontext,
                     stream=nullcontext, Stream=lambda: side, current_stream=lambda: side)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(gpt, 'uses_graph', lambda device: True)
    return 'cpu', torch.float32

def model_and_plain(way, **changes):
    """A tiny model of this device and dtype, and text (B, T) -> plain logits of the same weights."""
    device, dtype = way
    reference = tiny(**changes).to(dtype).float()
    return tiny(device=device, **changes).to(dtype), lambda text: plain(reference, text.cpu())

def assert_likeliest(text, logits, T, dtype):
    """After T tokens every next one is the likeliest, but for rounding."""
    logits = logits[:, T - 1 : -1]
    chosen = logits.gather(2, text.cpu()[:, T:, None]).squeeze(2)
    assert (logits.amax(dim=-1) - chosen).max() < ERROR[dtype]

@torch.no_grad()
@pytest.mark.parametrize('chunks', [
    [53], [1] * 53, [15, 1, 1, 36], [16, 37], [5, 11, 20, 17], [40] + [1] * 13], ids=str)
@pytest.mark.parametrize('device, dtype', WAYS.values())
def test_cached_equals_uncached_whatever_the_chunks_and_past_the_window(chunks, device, dtype):
    (model, expected), x, end = model_and_plain((device, dtype)), ids(3, 53), 0
    cache, expected = KVCache(model.config, 3, device, dtype), expected(x)
    for n in chunks:
        logits = model(x[:, end : end + n].to(device), cache=cache)[0]
        end += n
        torch.testing.assert_close(logits[:, 0].float().cpu(), expected[:, end - 1], atol=ERROR[dtype], rtol=0)

@pytest.mark.parametrize('T, block_size', [
    (1, 16), (15, 16), (16, 16), (17, 16), (40, 16), (100, 200), (127, 200), (190, 200)])
def test_greedy_generation_follows_the_banded_forward_at_every_length(way, T, block_size):
    (model, expected), x = model_and_plain(way, block_size=block_size), ids(2, T)  # the cache grows from 128 to 200
    out = model.generate(x, 40, temperature=0)
    assert torch.equal(out[:, :T].cpu(), x) and out.shape == (2, T + 40)
    assert_likeliest(out, expected(out), T, way[1])
    assert torch.equal(out, model.generate(x, 40, temperature=0))  # the second call starts from nothing, too

@torch.no_grad()
def test_turns_with_one_cache_go_on_with_one_text(way):
    (model, expected), (device, dtype) = model_and_plain(way, block_size=200), way
    cache, text, unread = KVCache(model.config, 1, device, dtype), ids(1, 0), ids(1, 5)
    for new in (7, 120, 1, 100):
        T = text.size(1) + unread.size(1)
        text = torch.cat((text, model.generate(unread, new, temperature=0, cache=cache).cpu()), dim=1)
        logits = model(text[:, -1:].to(device), cache=cache)[0]  # generate() has not read the last token
        assert_likeliest(text, expected(text), T, dtype)
        torch.testing.assert_close(logits[:, 0].float().cpu(), expected(text)[:, -1], atol=ERROR[dtype], rtol=0)
        unread = ids(1, 3, seed=new)

@pytest.mark.parametrize('way', ['cpu float32', 'captured'], indirect=True)
def test_samples_of_one_prompt_share_its_prefill_and_still_differ(way):
    model, x = tiny(), ids(1, 9)
    many = model.generate(x, 12, num_samples=5, generator=torch.Generator().manual_seed(0))
    repeated = model.generate(x.expand(5, -1), 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(many, repeated) and len(set(map(tuple, many.tolist()))) == 5

@pytest.mark.parametrize('way', ['cpu float32', 'captured'], indirect=True)
def test_a_row_that_stopped_stays_stopped_and_the_text_ends_with_the_last(way):
    model = tiny()
    out = model.generate(ids(1, 3), 200, num_samples=3, stop_token=7, generator=torch.Generator().manual_seed(0))
    out = out[:, 3:]
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
    assert all(len(text) == 31 for text in texts[:2])  # a file is not repeated
    assert 'update ' in err and 'sees the last 16' in err and 'threads: ' in err

@pytest.mark.parametrize('there, found', [
    (('best.pt', 'ckpt.pt'), 'best.pt'), (('ckpt.pt',), 'ckpt.pt'), ((), 'there is no checkpoint')])
def test_the_best_checkpoint_of_a_folder_is_taken_or_else_the_latest(call, place, there, found):
    Path('run').mkdir()
    for name in there:
        shutil.copy('out/best.pt', Path('run') / name)
    assert found in call('sample.py', '--out_dir=run', '--max_new_tokens=1', status=0 if there else 2)[1]

def test_a_run_without_an_evaluation_says_so(call, place):
    state = load_checkpoint('out/best.pt')
    save_checkpoint('new.pt', state | {'val_loss': math.nan})
    assert 'not evaluated yet' in call('sample.py', '--out_dir=new.pt', '--max_new_tokens=1')[1]

def test_a_tokenizer_with_more_ids_than_the_model_is_refused(call, place):
    state = load_checkpoint('out/best.pt')
    state['tokenizer']['chars'] += 'é'
    save_checkpoint('odd.pt', state)
    assert '34 ids, its model 33' in call('sample.py', '--out_dir=odd.pt', status=2)[1]

@pytest.mark.parametrize('flag', ['--top_p=0', '--num_samples=0', '--dtype=int8', '--device=tpu'])
def test_a_setting_out_of_range_is_one_line(call, flag):
    _, err = call('sample.py', flag, status=2)
    assert err.count('\n') == 1 and flag[2:].partition('=')[0] in err

def test_ctrl_c_stops_a_text_and_the_talk_goes_on(place):
    command = script('sample.py', '--interactive', '--max_new_tokens=1000000000')
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdin.write('The quick\n')
            process.stdin.flush()
            assert len(process.stdout.read(50)) == 50
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate('/tokens 5\n\n/info\n/quit\n', timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0 and 'max_new_tokens 5,' in out and ' tokens read' in out

def test_a_full_stdout_ends_it_in_one_line(place):
    with open('/dev/full', 'w') as full:
        done = subprocess.run(script('sample.py', '--max_new_tokens=20'), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == 'stdout: No space left on device'

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
    assert all(f'/{name} ' in answers[7] for name in ('temperature', 'tokens', 'seed', 'info', 'quit'))
    assert '49 tokens' in answers[8] and "'\\xe9'" in answers[9] and '0 tokens' in answers[11]

def test_the_benchmark_measures_what_it_says(place):
    flags = ['--json', '--updates=3', '--decode_tokens=5', '--random_data=false']
    figures = json.loads(run(script('bench.py', 'tiny.py', *flags), place)[0])
    assert figures['parameters'] == load_model(load_checkpoint('out/best.pt')).n_params()
    assert all(len(figures['ms_per_update'][name]) == 3 for name in ('all', 'data', 'forward', 'backward', 'optimizer'))
    assert all(figures[name] > 0 for name in ('tokens_per_sec', 'mfu', 'peak_memory', 'prefill_tokens_per_sec',
                                              'decode_tokens_per_sec', 'bandwidth_share'))
# ----------------------------------------------------------------------------
# in and out: transformers, an independent implementation, reads what is exported and writes what comes in

LETTERS = ''.join(map(chr, range(32, 74))) + '\n\x01éß中🙂fox'  # 51 of them
SHAPES = {
    'queries share one key': dict(n_kv_head=1),
    'two keys, no qk_norm': dict(n_kv_head=2, qk_norm=False),
    'a key each, biases': dict(n_kv_head=4, qk_norm=False, bias=True),
    'odd sizes': dict(n_head=3, n_kv_head=1, n_embd=42, mlp_ratio=1.3, n_layer=3),
    'wide heads, its own RoPE': dict(n_kv_head=4, head_dim=22, rope_theta=5e4, norm_eps=1e-5, qk_norm=False)}

@pytest.fixture
def sampled(tmp_path, monkeypatch, capsys):
    """sampled(*flags, status=0) -> (stdout, stderr) of sample.py in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)

    def call(*flags, status=0):
        monkeypatch.setattr(sys, 'argv', ['sample.py', *flags])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(HERE / 'sample.py'), run_name='__main__')
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        assert code == status, out + err
        return out, err
    return call

@pytest.fixture
def exported(sampled):
    """exported(model, *flags) -> its folder; its tokenizer has LETTERS."""
    def export(model, *flags, tokenizer={'kind': 'char', 'chars': LETTERS}):
        save_checkpoint('model.pt', checkpoint(model, tokenizer=tokenizer))
        sampled('--out_dir=model.pt', '--export=there', *flags)
        return 'there'
    return export

def foreign(folder, family='qwen3', **changes):
    """A random model saved by transformers in several shards, with the tokenizer of LETTERS -> the model"""
    import transformers
    sizes = dict(vocab_size=64, hidden_size=24, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=32, tie_word_embeddings=True,
                 initializer_range=0.3, eos_token_id=[7, 5])
    if family == 'llama':
        sizes |= dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5, rope_parameters={
            'rope_type': 'default', 'rope_theta': 2e4})
    config = transformers.AutoConfig.for_model(family, **sizes, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if 'norm' in name or 'bias' in name:
            torch.nn.init.normal_(p, mean=1.0, std=0.2)
    model.save_pretrained(folder, max_shard_size='20KB')
    prepare.export_tokenizer({'kind': 'char', 'chars': LETTERS}).save(f'{folder}/tokenizer.json')
    return model.eval()

def edit(path, **changes):
    settings = json.loads(Path(path).read_text()) | changes
    Path(path).write_text(json.dumps({name: value for name, value in settings.items() if value != 'gone'}))

@torch.no_grad()
@pytest.mark.parametrize('shape', SHAPES)
def test_an_exported_model_says_the_same_in_transformers(exported, shape):
    from transformers import AutoModelForCausalLM
    model, x = tiny(vocab_size=51, block_size=64, **SHAPES[shape]), ids(1, 10)
    theirs = AutoModelForCausalLM.from_pretrained(exported(model))
    torch.testing.assert_close(theirs(x).logits, model(x, x)[0], atol=1e-4, rtol=0)
    said = theirs.generate(x, max_new_tokens=50, do_sample=False)
    assert torch.equal(said, model.generate(x, 50, temperature=0))

@pytest.mark.parametrize('kind', ['char', 'bpe'])
def test_an_exported_tokenizer_is_the_same_in_transformers(exported, kind):
    from transformers import AutoTokenizer
    text = f'{LETTERS} naïve  👩‍👩‍👧 {"".join(map(chr, range(161)))}\r\n\n  don\'t 12345 <|endoftext|>'
    meta = {'kind': 'char', 'chars': ''.join(sorted(set(text)))}
    if kind == 'bpe':
        Path('in.txt').write_text(TEXT * 20 + LETTERS)
        meta = load_dataset(prepare.prepare('in.txt', tokenizer='bpe', vocab_size=300)).meta['tokenizer']
        text = text.replace('<|endoftext|>', '')  # there it is the special token
    ours = Tokenizer(meta)
    theirs = AutoTokenizer.from_pretrained(exported(tiny(vocab_size=ours.vocab_size), tokenizer=meta))
    assert theirs.encode(text) == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.end_of_text

@torch.no_grad()
@pytest.mark.parametrize('family', ['llama', 'qwen3'])
def test_a_foreign_model_comes_in_with_its_logits_and_goes_out_bit_for_bit(sampled, family):
    from safetensors.torch import load_file
    theirs, x = foreign('folder', family), ids(2, 30)
    state = load_checkpoint('folder')
    ours = load_model(state).eval()
    torch.testing.assert_close(ours(x, x)[0], theirs(x).logits, atol=1e-4, rtol=0)
    assert state['tokenizer']['end_of_text'] == 7 and math.isnan(state['val_loss'])
    sampled('--out_dir=folder', '--export=again')
    weights, again = theirs.state_dict(), load_file('again/model.safetensors')
    assert len(os.listdir('folder')) > 5 and again.keys() == weights.keys() - {'lm_head.weight'}
    assert all(torch.equal(weight, weights[name]) for name, weight in again.items())

def test_a_foreign_model_whose_vocabulary_is_padded_says_something(sampled):
    foreign('folder')
    Path('prompt.txt').write_text('fox')
    out, err = sampled('--out_dir=folder', '--start=FILE:prompt.txt', '--max_new_tokens=5', '--seed=1')
    assert out.endswith('\n') and not out.startswith('fox') and 'not evaluated yet' in err

@torch.no_grad()
def test_half_precision_goes_out_where_it_is_asked_for(exported):
    from safetensors.torch import load_file
    model = tiny(vocab_size=51)
    weights = load_file(exported(model, '--dtype=bfloat16') + '/model.safetensors')
    assert torch.equal(weights['model.embed_tokens.weight'], model.embedding.weight.bfloat16())
    edit('there/tokenizer_config.json', eos_token='f')
    state = load_checkpoint('there')
    assert torch.equal(state['model']['embedding.weight'], model.embedding.weight.bfloat16().float())
    assert state['tokenizer']['end_of_text'] == LETTERS.index('f')

@pytest.mark.parametrize('qk_norm', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_file_for_llama_cpp_holds_the_model_and_spells_every_character(exported, qk_norm, dtype):
    import gguf
    model = tiny(vocab_size=51, qk_norm=qk_norm)
    file = gguf.GGUFReader(exported(model, f'--dtype={dtype}') + '/model.gguf')
    tensors = {tensor.name: tensor for tensor in file.tensors}
    stored = tensors['blk.1.attn_q.weight']
    rows = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
    if not qk_norm:  # RoPE turns neighbours in the family llama
        rows = rows.unflatten(0, (4, 4, 2)).transpose(1, 2).flatten(0, 2)
    assert torch.equal(rows, model.blocks[1].attention.qkv.weight[:32].to(getattr(torch, dtype)).float())
    tokens, merges = (file.fields[f'tokenizer.ggml.{name}'].contents() for name in ('tokens', 'merges'))
    assert list(tensors['token_embd.weight'].shape) == [32, len(tokens)] == [32, 52]
    made = {''.join(pair.split()) for pair in merges}
    assert all(len(token) == 1 or token in made for token in tokens[:51])
    assert file.fields['tokenizer.ggml.eos_token_id'].contents() == 51

REFUSED = {
    'model_type': dict(model_type='gpt2'), 'tie_word_embeddings': dict(tie_word_embeddings='gone'),
    'rope_type': dict(rope_parameters={'rope_type': 'yarn', 'factor': 2.0, 'rope_theta': 1e4}),
    'rope_type, as it was': dict(rope_parameters='gone', rope_scaling={'type': 'linear', 'factor': 2.0}),
    'use_sliding_window': dict(use_sliding_window=True), 'hidden_act': dict(hidden_act='gelu'),
    'layer_types': dict(layer_types=['full_attention', 'sliding_attention']), 'attention_bias': dict(attention_bias=True),
    'intermediate_size': dict(intermediate_size=100), 'quantization_config': dict(quantization_config={'bits': 4}),
    'hidden_size': dict(hidden_size='gone'), 'n_layer': dict(num_hidden_layers=10**6), 'n_embd': dict(hidden_size='24'),
    'q_proj': dict(num_attention_heads=6), 'layers.2': dict(num_hidden_layers=3),
    'layers.1': dict(num_hidden_layers=1), 'embed_tokens': dict(vocab_size=2**23)}

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('foreign')
    foreign(path)
    return path

@pytest.mark.parametrize('field', REFUSED)
def test_what_cannot_come_in_is_refused_by_name(folder, tmp_path, field):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / 'config.json', **REFUSED[field])
    with pytest.raises(ValueError) as caught:
        load_checkpoint(str(tmp_path))
    assert field.partition(',')[0] in str(caught.value) and '\n' not in str(caught.value)

INDEX = 'model.safetensors.index.json'
HOSTILE = [
    ('config.json', b'[' * 100000), ('config.json', b'[]'), ('generation_config.json', b'\xff'), ('model-00001-*', b'\xff' * 999),
    ('model-00001-*', b''), ('tokenizer.json', b'{"model": {"vocab": {"a": 1e300}}}'), ('tokenizer.json', b'{}'),
    ('tokenizer.json', b'{"model": {"vocab": {"a": 64}}}'), (INDEX, b'{"weight_map": {"a": "../../gone.safetensors"}}'),
    (INDEX, b'{"weight_map": [1]}'), (INDEX, b'{"weight_map": {"a": 7}}'), (INDEX, b'{}')]

@pytest.mark.parametrize('name, contents', HOSTILE)
def test_a_broken_or_hostile_folder_is_refused_in_one_line(folder, tmp_path, name, contents):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob(name)).write_bytes(contents)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(str(tmp_path))
    assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)

@pytest.mark.parametrize('options', [
    dict(use_rms_norm=False), dict(use_swiglu=False), dict(bias=True), dict(n_embd=34, head_dim=8, qk_norm=False), dict()])
def test_what_cannot_go_out_is_refused_before_anything_is_written(exported, sampled, options):
    save_checkpoint('model.pt', checkpoint(tiny(vocab_size=51, **options), tokenizer={'kind': 'char', 'chars': LETTERS}))
    if not options:
        Path('there').mkdir()
        Path('there/mine.txt').touch()
    before = sorted(Path().rglob('*'))
    _, err = sampled('--out_dir=model.pt', '--export=there', status=2)
    assert err.count('\n') == 1 and next(iter(options), 'there exists') in err and sorted(Path().rglob('*')) == before

@pytest.mark.parametrize('package', ['safetensors', 'tokenizers', 'gguf'])
def test_a_package_that_is_missing_is_named(sampled, folder, monkeypatch, package):
    save_checkpoint('model.pt', checkpoint(tiny(vocab_size=51), tokenizer={'kind': 'char', 'chars': LETTERS}))
    for name in list(sys.modules):
        if name.partition('.')[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    _, err = sampled('--out_dir=model.pt', '--export=there', status=2)
    assert 'pip install' in err and package in err and not Path('there').exists()
    if package != 'gguf':
        assert f'pip install {package}' in sampled(f'--out_dir={folder}', status=2)[1]
