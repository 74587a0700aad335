"""KL(dense‖pruned) of a model on token windows, and what else its objective tells: loss, perplexity, likeness."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.data import WindowBatch, Windows
from kfac_prune.errors import InputError
from kfac_prune.objective import CAUSAL, Objective, Tokens
from kfac_prune.progress import progress


@dataclass(frozen=True)
class Quality:
    """How well a model predicts held-out text, or does what the dense model does.

    Attributes:
        loss: mean negative log-likelihood of the next token, nats per token; None for any but causal language models.
        kl: mean KL(dense‖model) of the output distributions, nats per unit of the objective (for an embedding that is
            ½‖f_dense − f‖² per sequence); None without a dense model.
        tokens: number of units: predicted tokens, or sequences.
        likeness: further figures of the objective against the dense model.
    """

    loss: float | None
    kl: float | None
    tokens: int
    likeness: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss) of a causal language model."""
        assert self.loss is not None
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: PreTrainedModel,
    windows: Windows,
    *,
    objective: Objective = CAUSAL,
    dense: PreTrainedModel | Callable[[], AbstractContextManager[None]] | Sequence[Tensor] | None = None,
    batch_size: int = 8,
    quiet: bool = True,
    label: str = "evaluate",
    alone: bool = False,
) -> Quality:
    """KL to the dense model over all units, and the loss over the T − 1 predicted positions of a causal model.

    Args:
        model: to judge.
        windows: [N, T]; masked positions are left out.
        objective: what the model computes.
        dense: another model, or a callable that returns a context in which ``model`` itself is dense
            (``WeightSwap.swapped_in``), or what ``compared`` gave of the dense model for every batch, or None.
        batch_size: windows per pass.
        quiet: show no progress bar.
        label: of the progress bar.
        alone: several processes do not share out the windows; this one measures on all of them.

    Raises:
        InputError: no position counts.
    """
    causal = isinstance(objective, Tokens) and objective.causal
    nll = kl = 0.0
    units = 0
    kept: list[tuple[Tensor, Tensor]] = []  # of objectives whose figures need all sequences together
    batches = list(enumerate(windows.batches(batch_size)))
    if not alone:
        batches = ranks.share(batches)
    seen = sum(len(batch.input_ids) for _, batch in batches)
    with torch.inference_mode(), progress(total=seen, desc=label, unit="seq", disable=quiet) as bar:
        for index, batch in batches:
            q = compared(model, batch, objective)
            units += len(q)
            if causal:
                targets = _targets(batch).to(q.device)
                nll -= float(q.gather(-1, targets[:, None]).double().sum())
            if dense is not None:
                if isinstance(dense, PreTrainedModel):
                    p = compared(dense, batch, objective).to(q.device)
                elif isinstance(dense, Sequence):
                    p = dense[index].to(q.device)
                else:
                    with dense():
                        p = compared(model, batch, objective)
                kl += float(objective.divergence(p, q).double().sum())
                if objective.unit == "sequence":
                    kept.append((p.cpu(), q.cpu()))
            bar.update(len(batch.input_ids))
    if not alone:
        parts = ranks.gathered((nll, kl, units, kept))
        nll, kl, units = (sum(column) for column in zip(*(part[:3] for part in parts), strict=True))
        kept = [pair for part in parts for pair in part[3]]
    if units == 0:
        raise InputError("the windows hold no position to predict: each needs two neighbouring unmasked tokens")
    likeness = objective.likeness(*(torch.cat(side) for side in zip(*kept, strict=True))) if kept else {}
    mean = None if dense is None else max(kl / units, 0.0)  # by rounding it may be less
    return Quality(nll / units if causal else None, mean, units, likeness)


def compared(model: PreTrainedModel, batch: WindowBatch, objective: Objective) -> Tensor:
    """The output's rows that count [units, ...] float32."""
    ids, mask = batch.on(model.device)
    return objective.compared(objective.output(model, ids, mask), mask)


def _targets(batch: WindowBatch) -> Tensor:
    """The next tokens at the positions that count."""
    ids, mask = batch.input_ids, batch.attention_mask
    return ids[:, 1:].reshape(-1) if mask is None else ids[:, 1:][mask[:, 1:] & mask[:, :-1]]
