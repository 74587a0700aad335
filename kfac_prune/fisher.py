"""Labels and output gradients of the Fisher information of categorical outputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

FisherType = Literal["sampled", "empirical"]

#: Rows of the vocabulary distribution that are held in float64 at a time.
CHUNK = 2048


def sample_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One label per position from the model's own distribution, by inverting its cumulative distribution.

    The labels depend on the logits and on the position's own uniform number alone, so the same ones are drawn however
    the data are split into batches.

    Args:
        logits: [..., vocabulary].
        uniforms: [...], in [0, 1).

    Returns:
        [...] int64.
    """
    flat, u = logits.detach().reshape(-1, logits.shape[-1]), uniforms.reshape(-1, 1).to(logits.device)
    labels = []
    for rows, numbers in zip(flat.split(CHUNK), u.split(CHUNK), strict=True):
        cumulative = rows.double().softmax(-1).cumsum(-1)
        labels.append(torch.searchsorted(cumulative, numbers.double() * cumulative[:, -1:], right=True))
    return torch.cat(labels).clamp_max(logits.shape[-1] - 1).reshape(uniforms.shape)


def next_token_labels(input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels of the empirical Fisher: the data's next token, and which positions have one.

    Args:
        input_ids: [B, T].
        mask: [B, T] bool, True = a real token, or None.

    Returns:
        labels [B, T] and has_label [B, T] bool (the last position has none).
    """
    labels = input_ids.roll(-1, dims=1)
    has_label = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask & mask.roll(-1, dims=1)
    has_label[:, -1] = False
    return labels, has_label


def logit_gradient(logits: Tensor, labels: Tensor, counts: Tensor | None) -> Tensor:
    """Gradient ``softmax(logits) − onehot(label)`` of the summed cross-entropy, zero where a position does not count.

    Args:
        logits: [..., V].
        labels: [...].
        counts: [...] bool, or None = all positions count.

    Returns:
        [..., V] in the logits' dtype.
    """
    gradient = logits.detach().float().softmax(-1)
    minus_one = gradient.new_full((1,) * gradient.ndim, -1.0).expand(*labels.shape, 1)
    gradient.scatter_add_(-1, labels.unsqueeze(-1), minus_one)
    if counts is not None:
        gradient *= counts.unsqueeze(-1)
    return gradient.to(logits.dtype)
