"""What modules do with the layers inside them that a layer's own call doesn't show: one table each, by class name.

Some fold the rows of a batch into more rows (windows, tokens), some turn them away from the first dimension, some multiply by a
layer's weight without calling it on some of their ways. The names are those of transformers' classes (and of remote code that it
loads). A class that isn't named here is taken to do none of that: the layer refuses an input whose first dimension isn't the
route's.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorabank.bank.inert import inert
from lorabank.errors import UnreachedLayerError

FOLDING: Mapping[str, str] = {
    r"OPTDecoderLayer": r"fc[12]",
    r"\w*Swin(v2)?Layer|ClapAudioLayer": r"attention\..*",
    r"(Sam|SamHQ|Got\w*)VisionLayer": r"attn\..*",
    r"Sam(HQ)?MaskDecoder": r".*",
    r"VitDetLayer": r"attention\..*",
    r"TimesformerLayer": r"(temporal_)?attention\..*",
    r"MobileViTLayer": r"transformer\..*",
    r"PatchTSTEncoderLayer": r"(self_attn|ff)\..*",
    r"\w*(MoE|Moe|SparseMLP)(Block)?": r"shared_experts?(\..*)?|shared_expert_gate|router(\..*)?|gate(\..*)?",
}
"""Class of a module whose first input has rows first → its layers that get them folded with what follows, row by row."""
BY_TOKEN = ("OPTDecoderLayer", r"\w*(MoE|Moe|SparseMLP)(Block)?")
"""Those keys of `FOLDING` whose layers get one token a row."""
ELSEWHERE: Mapping[str, tuple[str, str]] = {
    r"(Longformer|LEDEncoder)SelfAttention": (r"(query|key|value)(_global)?", "its input is (tokens, rows, features)"),
    r"FSMT(En|De)coder": (r"layers\..*", "its input is (tokens, rows, features)"),
    r"BridgeTowerResidualAttention": (r"mlp\..*", "its input is (tokens, rows, features)"),
    r"Mask2FormerMaskedAttentionDecoderLayer": (r"fc[12]", "its input is (queries, rows, features)"),
    r"OneFormerTransformerDecoder(QueryTransformerDecoder|FFN)Layer": (r"linear[12]", "its input is (queries, rows, features)"),
    r"XLNetModel": (r"layer\..*", "its input is (tokens, rows, features)"),
    r"Swinv2SelfAttention": (r"continuous_position_bias_mlp\..*", "its input is distances in a window, the same for all rows"),
}
"""Class → its layers whose input doesn't have the rows in a place that the route could follow, and what it is."""
_GRIDS = frozenset({"grid_thw", "image_grid_thw", "grid_hw", "target_sizes"})
"""What a vision model is given beside patches that aren't kept apart by rows: where each picture's begin."""
_READ = "its weight is read and it isn't called"
BYPASSED: Mapping[str, tuple[Sequence[str], str]] = {
    r"RecurrentGemmaRecurrentBlock": (("conv_1d",), f"with a cache {_READ}"),
    r"\w*LearnedPositionEmbedding": (
        ("row_embeddings", "column_embeddings"),
        "what it gives is kept, whatever the route is later",
    ),
    r"(Falcon|Jamba)?MambaMixer": (("dt_proj", "conv1d"), _READ),
    r"\w*(Mixer|MambaLayer|GatedDeltaNet|DeltaAttention|LinearAttention|ShortConvolution)": (("conv1d",), _READ),
    r"Lfm\w*ShortConv": (("conv",), _READ),
    r"LayoutLMv[23]Encoder|PPDocLayoutV2ReadingOrderEncoder": (("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"), _READ),
    r"WavLMAttention": (("q_proj", "k_proj", "v_proj", "out_proj"), _READ),
    r"TDNNLayer": (("kernel",), _READ),
    r"MobileBertLMPredictionHead": (("dense", "decoder"), _READ),
    r"\w*MHAttentionMap": (("k_proj", "k_linear"), _READ),
    r"Deepseek(V2|Ocr2Text)Moe": (("gate",), _READ),  # of older versions
    r"LongcatFlashTopkRouter": (("classifier",), _READ),
    r"NeoMMEForMaskedLM": (("unembedding_projection",), _READ),
    r"LSHSelfAttention": (("query_key", "value"), "in backward its weight is read"),
}
"""Class → its children that it never calls, or not always, and what happens instead. They can't be adapted."""
_KERNELS = "in training mode (model.train(), which lorabank's own training does without) mamba's kernels read"
PASSED: Mapping[str, tuple[str, str]] = {
    r"(Falcon)?MambaMixer": (r"x_proj|out_proj", f"{_KERNELS} their weights instead"),
    r"Mamba2Mixer|NemotronHMamba2Mixer|BambaMixer|GraniteMoeHybridMambaLayer|Zamba2MambaMixer|FalconH1Mixer": (
        r"out_proj",
        f"{_KERNELS} its weight instead",
    ),
    r"Gemma3nTextAltUp": (r"correction_coefs", "in training mode its weight, clipped, is read instead"),
    r"DisentangledSelfAttention": (r"in_proj", "for queries of their own its weight is read instead"),
    r"\w*VisionEmbeddings": (r"position_embedding", "for pictures of another size its weight is read instead"),
}
"""Class → its layers that it calls on some ways through it alone, and what happens on the others."""


def owners_of(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """(module, the rest of the path) for each module above a layer, the model itself first."""
    module, parts = model, path.split(".")
    for depth, part in enumerate(parts):
        yield module, ".".join(parts[depth:])
        child = module._modules.get(part)
        if child is None:
            return  # what follows names a part of this module
        module = child


def is_named(owner: nn.Module, name: str) -> bool:
    """Whether a module is of a class of transformers that the key of a table names."""
    return type(owner).__module__.startswith("transformers") and re.fullmatch(name, type(owner).__name__) is not None


def _packs_pictures(owner: nn.Module) -> bool:
    given = inspect.signature(type(owner).forward).parameters
    return not _GRIDS.isdisjoint(given) and "input_ids" not in given


def elsewhere(model: nn.Module, path: str) -> str | None:
    """What a layer's input is, where it doesn't have the batch's rows first; None otherwise."""
    for owner, rest in owners_of(model, path):
        if _packs_pictures(owner):
            return "its input is the patches of all pictures, one after another"
        for name, (layers, what) in ELSEWHERE.items():
            if is_named(owner, name) and re.fullmatch(layers, rest):
                return what
    return None


def folding_owner(model: nn.Module, path: str) -> nn.Module | None:
    """The module that folds rows ahead of a layer, if one does."""
    for owner, rest in owners_of(model, path):
        for name, layers in FOLDING.items():
            if is_named(owner, name) and re.fullmatch(layers, rest):
                return owner
    return None


def passing_owner(model: nn.Module, path: str) -> tuple[nn.Module, str] | None:
    """The module that may read a layer's weight past it, and when; None for most layers."""
    for owner, rest in owners_of(model, path):
        for name, (layers, when) in PASSED.items():
            if is_named(owner, name) and re.fullmatch(layers, rest):
                return owner, when
    return None


class Watched(Protocol):
    """What is asked of a wrapped layer here."""

    path: str

    @property
    def in_use(self) -> bool:
        """Whether an adapter changes it."""
        ...

    @property
    def asks(self) -> bool:
        """Whether a call needs to know how many rows its owner was given."""
        ...

    def watch(self, folded: OwnerWatch | None, called: ContextVar[bool] | None) -> None:
        """Take note of what its owner tells, and what it must tell."""
        ...


@dataclass(frozen=True)
class Called:
    """A layer that its owner must call each time."""

    layer: Watched
    when: str
    """It might not."""
    seen: ContextVar[bool]


class OwnerWatch:
    """Hooks on one owner: how many rows its input has, while it runs, and whether the layers that it may pass were called."""

    def __init__(self, owner: nn.Module) -> None:
        self.by_token = any(is_named(owner, name) for name in BY_TOKEN)
        """Whether it folds each row's tokens into rows of one token, not into windows or the like."""
        self._rows: ContextVar[int | None] = ContextVar("lorabank_rows", default=None)
        self._called: list[Called] = []
        self._folded: list[Watched] = []
        self._hooks = [
            owner.register_forward_pre_hook(_Enter(self), with_kwargs=True),
            owner.register_forward_hook(_Leave(self)),
        ]

    @property
    def rows(self) -> int | None:
        """Of the owner's input; None outside its call, and in a compiled block none of whose layers asks."""
        return self._rows.get()

    @property
    def asked(self) -> bool:
        """Whether a layer needs `rows`. Traced by torch.compile."""
        return any(layer.asks for layer in self._folded)

    def folds(self, layer: Watched) -> None:
        """Tell a layer, too, how many rows there are."""
        self._folded.append(layer)

    def expect(self, layer: Watched, when: str) -> ContextVar[bool]:
        """Expect a layer to be called whenever the owner is. It sets what is returned."""
        seen: ContextVar[bool] = ContextVar("lorabank_called", default=False)
        self._called.append(Called(layer, when, seen))
        return seen

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The owner is being called."""
        self.count(args, kwargs)
        for called in self._called:
            called.seen.set(False)

    def count(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the rows of the owner's input."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self._rows.set(None if x is None or x.ndim < 3 else x.shape[0])

    def forget(self) -> None:
        """Outside the owner's call there are none."""
        self._rows.set(None)

    # Python's work: in compiled code a graph break, which the layers that ask are as well
    eager_count: Any = torch.compiler.disable(count)
    eager_forget: Any = torch.compiler.disable(forget)

    def leave(self) -> None:
        """It has been. Raises UnreachedLayerError where it passed a layer."""
        self.forget()
        for called in self._called:
            if called.layer.in_use and not called.seen.get():
                raise UnreachedLayerError(
                    f"layer {called.layer.path!r} has adapters and wasn't called: {called.when}. Leave the layer out of targets "
                    "(exclude=[...])."
                )

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


class Owners:
    """The watches of one bank, one for each owner."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._watches: dict[nn.Module, OwnerWatch] = {}

    def watch(self, layer: Watched) -> None:
        """Tie a newly wrapped layer to the modules above it that it depends on, if there are any."""
        folding, passing = folding_owner(self._model, layer.path), passing_owner(self._model, layer.path)
        folded = None if folding is None else self._of(folding)
        if folded is not None:
            folded.folds(layer)
        called = None if passing is None else self._of(passing[0]).expect(layer, passing[1])
        layer.watch(folded, called)

    def above(self, path: str) -> OwnerWatch:
        """The watch of the module that holds the one at `path`."""
        return self._of(self._model.get_submodule(path.rpartition(".")[0]))

    def _of(self, owner: nn.Module) -> OwnerWatch:
        if owner not in self._watches:
            self._watches[owner] = OwnerWatch(owner)
        return self._watches[owner]

    def close(self) -> None:
        """Take all hooks off."""
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()


class _Enter:
    """A hook that a copy or a pickle of the model is without: that is the plain base."""

    def __init__(self, watch: OwnerWatch) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._watch.enter(args, kwargs)
        elif self._watch.asked:
            self._watch.eager_count(args, kwargs)

    def __reduce__(self) -> Any:
        return inert, ()


class _Leave:
    """The same behind the call."""

    def __init__(self, watch: OwnerWatch) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._watch.leave()
        elif self._watch.asked:
            self._watch.eager_forget()

    def __reduce__(self) -> Any:
        return inert, ()
