"""Which modules an adapter trains in full: what `modules_to_save` names, a classifier's head, and what stands against it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lorabank.bank.adaptable import adaptable_layers, own_modules
from lorabank.bank.in_full.heads import head_paths
from lorabank.bank.keep import kept_modules
from lorabank.bank.target_parts import ALL_LINEAR, ALL_OF_A_KIND, ROLES, as_list, matches
from lorabank.bank.wrapping import unwrapped
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import TargetError, closest
from lorabank.formats.files import SAVED_FLOATS
from lorabank.notices import warn_once

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def saved_paths(
    model: nn.Module, config: AdapterConfig, targeted: Collection[str], kept: Collection[str] = (), head: str | None = None
) -> list[str]:
    """Paths of the modules that `config` trains in full, in the model's order. Raises TargetError.

    Those whose path ends with a name in `modules_to_save`, letter by letter as PEFT has it (`norm` names `input_layernorm` too),
    and a classifier's head, unless `modules_to_save` is empty or `targets` means layers of it alone. `targeted`: paths of
    the layers that `targets` means; `kept`: parameters that train beside the base; `head`: a classifier's, declared.
    """
    modules = {path: unwrapped(module) for path, module in own_modules(model) if path}
    chosen: set[str] = set()
    for name in config.modules_to_save or ():
        found = {path for path in modules if path.endswith(name)}
        if not found:
            ends = sorted({path.rpartition(".")[2] for path in modules} - {str(i) for i in range(1000)})
            raise TargetError(f"modules_to_save: {name!r} names no module of the model{closest(name, [*ends, *modules])}")
        chosen |= found
    for path in sorted(chosen):
        if why := unsavable(modules[path]):
            raise TargetError(f"modules_to_save: {path!r} can't be trained in full: {why}")
    chosen |= _heads(model, config, chosen, targeted, modules, head)
    outer = [path for path in modules if path in chosen and not _inside(path, chosen - {path})]
    if apart := [path for path in outer if any(_inside(other, [path]) for other in kept_modules(kept))]:
        raise TargetError(f"modules_to_save: {apart[0]!r} trains beside the base already (keep_trainable). Leave it out of one.")
    return outer


def _heads(
    model: nn.Module,
    config: AdapterConfig,
    chosen: Collection[str],
    targeted: Collection[str],
    modules: Mapping[str, nn.Module],
    head: str | None,
) -> set[str]:
    """A classifier's head, said once, where the configuration doesn't speak of it."""
    if config.modules_to_save is not None and not config.modules_to_save:
        return set()
    wide = {ALL_LINEAR, *ALL_OF_A_KIND, *ROLES}
    named = [part for part in as_list(config.targets) if part not in wide]
    layers = adaptable_layers(model)
    heads = [path for path in head_paths(model, head) if not _inside(path, chosen)]
    meant = ([path for path in layers if matches(part, path)] for part in named)
    if not heads or any(found and all(_inside(path, heads) for path in found) for found in (*meant, targeted)):
        return set()  # LoRA is asked for there
    kind = type(model).__name__
    if bad := next((f"{path!r}: {why}" for path in heads if (why := unsavable(modules[path]))), None):
        warn_once(f"{kind}: adapters get no head of their own, and the base's stays as it is, {bad}")
        return set()
    warn_once(
        f"{kind}: each adapter trains a head of its own in full ({', '.join(heads)}), since the model's was made for new labels. "
        "modules_to_save=[] leaves the model's as it is."
    )
    return set(heads)


def _inside(path: str, others: Collection[str]) -> bool:
    """Whether a path is one of the others or below one."""
    return any(path == other or path.startswith(f"{other}.") for other in others)


def without_saved(chosen: Mapping[str, nn.Module], saved: Collection[str]) -> dict[str, nn.Module]:
    """Targeted layers, less those in modules that are trained in full, as PEFT has it. Raises TargetError where none is left."""
    left = {path: layer for path, layer in chosen.items() if not _inside(path, saved)}
    if not left:
        raise TargetError(
            f"targets: every layer that they name ({next(iter(chosen))!r}) is in modules_to_save, which trains it in full. Name "
            "other layers, or leave it out of modules_to_save."
        )
    return left


def check_apart(
    saved: Collection[str], layers: Collection[str], wrapped: Collection[str], others: Mapping[str, bool], *, way: str = ""
) -> None:
    """Raise TargetError where one module would be trained in full and have LoRA, or be in two modules of different adapters.

    saved, layers: of a new adapter; `way`: how to leave such a layer out, if not by `exclude`. wrapped: layers with LoRA, biases
    or token rows of adapters in the bank. others: modules trained in full → whether an adapter in the bank still does so.
    """
    for path in saved:
        if inner := next((layer for layer in wrapped if _inside(layer, [path])), None):
            raise TargetError(
                f"modules_to_save: {path!r} would be trained in full, and layer {inner!r} has another adapter's LoRA, bias or "
                "token rows. One bank does one of them: save it in both adapters, in neither (modules_to_save=[]), or attach a "
                "bank of its own."
            )
        if other := next((o for o in others if o != path and (_inside(o, [path]) or _inside(path, [o]))), None):
            _check_in_bank("modules_to_save", path, other, others[other])
            raise TargetError(
                f"modules_to_save: {path!r} and another adapter's {other!r} are one in the other. Name the same module in both."
            )
    for path in layers:
        if outer := next((other for other in others if _inside(path, [other])), None):
            _check_in_bank("targets", path, outer, others[outer])
            raise TargetError(
                f"targets: layer {path!r} is in {outer!r}, which another adapter trains in full. One bank does one of them: "
                f"{way or f'exclude it here (exclude=[{outer!r}])'}, save it here too (modules_to_save), or attach a bank of "
                "its own."
            )


def _check_in_bank(setting: str, path: str, outer: str, in_use: bool) -> None:
    if not in_use:
        raise TargetError(
            f"{setting}: {path!r} can't be adapted beside {outer!r}, which an adapter that was removed trained in full: its "
            "place stays as it is until bank.detach(). Attach a new bank."
        )


def check_extras_apart(saved: Collection[str], places: Collection[str]) -> None:
    """Raise TargetError where an adapter has a bias or token rows of its own in a module that it trains in full."""
    if inner := next((path for path in places if _inside(path, saved)), None):
        raise TargetError(
            f"modules_to_save trains {inner!r} in full, and bias or trainable_token_indices mean it too. Leave it out of one of "
            "them."
        )


def unsavable(module: nn.Module, *, unloaded: bool = False) -> str | None:
    """Why a module can't be trained in full; None where it can. `unloaded`: it stands for one whose weights are in a file."""
    if isinstance(module, _LISTS):
        return f"a {type(module).__name__} isn't called. Name the modules in it"
    if next(module.parameters(), None) is None:
        return f"a {type(module).__name__} has no parameters"
    for name, p in module.named_parameters():
        if p.is_meta and not unloaded:
            return f"its parameter {name!r} is on the meta device: not loaded yet, or offloaded"
        if name.rpartition(".")[2] == "B":
            return f"its parameter {name!r} is called as LoRA's B is, by which optimizers tell that (loraplus_ratio)"
        if p.dtype not in SAVED_FLOATS:
            return f"its parameter {name!r} is stored in {p.dtype}. Keep it out of the quantisation, or target it with LoRA"
    for name, inner in module.named_modules():
        if isinstance(inner, _NormBase) and inner.running_mean is not None:
            where = f"its {name!r}" if name else "it"
            return (
                f"{where} is a {type(inner).__name__}, whose running statistics are the base's, one for all adapters. Name the "
                "modules beside it"
            )
    return None


def warn_tied(name: str, model: nn.Module, saved: Sequence[str], *, together: bool) -> None:
    """Warn where a saved parameter is another module's too, which keeps the base's.

    Raises TargetError where they are to be tied (`together`).
    """
    users: dict[int, list[str]] = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(p), []).append(key)
    for path in saved:
        for key, p in unwrapped(model.get_submodule(path)).named_parameters():
            others = [user.rpartition(".")[0] for user in users.get(id(p), ()) if not user.startswith(f"{path}.")]
            if others and together:
                raise TargetError(
                    f"ensure_weight_tying: {path!r} is trained in full and has one weight with {others[0]!r}; tying such copies "
                    "isn't supported. Leave ensure_weight_tying out, or target both with LoRA."
                )
            if others:
                warnings.warn(
                    f"adapter {name!r}: {path!r} and {others[0]!r} have one weight, and the adapter changes the first alone: "
                    f"{key!r} of {path!r} is trained in full.",
                    stacklevel=4,
                )
