"""Settings of image generation: other tools' names, defaults of its adapters, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lorabank.config.diffusion import ATTENTION, TEXT_ATTENTION, DiffusionConfig
from lorabank.config.parse import config_from_dict
from lorabank.errors import ConfigError


def config(**settings: Any) -> Any:
    return config_from_dict({"model": "x", "task": "text-to-image", **settings})[0]


def test_other_tools_names_and_short_ones() -> None:
    made = config(min_snr_gamma=5, enable_bucket=False, class_prompt="a dog", save_format="kohya")
    assert made.diffusion == DiffusionConfig(min_snr=5.0, buckets=False, prior_prompt="a dog", save_format="kohya")
    assert config(diffusion={"prior_loss_weight": 0.5}).diffusion.prior_weight == 0.5


def test_adapters_change_attention_unless_they_are_told_otherwise() -> None:
    made = config(adapters={"a": {}, "b": {"targets": "all-linear", "learning_rate": 3e-4}})
    assert (made.adapters["a"].targets, made.adapters["a"].learning_rate) == (ATTENTION, "auto")
    assert (made.adapters["b"].targets, made.adapters["b"].learning_rate) == ("all-linear", 3e-4)
    both = config(diffusion={"text_encoders": True}, adapters={"a": {}}).adapters["a"].targets
    assert list(both) == [ATTENTION, TEXT_ATTENTION]
    text = config_from_dict({"model": "x"})[0].defaults
    assert (text.targets, text.learning_rate) == ("all-linear", "auto")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_format": "koyha"}, r"diffusion\.save_format: expected one of .*'kohya'"),
        ({"caption_dropout": 1.0}, r"diffusion\.caption_dropout: expected a number in \[0, 1\)"),
        ({"min_snr": 0}, r"diffusion\.min_snr: expected a number > 0"),
        ({"resolutoin": 64}, r"resolutoin.*did you mean.*resolution"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(diffusion=settings)


def test_a_prior_without_words_is_refused_before_anything_is_drawn() -> None:
    for given in ({"prior_prompt": " "}, {"prior_prompts": {"ink": ""}}):
        with pytest.raises(ConfigError, match=r"diffusion\.prior_prompts?(\.ink)? is empty\. Name the class in it"):
            DiffusionConfig(**given)  # type: ignore[arg-type]
