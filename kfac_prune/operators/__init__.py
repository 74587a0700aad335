"""The hierarchy of curvatures as one family of operators: identity, diagonal, Kronecker, dense."""

from kfac_prune.operators.base import Curvature, quadratic_loss
from kfac_prune.operators.damping import Damping, DampingRecord
from kfac_prune.operators.dense import Dense
from kfac_prune.operators.diagonal import Diagonal, ScaledIdentity
from kfac_prune.operators.kronecker import Kronecker

__all__ = [
    "Curvature",
    "Damping",
    "DampingRecord",
    "Dense",
    "Diagonal",
    "Kronecker",
    "ScaledIdentity",
    "quadratic_loss",
]
