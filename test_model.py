"""The specification: settings, hardware, data, model, training, sampling. Run it with: python -m pytest"""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model as gpt
from model import GPT, GPTConfig, KVCache, create_model, load_checkpoint, load_model, presets, sample, save_checkpoint

HERE = Path(__file__).parent
TINY = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
DEVICES = ['cpu'] + [name for name, there in (('cuda', torch.cuda.is_available()), ('xpu', torch.xpu.is_available()), ('mps', torch.backends.mps.is_available())) if there]


def tiny(seed=0, device='cpu', **changes):
    """A small model whose every weight matters (the output projections are zero at the start of training)."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**TINY, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.eval().to(device)


def ids(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def all_logits(model, x):
    return model(x, x)[0]


# ----------------------------------------------------------------------------
# model


@pytest.mark.parametrize('device', DEVICES)
def test_a_future_token_cannot_change_an_earlier_logit(device):
    model, x = tiny(device=device), ids(2, 16).to(device)
    changed = x.clone()
    changed[:, 10] = (x[:, 10] + 1) % 50
    before, after = all_logits(model, x), all_logits(model, changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@pytest.mark.parametrize('options', [{}, dict(qk_norm=False, bias=True, use_rms_norm=False, use_swiglu=False)])
def test_the_whole_model_equals_itself_written_out_in_plain_lines(n_kv_head, options):
    model, x = tiny(n_kv_head=n_kv_head, **options), ids(2, 16)
    c = model.config

    def normed(x):
        if c.use_rms_norm:
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    def turned(x):  # (B, T, heads, head_dim), as complex numbers whose parts are the two halves
        half = x.size(-1) // 2
        angle = torch.arange(x.size(1))[:, None] * 10000.0 ** (-torch.arange(half) / half)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((z.real, z.imag), dim=-1)

    h = model.embedding.weight[x]
    for block in model.blocks:
        a = block.attention
        heads = a.qkv(normed(h)).view(2, 16, c.n_head + 2 * n_kv_head, c.head_dim)
        q, k, v = heads.split((c.n_head, n_kv_head, n_kv_head), dim=2)
        if c.qk_norm:
            q, k = normed(q), normed(k)
        q, k, y = turned(q), turned(k), torch.empty(2, 16, c.n_head, c.head_dim)
        for head in range(c.n_head):
            shared = head // (c.n_head // n_kv_head)
            scores = q[:, :, head] @ k[:, :, shared].mT / c.head_dim**0.5
            y[:, :, head] = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).softmax(-1) @ v[:, :, shared]
        h = h + a.proj(y.flatten(2))
        up = block.mlp.up(normed(h))
        hidden = up[..., : c.hidden_dim] * up[..., : c.hidden_dim].sigmoid() * up[..., c.hidden_dim :] if c.use_swiglu else F.gelu(up)
        h = h + block.mlp.down(hidden)
    torch.testing.assert_close(all_logits(model, x), normed(h) @ model.embedding.weight.T, atol=2e-5, rtol=1e-4)  # float32 sums of 32 to 128 terms


@pytest.mark.parametrize('device', DEVICES)
def test_the_written_out_backwards_equal_autograd_of_plain_lines(device):
    x = torch.randn(3, 5, 4, 8, device=device, requires_grad=True)
    a, b = x.chunk(2, -1)
    pairs = [
        (gpt.RMSNorm.apply(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()),
        (gpt.SwiGLU.apply(x), F.silu(a) * b),
    ]
    for ours, plain in pairs:
        weights = torch.randn_like(plain)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, plain)), atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize('changes, words', [(dict(n_embd=100, n_head=12), 'n_embd 100 does not divide into n_head 12'), (dict(n_kv_head=3), 'n_kv_head 3'),
                                            (dict(n_layer=0), 'n_layer is 0'), (dict(dropout=1.0), 'dropout is 1.0'), (dict(n_embd=12, n_head=4), 'even')])
def test_an_impossible_shape_is_refused_with_its_numbers(changes, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**TINY, **changes})


def test_the_loss_starts_near_log_vocab_size():
    torch.manual_seed(0)
    model, x = create_model('tiny', vocab_size=500, n_layer=3), torch.randint(500, (4, 65))
    assert model(x[:, :-1], x[:, 1:])[1].item() == pytest.approx(math.log(500), abs=0.1)


@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_one_batch_can_be_memorised(kind):
    torch.manual_seed(0)
    model, x = GPT(GPTConfig(**TINY)), ids(4, 17)
    optimizer = gpt.make_optimizer(model, kind, 1e-2, 0.02, (0.9, 0.95), 0.0, fused=True)
    for _ in range(80):
        loss = model(x[:, :-1], x[:, 1:], return_logits=False)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def test_targets_of_minus_one_do_not_count():
    model, x = tiny(), ids(2, 16)
    targets = ids(2, 16, seed=2)
    targets[:, 8:] = -1
    logits, loss = model(x, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :8].flatten(0, 1), targets[:, :8].flatten()))
    torch.testing.assert_close(loss, model(x, targets, return_logits=False)[1])


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less():
    x, gradients, kept = ids(8, 17), [], []
    for on in (False, True):
        model = tiny(gradient_checkpointing=on, n_layer=4).train()
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            loss = model(x[:, :-1], x[:, 1:])[1]
        kept.append(sum(sizes.values()))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < 0.5 * kept[0]


def test_muon_makes_the_step_of_torch_optim_muon():
    torch.manual_seed(0)
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
    for kind, decaying in (('adamw', {p for p in model.parameters() if p.dim() == 2}), ('muon', {p for p in model.blocks.parameters() if p.dim() == 2})):
        groups = gpt.make_optimizer(model, kind, 1e-3, 0.02, (0.9, 0.95), 0.1, fused=False).param_groups
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
# generation


@torch.no_grad()
def banded(model, x):
    """Logits (B, T, vocab_size) at any length: a plain forward with a mask block_size wide."""
    T, c = x.size(1), model.config
    mask = torch.ones(T, T).tril().triu(1 - c.block_size).bool()
    cos, sin = gpt.rope_table(0, T, c.head_dim)
    h = model.embedding(x)
    for block in model.blocks:
        a = block.attention
        q, k, v = a.qkv(gpt.norm(h, c)).view(*x.shape, -1, c.head_dim).split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
        q, k = (gpt.rotate(gpt.norm(t, c), cos, sin) for t in (q, k))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, enable_gqa=True)
        h = h + a.proj(y.transpose(1, 2).flatten(2))
        h = h + block.mlp(gpt.norm(h, c))
    return gpt.norm(h, c) @ model.embedding.weight.T


@torch.no_grad()
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('chunks', [[53], [1] * 53, [15, 1, 1, 36], [16, 37], [5, 11, 20, 17], [40] + [1] * 13])
def test_cached_equals_uncached_whatever_the_chunks_and_past_the_window(chunks, device):
    model, x = tiny(device=device), ids(3, 53).to(device)
    expected, cache, end = banded(tiny(), x.cpu()), KVCache(model.config, 3, device, torch.float32), 0
    for n in chunks:
        logits = model(x[:, end : end + n], cache=cache)[0]
        end += n
        torch.testing.assert_close(logits[:, 0].cpu(), expected[:, end - 1], atol=1e-4, rtol=1e-4)  # float32, sums in another order


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('T', [1, 15, 16, 17, 40])
def test_greedy_generation_follows_the_banded_forward_at_every_length(T, device):
    model, x = tiny(device=device), ids(2, T).to(device)
    out = model.generate(x, 30, temperature=0)
    assert torch.equal(out[:, :T], x) and out.shape == (2, T + 30)
    assert torch.equal(banded(tiny(), out.cpu())[:, T - 1 : -1].argmax(-1), out[:, T:].cpu())
    assert torch.equal(out, model.generate(x, 30, temperature=0))  # the second call starts from nothing, too


def test_a_cache_carries_on_where_the_last_call_ended():
    model, x = tiny(), ids(1, 9)
    cache = KVCache(model.config, 1, 'cpu', torch.float32)
    first = torch.stack(list(model.stream(x, 10, temperature=0, cache=cache)), 1)
    second = torch.stack(list(model.stream(first[:, -1:], 10, temperature=0, cache=cache)), 1)
    assert torch.equal(torch.cat((x, first, second), 1), model.generate(x, 20, temperature=0))


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
    (dict(top_k=3, top_p=0.85), [5 / 9 / (15 / 18), 5 / 18 / (15 / 18), 0, 0]),  # top_p counts within the top_k: 5/9 + 5/18 = 0.83 < 0.85
    (dict(temperature=0), [1, 0, 0, 0]),
])
def test_draws_follow_the_distribution_computed_by_hand(options, expected, device):
    if options == dict(top_k=3, top_p=0.85):
        expected = [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(20000, 1).to(device)
    drawn = sample(logits, generator=torch.Generator(device).manual_seed(0), **options)
    share = torch.bincount(drawn.cpu(), minlength=4) / 20000
    assert (share - torch.tensor(expected)).abs().max() < 0.015  # four standard errors
    assert all(share[i] == 0 for i, p in enumerate(expected) if p == 0)


def test_decoding_layout_changes_nothing_but_the_strides():
    model, x = tiny(), ids(1, 5)
    before = model.generate(x, 20, temperature=0)
    model.lay_out_for_decoding()
    assert model.blocks[0].mlp.up.weight.stride(0) == 1 and torch.equal(before, model.generate(x, 20, temperature=0))


# ----------------------------------------------------------------------------
# checkpoints


def checkpoint(model, **changes):
    return {**dict(model=model.state_dict(), model_config=vars(model.config).copy(), config={}, tokenizer={}, iter_num=0, val_loss=1.0), **changes}


def test_a_checkpoint_comes_back_equal_and_the_tied_weights_are_one_tensor(tmp_path):
    model, x = tiny(), ids(2, 16)
    save_checkpoint(str(tmp_path / 'c.pt'), checkpoint(model))
    again = load_model(load_checkpoint(str(tmp_path / 'c.pt'))).eval()
    assert torch.equal(all_logits(model, x), all_logits(again, x)) and os.listdir(tmp_path) == ['c.pt']
    again.embedding.weight.data[3] += 1  # moves input and output alike
    assert torch.equal(all_logits(again, x), again.trunk(x, (again.cos, again.sin)) @ again.embedding.weight.T)
    assert sum(p.numel() == 50 * 32 for p in again.parameters()) == 1


class Hostile:
    def __reduce__(self):
        return os.system, ('touch /tmp/hostile_code_has_run',)


def spoil(path, how):
    whole = path.read_bytes()
    if how == 'missing':
        path.unlink()
    elif how == 'a directory':
        path.unlink()
        path.mkdir()
    elif how == 'hostile':
        torch.save({'model': Hostile()}, path)
    elif how == 'hostile legacy pickle':
        torch.save({'model': Hostile()}, path, _use_new_zipfile_serialization=False)
    elif how == 'of another program':
        torch.save({'weights': torch.ones(3)}, path)
    elif how == 'of another shape':
        torch.save({**torch.load(path), 'model_config': {**TINY, 'n_embd': 64}}, path)
    elif how == 'not a model':
        torch.save({**torch.load(path), 'model': 7}, path)
    else:
        middle = len(whole) // 2
        path.write_bytes({'empty': b'', 'truncated': whole[:middle], 'text': b'hello',
                          'bit-flipped': whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]}[how])


SPOILS = ['missing', 'a directory', 'empty', 'text', 'truncated', 'bit-flipped', 'hostile', 'hostile legacy pickle', 'of another program', 'of another shape', 'not a model']


@pytest.mark.parametrize('how', SPOILS)
def test_a_spoilt_checkpoint_is_refused_in_one_line_and_runs_nothing(tmp_path, how):
    path = tmp_path / 'c.pt'
    save_checkpoint(str(path), checkpoint(tiny()))
    spoil(path, how)
    with pytest.raises(ValueError) as caught:
        load_model(load_checkpoint(str(path)))
    assert '\n' not in str(caught.value) and not os.path.exists('/tmp/hostile_code_has_run')


def test_a_failed_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    path = str(tmp_path / 'c.pt')
    save_checkpoint(path, checkpoint(tiny(0)))
    monkeypatch.setattr(os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError, match='No space left.*is whole'):
        save_checkpoint(path, checkpoint(tiny(1)))
    assert torch.equal(load_checkpoint(path)['model']['embedding.weight'], tiny(0).embedding.weight) and os.listdir(tmp_path) == ['c.pt']
