"""Tasks x models: scores kept row by row, the tables and pictures made from them, and one report that holds all."""

from __future__ import annotations

from lightning_merge.evaluation.diagnostics import TaskVectorStatistics, sign_conflict, task_vector_statistics
from lightning_merge.evaluation.evaluate import predict, score_model
from lightning_merge.evaluation.plots import (
    plot_conflict,
    plot_cosine,
    plot_id_ood,
    plot_layers,
    plot_tasks,
    write_plots,
)
from lightning_merge.evaluation.records import Difference, ModelFacts, Score
from lightning_merge.evaluation.report import html_report, write_report
from lightning_merge.evaluation.results import Results
from lightning_merge.evaluation.table import ResultsTable, markdown, show

__all__ = [
    "Difference",
    "ModelFacts",
    "Results",
    "ResultsTable",
    "Score",
    "TaskVectorStatistics",
    "html_report",
    "markdown",
    "plot_conflict",
    "plot_cosine",
    "plot_id_ood",
    "plot_layers",
    "plot_tasks",
    "predict",
    "score_model",
    "show",
    "sign_conflict",
    "task_vector_statistics",
    "write_plots",
    "write_report",
]
