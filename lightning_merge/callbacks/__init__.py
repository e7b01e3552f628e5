"""Lightning callbacks that learn merges in anybody's trainer, watch them learn, and draw it."""

from lightning_merge.callbacks.adamerging import AdaMerging
from lightning_merge.callbacks.adaptation_trace import AdaptationTrace
from lightning_merge.callbacks.collapse_guard import CollapseGuard
from lightning_merge.callbacks.distilled_merge import DistilledMerge
from lightning_merge.callbacks.surgery import Surgery

__all__ = ["AdaMerging", "AdaptationTrace", "CollapseGuard", "DistilledMerge", "Surgery"]
