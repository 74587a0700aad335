"""The Optimal Brain Surgeon's problem for one layer: saliency, patterns, selection, compensation."""

from kfac_prune.obs.compensate import Compensation, compensate
from kfac_prune.obs.exact import SurgeonPath, surgeon
from kfac_prune.obs.gradient import newton_decrease, newton_point
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
    "SurgeonPath",
    "Unstructured",
    "compensate",
    "newton_decrease",
    "newton_point",
    "project_together",
    "saliency",
    "select",
    "solve",
    "surgeon",
]
