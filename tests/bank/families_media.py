"""Tiny configurations of families that hear, that see beside text, or that go on with numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.bank.family import (
    IMAGE,
    ROWS,
    SIZES,
    TOKENS,
    TWO_SIDES,
    Family,
    Inputs,
    ids,
    in_place_of_tokens,
    named,
    random,
    text,
    wave,
    with_pictures,
)

_WAVES: Mapping[str, Any] = {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
_POSITIONS: Mapping[str, Any] = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_TEXT: Mapping[str, Any] = {**SIZES, **TOKENS, "max_position_embeddings": 64, "projection_dim": 8}
_SEEN: Mapping[str, Any] = {**IMAGE, "projection_dim": 8}
_LLAMA: Mapping[str, Any] = {"model_type": "llama", **SIZES, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64}
_PACKED = "its input is the patches of all pictures, one after another"


def _hears(model: str, inputs: Inputs, known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    return named("audio", model, inputs, known, **sizes)


def _ctc(name: str, known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    return _hears(f"{name}ForCTC", wave(), known, **{**SIZES, **_WAVES, **_POSITIONS, **TOKENS, **sizes})


def _several(model: str, inputs: Inputs, known: Mapping[str, Any] | None = None, **sizes: Any) -> Family:
    return named("text and pictures", model, inputs, known, **sizes)


def _alike(name: str) -> Family:
    """Text and pictures compared."""
    sizes = {"text_config": dict(_TEXT), "vision_config": dict(_SEEN), "projection_dim": 8}
    return _several(f"{name}Model", with_pictures(lambda: {"input_ids": ids()}), **sizes)


def _qwen_pictures() -> dict[str, Any]:
    """A picture a row, 16 patches of which are merged into 4 features."""
    row = [torch.full((ROWS, 1), 50), torch.full((ROWS, 4), 60), torch.full((ROWS, 1), 51), ids()]
    places = torch.cat(row, 1)
    patches = random(ROWS * 16, 3 * 2 * 4 * 4)
    grid = torch.tensor([[1, 4, 4]] * ROWS)
    return {"input_ids": places, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (places == 60).int()}


def _qwen(model: str, **vision: Any) -> Family:
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    return _several(
        model,
        _qwen_pictures,
        {"apart": _PACKED},
        text_config={**SIZES, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_parameters": rotary},
        vision_config={"num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, **vision},
        image_token_id=60,
        vision_start_token_id=50,
        vision_end_token_id=51,
        video_token_id=59,
    )


AUDIO: Mapping[str, Family] = {
    "whisper": _hears(
        "WhisperForConditionalGeneration",
        lambda: {"input_features": random(ROWS, 8, 24), "decoder_input_ids": ids(5)},
        d_model=16,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=64,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **TWO_SIDES,
        **TOKENS,
    ),
    "wav2vec2": _ctc("Wav2Vec2"),
    "hubert": _ctc("Hubert"),
    "unispeech": _ctc("UniSpeech"),
    "data2vec-audio": _ctc("Data2VecAudio", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
    "sew": _ctc("SEW", squeeze_factor=2),
    "wav2vec2-conformer": _ctc("Wav2Vec2Conformer", {"apart": r"linear_pos.*names 3 rows.*input has 1 "}),
    "wavlm": _ctc(
        "WavLM", {"exclude": ["re:.*attention\\.(q|k|v|out)_proj"], "left": r"q_proj \(its weight is read and it isn't called\)"}
    ),
    "wav2vec2-bert": _hears(
        "Wav2Vec2BertForCTC",
        lambda: {"input_features": random(ROWS, 8, 12)},
        **SIZES,
        **TOKENS,
        feature_projection_input_dim=12,
    ),
    "audio-spectrogram-transformer": named(
        "audio",
        "ASTForAudioClassification",
        lambda: {"input_values": random(ROWS, 24, 16)},
        **SIZES,
        patch_size=4,
        max_length=24,
        num_mel_bins=16,
        frequency_stride=4,
        time_stride=4,
    ),
    "speech_to_text": _hears(
        "Speech2TextForConditionalGeneration",
        lambda: {"input_features": random(ROWS, 16, 8), "decoder_input_ids": ids(5)},
        d_model=16,
        input_feat_per_channel=8,
        input_channels=1,
        conv_channels=16,
        max_source_positions=32,
        max_target_positions=32,
        decoder_start_token_id=1,
        **TWO_SIDES,
        **TOKENS,
    ),
    "speecht5": _hears(
        "SpeechT5ForSpeechToText",
        lambda: {**wave()(), "decoder_input_ids": ids(5)},
        hidden_size=16,
        decoder_start_token_id=1,
        **_WAVES,
        **_POSITIONS,
        **TWO_SIDES,
        **TOKENS,
    ),
    "vits": _hears(
        "VitsModel",
        text,
        {"mixes": True},
        **SIZES,
        ffn_dim=24,
        vocab_size=61,
        flow_size=16,
        spectrogram_bins=9,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        duration_predictor_filter_channels=8,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        depth_separable_num_layers=1,
        duration_predictor_num_flows=2,
        prior_encoder_num_flows=2,
    ),
    "clap_audio_model": _hears(
        "ClapAudioModel",
        lambda: {"input_features": random(ROWS, 1, 64, 16)},
        spec_size=32,
        num_mel_bins=16,
        patch_size=4,
        patch_stride=[4, 4],
        hidden_size=16,
        patch_embeds_hidden_size=8,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        window_size=4,
        num_classes=3,
        projection_dim=8,
    ),
}
SEVERAL: Mapping[str, Family] = {
    "clip": _alike("CLIP"),
    "chinese_clip": _alike("ChineseCLIP"),
    "altclip": _alike("AltCLIP"),
    "siglip": _alike("Siglip"),
    "blip": _several(
        "BlipForConditionalGeneration",
        with_pictures(lambda: {"input_ids": ids()}),
        text_config={**_TEXT, "encoder_hidden_size": 16, "sep_token_id": 2},
        vision_config=dict(IMAGE),
        projection_dim=8,
    ),
    "blip-2": _several(
        "Blip2ForConditionalGeneration",
        in_place_of_tokens(4),
        vision_config=dict(IMAGE),
        qformer_config={**SIZES, "encoder_hidden_size": 16, "vocab_size": 61, "cross_attention_frequency": 1, "pad_token_id": 0},
        text_config={"model_type": "opt", **_TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16},
        num_query_tokens=4,
        image_token_index=60,
    ),
    "llava": _several(
        "LlavaForConditionalGeneration",
        in_place_of_tokens(16),
        vision_config={"model_type": "clip_vision_model", **_SEEN},
        text_config=dict(_LLAMA),
        image_token_index=60,
        vision_feature_layer=-1,
    ),
    "paligemma": _several(
        "PaliGemmaForConditionalGeneration",
        lambda: {**in_place_of_tokens(16)(), "token_type_ids": torch.zeros(ROWS, 23, dtype=torch.int64)},
        vision_config={"model_type": "siglip_vision_model", **IMAGE, "projection_dim": 16, "vision_use_head": False},
        text_config={**_LLAMA, "model_type": "gemma", "head_dim": 4},
        image_token_index=60,
        projection_dim=16,
    ),
    "qwen2_vl": _qwen("Qwen2VLForConditionalGeneration", depth=2, embed_dim=16, hidden_size=16, mlp_ratio=2),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLForConditionalGeneration",
        depth=2,
        hidden_size=16,
        out_hidden_size=16,
        intermediate_size=24,
        window_size=8,
        fullatt_block_indexes=[1],
    ),
    "idefics3": _several(
        "Idefics3ForConditionalGeneration",
        lambda: {**in_place_of_tokens(4)(), "pixel_values": random(ROWS, 1, 3, 16, 16)},
        vision_config=dict(IMAGE),
        text_config=dict(_LLAMA),
        image_token_id=60,
        scale_factor=2,
    ),
    "vilt": _several("ViltForQuestionAnswering", with_pictures(text), **IMAGE, max_position_embeddings=64, vocab_size=61),
    "git": _several(
        "GitForCausalLM", with_pictures(text), **SIZES, **TOKENS, vision_config=dict(IMAGE), max_position_embeddings=64
    ),
    "layoutlm": _several("LayoutLMForSequenceClassification", text, **SIZES, **TOKENS, max_position_embeddings=64),
    "layoutlmv3": _several(
        "LayoutLMv3ForTokenClassification",
        lambda: {**with_pictures(text)(), "bbox": torch.zeros(ROWS, 7, 4, dtype=torch.int64)},
        {"exclude": ["rel_pos_*"], "left": r"encoder.rel_pos_bias \(its weight is read and it isn't called\)"},
        **SIZES,
        **TOKENS,
        input_size=16,
        patch_size=4,
        coordinate_size=2,
        shape_size=4,
        max_2d_position_embeddings=64,
        max_position_embeddings=64,
    ),
}
SERIES: Mapping[str, Family] = {
    "time_series_transformer": named(
        "time series",
        "TimeSeriesTransformerForPrediction",
        lambda: {
            "past_values": random(ROWS, 8).abs(),
            "past_time_features": random(ROWS, 8, 1),
            "past_observed_mask": torch.ones(ROWS, 8),
            "future_values": random(ROWS, 4).abs(),
            "future_time_features": random(ROWS, 4, 1),
        },
        prediction_length=4,
        context_length=5,
        lags_sequence=[1, 2, 3],
        num_time_features=1,
        d_model=16,
        **TWO_SIDES,
    ),
    "patchtst": named(
        "time series",
        "PatchTSTForPrediction",
        lambda: {"past_values": random(ROWS, 16, 2)},
        num_input_channels=2,
        context_length=16,
        prediction_length=4,
        d_model=16,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=24,
        patch_length=4,
        patch_stride=4,
    ),
}
