"""`learning_rate: auto`: a starting point from published fits, with the reason in words. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from lorabank.wording import counted

REFERENCE_HIDDEN = 2000
FULL_RATE_AT_2000 = 5e-5
"""Full fine-tuning rate of a model with 2,000 hidden features (tinker-cookbook's fit)."""
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
"""Family to p in rate = 5e-5 · (2000 / hidden)^p."""
LORA_FACTOR = 10.0
"""LoRA's best rate over full fine-tuning's (LoRA Without Regret: 9.8 over 14 models)."""
SHORT_RUN_FACTOR = 15.0
SHORT_RUN_STEPS = 100


@dataclass(frozen=True)
class LearningRateAdvice:
    """A learning rate and why."""

    value: float
    reason: str


OF_IMAGE_MODELS = LearningRateAdvice(
    1e-4, "what diffusers' and kohya's examples train LoRA with, since no fit is known for image models"
)


def advise_learning_rate(model_type: str, hidden_size: int | None, total_steps: int) -> LearningRateAdvice:
    """Step size for LoRA on a model of this family and width, for a run of `total_steps` optimizer steps, to two digits.

    Families without a published fit get Llama's, and a model without a known width 2,000 features: the reason says that it is a
    guess then.
    """
    family = next((name for name in EXPONENTS if model_type.lower().startswith(name)), None)
    full = FULL_RATE_AT_2000 * (REFERENCE_HIDDEN / (hidden_size or REFERENCE_HIDDEN)) ** EXPONENTS[family or "llama"]
    short = total_steps <= SHORT_RUN_STEPS
    factor = SHORT_RUN_FACTOR if short else LORA_FACTOR
    width = f"hidden size {hidden_size}" if hidden_size else f"hidden size unknown, {REFERENCE_HIDDEN} taken, a guess"
    fit = f"{family.capitalize()}'s fit" if family else f"Llama's fit, a guess for {model_type or 'this family'}"
    run = f"a short run of {counted(total_steps, 'step')}" if short else counted(total_steps, "step")
    reason = f"{factor:g} × the full fine-tuning rate {full:.1e} ({width}, {fit}) for {run}"
    return LearningRateAdvice(float(f"{full * factor:.2g}"), reason)
