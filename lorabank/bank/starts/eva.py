"""EVA (arXiv:2410.07170): A starts at the directions in which a layer's inputs vary most, ranks go where these explain most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.bank.bank import AdapterBank
from lorabank.bank.in_full.heads import head_paths
from lorabank.bank.kinds import layer_kind
from lorabank.bank.multihead import Projection, patterned
from lorabank.bank.routing import BASE
from lorabank.bank.slices import whole_of
from lorabank.bank.starts.adapter_start import AdapterStart
from lorabank.bank.starts.loftq import low_rank_layers, prepared_config
from lorabank.bank.starts.pca import PrincipalComponents
from lorabank.bank.starts.spectral import check_start
from lorabank.bank.wrappers import without_wrappers
from lorabank.config.adapter import AdapterConfig
from lorabank.config.checks import check_positive
from lorabank.errors import DataError, TargetError, UnreachedLayerError
from lorabank.formats.patterns import pattern_value, to_patterns

IGNORED_LABEL = -100
"""What transformers' losses leave out."""
Batch = Mapping[str, Any]


def eva(bank: AdapterBank | nn.Module, batches: Iterable[Batch], config: AdapterConfig, *, rho: float = 2.0) -> AdapterStart:
    """Where an EVA adapter of this bank (or model) starts; `bank.add` takes what is returned.

    For each layer, X (tokens, in) its inputs on the data: X − mean = U S Vᵀ (found batch by batch), A₀ = V[:, :r]ᵀ, B₀ = 0. The
    ranks of all layers are a budget: the components that explain the largest shares S²/ΣS² of their layer's variance get them,
    at most rho · rank in a layer; a layer that gets none isn't adapted. Layers' scaling stays what it was (α follows the rank).
    rho = 1 keeps all ranks (section 3.2 and algorithm 1 there).

    `batches`: keyword arguments of the model, such as a data loader's; tokens with an `attention_mask` of 0 or a label of -100
    don't count. They pass through the base alone, in evaluation mode. A layer needs more counted tokens than components.
    Raises ConfigError, TargetError for other layers than linear ones, DataError for too little data.
    """
    model = bank.model if isinstance(bank, AdapterBank) else bank
    check_positive("rho", rho)
    config = prepared_config(config, "eva")
    chosen, saved = low_rank_layers(bank, config)
    head = bank.head if isinstance(bank, AdapterBank) else None
    if head_paths(model, head) and not saved and config.modules_to_save is None:
        config = replace(config, modules_to_save=())  # LoRA was asked for on the head, which may get no rank
    ranks = {path: patterned(config.rank_pattern, without_wrappers(path), layer, config.rank) for path, layer in chosen.items()}
    check_start(config, chosen, ranks)
    if inside := next((path for path, layer in chosen.items() if isinstance(whole_of(path, layer)[1], Projection)), None):
        raise TargetError(
            f"init: 'eva' looks at layers' inputs, and {inside!r} is a projection of nn.MultiheadAttention, no module that is "
            "called. Leave it out of targets, or use init 'uniform'."
        )
    sizes = {path: kind.features(layer)[0] for path, layer in chosen.items() if (kind := layer_kind(layer)) is not None}
    most = {path: min(max(1, round(rank * rho)), sizes[path]) for path, rank in ranks.items()}
    seen = _Inputs(most, {path: whole_of(path, layer)[0] for path, layer in chosen.items()})
    with _base_alone(bank), seen.watching(model):
        for batch in batches:
            seen.run(model, batch)
    components = seen.components()
    given = shared_out({path: components[path].shares[: most[path]] for path in chosen}, sum(ranks.values()))
    A = {path: components[path].directions[:rank].float().cpu().contiguous() for path, rank in given.items() if rank}
    return AdapterStart(config=_redistributed(config, ranks, given), A=A, B={})


def shared_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many components each layer gets of a budget: the largest shares first, the earlier layer where they are equal."""
    paths = [path for path, each in shares.items() for _ in each]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)[:budget].tolist()
    given = dict.fromkeys(shares, 0)
    for i in order:
        given[paths[i]] += 1
    return given


def _redistributed(config: AdapterConfig, ranks: Mapping[str, int], given: Mapping[str, int]) -> AdapterConfig:
    """The configuration with these ranks, and alphas that leave each layer's scaling as it was."""
    if dict(ranks) == dict(given):
        return config
    names = {path: without_wrappers(path) for path, rank in given.items() if rank}
    alphas: dict[str, float] = {}
    for path, name in names.items():
        ratio = given[path] / ranks[path]
        alphas[name] = pattern_value(config.alpha_pattern, name, config.alpha) * (ratio**0.5 if config.use_rslora else ratio)
    rank, rank_pattern = to_patterns({name: given[path] for path, name in names.items()})
    alpha, alpha_pattern = to_patterns(alphas)
    return replace(
        config,
        rank=rank,
        alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        targets=list(names),  # `exclude` stays: it speaks of biases too
        layers=None,
    )


@dataclass(frozen=True)
class _Components:
    directions: Tensor
    """(components, in), orthonormal."""
    shares: Tensor
    """Of the layer's variance, descending."""


class _Inputs:
    """The components of every layer's inputs, found while batches pass. Layers that read one tensor have one in common."""

    def __init__(self, most: Mapping[str, int], modules: Mapping[str, str]) -> None:
        """`most`: components by layer; `modules`: the path of the module whose input is the layer's."""
        self._most, self._modules = most, modules
        self._leader: dict[str, str] = {}
        """Layer to the first that reads the same tensor, itself for the first."""
        self._fits: dict[str, PrincipalComponents] = {}
        """By first layer. All keep as many components as any layer may get, since layers with one input may differ in that."""
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, str] | None = None
        self._first_batch = True

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on the layers, while inside."""
        hooks = [model.get_submodule(self._modules[path]).register_forward_pre_hook(_Note(self, path)) for path in self._most]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run(self, model: nn.Module, batch: Batch) -> None:
        """One batch through the model."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        self._mask, self._last = counted_tokens(batch), None
        with torch.no_grad():
            model(**batch)
        self._first_batch = False

    def note(self, path: str, x: Tensor) -> None:
        """The input of a layer's call."""
        if self._first_batch and path not in self._leader:
            same = self._last is not None and self._last[0] is x
            self._leader[path] = self._last[1] if same and self._last is not None else path
            self._last = (x, self._leader[path])
        if self._leader.get(path) != path:
            return
        mask = self._mask
        rows = x[mask] if mask is not None and x.shape[: mask.ndim] == mask.shape else x
        if path not in self._fits:
            self._fits[path] = PrincipalComponents(max(self._most.values()))
        self._fits[path].add(rows.reshape(-1, x.shape[-1]).detach().float())

    def components(self) -> dict[str, _Components]:
        """By layer. Raises DataError where the data is too little, UnreachedLayerError where it never reached a layer."""
        if not self._leader:
            raise DataError("eva: no batch was given. Give at least one, of more tokens than components.")
        found: dict[str, _Components] = {}
        for path, most in self._most.items():
            if path not in self._leader:
                raise UnreachedLayerError(f"eva: no batch reached layer {path!r}. Leave it out of targets (exclude=[...]).")
            fit = self._fits[self._leader[path]]
            if fit.count <= most:
                raise DataError(
                    f"eva: layer {path!r} needs more than {most} tokens that count (rank · rho), and there were {fit.count}. "
                    "Give more batches, or a smaller rank or rho."
                )
            found[path] = _Components(fit.directions, fit.shares)
        return found


class _Note:
    def __init__(self, inputs: _Inputs, path: str) -> None:
        self._inputs, self._path = inputs, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inputs.note(self._path, args[0])


def counted_tokens(batch: Batch) -> Tensor | None:
    """Which tokens count, bool (rows, tokens), or None for all."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    counts = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if isinstance(labels, Tensor) and labels.ndim == 2:
        trained = labels != IGNORED_LABEL
        counts = trained if counts is None else counts & trained if counts.shape == trained.shape else counts
    return counts


@contextmanager
def _base_alone(bank: AdapterBank | nn.Module) -> Iterator[None]:
    """All rows to the base, every module in evaluation mode, and back."""
    model = bank.model if isinstance(bank, AdapterBank) else bank
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        if isinstance(bank, AdapterBank):
            with bank.route(BASE):
                yield
        else:
            yield
    finally:
        for module in training:
            module.training = True
