"""Draws that depend on their seed alone, and schedules against diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from lorabank.errors import ConfigError, ModelError
from lorabank.tasks.diffusion.draws import draw, fixed_draw, mixed
from lorabank.tasks.diffusion.objective import Objective, noisy, objective_of, row_losses, row_tensors, snr_weight

SHAPE = (4, 6, 8)


def test_a_draw_depends_on_its_seed_alone() -> None:
    first, again, other = draw(SHAPE, 7), draw(SHAPE, 7), draw(SHAPE, 8)
    assert torch.equal(first.noise, again.noise)
    assert (first.place, first.drop, first.normal) == (again.place, again.drop, again.normal)
    assert not torch.equal(first.noise, other.noise)
    assert first.place != other.place


def test_seeds_of_neighbours_are_unrelated() -> None:
    seeds = {mixed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**63 for seed in seeds)
    places = torch.tensor([draw((1, 1, 1), mixed(0, i)).place for i in range(400)])
    assert abs(float(places.mean()) - 0.5) < 0.05
    assert abs(float(places.std()) - 12**-0.5) < 0.02


def test_noise_offset_adds_one_number_a_channel() -> None:
    made = draw(SHAPE, 1)
    more = made.noise_with(0.1) - made.noise
    assert torch.equal(made.noise_with(0.0), made.noise)
    torch.testing.assert_close(more, (0.1 * made.offset).expand(SHAPE), rtol=1e-4, atol=1e-6)
    assert more.std() > 0


def test_validation_looks_at_the_same_places_each_time_and_at_all_parts_of_the_schedule() -> None:
    looks = [fixed_draw(SHAPE, row=3, part=part, parts=4) for part in range(4)]
    again = fixed_draw(SHAPE, row=3, part=2, parts=4)
    assert torch.equal(looks[2].noise, again.noise)
    assert [int(look.place * 4) for look in looks] == [0, 1, 2, 3]
    assert all(look.drop >= 1 for look in looks)  # no caption is dropped
    assert looks[0].normal < looks[1].normal < looks[2].normal < looks[3].normal
    assert not torch.equal(fixed_draw(SHAPE, row=4, part=2, parts=4).noise, again.noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noisy_latents_and_targets_are_diffusers(kind: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    objective = objective_of(scheduler)
    times = torch.tensor([0, 400, 999])
    clean, noise, predicted = (torch.randn(3, *SHAPE) for _ in range(3))
    batch = {"clean": clean, "noise": noise, **row_tensors([objective.at(int(t)) for t in times])}
    torch.testing.assert_close(noisy(batch), scheduler.add_noise(clean, noise, times))
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(clean, noise, times), "sample": clean}[kind]
    torch.testing.assert_close(row_losses(batch, predicted), (predicted - target).square().mean((1, 2, 3)))
    assert torch.equal(batch["time"], times.float())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_the_papers(kind: str) -> None:
    """arXiv:2303.09556: min(SNR, γ) over SNR, over SNR + 1, and by itself; SNR by diffusers."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    times = torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, times)
    divided = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
    found = row_tensors([objective_of(scheduler, min_snr=5.0).at(int(t)) for t in times])["weight"]
    torch.testing.assert_close(found, snr.clamp(max=5.0) / divided, rtol=1e-4, atol=1e-6)
    assert found.unique().numel() > 3


def test_min_snr_at_the_ends_of_the_schedule() -> None:
    """Zero terminal SNR, and no noise at all."""
    assert [snr_weight(0.0, kind, 5.0) for kind in ("epsilon", "v_prediction", "sample")] == [1.0, 0.0, 0.0]
    assert [snr_weight(1.0, kind, 5.0) for kind in ("epsilon", "v_prediction", "sample")] == [0.0, 0.0, 5.0]


def test_a_flow_is_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = objective_of(scheduler)
    draws = [draw(SHAPE, seed) for seed in range(5)]
    numbers = [objective.numbers(each) for each in draws]
    clean, noise = torch.randn(5, *SHAPE), torch.stack([each.noise for each in draws])
    batch = {"clean": clean, "noise": noise, **row_tensors(numbers)}
    u = torch.sigmoid(torch.tensor([each.normal for each in draws]))
    sigma = (3.0 * u / (1 + 2.0 * u)).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy(batch), sigma * noise + (1 - sigma) * clean)
    torch.testing.assert_close(row_losses(batch, noise - clean), torch.zeros(5), rtol=0, atol=1e-9)
    # a σ of the schedule and its time belong together there as here
    place = 123
    assert float(scheduler.timesteps[place]) == pytest.approx(1000 * float(scheduler.sigmas[place]), rel=1e-5)
    assert batch["time"].tolist() == pytest.approx((1000 * sigma.flatten()).tolist(), rel=1e-5)


def test_a_shift_by_size_is_left_to_sampling() -> None:
    assert objective_of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)).shift == 1.0


def test_what_a_schedule_cannot_do_is_refused() -> None:
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match="min_snr"):
        objective_of(flow, min_snr=5.0)
    with pytest.raises(ConfigError, match="prediction"):
        objective_of(flow, kind="epsilon")
    with pytest.raises(ModelError, match="predicts 'flow'"):
        objective_of(DDPMScheduler(), kind="flow")


def test_other_schedulers_have_the_same_numbers() -> None:
    """What a pipeline samples with isn't always what it was trained with, but its ᾱ are."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ours: list[Objective] = [objective_of(kind(**settings)) for kind in (DDPMScheduler, EulerDiscreteScheduler)]
    assert ours[0].at(500) == ours[1].at(500)
