"""Pruning methods of the field, each one file: what the curvature-based ones are compared with.

SNIP, lottery tickets and soft pruning train any module by a callable; the others prune trained models by the factors of
their layers. A is the dense model's throughout, as for every method here (LLM Surgeon's is estimated anew per shot).
The authors' code estimates it block by block, with those before already pruned; on two small models that moved the loss
increase of SparseGPT and Wanda by at most 5 %, up or down.
"""

from kfac_prune.baselines.alps import alps
from kfac_prune.baselines.llm_surgeon import llm_surgeon
from kfac_prune.baselines.lottery import lottery_ticket
from kfac_prune.baselines.owl import owl
from kfac_prune.baselines.snip import snip
from kfac_prune.baselines.soft import soft_pruning
from kfac_prune.baselines.sparsegpt import sparsegpt
from kfac_prune.baselines.training import apply_masks, masked_training
from kfac_prune.baselines.wanda import wanda

__all__ = [
    "alps",
    "apply_masks",
    "llm_surgeon",
    "lottery_ticket",
    "masked_training",
    "owl",
    "snip",
    "soft_pruning",
    "sparsegpt",
    "wanda",
]
