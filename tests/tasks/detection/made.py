"""Builders of tiny detectors on disk, and of pictures with coloured squares in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    DetrImageProcessorPil,
    PreTrainedModel,
    ResNetConfig,
    RTDetrConfig,
    RTDetrResNetConfig,
    RTDetrV2Config,
    TableTransformerConfig,
    YolosConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForObjectDetection

SIDE = 32
COLOURS = {"red": (230, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 235)}
_LABELS: dict[str, Any] = {"num_labels": 3}
_SIZES = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 6,
    **_LABELS,
}


_BACKBONE: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


def _resnet(*stages: str) -> ResNetConfig:
    settings = {**_BACKBONE, "out_features": list(stages)}
    return ResNetConfig(**settings)


def config_of(kind: str) -> Any:
    """The configuration of a tiny detector by its model type, with three labels."""
    plain: dict[str, Any] = {"use_timm_backbone": False, "backbone": None, "backbone_config": _resnet("stage4"), **_SIZES}
    if kind == "yolos":
        return YolosConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=[SIDE, SIDE],
            patch_size=8,
            num_detection_tokens=6,
            initializer_range=0.1,
            **_LABELS,
        )
    if kind in ("rt_detr", "rt_detr_v2"):
        settings = {**_BACKBONE, "out_features": ["stage2", "stage3", "stage4"]}
        backbone = RTDetrResNetConfig(**settings)
        return (RTDetrConfig if kind == "rt_detr" else RTDetrV2Config)(
            backbone_config=backbone,
            encoder_hidden_dim=16,
            encoder_in_channels=[8, 16, 16],
            encoder_layers=1,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            d_model=32,
            num_queries=6,
            decoder_in_channels=[16, 16, 16],
            decoder_ffn_dim=32,
            decoder_layers=2,
            decoder_attention_heads=2,
            **_LABELS,
        )
    if kind == "deformable_detr":
        stages = {"backbone_config": _resnet("stage2", "stage3", "stage4"), "num_feature_levels": 3}
        return DeformableDetrConfig(d_model=32, **{**plain, **stages})
    if kind == "dab-detr":
        return DabDetrConfig(hidden_size=16, **plain)
    of = {"detr": DetrConfig, "table-transformer": TableTransformerConfig, "conditional_detr": ConditionalDetrConfig}
    return of[kind](d_model=16, **plain)


def tiny_detector(kind: str = "yolos", seed: int = 0) -> PreTrainedModel:
    """In eval mode, random; weights and biases large enough that queries, and pictures, are told apart."""
    torch.manual_seed(seed)
    model = AutoModelForObjectDetection.from_config(config_of(kind)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(parameter)
        elif not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def processor(side: int = SIDE) -> DetrImageProcessorPil:
    """One that scales to a square of `side` pixels."""
    return DetrImageProcessorPil(size={"height": side, "width": side})


def saved_detector(folder: Path, kind: str = "yolos") -> Path:
    """With its image processor."""
    tiny_detector(kind).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def picture_of(boxes: list[tuple[str, list[int]]], side: int = SIDE, seed: int = 0) -> Image.Image:
    """A noisy ground with filled squares."""
    ground = np.random.default_rng(seed).integers(0, 60, (side, side, 3), dtype=np.uint8)
    for label, (x, y, width, height) in boxes:
        ground[y : y + height, x : x + width] = COLOURS[label]
    return Image.fromarray(ground)


def drawn_boxes(count: int, labels: tuple[str, ...], seed: int) -> list[list[tuple[str, list[int]]]]:
    """One or two boxes a picture."""
    numbers = np.random.default_rng(seed)
    made = []
    for i in range(count):
        boxes = []
        for j in range(1 + i % 2):
            width, height = (int(n) for n in numbers.integers(8, 14, 2))
            x, y = int(numbers.integers(0, SIDE // 2 - width // 2)) + j * SIDE // 2, int(numbers.integers(0, SIDE - height))
            boxes.append((labels[(i + j) % len(labels)], [min(x, SIDE - width), y, width, height]))
        made.append(boxes)
    return made


def coco_folder(folder: Path, count: int = 12, labels: tuple[str, ...] = ("red", "green"), seed: int = 0) -> Path:
    """Pictures with a COCO file beside them; returns the file. Categories are numbered from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    images, notes = [], []
    for i, boxes in enumerate(drawn_boxes(count, labels, seed)):
        picture_of(boxes, seed=seed * 1000 + i).save(folder / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE})
        for label, box in boxes:
            notes.append({"id": len(notes), "image_id": 100 + i, "category_id": labels.index(label) + 1, "bbox": box})
    content = {
        "images": images,
        "annotations": notes,
        "categories": [{"id": i, "name": label} for i, label in enumerate(labels, 1)],
    }
    path = folder / "_annotations.coco.json"
    path.write_text(json.dumps(content))
    return path


def table_rows(count: int = 6, labels: tuple[str, ...] = ("red", "green"), seed: int = 0) -> list[dict[str, Any]]:
    """Rows as `datasets` has them, pictures in memory."""
    return [
        {
            "image": picture_of(boxes, seed=i),
            "objects": {"bbox": [box for _, box in boxes], "category": [label for label, _ in boxes]},
        }
        for i, boxes in enumerate(drawn_boxes(count, labels, seed))
    ]
