"""LoftQ (arXiv:2310.08659): an adapter over a quantised base that starts at what quantisation took from the weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lorabank.bank.adaptable import adaptable_layers
from lorabank.bank.bank import AdapterBank
from lorabank.bank.configs import as_adapter_config
from lorabank.bank.in_full.saved_paths import saved_paths, without_saved
from lorabank.bank.init import initial_A
from lorabank.bank.keep import kept_modules
from lorabank.bank.kinds import layer_kind
from lorabank.bank.multihead import patterned
from lorabank.bank.slices import whole_of
from lorabank.bank.starts.adapter_start import AdapterStart
from lorabank.bank.starts.spectral import check_start, principal
from lorabank.bank.targets import resolve_targets
from lorabank.bank.wrappers import base_path, base_prefix, without_wrappers
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import ConfigError, ModelError, Setting
from lorabank.formats.patterns import pattern_value

FURTHEST = 0.5
"""‖W − Q‖/‖W‖ above which W isn't the weight that Q was made from: 4 bits cost about a tenth of it, 8 bits less."""
_ORIGINAL = "Give the model that the base was quantised from: the same folder or hub id, loaded without quantisation."


def loftq(bank: AdapterBank | nn.Module, original: nn.Module, config: AdapterConfig, *, seed: int = 0) -> AdapterStart:
    """Where a LoftQ adapter of this bank (or model) starts; `bank.add` takes what is returned.

    With Q the base's quantised weight and W the original's: W − Q = U S Vᵀ, A₀ = √(S[:r]/scaling) V[:, :r]ᵀ and
    B₀ = U[:, :r] √(S[:r]/scaling), so Q + scaling · B₀ A₀ is as near W as rank r comes (algorithm 1 there with T = 1: the shared
    base isn't quantised anew). Outputs change at once, towards the unquantised model's. The scaling is divided out, which
    PEFT's `loftq` leaves to α = r. Layers that aren't quantised start as with `uniform`.

    `original`: the model before it was quantised, on any device; it can go afterwards. Raises ConfigError where nothing is
    quantised, TargetError for other layers than linear ones, ModelError where `original` isn't that model.
    """
    model = bank.model if isinstance(bank, AdapterBank) else bank
    config = prepared_config(config, "loftq")
    chosen, _ = low_rank_layers(bank, config)
    ranks = {path: patterned(config.rank_pattern, without_wrappers(path), layer, config.rank) for path, layer in chosen.items()}
    check_start(config, chosen, ranks)
    prefix, whole = base_prefix(model), adaptable_layers(original)
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for path, layer in chosen.items():
        owner, module, outputs = whole_of(path, layer)
        kind = layer_kind(module)
        assert kind is not None  # what `resolve_targets` gives
        if not kind.quantized:
            A[path] = initial_A("uniform", ranks[path], kind.features(module)[0], seed, path)
            continue
        alpha = pattern_value(config.alpha_pattern, without_wrappers(path), config.alpha)
        lost = _lost(owner, module, whole.get(base_path(owner, prefix)))
        lost = lost if outputs is None else lost[outputs.rows.to(lost.device)]
        A[path], B[path] = (part.cpu() for part in principal(lost, ranks[path], config.scaling(ranks[path], alpha)))
    if not B:
        raise ConfigError(
            Setting("init"),
            ": 'loftq' makes up for what quantisation took, and none of the targeted layers is quantised. Load the base in nf4 "
            "or fp8 (base_dtype, lorabank.quantize_base), or use init 'uniform'.",
        )
    return AdapterStart(config=config, A=A, B=B)


def low_rank_layers(bank: AdapterBank | nn.Module, config: AdapterConfig) -> tuple[dict[str, nn.Module], list[str]]:
    """(the layers that an adapter of this configuration has A and B for, paths of the modules that it trains in full)."""
    if isinstance(bank, AdapterBank):
        model, kept, fused, head = bank.model, bank.kept, bank.fused, bank.head
    else:
        model, kept, fused, head = bank, frozenset[str](), {}, None
    chosen = resolve_targets(model, config, kept_modules(kept), fused)
    saved = saved_paths(model, config, chosen, kept, head)
    return without_saved(chosen, saved), saved


def prepared_config(config: AdapterConfig, init: str) -> AdapterConfig:
    """`config` with this `init`. Raises ConfigError where it asks for another than the default."""
    config = as_adapter_config(config)
    if config.init not in (init, "uniform"):
        raise ConfigError(Setting("init"), f": lorabank.{init} makes a start of its own, got {config.init!r}. Use init {init!r}.")
    return replace(config, init=init)


def _lost(path: str, layer: nn.Module, original: nn.Module | None) -> Tensor:
    """W − Q of a quantised layer, (out, in), fp32."""
    kind, theirs = layer_kind(layer), None if original is None else layer_kind(original)
    assert kind is not None
    if original is None or theirs is None or theirs.features(original) != kind.features(layer):
        has = "has no such layer" if original is None or theirs is None else f"has {theirs.features(original)} features there"
        raise ModelError(f"loftq: layer {path!r} has (in, out) {kind.features(layer)}, and the original {has}. {_ORIGINAL}")
    if theirs.quantized:
        raise ModelError(f"loftq: layer {path!r} of the original is quantised itself. {_ORIGINAL}")
    Q = kind.weight_oi(layer._parameters, torch.float32).float()
    W = theirs.weight_oi(original._parameters, torch.float32).to(Q.device).float()
    distance = float((W - Q).norm() / W.norm())
    if not distance < FURTHEST:
        raise ModelError(
            f"loftq: layer {path!r} is {distance:.2f} of the original's norm away from it, expected at most {FURTHEST}: it was "
            f"made from another weight. {_ORIGINAL}"
        )
    return W - Q
