"""The network: a GPT with RoPE, grouped-query attention, SwiGLU and RMSNorm; sampling, optimizers,
checkpoints.

    python model.py        # check each variant: training, evaluation and sampling must agree

Each formula is written once, attention's fast kernels aside. The last section is optimization only; you can
skip it.
"""
import functools
import math
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
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
    dropout: float = 0.0  # of embeddings and of what blocks add; 0.1 to 0.3 for many passes over the data
    bias: bool = False  # biases in the linear layers and LayerNorm
    use_rms_norm: bool = True  # RMSNorm; false: LayerNorm
    use_swiglu: bool = True  # SwiGLU; false: GELU
    qk_norm: bool = True  # normalise queries and keys, per head
    rope_theta: float = 10000.0  # base of the rotation frequencies
    norm_eps: float = 1e-6  # added to the mean square in norms
    gradient_checkpointing: bool = False  # a third more time for far less memory

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be at least 1')
        divides = self.head_dim or self.n_embd % self.n_head == 0
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        positive = all(number > 0 for number in (self.mlp_ratio, self.rope_theta, self.norm_eps))
        for holds, problem in [
            (divides, f'n_embd {self.n_embd} is not divisible by n_head {self.n_head}'),
            (self.n_head % self.n_kv_head == 0,
             f'n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}'),
            (self.head_dim > 1 and self.head_dim % 2 == 0,
             f'head_dim is {self.head_dim}: it must be even, because RoPE rotates pairs'),
            (0 <= self.dropout < 1, f'dropout is {self.dropout}: it must be at least 0 and below 1'),
            (positive, f'mlp_ratio {self.mlp_ratio}, rope_theta {self.rope_theta} and norm_eps '
                       f'{self.norm_eps} must be above 0'),
        ]:
            if not holds:
                raise ValueError(problem)

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
# The model. The dtype of the activations decides the precision: parameters are cast to it where used.

def cast(parameter, x):
    """A parameter, or None, in the dtype of x."""
    return None if parameter is None else parameter.to(x.dtype)

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; https://arxiv.org/abs/1910.07467 (4)."""

    def forward(self, x):
        return recompute(lambda x: F.rms_norm(x, self.normalized_shape, cast(self.weight, x), self.eps), x)

class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, cast(self.weight, x), cast(self.bias, x), self.eps)

class Linear(nn.Linear):
    """nn.Linear, initialised with a standard deviation of 0.5 / sqrt(inputs), biases with zero."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.5 * self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        return F.linear(x, cast(self.weight, x), cast(self.bias, x))

def make_norm(size, config):
    """Every norm of the model, those of queries and keys included."""
    if config.use_rms_norm:
        return RMSNorm(size, eps=config.norm_eps)
    return LayerNorm(size, eps=config.norm_eps, bias=config.bias)

def rope_tables(positions, config):
    """cos and sin (T, 1, head_dim) of positions (T,), with rotate()'s minus sign in the first half of sin.
    Angles are computed in float64 where the device has it: in float32 those of the ten-millionth position are
    off by up to an eighth of a turn."""
    wide = torch.float64 if positions.device.type in ('cpu', 'cuda') else torch.float32
    pairs = torch.arange(0, config.head_dim, 2, dtype=wide, device=positions.device)
    angle = torch.outer(positions.to(wide), config.rope_theta ** (-pairs / config.head_dim)).unsqueeze(1)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

def rotate(x, cos, sin):
    """RoPE, https://arxiv.org/abs/2104.09864 (34), half against half as in Hugging Face's Llama: rotates each
    pair (i, i + head_dim / 2) of x (B, T, heads, head_dim) by the angle of its position."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)

def attention_mask(positions, key_positions, config):
    """What is added to the score of a query at positions (T,) and a key at key_positions (S,) -> (T, S): 0
    where the key is one of the block_size positions up to the query, else -inf."""
    distance = positions[:, None] - key_positions
    visible = (distance >= 0) & (distance < config.block_size)
    return torch.where(visible, 0.0, -math.inf)

def attention(q, k, v, mask=None):
    """softmax(q k' / sqrt(head_dim) + mask) v. q is (B, n_head, T, head_dim), k and v are (B, n_kv_head, S,
    head_dim): neighbouring query heads share one. mask is (T, S) or (n_head, T, S); None: causal. To change
    the formula, first delete the three lines that choose a faster kernel for it."""
    kernel = faster_attention(q, k, mask)
    if kernel is not None:
        return kernel(q, k, v, mask)
    group = q.size(1) // k.size(1)
    if group > 1:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = Linear(config.n_embd, heads * config.head_dim, bias=config.bias)
        self.qkv.weight.parts = heads  # equal parts, one below the other: Muon treats each as a matrix
        self.proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        if config.qk_norm:  # per head, before the rotation, as in Qwen3
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
            k, v = cache.extend(k, v)
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
        matrices = 2 if config.use_swiglu else 1  # gate and up
        self.up = Linear(config.n_embd, matrices * config.hidden_dim, bias=config.bias)
        self.up.weight.parts = matrices
        self.down = Linear(config.hidden_dim, config.n_embd, bias=config.bias)

    def project(self, x):
        return self.down(swiglu(x) if self.config.use_swiglu else F.gelu(x))

    def forward(self, x):
        return recompute(self.project, self.up(x))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = make_norm(config.n_embd, config)
        self.attention = Attention(config)
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
    compute_dtype = None  # of the activations, and so of all arithmetic; None: that of the weights

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config.n_embd, config)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight  # tied: one matrix for both
        nn.init.normal_(self.embedding.weight, std=config.n_embd**-0.5)  # logits of size 1
        cos, sin = rope_tables(torch.arange(config.block_size), config)
        self.register_buffer('cos', cos, persistent=False)  # buffers, because torch.compile would put the
        self.register_buffer('sin', sin, persistent=False)  # computation into the kernels of every layer

    def forward(self, input_ids, targets=None, cache=None, return_logits=True):
        """input_ids (B, T) int64 -> logits, loss. Without targets: the last position's logits (B, 1,
        vocab_size), and None. With targets (B, T), of which -1 does not count: logits (B, T, vocab_size), or
        None with return_logits=False, which saves their memory, and the mean cross entropy. T is at most
        block_size; with a cache input_ids continue its text, and T may be longer."""
        if cache is not None:
            for part in input_ids.split(self.config.block_size, dim=1):
                x = self.trunk(part, cache)
            return self.logits(x[:, -1:]), None
        if input_ids.size(1) > self.config.block_size:
            raise ValueError(f'{input_ids.size(1)} positions are beyond block_size {self.config.block_size}')
        x = self.trunk(input_ids)
        if targets is None:
            return self.logits(x[:, -1:]), None
        if return_logits:
            logits = self.logits(x)
            loss = token_loss(logits.flatten(0, 1), targets.flatten())
        else:
            logits = None
            loss = in_slices(lambda x, targets: token_loss(self.logits(x), targets), x, targets, self.config)
        return logits, loss / targets.ne(-1).sum().clamp(min=1)

    def trunk(self, input_ids, cache=None):
        """(B, T) -> (B, T, C), all but the head"""
        T = input_ids.size(1)
        if cache is None:
            positions, key_positions = torch.arange(T, device=input_ids.device), None
            rope = self.cos[:T], self.sin[:T]
        else:
            positions, key_positions = cache.advance(T)
            rope = rope_tables(positions, self.config)
        x = self.embedding(input_ids)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        x = self.dropout(x)
        mask = None  # plain causal attention, which has the fastest kernels
        if key_positions is not None:
            mask = attention_mask(positions, key_positions, self.config).to(x.dtype)
        rope = [table.to(x.dtype) for table in rope]
        for block in self.blocks:
            if self.config.gradient_checkpointing and self.training:
                block = functools.partial(checkpoint, block, use_reentrant=False)
            x = block(x, rope, mask, cache)
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
    def stream(self, input_ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
               repetition_penalty=1.0, num_samples=1, generator=None, stop_token=None):
        """Yield (B,) new ids, max_new_tokens times, for prompts (B, T), or for num_samples continuations of
        one prompt (1, T). sample() explains the other options. A row repeats stop_token once it has drawn it;
        the text ends when every row has. Each token attends to the block_size positions up to itself, so T
        may be longer. Fastest after model.to(torch.bfloat16). ValueError for options or ids out of range."""
        check_drawing(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                      min_p=min_p, repetition_penalty=repetition_penalty, num_samples=num_samples)
        check_prompts(input_ids, num_samples, self.config.vocab_size)
        rows, device = max(num_samples, input_ids.size(0)), self.embedding.weight.device
        input_ids = input_ids.to(device)
        cache = KVCache(self.config.block_size, device, length=input_ids.size(1) + max_new_tokens)
        seen = None  # (B, vocab_size): the ids in each row's text so far
        if repetition_penalty != 1:
            seen = torch.zeros(rows, self.config.vocab_size, dtype=torch.bool, device=device)
            seen.scatter_(1, input_ids.expand(rows, -1), True)

        def draw(logits):  # (B, 1, vocab_size) -> (B,)
            logits = logits[:, -1]
            return sample(logits, temperature, top_k, top_p, min_p, repetition_penalty, seen, generator)

        def read_and_draw(ids):
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            return draw(self(ids[:, None], cache=cache)[0])

        step = captured(read_and_draw, device, generator)
        was_training = self.training
        self.eval()
        try:
            logits = self(input_ids, cache=cache)[0]
            if num_samples > 1:
                cache.repeat(num_samples)
                logits = logits.repeat_interleave(num_samples, dim=0)
            ids = draw(logits)
            ended = torch.zeros_like(ids, dtype=torch.bool)
            for i in range(max_new_tokens):
                if i > 0:
                    ids = step(ids).clone()  # a graph writes to the same tensor each time
                if stop_token is not None:
                    ids = ids.masked_fill(ended, stop_token)
                    ended |= ids == stop_token
                yield ids
                if stop_token is not None and ended.all():
                    break
        finally:
            self.train(was_training)

    def generate(self, input_ids, max_new_tokens, **options):
        """Append stream()'s tokens to prompts (B, T) -> (B, T + max_new_tokens), or fewer if all rows ended.
        A list of prompts of any lengths, each (T,) or a list of ids, gives a list of texts, generated one by
        one."""
        if isinstance(input_ids, list):
            prompts = [torch.as_tensor(prompt)[None] for prompt in input_ids]
            return [self.generate(prompt, max_new_tokens, **options)[0] for prompt in prompts]
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
    """Keys and values of the last positions, for each attention in the model.

    A step is one advance(T), T at most block_size, and then an extend() in each attention, always in the
    same order: the n-th extend() of a step continues the n-th of the step before. Position p is kept in slot
    p % slots, and `slot_positions` says which position each slot holds; attention_mask() needs nothing else.
    A text may go on for ever: each token attends to the block_size positions up to itself. There are twice as
    many slots, as the first token of a step still needs block_size positions when its last is written."""

    def __init__(self, block_size, device, length=2**62):
        """length: the most positions that will be read; a short text needs fewer slots"""
        slots = 8 * math.ceil(min(2 * block_size, length) / 8)  # GPUs' attention kernels want a multiple of 8
        unused = 2**62  # a position that no query reaches
        self.slot_positions = torch.full((slots,), unused, device=device)
        self.next = torch.zeros(1, dtype=torch.int64, device=device)  # position; a tensor, for CUDA graphs
        self.layers = []  # keys and values of each extend() of a step: (B, n_kv_head, slots, head_dim) * 2
        self.extended = 0  # extend() calls in this step

    def advance(self, T):
        """Start a step of T positions -> them (T,), and those of the keys that extend() will return (S,), or
        None in the first step, where they are the same: plain causal attention."""
        if self.extended != len(self.layers):
            raise ValueError(f'the cache was used {self.extended} times in the last step, not '
                             f'{len(self.layers)} times as before')
        self.is_beginning = not self.layers
        self.extended = 0
        positions = self.next + torch.arange(T, device=self.next.device)
        self.step_slots = positions % self.slot_positions.numel()
        self.slot_positions.index_copy_(0, self.step_slots, positions)
        self.next += T
        return positions, None if self.is_beginning else self.slot_positions

    def extend(self, k, v):
        """Store k and v (B, n_kv_head, T, head_dim) -> the keys and values to attend to."""
        if self.is_beginning:
            shape = (*k.shape[:2], self.slot_positions.numel(), k.size(3))
            self.layers.append((k.new_zeros(shape), v.new_zeros(shape)))
        elif self.extended == len(self.layers):
            raise ValueError('the cache is used more often in this step than in the one before')
        keys, values = self.layers[self.extended]
        self.extended += 1
        keys.index_copy_(2, self.step_slots, k)
        values.index_copy_(2, self.step_slots, v)
        return (k, v) if self.is_beginning else (keys, values)

    def repeat(self, n):
        """Go on as n copies of the one sequence read so far."""
        self.layers = [(k.repeat_interleave(n, dim=0), v.repeat_interleave(n, dim=0)) for k, v in self.layers]

LIMITS = dict(  # least and greatest value of each option of stream()
    max_new_tokens=(1, 2**40), temperature=(0, 100), top_k=(0, 2**40), top_p=(1e-9, 1), min_p=(0, 1),
    repetition_penalty=(0.01, 100), num_samples=(1, 2**16))

def check_drawing(**options):
    for name, value in options.items():
        least, most = LIMITS[name]
        if not least <= value <= most:  # false for nan, too
            raise ValueError(f'{name} is {value}: it must be from {least:g} to {most:g}')

def check_prompts(input_ids, num_samples, vocab_size):
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(f'input_ids must be (B, T) with at least one id, not {input_ids.dtype} '
                         f'{tuple(input_ids.shape)}')
    if num_samples > 1 and input_ids.size(0) > 1:
        raise ValueError(f'num_samples {num_samples} needs one prompt, not {input_ids.size(0)}')
    for id in torch.stack(input_ids.aminmax()).tolist():  # one wait for a GPU
        if not 0 <= id < vocab_size:
            raise ValueError(f'input_ids has the id {id}: the vocabulary has 0 to {vocab_size - 1}')

def sample(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seen=None,
           generator=None):
    """(B, vocab_size) -> (B,) ids: repetition_penalty on the ids that are seen, (B, vocab_size) bool (1: off;
    https://arxiv.org/abs/1909.05858, 4.1), then temperature (0: the most likely), then the top_k most likely
    (0: all), then the fewest of these that reach top_p together, and of them those at least min_p times as
    likely as the likeliest (0: all; https://arxiv.org/abs/2407.01082). Drawn as the argmax of p / Exp(1): no
    multinomial, no wait for a GPU."""
    if seen is not None:
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    p = logits.softmax(dim=-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), 0.0)
    choice = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)

# ----------------------------------------------------------------------------
# Optimizers and schedules

def inverse_root(gram):
    """About (X X')^(-1/2) of each gram X X' in (k, n, n), X of norm 1. Its product with X has singular values
    between 0.1 and 1.4, most of them near 1, so it is about the nearest orthogonal matrix. These are the
    first three steps of https://arxiv.org/abs/2505.16932, which need no more than X X', the last one times
    0.733; a fourth made training slower and no better."""
    steps = ((8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (2.8944, -2.1322, 0.4045))
    root = polynomial(gram, *steps[0])
    p = root
    for coefficients in steps[1:]:
        gram = p @ gram @ p
        p = polynomial(gram, *coefficients)
        root = p @ root
    return root

def polynomial(x, a, b, c):
    """a + b x + c x^2 of each matrix in (k, n, n)"""
    y = torch.baddbmm(x, x, x, beta=b, alpha=c)
    y.diagonal(dim1=1, dim2=2).add_(a)
    return y

class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups of parameters with a `momentum`, AdamW for those with `betas`. Muon: Nesterov momentum,
    made orthogonal for each matrix, https://kellerjordan.github.io/posts/muon. A weight with an attribute
    `parts` is so many equal matrices, one below the other. Rows are scaled to equal norms first,
    https://arxiv.org/abs/2603.28254. Products are in compute_dtype (None: that of the weights)."""

    def __init__(self, groups, compute_dtype=None):
        # fused: so that load_state_dict() moves AdamW's `step` to the device
        super().__init__(groups, dict(betas=None, weight_decay=0.0, fused=True, capturable=False))
        self.compute_dtype = compute_dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            if params and group['betas']:
                self.step_adamw(params, group['lr'], group['betas'], group['weight_decay'])
                continue
            stacks = {}  # weights of equal shape are computed together
            for p in params:
                stacks.setdefault((p.shape, getattr(p, 'parts', 1)), []).append(p)
            for (_, parts), stack in stacks.items():
                self.step_together(stack, parts, group['lr'], group['momentum'], group['weight_decay'])

    def step_adamw(self, params, lr, betas, weight_decay):
        """The kernel of torch.optim.AdamW, whose class would import torch.compile, which takes seconds."""
        for p in params:
            if not self.state[p]:
                self.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                     exp_avg_sq=torch.zeros_like(p))
        names = 'exp_avg', 'exp_avg_sq', 'step'
        averages, squares, steps = ([self.state[p][name] for p in params] for name in names)
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(params, [p.grad for p in params], averages, squares, [], steps, lr=lr,
                            beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=1e-8,
                            amsgrad=False, maximize=False)

    def step_together(self, params, parts, lr, momentum, weight_decay):
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        buffers, grads = [self.state[p]['momentum_buffer'] for p in params], [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        x = torch.stack(torch._foreach_lerp(grads, buffers, momentum))
        x = x.view(len(params) * parts, -1, x.size(-1))
        rows, columns = x.shape[1:]
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
        x = (x * (rows**-0.5 / norms)).to(self.compute_dtype or x.dtype)  # equal rows, norm 1
        wide = x if rows <= columns else x.mT  # the smaller gram
        root = inverse_root(wide @ wide.mT) * (lr * max(1, rows / columns) ** 0.5)
        change = root @ x if rows <= columns else x @ root
        change = change.to(params[0].dtype).view(len(params), *params[0].shape)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_sub_(params, change.unbind())

def hidden_and_other(model):
    """The weights of the blocks' linear layers, and every other parameter, whatever its shape."""
    linears = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    hidden = dict.fromkeys(linear.weight for linear in linears)  # a tied weight once
    for weight in hidden:
        if len(weight) % getattr(weight, 'parts', 1):
            raise ValueError(f'a weight with {len(weight)} rows is not divisible into parts {weight.parts}')
    return list(hidden), [p for p in model.parameters() if p not in hidden]

def muon(model, settings):
    """Muon with weight decay for the blocks' linear layers; AdamW without decay for the rest."""
    hidden, others = hidden_and_other(model)
    matrices = dict(params=hidden, lr=settings['muon_learning_rate'], momentum=settings['muon_momentum'],
                    weight_decay=settings['weight_decay'])
    betas = settings['beta1'], settings['beta2']
    rest = dict(params=others, lr=settings['learning_rate'], betas=betas)
    return MuonAdamW([matrices, rest], model.compute_dtype)

def adamw(model, settings):
    """AdamW for all; only parameters with two or more dimensions decay."""
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    options = dict(lr=settings['learning_rate'], betas=(settings['beta1'], settings['beta2']))
    return MuonAdamW([dict(params=matrices, weight_decay=settings['weight_decay'], **options),
                      dict(params=vectors, **options)])

OPTIMIZERS = {'muon': muon, 'adamw': adamw}  # name: function(model, settings) -> a torch.optim.Optimizer

def make_optimizer(model, settings):
    """The optimizer of settings['optimizer'], with a 'peak_lr' in each group. ValueError unless each
    parameter is in a group; torch itself refuses one that is in two."""
    optimizer = OPTIMIZERS[settings['optimizer']](model, settings)
    device = model.embedding.weight.device
    for group in optimizer.param_groups:
        group['peak_lr'] = group['lr']
        if uses_graph(device) and 'capturable' in group:  # what changes is then read from tensors
            group.update(capturable=True, lr=torch.tensor(group['lr'], device=device))
    optimized = {p for group in optimizer.param_groups for p in group['params']}
    for name, p in model.named_parameters():
        if p not in optimized:
            raise ValueError(f'{name} is in no group of the optimizer: it would not be trained')
    return optimizer

def scale_learning_rates(optimizer, scale):
    """Set each group's learning rate to this share of its peak_lr. A tensor stays the same tensor, as a CUDA
    graph reads it."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group['lr']):
            group['lr'].fill_(group['peak_lr'] * scale)
        else:
            group['lr'] = group['peak_lr'] * scale

def load_optimizer(optimizer, saved):
    """Load momenta and other state, but keep the current options. ValueError if they do not fit."""
    groups = zip(optimizer.param_groups, saved['param_groups'])
    options = [current | dict(params=group['params']) for current, group in groups]
    optimizer.load_state_dict(dict(state=saved['state'], param_groups=options))
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and name != 'step' and value.shape != p.shape:
                raise ValueError(f'{name} {tuple(value.shape)} does not fit a parameter {tuple(p.shape)}: '
                                 'was model.py reordered?')

def make_update(model, optimizer, n_micro=1, grad_clip=1.0, scaler=None, graph=True):
    """-> update(x, y): one update of the weights from n_micro micro-batches, x and y (n_micro * B, T), -> the
    mean loss and the norm of the gradients, as tensors, without synchronizing. With `graph`, on a CUDA or
    ROCm device, it is a CUDA graph: the next call overwrites the results, and Python's numbers (momentum, the
    weight of a second loss) stay as they were in the fourth call. Keep values that change in tensors."""
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    several_processes = isinstance(model, nn.parallel.DistributedDataParallel)

    def update(x, y):
        total = torch.zeros((), device=x.device)
        for i, (x_micro, y_micro) in enumerate(zip(x.chunk(n_micro), y.chunk(n_micro))):
            if several_processes:
                model.require_backward_grad_sync = i == n_micro - 1
            loss = model(x_micro, y_micro, return_logits=False)[1] / n_micro
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return total, norm

    graph = graph and all(group.get('capturable') for group in optimizer.param_groups)
    return captured(update, next(model.parameters()).device) if graph else update

def cosine(step, warmup_iters, last, cooldown):
    """Half a cosine from the end of the warm-up to update `last`."""
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup_iters) / max(1, last - warmup_iters)))

def linear(step, warmup_iters, last, cooldown):
    """Flat, then straight down over the last `cooldown` of the run."""
    return min(1.0, max(0.0, (last - step) / max(1, cooldown * last)))

SCHEDULES = {'cosine': cosine, 'linear': linear}  # the learning rate over its peak, after the warm-up

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
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
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

def checkpoint_path(path):
    """A checkpoint or a run folder -> the checkpoint itself, or the folder's best.pt, or else its ckpt.pt."""
    for file in (path, os.path.join(path, 'best.pt'), os.path.join(path, 'ckpt.pt')):
        if os.path.isfile(file):
            return file
    raise ValueError(f'there is no checkpoint {path}: "python train.py" makes one in its --out_dir, and '
                     '"python sample.py --from_hf=FOLDER" makes out-FOLDER/best.pt of a Llama or Qwen3')

def load_checkpoint(path):
    """The dict that save_checkpoint wrote to this file or run folder; ValueError if it is missing, damaged
    or from another program."""
    path = checkpoint_path(path)
    try:
        with zipfile.ZipFile(path) as archive:
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
    """The GPT of a checkpoint, ready for more training or sampling."""
    model = GPT(GPTConfig(**state['model_config']))
    try:
        model.load_state_dict(state['model'])
    except RuntimeError as error:  # it lists every weight, a line each
        odd = ' '.join(str(error).split()[5:40])
        raise ValueError(f'the weights do not fit this model.py (was it another one?): {odd} ...') from None
    return model

def start_training(config, settings, saved=None):
    """A new model, or the checkpoint's, and its optimizer, according to a script's settings."""
    torch.manual_seed(settings['seed'])
    model = load_model({**saved, 'model_config': asdict(config)}) if saved else GPT(config)
    model.to(settings['device'])
    if settings['dtype'] != 'float32':
        model.compute_dtype = getattr(torch, settings['dtype'])
    return model, make_optimizer(model, settings)

def starting_point(settings, given):
    """-> (a checkpoint or None, its path or '', {setting: value} of the checkpoint or preset, which given
    settings override). ValueError if they contradict one another."""
    if settings['resume']:
        if given.get('init_from') and 'RANK' not in os.environ:  # torchrun restarts with the same command
            raise ValueError('--resume continues a run, --init_from starts one: choose one of them')
        source = os.path.join(settings['out_dir'], 'ckpt.pt')
        saved = load_checkpoint(source)
        base = {name: value for name, value in saved['config'].items() if name in settings}
        base.update(resume=True, out_dir=settings['out_dir'], init_from='')
        changes = {name: given[name] for name in ('model_preset', 'minutes') if name in given}
        changes = changes.items() - base.items()
    elif settings['init_from']:
        source, saved = settings['init_from'], load_checkpoint(settings['init_from'])
        base = dict(saved['model_config'])
        if not settings['eval_only']:
            base['block_size'] = min(512, base['block_size'])  # to save memory; RoPE allows it
        changes = {name: given[name] for name in ('model_preset', 'minutes') if given.get(name)}.items()
    else:
        source, saved, base, changes = '', None, {}, ()
        if settings['model_preset']:
            base = presets[settings['model_preset']] | {'vocab_size': 0}
        if base and given.keys() & {'n_layer', 'n_head', 'n_embd'}:
            base['n_kv_head'] = 0  # the preset's may not divide another n_head
        if settings['eval_only']:
            raise ValueError('--eval_only needs --resume or --init_from: a new model has learned nothing')
    for name, _ in changes:
        raise ValueError(f'--{name} is for new models: {source} has its shape, and --max_iters is the length '
                         'of the run')
    return saved, source, base

def check_continues(saved, source, config, meta, data_id):
    """ValueError unless a run with these settings, on the data set of meta, can continue the checkpoint that
    was loaded from source, or start from its weights."""
    again = f'--init_from={source} starts a new run from its weights'
    if saved['tokenizer'] != meta['tokenizer']:
        raise ValueError(f'{source} and data/{config["dataset"]} have different tokenizers: '
                         f'"python prepare.py TEXT --tokenizer={source}" makes data that fits')
    for name, before in saved['model_config'].items():
        shorter = name == 'block_size' and not config['resume'] and config[name] < before  # RoPE allows it
        if config[name] != before and not shorter and name not in ('dropout', 'gradient_checkpointing'):
            raise ValueError(f'{name} is {before} in {source} and cannot become {config[name]}')
    if not config['resume']:
        return
    if 'state' not in saved.get('optimizer', {}):
        raise ValueError(f'{source} has no optimizer state that this version reads (is it a copy of best.pt, '
                         f'or older?): {again}')
    if saved['config'].get('optimizer') != config['optimizer']:
        raise ValueError(f'{source} was made by another optimizer: {again}')
    if saved['dataset_sha256'] != data_id:
        raise ValueError(f'data/{config["dataset"]} is not what {source} was trained on (another sha256): '
                         f'{again}')
    made, evaluated = saved['iter_num'], saved['iter_num'] == saved['val_step']
    if made + evaluated > config['max_iters'] and not config['eval_only']:
        raise ValueError(f'already finished ({made} of {config["max_iters"]} updates): raise --max_iters to '
                         'continue')
    if 0 < config['patience'] <= saved['evals_since_best'] and not config['eval_only']:
        raise ValueError(f'{source} stopped at update {made}, out of patience: --patience=0 continues')

# ----------------------------------------------------------------------------
# The model checks itself

def check_model(model):
    """ValueError if training, evaluation, sampling with the cache, and the model without its fast paths do
    not agree on a random text, as after a change in one path but not in the others. Dropout is off."""
    global FAST
    weight, c, compute_dtype = model.embedding.weight, model.config, model.compute_dtype
    n = min(32, c.block_size)
    ids = torch.randint(c.vocab_size, (1, n), generator=torch.Generator().manual_seed(0)).to(weight.device)
    chunks = [1, n - 3, 1, 1] if n > 3 else [1] * n  # tokens in each cached step
    fast, was_training = FAST, model.training
    model.eval()
    try:
        dtype = model.trunk(ids[:, :1]).dtype
        if compute_dtype not in (None, dtype):
            raise ValueError(f'activations are {dtype}, not {compute_dtype}: use a parameter p as cast(p, x)')
        model.compute_dtype = None  # the arithmetic is that of the weights
        expected = model(ids, ids)[0].detach()
        with torch.no_grad():
            evaluated = model(ids, ids)[0]
            cache = KVCache(c.block_size, ids.device)
            sampled = [model(part, cache=cache)[0] for part in ids.split(chunks, dim=1)]
            FAST = False
            slow = model(ids, ids)[0]
    finally:
        model.train(was_training)
        model.compute_dtype, FAST = compute_dtype, fast
    ends = torch.tensor(chunks).cumsum(0) - 1
    exact = weight.dtype == torch.float32 and weight.is_cpu  # a GPU may multiply float32 in TF32
    for what, found, wanted, advice in (
        ('evaluation', evaluated, expected, 'does something depend on whether there are gradients?'),
        ('sampling', torch.cat(sampled, dim=1), expected[:, ends],
         'does something look at other positions, or at the text so far?'),
        ('the model without its fast paths', slow, expected, 'one of them still has the old formula'),
    ):
        difference = (found - wanted).abs().max().item()
        if not difference <= (1e-3 if exact else 0.05) * wanted.abs().max().item():
            raise ValueError(f'{what} differs from training by {difference:.2g}: {advice}')

# ----------------------------------------------------------------------------
# Fast paths: for speed and memory alone. FAST = False switches them off; without this section, and with the
# plain function in each place that calls one, the program is right and slower. Only attention is written
# again; the others call the plain code.

FAST = True
LARGE = 3 * 10**6  # elements from which recompute() pays; below, it saves little and takes up to 7 % longer
MANY_LOGITS = 2**24  # the most that in_slices() makes at once on a CPU; elsewhere 64 times as many

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
    """On a CPU: attention() as plain products, which take a half to a sixth of the fused kernel's time,
    forward and backward, over up to 512 positions, and a third for one query and many keys."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if mask is None:
        mask = q.new_full((T, T), -math.inf).triu_(1)
    q = q.reshape(B * K, H // K * T, D)
    k, v = k.reshape(B * K, S, D), v.reshape(B * K, S, D)
    scores = torch.baddbmm(mask.repeat(H // K, 1), q, k.mT, alpha=D**-0.5)  # (B * K, H / K * T, S)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)

def recompute(function, x):
    """On a CPU: function(x); if x is large, only x is kept, and the rest is computed again in backward. For
    cheap functions, and for those that end with a matrix product, whose own output is not needed again."""
    keeps_too_much = x.is_cpu and x.numel() > LARGE and torch.is_grad_enabled()
    if FAST and keeps_too_much and not torch.compiler.is_compiling():
        return checkpoint(function, x, use_reentrant=False)
    return function(x)

def in_slices(loss, x, targets, config):
    """loss(x, targets), a sum over rows of x (B, T, C) and targets (B, T), in slices of rows whose logits are
    computed again in backward, so that all logits never exist together. torch.compile sees one piece."""
    x, targets = x.flatten(0, 1), targets.flatten()
    rows = (MANY_LOGITS if x.is_cpu else 64 * MANY_LOGITS) // config.vocab_size + 1
    if not FAST or len(x) <= rows or torch.compiler.is_compiling():
        return loss(x, targets)
    parts = zip(x.split(rows), targets.split(rows))
    return sum(checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)

def uses_graph(device):
    return FAST and device.type == 'cuda'

def captured(function, device, generator=None):
    """The function; on CUDA a graph of it: one launch instead of hundreds. It takes tensors of the same
    shapes in every call, and the next call overwrites the results. generator: the one that it draws from, if
    it is not the default one."""
    return Graph(function, device, generator) if uses_graph(device) else function

class Graph:
    """The first three calls run normally; the fourth is captured, and then replayed."""

    def __init__(self, function, device, generator):
        self.function, self.device, self.generator = function, device, generator
        self.calls, self.graph = 0, None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == 4:
            self.capture(inputs)
        if self.graph is None or any(kept.shape != new.shape for kept, new in zip(self.inputs, inputs)):
            return self.function(*inputs)
        for kept, new in zip(self.inputs, inputs):
            kept.copy_(new)
        self.graph.replay()
        return self.results

    def capture(self, inputs):
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            self.graph.register_generator_state(self.generator)
        try:  # thread_local: another thread reads batches
            with torch.cuda.device(self.device):
                with torch.cuda.graph(self.graph, capture_error_mode='thread_local'):
                    self.results = self.function(*self.inputs)
        except RuntimeError as error:  # torch cannot recover from a failed capture
            raise ValueError(f'this model cannot be a CUDA graph ({str(error)[:200]}): use a smaller '
                             'batch_size if memory ran out, else set FAST = False in model.py') from error

# ----------------------------------------------------------------------------

if __name__ == '__main__':
    tiny = dict(block_size=32, vocab_size=256, n_layer=3, n_head=4, n_embd=128)
    for options in (dict(), dict(n_kv_head=1, head_dim=16), dict(gradient_checkpointing=True, dropout=0.1),
                    dict(use_rms_norm=False, use_swiglu=False, qk_norm=False, bias=True)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**tiny, **options}))
        check_model(model)
        model.generate(torch.zeros(1, 1, dtype=torch.int64), 100)
        changes = ', '.join(f'{name}={value}' for name, value in options.items()) or 'the defaults'
        print(f'{model.n_params():,} parameters, {changes}: training, evaluation and sampling agree')
