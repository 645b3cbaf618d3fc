"""A detector's head: as the model has it, or made anew for other categories; rows of several widths in one pass; merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForObjectDetection

import lorabank as lb
from lorabank.bank.in_full.heads import detector_heads, extra_outputs, label_layers
from lorabank.cli import main
from lorabank.errors import ConfigError
from tests.tasks.detection.made import config_of, saved_detector, tiny_detector

PLAIN = lb.AdapterConfig(rank=2, targets="attention")


def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["detr", "yolos", "conditional_detr", "deformable_detr", "rt_detr"])
@pytest.mark.filterwarnings("ignore:adapter .* have one weight:UserWarning")
def test_heads_of_several_widths_and_the_base_s_in_one_pass(kind: str) -> None:
    model = tiny_detector(kind).requires_grad_(False)
    with torch.no_grad():
        before = model(pixel_values=pixels()).logits
        bank = lb.attach(model)
        bank.add("kept", PLAIN)
        assert not bank.adapter("kept").modules  # the model's own categories stay, unlike a classifier's
        bank.add("wide", PLAIN, num_labels=5)
        with bank.route(["wide", "kept", lb.BASE]):
            logits = model(pixel_values=pixels()).logits
    extra = extra_outputs(model)
    assert logits.shape[-1] == 5 + extra and logits[0].isfinite().all()
    assert logits[1:, :, 3 + extra :].eq(-torch.inf).all()
    torch.testing.assert_close(logits[1:, :, : 3 + extra], before[1:], atol=1e-5, rtol=1e-5)
    assert set(bank.adapter("wide").modules) == set(detector_heads(model))
    path = label_layers(model)[-1]
    owner = detector_heads(model)[-1]
    mine, own = bank.adapter("wide").modules[owner], bank.model.get_submodule(owner).state_dict()
    keys = [key for key in mine if f"{owner}.{key}".startswith(f"{path}.")]
    assert len(keys) == 2
    for key in keys:  # new categories are things, as the old ones are on average, and "no object" stays
        old = next(value for name, value in own.items() if name.endswith(key) and "_slot" not in name)
        expected = old[: len(old) - extra].mean(0).expand(5, *old.shape[1:])
        moved = (mine[key][:5] - expected).square().mean().sqrt()
        assert moved < 0.12 if old.ndim > 1 else moved < 1e-6
        assert torch.equal(mine[key][5:], old[len(old) - extra :])


def test_a_detector_that_is_not_known_has_no_head_to_make_anew() -> None:
    config = config_of("deformable_detr")
    config.two_stage = config.with_box_refine = True
    model = AutoModelForObjectDetection.from_config(config).requires_grad_(False)
    assert not detector_heads(model)
    with pytest.raises(ConfigError, match="num_labels"):
        lb.attach(model).add("a", PLAIN, num_labels=2)


def test_a_merged_detector_is_a_plain_model_with_the_adapter_s_categories(tmp_path: Path) -> None:
    base = saved_detector(tmp_path / "base", "detr")
    model = AutoModelForObjectDetection.from_pretrained(base).requires_grad_(False)
    bank = lb.attach(model)
    bank.add("two", PLAIN, num_labels=2, seed=3)
    with torch.no_grad():
        for name, leaf in bank.named_parameters("two"):
            if name.endswith("B"):
                leaf.normal_(std=0.1)
        with bank.route("two"):
            expected = model(pixel_values=pixels())
    bank.adapter("two").save(tmp_path / "two")
    assert main(["merge", str(tmp_path / "two"), "--model", str(base), "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForObjectDetection.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = merged(pixel_values=pixels())
    assert merged.config.num_labels == 2
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-4)
