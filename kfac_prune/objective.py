"""What a model is to go on computing: its output, the Fisher's gradient there, and how far two outputs are apart.

Three kinds of output distribution, each with a KL(dense‖pruned) whose Hessian at the dense model is the Fisher:

- tokens: a categorical distribution at every position, of the next token (causal) or of the position's own (masked);
- classes: one categorical distribution per sequence;
- embedding: N(f, I) with f the sentence vector, so that the KL is ``½‖f_dense − f_pruned‖²`` and the Fisher JᵀJ
  (Martens 2020, "New insights and perspectives on the natural gradient method", §9), estimated with Gaussian
  cotangents: E[Jᵀε εᵀJ] = JᵀJ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.fisher import FisherType, logit_gradient, next_token_labels, sample_labels
from kfac_prune.loading import Head, head_of, modules_of, read_json, side_file

Pooling = Literal["mean", "cls"]
#: Neighbours of every sentence that are looked for again in the pruned model's embedding.
NEIGHBOURS = 10
#: Which option value each kind of model fits.
NAMES: dict[Head, str] = {"causal": "tokens", "masked": "tokens", "classes": "classes", "encoder": "embedding"}


class Objective(Protocol):
    """What the rest of the project asks. B sequences of T tokens; U units, tokens or sequences, that count.

    Attributes:
        name: as the option calls it.
        unit: what losses are per: "token" or "sequence".
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def unit(self) -> str: ...  # noqa: D102

    def output(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The model's output: logits [B, T, V] or [B, C], or vectors [B, d]; differentiable."""

    def draws(self, model: PreTrainedModel, windows: Windows, seed: int) -> Tensor:
        """Random numbers, the first dimension the windows, from which cotangents are made, whatever the batches."""

    def cotangent(self, output: Tensor, draws: Tensor, ids: Tensor, mask: Tensor | None, fisher: FisherType) -> Tensor:
        """A random gradient at the output, whose second moment is the Fisher there; its shape and dtype.

        Raises:
            InputError: ``fisher`` is "empirical" and the text holds no labels.
        """

    def compared(self, output: Tensor, mask: Tensor | None) -> Tensor:
        """What ``divergence`` is of, a row per unit: log-probabilities, or vectors; [U, ...] float32."""

    def divergence(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """KL(dense‖pruned) of every unit, nats [U], from what ``compared`` gives."""

    def likeness(self, dense: Tensor, pruned: Tensor) -> dict[str, float]:
        """Further figures of all units of a text together, for people; none for tokens."""


def _categorical(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q) of every row."""
    ratio = log_p - log_q
    if log_p.numel() and log_p.amin() == -math.inf:
        ratio.masked_fill_(log_p == -math.inf, 0.0)  # 0 log 0 = 0
    total: Tensor = torch.linalg.vecdot(log_p.exp(), ratio)
    return total


@dataclass(frozen=True)
class Tokens:
    """A distribution over tokens at every position.

    Attributes:
        causal: of the next token; otherwise of the position's own, as masked language models give it (here for text
            without masks, which is what such a model reads in use).
    """

    causal: bool = True
    name: str = "tokens"
    unit: str = "token"

    def output(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [B, T, V]."""
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    def draws(self, model: PreTrainedModel, windows: Windows, seed: int) -> Tensor:
        """Uniform numbers [N, T]."""
        return torch.rand(windows.input_ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def cotangent(self, output: Tensor, draws: Tensor, ids: Tensor, mask: Tensor | None, fisher: FisherType) -> Tensor:
        """Softmax minus a label, sampled or the text's own, at every real position."""
        if fisher == "sampled":
            labels, counts = sample_labels(output, draws[:, : ids.shape[1]]), mask
        else:
            labels, counts = next_token_labels(ids, mask) if self.causal else (ids, mask)
        return logit_gradient(output, labels, counts)

    def compared(self, output: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probabilities; a causal model's where the next token is there too."""
        if self.causal:
            output = output[:, :-1]
        if mask is None:
            return output.float().log_softmax(-1).flatten(0, 1)
        counts = mask.to(output.device)
        return output[counts[:, 1:] & counts[:, :-1] if self.causal else counts].float().log_softmax(-1)

    def divergence(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """Per position."""
        return _categorical(dense, pruned)

    def likeness(self, dense: Tensor, pruned: Tensor) -> dict[str, float]:
        """None."""
        return {}


@dataclass(frozen=True)
class Classes:
    """One distribution over classes per sequence."""

    name: str = "classes"
    unit: str = "sequence"

    def output(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits

    def draws(self, model: PreTrainedModel, windows: Windows, seed: int) -> Tensor:
        """Uniform numbers [N]."""
        return torch.rand(len(windows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def cotangent(self, output: Tensor, draws: Tensor, ids: Tensor, mask: Tensor | None, fisher: FisherType) -> Tensor:
        """Softmax minus a sampled label."""
        _only_sampled(fisher, self.name)
        return logit_gradient(output, sample_labels(output, draws), None)

    def compared(self, output: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probabilities [B, C]."""
        return output.float().log_softmax(-1)

    def divergence(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """Per sequence."""
        return _categorical(dense, pruned)

    def likeness(self, dense: Tensor, pruned: Tensor) -> dict[str, float]:
        """Share of sequences whose most likely class is the dense model's."""
        return {"agreement": float((dense.argmax(-1) == pruned.argmax(-1)).double().mean())}


@dataclass(frozen=True)
class Embedding:
    """One vector per sequence.

    Attributes:
        pooling: the mean over real tokens, or the first token's vector.
        normalise: to length one.
    """

    pooling: Pooling = "mean"
    normalise: bool = True
    name: str = "embedding"
    unit: str = "sequence"

    def output(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Vectors f [B, d], in float32 at least."""
        hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif mask is None:
            pooled = hidden.mean(1)
        else:
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalise else pooled

    def draws(self, model: PreTrainedModel, windows: Windows, seed: int) -> Tensor:
        """Standard normal numbers ε [N, d]."""
        width = model.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(windows), width, generator=generator, dtype=torch.float64)

    def cotangent(self, output: Tensor, draws: Tensor, ids: Tensor, mask: Tensor | None, fisher: FisherType) -> Tensor:
        """ε itself: the score of N(f, I) at a sample f + ε."""
        _only_sampled(fisher, self.name)
        return draws.to(output)

    def compared(self, output: Tensor, mask: Tensor | None) -> Tensor:
        """The vectors."""
        return output.float()

    def divergence(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """½‖f_dense − f_pruned‖² of every sequence."""
        return 0.5 * (dense - pruned).square().sum(-1)

    def likeness(self, dense: Tensor, pruned: Tensor) -> dict[str, float]:
        """Mean cosine to the dense vector, and the share of nearest neighbours kept."""
        cosine = torch.nn.functional.cosine_similarity(dense.double(), pruned.double(), dim=-1).mean()
        found = {"cosine": float(cosine)}
        return found | ({"neighbours_kept": neighbours_kept(dense, pruned)} if len(dense) > 1 else {})


CAUSAL = Tokens()


def neighbours_kept(dense: Tensor, pruned: Tensor, count: int = NEIGHBOURS) -> float:
    """Share of every vector's nearest others, by cosine, that are still among the nearest after pruning.

    Args:
        dense: vectors [N, d], N > 1.
        pruned: the same sequences' vectors.
        count: neighbours; at most N − 1 are used.
    """
    count = min(count, len(dense) - 1)
    sides = [torch.nn.functional.normalize(x.float(), dim=-1) for x in (dense, pruned)]
    kept = 0
    for rows in torch.arange(len(dense), device=dense.device).split(1024):
        near = []
        for x in sides:
            cosines = x[rows] @ x.T
            cosines[torch.arange(len(rows)), rows] = -math.inf  # not one's own neighbour
            near.append(cosines.topk(count).indices)
        kept += int((near[0].unsqueeze(2) == near[1].unsqueeze(1)).sum())
    return kept / (count * len(dense))


def find_objective(wanted: str, source: str, config: Any) -> Objective:
    """The objective that a checkpoint is made for, checked against what the user names.

    Args:
        wanted: "auto", "tokens", "classes" or "embedding".
        source: local folder or hub id, whose sentence-transformers files say how vectors are pooled.
        config: of the model, from ``load_config``.

    Raises:
        InputError: the objective does not fit the model's head, or its files ask for a pooling that is not known here.
    """
    head = head_of(config, source)
    assert head is not None, "load_config has refused it"
    if wanted not in ("auto", NAMES[head]):
        raise InputError(
            f"objective {wanted} does not fit {source} ({(config.architectures or ['?'])[0]}), whose objective is "
            f"{NAMES[head]}; leave --objective out"
        )
    if head == "encoder":
        return _sentence_embedding(source)
    return Classes() if head == "classes" else Tokens(causal=head == "causal")


def _only_sampled(fisher: FisherType, name: str) -> None:
    if fisher != "sampled":
        raise InputError(f"the text holds no labels for the objective {name}, so fisher can only be sampled")


def _sentence_embedding(source: str) -> Embedding:
    """Pooling and normalisation as modules.json and the pooling module's config.json say."""
    parts = modules_of(source)
    if not parts:
        return Embedding()
    unknown = [kind for kind in parts if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise InputError(
            f"{source}/modules.json lists a module {unknown[0]}; only Transformer, Pooling and Normalize are known"
        )
    pooling: Pooling = "mean"
    if "Pooling" in parts:
        path = side_file(source, f"{parts['Pooling']}/config.json")
        settings = read_json(path) if path is not None else {}
        if not isinstance(settings, dict):
            raise InputError(f"{path} holds {type(settings).__name__}, not an object of settings")
        pooling = _pooling(settings, f"{source}/{parts['Pooling']}/config.json")
    return Embedding(pooling, "Normalize" in parts)


def _pooling(settings: Mapping[str, Any], where: str) -> Pooling:
    """The one mode that a pooling configuration turns on."""
    spelt = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    modes = [spelt.get(k, k) for k, value in settings.items() if k.startswith("pooling_mode_") and value is True]
    if "pooling_mode" in settings:
        modes = [settings["pooling_mode"]] if isinstance(settings["pooling_mode"], str) else settings["pooling_mode"]
    if modes == ["mean"]:
        return "mean"
    if modes == ["cls"]:
        return "cls"
    raise InputError(f"{where} pools by {', '.join(map(str, modes)) or 'nothing'}; only mean or cls are known")
