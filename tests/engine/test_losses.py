"""The table of losses, losses of one's own, and references from BASE rows or given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorabank import BASE
from lorabank.engine.batch import Batch, with_base_references
from lorabank.engine.losses import LOSSES, LossInputs
from lorabank.engine.step import Engine, forward_backward, logprobs
from lorabank.errors import ConfigError, DataError
from tests.engine.tiny import VOCABULARY, backward, batch_of, clear, difference, gradients, make_bank, make_model, tokens

ROWS = torch.tensor([0, 0, 2, 2, 2])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0])


def _plain(name: str, logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Each loss once more, a token at a time."""
    rows = [torch.zeros(())] * 3
    for i, row in enumerate(ROWS.tolist()):
        p, q, w = logprobs_T[i], reference_T[i], WEIGHTS[i]
        rows[row] = rows[row] + w * {"nll": -p, "reverse_kl": q.exp() / p.exp() - 1 - (q - p)}[name]
    return torch.stack(rows)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_gives_a_sum_a_row_and_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    logprobs_T, reference_T = -torch.rand(5), -torch.rand(5)
    found_in, expected_in = logprobs_T.clone().requires_grad_(), logprobs_T.clone().requires_grad_()
    inputs = LossInputs(logprobs_T=found_in, weights_T=WEIGHTS, rows_T=ROWS, rows=3, reference_logprobs_T=reference_T)
    found, expected = LOSSES[name](inputs), _plain(name, expected_in, reference_T)
    assert found.shape == (3,)
    assert found[1] == 0
    assert torch.allclose(found, expected, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    assert found_in.grad is not None
    assert expected_in.grad is not None
    assert torch.allclose(found_in.grad, expected_in.grad, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_loss_trains_every_adapter_and_leaves_the_reference_rows_out(name: str, family: str) -> None:
    bank = make_bank(family)
    batch = with_base_references(batch_of([6, 9, 5], ["a", "b", "a"]))
    losses, found = backward(bank, batch, Engine(bank, loss=name))
    assert set(losses) == {"a", "b"}
    assert losses["a"].tokens == 4 + 3
    assert all(bool(g.any()) for name in losses for g in found[name].values())


def test_reverse_kl_needs_a_reference() -> None:
    bank = make_bank()
    with pytest.raises(ConfigError, match="with_base_references"):
        forward_backward(Engine(bank, loss="reverse_kl"), batch_of([6], "a"))


def test_base_rows_as_reference_equal_given_reference_logprobs() -> None:
    bank = make_bank()
    engine = Engine(bank, loss="reverse_kl")
    batch = batch_of([6, 9, 5], ["a", "b", BASE])
    from_rows, found = backward(bank, with_base_references(batch), engine)
    base = batch_of([6, 9, 5], BASE)
    given, expected = backward(bank, batch, engine, reference_logprobs_NL=logprobs(engine, base))
    for name in ("a", "b"):
        assert from_rows[name].loss_sum == pytest.approx(given[name].loss_sum, rel=1e-5)
        assert from_rows[name].tokens == given[name].tokens
        assert difference(found[name], expected[name]) < 1e-4
    assert from_rows["a"].loss_sum > 0


def test_reverse_kl_against_the_base_is_zero_for_an_untrained_adapter() -> None:
    bank = make_bank(strength=0.0)
    losses, found = backward(bank, with_base_references(batch_of([6, 9], ["a", "b"])), Engine(bank, loss="reverse_kl"))
    assert losses["a"].loss_sum == pytest.approx(0.0, abs=1e-6)
    assert max(float(g.abs().max()) for g in found["a"].values()) < 1e-5


def test_reverse_kl_estimates_the_exact_divergence() -> None:
    """Weighted by the model's own probabilities, over the whole vocabulary, the estimate is the divergence itself."""
    bank = make_bank(model=make_model(spread=1.0))
    engine = Engine(bank, loss="reverse_kl")
    (prompt,) = tokens([4])
    text = torch.tensor([prompt])
    with torch.no_grad(), bank.route("a"):
        p = bank.model(input_ids=text).logits[0, -1].float().log_softmax(-1)
    with torch.no_grad(), bank.route(BASE):
        q = bank.model(input_ids=text).logits[0, -1].float().log_softmax(-1)
    batch = _every_next_token(prompt, p.exp())
    found = forward_backward(engine, with_base_references(batch))["a"].loss_sum
    assert found == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


def _every_next_token(prompt: list[int], weights: Tensor) -> Batch:
    from lorabank.engine.batch import make_batch

    return make_batch([([*prompt, i], [0.0] * len(prompt) + [float(weights[i])]) for i in range(VOCABULARY)], "a")


def test_a_loss_of_ones_own_sees_tokens_and_rows() -> None:
    def squared(inputs: LossInputs) -> Tensor:
        assert inputs.rows == 3
        return inputs.per_row(inputs.weights_T * inputs.logprobs_T.square())

    bank = make_bank()
    batch = batch_of([6, 9, 5], ["a", "b", "a"])
    losses, found = backward(bank, batch, Engine(bank, loss=squared))
    expected = logprobs(Engine(bank), batch).square().sum(1)
    assert list(losses["a"].row_losses.values()) == pytest.approx([float(expected[0]), float(expected[2])], rel=1e-4)
    for name, rows in (("a", [0, 2]), ("b", [1])):

        def own(inputs: LossInputs) -> Tensor:
            return inputs.per_row(inputs.weights_T * inputs.logprobs_T.square())

        _, alone = backward(bank, batch.select(rows), Engine(bank, loss=own))
        assert difference(found[name], alone[name]) < 1e-4


def test_a_loss_that_is_no_sum_a_row_is_refused() -> None:
    bank = make_bank()
    with pytest.raises(ConfigError, match=r"expected one sum a row, a tensor of shape \(2,\), got \(\)"):
        forward_backward(Engine(bank, loss=lambda inputs: inputs.logprobs_T.mean()), batch_of([5, 6], "a"))
    assert not gradients(bank, "a")


def test_nll_through_a_function_of_ones_own_equals_the_fast_path() -> None:
    bank = make_bank()
    batch = batch_of([6, 9, 5], ["a", "b", "a"])
    fast, expected = backward(bank, batch)
    slow, found = backward(bank, batch, Engine(bank, loss=lambda inputs: LOSSES["nll"](inputs)))
    assert slow["a"].loss_sum == pytest.approx(fast["a"].loss_sum, rel=1e-5)
    assert difference(found["a"], expected["a"]) < 1e-4


def test_selecting_keeps_a_row_and_its_reference_together() -> None:
    bank = make_bank()
    engine = Engine(bank, loss="reverse_kl")
    batch = with_base_references(batch_of([6, 9, 5], ["a", "b", "a"]))
    whole, expected = backward(bank, batch, engine)
    clear(bank)
    parts = [forward_backward(engine, batch.select(rows)) for rows in ([0, 3], [5, 4, 2, 1])]
    assert sum(part["a"].loss_sum for part in parts) == pytest.approx(whole["a"].loss_sum, rel=1e-4)
    assert difference(gradients(bank, "a"), expected["a"]) < 1e-4
    with pytest.raises(DataError, match="row 1 has row 4 as its reference"):
        batch.select([0, 3, 1])
    with pytest.raises(DataError, match="references already"):
        with_base_references(batch)
