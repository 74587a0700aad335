"""Pruning methods of the field, each one file: what the curvature-based ones are compared with."""

from kfac_prune.baselines.sparsegpt import sparsegpt
from kfac_prune.baselines.wanda import wanda

__all__ = ["sparsegpt", "wanda"]
