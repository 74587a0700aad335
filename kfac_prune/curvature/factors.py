"""Kronecker factors of all layers: what they are, where they wait, and the operators that they give."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kfac_prune.curvature.few_tokens import FewTokens
from kfac_prune.errors import InputError
from kfac_prune.linalg import packed_triangle, unpacked_triangle
from kfac_prune.memory import mapped
from kfac_prune.operators import Curvature, Damping, DampingRecord, Diagonal, Kronecker, ScaledIdentity

#: Of sums in float32: a variance below this fraction of the second moment is not known.
ROUNDING = 1e-7
#: Curvature that takes more bytes is not kept for an interrupted run: on the machines that run such models it is
#: estimated again in about the time that writing, hashing and reading it takes.
CURVATURE_BYTES = 8 * 2**30
#: The hierarchy: H = I, H diagonal, H = I ⊗ A, H = G ⊗ A.
Method = Literal["magnitude", "obd", "layerwise", "kfac"]


@dataclass(frozen=True)
class KnownFactors:
    """What factorising a layer's damped A and G told, in little memory.

    Attributes:
        damping: that was enough.
        inverse_diagonals: see ``Kronecker``.
    """

    damping: Sequence[DampingRecord]
    inverse_diagonals: tuple[Tensor | None, Tensor]


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
        self,
        method: Method,
        damping: Damping,
        *,
        where: str,
        dtype: torch.dtype = torch.float32,
        known: KnownFactors | None = None,
    ) -> tuple[Curvature, list[DampingRecord]]:
        """The layer's curvature in one of the approximations.

        A bias is eliminated exactly: for any G, minimising over it leaves the quadratic with A replaced by the
        covariance about the mean, ``A − E[a]E[a]ᵀ`` (the Schur complement of the augmented A).

        Args:
            method: which approximation.
            damping: of A and G (Kronecker forms only).
            where: the layer's name, for messages.
            dtype: of the operator.
            known: of an earlier operator from the same arguments, which spares the factorisations; None factorises.

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
        records = dict.fromkeys("AG") if known is None else {record.factor: record for record in known.damping}
        diagonals = None if known is None else known.inverse_diagonals
        a, record_a = damping(a.to(dtype), name="A", where=where, known=records["A"])
        if method == "layerwise":
            return Kronecker(a, None, out_features=shape[0], inverse_diagonals=diagonals), [record_a]
        g, record_g = damping(self.g.to(dtype), name="G", where=where, known=records["G"])
        return Kronecker(a, g, inverse_diagonals=diagonals), [record_a, record_g]

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
        layers: per layer name; a dictionary, or a ``FactorShelf``; an expert that saw no token has none.
        streams: per block name, E[g gᵀ] [d, d] of the gradients at its output, the residual stream; undamped.
        tokens: calibration tokens that were seen.
        data_sha256: content hash of the calibration windows.
    """

    layers: MutableMapping[str, LayerFactors]
    streams: dict[str, Tensor]
    tokens: int
    data_sha256: str


class FactorShelf(MutableMapping[str, LayerFactors]):
    """Factors that wait as packed triangles until a layer is asked for; the last one asked for stays on the device.

    A matrix that several layers share waits once.

    Args:
        device: that the factors come to.
        on_disk: they wait in files that are mapped into memory (in the folder for temporary files; see TMPDIR), which
            vanish with them; otherwise in main memory.
    """

    def __init__(self, device: torch.device, *, on_disk: bool) -> None:
        self._device, self._on_disk = device, on_disk
        self._waiting: dict[str, LayerFactors] = {}  # a and g are triangles
        self._known: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}  # id of a matrix -> it, and how it waits
        self._last: tuple[str, LayerFactors] | None = None

    def __getitem__(self, name: str) -> LayerFactors:
        if self._last is None or self._last[0] != name:
            self._last = None  # given up before the next one takes its memory
            waiting = self._waiting[name]
            a, g = (unpacked_triangle(t.to(self._device, non_blocking=True)) for t in (waiting.a, waiting.g))
            self._last = name, replace(waiting, a=a, g=g, mean=waiting.mean.to(self._device))
        return self._last[1]

    def __setitem__(self, name: str, factors: LayerFactors) -> None:
        self._last = None
        a, g = self._put_away(factors.a), self._put_away(factors.g)
        self._waiting[name] = replace(factors, a=a, g=g, mean=factors.mean.cpu())

    def __delitem__(self, name: str) -> None:
        self._last = None
        del self._waiting[name]

    def __copy__(self) -> FactorShelf:
        """Another shelf with the same triangles."""
        other = FactorShelf(self._device, on_disk=self._on_disk)
        other._waiting = dict(self._waiting)
        return other

    def __iter__(self) -> Iterator[str]:
        return iter(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)

    def _put_away(self, matrix: Tensor) -> Tensor:
        """A matrix's triangle, where it waits."""
        self._known = {key: value for key, value in self._known.items() if value[0]() is not None}
        known = self._known.get(id(matrix))
        if known is not None:
            return known[1]
        triangle = packed_triangle(matrix).cpu()
        triangle = mapped(triangle) if self._on_disk else triangle
        self._known[id(matrix)] = weakref.ref(matrix), triangle
        return triangle
