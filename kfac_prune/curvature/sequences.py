"""Curvatures from the gradients of whole sequences: WoodFisher's blocks, M-FAC's outer products, EK-FAC's moments.

The Fisher in nats per token is ``F = (1/N) Σ_n vec(g_n) vec(g_n)ᵀ``, with g_n [out, in] the gradient of the loss summed
over sequence n, labels sampled from the model, and N the tokens of all sequences: labels at different positions are
independent given the text, so the Hessian of a sequence's summed KL is E[vec(g) vec(g)ᵀ]. K-FAC's ``G ⊗ A`` is the same
matrix with the products between different tokens left out, and gradients and activations taken as independent. Where
the objective counts sequences, N is their number (times the cotangents drawn for each).

K-FAC's factors need sums over tokens only; these need every sequence's gradient by itself, hence a pass of their own,
and memory that grows faster than the weights. So layers are taken in groups, one pass over the windows for each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune import ranks
from kfac_prune.curvature.estimate import draw_all, draws_per_window, frozen
from kfac_prune.curvature.factors import Factors, LayerFactors
from kfac_prune.data import Windows
from kfac_prune.errors import InputError
from kfac_prune.fisher import FisherType
from kfac_prune.linalg import exact_products
from kfac_prune.models import Layer, only_trained, owners
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.operators import BlockDiagonal, Curvature, Damping, DampingRecord, EigenKronecker, LowRank
from kfac_prune.operators.damping import MAX_RELATIVE
from kfac_prune.operators.eigen_kronecker import eigenbasis
from kfac_prune.progress import progress

SequenceMethod = Literal["woodfisher", "m-fac", "ek-fac"]
#: Consecutive weights of a row that interact under WoodFisher (oBERT takes 50).
BLOCK = 64
#: WoodFisher's damping over that of the others. On validation text, increase of loss at 2:4 with D = 0.03 and 0.3:
#: stories260K 2.83 and 2.29, chargpt 0.223 and 0.204. EK-FAC loses by it, to M-FAC it makes little difference.
BLOCK_DAMPING = 10
#: Gradients whose outer products are added to the blocks at a time.
AT_A_TIME = 8
#: Bytes that the statistics of a group of layers may take; the solver needs some eight times its layer's besides.
BUDGET = 4 * 2**30


class Statistic(ABC):
    """What a method keeps of one layer's gradients, which come divided by √N, so that ``Σ vec(g) vec(g)ᵀ`` is F.

    Args:
        layer: of which.
        factors: of the layer.
        count: of gradients that will be added.
    """

    @abstractmethod
    def __init__(self, layer: Layer, factors: LayerFactors, count: int) -> None: ...

    @staticmethod
    @abstractmethod
    def floats(shape: tuple[int, int], count: int) -> int:
        """Numbers kept for a layer (out, in) with ``count`` gradients."""

    @abstractmethod
    def add(self, gradient: Tensor) -> None:
        """Add g / √N [out, in], float32."""

    @abstractmethod
    def operator(self, damping: Damping, *, where: str) -> tuple[Curvature, DampingRecord]:
        """``F + D · mean(diag F) · I`` in the method's form, and the record of D; D is the damping's unless stated."""


class Blocks(Statistic):
    """The blocks of F along the rows of W (WoodFisher, Singh & Alistarh 2020, eq. 6; oBERT, Kurtic et al. 2022).

    Damped ten times as much as asked for, and at most by the mean diagonal.
    """

    def __init__(self, layer: Layer, factors: LayerFactors, count: int) -> None:
        self._shape = layer.shape
        self._size = min(BLOCK, layer.shape[1])
        per_row = -(-layer.shape[1] // self._size)
        self._blocks = layer.weight.new_zeros(
            layer.shape[0] * per_row, self._size, self._size, dtype=torch.float32
        )  # fmt: skip
        self._waiting: list[Tensor] = []

    @staticmethod
    def floats(shape: tuple[int, int], count: int) -> int:
        """As ``Statistic``."""
        size = min(BLOCK, shape[1])
        return shape[0] * -(-shape[1] // size) * size * size + AT_A_TIME * shape[0] * shape[1]

    def add(self, gradient: Tensor) -> None:
        """As ``Statistic``."""
        self._waiting.append(gradient)
        if len(self._waiting) == AT_A_TIME:
            self._flush()

    @exact_products()
    def _flush(self) -> None:
        if self._waiting:
            pad = -self._shape[1] % self._size
            lines = torch.nn.functional.pad(torch.stack(self._waiting), (0, pad))  # [b, out, in + pad]
            pieces = lines.reshape(len(lines), -1, self._size).transpose(0, 1)  # [k, b, size]
            self._blocks.baddbmm_(pieces.transpose(1, 2), pieces)
            self._waiting = []

    def operator(self, damping: Damping, *, where: str) -> tuple[BlockDiagonal, DampingRecord]:
        """As ``Statistic``."""
        self._flush()
        damping = Damping(min(BLOCK_DAMPING * damping.relative, MAX_RELATIVE))
        blocks, record = damping(self._blocks, name="H", where=where, entries=self._shape[0] * self._shape[1])
        return BlockDiagonal(blocks, self._shape), record


class Gradients(Statistic):
    """All gradients: F itself, of rank m (M-FAC, Frantar, Kurtic & Alistarh 2021, eq. 2)."""

    def __init__(self, layer: Layer, factors: LayerFactors, count: int) -> None:
        self._gradients = layer.weight.new_zeros(count, *layer.shape, dtype=torch.float32)
        self._added = 0

    @staticmethod
    def floats(shape: tuple[int, int], count: int) -> int:
        """As ``Statistic``."""
        return count * shape[0] * shape[1]

    def add(self, gradient: Tensor) -> None:
        """As ``Statistic``."""
        self._gradients[self._added] = gradient
        self._added += 1

    def operator(self, damping: Damping, *, where: str) -> tuple[LowRank, DampingRecord]:
        """As ``Statistic``."""
        diagonal = self._gradients.square().sum(0)
        shift, record = damping.of_mean(float(diagonal.mean()), name="H", where=where)
        return LowRank(torch.full_like(diagonal, shift), self._gradients), record


class Moments(Statistic):
    """The diagonal of F in the eigenbasis of A and G (EK-FAC, George et al. 2018, eq. 11)."""

    def __init__(self, layer: Layer, factors: LayerFactors, count: int) -> None:
        self._basis_a, self._basis_g = eigenbasis(factors.a), eigenbasis(factors.g)
        self._moments = layer.weight.new_zeros(layer.shape, dtype=torch.float32)

    @staticmethod
    def floats(shape: tuple[int, int], count: int) -> int:
        """As ``Statistic``."""
        return shape[0] * shape[1] + shape[0] ** 2 + shape[1] ** 2

    def add(self, gradient: Tensor) -> None:
        """As ``Statistic``."""
        self._moments += (self._basis_g.T @ gradient @ self._basis_a).square()

    def operator(self, damping: Damping, *, where: str) -> tuple[EigenKronecker, DampingRecord]:
        """As ``Statistic``."""
        shift, record = damping.of_mean(float(self._moments.mean()), name="H", where=where)
        return EigenKronecker(self._basis_a, self._basis_g, self._moments + shift), record


STATISTICS: dict[SequenceMethod, type[Statistic]] = {"woodfisher": Blocks, "m-fac": Gradients, "ek-fac": Moments}


def sequence_gradients(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    windows: Windows,
    *,
    objective: Objective = CAUSAL,
    fisher: FisherType = "sampled",
    seed: int = 0,
) -> Iterator[list[Tensor]]:
    """The gradients of all layers for one sequence after the other, by one forward and one backward pass each.

    With inputs X [T, in] and output gradients D [T, out] of a layer they are ``Dᵀ X``; automatic differentiation gives
    the same for modules that are called several times, or see only some of the tokens. Sequences pass one by one,
    so the result depends neither on a batch size nor on padding.

    Args:
        model: its training mode and ``requires_grad`` flags are as before afterwards.
        layers: of the model.
        windows: calibration tokens [N, T].
        objective: what the model computes.
        fisher: labels, as for ``estimate_factors``.
        seed: of the labels: the same as ``estimate_factors`` draws with it.

    Yields:
        Per window and cotangent, for every layer g [out, in] in float32 (rounded to the model's dtype before), of the
        loss summed over the sequence; zero where a layer took no part.
    """
    draws = draw_all(model, windows, objective, seed)
    weights = [layer.parameters()[0] for layer in layers]
    with frozen(model), only_trained(model, weights):
        for window in windows.batches(1):
            ids, mask = window.on(model.device)
            output = objective.output(model, ids, mask)
            for i, draw in enumerate(draws):
                cotangent = objective.cotangent(output, draw[window.index], ids, mask, fisher)
                found = torch.autograd.grad(
                    output, weights, cotangent, retain_graph=i < len(draws) - 1, allow_unused=True,
                    materialize_grads=True,
                )  # fmt: skip
                yield [layer.stored(g).float() for layer, g in zip(layers, found, strict=True)]


def check_memory(method: SequenceMethod, layers: Sequence[Layer], windows: Windows, objective: Objective) -> None:
    """Every layer's statistics fit into the budget.

    Raises:
        InputError: one's do not.
    """
    for layer in layers:
        needed = _bytes(method, layer, windows, objective)
        if needed > BUDGET:
            fewer = f"lower --samples (now {len(windows)}), " if method == "m-fac" else ""
            raise InputError(
                f"method {method} would keep {needed / 2**30:.1f} GiB for layer {layer.name} {list(layer.shape)}, and "
                f"its limit is {BUDGET / 2**30:g} GiB; {fewer}leave the layer out with --ignore '{layer.name}', or use "
                "method kfac"
            )


def _bytes(method: SequenceMethod, layer: Layer, windows: Windows, objective: Objective) -> int:
    """That a layer takes during its pass: the statistics, and one gradient."""
    floats = STATISTICS[method].floats(layer.shape, len(windows) * draws_per_window(objective))
    return 4 * (floats + layer.weight.numel())


class SequenceFisher:
    """The curvature of each layer of a dense model under a method that needs sequences' gradients.

    The statistics of one group of consecutive layers are held at a time; asking for a layer outside it gives them up
    and passes over the windows for the next group, so layers should be asked for in their order.

    Args:
        method: in what form F is kept.
        model: dense whenever a layer is asked for.
        layers: in their order.
        factors: of them; EK-FAC takes its bases from there.
        windows: calibration tokens.
        objective: what the model computes.
        fisher: labels, as for ``estimate_factors``.
        seed: of the labels.
        quiet: show no progress bar.

    Raises:
        InputError: from the constructor, a layer's statistics would be larger than the budget.
    """

    def __init__(
        self,
        method: SequenceMethod,
        model: PreTrainedModel,
        layers: Sequence[Layer],
        factors: Factors,
        windows: Windows,
        *,
        objective: Objective = CAUSAL,
        fisher: FisherType = "sampled",
        seed: int = 0,
        quiet: bool = True,
    ) -> None:
        check_memory(method, layers, windows, objective)
        self.method, self.model, self.layers, self.factors = method, model, list(layers), factors
        self.windows, self.objective, self.fisher, self.seed = windows, objective, fisher, seed
        self._quiet = quiet
        self._held: dict[str, Statistic] = {}

    def operator(self, layer: Layer, damping: Damping) -> tuple[Curvature, list[DampingRecord]]:
        """A layer's curvature, in nats per token (or sequence), float32, and what damping that took.

        The bias stays as it is, so its curvature has no part.
        """
        if layer.name not in self._held:
            self._collect(layer.name)
        operator, record = self._held[layer.name].operator(damping, where=layer.name)
        return operator, [record]

    def _group(self, first: str) -> list[Layer]:
        """Layers from one on, as many as the budget holds, without those that other processes solve."""
        begin = [layer.name for layer in self.layers].index(first)
        group: list[Layer] = []
        total = 0
        for layer, process in list(zip(self.layers, owners(self.layers), strict=True))[begin:]:
            if process != ranks.index() and layer.name != first:
                continue
            total += _bytes(self.method, layer, self.windows, self.objective)
            if group and total > BUDGET:
                break
            group.append(layer)
        return group

    def _collect(self, first: str) -> None:
        """Pass over the windows for the group that begins with a layer."""
        self._held = {}  # given up before the next ones take their memory
        group = self._group(first)
        count = len(self.windows) * draws_per_window(self.objective)
        per = count if self.objective.unit == "sequence" else self.windows.tokens
        held = {x.name: STATISTICS[self.method](x, self.factors.layers[x.name], count) for x in group}
        passes = sequence_gradients(
            self.model, group, self.windows, objective=self.objective, fisher=self.fisher, seed=self.seed
        )
        for gradients in progress(passes, desc="sequence gradients", total=count, unit="seq", disable=self._quiet):
            for layer, gradient in zip(group, gradients, strict=True):
                held[layer.name].add(gradient * per**-0.5)
        self._held = held
