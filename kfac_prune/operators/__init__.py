"""The hierarchy of curvatures as one family of operators, from the identity to the full matrix."""

from kfac_prune.operators.base import Curvature, quadratic_loss
from kfac_prune.operators.block_diagonal import BlockDiagonal
from kfac_prune.operators.damping import Damping, DampingRecord
from kfac_prune.operators.dense import Dense
from kfac_prune.operators.diagonal import Diagonal, ScaledIdentity
from kfac_prune.operators.direct_sum import DirectSum
from kfac_prune.operators.eigen_kronecker import EigenKronecker
from kfac_prune.operators.indefinite import DefiniteRecord, make_definite
from kfac_prune.operators.kronecker import Kronecker
from kfac_prune.operators.low_rank import LowRank
from kfac_prune.operators.scaled import Scaled

__all__ = [
    "BlockDiagonal",
    "Curvature",
    "Damping",
    "DampingRecord",
    "DefiniteRecord",
    "Dense",
    "Diagonal",
    "DirectSum",
    "EigenKronecker",
    "Kronecker",
    "LowRank",
    "Scaled",
    "ScaledIdentity",
    "make_definite",
    "quadratic_loss",
]
