"""Tiny configurations of families that see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers as hf
from torch import nn

from tests.bank.family import IMAGE, ROWS, SIZES, TWO_SIDES, Family, named, pictures, random, video

_WINDOWS: Mapping[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
_STAGES: Mapping[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
_PYRAMID: Mapping[str, Any] = {
    "depths": [1] * 4,
    "hidden_sizes": [8] * 4,
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2] * 4,
}


def _sees(model: str, size: int = 16, known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    return named("vision", model, pictures(size), known, **sizes)


def _vit(name: str, **sizes: Any) -> Family:
    return _sees(f"{name}ForImageClassification", **{**IMAGE, **sizes})


def _detects(name: str, known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    def make() -> nn.Module:
        backbone = hf.ResNetConfig(**_STAGES, layer_type="basic", out_features=["stage2"])
        config = getattr(hf, f"{name}Config")(
            **{
                "backbone_config": backbone,
                "d_model": 16,
                "num_queries": 5,
                "use_timm_backbone": False,
                "use_pretrained_backbone": False,
                "backbone": None,
                **TWO_SIDES,
                **sizes,
            }
        )
        return getattr(hf, f"{name}ForObjectDetection")(config)

    return Family(kind="vision", make=make, inputs=pictures(32), **(known or {}))


VISION: Mapping[str, Family] = {
    "vit": _vit("ViT"),
    "deit": _vit("DeiT"),
    "beit": _vit("Beit"),
    "data2vec-vision": _vit("Data2VecVision"),
    "dinov2": _vit("Dinov2"),
    "dinov2_with_registers": _vit("Dinov2WithRegisters"),
    "dinov3_vit": _sees("DINOv3ViTModel", **IMAGE),
    "vit_msn": _vit("ViTMSN"),
    "ijepa": _vit("IJepa"),
    "vit_mae": _sees("ViTMAEModel", **IMAGE, known={"mixes": True}),
    "yolos": _sees("YolosForObjectDetection", **{**IMAGE, "image_size": [16, 16]}, num_detection_tokens=5),
    "vitdet": _sees("VitDetModel", **IMAGE, window_size=2, window_block_indices=[0]),
    "swin": _sees("SwinForImageClassification", 32, **_WINDOWS),
    "swinv2": _sees("Swinv2ForImageClassification", 32, {"apart": "its input is distances in a window"}, **_WINDOWS),
    "convnext": _sees("ConvNextForImageClassification", 32, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2),
    "convnextv2": _sees("ConvNextV2ForImageClassification", 32, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2),
    "resnet": _sees("ResNetForImageClassification", 32, {"targets": ["all-linear", "all-conv"]}, **_STAGES, layer_type="basic"),
    "regnet": _sees("RegNetForImageClassification", 32, **_STAGES, groups_width=4),
    "bit": _sees("BitForImageClassification", 32, **_STAGES, num_groups=2),
    "efficientnet": _sees(
        "EfficientNetForImageClassification",
        32,
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
        kernel_sizes=[3, 3],
        in_channels=[32, 16],
        out_channels=[16, 24],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 6],
        depthwise_padding=[],
    ),
    "mobilenet_v1": _sees("MobileNetV1ForImageClassification", 32, image_size=32, depth_multiplier=0.25),
    "mobilenet_v2": _sees("MobileNetV2ForImageClassification", 32, image_size=32, depth_multiplier=0.25),
    "mobilevit": _sees(
        "MobileViTForImageClassification",
        32,
        image_size=32,
        patch_size=2,
        hidden_sizes=[16] * 3,
        neck_hidden_sizes=[8] * 7,
        num_attention_heads=2,
    ),
    "levit": _sees(
        "LevitForImageClassification",
        32,
        image_size=32,
        hidden_sizes=[16] * 3,
        num_attention_heads=[2] * 3,
        depths=[1] * 3,
        key_dim=[4] * 3,
        down_ops=[["Subsample", 4, 4, 2, 2, 2]] * 2,
    ),
    "poolformer": _sees("PoolFormerForImageClassification", 32, depths=[1] * 4, hidden_sizes=[8] * 4),
    "pvt": _sees("PvtForImageClassification", 32, image_size=32, **_PYRAMID),
    "focalnet": _sees(
        "FocalNetForImageClassification",
        32,
        image_size=32,
        embed_dim=8,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "hiera": _sees(
        "HieraForImageClassification",
        32,
        image_size=[32, 32],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        patch_kernel=[7, 7],
        patch_stride=[4, 4],
        patch_padding=[3, 3],
        masked_unit_size=[2, 2],
        query_stride=[2, 2],
        num_query_pool=1,
    ),
    "segformer": _sees("SegformerForSemanticSegmentation", 32, **_PYRAMID, decoder_hidden_size=8),
    "glpn": _sees("GLPNForDepthEstimation", 32, **_PYRAMID, decoder_hidden_size=8),
    "detr": _detects("Detr"),
    "conditional_detr": _detects("ConditionalDetr", decoder_layers=2),
    "timesformer": named("vision", "TimesformerForVideoClassification", video, **IMAGE, num_frames=2),
    "videomae": named("vision", "VideoMAEForVideoClassification", video, **IMAGE, num_frames=2, tubelet_size=2),
    "vivit": named("vision", "VivitForVideoClassification", video, **SIZES, image_size=16, num_frames=2, tubelet_size=[2, 4, 4]),
    "sam": named(
        "vision",
        "SamModel",
        lambda: {**pictures(32)(), "input_points": random(ROWS, 2, 1, 2).abs() * 9},
        vision_config={
            **SIZES,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "mlp_dim": 24,
            "output_channels": 16,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 4, "mask_input_channels": 4},
        mask_decoder_config={**SIZES, "num_attention_heads": 2, "mlp_dim": 24, "iou_head_hidden_dim": 16},
    ),
    "siglip_vision_model": _sees("SiglipVisionModel", **IMAGE),
}
