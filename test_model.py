"""The specification: settings, data, model, sampling, training, exchange, hardware, benchmark.

    python -m pytest                         # about a minute
    python -m pytest -m "not formula"        # what must hold after any sound change of the model
    KILLS=200 python -m pytest -m long -s    # kills a run at 200 random moments
"""
import csv
import dataclasses
import gc
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import configurator
import hardware
import model as gpt
import prepare
from model import GPT, GPTConfig, KVCache, create_model, load_checkpoint, load_model, sample, save_checkpoint
from prepare import Tokenizer, load_dataset
from sample import convert, convert_config, export_config, export_tokenizer, load_tokenizer

HERE = Path(__file__).parent
formula = pytest.mark.formula  # restates a formula of the model, and fails if that is changed

@pytest.fixture(scope='session', autouse=True)
def ctrl_c_arrives():
    """Ctrl-C arrives, even if pytest runs in the background of a shell script, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

@pytest.fixture
def empty(tmp_path, monkeypatch):
    """The current folder"""
    monkeypatch.chdir(tmp_path)
    return tmp_path

def refusal(function, *arguments, **settings):
    """The one line with which the function refuses these arguments."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **settings)
    assert '\n' not in str(caught.value)
    return str(caught.value)

def failing(error, *arguments):
    """A function that raises such an error, a new one each time: an old one keeps frames and open files."""
    def fail(*_, **__):
        raise error(*arguments)
    return fail

# ----------------------------------------------------------------------------
# settings

SETTINGS_BLOCK = '''
out_dir = 'out'        # where checkpoints go
dataset = ''           # folder in data/
batch_size = 12        # sequences in a micro-batch
learning_rate = 1e-3   # per update
compile = False        # use torch.compile
LIMIT, computed = 3, len('abc')
configure(__file__)
later = 1'''

@pytest.fixture
def settings(empty):
    """settings(*arguments) -> what configure makes of them and the block above."""
    Path('script.py').write_text(SETTINGS_BLOCK)
    return lambda *arguments: configurator.configure('script.py', argv=list(arguments))[0]

def test_only_lower_case_literals_before_configure_are_settings(settings):
    assert settings() == dict(out_dir='out', dataset='', batch_size=12, learning_rate=1e-3, compile=False)

def test_a_later_config_file_wins_over_an_earlier_one_and_a_flag_over_both(settings):
    Path('a.py').write_text('import math\n_x = 3\nbatch_size *= _x')
    Path('b.py').write_text('def _more():\n    return batch_size + 1\nbatch_size = _more()')
    assert settings('a.py', 'b.py')['batch_size'] == 37
    assert settings('--batch_size=4', 'a.py')['batch_size'] == 4
    assert settings('a.py', '--batch_size=4')['batch_size'] == 4

def test_a_flag_is_read_as_its_settings_type(settings, monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    read = settings('--out_dir=~/a=b', '--learning_rate=1', '--compile')
    assert read['out_dir'] == '/home/someone/a=b' and read['compile'] is True
    assert read['learning_rate'] == 1 and type(read['learning_rate']) is float
    assert settings('--compile=0')['compile'] is False

@pytest.mark.parametrize('mistake, says', [
    ('--batchsize=3', 'did you mean batch_size'),
    ('--batch_size=1e3', 'whole number'),
    ('--learning_rate=nan', 'a number'),
    ('--out_dir', 'write --out_dir=VALUE'),
    ('--gradient_accumulation_steps=40', "is nanoGPT's: set tokens_per_update to"),
    ('--dataset=shakespeare_char', "is nanoGPT's: here it is 'shakespeare'"),
    ('nowhere.py', 'config file'),
    ('batchsize = 3', "c.py: there is no setting 'batchsize': did you mean"),
    ('x = = 1', 'c.py: SyntaxError'),
])
def test_a_mistake_in_a_flag_or_a_config_file_is_one_line(settings, capsys, mistake, says):
    if ' = ' in mistake:
        Path('c.py').write_text(mistake)
        mistake = 'c.py'
    with pytest.raises(SystemExit) as error:
        settings(mistake)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == '' and says in err and err.count('\n') == 1

def test_progress_is_a_line_that_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '36')
    for terminal, shown in (False, ''), (True, '[#######             ]  37%  update\x1b[K\r'):
        monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal)
        configurator.progress('update 3', 0.37)
        assert capsys.readouterr().out == shown

# ----------------------------------------------------------------------------
# data

WORDS = 'The quick brown fox, 12 of them, didn\'t jump over the dog.\nשלום עולם e\u0301 👩‍👩‍👧 naïve\n\t'
CONTROLS = [*range(13), *range(14, 32), *range(127, 161)]  # all but \r
ODD = ''.join(map(chr, CONTROLS)) + '\u0301\u0627\u200d\u2028\u3000\ufeff\U0010ffff'
NASTY = f'\x1b[2J{WORDS * 20}{ODD} <|endoftext|> 中文字' + ' ' * 30 + '\n\n' * 5 + 'end'

def prepared(text=NASTY, **settings):
    """Prepares the text -> (data set, its tokenizer, all of its ids)"""
    Path('in.txt').write_bytes(text.encode())
    data = load_dataset(prepare.prepare('in.txt', **settings))
    return data, Tokenizer(data.meta['tokenizer']), np.concatenate([data.train, data.val])

def text_of(folder):
    data = load_dataset(folder)
    return Tokenizer(data.meta['tokenizer']).decode([*data.train, *data.val])

@pytest.mark.parametrize('kind', ['char', 'bpe', 'gpt2'])
def test_any_text_round_trips_exactly_but_for_the_line_ends_of_windows(empty, monkeypatch, kind):
    monkeypatch.setattr(prepare, 'PIECE', 150)  # the tokens are those of the text in one piece
    try:
        data, coder, ids = prepared('\ufeff' + NASTY.replace('\n', '\r\n'), tokenizer=kind, vocab_size=300)
    except ConnectionError as error:
        pytest.skip(str(error))
    assert coder.decode(ids) == NASTY and ids[:500].tolist() == coder.encode(NASTY)[:500]
    assert sum(data.meta['bytes'].values()) == len(NASTY.encode()) and coder.end_of_text not in ids
    assert kind != 'gpt2' or coder.encode('hello world') == [31373, 995]

def test_documents_are_shuffled_before_validation_and_max_mb_cut_them(empty):
    Path('texts').mkdir()
    for i in range(40):
        Path(f'texts/{i:02}.txt').write_text('ab'[i // 20] * 40_000)

    for options, letters in (dict(), {1, 2}), (dict(shuffle=False), {2}), (dict(max_mb=1), {1, 2}):
        data = load_dataset(prepare.prepare('texts', tokenizer='char', overwrite=True, **options))
        assert set(data.val.tolist()) == {0, *letters}  # 0 is the newline between documents
        assert (len(data.train) < 1_000_000) == ('max_mb' in options)

def test_a_folder_means_its_text_files_and_a_pattern_names_others_each_a_document(empty):
    for name in 'sub/a.txt', 'sub/deeper/b.txt', '.venv/x.txt', 'sub/.hidden.txt', 'sub/c.md':
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    prepare.prepare(['.', '**/*.md'], name='all', tokenizer='bpe', shuffle=False)
    assert text_of('all').split('<|endoftext|>') == ['sub/a.txt', 'sub/deeper/b.txt', 'sub/c.md']
    Path('sub/d.txt').write_bytes(b'\xff')
    assert 'sub/d.txt is not UTF-8' in refusal(prepare.prepare, 'sub')

def test_a_url_is_read_and_kept(empty, monkeypatch):
    reply = requests.Response()
    reply.status_code, reply.raw = 200, io.BytesIO(WORDS.encode())
    monkeypatch.setattr(requests, 'get', lambda url, **options: reply)
    for tokenizer in 'char', 'bpe':  # the reply can be read once
        prepare.prepare('https://a/words.txt?raw', tokenizer=tokenizer, overwrite=True)
        assert text_of('words') == WORDS

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='Windows has none')
def test_a_pipe_is_read_once(empty):
    text = 'naïve text\n' * 500
    os.mkfifo('fifo')
    threading.Thread(target=lambda: Path('fifo').write_text(text, 'utf-8'), daemon=True).start()
    assert text_of(prepare.prepare('fifo', tokenizer='bpe', vocab_size=300).name) == text

def test_json_lines_hold_a_document_in_each_row(empty):
    good = json.dumps({'text': 'a\r\nb \ud83d' * 20, 'n': 1})
    Path('chat.jsonl').write_text(f'\ufeff{good}\r\n\r\n{good}\n', 'utf-8')
    prepare.prepare('chat.jsonl', tokenizer='char')
    assert text_of('chat') == '\n'.join(['a\nb ?' * 20] * 2)
    for line, says in ('{"body": "b"}', "row 2 has no text in column 'text'"), ('{"', 'line 2 is not JSON'):
        Path('bad.jsonl').write_text(f'{good}\n{line}\n')
        assert says in refusal(prepare.prepare, 'bad.jsonl')

def test_rows_of_a_public_data_set_are_documents_and_null_is_no_text(empty, monkeypatch):
    def load(name, configuration, split, streaming):
        assert (name, configuration, split, streaming) == ('owner/tales', 'de', 'test', True)
        return ({'body': text} for text in ('first row', None, 'second\r\nrow', '', 'third row'))

    monkeypatch.setitem(sys.modules, 'datasets', SimpleNamespace(load_dataset=load))
    prepare.prepare('hf:owner/tales/de@test:body', name='tales', tokenizer='char', shuffle=False)
    assert text_of('tales') == 'first row\nsecond\nrow\nthird row'

def test_a_data_set_is_replaced_only_on_request_and_not_by_one_that_fails(empty):
    prepared('ab' * 200, tokenizer='char')
    Path('other.txt').write_text('cd' * 200)
    assert '--overwrite' in refusal(prepare.prepare, 'other.txt', name='in')
    assert 'tokenizer=char' in refusal(prepare.prepare, 'in.txt', tokenizer='bpe')
    assert 'too little text' in refusal(prepare.prepare, 'in.txt', val_fraction=1e-9, overwrite=True)
    assert text_of('in') == 'ab' * 200
    prepare.prepare('other.txt', name='in', overwrite=True)
    assert text_of('in') == 'cd' * 200

def test_letter_tables_predict_as_the_formula_of_witten_and_bell_says():
    # one of the 8 letters is a c, and 4 are different; what follows b, and ab, is a c and a d
    bits = prepare.ngram_bits(train=b'abcabdab', val=b'c')
    single = (1 + 4 / 256) / (8 + 4)
    double = (1 + 2 * single) / (2 + 2)
    triple = (1 + 2 * double) / (2 + 2)
    assert bits == pytest.approx({'1': -math.log2(single), '3': -math.log2(triple)})

def test_an_epoch_reads_every_window_once_and_the_next_one_another_way():
    tokens = np.arange(1000, dtype='<u2')  # 9 windows of 100 and what follows them, at any offset
    batches = prepare.batches(tokens, first_row=0, rows=9, stride=9, block_size=100, seed=1, device='cpu')
    (x, y), (later, _) = itertools.islice(batches, 2)
    assert x.dtype == torch.int64 and torch.equal(y, x + 1)
    for starts in x[:, 0], later[:, 0]:
        assert starts.sort().values.diff().tolist() == [100] * 8
    assert not torch.equal(x - x.min(), later - later.min())

@pytest.mark.parametrize('n', [401, 400, 17, 5])
def test_validation_predicts_every_token_after_the_first_once(n):
    tokens = np.arange(n, dtype='<u2')
    pairs = list(prepare.val_batches(tokens, block_size=16, rows=4))
    assert torch.cat([y[y >= 0] for x, y in pairs]).tolist() == list(range(1, n))
    assert all(torch.equal(y[y >= 0], x[y >= 0] + 1) for x, y in pairs)
    assert len(list(prepare.val_batches(tokens, 16, 4, max_batches=2))) <= 2

# ----------------------------------------------------------------------------
# model

TINY = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)

def tiny(**changes):
    """A small model whose every weight matters: noise on each module's own start."""
    torch.manual_seed(0)
    model = gpt.GPT(GPTConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model.eval()

def make_optimizer(model, kind):
    settings = dict(optimizer=kind, learning_rate=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.1)
    return gpt.make_optimizer(model, settings | dict(muon_learning_rate=0.02, muon_momentum=0.95))

def ids(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))

def assert_same(one, other):
    """Equal but for rounding: float32 sums in another order; 1e-3: what is exactly 0 is rounding alone."""
    assert one.dtype == other.dtype and (one - other).norm() <= 5e-4 * (other.norm() + 1e-3)

def plain(model, x):
    """Logits (B, T, vocab_size) with attention in plain lines; each position sees the last block_size."""
    c, T = model.config, x.size(1)
    seen = torch.ones(T, T).tril().triu(1 - c.block_size).bool()

    def turned(x):  # (B, T, heads, head_dim), as complex numbers whose parts are the two halves
        half = x.size(-1) // 2
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((z.real, z.imag), dim=-1)

    h = model.embedding.weight[x]
    for block in model.blocks:
        heads = block.attention.qkv(block.attention_norm(h))
        heads = heads.unflatten(-1, (-1, c.head_dim))  # (B, T, all heads, head_dim)
        q, k, v = heads.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
        if c.qk_norm:
            q, k = block.attention.q_norm(q), block.attention.k_norm(k)
        q, k = turned(q), turned(k)
        y = []
        for head in range(c.n_head):
            shared = head // (c.n_head // c.n_kv_head)
            scores = q[:, :, head] @ k[:, :, shared].mT / c.head_dim**0.5  # (B, T, T)
            y.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, :, shared])
        h = h + block.attention.proj(torch.cat(y, dim=-1))
        h = h + block.mlp(block.mlp_norm(h))
    return model.norm(h) @ model.head.weight.T

@formula
@pytest.mark.parametrize('options', [
    dict(n_kv_head=1),
    dict(n_kv_head=4, qk_norm=False, bias=True, use_rms_norm=False, use_swiglu=False),
    dict(block_size=600),  # over 512 positions, a CPU's attention is another
], ids=str)
def test_logits_and_loss_equal_those_of_plain_lines(options):
    model = tiny(**options)
    x, targets = ids(2, model.config.block_size), ids(2, model.config.block_size, seed=2)
    targets[:, 12:15] = -1  # do not count
    logits, loss = model(x, targets)
    expected = plain(model, x)
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)  # float32 sums of 32 to 600 terms
    torch.testing.assert_close(loss, F.cross_entropy(expected.mT, targets, ignore_index=-1))

@formula
def test_presets_have_the_size_they_promise():
    for name, millions in dict(tiny=10, small=25, medium=80, large=350).items():
        with torch.device('meta'):
            assert create_model(name).n_params() == pytest.approx(millions * 1e6, rel=0.1)

@formula
def test_the_loss_starts_near_log_vocab_size():
    model, x = create_model('tiny', vocab_size=500, n_layer=3), torch.randint(500, (4, 65))
    loss = model(x[:, :-1], x[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(500) + 0.5, abs=0.2)  # the logits' variance of 1 costs a half

@formula
def test_muon_moves_each_part_nearly_orthogonally_and_about_as_torch_optim_muon_does():
    start = torch.randn(64, 32)
    grad = F.normalize(torch.randn(64, 32))  # rows of norm 1, which ours makes of any
    ours, theirs = nn.Parameter(start.clone()), [nn.Parameter(part.clone()) for part in start.chunk(4)]
    ours.parts, ours.grad = 4, grad * torch.rand(64, 1) * 9
    for p, part in zip(theirs, grad.chunk(4)):
        p.grad = part
    gpt.MuonAdamW([dict(params=[ours], lr=0.02, momentum=0.95, weight_decay=0.1)]).step()
    torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn='original').step()
    step, expected = ours - start, torch.cat(theirs) - start
    assert (step - expected).norm() < 0.5 * expected.norm()  # each is nearly orthogonal in its own way
    moved = (start * (1 - 0.02 * 0.1) - ours) / 0.02
    values = torch.linalg.svdvals(moved.view(4, 16, 32))
    assert 0.1 < values.min() and values.max() < 1.4 and 0.8 < values.mean() < 1.1

def test_groups_with_betas_take_the_steps_of_torch_optim_adamw():
    start, options = torch.randn(5, 7), dict(lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = gpt.MuonAdamW([dict(params=[ours], **options)]), torch.optim.AdamW([theirs], **options)
    for step in range(3):
        ours.grad, theirs.grad = (torch.full_like(start, step - 0.5) for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)

def checkpoint(model, **changes):
    fields = {name: kind() for name, kind in gpt.FIELDS.items()}
    return fields | dict(model=model.state_dict(), model_config=vars(model.config).copy()) | changes

class Hostile:
    def __reduce__(self):
        return Path.touch, (Path('hostile_code_has_run'),)

@pytest.mark.parametrize('changes, share', [
    (dict(), 0.5),
    (dict(model=Hostile()), 1.0),
    (dict(model_config={**TINY, 'n_embd': 64}), 1.0),
], ids=['half', 'hostile', 'of another shape'])
def test_a_spoilt_checkpoint_is_refused_in_one_line_and_runs_nothing(empty, changes, share):
    torch.save({**checkpoint(tiny()), **changes}, 'c.pt')
    os.truncate('c.pt', int(share * os.path.getsize('c.pt')))
    refusal(lambda: load_model(load_checkpoint('c.pt')))
    assert not Path('hostile_code_has_run').exists()

# ----------------------------------------------------------------------------
# one mathematics: the fast paths, and what a reader adds to the model

variants = pytest.mark.parametrize('options', [
    dict(), dict(n_kv_head=1), dict(n_kv_head=4, bias=True), dict(gradient_checkpointing=True, dropout=0.2),
    dict(use_rms_norm=False, use_swiglu=False, bias=True, qk_norm=False)], ids=str)

devices = pytest.mark.parametrize('device', ['cpu', *(['cuda'] if torch.cuda.is_available() else [])])

@devices
@variants
def test_fast_paths_change_neither_logits_nor_loss_nor_gradients(monkeypatch, options, device):
    model = tiny(block_size=300, **options).train().to(device)
    gpt.check_model(model)
    x, targets = ids(2, 300).to(device), ids(2, 300, seed=2).to(device)
    targets[0, 100:] = -1  # do not count
    monkeypatch.setattr(gpt, 'LARGE', 0)
    monkeypatch.setattr(gpt, 'MANY_LOGITS', 5000)  # slices of some hundred rows

    def compute(fast):
        monkeypatch.setattr(gpt, 'FAST', fast)
        torch.manual_seed(0)  # dropout draws the same numbers in the same order
        logits, loss = model(x, targets)
        torch.manual_seed(0)
        sliced = model(x, targets, return_logits=False)[1]
        assert_same(sliced, loss)
        return logits, loss, *torch.autograd.grad(sliced, list(model.parameters()))

    for fast, slow in zip(compute(True), compute(False), strict=True):
        assert_same(fast, slow)

@torch.no_grad()
@devices
@variants
def test_cached_equals_uncached_whatever_the_chunks(monkeypatch, options, device):
    model = tiny(block_size=300, **options).to(device)
    x, chunks = ids(3, 300).to(device), [5, 1, 1, 93, 60, 1, 1, 1, 136, 1]
    for fast, rows in itertools.product((False, True), (1, 3)):
        monkeypatch.setattr(gpt, 'FAST', fast)
        expected = model(x[:rows], x[:rows])[0][:, torch.tensor(chunks).cumsum(0) - 1]
        cache = KVCache(300, device)
        cached = torch.cat([model(part, cache=cache)[0] for part in x[:rows].split(chunks, dim=1)], dim=1)
        assert_same(cached, expected)

@pytest.mark.parametrize('change, says', [
    (lambda x: x + F.pad(x, (0, 0, 1, -1)), 'sampling differs'),  # a step of the cache has no position before
    (lambda x: x * (1 + torch.is_grad_enabled()), 'evaluation differs'),
    (lambda x: x * (1 + gpt.FAST), 'fast paths differs'),
])
def test_a_change_that_is_not_true_everywhere_is_found(monkeypatch, change, says):
    forward = gpt.Block.forward
    changed = lambda self, x, *others, **options: forward(self, change(x), *others, **options)
    monkeypatch.setattr(gpt.Block, 'forward', changed)
    assert says in refusal(gpt.check_model, tiny())

def test_blocks_that_run_twice_sample_as_they_train():
    model = tiny()
    model.blocks = nn.ModuleList([*model.blocks, *model.blocks])
    gpt.check_model(model)

def test_state_of_another_parameter_is_refused():
    optimizers = [gpt.MuonAdamW([dict(params=[nn.Parameter(torch.ones(shape)) for shape in shapes], lr=0.1,
                                      betas=(0.9, 0.9))]) for shapes in (((2, 3), (4,)), ((4,), (2, 3)))]
    for p in optimizers[0].param_groups[0]['params']:
        p.grad = torch.ones_like(p)
    optimizers[0].step()
    assert 'does not fit' in refusal(gpt.load_optimizer, optimizers[1], optimizers[0].state_dict())

class Added(gpt.Block):
    """What a reader might add: three experts in one weight of three dimensions, and one gain for all."""
    def __init__(self, config, *others, **options):
        super().__init__(config, *others, **options)
        self.experts = nn.Parameter(torch.full((3, config.n_embd, config.n_embd), 0.01))
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, *others, **options):
        more = torch.einsum('btc,ecd->btd', x * self.gain, self.experts)
        return super().forward(x + more, *others, **options)

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_an_added_parameter_starts_as_initialised_and_is_trained_and_saved(empty, monkeypatch, kind):
    monkeypatch.setattr(gpt, 'Block', Added)
    model = GPT(GPTConfig(**TINY))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert before['blocks.1.gain'] == 1 and before['blocks.1.experts'].unique() == 0.01
    optimizer = make_optimizer(model, kind)
    for _ in range(3):  # behind a matrix of zeros the first has no gradient
        model(ids(4, 16), ids(4, 16, seed=2), return_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    save_checkpoint('c.pt', checkpoint(model))
    loaded = load_model(load_checkpoint('c.pt'))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))

def test_a_parameter_in_no_group_or_in_two_is_an_error(monkeypatch):
    model = tiny()
    some = lambda model, settings: torch.optim.SGD(model.blocks.parameters(), lr=0.1)
    groups = [dict(params=part.parameters()) for part in (model.blocks, model)]
    twice = lambda model, settings: torch.optim.SGD(groups, lr=0.1)
    monkeypatch.setattr(gpt, 'OPTIMIZERS', dict(some=some, twice=twice))
    assert 'embedding.weight is in no group' in refusal(make_optimizer, model, 'some')
    assert 'more than one parameter group' in refusal(make_optimizer, model, 'twice')

# ----------------------------------------------------------------------------
# CUDA graphs and compiled graphs, on the CPU

class Recorder(TorchDispatchMode):
    """Stands in for a CUDA graph: notes the operations, and replays them on the same tensors. As on CUDA
    nothing is changed while it takes notes, no random number is used up, and nothing may wait for a value."""
    def register_generator_state(self, generator):
        pass

    def __enter__(self):
        self.notes, self.random_state = [], torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_rng_state(self.random_state)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        kwargs = kwargs or {}
        if not function._schema.is_mutable:
            result = function(*args, **kwargs)
        else:
            result = args[0] if function._schema.returns else None
        self.notes.append((function, args, kwargs, result))
        return result

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, result in self.notes:
                for kept, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                    # neither a view nor in place
                    if torch.is_tensor(new) and new.data_ptr() != kept.data_ptr():
                        kept.copy_(new)

@pytest.fixture
def graphs_on_cpu(monkeypatch):
    monkeypatch.setattr(gpt, 'uses_graph', lambda device: True)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Recorder)
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph, **options: graph)
    monkeypatch.setattr(torch.cuda, 'device', nullcontext)

def test_texts_that_are_replayed_equal_real_ones(graphs_on_cpu, monkeypatch):
    model, x, texts = tiny(), ids(2, 9), []
    for graphs in (True, False):
        monkeypatch.setattr(gpt, 'uses_graph', lambda device: graphs)
        options = dict(top_k=5, repetition_penalty=1.3, generator=torch.Generator().manual_seed(0))
        texts.append(model.generate(x, 40, **options))  # past the window of 16
    assert torch.equal(*texts)

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_updates_that_are_replayed_equal_real_ones_bit_for_bit(graphs_on_cpu, monkeypatch, kind):
    def ten_updates():
        torch.manual_seed(0)
        model = GPT(GPTConfig(**TINY, dropout=0.2))
        optimizer, losses = make_optimizer(model, kind), []
        update = gpt.make_update(model, optimizer, n_micro=2)
        for step in range(10):
            gpt.scale_learning_rates(optimizer, 1 / (1 + step))
            torch.manual_seed(step)
            batch = ids(8, 17, seed=step)
            losses.append(torch.stack(update(batch[:, :-1], batch[:, 1:])))
        return [*losses, *model.parameters()]

    replayed = ten_updates()
    monkeypatch.setattr(gpt, 'captured', lambda function, *options: function)
    assert all(torch.equal(a, b) for a, b in zip(replayed, ten_updates(), strict=True))

@pytest.mark.parametrize('options', [dict(dropout=0.1), dict(gradient_checkpointing=True)], ids=str)
def test_a_run_compiles_one_graph_without_a_break(monkeypatch, options):
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(gpt, 'MANY_LOGITS', 100)  # slices, if it were not compiled
    model = tiny(**options).train()
    compiled, optimizer = torch.compile(model, backend='eager'), make_optimizer(model, 'muon')
    for _ in range(3):
        compiled(ids(4, 16), ids(4, 16), return_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()(ids(4, 16), ids(4, 16), return_logits=False)
        model.generate(ids(1, 3), 3)
        model.train()
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']

# ----------------------------------------------------------------------------
# the scripts, called as they are used, and two finished runs

TEXT = 'The quick brown fox, 12 of them, jumps over the lazy dog.\n'
TINY_RUN = """# 40 updates of two micro-batches; every third is an evaluation and a save
dataset, device, dtype, compile, threads = 'plain', 'cpu', 'float32', 'false', 1
n_layer, n_head, n_kv_head, n_embd, block_size, dropout = 2, 2, 1, 32, 64, 0.1
batch_size, tokens_per_update, max_iters, warmup_iters, cooldown = 2, 256, 40, 4, 0.5
log_interval, eval_interval, eval_iters = 1, 3, 2
"""

def script(name, *arguments):
    return [sys.executable, str(HERE / name), *map(str, arguments)]

@contextmanager
def process(command, **options):
    """The command, running, without matplotlib; at the end it is stopped, and torchrun's workers with it."""
    Path('matplotlib.py').write_text('raise ImportError')
    environment = {**os.environ, 'PYTHONPATH': '.', 'OMP_NUM_THREADS': '1', **options.pop('env', {})}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    with subprocess.Popen(command, text=True, env=environment, **pipes) as child:
        try:
            yield child
        finally:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=20)
            child.kill()

def call_script(name, *arguments, status=0, typed='', **modules):
    """Run a script in this process, quick and open to patches, to this status -> (stdout, stderr)"""
    path = Path(name) if Path(name).exists() else HERE / name
    out, err, code, generate = io.StringIO(), io.StringIO(), 0, GPT.generate
    handlers = {number: signal.getsignal(number) for number in (1, 2, 10, 13, 15)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, 'argv', [name, *map(str, arguments)])
        patch.setattr(sys, 'stdin', io.StringIO(typed))
        patch.setattr(gc, 'freeze', lambda: None)
        # a run's sample at the end is short, and its picture is not drawn: both are slow
        patch.setattr(GPT, 'generate', lambda self, ids, n, **options: generate(self, ids, 5, **options))
        for module, stand_in in {'matplotlib': None, **modules}.items():
            patch.setitem(sys.modules, module, stand_in)
        try:
            runpy.run_path(str(path), run_name='__main__')
        except SystemExit as error:
            code = error.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    gc.collect()  # its variables, which hold files and the lock of out_dir
    gc.freeze()  # what is left need not be looked through again
    assert code == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()

def at_forward(patch, action, n=range(1, 10**6)):
    """Call action(x, loss), which may return a loss, in these forwards (6 of the trial, then 2 an update)."""
    forward, calls = GPT.forward, itertools.count(1)

    def changed(self, x, *arguments, **options):
        logits, loss = forward(self, x, *arguments, **options)
        if self.training and next(calls) in n:
            new = action(x, loss)
            loss = loss if new is None else new
        return logits, loss

    patch.setattr(GPT, 'forward', changed)

@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    """A folder with a data set and finished runs: muon, adamw, and cut-..., interrupted and resumed."""
    folder = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path('tiny.py').write_text(TINY_RUN)
        Path('plain.txt').write_text(TEXT * 200)
        call_script('prepare.py', 'plain.txt')
        for kind, number, schedule in ('muon', signal.SIGINT, 'cosine'), ('adamw', signal.SIGUSR1, 'linear'):
            flags = ['tiny.py', f'--optimizer={kind}', f'--lr_schedule={schedule}']
            call_script('train.py', *flags, f'--out_dir={kind}')
            with pytest.MonkeyPatch.context() as cut:
                at_forward(cut, lambda *_: signal.raise_signal(number), n=[21])  # in update 8
                out, _ = call_script('train.py', *flags, f'--out_dir=cut-{kind}', status=128 + number)
            assert out.endswith(f'update 8; to continue: python train.py --resume --out_dir=cut-{kind}\n')
            call_script('train.py', '--resume', f'--out_dir=cut-{kind}', '--eval_interval=7')
    return folder

@pytest.fixture
def place(runs, empty):
    """The current folder: the tiny config, its data set, and the run with Muon in out/."""
    shutil.copytree(runs / 'data', 'data')
    shutil.copytree(runs / 'muon', 'out')
    shutil.copy(runs / 'tiny.py', '.')
    return empty

def column(folder, name):
    """The numbers in a column of the run's log.csv."""
    with open(Path(folder) / 'log.csv', newline='') as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]

def update_of(path):
    return load_checkpoint(path)['iter_num']

# ----------------------------------------------------------------------------
# sampling

@pytest.mark.parametrize('T, block_size', [
    (1, 64), (100, 200),
    *(pytest.param(T, 16, marks=formula) for T in (15, 16, 40)),  # past the window
])
def test_greedy_generation_takes_the_likeliest_token_at_every_length(T, block_size):
    model, x = tiny(block_size=block_size), ids(2, T)
    out = model.generate(x, 40, temperature=0)
    assert torch.equal(out[:, :T], x)
    expected = model(out, out)[0] if block_size >= T + 40 else plain(model, out)
    assert torch.equal(out[:, T:], expected[:, T - 1 : -1].argmax(dim=-1))
    texts = model.generate([x[1].tolist(), [3]], 40, temperature=0)  # prompts of any length
    assert torch.equal(texts[0], out[1]) and len(texts[1]) == 41

@pytest.mark.parametrize('options, expected', [
    (dict(), [0.5, 0.25, 0.15, 0.1]),
    (dict(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),  # 0.5 does not reach 0.6, 0.5 + 0.25 does
    (dict(temperature=0.5), [n / 0.345 for n in (0.25, 0.0625, 0.0225, 0.01)]),  # squares, renormalised
    (dict(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),  # of the top_k's 0.9: 0.75 / 0.9 reaches 0.8
    (dict(min_p=0.29), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),  # 0.15 is 0.3 times 0.5, 0.1 is 0.2 times
])
def test_draws_follow_the_distribution_computed_by_hand(options, expected):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(20000, 1)
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    share = torch.bincount(drawn, minlength=4) / 20000
    assert (share - torch.tensor(expected)).abs().max() < 0.015  # four standard errors
    assert all(share[i] == 0 for i, p in enumerate(expected) if p == 0)

def test_a_repetition_penalty_makes_seen_ids_less_likely():
    seen = torch.tensor([[True, False]])
    for logits in torch.tensor([[2.0, 1.9]]), torch.tensor([[-1.0, -1.1]]):
        assert sample(logits, temperature=0, repetition_penalty=1.01, seen=seen).item() == 0
        assert sample(logits, temperature=0, repetition_penalty=1.2, seen=seen).item() == 1

@formula
def test_sampling_needs_the_checkpoint_alone_and_goes_on_past_the_window(runs, empty):
    shutil.copy(runs / 'muon/best.pt', '.')
    Path('prompt.txt').write_text('The quick ' * 7)
    flags = ['--out_dir=best.pt', '--start=FILE:prompt.txt', '--max_new_tokens=70', '--num_samples=2']
    out, err = call_script('sample.py', *flags)
    texts = out.split('-' * 40 + '\n')
    assert len(set(texts)) == 3 and 'sees the last 64' in err
    assert all(len(text) == 71 for text in texts[:2])  # a file is not repeated

def test_equal_seeds_give_equal_text_and_no_seed_gives_other_text(place):
    texts = [call_script('sample.py', '--max_new_tokens=40', f'--seed={seed}')[0] for seed in (3, 3, 0, 0)]
    assert texts[0] == texts[1] and len(set(texts)) == 3

@pytest.mark.parametrize('text, stop, printed', [
    ('naïve 👩‍👩‍👧 שלום', '', 'naïve 👩‍👩‍👧 שלום'),
    ('a\x1b[2Jb\x9b\u202ec', '', 'a\\x1b[2Jb\\x9b\\u202ec'),
    ('Hey!\nROMEO: ho', r'\nROMEO:', 'Hey!'),
    ('Hey!\nROMEO: ho', 'ROMEO?', 'Hey!\nROMEO: ho'),
])
def test_a_text_ends_at_its_end_or_at_stop_without_escape_codes(empty, monkeypatch, text, stop, printed):
    single_bytes = prepare.bpe_meta('bpe', [bytes([b]) for b in range(256)])
    coder = Tokenizer(single_bytes)

    def stream(*_, num_samples, **__):
        for id in [*coder.encode(text), coder.end_of_text, *coder.encode('after its end')]:
            yield torch.full((num_samples,), id)

    monkeypatch.setattr(GPT, 'stream', stream)
    save_checkpoint('bytes.pt', checkpoint(tiny(vocab_size=257), tokenizer=single_bytes))
    flags = ['--out_dir=bytes.pt', f'--stop={stop}']
    assert call_script('sample.py', *flags, r'--start=\tA ')[0] == f'\tA {printed}\n'
    assert call_script('sample.py', *flags, '--num_samples=2')[0] == f'{printed}\n{"-" * 40}\n' * 2

def test_unknown_characters_are_left_out_and_named_unless_nothing_is_left(place):
    out, err = call_script('sample.py', '--start=Theü\u4e2d\x1b', '--max_new_tokens=1')
    assert re.fullmatch('The.\n', out, re.DOTALL) and 'does not know it: \\x1b ü 中' in err
    assert 'does not know ü' in call_script('sample.py', '--start=ü', status=2)[1]

def test_a_talk_keeps_its_context_and_answers_mistakes(place):
    typed = '/temperature 0|/max_new_tokens 3|The quick||/top_p 7|/nonsense|é|/reset|The quick|/quit'
    out, err = call_script('sample.py', '--interactive', typed=typed.replace('|', '\n'))
    answers = [answer.rstrip('\n') for answer in out.split('\n> ')]
    straight, _ = call_script('sample.py', '--temperature=0', '--max_new_tokens=6', '--start=\nThe quick')
    assert answers[3] + answers[4] == straight.rstrip('\n').removeprefix('\nThe quick')
    assert 'not an assistant' in err and 'top_p is 7' in answers[5] and '/reset forgets' in answers[6]
    assert 'does not know é' in answers[7] and answers[9] == answers[3]

def test_ctrl_c_stops_a_text_and_the_talk_goes_on(place, monkeypatch):
    def stream(*_, **__):
        yield torch.tensor([3])
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(GPT, 'stream', stream)
    assert '/reset forgets' in call_script('sample.py', '--interactive', typed='The quick\n/help\n/quit\n')[0]

# ----------------------------------------------------------------------------
# training

@formula
@pytest.mark.parametrize('kind, by_hand', [  # of updates 1 and 4 of the warm-up, 5, 22 and 40, the last
    ('muon', [0.2, 0.8, 1, *((1 + math.cos(math.pi * done / 36)) / 2 for done in (17, 35))]),
    ('adamw', [0.2, 0.8, 1, 19 / 20, 1 / 20]),
])
def test_the_learning_rate_follows_the_schedule(runs, kind, by_hand):
    lr = column(runs / kind, 'lr')
    shares = [lr[n - 1] / 0.01 for n in (1, 4, 5, 22, 40)]
    assert shares == pytest.approx(by_hand, rel=1e-5)  # six digits are logged

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_a_run_makes_its_updates_and_keeps_the_latest_and_the_best(runs, kind):
    folder = runs / kind
    latest, best = (load_checkpoint(folder / name) for name in ('ckpt.pt', 'best.pt'))
    losses = column(folder, 'train_loss')
    assert sorted(set(column(folder, 'iter'))) == list(range(1, 41)) and len(column(folder, 'val_loss')) == 14
    assert latest['iter_num'] == 40 and latest['tokens_seen'] == 40 * 256
    assert best['val_loss'] == pytest.approx(min(column(folder, 'val_loss')), abs=1e-6)
    assert 'optimizer' not in best and losses[-1] < 0.95 * losses[0]

def assert_same_run(one, other):
    """Weights, optimizer state and losses of two runs, bit for bit."""
    saved = [load_checkpoint(f'{folder}/ckpt.pt') for folder in (one, other)]
    leaves = [tree_leaves([state[name] for name in ('iter_num', 'model', 'optimizer')]) for state in saved]
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*leaves, strict=True))
    assert set(column(one, 'iter')) == set(column(other, 'iter'))  # evaluations have rows, too
    assert all(column(one, name) == column(other, name) for name in ('train_loss', 'lr'))
    assert column(other, 'elapsed_s') == sorted(column(other, 'elapsed_s'))

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_an_interrupted_and_resumed_run_equals_an_unbroken_one_bit_for_bit(runs, kind):
    assert_same_run(runs / kind, runs / f'cut-{kind}')

@pytest.mark.parametrize('kills', [1, pytest.param(int(os.getenv('KILLS', 200)), marks=pytest.mark.long)])
def test_a_killed_run_loses_at_most_one_interval_and_ends_the_same(place, kills):
    shutil.move('out', 'unbroken')
    rng, flag, checkpoint = random.Random(kills), f'--max_iters={40 * kills}', Path('out/ckpt.pt')
    for _ in range(kills):
        with process(script('train.py', '--resume' if checkpoint.exists() else 'tiny.py', flag)) as child:
            said = ''.join(itertools.islice(child.stdout, rng.randint(12, 24)))  # 6 or so precede update 1
            time.sleep(rng.uniform(0, 0.06))  # seconds: two or three updates, or the middle of a save
            child.kill()
            said += child.stdout.read()
        assert int(re.findall(r'^ *(\d+)/', said, re.M)[-1]) - update_of(checkpoint) <= 3
    call_script('train.py', '--resume', flag)
    if kills > 1:
        call_script('train.py', 'tiny.py', '--out_dir=unbroken', flag)
    assert_same_run('unbroken', 'out')

def test_a_failed_evaluation_costs_no_update_and_is_made_first_on_resume(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, 'val_batches', failing(OSError, 'simulated'))
        call_script('train.py', 'tiny.py', status=2)
    assert update_of('out/ckpt.pt') == 3 and not Path('out/best.pt').exists()
    out, _ = call_script('train.py', '--resume', '--max_iters=4')
    assert out.index('start ') < out.index('        validation ') < out.index('4/4 ')

def test_a_second_run_in_the_same_folder_is_refused(place):
    with filelock.FileLock('out/.lock'):
        _, err = call_script('train.py', 'tiny.py', status=2)
    assert err == 'another run is using out: choose another --out_dir\n'

def test_starting_over_puts_the_old_run_aside_and_nothing_else(place):
    Path('out/notes.txt').write_text('mine')
    for i in range(2):
        assert f'is in out-{i + 1} now' in call_script('train.py', 'tiny.py', '--max_iters=1')[0]
    assert [update_of(f'{name}/ckpt.pt') for name in ('out-1', 'out-2', 'out')] == [40, 1, 1]
    assert sorted(os.listdir('out-1')) == ['best.pt', 'ckpt.pt', 'log.csv'] and Path('out/notes.txt').exists()

def test_a_float32_run_resumes_in_float16_with_its_scaler(place, monkeypatch):
    monkeypatch.setattr(hardware, 'dtypes', lambda device: ['float32', 'float16'])
    monkeypatch.setattr(hardware, 'peak_flops', lambda device, dtype: (1e12, 'not measured, which is slow'))
    call_script('train.py', '--resume', '--max_iters=41', '--dtype=float16')
    assert load_checkpoint('out/ckpt.pt')['scaler']['scale'] > 1

def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_bad(place, monkeypatch):
    at_forward(monkeypatch, lambda x, loss: loss * math.nan, n=[15])  # in update 5
    err = call_script('train.py', 'tiny.py', '--log_interval=10', status=2)[1]
    assert err.startswith('update 5: loss nan') and err.count('\n') == 1 and 'lower learning rate' in err
    for saved in load_checkpoint('out/ckpt.pt'), load_checkpoint('out/best.pt'):
        assert saved['iter_num'] == 3 and all(p.isfinite().all() for p in saved['model'].values())

def test_out_of_memory_halves_the_micro_batch_and_not_the_update(place, monkeypatch):
    def limited(x, loss):
        if len(x) > 1:
            raise torch.OutOfMemoryError('simulated')

    flags = ['tiny.py', '--max_iters=6', '--dropout=0']
    call_script('train.py', *flags, '--out_dir=whole')
    at_forward(monkeypatch, limited)
    out, _ = call_script('train.py', *flags)
    assert re.search('out of memory.* 4 micro-batches of 1 sequences', out)
    # a second loss may depend on the micro-batch; other tokens would change it by a tenth
    assert column('out', 'train_loss') == pytest.approx(column('whole', 'train_loss'), rel=0.01)

def test_on_a_full_disk_the_last_checkpoint_stays(place, monkeypatch):
    monkeypatch.setattr(os, 'fsync', failing(OSError, 28, 'No space left on device'))
    err = call_script('train.py', '--resume', '--max_iters=50', status=2)[1]
    assert 'No space left on device' in err and 'holds the last update saved' in err and err.count('\n') == 1
    assert update_of('out/ckpt.pt') == 40 and not list(Path('out').glob('*.part'))

@pytest.mark.parametrize('command, says', [
    ('train.py tiny.py --max_iters=0', 'max_iters is 0'),
    ('train.py tiny.py --device=tpu', '--device=cpu'),
    ('train.py tiny.py --tokens_per_update=200', '128 or 256'),
    ('train.py tiny.py --n_head=3', 'n_embd 32 is not divisible by n_head 3'),
    ('train.py tiny.py --block_size=5000', '1,160 tokens'),
    ('train.py tiny.py --dataset=damaged', 'damaged (prepared: '),
    ('train.py --resume', 'already finished (40 of 40'),
    ('train.py --resume --n_layer=3', 'n_layer is 2'),
    ('train.py --resume --optimizer=adamw', 'another optimizer'),
    ('train.py --resume --dataset=more', 'sha256'),
    ('sample.py --out_dir=tiny.py', 'not a checkpoint'),
    ('prepare.py tiny.py --name=../x', 'cannot name a data set'),
    ('prepare.py tiny.py --tokenizer=plain', 'does not know the character'),
    ('prepare.py a\x1b[31m\u202ez', 'a\\x1b[31m\\u202ez is not a file'),
    ('sample.py --to_hf=there', 'pip install gguf'),
    ('sample.py --from_hf=Smol-135M', 'run "hf download OWNER/Smol-135M --local-dir Smol-135M" first'),
    ('sample.py --out_dir=HF/Smol-135M', '"python sample.py --from_hf=FOLDER" makes out-FOLDER/best.pt'),
    ('train.py --resume --minutes=9', '--minutes is for new models'),
    ('train.py tiny.py --n_embd=1048576', 'use a smaller model'),
    ('train.py --init_from=out --model_preset=tiny', '--model_preset is for new models'),
    ('train.py tiny.py --eval_only', '--eval_only needs --resume or --init_from'),
])
def test_a_mistake_is_refused_in_one_line_before_anything_is_written(place, command, says):
    Path('in.txt').write_text(TEXT * 300)
    for name in 'more', 'damaged':
        prepare.prepare('in.txt', name=name)
    os.truncate('data/damaged/val.bin', 10)
    before = sorted(place.rglob('[!.]*'))
    _, err = call_script(*command.split(), status=2, gguf=None)
    assert says in err and err.count('\n') == 1 and sorted(place.rglob('[!.]*')) == before

@pytest.mark.parametrize('command, says', [
    ('train.py tiny.py --dry_run', 'nothing was written'),
    ('train.py --resume --eval_only', 'validation loss {loss:.4f}, {bits:.4f} bits per byte'),
    ('prepare.py', 'data/plain: '),
])
def test_looking_writes_nothing(place, command, says):
    before = {path: path.stat().st_mtime_ns for path in place.rglob('*')}
    out, _ = call_script(*command.split())
    assert {path: path.stat().st_mtime_ns for path in place.rglob('*')} == before
    loss = load_checkpoint('out/ckpt.pt')['val_loss']
    meta = json.loads(Path('data/plain/meta.json').read_text())
    bits = loss / math.log(2) * meta['tokens']['val'] / meta['bytes']['val']
    assert says.format(loss=loss, bits=bits) in out

def test_a_config_file_runs_once_and_halves_a_rate_once(place):
    Path('half.py').write_text('print("read")\nlearning_rate = learning_rate / 2\nmax_iters = 2')
    for flags in ['--minutes=0.05'], ['--resume', '--max_iters=3']:
        out, _ = call_script('train.py', 'tiny.py', 'half.py', *flags)
        assert out.count('read\n') == 1 and load_checkpoint('out')['config']['learning_rate'] == 0.005

def test_a_preset_gives_way_to_what_is_given_even_if_that_equals_a_default(place):
    flags = ['--device=cpu', '--compile=false', '--dataset=plain', '--batch_size=1', '--dry_run']
    same = [f'--{name}={getattr(GPTConfig, name)}' for name in ('n_layer', 'block_size')]
    out, _ = call_script('train.py', '--model_preset=small', *flags, *same, '--n_head=4', '--n_embd=32')
    assert ' 6 layers, 32 wide, 4 query heads, 4 for keys and values, context 256' in out

def test_a_run_ends_with_a_sample_what_its_loss_means_and_what_would_help(place):
    out, _ = call_script('train.py', 'tiny.py', '--max_iters=3', '--out_dir=new')
    sample, means, better = re.search(
        r'sample  at update 3:\n((?:    .*\n)+)means   (.*)\n.*\nbetter  (.*)\nnext ', out).groups()
    bits = load_checkpoint('new/ckpt.pt')['val_bits_per_byte']
    pattern = rf'{bits:.2f} bits per byte .* byte frequencies takes 4\.\d\d, .* two bytes before it \d\.\d\d'
    assert re.fullmatch(pattern, means)
    assert better == 'python train.py tiny.py --out_dir=new --max_iters=6' and len(sample) > 5

def test_state_of_other_groups_of_parameters_is_not_resumed(place, monkeypatch):
    whole = lambda model, settings: torch.optim.AdamW(model.parameters())
    monkeypatch.setitem(gpt.OPTIMIZERS, 'muon', whole)
    assert 'parameter group' in call_script('train.py', '--resume', '--max_iters=50', status=2)[1]

def test_patience_stops_a_run_that_no_longer_gets_better_and_resuming_it_too(place):
    out, _ = call_script('train.py', 'tiny.py', '--learning_rate=0', '--muon_learning_rate=0', '--patience=2')
    assert 'stopped at update 9' in out and update_of('out/ckpt.pt') == 9 and update_of('out/best.pt') == 3
    assert 'patience' in call_script('train.py', '--resume', status=2)[1]

def test_a_field_added_to_the_configuration_is_a_setting_everywhere(place, monkeypatch):
    for name in 'configurator', 'hardware', 'model', 'prepare', 'train':
        shutil.copy(HERE / f'{name}.py', '.')
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend('.')
    source, first = Path('model.py').read_text(), '    block_size: int'
    Path('model.py').write_text(source.replace(first, f'    window: float = 30.0  # widest\n{first}', 1))
    assert re.search(r'--window=30.0 +widest', call_script('train.py', '--help')[0])
    call_script('train.py', 'tiny.py', '--max_iters=1', '--window=20')
    assert torch.load('out/ckpt.pt')['model_config']['window'] == 20
    assert 'window is 20.0' in call_script('train.py', '--resume', '--window=25', status=2)[1]
    call_script('train.py', '--resume', '--max_iters=2')

def test_without_a_network_the_run_trains_on_pydoc_and_every_record_says_so(place, monkeypatch):
    for name in 'HTTP_PROXY', 'HTTPS_PROXY', 'http_proxy', 'https_proxy', 'ALL_PROXY':
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # nobody listens there
    flags = ['tiny.py', '--dataset=shakespeare', '--max_iters=1', '--eval_interval=1']
    assert 'put the text at data/' in call_script('train.py', *flags, '--offline_dataset=', status=2)[1]
    assert update_of('out/ckpt.pt') == 40  # the old run was not put away
    out, _ = call_script('train.py', *flags, '--offline_dataset=pydoc')
    assert 'shakespeare could not be fetched' in out and 'training on pydoc instead' in out
    assert load_checkpoint('out/ckpt.pt')['config']['dataset'] == 'pydoc'

def test_the_picture_is_drawn_where_matplotlib_is_there(place):
    call_script('train.py', 'tiny.py', '--max_iters=3', matplotlib=pytest.importorskip('matplotlib'))
    assert Path('out/loss.png').read_bytes().startswith(b'\x89PNG')

def test_the_status_lists_every_run_below_and_resumes_the_unfinished_one(place):
    save_checkpoint('deeper/cut/ckpt.pt', load_checkpoint('out/ckpt.pt') | dict(iter_num=8))
    Path('damaged').mkdir()
    Path('damaged/ckpt.pt').touch()
    out, _ = call_script('train.py', '--status')
    assert 'run in out: plain, update 40 of 40, last validation loss ' in out
    assert 'run in deeper/cut: plain, update 8 of 40' in out and 'reading damaged/ckpt.pt failed' in out
    assert out.endswith('next: python train.py --resume --out_dir=deeper/cut\n')

def test_the_questions_end_in_a_config_file_that_runs(place, monkeypatch):
    monkeypatch.setattr(hardware, 'devices', lambda: (['cpu'], ''))  # else there is a question about them
    Path('config').mkdir()
    Path('config/plain.py').touch()
    answers = ['nowhere.txt', 'plain', '-1', '0.05', 'huge', 'auto', 'plain', 'my book', 'no']
    out, _ = call_script('train.py', '--interactive', typed='\n'.join(answers))
    assert 'a text (plain, ' in out and 'start it now, yes or no [yes]' in out
    assert 'nowhere.txt is not' in out and 'is -1.0' in out and "'huge'" in out and 'config/plain.py exists' in out
    path = 'config/my_book.py'
    assert Path(path).read_text().splitlines()[1:] == [
        "dataset = 'plain'", 'minutes = 0.05', "out_dir = 'out-my_book'"]
    assert 'plan    for 0.05 minutes' in call_script('train.py', path, '--dry_run')[0]

def test_two_processes_killed_restarted_and_ended_make_the_updates_of_one(place):
    Path('tiny.py').write_text(TINY_RUN + 'import os\nprint("rank", os.environ.get("RANK"), os.getpid())')
    flags, said = ['tiny.py', '--dropout=0', '--decay_lr=false', '--batch_size=1', '--max_iters=4000'], ''
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command = [*torchrun, '--max_restarts=1', *script('train.py', *flags, '--out_dir=2', '--resume')[1:]]
    options = dict(stderr=open('err', 'w'), env={'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})
    with process(command, **options) as torchrun:
        while not Path('2/ckpt.pt').exists():
            said += next(torchrun.stdout)
        os.kill(int(re.search(r'rank 1 (\d+)', said)[1]), signal.SIGKILL)
        while '/4000 ' not in said.partition('start   from')[2]:
            said += next(torchrun.stdout)
        torchrun.terminate()
        said += torchrun.stdout.read()
    for text in 'start   guessing', 'start   from', 'saved   ':  # by rank 0 alone
        assert said.count(text) == 1, said
    last = f'--max_iters={update_of("2/ckpt.pt") + 3}'
    call_script('train.py', *flags, last, '--out_dir=1')
    call_script('train.py', '--resume', last, '--out_dir=2')
    for name, rel in ('iter', 0), ('train_loss', 1e-3), ('grad_norm', 1e-2):  # float32 sums in another order
        assert column('2', name) == pytest.approx(column('1', name), rel=rel)

# ----------------------------------------------------------------------------
# exchange: transformers and gguf read what is exported and write what is converted

LETTERS = ''.join(map(chr, range(32, 74))) + '\n\x01éß中🙂fox'  # 51 of them
CHARS = {'kind': 'char', 'chars': LETTERS}

def exported(model, *flags, tokenizer=CHARS):
    """The folder that sample.py makes of the model."""
    save_checkpoint('model.pt', checkpoint(model, tokenizer=tokenizer))
    call_script('sample.py', '--out_dir=model.pt', '--to_hf=there', *flags)
    return 'there'

def converted(folder):
    """The checkpoint that sample.py makes of a Hugging Face folder."""
    convert(Path(folder))
    return load_checkpoint(f'out-{folder}')

def foreign(folder, family='qwen3'):
    """A random model saved by transformers in several shards, with the tokenizer of LETTERS -> the model"""
    import transformers
    sizes = dict(vocab_size=64, hidden_size=24, intermediate_size=64, num_hidden_layers=2, head_dim=8,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
                 tie_word_embeddings=True, initializer_range=0.3, bos_token_id=3, eos_token_id=[7, 5])
    if family == 'llama':
        rope = {'rope_type': 'default', 'rope_theta': 2e4}
        sizes |= dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5, rope_parameters=rope)
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if 'norm' in name or 'bias' in name:
            torch.nn.init.normal_(p, mean=1.0, std=0.2)
    model.save_pretrained(folder, max_shard_size='20KB')
    export_tokenizer(CHARS).save(f'{folder}/tokenizer.json')
    return model.eval()

@formula
@torch.no_grad()
@pytest.mark.parametrize('shape', [
    dict(n_head=3, n_kv_head=1, n_embd=42, mlp_ratio=1.3, n_layer=3),
    dict(head_dim=22, rope_theta=5e4, norm_eps=1e-5, qk_norm=False, bias=True)], ids=str)
def test_an_exported_model_says_the_same_in_transformers(empty, shape):
    from transformers import AutoModelForCausalLM
    model, x = tiny(vocab_size=51, block_size=64, **shape), ids(1, 10)
    theirs = AutoModelForCausalLM.from_pretrained(exported(model))
    torch.testing.assert_close(theirs(x).logits, model(x, x)[0], atol=1e-4, rtol=0)
    said = theirs.generate(x, max_new_tokens=50, do_sample=False)
    assert torch.equal(said, model.generate(x, 50, temperature=0))

@formula
@torch.no_grad()
@pytest.mark.parametrize('family', ['llama', 'qwen3'])
def test_a_foreign_model_comes_in_with_its_logits_and_goes_out_bit_for_bit(empty, family):
    from safetensors.torch import load_file
    theirs, x = foreign('small', family), ids(2, 30)
    state = converted('small')
    torch.testing.assert_close(load_model(state).eval()(x, x)[0], theirs(x).logits, atol=1e-4, rtol=0)
    call_script('sample.py', '--out_dir=out-small', '--to_hf=again')
    weights, again = theirs.state_dict(), load_file('again/model.safetensors')
    assert again.keys() == weights.keys() - {'lm_head.weight'}
    assert all(torch.equal(weight, weights[name]) for name, weight in again.items())
    assert converted('again')['tokenizer'] == state['tokenizer']

@formula
@pytest.mark.parametrize('kind', ['char', 'bpe'])
def test_an_exported_tokenizer_is_the_same_in_transformers_and_comes_back(empty, kind):
    from transformers import AutoTokenizer
    random.seed(0)
    data, ours, _ = prepared(NASTY, tokenizer=kind, vocab_size=400)
    meta = data.meta['tokenizer']
    theirs = AutoTokenizer.from_pretrained(exported(tiny(vocab_size=ours.vocab_size), tokenizer=meta))
    back = Tokenizer(converted('there')['tokenizer'])
    known = meta.get('chars') or [chr(c) for c in range(0xd800)]
    texts = [''.join(random.choices(known, k=40)) for _ in range(200)]
    for text in (WORDS, ODD, *texts):
        expected = ours.encode(text)
        assert theirs.encode(text) == expected == back.encode(text)
        assert theirs.decode(expected) == text == ''.join(back.decode_stream(expected))
    assert theirs.eos_token_id == ours.end_of_text == back.end_of_text

@formula
@pytest.mark.parametrize('qk_norm, dtype', [(True, 'float32'), (False, 'bfloat16')])
def test_the_file_for_llama_cpp_holds_the_model_and_spells_every_character(empty, qk_norm, dtype):
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

@formula
def test_the_commands_that_a_conversion_prints_finetune_the_model(empty):
    foreign('small')
    Path('my.txt').write_text('The lazy dog' * 200)
    out, _ = call_script('sample.py', '--from_hf=small')
    assert 'out-small exists' in call_script('sample.py', '--from_hf=small', status=2)[1]
    sampling, preparing, training = re.findall(r'python (.*)', out)
    assert call_script(*sampling.split(), '--max_new_tokens=5', '--start=The')[0].startswith('The')
    call_script(*preparing.split())
    flags = ['--device=cpu', '--compile=false', '--max_iters=2', '--out_dir=tuned']
    call_script(*training.replace('config/', f'{HERE}/config/').split(), *flags)
    assert update_of('tuned') == 2

def test_what_cannot_be_exported_is_refused_by_name():
    soft_cap = ('soft_cap', float, dataclasses.field(default=30.0))
    Changed = dataclasses.make_dataclass('Changed', [soft_cap], bases=(GPTConfig,))
    assert export_config(Changed()) == export_config(GPTConfig())
    for option, value in dict(use_rms_norm=False, use_swiglu=False, bias=True, soft_cap=1.0).items():
        assert option in refusal(export_config, Changed(**{option: value}))

def test_a_shape_that_does_not_exist_here_is_refused_by_name():
    theirs = export_config(GPTConfig())
    assert convert_config(theirs) == GPTConfig(mlp_ratio=1024 / 384)
    layers, rope = ['full_attention', 'sliding_attention'], {'rope_type': 'linear', 'factor': 2.0}
    for name, value in dict(model_type='gpt2', tie_word_embeddings=False, intermediate_size=100,
                            layer_types=layers, rope_parameters=rope).items():
        assert name.removesuffix('_parameters') in refusal(convert_config, theirs | {name: value})

def test_a_tokenizer_that_changes_text_is_refused_with_the_reason():
    contents = json.loads(export_tokenizer(CHARS).to_str())
    contents['model']['byte_fallback'] = True  # SentencePiece
    assert 'byte_fallback' in refusal(load_tokenizer, json.dumps(contents))

# ----------------------------------------------------------------------------
# hardware

@pytest.fixture
def machine(monkeypatch):
    """machine('cuda', capability=(9, 0), ...): torch finds this GPU, whatever is here."""
    def stub(gpu='', hip=None, capability=(9, 0), gfx='', archs=(), flags='', version='2.13.0', works=True):
        facts = SimpleNamespace(gcnArchName=gfx, has_bfloat16_conversions=True, major=capability[0])
        card = dict(get_device_properties=facts, get_device_capability=capability, get_arch_list=archs)
        there = torch.device(gpu) if gpu else None
        accelerator = dict(current_accelerator=there, is_available=works, device_count=1)
        monkeypatch.setattr(torch, 'version', SimpleNamespace(hip=hip, cuda=not hip))
        monkeypatch.setattr(torch, '__version__', type(torch.__version__)(version))
        monkeypatch.setattr(hardware, 'open', lambda path, encoding: io.StringIO(flags), raising=False)
        for api, answers in (torch.cuda, card), (torch.xpu, card), (torch.accelerator, accelerator):
            for query, answer in answers.items():
                monkeypatch.setattr(api, query, lambda device=None, answer=answer: answer, raising=False)
    return stub

@pytest.mark.parametrize('facts, device, dtype', [
    (dict(gpu='cuda'), 'cuda', 'bfloat16'),
    (dict(gpu='cuda', capability=(7, 5)), 'cuda', 'float16'),
    (dict(gpu='cuda', capability=(6, 1)), 'cuda', 'float32'),
    (dict(gpu='cuda', works=False), 'cpu', 'float32'),
    (dict(gpu='cuda', hip='6.4', gfx='gfx942:'), 'cuda', 'bfloat16'),
    (dict(gpu='cuda', hip='6.4', gfx='gfx1030'), 'cuda', 'float16'),
    (dict(gpu='xpu'), 'xpu', 'bfloat16'),
    (dict(gpu='mps', version='2.13.0a0+git12345'), 'mps', 'float32'),
    (dict(gpu='mps', version='2.12.1'), 'cpu', 'float32'),
    (dict(), 'cpu', 'float32'),
    (dict(flags='avx2 avx512_bf16'), 'cpu', 'bfloat16'),
])
def test_auto_takes_the_best_device_and_only_a_real_dtype(machine, facts, device, dtype):
    machine(**facts)
    assert (hardware.pick_device(), hardware.pick_dtype(device)) == (device, dtype)

@pytest.mark.parametrize('capability, device', [((6, 1), 'cpu'), ((7, 5), 'cuda'), ((12, 1), 'cuda')])
def test_a_card_older_than_what_this_pytorch_is_built_for_is_not_used(machine, capability, device):
    machine(gpu='cuda', capability=capability, archs=['sm_75', 'sm_120', 'compute_120'])
    assert hardware.pick_device() == device
    if device == 'cpu':
        assert 'sm_75, sm_120' in refusal(hardware.pick_device, 'cuda') and 'sm_75' in hardware.table()

@pytest.mark.parametrize('facts, says', [
    (dict(gpu='cuda'), 'use --device=cuda:0 or --device=cpu'), (dict(), 'use --device=cpu .*pytorch.org')])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(machine, facts, says):
    machine(**facts)
    assert re.search(f'no device cuda:3 here: {says}', refusal(hardware.pick_device, 'cuda:3'))

@pytest.mark.parametrize('quota, limit, cores, gib', [('150000', 4 * 2**30, 2, 4), ('max', 'max', 4, 8)])
def test_memory_and_cores_are_at_most_those_of_the_container(monkeypatch, quota, limit, cores, gib):
    files = {'cpu.max': f'{quota} 100000\n', 'memory.max': f'{limit}\n'}
    read = lambda path, encoding: io.StringIO(files[path.removeprefix('/sys/fs/cgroup/')])
    monkeypatch.setattr(hardware, 'open', read, raising=False)
    sizes = {'SC_PAGE_SIZE': 2**12, 'SC_PHYS_PAGES': 2**21}
    monkeypatch.setattr(os, 'sysconf', sizes.__getitem__, raising=False)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 1, 2, 5}, raising=False)
    assert (hardware.cores(), hardware.memory('cpu')) == (cores, gib * 2**30)

@pytest.mark.parametrize('version, too_old', [('2.9.0a0+145a3a7bda.nv25.10', False), ('2.8.1', True)])
def test_only_the_release_number_of_pytorch_counts(machine, version, too_old):
    machine(version=version)
    assert bool(hardware.version_problem()) == too_old

def test_a_compiler_that_fails_is_one_line(monkeypatch):
    monkeypatch.setattr(torch, 'compile', failing(RuntimeError, 'no compiler\nhere'))
    assert hardware.compile_problem('cpu') == 'RuntimeError: no compiler here'

@pytest.mark.parametrize('wish, minutes, seconds, problem, says', [
    ('auto', 60, 0.5, '', ''),
    ('auto', 10, 0.5, '', 'would save less'),
    ('auto', 60, 0.98, '', '98% of the time of others'),
    ('auto', 60, 0.5, 'no compiler', 'no compiler'),
    ('true', 0, 1.5, '', ''),
    ('true', 0, 0.5, 'no compiler', 'no compiler'),
])
def test_updates_are_compiled_if_that_works_and_pays(monkeypatch, wish, minutes, seconds, problem, says):
    def try_updates(start, make_update, sequences, batch_size, n_micro, device, compiled, *limits):
        return SimpleNamespace(batch_size=8, n_micro=1, compiled=compiled, not_compiled='',
                               seconds=seconds if compiled else 1.0)

    monkeypatch.setattr(hardware, 'try_updates', try_updates)
    monkeypatch.setattr(hardware, 'compile_problem', lambda device: problem)
    config = dict(device='cpu', compile=wish, batch_size=8, dtype='float32', gradient_checkpointing=False)
    trial = hardware.fit(None, None, None, config, 1, lambda seconds: 60 * minutes * seconds, rounds=3)
    assert trial.compiled == (not says) and says in trial.not_compiled

def test_a_plan_follows_the_shape_that_is_given(monkeypatch):
    monkeypatch.setattr(hardware, 'measure_flops', lambda device, dtype: 1e11)
    config = dict(device='cpu', dtype='float32', minutes=5)
    def shape(**given):
        planned = hardware.plan(config, given, 10**6, 65)
        return [planned['n_head'], planned['n_kv_head']]

    assert [shape(n_embd=512), shape(n_embd=192, n_head=6), shape(n_layer=1), shape(n_layer=40)] == [
        [8, 4], [6, 3], [4, 2], [2, 1]]

@pytest.mark.parametrize('seconds, n_train, n_val, given, evaluations, eval_iters', [
    (1000, 10**9, 10**6, {}, 8, 25),
    (100, 10**9, 10**6, {}, 8, 6),
    (50, 10**9, 10**6, {}, 5, 5),
    (5, 10**9, 10**6, {}, 1, 5),
    (50, 10**9, 8000, {}, 8, 5),  # validation has only two batches
    (1000, 50 * 4096, 10**6, {}, 3, 5),  # six passes over the text take 32 seconds
    (100, 10**9, 10**6, dict(eval_iters=20), 2, 20),
    (100, 10**9, 40000, dict(eval_iters=0), 5, 0),  # all ten batches
])
def test_a_planned_run_evaluates_up_to_eight_times_in_5_percent_of_its_time(
        seconds, n_train, n_val, given, evaluations, eval_iters):
    trial = SimpleNamespace(batch_size=16, seconds=0.1, seconds_per_evaluated_token=0.1 / 4096)
    config = dict(block_size=256, tokens_per_update=4096)
    length = hardware.plan_length(seconds, trial, config, given, n_train, n_val)
    batches = evaluations * min(eval_iters or 10, -(-n_val // 4096))
    max_iters = min(6 * n_train // 4096, int((seconds - 1 - 0.1 * batches) / 0.107))
    assert length == dict(
        max_iters=max_iters, eval_interval=math.ceil(max_iters / evaluations), eval_iters=eval_iters)

# ----------------------------------------------------------------------------
# the benchmark, and the README

def test_the_benchmark_measures_what_it_says(place):
    figures = json.loads(call_script('bench.py', 'tiny.py', '--json', '--updates=3', '--decode_tokens=5')[0])
    assert figures['parameters'] == load_model(load_checkpoint('out/best.pt')).n_params()
    assert figures['ms_per_update'].keys() == {'all', 'data', 'forward', 'backward', 'optimizer'}
    assert {len(times) for times in figures['ms_per_update'].values()} == {3}
    for name in ('tokens_per_sec', 'mfu', 'peak_memory', 'prefill_tokens_per_sec', 'decode_tokens_per_sec'):
        assert figures[name] > 0

README = (HERE / 'README.md').read_text('utf-8')

def test_every_flag_and_file_that_the_readme_names_is_there(empty):
    for name in 'train.py', 'sample.py', 'prepare.py', 'bench.py', 'hardware.py':
        known = re.findall(r'--(\w+)=', call_script(name, '--help')[0])
        typed = re.findall(rf'{name}((?: +[^\s#`]+)*)', README)
        assert set(re.findall(r'--(\w+)', ' '.join(typed))) <= {*known, 'help'}
    for path in re.findall(r'(?:assets|config)/\w+\.\w+', README):
        assert (HERE / path).exists()

def test_the_python_lines_of_the_readme_run_as_they_stand(place):
    lines = textwrap.dedent(README[README.index('    import torch\n') :].partition('\n\nSettings')[0])
    space = {}
    exec(lines, space)
    assert space['output_ids'].shape == (1, 104) and space['logits'].shape == (1, 3, 33)
