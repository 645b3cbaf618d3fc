"""The dropout mask: a function of identities, not of how a batch happens to be laid out."""

from __future__ import annotations

import torch

from lorabank.kernels.segments import DropoutDraw, dropout_mask


def _draw(probability: float = 0.3, seed: int = 5, step: int = 2, examples: list[int] | None = None) -> DropoutDraw:
    ids = list(range(4)) if examples is None else examples
    return DropoutDraw(probability=probability, seed=seed, step=step, examples_U=torch.tensor(ids))


def test_the_same_numbers_give_the_same_mask() -> None:
    assert torch.equal(dropout_mask(_draw(), 6, 16), dropout_mask(_draw(), 6, 16))


def test_padding_doesnt_move_the_draws_of_real_tokens() -> None:
    assert torch.equal(dropout_mask(_draw(), 5, 16), dropout_mask(_draw(), 9, 16)[:, :5])


def test_the_rest_of_the_batch_doesnt_move_them_either() -> None:
    together = dropout_mask(_draw(examples=[7, 3, 11]), 5, 16)
    assert torch.equal(together[1:2], dropout_mask(_draw(examples=[3]), 5, 16))


def test_every_identity_changes_the_mask() -> None:
    mask = dropout_mask(_draw(), 6, 64)
    for other in (_draw(seed=6), _draw(step=3), _draw(examples=[4, 5, 6, 7])):
        assert 0.3 < (dropout_mask(other, 6, 64) == mask).float().mean() < 0.75  # 0.58 for independent draws at 0.3
    assert not torch.equal(mask[:, 0], mask[:, 1])
    assert not torch.equal(mask[..., 0], mask[..., 1])


def test_the_rate_and_the_scale_are_right() -> None:
    for probability in (0.1, 0.5, 0.9):
        mask = dropout_mask(_draw(probability=probability, examples=list(range(64))), 32, 64)
        kept = mask != 0
        assert abs(kept.float().mean().item() - (1 - probability)) < 0.005
        assert torch.allclose(mask[kept], torch.tensor(1 / (1 - probability)))
        # no example, token or channel is favoured: each line's rate within six standard errors of the whole
        for dims in ((1, 2), (0, 2), (0, 1)):
            rates = kept.float().mean(dims)
            lines = kept.numel() / rates.numel()
            assert (rates - (1 - probability)).abs().max() < 6 * (probability * (1 - probability) / lines) ** 0.5


def test_probability_zero_keeps_everything() -> None:
    assert torch.equal(dropout_mask(_draw(probability=0.0), 3, 4), torch.ones(4, 3, 4))
