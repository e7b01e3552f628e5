"""LightningDataModules that give raw batches of several tasks, and corruptions of their inputs."""

from lightning_merge.data.corruptions import IMAGE_CORRUPTIONS, TEXT_CORRUPTIONS, Corruption
from lightning_merge.data.datamodule import Rows, TaskData, collate
from lightning_merge.data.digits import Digits
from lightning_merge.data.docstrings import DocstringTasks
from lightning_merge.data.huggingface import HuggingFaceDatasets, HuggingFaceSource
from lightning_merge.data.image_arrays import ImageArrays
from lightning_merge.data.sampler import LengthGroupedSampler
from lightning_merge.data.streams import TaskStreams
from lightning_merge.data.task import Split, Task, check_task, fingerprint, subsample
from lightning_merge.data.text_tables import TextTables

__all__ = [
    "IMAGE_CORRUPTIONS",
    "TEXT_CORRUPTIONS",
    "Corruption",
    "Digits",
    "DocstringTasks",
    "HuggingFaceDatasets",
    "HuggingFaceSource",
    "ImageArrays",
    "LengthGroupedSampler",
    "Rows",
    "Split",
    "Task",
    "TaskData",
    "TaskStreams",
    "TextTables",
    "check_task",
    "collate",
    "fingerprint",
    "subsample",
]
