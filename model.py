"""The network: a GPT with RoPE, grouped-query attention, SwiGLU and RMSNorm; its optimizer, generation, checkpoints.

    python model.py        # the presets, and a forward, a backward and a generation as a self-check
"""

import functools
import math
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

# near 10M, 25M, 80M and 350M parameters, the embedding (which is also the head) included
presets = {
    'tiny': dict(block_size=256, vocab_size=8192, n_layer=7, n_head=5, n_kv_head=1, n_embd=320),
    'small': dict(block_size=512, vocab_size=8192, n_layer=8, n_head=8, n_kv_head=2, n_embd=512),
    'medium': dict(block_size=1024, vocab_size=16384, n_layer=16, n_head=10, n_kv_head=2, n_embd=640),
    'large': dict(block_size=2048, vocab_size=32768, n_layer=28, n_head=16, n_kv_head=4, n_embd=1024),
}


@dataclass
class GPTConfig:
    block_size: int = 256  # positions a token can look back on, itself included
    vocab_size: int = 8192
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 2  # divides n_head
    n_embd: int = 384
    mlp_ratio: float = 2.66  # hidden width over n_embd; SwiGLU has three matrices, so 8/3 costs what 4 costs GELU
    dropout: float = 0.0
    bias: bool = False
    use_rms_norm: bool = True  # else LayerNorm
    use_swiglu: bool = True  # else GELU
    qk_norm: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} does not divide into n_head {self.n_head}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} does not divide into n_kv_head {self.n_kv_head}')
        if self.head_dim % 2:
            raise ValueError(f'RoPE turns pairs: n_embd {self.n_embd} / n_head {self.n_head} must be even')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}: it must be at least 0 and below 1')
        if self.mlp_ratio <= 0:
            raise ValueError(f'mlp_ratio is {self.mlp_ratio}: it must be above 0')

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def hidden_dim(self):
        return math.ceil(self.mlp_ratio * self.n_embd / 64) * 64


# ----------------------------------------------------------------------------
# The parts. Where autograd would keep or move more than the mathematics needs, the backward is written out: on a CPU
# these elementwise passes take as long as the matrix products, and what is kept for backward is most of the memory.


class RMSNorm(Function):
    """x / rms(x) over the last dimension; https://arxiv.org/abs/1910.07467 (4). No gain: every norm but the last is
    followed by a matrix that can hold it. Only the output is kept for backward, in autocast's precision, as the next
    matrix keeps it anyway."""

    @staticmethod
    def forward(ctx, x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = size.square_().div_(x.size(-1)).add_(1e-6).rsqrt_()  # 1 / rms(x)
        kind = x.device.type
        lower = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        y = (x * scale).to(torch.get_autocast_dtype(kind) if lower else x.dtype)
        ctx.save_for_backward(y, scale)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True, dtype=torch.float32).div_(-y.size(-1))
        return (torch.addcmul(grad, y, along.to(y.dtype)) * scale).to(ctx.dtype)


def rotate(x, cos, sin):
    """RoPE, https://arxiv.org/abs/2104.09864 (34), half against half as in Hugging Face's Llama: each pair
    (i, i + head_dim / 2) of x (B, T, heads, head_dim) turned by its position's angle; cos, sin from rope_table."""
    return (x * cos).addcmul_(x.roll(x.size(-1) // 2, dims=-1), sin).to(x.dtype)


def rope_table(start, length, head_dim, device=None):
    """cos and sin (length, 1, head_dim) of the positions from start on, with the minus of the first half in sin. The
    angles are made in float64 on the CPU, so that positions in the millions still turn by the right one."""
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device='cpu') / head_dim)
    angle = torch.outer(torch.arange(start, start + length, dtype=torch.float64, device='cpu'), frequency).unsqueeze(1)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    return cos.float().to(device), sin.float().to(device)


def swiglu(gate_up):
    """silu(gate) * up, (..., 2 * hidden) -> (..., hidden); https://arxiv.org/abs/2002.05202 (5)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class SwiGLULinear(Function):
    """F.linear(swiglu(gate_up), weight, bias) that keeps its arguments alone for backward: what swiglu gives is made a
    second time there."""

    @staticmethod
    def forward(ctx, gate_up, weight, bias):
        ctx.save_for_backward(gate_up, weight)
        ctx.biased = bias is not None
        return F.linear(swiglu(gate_up), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_up)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        grad_gate.copy_(gate).sigmoid_()  # one exponential serves both halves
        grad_up.copy_(gate).mul_(grad_gate)  # silu
        rows = grad.flatten(0, -2)
        grad_weight = (rows.t() @ (grad_up * up).flatten(0, -2)).to(weight.dtype)
        grad_y = grad @ weight.to(grad.dtype)
        grad_gate.addcmul_(grad_up, grad_gate, value=-1).add_(grad_up).mul_(grad_y * up)
        grad_up.mul_(grad_y)
        return grads, grad_weight, rows.sum(0).to(weight.dtype) if ctx.biased else None


class LinearCrossEntropy(Function):
    """Mean cross entropy of (x @ weight.T) against targets, x (N, C), weight (V, C), targets (N,), -1 does not count.
    Logits and both gradients are made a slice of rows at a time, so that (N, V) never exists."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        counted = targets.ne(-1).sum().clamp(min=1)
        loss = torch.zeros((), device=x.device)
        wanted = x.requires_grad or weight.requires_grad  # False while evaluating
        grad_x, grad_w = (torch.empty_like(x), torch.zeros_like(weight)) if wanted else (None, None)
        n = x.size(0)
        rows = n if n * weight.size(0) <= 2**24 else min(8192, math.ceil(n / 16))
        for i in range(0, n, rows):
            h, t = x[i : i + rows], targets[i : i + rows].unsqueeze(1)
            logits = F.linear(h, weight)  # (rows, V)
            kept, t = t.ne(-1), t.clamp(min=0)
            log_p = logits.log_softmax(dim=-1, dtype=torch.float32)
            loss -= (log_p.gather(1, t) * kept).sum()
            if wanted:
                d = log_p.exp_().scatter_add_(1, t, -torch.ones_like(t, dtype=log_p.dtype)).mul_(kept).to(logits.dtype)
                grad_x[i : i + rows] = d @ weight.to(d.dtype)
                if d.dtype == grad_w.dtype:
                    grad_w.addmm_(d.t(), h)
                else:  # autocast: slices are added in the weight's precision; 64 keeps a slice's sum in float16's range
                    grad_w.add_(d.t() @ (h / 64).to(d.dtype), alpha=64)
                del d
            del logits, log_p  # before the next ones are made
        ctx.save_for_backward(grad_x, grad_w, counted)
        return loss / counted

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w, counted = ctx.saved_tensors
        return grad_x.mul_(grad / counted), grad_w.mul_(grad / counted), None  # in place: a second backward is an error


@functools.cache
def shares(n, parts):
    """0 ... n - 1, and where each of so many parts of it begins."""
    return torch.arange(n), torch.arange(0, n, math.ceil(n / parts))


def linear(x, weight, bias=None):
    """F.linear. Where lay_out_for_decoding() has been, one row (on a CPU, each new token's work) is multiplied as a sum of
    the matrix's columns weighted by x, a share for each thread: embedding_bag reads memory as fast as a plain sum does,
    45 GB/s where the products of MKL and oneDNN, which are made for many rows, reach 20 to 28."""
    if weight.stride(0) > 1 or x.numel() > x.size(-1) or x.dtype != weight.dtype or not x.is_cpu:
        return F.linear(x, weight, bias)
    parts = torch.embedding_bag(weight.t(), *shares(x.numel(), torch.get_num_threads()), False, 0, False, x.flatten())[0]
    y = parts.sum(0).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def norm(x, config):
    """RMSNorm or LayerNorm over the last dimension, without parameters."""
    if not config.use_rms_norm:
        return F.layer_norm(x, x.shape[-1:])
    return RMSNorm.apply(x) if torch.is_grad_enabled() else F.rms_norm(x, x.shape[-1:], eps=1e-6)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope, cache=None):
        """(B, T, C), (cos, sin) -> (B, T, C)."""
        c, (B, T, C) = self.config, x.shape
        qkv = self.qkv(x).view(B, T, c.n_head + 2 * c.n_kv_head, c.head_dim)
        qk, v = qkv.split((c.n_head + c.n_kv_head, c.n_kv_head), dim=2)
        if c.qk_norm:  # per head, before the rotation, where Qwen3 has it
            qk = norm(qk, c)
        q, k = rotate(qk, *rope).split((c.n_head, c.n_kv_head), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)
        group = c.n_head // c.n_kv_head
        p_drop = c.dropout if self.training else 0.0
        if T == 1 and cache is not None:  # the queries that share a head take the place of T: nothing is repeated
            y = F.scaled_dot_product_attention(q.reshape(B, c.n_kv_head, group, c.head_dim), k, v, attn_mask=mask)
            y = y.reshape(B, 1, C)
        elif cache is None and T <= 512 and q.device.type == 'cpu':
            # plain products: on short rows forward and backward take a half to a sixth of the fused kernel's time
            q = q.reshape(B * c.n_kv_head, group * T, c.head_dim)
            k, v = (t.reshape(-1, T, c.head_dim) for t in (k, v))
            future = q.new_full((T, T), -math.inf).triu_(1).repeat(group, 1)
            p = torch.baddbmm(future, q, k.mT, alpha=c.head_dim**-0.5).softmax(-1)  # (B * n_kv_head, group * T, T)
            y = torch.bmm(F.dropout(p, p_drop), v).view(B, c.n_head, T, c.head_dim).transpose(1, 2).reshape(B, T, C)
        else:
            if group > 1 and q.device.type == 'cpu':  # enable_gqa takes 1.2 times as long there
                k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, p_drop, is_causal=mask is None, enable_gqa=k.size(1) != c.n_head)
            y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.proj(y), c.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.up = Linear(config.n_embd, config.hidden_dim * (2 if config.use_swiglu else 1), bias=config.bias)
        self.down = Linear(config.hidden_dim, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.up(x)
        if self.config.use_swiglu and torch.is_grad_enabled():  # where a change to down has to be made, too
            x = SwiGLULinear.apply(x, self.down.weight, self.down.bias)
        else:
            x = self.down(swiglu(x) if self.config.use_swiglu else F.gelu(x))
        return F.dropout(x, self.config.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, rope, cache=None):
        x = x + self.attention(norm(x, self.config), rope, cache)
        return x + self.mlp(norm(x, self.config))


class KVCache:
    """Keys and values of the last block_size positions, a ring: position p lies in slot p % block_size. Past block_size
    this is sliding-window attention: the meaning is a forward over everything with a banded mask of that width."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (config.n_layer, batch_size, config.n_kv_head, config.block_size, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.cos, self.sin = rope_table(0, config.block_size, config.head_dim, device)  # of this lap around the ring
        self.config, self.position, self.lap = config, 0, 0
        # On a GPU one token's step has fixed shapes, every slot read and a mask on the empty ones, so that a graph can
        # hold it; `fixed` has its slot and the last filled one. Elsewhere only the filled slots are read.
        on_gpu = torch.device(device).type == 'cuda'
        self.fixed = torch.zeros(2, 1, dtype=torch.int64, device=device) if on_gpu else None

    def place(self, T):
        """Get ready for the next T positions, which lie in one lap."""
        size = self.config.block_size
        lap, self.start = divmod(self.position, size)
        if lap != self.lap:
            self.lap = lap
            cos, sin = rope_table(self.position - self.start, size, self.config.head_dim)
            self.cos.copy_(cos)
            self.sin.copy_(sin)
        self.mask = None
        if T > 1 and self.position > 0:
            past = min(self.position, size - 1)
            self.mask = torch.ones(T, past + T, dtype=torch.bool, device=self.k.device).tril(past).triu(past - size + 1)
        if self.fixed is not None:
            self.fixed[0].fill_(self.start)
            self.fixed[1].fill_(min(self.position, size - 1))

    def rope(self, T):
        if T == 1 and self.fixed is not None:
            return self.cos.index_select(0, self.fixed[0]), self.sin.index_select(0, self.fixed[0])
        return self.cos[self.start : self.start + T], self.sin[self.start : self.start + T]

    def extend(self, layer, k, v):
        """Store k and v (B, n_kv_head, T, head_dim); return the keys, values and mask (or None) to attend with."""
        old_k, old_v, T, start = self.k[layer], self.v[layer], k.size(2), self.start
        if T == 1 and self.fixed is not None:
            old_k.index_copy_(2, self.fixed[0], k)
            old_v.index_copy_(2, self.fixed[0], v)
            return old_k, old_v, torch.arange(self.config.block_size, device=k.device) <= self.fixed[1]
        if T == 1:
            old_k.narrow(2, start, 1).copy_(k)
            old_v.narrow(2, start, 1).copy_(v)
            filled = min(self.position + 1, self.config.block_size)
            return old_k.narrow(2, 0, filled), old_v.narrow(2, 0, filled), None
        older = [slice(start + 1, None)] * (self.lap > 0) + [slice(0, start)]  # what a window can still reach, in order
        keys = torch.cat([*(old_k[:, :, slots] for slots in older), k], dim=2)
        values = torch.cat([*(old_v[:, :, slots] for slots in older), v], dim=2)
        old_k[:, :, start : start + T], old_v[:, :, start : start + T] = k, v
        return keys, values, self.mask

    def repeat(self, n):
        """Go on as n copies of the one sequence read so far."""
        self.k, self.v = self.k.repeat_interleave(n, dim=1), self.v.repeat_interleave(n, dim=1)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)  # its matrix is the head as well
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        for name, table in zip(('cos', 'sin'), rope_table(0, config.block_size, config.head_dim)):
            self.register_buffer(name, table, persistent=False)
        for p in self.parameters():
            if p.dim() < 2:
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=(1 if p is self.embedding.weight else 0.5 * p.size(1) ** 0.5) / p.size(1))

    def forward(self, input_ids, targets=None, cache=None, return_logits=True):
        """(B, T) int64 -> logits, loss. With targets (B, T), of which -1 does not count: (B, T, vocab_size) and a scalar;
        return_logits=False gives None and the scalar, and never holds all logits at once. Without targets: the last
        position's (B, 1, vocab_size) and None. T is at most block_size, or with a cache, which it continues, any."""
        size = self.config.block_size
        if cache is not None:
            while input_ids.size(1):
                part, input_ids = input_ids.tensor_split([size - cache.position % size], dim=1)  # one lap at a time
                cache.place(part.size(1))
                logits = self.continued(part, cache)
                cache.position += part.size(1)
            return logits, None
        if input_ids.size(1) > size:
            raise ValueError(f'{input_ids.size(1)} positions are more than block_size {size}')
        x = self.trunk(input_ids, (self.cos[: input_ids.size(1)], self.sin[: input_ids.size(1)]))
        if targets is None:
            return F.linear(x[:, -1:], self.embedding.weight), None
        if not return_logits:
            return None, LinearCrossEntropy.apply(x.flatten(0, 1), self.embedding.weight, targets.flatten())
        logits = F.linear(x, self.embedding.weight)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def trunk(self, input_ids, rope, cache=None):
        x = F.dropout(self.embedding(input_ids), self.config.dropout, self.training)
        for block in self.blocks:
            if self.config.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        return norm(x, self.config)

    def continued(self, input_ids, cache):
        x = self.trunk(input_ids, cache.rope(input_ids.size(1)), cache)
        return linear(x[:, -1:], self.embedding.weight)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Of a training step, forward and backward: 6 N + 12 L H Q T; appendix B of https://arxiv.org/abs/2204.02311."""
        c = self.config
        return 6 * self.n_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def lay_out_for_decoding(self):
        """Store the matrices column by column, same shape, same values, as linear() wants them for one row on a CPU."""
        for p in self.parameters():
            if p.dim() == 2:
                p.data = p.data.t().contiguous().t()

    @torch.no_grad()
    def stream(self, input_ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, num_samples=1, generator=None,
               stop_token=None, cache=None):
        """Yield max_new_tokens times (B,) new ids for the prompts (B, T), or for num_samples goes at one prompt (1, T).
        A row that has drawn stop_token repeats it; the text ends when every row has. With a cache, input_ids go on from
        what it has read. T and max_new_tokens have no limit: a token sees the block_size positions up to itself."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f'input_ids must be (B, T) with at least one token each, not {tuple(input_ids.shape)}')
        if num_samples > 1 and input_ids.size(0) > 1:
            raise ValueError(f'num_samples {num_samples} wants one prompt, not {input_ids.size(0)}')
        if max_new_tokens < 1:
            raise ValueError(f'max_new_tokens is {max_new_tokens}: it must be at least 1')
        weight = self.embedding.weight
        was_training = self.training
        self.eval()
        try:
            input_ids = input_ids.to(weight.device)
            if cache is None:
                cache = KVCache(self.config, input_ids.size(0), weight.device, weight.dtype)
            logits = self(input_ids, cache=cache)[0]
            if num_samples > 1:
                cache.repeat(num_samples)
                logits = logits.repeat_interleave(num_samples, dim=0)
            step = lambda ids: self(ids, cache=cache)[0]
            if weight.device.type == 'cuda' and max_new_tokens > 1:
                step = captured(self, cache)
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
            self.train(was_training)

    def generate(self, input_ids, max_new_tokens, **options):
        """The prompts (B, T) with what stream() adds to them: (B, T + max_new_tokens), or fewer if all rows stopped."""
        new = torch.stack(list(self.stream(input_ids, max_new_tokens, **options)), dim=1)
        return torch.cat((input_ids.to(new.device).expand(new.size(0), -1), new), dim=1)


def captured(model, cache):
    """The one-token step as a CUDA graph: one launch a token instead of some hundred."""
    ids = torch.zeros(cache.k.size(1), 1, dtype=torch.int64, device=cache.k.device)
    cache.place(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model.continued(ids, cache)  # warms up; the slot it writes is written again by the first real step
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):  # another thread may be preparing batches
        logits = model.continued(ids, cache)

    def step(next_ids):
        cache.place(1)
        ids.copy_(next_ids)
        graph.replay()
        cache.position += 1
        return logits

    return step


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """(B, vocab_size) -> (B,) ids: temperature (0: the most likely), then the top_k most likely (0: all), then the
    fewest of these that reach top_p together. Drawn as the argmax of p / Exp(1): no multinomial, no wait for a GPU."""
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


def create_model(preset, **changes):
    """A GPT of one of the presets; changes are GPTConfig fields."""
    if preset not in presets:
        raise ValueError(f"there is no preset '{preset}': take one of {', '.join(presets)}")
    return GPT(GPTConfig(**{**presets[preset], **changes}))


# ----------------------------------------------------------------------------
# Optimizers


def inverse_root(gram, steps=5):
    """About (X X')^(-1/2) of each gram X X' in (k, n, n), X of norm 1. Its product with X has singular values of about 0.7
    to 1.2 (all but the very smallest), so it is about the nearest orthogonal matrix. This is the quintic of https://kellerjordan.github.io/posts/muon, which needs no more than X X'. It
    wants float32 (TF32 will do): in bfloat16 a spectrum over two decades came out wrong by 18 %."""
    a, b, c = 3.4445, -4.7750, 2.0315
    for i in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        root = p @ root if i else p
        if i + 1 < steps:
            gram = p @ gram @ p
    return root


class Muon(torch.optim.AdamW):
    """Groups with muon=True take Muon's step, https://kellerjordan.github.io/posts/muon: Nesterov momentum, made
    orthogonal for each matrix. The inverse roots, which are most of the work, are made together, and in a distributed run
    shared out over the processes. The other groups are AdamW's."""

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
                    self.muon_step(params, **{name: group[name] for name in ('lr', 'momentum', 'weight_decay')})
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
        if dist.is_initialized():
            world, share = dist.get_world_size(), math.ceil(len(updates) / dist.get_world_size())
            mine = [updates[i % len(updates)] for i in range(share * dist.get_rank(), share * (dist.get_rank() + 1))]
            root = inverse_root(torch.stack([u @ u.mT for u in mine]))
            roots = root.new_empty(share * world, *root.shape[1:])
            dist.all_gather_into_tensor(roots, root)
        else:
            roots = inverse_root(torch.stack([u @ u.mT for u in updates]))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        for p, root, u in zip(params, roots, updates):
            scale = max(1, p.size(0) / p.size(1)) ** 0.5
            if p.size(0) > p.size(1):
                p.addmm_(u.mT, root, alpha=-lr * scale)  # root is symmetric
            else:
                p.addmm_(root, u, alpha=-lr * scale)


def make_optimizer(model, kind, learning_rate, betas, muon_learning_rate, muon_momentum, weight_decay):
    """'adamw', or 'muon': the blocks' matrices by Muon, embedding and biases by AdamW. Decay is on matrices only, with
    Muon on the blocks' only. Each group has its 'peak_lr'."""
    if kind not in ('adamw', 'muon'):
        raise ValueError(f"optimizer is '{kind}': it must be muon or adamw")
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    embedding = dict(params=[model.embedding.weight], weight_decay=weight_decay if kind == 'adamw' else 0.0)
    groups = [dict(params=matrices, weight_decay=weight_decay), embedding, dict(params=vectors, weight_decay=0.0)]
    if kind == 'muon':
        groups[0].update(muon=True, lr=muon_learning_rate, momentum=muon_momentum)
    made = Muon([g for g in groups if g['params']], lr=learning_rate, betas=betas, fused=True)
    for group in made.param_groups:
        group['peak_lr'] = group['lr']
    return made


# ----------------------------------------------------------------------------
# Checkpoints: dicts of tensors and plain values, which torch.load reads without running anything

COUNTS = dict(iter_num=int, tokens_seen=int, best_step=int, elapsed=float)  # updates, tokens, updates, seconds
FIELDS = dict(COUNTS, model=dict, model_config=dict, config=dict, tokenizer=dict, dataset_sha256=str, val_loss=float,
              best_val_loss=float, scaler=dict)  # ckpt.pt has the optimizer as well


def save_checkpoint(path, state):
    """Written aside, flushed to disk, renamed: whatever happens, path is the old file or the new one, whole."""
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


def load_checkpoint(path, device='cpu'):
    """The dict that save_checkpoint wrote; ValueError where the file is missing, damaged or of another program."""
    if not os.path.isfile(path):
        raise ValueError(f'there is no checkpoint {path}: "python train.py" makes one in its --out_dir')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not look at the checksums
        if damaged:
            raise ValueError(f'{path} is damaged ({damaged} fails its checksum): take another copy')
        state = torch.load(path, map_location=device, weights_only=True)
    except (zipfile.BadZipFile, EOFError):
        raise ValueError(f'{path} is not a checkpoint, or not all of one: take another copy') from None
    except (pickle.UnpicklingError, RuntimeError):
        raise ValueError(f'{path} is not a checkpoint of this program, or would run code, which is not allowed') from None
    for name, kind in FIELDS.items():
        value = state.get(name) if isinstance(state, dict) else None
        if not isinstance(value, kind) or name in COUNTS and not 0 <= value < 2**53:
            raise ValueError(f'{path} is a file of PyTorch, but not a checkpoint of this program (no sound {name})')
    try:
        state['model_config'] = asdict(GPTConfig(**state['model_config']))
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path} has no sound model_config ({error})') from None
    return state


def load_model(state):
    """The GPT of a checkpoint, its tied embedding one tensor, ready for more training or sampling."""
    try:
        config = GPTConfig(**state['model_config'])
        if config.n_layer > len(state['model']):  # before so many are made
            raise ValueError(f'there are no {config.n_layer} layers of them')
        model = GPT(config)
        model.load_state_dict(state['model'])
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise ValueError(f"the checkpoint's weights do not fit its model_config ({str(error).splitlines()[0]})") from None
    return model.to(next(iter(state['model'].values())).device)


def load_optimizer(optimizer, state):
    """A checkpoint's optimizer state into this optimizer, whose own options, which may have changed, stay."""
    options = [{name: value for name, value in group.items() if name != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, options):
            group.update(own)
            wanted = {'step', 'momentum_buffer'} if group.get('muon') else {'step', 'exp_avg', 'exp_avg_sq'}
            for p in group['params'] if optimizer.state else ():  # float16 may have skipped every update so far
                shapes = {name: value.shape for name, value in optimizer.state[p].items()}
                if shapes != {name: () if name == 'step' else p.shape for name in wanted}:
                    raise ValueError(f'{shapes} for weights of {tuple(p.shape)}')
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the checkpoint's optimizer state does not fit its weights ({error})") from None


if __name__ == '__main__':
    for name, shape in presets.items():
        with torch.device('meta'):
            model = create_model(name)
        c = model.config
        print(f'{name:7} {model.n_params() / 1e6:6.1f}M parameters  {model.flops_per_token() / 1e9:5.2f} GFLOP a training token  '
              f'{2 * 2 * c.n_layer * c.n_kv_head * c.head_dim:6,} bytes of KV cache a token in bfloat16')
    torch.manual_seed(0)
    model = create_model('tiny', vocab_size=65, n_layer=2)
    ids = torch.randint(65, (2, 33))
    loss = model(ids[:, :-1], ids[:, 1:])[1]
    loss.backward()
    print(f'forward: loss {loss:.3f}, ln(65) is {math.log(65):.3f}')
    print(f'backward: gradient norm {torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]):.3f}')
    print(f'generate: {model.generate(ids[:1, :5], 10)[0].tolist()}')
