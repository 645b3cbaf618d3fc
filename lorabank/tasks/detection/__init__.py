"""`object-detection`: pictures with boxes, for the DETR family of transformers."""

from lorabank.tasks.detection.task import KIND as KIND
