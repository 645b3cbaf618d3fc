"""Why a part of `targets` is refused: it matches nothing, or would leave layers of its kind out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lorabank.bank.adaptable import others_of_a_kind, unsupported_linear_maps
from lorabank.bank.target_parts import ALL_LINEAR, ALL_OF_A_KIND, ROLES, as_list, leaf, matches, part_matches
from lorabank.bank.wrapping import unwrapped
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import TargetError, closest


def refuse_partial(model: nn.Module, config: AdapterConfig, apart: Collection[str]) -> None:
    """Raise TargetError where `all-linear` would leave a linear map out that `exclude` and `apart` don't name."""
    unsupported = {path: why for path, why in unsupported_linear_maps(model).items() if path not in apart}
    excluded = as_list(config.exclude)
    left = {p: why for p, why in unsupported.items() if not any(part_matches(part, p, "exclude") for part in excluded)}
    if left:
        shown = "; ".join(f"{path} ({why})" for path, why in list(left.items())[:3])
        more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
        raise TargetError(
            f"targets: 'all-linear' would leave {len(left)} linear maps unadapted: {shown}{more}. "
            "Name the layers that you want (such as targets=['attention']), or exclude these on purpose."
        )


def refuse_others(model: nn.Module, part: str, config: AdapterConfig) -> None:
    """The same for `all-conv` and `all-embedding`."""
    excluded = as_list(config.exclude)
    others = others_of_a_kind(model, ALL_OF_A_KIND[part])
    left = {path: why for path, why in others.items() if not any(part_matches(e, path, "exclude") for e in excluded)}
    if left:
        raise TargetError(
            f"targets: {part!r} would leave {_listed(left)}. Name the layers that you want, or exclude these on purpose."
        )


def _listed(left: Mapping[str, str]) -> str:
    shown = "; ".join(f"{path} ({why})" for path, why in list(left.items())[:3])
    return f"{len(left)} unadapted: {shown}{f'; and {len(left) - 3} more' if len(left) > 3 else ''}"


def no_match(setting: str, part: str, layers: Mapping[str, nn.Module], model: nn.Module) -> str:
    """The message for a part that names none of `layers`: what it names instead, or what is closest."""
    others = unsupported_linear_maps(model)
    for kind in ALL_OF_A_KIND.values():
        others |= others_of_a_kind(model, kind)
    meant = ALL_OF_A_KIND.get(part)
    unsupported = {
        path: why
        for path, why in (others if meant is None else others_of_a_kind(model, meant)).items()
        if meant is not None or (part not in ROLES and matches(part, path))
    }
    if unsupported:
        path, why = next(iter(unsupported.items()))
        return f"{setting}: {part!r} names {path}, which can't be adapted: {why}"
    modules = {path: module for path, module in model.named_modules() if path and part not in ROLES and matches(part, path)}
    if modules:
        path, module = next(iter(modules.items()))
        inside = any(name.startswith(f"{path}.") for name in layers)
        way_out = f"name the layers inside it, such as '{part}.*'" if inside else "linear layers, convolutions and embeddings can"
        return f"{setting}: {part!r} names {path}, a {type(unwrapped(module)).__name__}, which can't be adapted yet; {way_out}"
    names = sorted({leaf(path) for path in layers})
    length = part.count(".") + 1
    ends = names if length == 1 else sorted({".".join(path.split(".")[-length:]) for path in layers})
    hint = closest(part, [name for name in (*ends, *ROLES, ALL_LINEAR, *ALL_OF_A_KIND) if name != part])
    fused = " (this model may fuse q, k and v into one layer)" if part in ("q", "k", "v") else ""
    what = ALL_OF_A_KIND.get(part, "linear layer" if part in ROLES else "layer")
    return f"{setting}: {part!r} matches no {what} of the model{hint}{fused}. It has: {', '.join(names) or 'none'}"
