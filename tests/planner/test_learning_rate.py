"""`learning_rate: auto` against numbers worked out by hand from the published fits."""

from __future__ import annotations

import pytest

from lorabank.planner.learning_rate import advise_learning_rate


@pytest.mark.parametrize(
    ("model_type", "hidden", "steps", "expected"),
    [
        ("llama", 576, 1000, 0.0013),  # SmolLM2-135M: 10 × 5e-5 × (2000/576)^0.781 = 10 × 5e-5 × 2.644 = 1.32e-3
        ("llama", 576, 100, 0.002),  # a short run: 15 × 5e-5 × 2.644 = 1.98e-3
        ("llama", 576, 101, 0.0013),
        ("llama", 2000, 1000, 0.0005),  # 10 × 5e-5
        ("llama", 4096, 1000, 0.00029),  # (2000/4096)^0.781 = 0.571
        ("qwen3", 1024, 1000, 0.00053),  # (2000/1024)^0.0775 = 1.0533
        ("qwen2", 3584, 50, 0.00072),  # 15 × 5e-5 × (2000/3584)^0.0775 = 7.5e-4 × 0.9558
    ],
)
def test_the_number_is_the_fits(model_type: str, hidden: int, steps: int, expected: float) -> None:
    assert advise_learning_rate(model_type, hidden, steps).value == pytest.approx(expected, rel=1e-9)


def test_the_reason_names_every_factor() -> None:
    reason = advise_learning_rate("llama", 576, 1000).reason
    for part in ("10 ×", "1.3e-04", "hidden size 576", "Llama's fit", "1,000 steps"):
        assert part in reason
    assert "guess" not in reason
    assert "15 ×" in advise_learning_rate("qwen3", 1024, 60).reason
    assert "a short run of 60 steps" in advise_learning_rate("qwen3", 1024, 60).reason


def test_what_is_a_guess_says_so() -> None:
    other = advise_learning_rate("gpt2", 768, 1000)
    assert other.value == advise_learning_rate("llama", 768, 1000).value
    assert "a guess for gpt2" in other.reason
    unknown = advise_learning_rate("", None, 1000)
    assert unknown.value == 0.0005
    assert "hidden size unknown, 2000 taken, a guess" in unknown.reason
    assert "a guess for this family" in unknown.reason
