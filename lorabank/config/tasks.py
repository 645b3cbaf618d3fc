"""Kinds of work: their names, and the sections of settings that they have beside those of every run."""

from __future__ import annotations

from collections.abc import Mapping

from lorabank.config.classification import ClassificationConfig
from lorabank.config.detection import DetectionConfig

DEFAULT_TASK = "text-generation"
TASKS = (DEFAULT_TASK, "text-classification", "object-detection")
"""By the names of transformers' pipelines."""
TASK_SECTIONS: Mapping[str, type] = {"classification": ClassificationConfig, "detection": DetectionConfig}
"""Section of a configuration file to its settings; each is a field of `TrainConfig` too."""
