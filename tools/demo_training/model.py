"""A compact trainable Mamba-2 in plain PyTorch, its parameters named as in transformers.

One group (G = 1) and a tied head, which is what the demo uses. The package's own model is
written for exporting; this one is written for a fast backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the model; the defaults are the demo's (6,233,120 parameters)."""

    vocab_size: int = 4096  # V
    d_model: int = 256  # D
    n_layer: int = 12
    expand: int = 2
    d_state: int = 64  # N
    head_dim: int = 64  # P
    d_conv: int = 4  # K
    norm_eps: float = 1e-5
    chunk_size: int = 256  # Q written to config.json; training uses train_chunk
    train_chunk: int = 64

    @property
    def d_inner(self) -> int:
        """E."""
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        """H."""
        return self.d_inner // self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C side by side."""
        return self.d_inner + 2 * self.d_state


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square, times weight; float32 in and out. [..., D]"""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """The scan h = exp(dt a) h + dt b x, y = c h, chunk by chunk as matrix products.

    Decays are float32; the large products run in x's dtype.

    Args:
        x: [B,L,H,P]; dt: float32 [B,L,H]; a: negative float32 [H]; b, c: [B,L,N].
        chunk: Q; L is padded to a multiple of it with steps that change nothing (dt = 0).

    Returns:
        y, [B,L,H,P] in x's dtype.

    Source: Dao and Gu, "Transformers are SSMs" (2024), listing 1.
    """
    batch, length, heads, head_dim = x.shape
    if pad := -length % chunk:
        x, b, c = F.pad(x, (0, 0, 0, 0, 0, pad)), F.pad(b, (0, 0, 0, pad)), F.pad(c, (0, 0, 0, pad))
        dt = F.pad(dt, (0, 0, 0, pad))
    n_chunk = x.shape[1] // chunk
    x = (x * dt[..., None].to(x.dtype)).view(batch, n_chunk, chunk, heads, head_dim)
    b, c = (t.view(batch, n_chunk, chunk, -1) for t in (b, c))
    total = (dt * a).view(batch, n_chunk, chunk, heads).cumsum(2)  # log decay, [B,c,Q,H]

    by_head = total.transpose(2, 3)  # [B,c,H,Q]
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    within = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(future, -math.inf).exp()
    scores = c @ b.transpose(-1, -2)  # [B,c,Q,Q], shared by the heads
    y = (scores[:, :, None] * within).to(x.dtype) @ x.transpose(2, 3)  # [B,c,H,Q,P]

    # Heads share b and c, so these two are one product over all H * P rows.
    to_end = (total[:, :, -1:] - total).exp()[..., None].to(x.dtype)
    written = (x * to_end).flatten(3).transpose(-1, -2) @ b  # [B,c,HP,N]
    states = carry(written.float().unflatten(2, (heads, head_dim)), total[:, :, -1])
    read = (c @ states.flatten(2, 3).to(x.dtype).transpose(-1, -2)).view_as(x)  # [B,c,Q,H,P]
    y = y.transpose(2, 3) + read * total.exp()[..., None].to(x.dtype)
    return y.reshape(batch, -1, heads, head_dim)[:, :length]


def carry(written: Tensor, log_decay: Tensor) -> Tensor:
    """State at the start of each chunk from what every chunk wrote. [B,c,H,P,N], float32

    Args:
        written: float32 [B,c,H,P,N].
        log_decay: float32 [B,c,H], of a whole chunk.
    """
    batch, n_chunk, heads = log_decay.shape
    total = F.pad(log_decay, (0, 0, 1, 0)).cumsum(1).transpose(1, 2)  # [B,H,c+1]
    # Chunk z's state reaches the start of chunk t > z through the chunks between them.
    between = total[..., :-1, None] - total[..., None, 1:]  # [B,H,t,z]
    keep = torch.ones(n_chunk, n_chunk, dtype=torch.bool, device=written.device).tril(-1)
    weights = between.masked_fill(~keep, -math.inf).exp()
    with torch.autocast(written.device.type, enabled=False):
        flat = written.transpose(1, 2).reshape(batch, heads, n_chunk, -1)
        return (weights @ flat).view(batch, heads, n_chunk, *written.shape[3:]).transpose(1, 2)


class Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Mixer(nn.Module):
    """The Mamba-2 block proper: projections, causal convolution, scan, gated norm."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        inner, heads = config.d_inner, config.n_heads
        self.in_proj = nn.Linear(config.d_model, inner + config.conv_dim + heads, bias=False)
        # Only holds its weights: shifted sums are faster than a depthwise convolution on a GPU.
        self.conv1d = nn.Conv1d(
            config.conv_dim, config.conv_dim, config.d_conv, groups=config.conv_dim
        )
        dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = Norm(inner, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)
        with torch.no_grad():
            self.conv1d.bias.zero_()
            self.out_proj.weight /= math.sqrt(2 * config.n_layer)

    def conv(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution and SiLU. [B,L,C]"""
        length, width = x.shape[1], self.config.d_conv
        weight, bias = self.conv1d.weight[:, 0].to(x.dtype), self.conv1d.bias.to(x.dtype)
        padded = F.pad(x, (0, 0, width - 1, 0))
        taps = [padded[:, k : k + length] * weight[:, k] for k in range(width)]
        return F.silu(sum(taps, start=bias))

    def forward(self, u: Tensor) -> Tensor:
        config = self.config
        inner, state, heads = config.d_inner, config.d_state, config.n_heads
        gate, xbc, dt = self.in_proj(u).split([inner, config.conv_dim, heads], dim=-1)
        x, b, c = self.conv(xbc).split([inner, state, state], dim=-1)
        x = x.unflatten(-1, (heads, config.head_dim))
        dt = F.softplus(dt.float() + self.dt_bias)
        y = ssd(x, dt, -self.A_log.exp(), b, c, config.train_chunk)
        y = (y + x * self.D[:, None].to(x.dtype)).flatten(2)
        return self.out_proj(self.norm(y.float() * F.silu(gate.float())))


class Block(nn.Module):
    """Pre-norm residual block; the residual is float32."""

    def __init__(self, config: DemoConfig, dropout: float) -> None:
        super().__init__()
        self.norm = Norm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        update = self.mixer(self.norm(x)).float()
        return x + F.dropout(update, self.dropout, self.training)


class Backbone(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: DemoConfig, dropout: float) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layer))
        self.norm_f = Norm(config.d_model, config.norm_eps)
        self.dropout = dropout

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.dropout(self.embeddings(input_ids), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x)


class DemoModel(nn.Module):
    """The language model; its state_dict is a transformers Mamba2ForCausalLM checkpoint."""

    def __init__(self, config: DemoConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B,L,V] of int [B,L]."""
        return F.linear(self.backbone(input_ids), self.backbone.embeddings.weight)
