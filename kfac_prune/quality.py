"""Loss, perplexity and KL(dense‖pruned) of a language model on token windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kfac_prune.data import WindowBatch, Windows
from kfac_prune.errors import InputError


@dataclass(frozen=True)
class Quality:
    """How well a model predicts held-out text.

    Attributes:
        loss: mean negative log-likelihood of the next token, nats per token.
        kl: mean KL(dense‖model) of the predictive distributions, nats per token; None without a dense model.
        tokens: number of predicted tokens.
    """

    loss: float
    kl: float | None
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: PreTrainedModel,
    windows: Windows,
    *,
    dense: PreTrainedModel | Callable[[], AbstractContextManager[None]] | None = None,
    batch_size: int = 8,
    quiet: bool = True,
    label: str = "evaluate",
) -> Quality:
    """Mean loss over the T − 1 predicted positions of every window, and KL to the dense model.

    Args:
        model: to judge.
        windows: [N, T]; masked positions are left out.
        dense: another model, or a callable that returns a context in which ``model`` itself is dense
            (``WeightSwap.swapped_in``), or None.
        batch_size: windows per pass.
        quiet: show no progress bar.
        label: of the progress bar.

    Raises:
        InputError: no position counts.
    """
    nll = kl = 0.0
    tokens = 0
    with torch.inference_mode(), tqdm(total=len(windows), desc=label, unit="seq", disable=quiet) as bar:
        for batch in windows.batches(batch_size):
            counts = batch.input_ids.new_ones(batch.input_ids.shape, dtype=torch.bool)[:, 1:]
            if batch.attention_mask is not None:
                counts = batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]
            log_q = _log_probabilities(model, batch, counts)
            targets = batch.input_ids[:, 1:][counts].to(log_q.device)
            nll -= float(log_q.gather(-1, targets[:, None]).double().sum())
            tokens += len(targets)
            if dense is not None:
                if isinstance(dense, PreTrainedModel):
                    log_p = _log_probabilities(dense, batch, counts).to(log_q.device)
                else:
                    with dense():
                        log_p = _log_probabilities(model, batch, counts)
                ratio = (log_p - log_q).masked_fill_(log_p == -math.inf, 0.0)  # 0 log 0 = 0
                kl += float((log_p.exp() * ratio).sum(-1).double().sum())
            bar.update(len(batch.input_ids))
    if tokens == 0:
        raise InputError("the windows hold no position to predict: each needs two neighbouring unmasked tokens")
    return Quality(nll / tokens, kl / tokens if dense is not None else None, tokens)


def _log_probabilities(model: PreTrainedModel, batch: WindowBatch, counts: Tensor) -> Tensor:
    """Log-probabilities of the next token at the positions that count: [tokens, vocabulary] float32."""
    mask = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
    logits: Tensor = model(input_ids=batch.input_ids.to(model.device), attention_mask=mask, use_cache=False).logits
    return logits[:, :-1][counts.to(logits.device)].float().log_softmax(-1)
