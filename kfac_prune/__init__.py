"""One-shot pruning of transformers by the Optimal Brain Surgeon under a Kronecker-factored Hessian.

    model, tokenizer = load_model("folder"), load_tokenizer("folder")
    windows = load_windows("train.txt", tokenizer, samples=128, seqlen=256)
    layers = prunable_layers(model)
    factors = estimate_factors(model, layers, windows)
    plan = make_plan(layers, factors, sparsity=0.5, probe=Probe.on(model, windows))  # nothing has changed yet
    print(plan.table())
    dense = prune(layers, plan)                          # in place
    reconstruct_sparse(model, plan, factors, windows, dense.swapped_in, Reconstruction(epochs=6))
    save_model(model, tokenizer, Path("pruned"))

``run(Recipe(model=..., data=..., out=...))`` is all of it with measurement, as the command line does it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfac_prune.block_training import Reconstruction
    from kfac_prune.config import Recipe
    from kfac_prune.curvature.estimate import estimate_factors
    from kfac_prune.curvature.factors import Factors
    from kfac_prune.data import Windows, load_windows
    from kfac_prune.errors import InputError
    from kfac_prune.experts import split_experts
    from kfac_prune.export import save_model
    from kfac_prune.loading import load, load_model, load_tokenizer
    from kfac_prune.models import prunable_layers
    from kfac_prune.obs import NM
    from kfac_prune.operators import Damping
    from kfac_prune.pipeline import run
    from kfac_prune.plan import Plan, make_plan, prune
    from kfac_prune.probe import Probe
    from kfac_prune.quality import Quality, evaluate
    from kfac_prune.reconstruction import reconstruct_sparse
    from kfac_prune.refitting import refit
    from kfac_prune.structure.prune import prune_structured, weights_target
    from kfac_prune.structure.repair import reconstruct_smaller

_HOME = {
    "Damping": "operators",
    "Factors": "curvature.factors",
    "InputError": "errors",
    "NM": "obs",
    "Plan": "plan",
    "Probe": "probe",
    "Quality": "quality",
    "Recipe": "config",
    "Reconstruction": "block_training",
    "Windows": "data",
    "estimate_factors": "curvature.estimate",
    "evaluate": "quality",
    "load": "loading",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "load_windows": "data",
    "make_plan": "plan",
    "prunable_layers": "models",
    "prune": "plan",
    "prune_structured": "structure.prune",
    "reconstruct_smaller": "structure.repair",
    "reconstruct_sparse": "reconstruction",
    "refit": "refitting",
    "run": "pipeline",
    "save_model": "export",
    "split_experts": "experts",
    "weights_target": "structure.prune",
}

__all__ = [
    "NM",
    "Damping",
    "Factors",
    "InputError",
    "Plan",
    "Probe",
    "Quality",
    "Recipe",
    "Reconstruction",
    "Windows",
    "estimate_factors",
    "evaluate",
    "load",
    "load_model",
    "load_tokenizer",
    "load_windows",
    "make_plan",
    "prunable_layers",
    "prune",
    "prune_structured",
    "reconstruct_smaller",
    "reconstruct_sparse",
    "refit",
    "run",
    "save_model",
    "split_experts",
    "weights_target",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import kfac_prune`` and ``--help`` do not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'kfac_prune' has no attribute {name!r}")
    return getattr(import_module(f"kfac_prune.{_HOME[name]}"), name)
