"""`convert`: an adapter from one tool's form into another's, checked by reading back what was written.

Lossless where the target can hold the adapter; otherwise it is refused before anything is written, or, when asked, written with
the error that was measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from lorabank.errors import AdapterFileError, OutputError, closest
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.components import as_component, components, config_of, in_file_names, of_component, spelled_for
from lorabank.formats.detect import FORMATS, load_adapter
from lorabank.formats.difference import Difference, difference
from lorabank.formats.diffusers import SETTINGS, save_diffusers
from lorabank.formats.diffusers import unheld as unheld_by_diffusers
from lorabank.formats.extras import extras_error, refuse_extras
from lorabank.formats.files import read_header
from lorabank.formats.image_files import OWN
from lorabank.formats.kohya import read_kohya, save_kohya, weight_shapes
from lorabank.formats.kohya import unheld as unheld_by_kohya
from lorabank.formats.lycoris import EXACT
from lorabank.formats.lycoris_layers import Decomposed
from lorabank.formats.peft import CONFIG_FILE, TENSORS_FILE, save_peft
from lorabank.formats.peft_config import unheld as unheld_by_peft
from lorabank.formats.readers import non_finite
from lorabank.formats.scratch import scratch_beside
from lorabank.formats.slices import without_slices
from lorabank.wording import counted

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What tensors can be written in, by the command line's names."""
TRANSLATED = (SETTINGS, OWN, "format", "ss_network_module", "ss_network_dim", "ss_network_alpha")
"""Metadata that each form says in its own way."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A form to convert into."""

    save: Callable[[Adapter, Path], Path]
    unheld: Callable[[Adapter], dict[str, str]]
    """Module path → why the form can't hold that layer."""


TARGETS: Mapping[str, Target] = {
    "kohya": Target(save=save_kohya, unheld=unheld_by_kohya),
    "diffusers": Target(save=save_diffusers, unheld=unheld_by_diffusers),
    "peft": Target(save=save_peft, unheld=unheld_by_peft),
}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did."""

    source: str
    """Form of the source, a key of FORMATS."""
    path: Path
    """What was written."""
    adapter: Adapter
    """As it was read back."""
    error: Difference
    """Of what was written, against what was read."""
    beside: float = 0.0
    """The largest ‖lost‖ / ‖old‖ of biases, token rows and modules in full."""
    decomposed: Mapping[str, Decomposed] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Layers that were left out, and why."""
    resolved: str = ""
    """How names were read: `table`, `model`, or '' where a form has the paths themselves."""
    kept: tuple[str, ...] = ()
    """Keys of the source file's metadata that the written file has."""
    lost: tuple[str, ...] = ()
    """Those that it hasn't."""
    unchecked: bool = False
    """Whether the fingerprint of the base was left out, so that loading can't tell another base."""


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    lossy: bool = False,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    component: str | None = None,
    model: nn.Module | None = None,
    base_model: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Conversion:
    """Read the adapter at `source` and write it at `target` in the form `to`; all is written, or nothing.

    `lossy`: layers that the form can't hold are left out, and an error above rounding is allowed. `rank`: the highest that LoHa
    and LoKr layers get. `component`: the model that PEFT's side is of. `model`: the one that the adapter is for.
    `base_model`, `metadata`: what PEFT's form says of it where the source doesn't.
    Raises AdapterFileError and OutputError.
    """
    if to not in TARGETS:
        raise AdapterFileError(f"--to: there is no form {to!r}{closest(to, TARGETS)}; there are {', '.join(TARGETS)}")
    form = form_of(source)
    adapter, turned, resolved = _read(source, form, rank, model)
    fingerprint = adapter.fingerprint
    if component is not None:
        adapter = _one_component(adapter, component, strip=to == "peft")
        turned = {path: how for path, how in turned.items() if path in adapter.layers or to == "peft"}
    if to != "peft" or TARGETS[to].unheld(without_slices(adapter)):
        adapter = without_slices(adapter)
        refuse_extras(adapter, f"the form of {to}")
    _refuse_truncated(turned, lossy)
    whole, dropped = adapter, TARGETS[to].unheld(without_slices(adapter))
    if dropped:
        adapter = _without(adapter, dropped, to, lossy)
    if dtype is not None:
        adapter = _cast(adapter, dtype)
    if to == "peft":
        said = {**(metadata or {}), **adapter.metadata}
        adapter = replace(adapter, base_model=adapter.base_model or base_model, metadata=said)
    with scratch_beside(target) as scratch:
        written = scratch / target.name
        TARGETS[to].save(adapter, written)
        again = _read_back(written)
        error = difference(_as_in_files(whole), _as_in_files(again))
        if (off := extras_error(whole, again)) > EXACT and not lossy:
            raise AdapterFileError(
                f"{source}: {to} in {_dtypes(again)} would hold its biases, token rows or modules in full with a relative error "
                f"of {off:.2g}. Nothing was written; --lossy allows it."
            )
        if error.worst > EXACT and not lossy:
            raise AdapterFileError(
                f"{source}: {to} in {_dtypes(again)} would hold it with a {error}. Nothing was written; --lossy allows it."
            )
        _put(written, target)
    kept, lost = _metadata(source, form, target, to)
    return Conversion(
        source=form,
        path=target,
        adapter=again,
        error=error,
        beside=off,
        decomposed=turned,
        dropped=dropped,
        resolved=resolved,
        kept=kept,
        lost=lost,
        unchecked=fingerprint is not None and again.fingerprint is None,
    )


def _as_in_files(adapter: Adapter) -> dict[str, AdapterLayer]:
    """Layers by the paths that files have: a model's class decides whether CLIP's begin with `text_model.` in it."""
    return {in_file_names(path): layer for path, layer in adapter.layers.items()}


def form_of(source: Path) -> str:
    """The form of the adapter at `source`, told by its content; `peft` for what `load_adapter` will refuse with a reason."""
    file = _tensors_file(source)
    if file is None:
        return "peft"
    header = read_header(file)
    return next((name for name, form in FORMATS.items() if form.recognise(header)), "peft")


def _tensors_file(source: Path) -> Path | None:
    """The file that holds the tensors, if there is one."""
    if source.is_file():
        return source.parent / TENSORS_FILE if source.name == CONFIG_FILE else source
    if (source / TENSORS_FILE).is_file():
        return source / TENSORS_FILE
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    return files[0] if len(files) == 1 else None


def _read(source: Path, form: str, rank: int | None, model: nn.Module | None) -> tuple[Adapter, Mapping[str, Decomposed], str]:
    file = _tensors_file(source)
    if form == "kohya" and file is not None:
        found = read_kohya(file, model=model, rank=rank)
        if rank is not None and not found.decomposed:
            raise AdapterFileError(f"{source}: --rank is the rank of LoHa and LoKr layers, and it has none. Leave it out.")
        return found.adapter, found.decomposed, found.resolved
    if rank is not None:
        raise AdapterFileError(f"{source}: --rank is the rank of LoHa and LoKr layers, and it has none. Leave it out.")
    adapter = load_adapter(source)
    return (adapter if model is None else spelled_for(adapter, weight_shapes(model))), {}, ""


def _one_component(adapter: Adapter, name: str, *, strip: bool) -> Adapter:
    """The part of one model, by its paths there or with its component; an adapter without components becomes one of it.

    A fingerprint names its parameters by the model's paths and is of those that their names choose, so it holds for a part
    whose paths stay, and for no model that is spelled otherwise.
    """
    has = components(list(adapter.layers))
    if strip and has == [""]:
        raise AdapterFileError(
            f"--component {name}: the paths of this adapter begin with no component, and --to peft only takes "
            "one off. Leave it out."
        )
    if strip:
        return of_component(adapter, name)
    if "" in has:
        return as_component(adapter, name)
    return replace(as_component(of_component(adapter, name), name), fingerprint=adapter.fingerprint)


def _refuse_truncated(turned: Mapping[str, Decomposed], lossy: bool) -> None:
    lost = {path: how for path, how in turned.items() if how.error > EXACT}
    if lost and not lossy:
        worst = max(lost, key=lambda path: lost[path].error)
        raise AdapterFileError(
            f"--rank: {counted(len(lost), 'layer')} would lose a part of their change, {worst!r} {lost[worst].error:.2g} of it "
            f"(‖lost‖/‖ΔW‖; its full rank is {lost[worst].full_rank}). Nothing was written; --lossy allows it."
        )


def _without(adapter: Adapter, problems: Mapping[str, str], to: str, lossy: bool) -> Adapter:
    """The adapter without what the form can't hold. Raises AdapterFileError unless that is allowed and something is left."""
    (first, why), *more = problems.items()
    others = f", nor {len(more)} more of {len(adapter.layers)}" if more else ""
    what = f"{to} can't hold layer {first!r}: {why}{others}. Nothing was written"
    left = {path: layer for path, layer in adapter.layers.items() if path not in problems}
    if not left:
        way = " If the adapter is of one model of a pipeline, say which: --component unet." if "component" in why else ""
        raise AdapterFileError(f"{what}.{way}")
    if any(adapter.layers[path].magnitude is not None for path in problems):
        raise AdapterFileError(f"{what}: it is decomposed (DoRA), so what leaving it out loses can't be told without the base.")
    if not lossy:
        raise AdapterFileError(f"{what}; --lossy leaves such layers out and says how much of the change they are.")
    return replace(adapter, config=config_of(left, adapter.config), layers=left)


def _cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    cast = adapter.to(dtype=dtype)
    if broken := non_finite(cast):
        largest = f"{torch.finfo(dtype).max:g}, the largest in {str(dtype).removeprefix('torch.')}"
        what = "layer" if broken[0] in cast.layers else "module" if broken[0] in cast.modules else "tensor"
        raise AdapterFileError(f"{what} {broken[0]!r} has numbers above {largest}. Nothing was written; choose bf16 or fp32.")
    return cast


def _read_back(path: Path) -> Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the source was read
        return load_adapter(path)


def _put(written: Path, target: Path) -> None:
    try:
        if target.is_dir():
            target.rmdir()  # empty, or it would have been refused
        written.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: can't be written: {error.strerror or error}") from error


def _metadata(source: Path, form: str, target: Path, to: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys of the source file's metadata that are in the target's, those that aren't)."""
    before, after = _tensors_file(source), _tensors_file(target)
    if before is None or after is None:
        return (), ()
    skipped = TRANSLATED if form != to else TRANSLATED[:3]
    had = [key for key in sorted(read_header(before).metadata) if key not in skipped]
    has = read_header(after).metadata
    return tuple(key for key in had if key in has), tuple(key for key in had if key not in has)


def _dtypes(adapter: Adapter) -> str:
    found: dict[str, None] = {}
    layers: Mapping[str, AdapterLayer] = adapter.layers
    for layer in layers.values():
        found[str(layer.A.dtype).removeprefix("torch.")] = None
    return " and ".join(found)
