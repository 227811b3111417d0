"""The specification: settings, hardware, data, model, checkpoints, training, sampling, exchange.

    python -m pytest                         # about a minute
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

HERE = Path(__file__).parent

@pytest.fixture(scope='session', autouse=True)
def signals_arrive():
    """Also where pytest itself runs in the background of a shell script, which ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

@pytest.fixture
def empty(tmp_path, monkeypatch):
    """The current folder; failed downloads are tried again at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, 'RETRY_WAITS', (0, 0))
    return tmp_path

def refusal(function, *arguments, **settings):
    """The one line with which the function refuses these arguments."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **settings)
    assert '\n' not in str(caught.value)
    return str(caught.value)

# ----------------------------------------------------------------------------
# settings

SETTINGS_BLOCK = '''
import os
out_dir = 'out'        # where checkpoints go
batch_size = 12        # sequences in a micro-batch
learning_rate = 1e-3   # per update
compile = False        # use torch.compile
LIMIT, here = 3, os.getcwd()
configure(__file__)
later = 1'''

@pytest.fixture
def settings(empty):
    """settings(*arguments) -> what configure makes of them and the block above."""
    Path('script.py').write_text(SETTINGS_BLOCK)
    return lambda *arguments: configurator.configure('script.py', argv=list(arguments))[0]

def test_only_lower_case_literals_before_configure_are_settings(settings):
    assert settings() == {'out_dir': 'out', 'batch_size': 12, 'learning_rate': 1e-3, 'compile': False}

def test_a_flag_wins_wherever_it_stands_and_a_later_file_may_compute(settings):
    Path('a.py').write_text('import math\n_x = 3\nbatch_size *= _x')
    Path('b.py').write_text('batch_size += 1')
    orders = [('a.py', 'b.py'), ('--batch_size=4', 'a.py'), ('a.py', '--batch_size=4')]
    assert [settings(*order)['batch_size'] for order in orders] == [37, 4, 4]

@pytest.mark.parametrize('flag, value', [
    ('--out_dir=a=b', 'a=b'), ('--learning_rate=1', 1.0), ('--compile', True), ('--compile=0', False)])
def test_a_flag_is_read_as_its_settings_type(settings, flag, value):
    read = settings(flag)[flag[2:].partition('=')[0]]
    assert read == value and type(read) is type(value)

@pytest.mark.parametrize('mistake, says', [
    ('--batchsize=3', 'did you mean batch_size'),
    ('--batch_size=1e3', 'whole number'),
    ('--learning_rate=nan', 'a number'),
    ('--out_dir', 'write --out_dir=VALUE'),
    ('nowhere.py', 'config file'),
    ('batchsize = 3', "c.py: there is no setting 'batchsize': did you mean"),
    ('batch_size = 2.0', 'c.py: batch_size must be a whole number'),
    ('\n1 / 0', 'c.py: ZeroDivisionError'),
    ('x = = 1', 'c.py: SyntaxError'),
])
def test_a_mistake_in_a_flag_or_a_config_file_is_one_line(settings, capsys, mistake, says):
    if ' = ' in mistake or '\n' in mistake:
        Path('c.py').write_text(mistake)
        mistake = 'c.py'
    with pytest.raises(SystemExit) as error:
        settings(mistake)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == '' and says in err and err.count('\n') == 1

def test_a_config_file_runs_once_and_what_it_assigns_is_given_even_if_it_equals_the_default(settings, capsys):
    Path('c.py').write_text('print("runs")\nbatch_size = 12\n_half = learning_rate / 2\nif False:\n    out_dir = "no"')
    _, given = configurator.configure('script.py', argv=['c.py', '--compile=false'])
    assert given == {'batch_size': 12, 'compile': False} and capsys.readouterr().out == 'runs\n'

def test_a_field_that_may_be_none_works_but_is_refused_as_a_setting(empty, capsys):
    @dataclasses.dataclass
    class Windowed(GPTConfig):
        window: 'int | None' = None

    assert Windowed(window=3).window == 3 and Windowed().window is None
    assert 'window is 2.5' in refusal(Windowed, window=2.5)
    with pytest.raises(SystemExit):
        configurator.configure(Windowed, argv=[])
    assert 'Windowed.window = None cannot be a setting' in capsys.readouterr().err

def test_a_log_whose_columns_change_keeps_its_rows(empty):
    run = configurator.RunFolder('out', resume=False, bytes_needed=0)
    run.log({'iter': 1, 'loss': 2.5})
    run.log({'iter': 2, 'norm': 0.5, 'loss': 2.0})
    run.keep_rows(lambda at, row: at < 3)
    rows = [{'iter': '1', 'loss': '2.5', 'norm': ''}, {'iter': '2', 'loss': '2.0', 'norm': '0.5'}]
    assert run.rows() == (['iter', 'loss', 'norm'], rows)

# ----------------------------------------------------------------------------
# hardware

@pytest.fixture
def machine(monkeypatch):
    """machine('cuda', capability=(9, 0), ...): torch finds this GPU, whatever is here."""
    def stub(gpu='', hip=None, capability=(9, 0), gfx='', archs=('compute_50',), flags='', version='2.13.0', works=True):
        facts = SimpleNamespace(gcnArchName=gfx, has_bfloat16_conversions=True)
        card = dict(get_device_properties=facts, get_device_capability=capability, get_arch_list=archs)
        accelerator = dict(current_accelerator=gpu and torch.device(gpu) or None, is_available=works, device_count=1)
        monkeypatch.setattr(torch, 'version', SimpleNamespace(hip=hip, cuda=not hip))
        monkeypatch.setattr(torch, '__version__', type(torch.__version__)(version))
        monkeypatch.setattr(hardware, 'proc', lambda path, field: flags)
        for api, answers in (torch.cuda, card), (torch.xpu, card), (torch.accelerator, accelerator):
            for query, answer in answers.items():
                monkeypatch.setattr(api, query, lambda device=None, answer=answer: answer, raising=False)
    return stub

@pytest.mark.parametrize('facts, device, dtype', [
    (dict(gpu='cuda'), 'cuda', 'bfloat16'),
    (dict(gpu='cuda', capability=(7, 5)), 'cuda', 'float16'),
    (dict(gpu='cuda', capability=(6, 1)), 'cuda', 'float32'),
    (dict(gpu='cuda', capability=(5, 0), archs=('sm_75', 'compute_90a')), 'cpu', 'float32'),
    (dict(gpu='cuda', works=False), 'cpu', 'float32'),
    (dict(gpu='cuda', hip='6.4', gfx='gfx942:'), 'cuda', 'bfloat16'),
    (dict(gpu='cuda', hip='6.4', gfx='gfx1030'), 'cuda', 'float16'),
    (dict(gpu='xpu'), 'xpu', 'bfloat16'),
    (dict(gpu='mps'), 'mps', 'float32'),
    (dict(gpu='mps', version='2.12.1'), 'cpu', 'float32'),
    (dict(), 'cpu', 'float32'),
    (dict(flags='avx2 avx512_bf16'), 'cpu', 'bfloat16'),
])
def test_auto_takes_the_best_device_and_only_a_real_dtype(machine, facts, device, dtype):
    machine(**facts)
    assert (hardware.pick_device(), hardware.pick_dtype(device)) == (device, dtype)

def test_a_compiler_that_fails_is_one_line(monkeypatch):
    def fail(function):
        raise RuntimeError('no compiler\nhere')

    monkeypatch.setattr(torch, 'compile', fail)
    assert hardware.compile_problem('cpu') == 'RuntimeError: no compiler here'

# ----------------------------------------------------------------------------
# data

WORDS = 'The quick brown fox, 12 of them, didn\'t jump over the dog.\nשלום עולם e\u0301 👩‍👩‍👧 naïve\r\n\t'
ODD = ''.join(map(chr, [*range(32), *range(127, 161)])) + '\u0301\u0627\u200d\u2028\u3000\ufeff\U0010ffff'
NASTY = f'\ufeff\x1b[2J{WORDS * 20}{ODD} <|endoftext|> 中文字' + ' ' * 30 + '\n\n' * 5 + 'end'

def prepared(text=NASTY, **settings):
    """Prepares the text -> (data set, its tokenizer, all of its ids)"""
    Path('in.txt').write_bytes(text.encode())
    data = load_dataset(prepare.prepare('in.txt', **settings))
    return data, Tokenizer(data.meta['tokenizer']), all_ids(data)

def all_ids(data):
    return np.concatenate([data.train, data.val])

def text_of(folder):
    data = load_dataset(folder)
    return Tokenizer(data.meta['tokenizer']).decode(all_ids(data))

@pytest.mark.parametrize('tokenizer', ['char', 'bpe', 'gpt2'])
def test_any_text_round_trips_exactly(empty, tokenizer):
    try:
        data, coder, ids = prepared(tokenizer=tokenizer, vocab_size=300)
    except ConnectionError as error:
        pytest.skip(str(error))
    assert coder.decode(ids) == NASTY and coder.decode(coder.encode(WORDS)) == WORDS
    assert sum(data.meta['bytes'].values()) == len(NASTY.encode()) and coder.end_of_text not in ids
    assert tokenizer != 'gpt2' or coder.encode('hello world') == [31373, 995]

def test_text_in_pieces_gives_the_same_tokens_as_in_one(empty, monkeypatch):
    monkeypatch.setattr(prepare, 'PIECE', 50)
    text = WORDS * 30 + '\n  \n\n x\x1c y\u3000 z' * 9 + ' ' + 'x' * 500
    _, coder, ids = prepared(text, tokenizer='bpe', vocab_size=400)
    assert coder.decode(ids) == text and ids.tolist()[:700] == coder.encode(text)[:700]

@pytest.mark.parametrize('tokenizer, between', [('bpe', '<|endoftext|>'), ('char', '\n')])
def test_documents_are_separated(empty, tokenizer, between):
    Path('a.txt').write_text('A quick fox')
    Path('b.txt').write_text('The dog')
    prepare.prepare(['a.txt', 'b.txt', 'a.txt'], tokenizer=tokenizer)
    assert text_of('a') == between.join(['A quick fox', 'The dog', 'A quick fox'])

def test_a_folder_is_read_without_hidden_files_data_and_runs(empty, capsys):
    read = ['sub/a.txt', 'sub/output/b.txt']
    for name in (*read, 'data/old/input.txt', 'out-2/log.csv', '.venv/x.txt', '.hidden'):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path('sub/c.txt').write_bytes(b'fine' * 99 + b'\xff')
    Path('sub/d.png').write_bytes(b'\0')
    prepare.prepare('.', name='all', tokenizer='char')
    assert text_of('all') == '\n'.join(read)
    assert '2 text files, 2 others that are left out' in capsys.readouterr().out

def test_a_url_is_read_and_kept(empty, monkeypatch):
    reply = requests.Response()
    reply.status_code, reply.raw = 200, io.BytesIO(WORDS.encode())
    monkeypatch.setattr(requests, 'get', lambda url, **options: reply)
    for tokenizer in 'char', 'bpe':
        prepare.prepare('https://a/words.txt?raw', tokenizer=tokenizer)
        assert text_of('words') == WORDS

def test_other_sources_do_not_replace_a_data_set_unasked(empty):
    prepared('ab' * 200)
    Path('other.txt').write_text('cd' * 200)
    assert '--overwrite' in refusal(prepare.prepare, 'other.txt', name='in')
    prepare.prepare('other.txt', name='in', overwrite=True)
    assert text_of('in') == 'cd' * 200

def test_an_epoch_reads_every_window_once_and_the_next_one_another_way():
    starts = prepare.window_starts(0, 2 * 9, 1000, 100, seed=1)  # 9 windows an epoch
    for epoch in (starts[:9], starts[9:]):
        assert np.array_equal(np.diff(np.sort(epoch)), [100] * 8)
        assert 0 <= epoch.min() and epoch.max() + 101 <= 1000
    assert not np.array_equal(starts[:9] - starts[:9].min(), starts[9:] - starts[9:].min())
    assert len({int(prepare.window_starts(9 * e, 9, 1000, 100, seed=1).min()) for e in range(20)}) > 10

def test_batches_are_the_windows_with_targets_one_further(empty):
    tokens = prepared(WORDS * 30)[0].train
    for i, (x, y) in enumerate(itertools.islice(prepare.batches(tokens, 6, 3, 12, 16, 1, 'cpu'), 5)):
        starts = prepare.window_starts(6 + 12 * i, 3, len(tokens), 16, 1)
        expected = np.stack([tokens[start : start + 17] for start in starts])
        assert x.dtype == torch.int64
        assert np.array_equal(x, expected[:, :-1]) and np.array_equal(y, expected[:, 1:])

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
RATES = dict(learning_rate=1e-2, beta1=0.9, beta2=0.95, muon_learning_rate=0.02, muon_momentum=0.95, weight_decay=0.1)
DEVICES = ['cpu']
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)

def tiny(device='cpu', **changes):
    """A small model whose every weight matters: noise on each module's own start."""
    torch.manual_seed(0)
    model = gpt.GPT(GPTConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model.eval().to(device)

def make_optimizer(model, kind, **changes):
    return gpt.make_optimizer(model, RATES | dict(optimizer=kind) | changes)

def ids(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))

def cached(model, x, chunks):
    """The last logits after each chunk of x (B, T), read with one cache -> (B, len(chunks), vocab_size)"""
    cache = KVCache(model.config.block_size, x.device)
    return torch.cat([model(part, cache=cache)[0] for part in x.split(chunks, dim=1)], dim=1)

def update(model, optimizer):
    x = ids(4, 17)
    loss = model(x[:, :-1], x[:, 1:], return_logits=False)[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

def plain(model, x):
    """Logits (B, T, vocab_size) of the model, in plain lines; each position sees the last block_size."""
    c, T = model.config, x.size(1)
    seen = torch.ones(T, T).tril().triu(1 - c.block_size).bool()

    def normed(x, norm):
        if not c.use_rms_norm:
            return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps=1e-6)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

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

def test_scores_depend_on_distance_alone_however_far_the_text_has_come():
    config, q, k = GPTConfig(**TINY), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = []
    for start in (1, 100, 10_000_000):
        cos, sin = gpt.rope_tables(torch.tensor([start, start + 5]), config)
        scores.append((gpt.rotate(k, cos[0], sin[0]) * gpt.rotate(q, cos[1], sin[1])).sum())
    torch.testing.assert_close(scores[1:], scores[:1] * 2)

@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@pytest.mark.parametrize('options', [
    dict(),
    dict(qk_norm=False, bias=True, use_rms_norm=False, use_swiglu=False),
    dict(gradient_checkpointing=True),
    dict(block_size=600),  # over 512 positions, a CPU's attention is another
], ids=str)
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
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=(0, 2)).min() > 0

@pytest.mark.parametrize('name, millions', [('tiny', 10), ('small', 25), ('medium', 80), ('large', 350)])
def test_presets_have_the_size_they_promise(name, millions):
    with torch.device('meta'):
        model = create_model(name)
    c = model.config
    heads = 2 * c.n_head + 2 * c.n_kv_head  # q, k, v and the projection
    per_layer = c.n_embd * heads * c.head_dim + 3 * c.n_embd * c.hidden_dim
    gains = c.n_layer * (2 * c.n_embd + 2 * c.head_dim) + c.n_embd
    assert model.n_params() == c.vocab_size * c.n_embd + c.n_layer * per_layer + gains
    assert model.n_params() == pytest.approx(millions * 1e6, rel=0.1)

@pytest.mark.parametrize('changes, says', [
    (dict(n_embd=100, n_head=12), 'n_embd 100 does not divide into n_head 12'),
    (dict(n_kv_head=3), 'n_head 4 does not divide into n_kv_head 3'),
    (dict(n_embd=32.0), 'n_embd is 32.0'),
])
def test_an_impossible_shape_is_refused_with_its_numbers(changes, says):
    assert says in refusal(GPTConfig, **{**TINY, **changes})

def test_the_loss_starts_near_log_vocab_size():
    model, x = create_model('tiny', vocab_size=500, n_layer=3), torch.randint(500, (4, 65))
    assert model(x[:, :-1], x[:, 1:])[1].item() == pytest.approx(math.log(500), abs=0.1)

def test_muon_makes_the_step_of_torch_optim_muon_on_each_part(monkeypatch):
    def inverse_root(gram):  # as torch's Muon has it; ours is checked below
        root = torch.eye(gram.size(1))
        for _ in range(5):
            p = 3.4445 * torch.eye(gram.size(1)) - 4.775 * gram + 2.0315 * gram @ gram
            root, gram = p @ root, p @ gram @ p
        return root

    monkeypatch.setattr(gpt, 'inverse_root', inverse_root)
    start = [torch.randn(64, 32), torch.randn(64, 32), torch.randn(16, 48)]
    ours = [nn.Parameter(w.clone()) for w in start]
    ours[1].parts = 4
    theirs = [nn.Parameter(w.clone()) for w in (start[0], *start[1].chunk(4), start[2])]
    optimizers = (gpt.Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn='original'))
    grads = [F.normalize(torch.randn_like(w)) for w in start]  # rows of norm 1, which ours makes of any
    for p, grad in zip(ours, grads):
        p.grad = grad * torch.rand(len(grad), 1) * 9
    for p, grad in zip(theirs, (grads[0], *grads[1].chunk(4), grads[2])):
        p.grad = grad
    for optimizer in optimizers:
        optimizer.step()
    theirs = [theirs[0], torch.cat(theirs[1:5]), theirs[5]]
    for a, b, w in zip(ours, theirs, start):  # torch's is in bfloat16: a few per cent
        assert (a - b).norm() < 0.05 * (a - w).norm()

def test_muon_makes_a_matrix_nearly_orthogonal():
    u, v = (torch.linalg.qr(torch.randn(3, n, 32))[0] for n in (32, 80))
    sizes = torch.logspace(-2, 0, 32)  # two decades of singular values
    x = (u * sizes @ v.mT) / sizes.norm()
    made = u.mT @ gpt.inverse_root(x @ x.mT) @ x @ v
    values = made.diagonal(dim1=1, dim2=2)
    assert 0.1 < values.min() and values.max() < 1.4 and 0.8 < values.mean() < 1.1
    torch.testing.assert_close(made, values.diag_embed(), atol=1e-3, rtol=0)

def test_matrices_decay_and_nothing_else_does():
    model = tiny(bias=True)
    for kind, part in ('adamw', model), ('muon', model.blocks):
        groups = make_optimizer(model, kind).param_groups
        decaying = {p for group in groups if group['weight_decay'] for p in group['params']}
        assert decaying == {p for p in part.parameters() if p.dim() == 2}

# ----------------------------------------------------------------------------
# one mathematics: the fast paths, and what a reader adds to the model

def start(*shape):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(5))

class Head(gpt.GPT):
    """A head of its own, and a soft cap, which is learned, on the logits."""
    def __init__(self, config):
        super().__init__(config)
        self.head.weight = nn.Parameter(start(config.vocab_size, config.n_embd))
        self.cap = nn.Parameter(1 + start())

    def logits(self, x):
        return self.cap * torch.tanh(self.head(x) / self.cap)

class Experts(gpt.Block):
    """Three experts in one 3-D weight, after a gain."""
    def __init__(self, config):
        super().__init__(config)
        self.experts = nn.Parameter(start(3, config.n_embd, config.n_embd))
        self.gain = nn.Parameter(start(config.n_embd))

    def forward(self, x, *others):
        return super().forward(x, *others) + torch.einsum('btc,ecd->btd', x * self.gain, self.experts)

class ReLU2(gpt.MLP):
    def project(self, x):
        return self.down(F.relu(x).square())

EXPERIMENT = dict(use_swiglu=False, experiment=True)
VARIANTS = [
    dict(), dict(n_kv_head=1), dict(n_kv_head=4), dict(use_swiglu=False), dict(use_rms_norm=False),
    dict(use_rms_norm=False, use_swiglu=False, bias=True, qk_norm=False), dict(bias=True), EXPERIMENT,
    dict(dropout=0.2), dict(gradient_checkpointing=True), dict(gradient_checkpointing=True, dropout=0.2),
]

def variant(monkeypatch, experiment=False, **options):
    """A tiny model of these options, or with what a reader might add."""
    if experiment:
        for name, changed in dict(GPT=Head, Block=Experts, MLP=ReLU2).items():
            monkeypatch.setattr(gpt, name, changed)
    return tiny(**options)

def assert_fast_paths_change_nothing(monkeypatch, compute, tolerance):
    """compute() -> tensors, the same without the fast paths and with all of them, but for rounding."""
    results = []
    monkeypatch.setattr(gpt, 'LARGE', 0)
    monkeypatch.setattr(gpt, 'MANY_LOGITS', 5000)  # slices of some hundred rows
    for fast in (False, True):
        monkeypatch.setattr(gpt, 'FAST', fast)
        torch.manual_seed(0)  # dropout draws the same numbers in the same order
        results.append(compute())
    for slow, fast in zip(*results, strict=True):
        assert slow.dtype == fast.dtype and (slow - fast).norm() <= tolerance * slow.norm()

@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_fast_paths_change_neither_logits_nor_loss_nor_gradients(monkeypatch, options, dtype, tolerance):
    model, x, targets = variant(monkeypatch, block_size=300, **options), ids(2, 300), ids(2, 300, seed=2)
    targets[0, 100:] = -1  # do not count

    def compute():
        model.compute_dtype = None
        with torch.no_grad():
            decoded = cached(model.eval(), x, [200, 1, 99])
            torch.testing.assert_close(decoded[:, -1:], model(x)[0], atol=1e-4, rtol=1e-4)
        model.train()
        model.compute_dtype = dtype
        logits = model(x, targets)[0]
        loss = model(x, targets, return_logits=False)[1]
        with torch.no_grad():
            evaluated = model(x, targets, return_logits=False)[1]
        gradients = torch.autograd.grad(2 * loss, list(model.parameters()))
        if dtype == torch.bfloat16:  # the smallest of them are mostly rounding
            gradients = [torch.cat([gradient.flatten() for gradient in gradients])]
        return decoded, logits, loss, evaluated, *gradients

    assert_fast_paths_change_nothing(monkeypatch, compute, tolerance)

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_whatever_parameter_is_added_is_trained_and_survives_a_resume(empty, monkeypatch, kind):
    variant(monkeypatch, **EXPERIMENT)  # from now on
    model = gpt.GPT(GPTConfig(**TINY, use_swiglu=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ('head.weight', 'blocks.1.experts', 'blocks.1.gain'):  # as they were initialised
        assert torch.equal(before[name], start(*before[name].shape))
    optimizer = make_optimizer(model, kind)
    update(model, optimizer)
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    save_checkpoint('c.pt', checkpoint(model, optimizer=optimizer.state_dict()))
    state = load_checkpoint('c.pt')
    resumed = load_model(state)
    resumed_optimizer = make_optimizer(resumed, kind)
    resumed_optimizer.load_state_dict(state['optimizer'])
    update(model, optimizer)
    update(resumed, resumed_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))

def test_a_parameter_in_no_group_or_in_two_is_an_error(monkeypatch):
    model = tiny()
    some = lambda model, settings: [torch.optim.SGD([model.norm.weight], lr=0.1)]
    monkeypatch.setitem(gpt.OPTIMIZERS, 'some', some)
    assert 'embedding.weight is in 0 groups' in refusal(make_optimizer, model, 'some')
    model.blocks[1].mlp.up.weight = model.blocks[0].mlp.up.weight
    with pytest.warns(UserWarning):
        assert 'mlp.up.weight is in 2 groups' in refusal(make_optimizer, model, 'muon')

def test_one_line_adds_an_optimizer(monkeypatch):
    def plain(model, settings):
        hidden, others = gpt.hidden_and_other(model)
        return [torch.optim.Muon(hidden, lr=settings['muon_learning_rate']), torch.optim.SGD(others, lr=0.1)]

    monkeypatch.setitem(gpt.OPTIMIZERS, 'plain', plain)
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    optimizer = make_optimizer(model, 'plain')
    update(model, optimizer)
    assert all((p != old).any() for p, old in zip(model.parameters(), before))
    again = make_optimizer(model, 'plain')
    again.load_state_dict(optimizer.state_dict())
    assert [group['peak_lr'] for group in again.param_groups] == [0.02, 0.1]

def test_the_model_checks_itself(monkeypatch):
    class Shifted(gpt.Block):  # mixes in the position before, which a step of the cache does not have
        def forward(self, x, *others):
            return super().forward(x + F.pad(x, (0, 0, 1, -1)), *others)

    for options in VARIANTS:
        with monkeypatch.context() as patch:
            gpt.check_model(variant(patch, **options))
    monkeypatch.setattr(gpt, 'Block', Shifted)
    assert 'sampling differs from training by' in refusal(gpt.check_model, tiny())

def test_blocks_that_run_twice_sample_as_they_train(monkeypatch):
    monkeypatch.setattr(gpt.Block, 'forward', lambda self, x, *others, once=gpt.Block.forward: once(
        self, once(self, x, *others), *others))
    gpt.check_model(tiny())

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_generating_between_updates_changes_none(kind):
    weights = []
    for generates in (False, True):
        model = tiny()
        optimizer = make_optimizer(model, kind)
        for _ in range(3):
            update(model, optimizer)
            if generates:
                model.generate(ids(1, 3), 3)
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

def test_a_scaler_skips_the_whole_step_where_a_gradient_is_infinite():
    model, x = tiny(), ids(2, 9)
    optimizer, scaler = make_optimizer(model, 'muon'), torch.amp.GradScaler('cpu')
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(x, x)[1]).backward()
    model.embedding.weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))

def test_a_loaded_optimizer_keeps_its_own_options():
    model = tiny()
    optimizer = make_optimizer(model, 'adamw', learning_rate=0.5)
    optimizer.load_state_dict(make_optimizer(model, 'adamw').state_dict())
    assert {group['peak_lr'] for group in optimizer.param_groups} == {0.5}

def test_gradient_checkpointing_keeps_less_than_half_for_backward():
    kept = []
    for on in (False, True):
        model, sizes = tiny(gradient_checkpointing=on, n_layer=4).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), sizes.append):
            model(ids(4, 16), ids(4, 16, seed=2))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]

# ----------------------------------------------------------------------------
# checkpoints

def checkpoint(model, **changes):
    fields = {name: kind() for name, kind in gpt.FIELDS.items()}
    return fields | dict(model=model.state_dict(), model_config=vars(model.config).copy()) | changes

def test_a_checkpoint_comes_back_equal_and_the_tied_weights_are_one_tensor(empty):
    model, x = tiny(), ids(2, 16)
    save_checkpoint('c.pt', checkpoint(model))
    again = load_model(load_checkpoint('c.pt')).eval()
    assert torch.equal(model(x, x)[0], again(x, x)[0]) and os.listdir() == ['c.pt']
    again.embedding.weight.data[3] += 1  # moves input and output alike
    assert torch.equal(again(x, x)[0], again.trunk(x) @ again.embedding.weight.T)

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

@contextmanager
def process(command, **options):
    """The command, running, without matplotlib; at the end it is stopped, and torchrun's workers with it."""
    Path('matplotlib.py').write_text('raise ImportError')
    environment = {**os.environ, 'PYTHONPATH': '.', 'OMP_NUM_THREADS': '1', **options.pop('env', {})}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    with subprocess.Popen(command, text=True, env=environment, **pipes) as child:
        watch = threading.Timer(300, child.terminate)  # so that no reader waits for ever
        watch.start()
        try:
            yield child
        finally:
            watch.cancel()
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=20)
            child.kill()

def call_script(name, *arguments, status=0, typed='', **modules):
    """The script (the current folder's, if it has one) in this process, which spares the imports and lets
    a test replace its parts; it must end with this status -> (stdout, stderr)"""
    path = Path(name) if Path(name).exists() else HERE / name
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (1, 2, 13, 15)}
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
                signal.signal(number, handler)
    gc.collect()  # its variables, which hold files and the lock of out_dir
    if isinstance(code, str):
        err.write(f'{code}\n')
        code = 1
    assert code == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()

def at_forward(patch, action, n=None):
    """action(x, loss) is called in the n-th forward of training (the trial makes two, each update two), or in
    each; it may return another loss."""
    forward, calls = GPT.forward, itertools.count(1)

    def changed(self, x, *arguments, **options):
        logits, loss = forward(self, x, *arguments, **options)
        if self.training and (n is None or next(calls) == n):
            new = action(x, loss)
            loss = loss if new is None else new
        return logits, loss

    patch.setattr(GPT, 'forward', changed)

@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    """A folder with a data set and finished runs: muon, adamw, and cut-..., interrupted and resumed."""
    folder = tmp_path_factory.mktemp('runs')
    last = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path('tiny.py').write_text(TINY_RUN)
        Path('plain.txt').write_text(TEXT * 200)
        call_script('prepare.py', 'plain.txt')
        for kind, number, schedule in ('muon', signal.SIGINT, 'cosine'), ('adamw', signal.SIGHUP, 'linear'):
            flags = ['tiny.py', f'--optimizer={kind}', f'--lr_schedule={schedule}']
            call_script('train.py', *flags, f'--out_dir={kind}')
            with pytest.MonkeyPatch.context() as cut:
                at_forward(cut, lambda *_: signal.raise_signal(number), n=21)  # in update 8
                out, _ = call_script('train.py', *flags, f'--out_dir=cut-{kind}', status=128 + number)
            last[kind] = out.splitlines()[-1]
            call_script('train.py', '--resume', f'--out_dir=cut-{kind}', '--eval_interval=7')
    return SimpleNamespace(folder=folder, last=last)

@pytest.fixture
def place(runs, empty):
    """The current folder: the tiny config, its data set, and the run with Muon in out/."""
    shutil.copytree(runs.folder / 'data', 'data')
    shutil.copytree(runs.folder / 'muon', 'out')
    shutil.copy(runs.folder / 'tiny.py', '.')
    return empty

def column(folder, name):
    """The numbers in a column of the run's log.csv."""
    with open(Path(folder) / 'log.csv', newline='') as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]

def update_of(path):
    return load_checkpoint(path)['iter_num']

def assert_same_run(one, other):
    """Weights, optimizer state and losses of two runs, bit for bit."""
    a, b = (load_checkpoint(f'{folder}/ckpt.pt') for folder in (one, other))
    assert a['iter_num'] == b['iter_num'] and a['model'].keys() == b['model'].keys()
    assert all(torch.equal(weight, b['model'][name]) for name, weight in a['model'].items())
    for one_part, other_part in zip(*(state['optimizer']['parts'] for state in (a, b)), strict=True):
        assert one_part['state'].keys() == other_part['state'].keys() != set()
        for p, state in one_part['state'].items():
            assert all(torch.equal(value, other_part['state'][p][name]) for name, value in state.items())
    assert sorted(set(column(one, 'iter'))) == sorted(set(column(other, 'iter')))  # evaluations have rows, too
    assert all(column(one, name) == column(other, name) for name in ('train_loss', 'lr'))

@pytest.mark.parametrize('kind, by_hand', [  # of updates 1 and 4 of the warm-up, 5, 22 and 40, the last
    ('muon', [0.2, 0.8, 1, *((1 + math.cos(math.pi * done / 36)) / 2 for done in (17, 35))]),
    ('adamw', [0.2, 0.8, 1, 19 / 20, 1 / 20]),
])
def test_the_learning_rate_follows_the_schedule(runs, kind, by_hand):
    lr = column(runs.folder / kind, 'lr')
    shares = [lr[n - 1] / 0.01 for n in (1, 4, 5, 22, 40)]
    assert shares == pytest.approx(by_hand, rel=1e-5)  # six digits are logged

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_a_run_makes_its_updates_and_keeps_the_latest_and_the_best(runs, kind):
    folder = runs.folder / kind
    latest, best = (load_checkpoint(folder / name) for name in ('ckpt.pt', 'best.pt'))
    losses = column(folder, 'train_loss')
    assert sorted(set(column(folder, 'iter'))) == list(range(1, 41)) and len(column(folder, 'val_loss')) == 14
    assert latest['iter_num'] == 40 and latest['tokens_seen'] == 40 * 128
    assert best['val_loss'] == pytest.approx(min(column(folder, 'val_loss')), abs=1e-6)
    assert 'optimizer' not in best and losses[-1] < 0.7 * losses[0]

@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_an_interrupted_and_resumed_run_equals_an_unbroken_one_bit_for_bit(runs, kind):
    assert runs.last[kind].endswith(f'update 8; to continue: python train.py --resume --out_dir=cut-{kind}')
    assert_same_run(runs.folder / kind, runs.folder / f'cut-{kind}')

def updates_lost(kills, *flags):
    """Runs until done, killed so many times at random moments -> how many updates were lost each time"""
    rng, lost, seen, checkpoint = random.Random(kills), [], 0, Path('out/ckpt.pt')
    for life in range(kills + 1):
        first = '--resume' if checkpoint.exists() else 'tiny.py'
        with process(script('train.py', first, *flags)) as child:
            lines = itertools.islice(child.stdout, rng.randint(8, 20) if life < kills else None)
            said = ''.join(lines)  # 6 or so precede update 1
            if life < kills:
                time.sleep(rng.uniform(0, 0.06))  # seconds: two or three updates, or the middle of a save
                child.kill()
            rest, err = child.communicate(timeout=60)
            assert child.returncode == (-signal.SIGKILL if life < kills else 0), err
        seen = max([seen, *map(int, re.findall(r'^ *(\d+)/', said + rest, re.M))])
        lost.append(seen - (update_of(checkpoint) if checkpoint.exists() else 0))
        print(f'kill {len(lost)} of {kills}: update {seen}, {lost[-1]} lost', flush=True)
    return lost

@pytest.mark.parametrize('kills', [2, pytest.param(int(os.getenv('KILLS', 200)), marks=pytest.mark.long)])
def test_a_killed_run_loses_at_most_one_interval_and_ends_the_same(place, kills):
    shutil.rmtree('out')
    flag = f'--max_iters={20 * kills}'
    assert max(updates_lost(kills, flag)) <= 3
    call_script('train.py', 'tiny.py', '--out_dir=unbroken', flag)
    assert_same_run('unbroken', 'out')

def test_a_second_ctrl_c_stops_at_once(place, monkeypatch):
    monkeypatch.setattr(os, '_exit', sys.exit)
    calls = itertools.count(1)
    # in both forwards of update 1, after those of the trial
    at_forward(monkeypatch, lambda *_: signal.raise_signal(signal.SIGINT) if next(calls) > 6 else None)
    call_script('train.py', 'tiny.py', status=130)
    assert not Path('out/ckpt.pt').exists()

@pytest.mark.parametrize('name', ['train.py', 'sample.py', 'prepare.py', 'bench.py'])
def test_ctrl_c_while_torch_is_imported_is_no_traceback(empty, name):
    Path('torch.py').write_text('import signal\nsignal.raise_signal(signal.SIGINT)')
    with process(script(name)) as child:
        assert child.communicate(timeout=60) == ('', '') and child.returncode == 130

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has it')
def test_a_full_stdout_ends_a_run_in_one_line(place):
    with open('/dev/full', 'w') as full, process(script('train.py', 'tiny.py'), stdout=full) as child:
        assert child.communicate(timeout=60)[1] == 'stdout: No space left on device\n' and child.returncode == 2

def test_a_second_run_in_the_same_folder_is_refused(place):
    with process(script('train.py', 'tiny.py', '--max_iters=100000')) as child:
        assert 'is in out-1 now' in next(line for line in child.stdout if line.startswith('kept'))
        err = call_script('train.py', 'tiny.py', status=2)[1]
    assert err == 'another run is using out: choose another --out_dir\n' and not Path('out-2').exists()

def test_two_runs_started_at_once_in_a_fresh_clone_share_one_preparation(place):
    shutil.rmtree('data')
    command = script('train.py', 'tiny.py', '--dataset=pydoc', '--max_iters=1')
    with process([*command, '--out_dir=a']) as one, process([*command, '--out_dir=b']) as other:
        said = [child.communicate(timeout=100)[0] for child in (one, other)]
    assert [update_of(f'{name}/ckpt.pt') for name in 'ab'] == [1, 1]
    assert ''.join(said).count('char tokenizer, vocabulary of') == 1

def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_bad(place, monkeypatch):
    at_forward(monkeypatch, lambda x, loss: loss * math.nan, n=15)  # in update 5
    err = call_script('train.py', 'tiny.py', '--log_interval=10', status=2)[1]
    assert err.startswith('update 5: loss nan') and err.count('\n') == 1 and 'lower learning rate' in err
    for saved in load_checkpoint('out/ckpt.pt'), load_checkpoint('out/best.pt'):
        assert saved['iter_num'] == 3 and all(p.isfinite().all() for p in saved['model'].values())

def test_out_of_memory_halves_the_micro_batch_and_not_the_update(place, monkeypatch):
    def limited(x, loss):
        if len(x) > 2:
            raise torch.OutOfMemoryError('simulated')

    flags = ['tiny.py', '--max_iters=6', '--dropout=0']
    call_script('train.py', *flags, '--out_dir=whole')
    at_forward(monkeypatch, limited)
    out, _ = call_script('train.py', *flags)
    assert re.search('out of memory.* 4 micro-batches of 2 sequences', out)
    # float32 sums in another order, over six updates
    assert column('out', 'train_loss') == pytest.approx(column('whole', 'train_loss'), rel=1e-4)

@pytest.mark.parametrize('owner, name, error, says', [
    (os, 'fsync', OSError(28, 'No space left on device'), 'No space left on device'),
    (torch.optim.AdamW, 'step', MemoryError(), 'out of memory'),
])
def test_without_disk_or_memory_the_last_checkpoint_stays(place, monkeypatch, owner, name, error, says):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(owner, name, fail)
    err = call_script('train.py', '--resume', '--max_iters=50', status=2)[1]
    assert says in err and err.count('\n') == 1 and update_of('out/ckpt.pt') == 40
    assert not list(Path('out').glob('*.part'))

def test_starting_over_puts_the_old_run_aside_and_nothing_else(place):
    Path('out/notes.txt').write_text('mine')
    for i in range(2):
        assert f'is in out-{i + 1} now' in call_script('train.py', 'tiny.py', '--max_iters=1')[0]
    assert [update_of(f'{name}/ckpt.pt') for name in ('out-1', 'out-2', 'out')] == [40, 1, 1]
    assert sorted(os.listdir('out-1')) == ['best.pt', 'ckpt.pt', 'log.csv'] and Path('out/notes.txt').exists()

@pytest.mark.parametrize('command, says', [
    ('train.py tiny.py --max_iters=0', 'max_iters is 0'),
    ('train.py tiny.py --device=tpu', '--device=cpu'),
    ('train.py tiny.py --dtype=float16', 'computes only in float32'),
    ('train.py tiny.py --tokens_per_update=200', '192 or 256'),
    ('train.py tiny.py --n_head=3', 'n_embd 32'),
    ('train.py tiny.py --block_size=5000', '1,160 tokens'),
    ('train.py tiny.py --dataset=nothing', 'run "python prepare.py'),
    ('train.py tiny.py --dataset=damaged', 'damaged (prepared: '),
    ('train.py --resume', 'already finished (40 of 40'),
    ('train.py --resume --n_layer=3', 'n_layer is 2'),
    ('train.py --resume --optimizer=adamw', 'another optimizer'),
    ('train.py --resume --dataset=more', 'sha256'),
    ('train.py --resume --dataset=words', 'different tokenizers'),
    ('sample.py --out_dir=tiny.py', 'not a checkpoint'),
    ('bench.py --updates=0', 'updates is 0'),
    ('sample.py --temperature=-1', 'temperature is -1'),
    ('sample.py --start=FILE:nothing', 'nothing'),
    ('prepare.py odd.txt', 'odd.txt is not UTF-8'),
    ('prepare.py tiny.py --name=../x', 'cannot name a data set'),
    ('prepare.py tiny.py --tokenizer=x', 'is not auto, char, bpe or gpt2'),
    ('prepare.py tiny.py --tokenizer=plain', 'does not know the character'),
])
def test_a_mistake_is_refused_in_one_line_before_anything_is_written(place, command, says):
    Path('odd.txt').write_bytes('text'.encode('utf-16'))
    Path('in.txt').write_text(TEXT * 300)
    for name, tokenizer in ('more', 'char'), ('words', 'bpe'), ('damaged', 'char'):
        prepare.prepare('in.txt', name=name, tokenizer=tokenizer)
    os.truncate('data/damaged/val.bin', 10)
    before = sorted(place.rglob('[!.]*'))
    _, err = call_script(*command.split(), status=2)
    assert says in err and err.count('\n') == 1 and sorted(place.rglob('[!.]*')) == before

@pytest.mark.parametrize('command, says', [
    ('train.py tiny.py --dry_run', 'nothing was written'),
    ('train.py tiny.py --init_from=out/best.pt --eval_only', 'validation loss {best:.4f}'),
    ('train.py --resume --eval_only', 'validation loss {latest:.4f}, {bits:.4f} bits per byte'),
    ('hardware.py --json', '"dtype":'),
    ('train.py --status', 'next: python sample.py --out_dir=out'),
    ('prepare.py --info=plain', 'The quick brown fox'),
])
def test_looking_writes_nothing(place, command, says):
    before = {path: path.stat().st_mtime_ns for path in place.rglob('*')}
    out, _ = call_script(*command.split())
    assert {path: path.stat().st_mtime_ns for path in place.rglob('*')} == before
    best, latest = (load_checkpoint(f'out/{name}.pt')['val_loss'] for name in ('best', 'ckpt'))
    meta = json.loads(Path('data/plain/meta.json').read_text())
    bits = latest / math.log(2) * meta['tokens']['val'] / meta['bytes']['val']
    assert says.format(best=best, latest=latest, bits=bits) in out

def test_patience_stops_a_run_that_no_longer_gets_better_and_resuming_it_too(place):
    out, _ = call_script('train.py', 'tiny.py', '--learning_rate=0', '--muon_learning_rate=0', '--patience=2')
    assert 'stopped at update 9' in out and update_of('out/ckpt.pt') == 9 and update_of('out/best.pt') == 3
    assert 'patience' in call_script('train.py', '--resume', status=2)[1]
    assert 'stopped at update 12' in call_script('train.py', '--resume', '--patience=3')[0]

def test_a_field_added_to_the_configuration_is_a_setting_everywhere(place, monkeypatch):
    for name in 'configurator', 'hardware', 'model', 'prepare', 'train':
        shutil.copy(HERE / f'{name}.py', '.')
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend('.')
    source, first = Path('model.py').read_text(), '    block_size: int'
    Path('model.py').write_text(source.replace(first, f'    soft_cap: float = 30.0  # largest\n{first}', 1))
    assert re.search(r'--soft_cap=30.0 +largest', call_script('train.py', '--help')[0])
    call_script('train.py', 'tiny.py', '--max_iters=1', '--soft_cap=20')
    assert torch.load('out/ckpt.pt')['model_config']['soft_cap'] == 20
    flags = ['--resume', '--max_iters=2']
    assert 'soft_cap is 20.0' in call_script('train.py', *flags, '--soft_cap=25', status=2)[1]
    call_script('train.py', *flags)

def test_samples_and_wandb_are_there_when_asked_for_and_change_no_update(place, runs):
    logged = []
    run = SimpleNamespace(id='a1', log=lambda row: logged.append(row['iter']) if 'lr' in row else None)
    wandb = SimpleNamespace(init=lambda **_: run)
    flags = ['tiny.py', '--max_iters=7', '--lr_decay_iters=40', '--wandb_log', '--sample_interval=1']
    plain, _ = call_script('train.py', *flags[:-1], wandb=None)
    out, _ = call_script('train.py', *flags, wandb=wandb)
    assert 'wandb failed: ' in plain and logged == list(range(1, 8)) and len(out) > len(plain) + 500
    assert column('out', 'train_loss') == column(runs.folder / 'muon', 'train_loss')[:7]

def test_without_a_network_the_run_trains_on_pydoc_and_every_record_says_so(place, monkeypatch):
    for name in 'HTTP_PROXY', 'HTTPS_PROXY', 'http_proxy', 'https_proxy', 'ALL_PROXY':
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # nobody listens there
    flags = ['tiny.py', '--dataset=shakespeare', '--max_iters=1', '--eval_interval=1']
    assert 'python prepare.py' in call_script('train.py', *flags, '--offline_dataset=', status=2)[1]
    assert update_of('out/ckpt.pt') == 40  # the old run was not put away
    out, _ = call_script('train.py', *flags, '--offline_dataset=pydoc')
    assert 'shakespeare could not be fetched' in out and 'training on pydoc instead' in out
    assert load_checkpoint('out/ckpt.pt')['config']['dataset'] == 'pydoc'

def test_the_picture_is_drawn_where_matplotlib_is_there(place):
    call_script('train.py', 'tiny.py', '--max_iters=3', matplotlib=pytest.importorskip('matplotlib'))
    assert Path('out/loss.png').read_bytes().startswith(b'\x89PNG')

def test_the_questions_end_in_a_config_file_that_runs(place):
    answers = ['tpu', 'cpu', 'nothing', 'plain', 'many', '0', '0.05', 'a run', 'n']
    out, _ = call_script('train.py', '--interactive', typed='\n'.join(answers))
    for question, times in ('device', 2), ('data set', 2), ('minutes', 3), ('name', 1), ('start it', 1):
        assert len(re.findall(fr'{question}[^\[\n]* \[', out)) == times  # a wrong answer is asked again
    out, _ = call_script('train.py', 'config/my_a_run.py', '--dry_run', '--threads=1', '--compile=false')
    assert 'plan    for 0.05 minutes' in out

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
# generation

class Recorder(TorchDispatchMode):
    """Stands in for a CUDA graph: notes the operations, and replays them on the same tensors. As on CUDA
    nothing is changed while it takes notes, and nothing may wait for a value."""
    def __init__(self):
        super().__init__()
        self.notes = []

    def register_generator_state(self, generator):
        pass

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

READING = [(dict(), chunks) for chunks in ([53], [1] * 53, [15, 1, 1, 36], [40] + [1] * 13)]
READING += [(options, [5, 1, 11, 20, 1, 15]) for options in VARIANTS[1:7]]

@torch.no_grad()
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype, error', [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize('options, chunks', READING, ids=str)
def test_cached_equals_uncached_whatever_the_chunks_and_past_the_window(monkeypatch, options, chunks, dtype,
                                                                        error, device):
    model, x, ends = tiny(**options).to(dtype), ids(3, 53), torch.tensor(chunks).cumsum(0)
    expected = plain(tiny(**options).to(dtype).float(), x)[:, ends - 1]
    model.to(device)
    for fast, rows in itertools.product((False, True), (1, 3)):
        monkeypatch.setattr(gpt, 'FAST', fast)
        gpt.fast_layout(model, by_columns=True)
        logits = cached(model, x[:rows].to(device), chunks).float().cpu()
        torch.testing.assert_close(logits, expected[:rows], atol=error, rtol=0)

@pytest.fixture(params=['plain', 'captured'])
def step(request, monkeypatch):
    """captured: the steps that CUDA would take, on the CPU."""
    side = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = dict(CUDAGraph=Recorder, graph=lambda graph, **options: graph, device=nullcontext,
                     stream=nullcontext, Stream=lambda: side, current_stream=lambda: side)
    if request.param == 'captured':
        monkeypatch.setattr(gpt, 'uses_graph', lambda device: True)
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

@pytest.mark.parametrize('T, block_size', [(1, 16), (16, 16), (40, 16), (100, 200), (190, 200)])
def test_greedy_generation_follows_the_banded_forward_at_every_length(step, T, block_size):
    model, x = tiny(block_size=block_size), ids(2, T)  # the cache grows from 128 to 200
    out = model.generate(x, 40, temperature=0)
    assert torch.equal(out[:, :T], x)
    assert torch.equal(out[:, T:], plain(model, out)[:, T - 1 : -1].argmax(dim=-1))
    assert torch.equal(out, model.generate(x, 40, temperature=0))  # the second call starts from nothing, too

def test_samples_of_one_prompt_share_its_prefill_and_still_differ(step):
    model, x = tiny(), ids(1, 9)
    many = model.generate(x, 12, num_samples=5, generator=torch.Generator().manual_seed(0))
    repeated = model.generate(x.expand(5, -1), 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(many, repeated) and len(set(map(tuple, many.tolist()))) == 5

def test_a_row_that_stopped_stays_stopped_and_the_text_ends_with_the_last(step):
    generator = torch.Generator().manual_seed(0)
    out = tiny().generate(ids(1, 3), 200, num_samples=3, stop_token=7, generator=generator)[:, 3:]
    for row in out.tolist():
        assert 7 in row and set(row[row.index(7) :]) == {7}
    assert out.size(1) == max(row.index(7) for row in out.tolist()) + 1 < 200

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('options, expected', [
    (dict(), [0.5, 0.25, 0.15, 0.1]),
    (dict(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),  # 0.5 does not reach 0.6, 0.5 + 0.25 does
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
def speaker(place, monkeypatch):
    """speaker(text, *flags): what sample.py prints for a model of single bytes that says this text."""
    data, coder, _ = prepared(TEXT * 20, tokenizer='bpe', vocab_size=257)
    save_checkpoint('bytes.pt', checkpoint(tiny(vocab_size=257), tokenizer=data.meta['tokenizer']))

    def speak(text, *flags):
        def stream(*_, num_samples, **__):
            for id in [*coder.encode(text), coder.end_of_text, *coder.encode('after its end')]:
                yield torch.full((num_samples,), id)

        monkeypatch.setattr(GPT, 'stream', stream)
        return call_script('sample.py', '--out_dir=bytes.pt', *flags)[0]
    return speak

def test_what_is_printed_ends_at_the_end_has_whole_characters_and_no_escape_codes(speaker):
    assert speaker('naïve 👩‍👩‍👧 שלום', '--start=A ') == 'A naïve 👩‍👩‍👧 שלום\n'
    assert speaker('a\x1b[2Jb\x9b\u202ec') == 'a\\x1b[2Jb\\x9b\\u202ec\n'

@pytest.mark.parametrize('stop, rest', [('ROMEO:', 'Hey!\n'), ('!', 'Hey'), ('ROMEO?', 'Hey!\nROMEO: ho')])
def test_a_text_ends_before_the_stop_string_wherever_the_tokens_cut_it(speaker, stop, rest):
    text, flag = 'Hey!\nROMEO: ho', f'--stop={stop}'
    assert speaker(text, flag) == f'{rest}\n'
    assert speaker(text, flag, '--num_samples=2') == f'{rest}\n{"-" * 40}\n' * 2

def test_sampling_needs_the_checkpoint_alone(runs, empty):
    shutil.copy(runs.folder / 'muon/best.pt', '.')
    Path('prompt.txt').write_text('The quick ' * 5)  # longer than the window
    flags = ['--out_dir=best.pt', '--start=FILE:prompt.txt', '--max_new_tokens=30', '--num_samples=2']
    out, err = call_script('sample.py', *flags, '--seed=1')
    texts = out.split('-' * 40 + '\n')
    assert len(texts) == 3 and texts[0] != texts[1]
    assert all(len(text) == 31 for text in texts[:2])  # a file is not repeated
    assert 'update ' in err and 'sees the last 16' in err

def test_the_best_checkpoint_of_a_folder_is_taken_or_else_the_latest(place):
    assert 'out/best.pt: update' in call_script('sample.py', '--max_new_tokens=1')[1]
    os.remove('out/best.pt')
    assert 'out/ckpt.pt: update' in call_script('sample.py', '--max_new_tokens=1')[1]

def test_equal_seeds_give_equal_text_and_no_seed_gives_other_text(place):
    flags = ['--max_new_tokens=40']
    texts = [call_script('sample.py', *flags, f'--seed={seed}')[0] for seed in (3, 3, 0, 0)]
    assert texts[0] == texts[1] and len(set(texts)) == 3

def test_a_talk_keeps_its_context_and_answers_mistakes(place):
    typed = '/temperature 0|/max_new_tokens 3|The quick||/top_p 7|/nonsense|é|/reset|The quick|/quit'
    out, err = call_script('sample.py', '--interactive', typed=typed.replace('|', '\n'))
    answers = [answer.rstrip('\n') for answer in out.split('\n> ')]
    straight, _ = call_script('sample.py', '--temperature=0', '--max_new_tokens=6', '--start=\nThe quick')
    assert answers[3] + answers[4] == straight.rstrip('\n').removeprefix('\nThe quick')
    assert 'not an assistant' in err and 'top_p is 7' in answers[5] and '/reset' in answers[6]
    assert "'\\xe9'" in answers[7] and answers[9] == answers[3]

def test_ctrl_c_stops_a_text_and_the_talk_goes_on(place):
    command = script('sample.py', '--interactive', '--max_new_tokens=1000000000')
    with process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdin.write('The quick\n')
        child.stdin.flush()
        assert len(child.stdout.read(50)) == 50
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate('/max_new_tokens 5\n\n/help\n/quit\n', timeout=20)
        assert child.returncode == 0 and '/max_new_tokens 5\n' in out

def test_the_benchmark_measures_what_it_says(place):
    flags = ['tiny.py', '--json', '--updates=3', '--decode_tokens=5']
    figures = json.loads(call_script('bench.py', *flags)[0])
    assert figures['parameters'] == load_model(load_checkpoint('out/best.pt')).n_params()
    assert figures['ms_per_update'].keys() == {'all', 'data', 'forward', 'backward', 'optimizer'}
    assert all(len(times) == 3 for times in figures['ms_per_update'].values())
    for name in ('tokens_per_sec', 'mfu', 'peak_memory', 'prefill_tokens_per_sec', 'decode_tokens_per_sec',
                 'bandwidth_share'):
        assert figures[name] > 0

# ----------------------------------------------------------------------------
# in and out: transformers, an independent implementation, reads what is exported and writes what comes in

LETTERS = ''.join(map(chr, range(32, 74))) + '\n\x01éß中🙂fox'  # 51 of them
CHARS = {'kind': 'char', 'chars': LETTERS}

def exported(model, *flags, tokenizer=CHARS):
    """The folder that sample.py makes of the model."""
    pytest.importorskip('gguf')
    save_checkpoint('model.pt', checkpoint(model, tokenizer=tokenizer))
    call_script('sample.py', '--out_dir=model.pt', '--export=there', *flags)
    return 'there'

def foreign(folder, family='qwen3'):
    """A random model saved by transformers in several shards, with the tokenizer of LETTERS -> the model"""
    import transformers
    sizes = dict(vocab_size=64, hidden_size=24, intermediate_size=64, num_hidden_layers=2, head_dim=8,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
                 tie_word_embeddings=True, initializer_range=0.3, eos_token_id=[7, 5])
    if family == 'llama':
        rope = {'rope_type': 'default', 'rope_theta': 2e4}
        sizes |= dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5, rope_parameters=rope)
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if 'norm' in name or 'bias' in name:
            torch.nn.init.normal_(p, mean=1.0, std=0.2)
    model.save_pretrained(folder, max_shard_size='20KB')
    prepare.export_tokenizer(CHARS).save(f'{folder}/tokenizer.json')
    return model.eval()

@torch.no_grad()
@pytest.mark.parametrize('shape', [
    dict(n_kv_head=1),
    dict(n_kv_head=4, qk_norm=False, bias=True),
    dict(n_head=3, n_kv_head=1, n_embd=42, mlp_ratio=1.3, n_layer=3),
    dict(head_dim=22, rope_theta=5e4, norm_eps=1e-5, qk_norm=False),
], ids=str)
def test_an_exported_model_says_the_same_in_transformers(empty, shape):
    from transformers import AutoModelForCausalLM
    model, x = tiny(vocab_size=51, block_size=64, **shape), ids(1, 10)
    theirs = AutoModelForCausalLM.from_pretrained(exported(model))
    torch.testing.assert_close(theirs(x).logits, model(x, x)[0], atol=1e-4, rtol=0)
    said = theirs.generate(x, max_new_tokens=50, do_sample=False)
    assert torch.equal(said, model.generate(x, 50, temperature=0))

@pytest.mark.parametrize('kind', ['char', 'bpe'])
def test_an_exported_tokenizer_is_the_same_in_transformers_and_comes_back(empty, kind):
    from transformers import AutoTokenizer
    random.seed(0)
    data, ours, _ = prepared(NASTY, tokenizer=kind, vocab_size=400)
    meta = data.meta['tokenizer']
    theirs = AutoTokenizer.from_pretrained(exported(tiny(vocab_size=ours.vocab_size), tokenizer=meta))
    back = Tokenizer(load_checkpoint('there')['tokenizer'])
    known = meta.get('chars') or [chr(c) for c in range(0xd800)]
    kinds = [ODD, ' \n\t ', [c for c in "abcXYZ012'!?,.sdmtlvre" if c in known], known]
    texts = [''.join(random.choice(random.choice(kinds)) for _ in range(40)) for _ in range(300)]
    for text in (WORDS, ODD, *texts):
        expected = ours.encode(text)
        assert theirs.encode(text) == expected == back.encode(text)
        assert theirs.decode(expected) == text == ours.decode(expected) == back.decode(expected)
        for piece in ours.decoder(), back.decoder():  # id by id, and what is left over at the end
            assert ''.join([*map(piece, expected), piece(None)]) == text
    assert theirs.eos_token_id == ours.end_of_text == back.end_of_text

@torch.no_grad()
@pytest.mark.parametrize('family', ['llama', 'qwen3'])
def test_a_foreign_model_comes_in_with_its_logits_and_goes_out_bit_for_bit(empty, family):
    from safetensors.torch import load_file
    pytest.importorskip('gguf')
    theirs, x = foreign('folder', family), ids(2, 30)
    state = load_checkpoint('folder')
    torch.testing.assert_close(load_model(state).eval()(x, x)[0], theirs(x).logits, atol=1e-4, rtol=0)
    assert state['tokenizer']['end_of_text'] == 7 and len(os.listdir('folder')) > 5
    call_script('sample.py', '--out_dir=folder', '--export=again')
    weights, again = theirs.state_dict(), load_file('again/model.safetensors')
    assert again.keys() == weights.keys() - {'lm_head.weight'}
    assert all(torch.equal(weight, weights[name]) for name, weight in again.items())

@pytest.mark.parametrize('source', ['out/best.pt', 'small'])
def test_finetuning_takes_shape_and_tokenizer_and_then_needs_the_source_no_more(place, source):
    foreign('small')
    Path('mine.txt').write_text('The lazy dog' * 200)
    call_script('prepare.py', 'mine.txt', f'--tokenizer={source}')
    flags = ['--device=cpu', '--compile=false', '--max_iters=2', '--out_dir=tuned']
    call_script('train.py', f'--init_from={source}', '--dataset=mine', *flags)
    one, other = load_checkpoint(source), load_checkpoint('tuned/ckpt.pt')
    assert one['tokenizer'] == other['tokenizer'] and one['model_config'] == other['model_config']
    shutil.rmtree(source.partition('/')[0])
    assert 'done ' in call_script('train.py', '--resume', '--max_iters=3', '--out_dir=tuned')[0]
    flags = ['--start=The', '--max_new_tokens=5', '--out_dir=tuned']
    assert call_script('sample.py', *flags)[0].startswith('The')

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

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('foreign')
    foreign(path)
    return path

@pytest.mark.parametrize('changes, says', [
    (dict(model_type='gpt2'), 'model_type'),
    (dict(tie_word_embeddings=False), 'tie_word_embeddings'),
    (dict(rope_parameters={'rope_type': 'yarn', 'factor': 2.0, 'rope_theta': 1e4}), 'rope_type'),
    (dict(rope_scaling={'type': 'linear', 'factor': 2.0}, rope_parameters=None), 'rope_type'),
    (dict(layer_types=['full_attention', 'sliding_attention']), 'layer_types'),
    (dict(intermediate_size=100), 'intermediate_size'),
    (dict(num_attention_heads=6), 'q_proj'),
])
def test_what_cannot_come_in_is_refused_by_name(folder, empty, changes, says):
    shutil.copytree(folder, empty, dirs_exist_ok=True)
    config = json.loads(Path('config.json').read_text())
    Path('config.json').write_text(json.dumps(config | changes))
    assert says in refusal(load_checkpoint, str(empty))

@pytest.mark.parametrize('option', ['use_rms_norm', 'use_swiglu', 'bias'])
def test_what_cannot_go_out_is_refused_by_name_and_nothing_is_written(empty, option):
    pytest.importorskip('gguf')
    model = tiny(vocab_size=51, **{option: option == 'bias'})
    save_checkpoint('model.pt', checkpoint(model, tokenizer=CHARS))
    _, err = call_script('sample.py', '--out_dir=model.pt', '--export=there', status=2)
    assert err.count('\n') == 1 and option in err and os.listdir() == ['model.pt']

@pytest.mark.parametrize('package, command', [
    ('datasets', 'prepare.py hf:owner/tales'),
    ('gguf', 'sample.py --export=there'),
    ('safetensors', 'sample.py --export=there'),
])
def test_a_package_that_is_missing_is_named(place, package, command):
    _, err = call_script(*command.split(), status=2, **{package: None, f'{package}.torch': None})
    assert re.search(f'pip install .*{package}', err) and not Path('there').exists()

# ----------------------------------------------------------------------------
# the README

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
    x = ids(1, 9)
    space = {'input_ids': x[:, :-1], 'targets': x[:, 1:]}
    exec(lines, space)
    assert space['output_ids'].shape == (1, 108)
