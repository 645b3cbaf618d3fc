"""A detector's loss is its family's own in transformers, picture by picture, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorabank.bank.in_full.heads import DETECTORS, extra_outputs
from lorabank.tasks.detection.loss import BOXES, CLASSES, LABELS, detection_loss, found_boxes, split_found
from tests.tasks.detection.made import SIDE, tiny_detector

NAMES = sorted(DETECTORS)


def targets_of(counts: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random boxes inside the picture, as many as `counts` says of each."""
    generator = torch.Generator().manual_seed(seed)
    most = max(1, *counts)
    sizes = 0.1 + 0.3 * torch.rand(len(counts), most, 2, generator=generator)
    centres = sizes / 2 + (1 - sizes) * torch.rand(len(counts), most, 2, generator=generator)
    labels = torch.randint(0, 3, (len(counts), most), generator=generator)
    for row, count in enumerate(counts):
        labels[row, count:] = -1
    return {BOXES: torch.cat([centres, sizes], -1), LABELS: labels, CLASSES: torch.full((len(counts),), 3)}


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(5))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", NAMES)
def test_each_picture_s_loss_and_gradients_are_transformers_own_for_it_alone(kind: str) -> None:
    model = tiny_detector(kind)
    model.config.auxiliary_loss = kind.startswith("rt_detr")  # the others don't give what their layers before the last find
    targets, x = targets_of([2, 0, 3]), pixels(3)
    together = detection_loss(model, {"pixel_values": x}, targets)
    assert together.shape == (3,)
    for row in range(3):
        there = targets[LABELS][row] >= 0
        wanted = [{"class_labels": targets[LABELS][row][there], "boxes": targets[BOXES][row][there]}]
        expected = model(pixel_values=x[row : row + 1], labels=wanted).loss
        torch.testing.assert_close(together[row], expected, atol=1e-5, rtol=1e-5)
        expected.backward()
        theirs = gradients(model)
        # alone: random queries of RT-DETR are so alike that which of them a batch chooses is a matter of rounding
        detection_loss(
            model, {"pixel_values": x[row : row + 1]}, {k: v[row : row + 1] for k, v in targets.items()}
        ).sum().backward()
        ours = gradients(model)
        assert ours.keys() == theirs.keys() and max(float(g.abs().max()) for g in theirs.values()) > 1e-2
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-5)


def test_a_row_that_is_not_finite_costs_its_own_loss_alone() -> None:
    model, targets, x = tiny_detector("yolos"), targets_of([1, 1]), pixels(2)
    x[1] = torch.nan
    losses = detection_loss(model, {"pixel_values": x}, targets)
    assert losses[0].isfinite() and losses[1].isnan()


@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_found_boxes_are_the_image_processor_s(kind: str) -> None:
    """Scores, labels and boxes of the likeliest, as transformers' own post-processing has them."""
    from transformers import ConditionalDetrImageProcessorPil, DetrImageProcessorPil

    model, x = tiny_detector(kind), pixels(2)
    with torch.no_grad():
        table = found_boxes(model, {"pixel_values": x}, targets_of([1, 2]))
        outputs = model(pixel_values=x)
    losses, found = split_found(table)
    assert found.shape == (2, 6, 6) and losses.isfinite().all()
    if extra_outputs(model):
        wanted = DetrImageProcessorPil().post_process_object_detection(outputs, threshold=0.0)
    else:
        wanted = ConditionalDetrImageProcessorPil().post_process_object_detection(outputs, threshold=0.0, top_k=6)
    for row, expected in zip(found, wanted, strict=True):
        order = expected["scores"].argsort(descending=True)
        torch.testing.assert_close(row[:, 0], expected["scores"][order])
        assert row[:, 1].tolist() == expected["labels"][order].tolist()
        corners = torch.cat([row[:, 2:4] - row[:, 4:] / 2, row[:, 2:4] + row[:, 4:] / 2], 1)
        torch.testing.assert_close(corners, expected["boxes"][order])
