"""Layers whose kept weights are trained while their masks stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kfac_prune import ranks
from kfac_prune.errors import InputError
from kfac_prune.models import Layer


class MaskedParameters:
    """The parameters of some layers, and float32 copies of them that an optimizer moves.

    Weights that are pruned have no gradient, so Adam leaves them at zero. The copies are in units of the root mean
    square of a layer's kept weights, so that one learning rate suits all layers; the forward pass uses them as the
    model's dtype rounds them, so what is measured is what is kept. (A float32 weight without gradient may change in its
    last bit.)

    Args:
        layers: to train.
        masks: [out, in] per layer, True = kept; layers without one keep every weight.
    """

    def __init__(self, layers: Sequence[Layer], masks: Mapping[str, Tensor]) -> None:
        self.parameters: list[nn.Parameter] = []
        self._masks: list[Tensor | None] = []
        self._units: list[float] = []
        sizes = [_size(layer.weight) for layer in layers]
        for layer, size in zip(layers, sizes, strict=True):
            for parameter in layer.parameters():
                mask = masks.get(layer.name) if parameter.ndim > 1 else None
                self.parameters.append(parameter)
                # bytes: on a CPU a product with bool takes twice to five times as long
                self._masks.append(None if mask is None else layer.stored(mask).to(parameter.device).view(torch.uint8))
                self._units.append(size or max(sizes) or 1.0)  # of layers without weights biases learn

    def values(self) -> list[Tensor]:
        """As they are now."""
        return [p.data for p in self.parameters]

    def assign(self, values: Sequence[Tensor]) -> None:
        """Replace them; the tensors that they had are not written to."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    def copies(self) -> list[Tensor]:
        """New float32 copies, in units of their layer."""
        return [(p.data.float() / unit).contiguous() for p, unit in zip(self.parameters, self._units, strict=True)]

    def take_over(self, copies: Sequence[Tensor]) -> None:
        """Assign what the copies are now."""
        moved = zip(copies, self._units, self.parameters, strict=True)
        self.assign([(copy * unit).to(p.dtype) for copy, unit, p in moved])

    def differentiate(self, total: Tensor, count: int, copies: Sequence[Tensor]) -> Tensor:
        """Leave the gradient of a mean with the copies, zero off the masks; returns the mean.

        It is that of the sum, by the parameters: multiples of the mean's and of that by the copies, which ``adam`` does
        not see. (In float16 the gradient of the mean would underflow.)

        Args:
            total: the sum of a loss over a batch, with a graph.
            count: of what it is summed over. Under several processes the mean is over the batches of all.
            copies: of the parameters.
        """
        loss, everywhere = ranks.summed(torch.stack([total.detach(), torch.full_like(total, count)]))[0].unbind()
        everywhere = everywhere.clamp_min(1)
        # an expert that no token of the batch reaches has no gradient
        found = torch.autograd.grad(total, self.parameters, allow_unused=True, materialize_grads=True)
        # NCCL sends, and fused Adam reads, what lies in order
        gradients = ranks.summed(*(gradient.contiguous() for gradient in found))
        for copy, gradient, mask in zip(copies, gradients, self._masks, strict=True):
            gradient = gradient.float()
            copy.grad = gradient if mask is None else gradient * mask
        return loss / everywhere


def adam(copies: Sequence[Tensor], rate: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam for copies of parameters, whose steps do not depend on the scale of a loss, however small that is."""
    return torch.optim.Adam(copies, lr=rate, betas=betas, eps=1e-16, fused=True)


def mean_everywhere(sums: Sequence[tuple[float, int]], device: torch.device) -> float:
    """The mean of a loss over the held-out batches of all processes, from every batch's sum and what it is over.

    Raises:
        InputError: it is over nothing.
    """
    both = torch.tensor([(0.0, 0), *sums], dtype=torch.float64, device=device).sum(0)
    total, count = ranks.summed(both)[0].tolist()
    if not count:
        raise InputError(
            "no position of the calibration windows that are held out counts (a causal model's need a next token); use "
            "longer text, more --samples, or --reconstruct 0 and --recover-epochs 0"
        )
    return float(total / count)


def _size(weight: Tensor) -> float:
    """Root mean square of the entries that are not zero."""
    return float(weight.float().norm() / weight.count_nonzero().clamp_min(1).sqrt())
