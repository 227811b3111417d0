"""The network: a GPT with RoPE, grouped-query attention, SwiGLU and RMSNorm; sampling, its optimizer,
checkpoints.

Each formula stands here once. What exists for speed or memory alone is the last section, which need not be
read."""

import functools
import json
import math
import os
import pickle
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------
# Shape

@dataclass
class GPTConfig:
    block_size: int = 256  # context: the positions a token can look back on, itself included
    vocab_size: int = 8192  # distinct tokens
    n_layer: int = 6  # blocks
    n_head: int = 6  # query heads
    n_kv_head: int = 0  # key and value heads, a divisor of n_head; 0: as many as query heads
    n_embd: int = 384  # width
    head_dim: int = 0  # width of a head; 0: n_embd / n_head
    mlp_ratio: float = 2.66  # hidden width over n_embd (SwiGLU's three matrices: 8/3 costs what 4 costs GELU)
    dropout: float = 0.0  # of embeddings and of what blocks add; 0.1 to 0.3 where the data is seen many times
    bias: bool = False  # biases in the linear layers and LayerNorm
    use_rms_norm: bool = True  # RMSNorm; false: LayerNorm
    use_swiglu: bool = True  # SwiGLU; false: GELU
    qk_norm: bool = True  # normalise queries and keys, per head
    rope_theta: float = 10000.0  # base of the rotation frequencies
    norm_eps: float = 1e-6  # added to the mean square in norms
    gradient_checkpointing: bool = False  # a third more time for far less memory

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                value = float(value)
                setattr(self, field.name, value)
            if type(value) is not field.type:
                raise ValueError(f'{field.name} is {value!r}: it must be of type {field.type.__name__}')
            if field.type in (int, float) and not abs(value) < 2**24:  # not nan either
                raise ValueError(f'{field.name} is {value}: it must be below 2^24')
        self.n_kv_head = self.n_kv_head or self.n_head
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be at least 1')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} does not divide into n_head {self.n_head}')
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} does not divide into n_kv_head {self.n_kv_head}')
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f'head_dim is {self.head_dim}, but RoPE turns pairs: it must be even')
        if self.n_layer > 1000:
            raise ValueError(f'n_layer is {self.n_layer}: it must be at most 1000')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}: it must be at least 0 and below 1')
        for name in ('mlp_ratio', 'rope_theta', 'norm_eps'):
            if not getattr(self, name) > 0:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be above 0')
        if max(self.hidden_dim, self.n_head * self.head_dim) >= 2**24:
            raise ValueError(f'hidden_dim {self.hidden_dim} and n_head * head_dim '
                             f'{self.n_head * self.head_dim} must be below 2^24')

    @property
    def hidden_dim(self):
        return 64 * math.ceil(round(self.mlp_ratio * self.n_embd / 64, 6))

# near 10M, 25M, 80M and 350M parameters, the embedding (which is also the head) included
presets = {
    'tiny': dict(block_size=256, vocab_size=8192, n_layer=7, n_head=5, n_kv_head=1, n_embd=320),
    'small': dict(block_size=512, vocab_size=8192, n_layer=8, n_head=8, n_kv_head=2, n_embd=512),
    'medium': dict(block_size=1024, vocab_size=16384, n_layer=16, n_head=10, n_kv_head=2, n_embd=640),
    'large': dict(block_size=2048, vocab_size=32768, n_layer=28, n_head=16, n_kv_head=4, n_embd=1024),
}

def config_from(settings, **changes):
    """The GPTConfig of a script's settings, which have a value for each of its fields."""
    return GPTConfig(**{field.name: settings[field.name] for field in fields(GPTConfig)} | changes)

# ----------------------------------------------------------------------------
# The model

def matrix_dtype(x):
    """What a matrix product of x is computed in: autocast's precision, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; https://arxiv.org/abs/1910.07467 (4)."""

    def forward(self, x):
        x = fast_rms_norm(x, self.eps or torch.finfo(x.dtype).eps)
        return x if self.weight is None else x * self.weight.to(x.dtype)

class Linear(nn.Linear):
    """nn.Linear that starts normal with a standard deviation of 0.5 / sqrt(inputs), its bias at zero."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.5 * self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        return fast_linear(x, self.weight, self.bias)

def make_norm(size, config):
    if config.use_rms_norm:
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)

def rope(positions, config):
    """cos and sin (T, 1, head_dim) of positions (T,), the minus of rotate's first half in sin. The angles are
    made in float64 where the device has it: in float32 those of the ten-millionth position are off by half a
    turn."""
    wide = torch.float64 if positions.device.type in ('cpu', 'cuda') else torch.float32
    pairs = torch.arange(0, config.head_dim, 2, dtype=wide, device=positions.device)
    angle = torch.outer(positions.to(wide), config.rope_theta ** (-pairs / config.head_dim)).unsqueeze(1)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

def rotate(x, cos, sin):
    """RoPE, https://arxiv.org/abs/2104.09864 (34), half against half as in Hugging Face's Llama: each pair
    (i, i + head_dim / 2) of x (B, T, heads, head_dim) turned by the angle of its position."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)

def attention_mask(queries, keys, config):
    """What is added to the score of a query and a key, from their positions (T,) and (S,) -> (T, S): 0 where
    the key is one of the block_size positions up to the query, else -inf."""
    distance = queries[:, None] - keys
    visible = (distance >= 0) & (distance < config.block_size)
    return torch.where(visible, 0.0, -math.inf)

def attention(q, k, v, mask=None):
    """softmax(q k' / sqrt(head_dim) + mask) v. q is (B, n_head, T, head_dim), k and v are (B, n_kv_head, S,
    head_dim): neighbouring queries share them. mask is (T, S) or (n_head, T, S); None: causal. The first three
    lines are faster kernels for the same formula: a change of it starts by deleting them."""
    kernel = faster_attention(q, k, mask)
    if kernel is not None:
        return kernel(q, k, v, mask)
    group = q.size(1) // k.size(1)
    if group > 1:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = Linear(config.n_embd, heads * config.head_dim, bias=config.bias)
        self.proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        if config.qk_norm:  # per head, before the rotation, where Qwen3 has it
            self.q_norm = make_norm(config.head_dim, config)
            self.k_norm = make_norm(config.head_dim, config)

    def forward(self, x, rope, mask=None, cache=None):
        """x (B, T, C), rope (cos, sin), mask as attention() wants it -> (B, T, C)"""
        c = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, c.head_dim))  # (B, T, n_head + 2 n_kv_head, head_dim)
        q, k, v = qkv.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = attention(q, k, v, mask)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

def swiglu(x):
    """silu(gate) * up, (..., 2 * hidden) -> (..., hidden); https://arxiv.org/abs/2002.05202 (5)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.up = Linear(config.n_embd, config.hidden_dim * (2 if config.use_swiglu else 1), bias=config.bias)
        self.down = Linear(config.hidden_dim, config.n_embd, bias=config.bias)

    def project(self, x):
        return self.down(swiglu(x) if self.config.use_swiglu else F.gelu(x))

    def forward(self, x):
        return fast_recompute(self.project, self.up(x))

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention_norm = make_norm(config.n_embd, config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

def token_loss(logits, targets):
    """Sum of the cross entropies, in nats, of logits (N, vocab_size) against targets (N,); -1 does not
    count."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction='sum')

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config.n_embd, config)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight  # tied: one matrix for both
        nn.init.normal_(self.embedding.weight, std=1 / config.n_embd)

    def forward(self, input_ids, targets=None, cache=None, return_logits=True):
        """(B, T) int64 -> logits, loss. With targets (B, T), of which -1 does not count: (B, T, vocab_size)
        and their mean cross entropy; return_logits=False gives None and the loss, and never holds all logits
        at once. Without targets: the last position's (B, 1, vocab_size) and None. T is at most block_size, or
        with a cache, which it continues, any."""
        if cache is not None:
            for part in input_ids.split(self.config.block_size, dim=1):
                x = self.trunk(part, cache)
            return self.logits(x[:, -1:]), None
        if input_ids.size(1) > self.config.block_size:
            raise ValueError(f'{input_ids.size(1)} positions are beyond block_size {self.config.block_size}')
        x = self.trunk(input_ids)
        if targets is None:
            return self.logits(x[:, -1:]), None
        counted = targets.ne(-1).sum().clamp(min=1)
        if not return_logits:
            loss = fast_loss(lambda x, targets: token_loss(self.logits(x), targets), x, targets, self)
            return None, loss / counted
        logits = self.logits(x)
        return logits, token_loss(logits.flatten(0, 1), targets.flatten()) / counted

    def trunk(self, input_ids, cache=None):
        """(B, T) -> (B, T, C), all but the head"""
        if cache is None:
            positions = keys = torch.arange(input_ids.size(1), device=input_ids.device)
        else:
            positions, keys = cache.advance(input_ids.size(1))
        x = self.dropout(self.embedding(input_ids))
        mask = None  # plain causal attention, for which there are the fastest kernels
        if keys is not positions:
            mask = attention_mask(positions, keys, self.config).to(x.dtype)
        turns = [table.to(matrix_dtype(x)) for table in rope(positions, self.config)]
        for block in self.blocks:
            if self.config.gradient_checkpointing and self.training:
                x = checkpoint(block, x, turns, mask, use_reentrant=False)
            else:
                x = block(x, turns, mask, cache)
        return self.norm(x)

    def logits(self, x):
        """(..., C) -> (..., vocab_size)"""
        return self.head(x)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Of a training step, forward and backward: 6 N + 12 L H Q T; appendix B of
        https://arxiv.org/abs/2204.02311."""
        c = self.config
        return 6 * self.n_params() + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

    @torch.inference_mode()
    def stream(self, input_ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, num_samples=1,
               generator=None, stop_token=None):
        """Yield max_new_tokens times (B,) new ids for the prompts (B, T), or for num_samples continuations of
        one prompt (1, T). A row that has drawn stop_token repeats it; the text ends when every row has. T and
        max_new_tokens have no limit: a token sees the block_size positions up to itself. The arithmetic is
        that of the weights: model.to(torch.bfloat16) first for speed."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f'input_ids must be (B, T) with a token at least, not {tuple(input_ids.shape)}')
        if num_samples > 1 and input_ids.size(0) > 1:
            raise ValueError(f'num_samples {num_samples} wants one prompt, not {input_ids.size(0)}')
        if max_new_tokens < 1:
            raise ValueError(f'max_new_tokens is {max_new_tokens}: it must be at least 1')
        weight = self.embedding.weight
        was_training = self.training
        self.eval()
        try:
            fast_layout(self, by_columns=True)
            input_ids = input_ids.to(weight.device)
            cache = KVCache(self.config, input_ids.size(0), weight.device, weight.dtype)
            logits = self(input_ids, cache=cache)[0]
            if num_samples > 1:
                cache.repeat(num_samples)
                logits = logits.repeat_interleave(num_samples, dim=0)
            step = fast_step(self, cache)
            ended = torch.zeros(logits.size(0), dtype=torch.bool, device=weight.device)
            for i in range(max_new_tokens):
                ids = sample(logits[:, -1], temperature, top_k, top_p, generator)
                if stop_token is not None:
                    ids = ids.masked_fill(ended, stop_token)
                    ended |= ids == stop_token
                yield ids
                if i + 1 == max_new_tokens or (stop_token is not None and ended.all()):
                    break
                logits = step(ids.unsqueeze(1))
        finally:
            fast_layout(self, by_columns=False)  # which the optimizer's state has
            self.train(was_training)

    def generate(self, input_ids, max_new_tokens, **options):
        """The prompts (B, T) with what stream() adds to them: (B, T + max_new_tokens), or fewer if all rows
        stopped."""
        new = torch.stack(list(self.stream(input_ids, max_new_tokens, **options)), dim=1)
        return torch.cat((input_ids.to(new.device).expand(new.size(0), -1), new), dim=1)

def create_model(preset, **changes):
    """A GPT of one of the presets; changes are GPTConfig fields."""
    if preset not in presets:
        raise ValueError(f"there is no preset '{preset}': choose one of {', '.join(presets)}")
    return GPT(GPTConfig(**{**presets[preset], **changes}))

# ----------------------------------------------------------------------------
# KV cache and sampling

class KVCache:
    """Keys and values of the last block_size positions. Position p is kept in slot p % size, and `at` has the
    position that each slot holds, so that attention_mask() follows from positions alone: a text may go on for
    ever, and past block_size the meaning is a forward over all of it with a banded mask of that width. size
    grows with the text, a quarter at a time, up to block_size. One token is written first and then attends to the
    slots; of several at once the first still need what the last will replace, so they attend to the slots and
    to one another, and are written afterwards."""

    def __init__(self, config, batch_size, device, dtype):
        self.config = config
        self.length = 0  # positions read so far,
        self.next = torch.zeros(1, dtype=torch.int64, device=device)  # and where a graph can count them
        self.at = torch.empty(0, dtype=torch.int64, device=device)
        shape = (config.n_layer, batch_size, config.n_kv_head, 0, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)

    def make_room(self, T):
        """Slots for T more positions, as far as block_size allows."""
        size = self.at.numel()
        wanted = min(self.length + T, self.config.block_size)
        if size < wanted:
            more = min(self.config.block_size, max(128, wanted + wanted // 4)) - size
            nowhere = 2**62  # a position that no query has reached
            self.at = F.pad(self.at, (0, more), value=nowhere)
            self.k = F.pad(self.k, (0, 0, 0, more))
            self.v = F.pad(self.v, (0, 0, 0, more))

    def advance(self, T):
        """Go on by T positions, at most block_size -> them (T,), and those of the keys that extend() will
        return (S,)."""
        self.make_room(T)
        self.begins = self.length == 0
        positions = keys = self.next + torch.arange(T, device=self.next.device)
        self.slots = positions % self.at.numel()
        if T > 1 and not self.begins:
            keys = torch.cat((self.at, positions))
        self.at.index_copy_(0, self.slots, positions)
        if T == 1:
            keys = self.at
        self.next += T
        self.length += T
        return positions, keys

    def extend(self, layer, k, v):
        """Store k and v (B, n_kv_head, T, head_dim); the keys and values to attend to."""
        k, v = k.to(self.k.dtype), v.to(self.v.dtype)  # autocast's may be another
        past_k, past_v = self.k[layer], self.v[layer]
        keys, values = k, v
        if k.size(2) == 1:
            keys, values = past_k, past_v
        elif not self.begins:
            keys, values = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        past_k.index_copy_(2, self.slots, k)
        past_v.index_copy_(2, self.slots, v)
        return keys, values

    def repeat(self, n):
        """Go on as n copies of the one sequence read so far."""
        self.k, self.v = self.k.repeat_interleave(n, dim=1), self.v.repeat_interleave(n, dim=1)

def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """(B, vocab_size) -> (B,) ids: temperature (0: the most likely), then the top_k most likely (0: all),
    then the fewest of these that reach top_p together. Drawn as the argmax of p / Exp(1): no multinomial, no
    wait for a GPU."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    p = logits.softmax(dim=-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)
    choice = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)

# ----------------------------------------------------------------------------
# Optimizer

def inverse_root(gram):
    """About (X X')^(-1/2) of each gram X X' in (k, n, n), X of norm 1. Its product with X has singular values
    between 0.1 and 1.4, most of them near 1, so it is about the nearest orthogonal matrix. These are the
    first three steps of https://arxiv.org/abs/2505.16932, which need no more than X X', the last one times
    0.733; a fourth made training slower and no better."""
    steps = ((8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (2.8944, -2.1322, 0.4045))
    root = None
    for a, b, c in steps:
        if root is not None:
            gram = p @ gram @ p
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        root = p if root is None else p @ root
    return root

class Muon(torch.optim.AdamW):
    """Groups with muon=True take Muon's step, https://kellerjordan.github.io/posts/muon: Nesterov momentum,
    made orthogonal for each matrix. The inverse roots, which are most of the work, are made together, in
    autocast's precision if step() is called under it. The other groups are AdamW's."""

    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        self._step_supports_amp_scaling = False  # a GradScaler shall skip the whole step, not AdamW's part

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group.get('muon'):
                sizes = {}
                for p in group['params']:
                    if p.grad is not None:
                        sizes.setdefault(min(p.shape), []).append(p)
                for params in sizes.values():
                    self.muon_step(params, group['lr'], group['momentum'], group['weight_decay'])
        return super().step(closure)

    def muon_step(self, params, lr, momentum, weight_decay):
        buffers, grads = [], []
        for p in params:
            if not self.state[p]:
                # AdamW's loading wants a step
                self.state[p].update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
            buffers.append(self.state[p]['momentum_buffer'])
            grads.append(p.grad)
            p.grad = None  # so that AdamW passes by
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum)
        torch._foreach_div_(updates, torch._foreach_add(torch._foreach_norm(updates), 1e-7))
        updates = [u.mT if u.size(0) > u.size(1) else u for u in updates]  # (n, n or more)
        roots = inverse_root(torch.stack([u @ u.mT for u in updates]))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        for p, root, u in zip(params, roots, updates):
            change = u.mT @ root if p.size(0) > p.size(1) else root @ u  # root is symmetric
            p.add_(change, alpha=-lr * max(1, p.size(0) / p.size(1)) ** 0.5)

def make_optimizer(model, kind, learning_rate, betas, muon_learning_rate, muon_momentum, weight_decay):
    """'muon': the blocks' linear layers by Muon, every other parameter, whatever its shape, by AdamW;
    'adamw': all by AdamW. Decay is on what has two dimensions or more; with Muon on Muon's alone. Each group
    has its 'peak_lr'."""
    if kind not in ('adamw', 'muon'):
        raise ValueError(f"optimizer is '{kind}': it must be muon or adamw")
    hidden = [module.weight for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    others = [p for p in model.parameters() if not any(p is weight for weight in hidden)]
    decay_of_others = weight_decay if kind == 'adamw' else 0.0
    groups = [
        dict(params=hidden, weight_decay=weight_decay),
        dict(params=[p for p in others if p.dim() >= 2], weight_decay=decay_of_others),
        dict(params=[p for p in others if p.dim() < 2], weight_decay=0.0),
    ]
    if kind == 'muon':
        groups[0].update(muon=True, lr=muon_learning_rate, momentum=muon_momentum)
    groups = [group for group in groups if group['params']]
    optimizer = Muon(groups, lr=learning_rate, betas=betas, fused=True)
    for group in optimizer.param_groups:
        group['peak_lr'] = group['lr']
    times = Counter(p for group in optimizer.param_groups for p in group['params'])
    for name, p in model.named_parameters():
        if times[p] != 1:
            raise ValueError(f'{name} is in {times[p]} groups of the optimizer: it must be in one')
    return optimizer

def load_optimizer(optimizer, state):
    """A checkpoint's optimizer state into this optimizer, whose own options, which may have changed, stay."""
    options = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, options):
            group.update({**own, 'params': group['params']})
        fused = (p for group in optimizer.param_groups if group.get('fused') for p in group['params'])
        for p in fused:  # such a step would write past the end of anything smaller
            for name, value in optimizer.state[p].items():
                like = value.shape == p.shape and value.dtype == p.dtype and value.is_contiguous()
                if not like and name != 'step':
                    raise ValueError(f'{name} {tuple(value.shape)} {value.dtype} for {tuple(p.shape)}')
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the checkpoint's optimizer state does not fit its weights ({error})") from None

# ----------------------------------------------------------------------------
# Checkpoints: dicts of tensors and plain values, which torch.load reads without running anything

FIELDS = dict(
    model=dict, model_config=dict, config=dict, tokenizer=dict, dataset_sha256=str, iter_num=int,
    tokens_seen=int, elapsed=float, val_loss=float, best_val_loss=float, best_step=int, scaler=dict,
)

def save_checkpoint(path, state):
    """Written aside, flushed to disk, renamed: whatever happens, path is the old file or the new one,
    whole."""
    aside = f'{path}.part'
    try:
        with open(aside, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        if os.path.exists(aside):
            os.remove(aside)
        raise OSError(f'{path} could not be written ({reason})') from None

def load_checkpoint(path):
    """The dict that save_checkpoint wrote, or the same from a Hugging Face folder; ValueError where the file
    is missing, damaged or of another program."""
    if os.path.isdir(path) and os.path.exists(os.path.join(path, 'config.json')):
        return load_folder(path)
    if not os.path.isfile(path):
        raise ValueError(f'there is no checkpoint {path}: "python train.py" makes one in its --out_dir')
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError(f'{path} is compressed, which no checkpoint is')
            damaged = archive.testzip()  # torch.load itself does not look at the checksums
        if damaged:
            raise ValueError(f'{path} is damaged ({damaged} fails its checksum): use another copy')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (zipfile.BadZipFile, EOFError, pickle.UnpicklingError, RuntimeError):
        raise ValueError(f'{path} is damaged or not a checkpoint of this program: use another copy') from None
    for name, kind in FIELDS.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise ValueError(f'{path} is not a checkpoint of this program (no valid {name})')
    try:
        state['model_config'] = asdict(GPTConfig(**state['model_config']))
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path} has an invalid model_config ({error})') from None
    return state

def load_model(state):
    """The GPT of a checkpoint, ready for more training or sampling. Shapes are compared before anything is
    allocated."""
    config, weights = GPTConfig(**state['model_config']), state['model']
    with torch.device('meta'):
        expected = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    found = {name: getattr(tensor, 'shape', None) for name, tensor in weights.items()}
    if found != expected:
        odd = next(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        raise ValueError(f"the checkpoint's weights do not fit its model_config: {odd} is {found.get(odd)}, "
                         f'not {expected.get(odd)}')
    model = GPT(config)
    model.load_state_dict(weights)
    return model

# A Hugging Face folder of a Llama or a Qwen3 stands wherever a checkpoint does. These tables serve both
# directions: modules here and there (where ours is one matrix, theirs one below the other), fields of the
# configuration, and what is fixed.
MODULES = {
    'embedding': ['embed_tokens'],
    'attention_norm': ['input_layernorm'],
    'attention.qkv': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
    'attention.q_norm': ['self_attn.q_norm'],
    'attention.k_norm': ['self_attn.k_norm'],
    'attention.proj': ['self_attn.o_proj'],
    'mlp_norm': ['post_attention_layernorm'],
    'mlp.up': ['mlp.gate_proj', 'mlp.up_proj'],
    'mlp.down': ['mlp.down_proj'],
    'norm': ['norm'],
}
SIZES = dict(block_size='max_position_embeddings', vocab_size='vocab_size', n_layer='num_hidden_layers',
             n_head='num_attention_heads', n_kv_head='num_key_value_heads', n_embd='hidden_size',
             head_dim='head_dim', rope_theta='rope_theta', norm_eps='rms_norm_eps', bias='attention_bias')
FIXED = dict(hidden_act='silu', tie_word_embeddings=True, use_sliding_window=False)

def to_hf(config, weights):
    """A GPT's weights -> {our name: {their name: tensor}}; the head is left out, being the embedding once
    more."""
    heads = (config.n_head, config.n_kv_head, config.n_kv_head)
    rows = {'attention.qkv': [n * config.head_dim for n in heads], 'mlp.up': [config.hidden_dim] * 2}
    result = {}
    for name, tensor in weights.items():
        module, kind = name.rsplit('.', 1)
        prefix = 'model'
        if module.startswith('blocks.'):
            _, layer, module = module.split('.', 2)
            prefix = f'model.layers.{layer}'
        if module == 'head':
            if tensor.data_ptr() != weights['embedding.weight'].data_ptr():
                raise ValueError('the head is not the embedding: only tied embeddings can be exported')
            continue
        if module not in MODULES:
            raise ValueError(f'neither Llama nor Qwen3 has a place for {name}')
        if sum(rows.get(module, [])) not in (0, len(tensor)):
            raise ValueError(f'{name} has {len(tensor)} rows, not {sum(rows[module])}')
        parts = tensor.split(rows.get(module, len(tensor)))
        result[name] = {f'{prefix}.{theirs}.{kind}': part for theirs, part in zip(MODULES[module], parts)}
    return result

def to_hf_config(c):
    """GPTConfig -> what config.json says of the shape; ValueError names what neither Llama nor Qwen3 can
    be."""
    if not c.use_rms_norm or not c.use_swiglu or (c.bias and c.qk_norm):
        raise ValueError(f'use_rms_norm {c.use_rms_norm}, use_swiglu {c.use_swiglu}, bias {c.bias}, qk_norm '
                         f'{c.qk_norm}: Llama and Qwen3 have RMSNorm, SwiGLU, and not both bias and qk_norm')
    if not c.qk_norm and c.n_embd % c.n_head:
        raise ValueError(f'n_embd {c.n_embd} does not divide into n_head {c.n_head}, as a Llama has it')
    known = {*SIZES, 'mlp_ratio', 'dropout', 'use_rms_norm', 'use_swiglu', 'qk_norm',
             'gradient_checkpointing'}
    for field in fields(c):
        if field.name not in known and getattr(c, field.name):
            raise ValueError(f'{field.name} is {getattr(c, field.name)}: neither Llama nor Qwen3 has it')
    sizes = {theirs: getattr(c, ours) for ours, theirs in SIZES.items()}
    family = dict(model_type='llama', architectures=['LlamaForCausalLM'], mlp_bias=c.bias)
    if c.qk_norm:
        family = dict(model_type='qwen3', architectures=['Qwen3ForCausalLM'])
    rope = {'rope_type': 'default', 'rope_theta': c.rope_theta}
    return {**family, **sizes, **FIXED, 'intermediate_size': c.hidden_dim, 'rope_parameters': rope}

def from_hf_config(theirs):
    """What config.json says -> GPTConfig; ValueError names what a GPT of this file cannot be."""
    qwen3 = theirs.get('model_type') == 'qwen3'
    rope = {**(theirs.get('rope_scaling') or {}), **(theirs.get('rope_parameters') or {})}
    rope.setdefault('rope_type', rope.get('type'))
    defaults = dict(
        model_type=None, hidden_act='silu', tie_word_embeddings=False, use_sliding_window=False,
        layer_types=[], num_key_value_heads=32 if qwen3 else 0, head_dim=128 if qwen3 else 0,
        rms_norm_eps=1e-6, rope_theta=10000.0, rope_type='default', partial_rotary_factor=1.0,
        attention_bias=False, mlp_bias=False, quantization_config=None)
    c = defaults | {name: value for name, value in (theirs | rope).items() if value is not None}
    right = FIXED | dict(
        model_type='qwen3' if qwen3 else 'llama', layer_types=['full_attention'] * len(c['layer_types']),
        rope_type='default', partial_rotary_factor=1.0, attention_bias=not qwen3 and c['mlp_bias'],
        quantization_config=None)
    for name, value in right.items():
        if c[name] != value:
            raise ValueError(f'{name} is {c[name]!r:.60}, which a GPT of this program cannot have')
    for name in (*SIZES.values(), 'intermediate_size'):
        if name not in c:
            raise ValueError(f'config.json has no {name}')
    config = GPTConfig(**{ours: c[name] for ours, name in SIZES.items()}, qk_norm=qwen3)
    hidden = c['intermediate_size']
    if type(hidden) is not int or hidden % 64 or not 0 < hidden < 2**24:
        raise ValueError(f'intermediate_size is {hidden!r:.60}: it must be a multiple of 64')
    return replace(config, mlp_ratio=hidden / config.n_embd)

def read_json(folder, name):
    """The dict in a JSON file; ValueError where there is none."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding='utf-8') as file:
            return dict(json.load(file))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is missing or damaged ({type(error).__name__})') from None

def hf_tokenizer(folder):
    """The tokenizer of a Hugging Face folder, as meta.json and checkpoints have it."""
    contents, end = read_json(folder, 'tokenizer.json'), None
    try:
        ids = contents['model']['vocab']
        ids = list(ids.values()) if isinstance(ids, dict) else list(range(len(ids)))
        ids += [token['id'] for token in contents.get('added_tokens') or []]
        size = max(ids) + 1
        if not 1 < size < 2**24:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f'{os.path.join(folder, "tokenizer.json")} has no vocabulary') from None
    if os.path.exists(os.path.join(folder, 'config.json')):
        end = read_json(folder, 'config.json').get('eos_token_id')
        if isinstance(end, list):  # of several the first is the one that ends a document
            end = end[0] if end else None
    if end is not None and (type(end) is not int or not 0 <= end < size):
        raise ValueError(f'{folder}: eos_token_id is {end!r:.60}, which is no token')
    return {'kind': 'hf', 'json': json.dumps(contents), 'end_of_text': end, 'vocab_size': size}

def load_folder(folder):
    """load_checkpoint() of a Hugging Face folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = from_hf_config(read_json(folder, 'config.json'))
        tokenizer = hf_tokenizer(folder)
        if tokenizer['vocab_size'] > config.vocab_size:
            raise ValueError(f'tokenizer.json has {tokenizer["vocab_size"]} ids, not {config.vocab_size}')
        files, index = ['model.safetensors'], 'model.safetensors.index.json'
        if os.path.exists(os.path.join(folder, index)):
            files = sorted(set(read_json(folder, index).get('weight_map', {}).values()))
        there = {}
        for file in files:
            there.update(load_file(os.path.join(folder, os.path.basename(file))))
        with torch.device('meta'):
            groups = to_hf(config, GPT(config).state_dict())
        expected = {name: part.shape for group in groups.values() for name, part in group.items()}
        for name, shape in expected.items():
            if name not in there:
                raise ValueError(f'{name} is missing')
            if there[name].shape != shape or not there[name].is_floating_point():
                raise ValueError(f'{name} is {there[name].dtype} {tuple(there[name].shape)}, '
                                 f'not floating-point {tuple(shape)}')
        for name in sorted(there.keys() - expected.keys() - {'lm_head.weight'}):
            if not name.endswith('.inv_freq'):  # constants, which old folders have
                raise ValueError(f'this model has no place for {name}')
        weights = {name: torch.cat([there[part].float() for part in group])
                   for name, group in groups.items()}
        weights['head.weight'] = weights['embedding.weight']
    except (SafetensorError, OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'{folder}: {error}') from None
    state = {name: kind() for name, kind in FIELDS.items()}
    return state | dict(model=weights, model_config=asdict(config), tokenizer=tokenizer, val_loss=math.nan,
                        best_val_loss=math.inf)

# ----------------------------------------------------------------------------
# Fast paths: for speed and memory alone. FAST = False switches them off; without this section, and with the
# plain function in each place that calls one, the program is right and slower. They take the plain function,
# and restate only attention and x / rms(x), whose kernels are the point.

FAST = True
LARGE = 2**20  # elements from which fast_recompute pays
MANY_LOGITS = 2**24  # the most that fast_loss makes at once on a CPU; on a GPU sixteen times as many

def faster_attention(q, k, mask):
    """The kernel that is faster than attention()'s for these shapes, or None."""
    T, S = q.size(2), k.size(2)
    if not FAST or (mask is not None and mask.dim() > 2):
        return None
    if T == 1 and (not q.is_cpu or k.size(1) * S <= 2048):
        return one_query_attention
    if q.is_cpu and (T == 1 or (T <= 512 and S <= 1024)):
        return short_attention
    return None

def one_query_attention(q, k, v, mask):
    """attention() of one query a head, as when sampling: the heads that share keys take the place of T, so
    that nothing is repeated."""
    grouped = q.unflatten(1, (k.size(1), -1)).squeeze(3)  # (B, n_kv_head, n_head / n_kv_head, head_dim)
    return F.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)

def short_attention(q, k, v, mask):
    """attention() as plain products, which on a CPU take a half to a sixth of the fused kernel's time,
    forward and backward, over up to 512 positions, and a third for one query and many keys."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if mask is None:
        mask = q.new_full((T, T), -math.inf).triu_(1)
    q = q.reshape(B * K, H // K * T, D)
    k, v = k.reshape(B * K, S, D), v.reshape(B * K, S, D)
    scores = torch.baddbmm(mask.repeat(H // K, 1), q, k.mT, alpha=D**-0.5)  # (B * K, H / K * T, S)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)

class UnitRMS(torch.autograd.Function):
    """F.rms_norm(x, x.shape[-1:], eps=eps) that keeps only its output for backward, in the precision of the
    matrix product that follows, and passes over memory half as often."""

    @staticmethod
    def forward(ctx, x, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = size.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        y = (x * scale).to(matrix_dtype(x))
        ctx.save_for_backward(y, scale)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True, dtype=scale.dtype).div_(-y.size(-1))
        return (torch.addcmul(grad, y, along.to(y.dtype)) * scale).to(ctx.dtype), None

def fast_rms_norm(x, eps):
    """F.rms_norm without its gain: 10 % of a step's time and memory, and of a token's time. On a CPU
    layer_norm is the faster kernel, and that of (x, -x), whose mean is 0, is the same."""
    n = x.size(-1)
    if FAST and torch.is_grad_enabled():
        return UnitRMS.apply(x, eps)
    if FAST and x.is_cpu:
        return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * n,), eps=eps)[..., :n]
    return F.rms_norm(x, (n,), eps=eps)

def fast_recompute(function, x):
    """function(x), of which nothing but x is kept for backward where x is large: for a function that ends
    with a matrix product, whose own output is not made again."""
    if FAST and torch.is_grad_enabled() and x.numel() > LARGE:
        return checkpoint(function, x, use_reentrant=False)
    return function(x)

class LossInSlices(torch.autograd.Function):
    """loss(x, targets) as a sum over slices of so many rows of x (N, C) and targets (N,), each with its
    gradients at once, so that all logits never exist together. weights: what loss may use."""

    @staticmethod
    def forward(ctx, loss, rows, x, targets, *weights):
        total = x.new_zeros((), dtype=torch.float32)
        grad_x, grads = torch.empty_like(x), [None] * len(weights)
        for i in range(0, len(x), rows):
            part = x[i : i + rows].detach().requires_grad_()
            with torch.enable_grad():
                part_loss = loss(part, targets[i : i + rows])
            total += part_loss.detach()
            grad_x[i : i + rows], *found = torch.autograd.grad(part_loss, (part, *weights), allow_unused=True)
            for j, grad in enumerate(found):
                if grad is not None:
                    # two parameters that are added have one gradient: each needs its own
                    grads[j] = grad.clone() if grads[j] is None else grads[j].add_(grad)
            part_loss = found = grad = None  # before the next ones are made
        ctx.save_for_backward(grad_x, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # in place: a second backward is an error
        grad_x, *grads = (saved if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors)
        return None, None, grad_x, None, *grads

@torch.compiler.disable
def loss_in_slices(loss, rows, x, targets, model):
    return LossInSlices.apply(loss, rows, x, targets, *(p for p in model.parameters() if p.requires_grad))

def fast_loss(loss, x, targets, model):
    """loss(x, targets), a sum over rows of x (B, T, C) and targets (B, T)."""
    x, targets = x.flatten(0, 1), targets.flatten()
    rows = (MANY_LOGITS if x.is_cpu else 16 * MANY_LOGITS) // model.config.vocab_size + 1
    if not FAST or len(x) <= rows:
        return loss(x, targets)
    if torch.is_grad_enabled():
        return loss_in_slices(loss, rows, x, targets, model)
    return sum(loss(*part) for part in zip(x.split(rows), targets.split(rows)))

@functools.cache
@torch.inference_mode(False)
def shares(n, parts):
    """0 ... n - 1, and where each of so many parts of it begins."""
    return torch.arange(n), torch.arange(0, n, math.ceil(n / parts))

def fast_linear(x, weight, bias=None):
    """F.linear. On a CPU one row, each new token's work, times a matrix that lies column by column
    (fast_layout) is a sum of the columns weighted by x, a share for each thread: embedding_bag reads memory 1.2
    to 2 times as fast as the product, which is made for many rows."""
    if not x.is_cpu or x.numel() > x.size(-1) or weight.stride(0) > 1 or weight.dtype != x.dtype:
        return F.linear(x, weight, bias)
    columns, begins = shares(x.numel(), torch.get_num_threads())
    parts = torch.embedding_bag(weight.t(), columns, begins, False, 0, False, x.flatten())[0]
    y = parts.sum(0).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias

@torch.inference_mode(False)
def fast_layout(model, by_columns):
    """Store a CPU's matrices column by column, or row by row again: the same shapes and values."""
    for p in model.parameters():
        if FAST and p.is_cpu and p.dim() == 2:
            p.data = p.data.t().contiguous().t() if by_columns else p.data.contiguous()

def uses_graph(device):
    return FAST and device.type == 'cuda'

def fast_step(model, cache):
    """(B, 1) ids -> logits of the next token. On CUDA the step is captured as a graph, one launch a token
    instead of some hundred, and anew where the cache has grown."""
    def step(ids):
        return model(ids, cache=cache)[0]

    if not uses_graph(cache.k.device):
        return step
    ids = torch.zeros(cache.k.size(1), 1, dtype=torch.int64, device=cache.k.device)
    graph, logits, captured = None, None, None

    def capture():
        with torch.cuda.device(ids.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step(ids)  # warms up; what it writes, the first real step writes again
            torch.cuda.current_stream().wait_stream(side)
            cache.next -= 1
            cache.length -= 1
            graph = torch.cuda.CUDAGraph()
            # another thread may be preparing batches
            with torch.cuda.graph(graph, stream=side, capture_error_mode='thread_local'):
                logits = step(ids)
        cache.length -= 1
        return graph, logits

    def replay(next_ids):
        nonlocal graph, logits, captured
        cache.make_room(1)
        if captured is not cache.k:
            captured = cache.k
            graph, logits = capture()
        ids.copy_(next_ids)
        graph.replay()
        cache.length += 1
        return logits

    return replay
