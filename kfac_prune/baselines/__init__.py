"""Pruning methods of the field, each one file: what the curvature-based ones are compared with.

A is the dense model's throughout, as for every method here. The authors' code estimates it block by block, with those
before already pruned; on two small models that moved the loss increase by at most 5 %, up or down.
"""

from kfac_prune.baselines.sparsegpt import sparsegpt
from kfac_prune.baselines.wanda import wanda

__all__ = ["sparsegpt", "wanda"]
