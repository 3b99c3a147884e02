"""The model: a DeciLM whose blocks are not alike, in PyTorch.

A slot is an attention half and an FFN half; either may be a linear layer or missing, and a slot may be
empty. Names of parameters are those of Hugging Face checkpoints, but for the run that is fused.

`FfnRun` is the run of FFN-only blocks that FFN Fusion (arXiv 2503.18908) makes one wide FFN of. Until
`fuse` is called its blocks follow one another; then they all read the input normed by the norm of the
run's last block, and their outputs are summed, which is exactly one SwiGLU of their stacked widths.
The block behind the run stays as it is, as the paper leaves out the last of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Slot:
    """One entry of `block_configs`. `attention` is a GQA group size, "linear" or None; `ffn` a width, "linear" or None."""

    attention: int | str | None = None
    ffn: int | str | None = None


@dataclass(frozen=True)
class Config:
    """The shape before fusion: `run` is the span of FFN-only slots that become one."""

    vocabulary: int = 512
    hidden: int = 192
    heads: int = 6
    eps: float = 1e-5
    context: int = 512
    rope_theta: float = 10_000.0
    rope_scaling: dict = field(
        default_factory=lambda: {
            "factor": 4.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 128,
            "rope_type": "llama3",
        }
    )
    slots: tuple[Slot, ...] = (
        Slot(2, 256),
        Slot(3, 256),
        Slot(2, None),
        Slot(3, 512),
        Slot("linear", 256),
        Slot(2, "linear"),
        Slot(None, 512),
        Slot(None, 512),
        Slot(None, 512),
        Slot(None, 512),
        Slot(None, 256),
        Slot(6, 256),
    )
    run: tuple[int, int] = (6, 10)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def fused_slots(self) -> tuple[Slot, ...]:
        """The slots after fusion: the run's last slot has the width of all, the others are empty."""
        start, end = self.run
        width = sum(slot.ffn for slot in self.slots[start:end])
        empty = (Slot(),) * (end - start - 1)
        return (*self.slots[:start], *empty, Slot(None, width), *self.slots[end:])


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def inverse_frequencies(config: Config) -> Tensor:
    """RoPE frequencies with Llama 3.1's scaling: short waves stay, long ones stretch, those between blend."""
    scaling, dim = config.rope_scaling, config.head_dim
    plain = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = ((waves - low) / (high - low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling["factor"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, heads, tokens, head_dim]; dimension j turns together with j + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention, causal."""

    def __init__(self, config: Config, group: int):
        super().__init__()
        self.head_dim = config.head_dim
        rows = config.heads // group * config.head_dim
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, rows, bias=False)
        self.v_proj = nn.Linear(config.hidden, rows, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list | None) -> Tensor:
        """`past` holds keys and values of earlier tokens, and gets those of these."""
        batch, tokens, hidden = x.shape
        q, k, v = (
            part(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if past is not None:
            past[:] = [k, v]
        return self.o_proj(attend(q, k, v).transpose(1, 2).reshape(batch, tokens, hidden))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; q: [batch, heads, tokens, head_dim], k and v: [batch, KV heads, context, head_dim].

    Plain products, a group's queries side by side: on short sequences PyTorch's own attention spends a
    third of a training step on its way back.
    """
    batch, heads, tokens, head_dim = q.shape
    kv_heads, context = k.shape[1:3]
    scores = q.reshape(batch, kv_heads, -1, head_dim) @ k.transpose(2, 3) * head_dim**-0.5
    future = torch.full((tokens, context), -torch.inf, dtype=scores.dtype).triu(1 + context - tokens)
    weights = (scores.view(batch, heads, tokens, context) + future).softmax(dim=-1)
    out = weights.view(batch, kv_heads, -1, context) @ v
    return out.view(batch, heads, tokens, head_dim)


class LinearAttention(nn.Module):
    """What stands in the place of an attention that looks at no other token."""

    def __init__(self, config: Config):
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list | None) -> Tensor:
        return self.linear_attn(x)


class Ffn(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LinearFfn(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.linear_mlp = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_mlp(x)


class Block(nn.Module):
    """A slot's halves, each with its norm, where there are any."""

    def __init__(self, config: Config, slot: Slot):
        super().__init__()
        self.self_attn = self.mlp = None
        if slot.attention is not None:
            linear = slot.attention == "linear"
            self.self_attn = LinearAttention(config) if linear else Attention(config, slot.attention)
            self.input_layernorm = RmsNorm(config.hidden, config.eps)
        if slot.ffn is not None:
            linear = slot.ffn == "linear"
            self.mlp = LinearFfn(config.hidden) if linear else Ffn(config.hidden, slot.ffn)
            self.post_attention_layernorm = RmsNorm(config.hidden, config.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list | None) -> Tensor:
        if self.self_attn is not None:
            x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        if self.mlp is not None:
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class DeciLm(nn.Module):
    """The whole model; `is_fused` says which of the two models it is."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.is_fused = config, False
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config, slot) for slot in config.slots)
        self.norm = RmsNorm(config.hidden, config.eps)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        angles = torch.outer(torch.arange(config.context, dtype=torch.float64), inverse_frequencies(config))
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Normal weights, those that write to the residual stream smaller by its number of writers."""
        writers = sum((slot.attention is not None) + (slot.ffn is not None) for slot in self.config.slots)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            writes = any(part in name for part in ("o_proj", "down_proj", "linear_"))
            std = 0.02 if "embed" in name or "lm_head" in name else weight.shape[1] ** -0.5
            nn.init.normal_(weight, std=std / math.sqrt(writers) if writes else std)

    def fuse(self) -> None:
        """From now on the run's blocks share their last one's norm and are summed."""
        self.is_fused = True

    def _fused_run(self, x: Tensor) -> Tensor:
        run = self.layers[slice(*self.config.run)]
        normed = run[-1].post_attention_layernorm(x)
        return x + sum(block.mlp(normed) for block in run)

    def trunk(self, ids: Tensor, pasts: list | None = None, start: int = 0) -> Tensor:
        """ids: [batch, tokens], the first at position `start`; the last norm's output."""
        cos, sin = (table[start : start + ids.shape[1]] for table in (self.cos, self.sin))
        x, (first, end) = self.embed_tokens(ids), self.config.run
        for slot, block in enumerate(self.layers):
            if not (self.is_fused and first <= slot < end):
                x = block(x, cos, sin, pasts[slot] if pasts else None)
            elif slot == first:
                x = self._fused_run(x)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, [batch, tokens, vocabulary]."""
        return self.lm_head(self.trunk(ids))
