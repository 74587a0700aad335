"""Kronecker factors of a model's Fisher on calibration windows, and the operators that they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.curvature.capture import FactorCapture, GradientMoments, InputMoments
from kfac_prune.curvature.few_tokens import FewTokens, shrunk
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.experts import ExpertLinear
from kfac_prune.fisher import FisherType
from kfac_prune.models import Layer, find_blocks, only_trained
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.operators import Curvature, Damping, DampingRecord, Diagonal, Kronecker, ScaledIdentity

#: Cotangents per window where the model has one output per sequence; where it has one per token, every token has one.
SEQUENCE_DRAWS = 4
#: Of sums in float32: a variance below this fraction of the second moment is not known.
ROUNDING = 1e-7
#: The hierarchy: H = I, H diagonal, H = I ⊗ A, H = G ⊗ A.
Method = Literal["magnitude", "obd", "layerwise", "kfac"]


@dataclass(frozen=True)
class LayerFactors:
    """The second moments of one layer, means over tokens (DESIGN §1).

    Attributes:
        a: E[a aᵀ] [in, in] of its inputs.
        mean: E[a] [in].
        g: E[g gᵀ] [out, out] of the gradients, at its outputs, of the loss summed over the sequence. That of an
            expert counts tokens that it does not see as zeros, so that ``G ⊗ A`` is per token of the text.
        tokens: number of tokens averaged over.
        has_bias: the layer has a bias, which compensates too and is never pruned.
        few: of an expert, its share of the tokens and how A and G were shrunk for it; None for any other layer.
    """

    a: Tensor
    mean: Tensor
    g: Tensor
    tokens: int
    has_bias: bool
    few: FewTokens | None = None

    def operator(
        self, method: Method, damping: Damping, *, where: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Curvature, list[DampingRecord]]:
        """The layer's curvature in one of the approximations.

        A bias is eliminated exactly: for any G, minimising over it leaves the quadratic with A replaced by the
        covariance about the mean, ``A − E[a]E[a]ᵀ`` (the Schur complement of the augmented A).

        Args:
            method: which approximation.
            damping: of A and G (Kronecker forms only).
            where: the layer's name, for messages.
            dtype: of the operator.

        Returns:
            The operator and what damping was used.
        """
        shape = (self.g.shape[0], self.a.shape[0])
        if method == "magnitude":
            return ScaledIdentity(torch.ones((), dtype=dtype, device=self.a.device), shape), []
        if method == "obd":
            floor = torch.finfo(dtype).tiny
            h = torch.outer(self.g.diagonal(), self.a.diagonal()).to(dtype).clamp_min(floor)
            return Diagonal(h), []
        a = self.a
        if self.has_bias:  # in float64: the difference is small where the mean is large
            mean = self.mean.double()
            a = a.double() - torch.outer(mean, mean)
            if float(a.trace()) <= ROUNDING * float(self.a.trace()):
                raise InputError(
                    f"layer {where}: its inputs are the same for all {self.tokens} tokens of the calibration text, so "
                    "that its bias takes up any change of its weights; add text, or leave it out with --ignore"
                )
        a, record_a = damping(a.to(dtype), name="A", where=where)
        if method == "layerwise":
            return Kronecker(a, None, out_features=shape[0]), [record_a]
        g, record_g = damping(self.g.to(dtype), name="G", where=where)
        return Kronecker(a, g), [record_a, record_g]

    def bias_update(self, change: Tensor) -> Tensor:
        """The bias change [out] that is optimal for a weight change D [out, in]: ``−D E[a]``."""
        return -change @ self.mean.to(change.dtype)

    def bias_loss(self, change: Tensor, shift: Tensor) -> float:
        """What is lost, beyond the operator's quadratic, by another bias change than ``bias_update``'s.

        ``½ eᵀ G e`` with e = D E[a] + shift, the change of the mean output; zero for layers without bias, whose
        operator holds the uncentred A.

        Args:
            change: D [out, in].
            shift: of the bias, [out].
        """
        if not self.has_bias:
            return 0.0
        error = shift - self.bias_update(change)
        return 0.5 * float(error @ self.g.to(error.dtype) @ error)


@dataclass(frozen=True)
class Factors:
    """The factors of all layers, and where they come from.

    Attributes:
        layers: per layer name; an expert that saw no token has none.
        streams: per block name, E[g gᵀ] [d, d] of the gradients at its output, the residual stream; undamped.
        tokens: calibration tokens that were seen.
        data_sha256: content hash of the calibration windows.
    """

    layers: dict[str, LayerFactors]
    streams: dict[str, Tensor]
    tokens: int
    data_sha256: str


def estimate_factors(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    windows: Windows,
    *,
    objective: Objective = CAUSAL,
    fisher: FisherType = "sampled",
    seed: int = 0,
    batch_size: int = 4,
    quiet: bool = True,
) -> Factors:
    """Estimate A and G of every layer with one forward and one backward pass over the windows (per sampled label).

    The Fisher is the true one by default: labels are sampled (with replacement) from the model's own predictions at
    every position, so that it is the Hessian of KL(dense‖pruned) at the dense model (Martens & Grosse 2015; Kunstner
    et al. 2019 on why not the data's labels). Gradients are those of the loss summed over a sequence. No parameter
    gradient is stored. Several processes share out the windows, and each has the sums of all. An expert sees a share of
    the tokens, and its factors are shrunk as far as that makes them uncertain (``few_tokens``).

    Args:
        model: a transformer with the objective's head; its training mode and ``requires_grad`` flags are as before
            afterwards.
        layers: whose factors are wanted.
        windows: calibration tokens [N, T].
        objective: what the model computes. Where it counts sequences, every G is multiplied by the rows per sequence
            that its layer sees, so that losses are in nats per sequence.
        fisher: "sampled" labels, or the "empirical" Fisher with the data's next tokens.
        seed: of the sampled labels; the labels do not depend on how the windows are batched.
        batch_size: windows per pass.
        quiet: show no progress bar.

    Raises:
        InputError: the windows hold no token, a layer never took part, or its statistics are not finite.
    """
    if windows.tokens == 0:
        raise InputError("the calibration windows hold no token: every position is masked")
    draws = draw_all(model, windows, objective, seed)
    sequences = len(windows) * len(draws) if objective.unit == "sequence" else None
    names, blocks = find_blocks(model, layers)
    capture = FactorCapture(layers, dict(zip(names, blocks, strict=True)), per_sequence=sequences is not None)
    device = model.device
    size = max(min(batch_size, len(windows) // ranks.count()), 1)
    batches = ranks.share(list(windows.batches(size)))
    seen = sum(len(batch.input_ids) for batch in batches)
    with frozen(model), capture.hooked(), tqdm(total=seen, desc="curvature", unit="seq", disable=quiet) as bar:
        for batch in batches:
            ids = batch.input_ids.to(device)
            mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
            capture.token_mask = mask
            first, last = int(batch.index[0]), int(batch.index[-1])
            capture.batch = f"batch {first // size + 1} (windows {first + 1} to {last + 1})"
            with torch.enable_grad():
                output = objective.output(model, ids, mask)
            for i, draw in enumerate(draws):
                cotangent = objective.cotangent(output, draw[batch.index], ids, mask, fisher)
                output.backward(cotangent, retain_graph=i < len(draws) - 1)
            bar.update(len(ids))
    capture.add_up()
    gradients = {name: moments for name, moments in capture.gradients.items() if name in capture.blocks}
    seen_by = [layer for layer in layers if not isinstance(layer.module, ExpertLinear) or _tokens(layer, capture)]
    return Factors(
        {layer.name: _finish(layer, capture, sequences, windows.tokens) for layer in seen_by},
        {name: moments.second / (sequences or moments.tokens) for name, moments in gradients.items()},
        tokens=windows.tokens,
        data_sha256=windows.sha256(),
    )


def draws_per_window(objective: Objective) -> int:
    """Cotangents that are drawn for each window."""
    return SEQUENCE_DRAWS if objective.unit == "sequence" else 1


def draw_all(model: PreTrainedModel, windows: Windows, objective: Objective, seed: int) -> list[Tensor]:
    """The random numbers of all cotangents: per draw, the first dimension the windows."""
    samples = draws_per_window(objective)
    return [objective.draws(model, windows, (seed * samples + i) % 2**63) for i in range(samples)]


def participants(
    model: PreTrainedModel, layers: Sequence[Layer], windows: Windows, objective: Objective
) -> list[Layer]:
    """The layers that the objective depends on, told by one window: a gradient comes back to their outputs.

    Experts are always among them, since which of them a window reaches says nothing of others.
    """
    first = next(windows.batches(1))
    ids = first.input_ids.to(model.device)
    mask = None if first.attention_mask is None else first.attention_mask.to(model.device)
    reached: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(lambda gradient: reached.add(name))

        return after

    with frozen(model), torch.enable_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.module.register_forward_hook(watch(layer.name)).remove)
        objective.output(model, ids, mask).sum().backward()
    return [layer for layer in layers if layer.name in reached or isinstance(layer.module, ExpertLinear)]


def bypassed(model: PreTrainedModel, layers: Sequence[Layer], windows: Windows, objective: Objective) -> list[Layer]:
    """The layers whose weights the model uses without calling them (Mamba's ``dt_proj``), told by one window.

    No hook sees their inputs, so there is no curvature for them. A layer that is neither called nor used here, such as
    an expert that no token was sent to, is not among them.
    """
    first = next(windows.batches(1))
    ids = first.input_ids.to(model.device)
    mask = None if first.attention_mask is None else first.attention_mask.to(model.device)
    called: set[str] = set()
    with torch.no_grad(), ExitStack() as hooks:
        for layer in layers:
            note = partial(_note, called, layer.name)
            hooks.callback(layer.module.register_forward_pre_hook(note).remove)
        objective.output(model, ids, mask)
    silent = [layer for layer in layers if layer.name not in called]
    if not silent:
        return []
    weights = [layer.parameters()[0] for layer in silent]
    with only_trained(model, weights):
        output = objective.output(model, ids, mask)
        if not output.requires_grad:
            return []
        found = torch.autograd.grad(output.sum(), weights, allow_unused=True)
    return [layer for layer, gradient in zip(silent, found, strict=True) if gradient is not None]


def _note(names: set[str], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    names.add(name)


def _tokens(layer: Layer, capture: FactorCapture) -> int:
    """That a layer has seen."""
    return capture.inputs[layer.name].tokens if layer.name in capture.inputs else 0


def _finish(layer: Layer, capture: FactorCapture, sequences: int | None, everything: int) -> LayerFactors:
    """Sums to means, with the checks that name the layer; G to sums per sequence where their number is given.

    An expert's factors are shrunk, and its G is of ``everything``, the tokens of the text.
    """
    name = layer.name
    if name not in capture.inputs or name not in capture.gradients:
        raise InputError(f"layer {name} took no part in the forward pass; leave it out with --ignore '{name}'")
    inputs, gradients = capture.inputs[name], capture.gradients[name]
    if inputs.tokens == 0:
        raise InputError(
            f"layer {name} saw no token of the calibration text; add text, or leave it out with --ignore '{name}'"
        )
    sides: tuple[tuple[str, InputMoments | GradientMoments], ...]
    sides = (("inputs", inputs), ("output gradients", gradients))
    for label, moments in sides:
        if not torch.isfinite(moments.second).all():
            where = capture.broken_by(moments) or "a batch of another process"
            raise InputError(
                f"layer {name}: its {label} hold NaN or infinity on the calibration text, first in {where}; "
                "try --dtype float32 or bfloat16, or other text"
            )
    a, g, few = inputs.second / inputs.tokens, gradients.second / (sequences or gradients.tokens), None
    if isinstance(layer.module, ExpertLinear):
        share = inputs.tokens / everything
        (a, by_a), (g, by_g) = shrunk(a, inputs.tokens), shrunk(g, gradients.tokens)
        g, few = g if sequences else g * share, FewTokens(inputs.tokens, share, by_a, by_g)
    return LayerFactors(
        a=a, mean=inputs.first / inputs.tokens, g=g, tokens=inputs.tokens, has_bias=layer.bias is not None, few=few
    )


class frozen:
    """Evaluation mode, no parameter gradients, and input embeddings whose output starts the autograd graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._training = [module.training for module in model.modules()]
        self._flags = [p.requires_grad for p in model.parameters()]

    def __enter__(self) -> None:
        self._handle = self._model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_(True)
        )
        self._model.eval().requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()
        for module, training in zip(self._model.modules(), self._training, strict=True):
            module.training = training
        for parameter, flag in zip(self._model.parameters(), self._flags, strict=True):
            parameter.requires_grad_(flag)
