"""A training forward for transformers' OlmoeForCausalLM that is quick on a CPU, and the Muon optimiser.

Same weights and same mathematics as the stock model (tests compare the logits); only the order of work differs:
tokens are sorted by expert once, so that each expert is one matrix product. ``dtype`` is the compute type: float32 where the
processor has no bfloat16 units (measured: 2.7 times as fast there), bfloat16 where it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Scalars: cross entropy in nats per token, balance loss summed over layers (1 per layer when even), z-loss mean."""

    cross_entropy: Tensor
    balance: Tensor
    z: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm computed in float32; x [..., d], weight [d]."""
    return weight * F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on x [batch, heads, T, d] with cos, sin [T, d]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def mixture(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sorted dispatch. x [N, d], logits float32 [N, E] -> (output [N, d], assignments per expert float32 [E])."""
    weights, experts = torch.topk(logits.softmax(-1), k, dim=-1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=logits.shape[1])
    token = order // k
    pieces = []
    for mine, up, dn in zip(x[token].split(counts.tolist()), gate_up.unbind(0), down.unbind(0), strict=True):
        gate, value = F.linear(mine, up).chunk(2, dim=-1)
        pieces.append(F.linear(F.silu(gate) * value, dn))
    out = torch.cat(pieces) * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token, out), counts.float()


def forward(model: Any, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, T, V], balance loss (sum over layers) and z-loss (mean over layers) for token ids [B, T]."""
    config = model.config
    heads, eps, k = config.num_attention_heads, config.rms_norm_eps, config.num_experts_per_tok
    batch, length = ids.shape
    width = config.hidden_size // heads
    angles = torch.arange(length)[:, None] * model.model.rotary_emb.inv_freq.float()[None]
    cos, sin = (f(torch.cat((angles, angles), -1)).to(dtype) for f in (torch.cos, torch.sin))
    embedding = model.model.embed_tokens.weight.to(dtype)
    x = F.embedding(ids, embedding)
    balance, z = torch.zeros(()), torch.zeros(())
    for layer in model.model.layers:
        attention, h = layer.self_attn, rms_norm(x, layer.input_layernorm.weight.to(dtype), eps)
        q, key, v = (F.linear(h, m.weight.to(dtype)) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, key = (rms_norm(t, m.weight.to(dtype), eps) for t, m in ((q, attention.q_norm), (key, attention.k_norm)))
        q, key, v = (t.view(batch, length, heads, width).transpose(1, 2) for t in (q, key, v))
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(key, cos, sin), v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), attention.o_proj.weight.to(dtype))
        h = rms_norm(x, layer.post_attention_layernorm.weight.to(dtype), eps).view(-1, config.hidden_size)
        logits = F.linear(h, layer.mlp.gate.weight.to(dtype)).float()
        experts = layer.mlp.experts
        out, counts = mixture(h, logits, experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype), k)
        x = x + out.view_as(x)
        balance = balance + logits.shape[1] * (counts / counts.sum() * logits.softmax(-1).mean(0)).sum()
        z = z + logits.logsumexp(-1).square().mean() / len(model.model.layers)
    x = rms_norm(x, model.model.norm.weight.to(dtype), eps)
    return F.linear(x, embedding), balance, z


def losses(model: Any, ids: Tensor, dtype: torch.dtype) -> Losses:
    """Training losses on windows of token ids [B, T + 1]."""
    logits, balance, z = forward(model, ids[:, :-1], dtype)
    return Losses(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()), balance, z)


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix; update [..., m, n].

    Quintic coefficients of Keller Jordan's Muon (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum orthogonalised by Newton-Schulz, for matrices and stacks of matrices.

    ``halves`` names parameters that hold two matrices stacked along rows (gate and up), orthogonalised apart.
    """

    def __init__(self, parameters: list[Tensor], halves: list[bool], momentum: float = 0.95) -> None:
        self.parameters, self.halves, self.momentum = parameters, halves, momentum
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float, mine: range | None = None) -> None:
        """Update parameters; ``mine`` limits the work to some of them (the caller then shares the results)."""
        for i in mine if mine is not None else range(len(self.parameters)):
            p, buffer = self.parameters[i], self.buffers[i]
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(buffer, self.momentum)
            parts = update.chunk(2, dim=-2) if self.halves[i] else (update,)
            update = torch.cat([orthogonalised(x) * max(1, x.shape[-2] / x.shape[-1]) ** 0.5 for x in parts], dim=-2)
            p.add_(update, alpha=-rate)
