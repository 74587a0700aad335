"""The Optimal Brain Surgeon's problem for one layer: saliency, patterns, selection, compensation."""

from kfac_prune.obs.compensate import Compensation, compensate
from kfac_prune.obs.patterns import NM, Pattern, Unstructured, project_together
from kfac_prune.obs.saliency import saliency
from kfac_prune.obs.select import FAST, THOROUGH, AdmmSchedule, Selection, select
from kfac_prune.obs.solve import Solution, solve

__all__ = [
    "FAST",
    "NM",
    "THOROUGH",
    "AdmmSchedule",
    "Compensation",
    "Pattern",
    "Selection",
    "Solution",
    "Unstructured",
    "compensate",
    "project_together",
    "saliency",
    "select",
    "solve",
]
