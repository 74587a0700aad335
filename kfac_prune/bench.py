"""One model that is pruned many times: what all the times share, computed when first needed, and the pruned copies."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kfac_prune.allocate import LossCurve
from kfac_prune.block_training import Reconstruction
from kfac_prune.curvature.estimate import estimate_factors
from kfac_prune.curvature.factors import Factors
from kfac_prune.curvature.sequences import STATISTICS, SequenceFisher
from kfac_prune.curves import loss_curves
from kfac_prune.data import Windows
from kfac_prune.fisher import FisherType
from kfac_prune.models import Layer, WeightSwap, prunable_layers
from kfac_prune.objective import CAUSAL, Objective
from kfac_prune.obs import NM
from kfac_prune.operators import Damping
from kfac_prune.permute import permute_model
from kfac_prune.plan import Plan, make_plan, prune
from kfac_prune.probe import Probe
from kfac_prune.problems import PruningMethod
from kfac_prune.quality import Quality, evaluate
from kfac_prune.reconstruction import reconstruct_sparse
from kfac_prune.refitting import refit
from kfac_prune.stream import BlockStack, begun_at

#: Stages whose results all copies share.
SHARED_STAGES = ("curvature", "curves")


class Bench:
    """A dense model, its data, and what pruning it many times needs of both.

    The dense model stays as it is: what is pruned is a copy.

    Args:
        model: dense, in evaluation mode.
        calibration: windows to estimate on.
        test: windows to measure on.
        layers: of the model, to prune; None = all.
        damping: of the factors; None is ``Damping()``.
        objective: what the model computes.
        fisher: see ``estimate_factors``.
        seed: of the sampled labels, of permutations and reconstruction.
        batch_size: windows per pass.
        probed: calibration windows of a probe; None leaves them to ``Probe.on``.
        quiet: show no progress bars.

    Attributes:
        seconds: spent so far, by stage, on what all copies share.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Windows,
        test: Windows,
        *,
        layers: Sequence[Layer] | None = None,
        damping: Damping | None = None,
        objective: Objective = CAUSAL,
        fisher: FisherType = "sampled",
        seed: int = 0,
        batch_size: int = 4,
        probed: int | None = None,
        quiet: bool = True,
    ) -> None:
        self.model, self.calibration, self.test = model, calibration, test
        self.layers = prunable_layers(model) if layers is None else list(layers)
        self.damping, self.objective, self.fisher, self.seed = damping or Damping(), objective, fisher, seed
        self.batch_size, self.probed, self.quiet = batch_size, probed, quiet
        self.seconds: dict[str, float] = {}

    @cached_property
    def factors(self) -> Factors:
        """Curvature of all layers."""
        with timed(self.seconds, "curvature"):
            return self._estimate(self.model, self.layers)

    def _estimate(self, model: PreTrainedModel, layers: Sequence[Layer]) -> Factors:
        return estimate_factors(
            model,
            layers,
            self.calibration,
            objective=self.objective,
            fisher=self.fisher,
            seed=self.seed,
            batch_size=self.batch_size,
            quiet=self.quiet,
        )

    def _sequences(
        self, method: Any, model: PreTrainedModel, layers: Sequence[Layer], factors: Factors
    ) -> SequenceFisher | None:
        """What a method needs besides the factors."""
        if method not in STATISTICS:
            return None
        options: Any = {"objective": self.objective, "fisher": self.fisher, "seed": self.seed, "quiet": self.quiet}
        return SequenceFisher(method, model, layers, factors, self.calibration, **options)

    @cached_property
    def curves(self) -> dict[str, LossCurve]:
        """Loss curves of all layers."""
        factors = self.factors
        layers = [layer for layer in self.layers if layer.name in factors.layers]
        with timed(self.seconds, "curves"):
            return loss_curves(layers, factors, damping=self.damping, quiet=self.quiet)

    @cached_property
    def dense(self) -> Quality:
        """Of the dense model."""
        return self._evaluate(self.model, label="dense")

    def _evaluate(self, model: PreTrainedModel, **options: Any) -> Quality:
        common: Any = {"objective": self.objective, "batch_size": self.batch_size, "quiet": self.quiet}
        return evaluate(model, self.test, **common, **options)

    @cached_property
    def _dense_streams(self) -> tuple[BlockStack, list[Tensor]]:
        """Test windows within the dense model, before its last block: all else of it is run but once."""
        stack = BlockStack(self.model, self.test, self.batch_size)
        streams = stack.entries
        with torch.no_grad():
            for block in range(len(stack.names) - 1):
                streams = [stack.keep(stack.run(block, batch, x)) for batch, x in enumerate(streams)]
        return stack, streams

    def measure(self, model: PreTrainedModel) -> Quality:
        """Of a pruned copy, beside the dense model."""
        stack, streams = self._dense_streams
        with begun_at(stack, len(stack.names) - 1, streams):
            return self._evaluate(model, dense=self.model, label="pruned")

    def probe(self, model: PreTrainedModel) -> Probe:
        """A probe of a copy that is still dense."""
        if self.probed is None:
            return Probe.on(model, self.calibration, self.batch_size, self.objective)
        return Probe(model, self.calibration.split(self.probed)[1], self.batch_size, self.objective)

    def prune(
        self,
        method: PruningMethod,
        *,
        allocation: str,
        sparsity: float | None = None,
        pattern: NM | None = None,
        permute: bool = False,
    ) -> PrunedCopy:
        """Prune a copy of the model.

        Args:
            method: to prune by.
            allocation: see ``make_plan``.
            sparsity: fraction to remove, or None with a pattern.
            pattern: n:m, or None for unstructured.
            permute: channels first, for the pattern.
        """
        factors, model = self.factors, copy.deepcopy(self.model)
        seconds: dict[str, float] = {}
        names = {layer.name for layer in self.layers} & factors.layers.keys()  # experts without tokens are left
        layers = [layer for layer in prunable_layers(model) if layer.name in names]
        if permute:
            assert pattern is not None
            factors = replace(factors, layers=copy.copy(factors.layers), streams=dict(factors.streams))
            with timed(seconds, "permute"):
                permute_model(
                    model, layers, factors, pattern, self.calibration, damping=self.damping, seed=self.seed,
                    objective=self.objective,
                )  # fmt: skip
        curves = self.curves if allocation == "curves" and pattern is None else None
        with timed(seconds, "plan"):
            plan = make_plan(
                layers,
                factors,
                sparsity=sparsity,
                pattern=pattern,
                method=method,
                allocation=allocation,
                damping=self.damping,
                curves=curves,
                probe=self.probe(model) if method == "kfac" else None,
                estimate=lambda: self._estimate(model, layers),
                sequences=self._sequences(method, model, layers, factors),
                quiet=self.quiet,
            )
        shared = {name: self.seconds[name] for name in SHARED_STAGES if name in self.seconds}
        return PrunedCopy(self, model, layers, factors, plan, pattern, prune(layers, plan), shared | seconds)


@dataclass
class PrunedCopy:
    """A copy of the model, pruned by a plan; repairs begin from there each time.

    Attributes:
        bench: where it comes from.
        model: pruned.
        layers: of it.
        factors: of them, permuted as they are.
        plan: that was applied.
        pattern: n:m, or None.
        dense: the weights before.
        seconds: by stage, those that are shared included; "repair" is the last one.
    """

    bench: Bench
    model: PreTrainedModel
    layers: list[Layer]
    factors: Factors
    plan: Plan
    pattern: NM | None
    dense: WeightSwap
    seconds: dict[str, float]

    def measure(self) -> Quality:
        """Of the model as it is now, beside the dense one."""
        return self.bench.measure(self.model)

    def refit(self) -> None:
        """Repair the pruned model in closed form."""
        bench = self.bench
        self._repair(lambda: refit(
            self.model, self.layers, self.plan, self.factors, bench.calibration, self.dense.swapped_in,
            pattern=self.pattern, damping=bench.damping, batch_size=bench.batch_size, quiet=bench.quiet,
        ))  # fmt: skip

    def reconstruct(self, settings: Reconstruction) -> None:
        """Repair the pruned model block by block."""
        bench = self.bench
        self._repair(lambda: reconstruct_sparse(
            self.model, self.plan, self.factors, bench.calibration, self.dense.swapped_in, settings,
            damping=bench.damping, quiet=bench.quiet,
        ))  # fmt: skip

    def restart(self) -> None:
        """Undo repairs."""
        self.seconds.pop("repair", None)
        for layer, planned in zip(self.layers, self.plan.layers, strict=True):
            layer.assign(planned.weight, planned.bias)

    def _repair(self, repair: Callable[[], Any]) -> None:
        self.restart()
        with timed(self.seconds, "repair"):
            repair()


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds that the block takes into a mapping under a name."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
