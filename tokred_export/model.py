"""Mamba-2 over tokred ops: prefill with token reduction, and one decode step.

Letters: B batch, L tokens, D d_model, E d_inner, H heads, P head dim, N d_state, G groups,
K conv width, C conv channels, Z columns of in_proj, V vocabulary.

A block is in_proj -> conv + SiLU -> SSD scan -> gated norm -> out_proj; blocks are joined by
"add to the residual stream and normalise". Source: Dao and Gu 2024; mamba_ssm
``modules/mamba2.py`` and ``models/mixer_seq_simple.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokred_plugins._common import accumulate, take
from tokred_plugins.opset import CUSTOM, OpSet
from tokred_plugins.ssd_scan.op import NO_LIMIT
from torch import Tensor, nn

from tokred_export.reduction.methods import Choice, reduce_tokens
from tokred_export.specs import Logits, ModelSpec, ReductionSchedule

# Called at a site before anything is removed: its number, the scan's output y [B, L, E], the
# block's output hidden [B, L, D], and pads int32 [B].
Observe = Callable[[int, Tensor, Tensor, Tensor], None]


class Prefill(NamedTuple):
    """What a prefill returns.

    Attributes:
        logits: [B, V], of the last token; [B, L_out, V] for a model made with logits="all".
        kept_positions: int32 [B, L_out], index into the prompt, -1 for padding.
        choices: one Choice a site.
        conv_states: one [B, C, K - 1] a layer.
        ssm_states: one float32 [B, H, P, N] a layer.
    """

    logits: Tensor
    kept_positions: Tensor
    choices: list[Choice]
    conv_states: list[Tensor]
    ssm_states: list[Tensor]


class Block(nn.Module):
    """The parameters of one layer; the flow between layers is in :class:`Mamba2`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        wide = torch.float32
        self.norm_weight = nn.Parameter(torch.ones(spec.d_model))
        self.in_proj = nn.Linear(spec.d_model, spec.in_proj_dim, bias=spec.proj_bias)
        self.conv_weight = nn.Parameter(torch.zeros(spec.conv_dim, spec.d_conv))
        if spec.conv_bias:
            self.conv_bias = nn.Parameter(torch.zeros(spec.conv_dim))
        else:  # the op always takes one
            self.register_buffer("conv_bias", torch.zeros(spec.conv_dim), persistent=False)
        self.dt_bias = nn.Parameter(torch.zeros(spec.n_heads, dtype=wide))
        self.a_log = nn.Parameter(torch.zeros(spec.n_heads, dtype=wide))
        self.d = nn.Parameter(torch.ones(spec.n_heads, dtype=wide))
        self.gate_norm_weight = nn.Parameter(torch.ones(spec.d_inner))
        self.out_proj = nn.Linear(spec.d_inner, spec.d_model, bias=spec.proj_bias)


class Mamba2(nn.Module):
    """A Mamba-2 language model with an optional reduction schedule.

    Args:
        spec: sizes and conventions.
        schedule: where and how many tokens are removed; None is the dense model.
        ops: custom ops (exportable) or the plain functions (differentiable).
        logits: "last" token only, or "all" that survive.
    """

    def __init__(
        self,
        spec: ModelSpec,
        schedule: ReductionSchedule | None = None,
        ops: OpSet = CUSTOM,
        logits: Logits = "last",
    ) -> None:
        super().__init__()
        self.spec, self.schedule, self.ops, self.logits = spec, schedule, ops, logits
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.n_layer))
        self.norm_f_weight = nn.Parameter(torch.ones(spec.d_model))
        if not spec.tie_embeddings:
            self.lm_head = nn.Linear(spec.d_model, spec.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        prompt_len: Tensor,
        choices: list[Choice] | None = None,
        observe: Observe | None = None,
    ) -> Prefill:
        """Prefill from a zero state.

        Args:
            input_ids: int32 [B, L]; the prompt ends at L, whatever stands before it is padding.
            prompt_len: int32 [B], 0 to L.
            choices: replay these, one a site, instead of choosing.
            observe: shown what each site sees; for verification.
        """
        spec, ops, schedule = self.spec, self.ops, self.schedule
        length = input_ids.shape[1]
        padding = length - prompt_len
        pads = padding
        positions = torch.arange(length, device=input_ids.device, dtype=torch.int32)
        positions = positions[None, :] - pads[:, None]  # negative for padding

        normed, residual = self._embed(input_ids)
        made: list[Choice] = []
        conv_states, ssm_states = [], []
        for i, block in enumerate(self.layers):
            zxbcdt = block.in_proj(normed)
            xbc, conv_state = ops.causal_conv1d(
                zxbcdt, block.conv_weight, block.conv_bias, pads, spec.d_inner
            )
            y, ssm_state = self._scan(block, xbc, zxbcdt, pads)
            conv_states.append(conv_state)
            ssm_states.append(ssm_state)
            site = schedule.site_after(i) if schedule else None
            last = i == spec.n_layer - 1
            alone = last and self.logits == "last" and site is None
            gated_y, gate, stream = y, zxbcdt, residual
            if alone:  # nothing after the last scan mixes tokens
                gated_y, gate, stream = y[:, -1:], zxbcdt[:, -1:], residual[:, -1:]
            hidden = block.out_proj(self._gated_norm(block, gated_y, gate))
            if site is not None:
                if observe is not None:
                    observe(len(made), y, hidden, pads)
                given = choices[len(made)] if choices is not None else None
                reduced = reduce_tokens(
                    schedule.method, y, hidden, stream, pads, site,
                    schedule.prune_permille, schedule.protect_tail, ops, given,
                )
                hidden, stream = reduced.hidden, reduced.residual
                made.append(reduced.choice)
                positions = take(positions, reduced.keep)
                # Of the first pads, not of the last: so no site waits for the one before.
                pads = (padding - (length - site.tokens_out)).clamp(min=0)
            if last and self.logits == "last" and not alone:
                hidden, stream = hidden[:, -1:], stream[:, -1:]
            weight = self.norm_f_weight if last else self.layers[i + 1].norm_weight
            normed, residual = ops.add_rms_norm(hidden, stream, weight, spec.norm_eps)

        logits = self._head(normed[:, -1] if self.logits == "last" else normed)
        kept = positions.clamp(min=-1)
        return Prefill(logits, kept, made, conv_states, ssm_states)

    def step(
        self, token: Tensor, conv_states: list[Tensor], ssm_states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One token after a prefill.

        Args:
            token: int32 [B].
            conv_states, ssm_states: as a prefill or step returned them; not changed.

        Returns:
            logits [B, V] and the new states.
        """
        spec, ops = self.spec, self.ops
        pads = torch.zeros_like(token)
        normed, residual = self._embed(token[:, None])  # [B, 1, D]
        new_conv, new_ssm = [], []
        for i, block in enumerate(self.layers):
            zxbcdt = block.in_proj(normed)
            now = zxbcdt[:, 0, spec.d_inner : spec.d_inner + spec.conv_dim]
            window = torch.cat([conv_states[i], now[:, :, None]], dim=2)  # [B, C, K]
            wide = accumulate(window.dtype)
            xbc = (window.to(wide) * block.conv_weight.to(wide)).sum(2) + block.conv_bias.to(wide)
            xbc = F.silu(xbc).to(window.dtype)[:, None]
            y, state = self._scan(block, xbc, zxbcdt, pads, ssm_states[i])
            new_conv.append(window[:, :, 1:].contiguous())
            new_ssm.append(state)
            hidden = block.out_proj(self._gated_norm(block, y, zxbcdt))
            weight = self.norm_f_weight if i == spec.n_layer - 1 else self.layers[i + 1].norm_weight
            normed, residual = ops.add_rms_norm(hidden, residual, weight, spec.norm_eps)
        return self._head(normed[:, 0]), new_conv, new_ssm

    def _embed(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The first block's input and the residual stream."""
        return self.ops.embed_rms_norm(
            input_ids, self.embedding.weight, self.layers[0].norm_weight, self.spec.norm_eps,
            self.spec.residual_in_fp32,
        )

    def _scan(
        self,
        block: Block,
        xbc: Tensor,
        zxbcdt: Tensor,
        pads: Tensor,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        spec = self.spec
        dt_max = NO_LIMIT if spec.dt_max is None else spec.dt_max
        return self.ops.ssd_scan(
            xbc, zxbcdt, block.dt_bias, block.a_log, block.d, pads, initial_state,
            spec.n_groups, spec.d_state, spec.chunk_size, spec.dt_min, dt_max,
        )

    def _gated_norm(self, block: Block, y: Tensor, zxbcdt: Tensor) -> Tensor:
        spec = self.spec
        return self.ops.gated_rms_norm(
            y, zxbcdt, block.gate_norm_weight,
            spec.norm_group_size, spec.norm_eps, spec.norm_before_gate,
        )

    def _head(self, normed: Tensor) -> Tensor:
        head = self.embedding if self.spec.tie_embeddings else self.lm_head
        return F.linear(normed, head.weight)
