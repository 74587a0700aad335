"""Labels and output gradients of the Fisher information of categorical outputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

FisherType = Literal["sampled", "empirical"]

#: Rows of the vocabulary distribution that are sampled from at a time; few, so that a CPU's cache holds them.
CHUNK = 128
#: Classes whose mass is summed up before the cumulative distribution is formed, in float64, over the sums.
SPAN = 256


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
    labels = [_invert(rows, numbers.double()) for rows, numbers in zip(flat.split(CHUNK), u.split(CHUNK), strict=True)]
    return torch.cat(labels).reshape(uniforms.shape)


def _invert(logits: Tensor, u: Tensor) -> Tensor:
    """Where the cumulative distributions of some rows [n, V] exceed u [n, 1]: first the span, then the class in it."""
    rows = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mass = (rows - rows.amax(-1, keepdim=True)).exp_()
    mass = torch.nn.functional.pad(mass, (0, -mass.shape[1] % SPAN)).unflatten(-1, (-1, SPAN))  # [n, spans, SPAN]
    cumulative = mass.sum(-1).double().cumsum(-1)
    target = u * cumulative[:, -1:]
    span = torch.searchsorted(cumulative, target, right=True).clamp_max(cumulative.shape[1] - 1)  # NaN finds no span
    below = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, span)
    share = (target - below) / (cumulative.gather(1, span) - below)  # of the span's mass
    share = share.clamp_max(1 - 2.0**-53)  # below one, so that it stays below the end of the span
    inside = mass.take_along_dim(span.unsqueeze(-1), 1).squeeze(1).double().cumsum(-1)
    return (
        (span * SPAN + torch.searchsorted(inside, share * inside[:, -1:], right=True))
        .squeeze(1)
        .clamp_max(logits.shape[-1] - 1)
    )


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
