"""`Engine`: what the verbs keep between passes: the bank, and what was found out about its model and its device."""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import BASE, Routing, RowRoute
from lorabank.bank.wrapping import Adapted
from lorabank.config.checks import check_choice
from lorabank.engine.attention import own_attention
from lorabank.engine.batch import Batch
from lorabank.engine.compiled import fused_blocks, left_out, named_by, takes_tables
from lorabank.engine.compiling import compiles
from lorabank.engine.fused_block import FusedBlock
from lorabank.engine.graphs import PassGraphs
from lorabank.engine.head import SplitHead, output_head, split_head
from lorabank.engine.loss_scale import LossScales
from lorabank.engine.losses import LOSSES, Loss
from lorabank.engine.maskless import ANY, longest_without_masks
from lorabank.engine.modes import no_random_draws
from lorabank.engine.offload import Offload
from lorabank.engine.own_pass import TrainingPass
from lorabank.engine.packing import Packing, find_packing, windows
from lorabank.engine.parts import Fits, is_out_of_memory
from lorabank.engine.rows import folds_tokens, row_routing
from lorabank.kernels.gpu import flash
from lorabank.notices import warn_once

LOOKED_AT = 16
"""Of the model's parameters, for its dtype: the rest are in the same."""
ROUTES = 16
"""Routings kept: batches of the same adapters in the same order share theirs, and its tables on the device."""
MANY_LOGITS = 16384
"""A token's logits from which on it is told that those of all tokens are held."""


def _tell_of_logits(model: nn.Module, head: nn.Module) -> None:
    """Say what a model costs whose loss can't go through its head in chunks."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) if isinstance(model, PreTrainedModel) else None
    if not isinstance(vocabulary, int) or vocabulary < MANY_LOGITS:
        return
    why = "its output head is adapted" if isinstance(head, Adapted) else "they aren't its head's output alone"
    warn_once(
        f"{type(model).__name__}: a pass holds the {vocabulary:,} logits of every token at once, which takes memory, since "
        f"{why}. A smaller batch_size with gradient_accumulation needs less."
    )


@dataclass
class Engine:
    """What the verbs keep between passes: the bank, and what was found out about its model."""

    bank: AdapterBank
    loss: str | Loss = "nll"
    """A name in `LOSSES`, or a function of your own."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in backward: less memory, about a third more time."""
    activation_offloading: bool = False
    """Keep what `gradient_checkpointing` keeps in the host's memory; switches it on."""
    base_dropout: bool = False
    """Keep the base's own dropout in training; joint training then no longer equals training alone."""
    one_route: bool = False
    """Passes over a `ModelBatch` hold rows of one adapter each: for models with a layer that doesn't see a row's own input."""
    masks: bool = True
    """Whether an attention of the model may get a mask; where none does, passes over a `ModelBatch` may use cuDNN's attention."""
    cuda_graphs: bool = True
    """Capture passes of a shape that comes again, where the model's blocks are compiled for a GPU: small steps need it."""
    graphs: PassGraphs = field(init=False, default_factory=PassGraphs, repr=False)
    uncompiled: bool = field(init=False, default=False, repr=False)
    """Whether it was chosen, or said, that the model's blocks run uncompiled."""
    fits: Fits = field(init=False, default_factory=Fits)
    """What the device's memory was found to hold: a batch that doesn't fit goes through in parts."""
    loss_scales: LossScales = field(init=False, default_factory=LossScales, repr=False)
    """Of the adapters, where the base is in fp16."""
    offload: Offload = field(init=False, default_factory=Offload, repr=False)
    """Where block inputs go with `activation_offloading`."""
    _split: SplitHead | None = field(init=False, default=None, repr=False)
    _probed_head: nn.Module | None = field(init=False, default=None, repr=False)
    _probed: bool = field(init=False, default=False, repr=False)
    _folded: tuple[int, bool] | None = field(init=False, default=None, repr=False)
    """The bank's structure count, and whether the model folds rows and tokens."""
    _fused: tuple[int, Sequence[FusedBlock]] = field(init=False, default=(-1, ()), repr=False)
    """The bank's structure count, and its fused blocks if they hold all adapted layers."""
    _asked: int = field(init=False, default=-1, repr=False)
    """The bank's structure count at which it was told why blocks aren't fused."""
    _maskless: tuple[SplitHead | None, int, int] | None = field(init=False, default=None, repr=False)
    _packing: dict[tuple[int, ...], Packing] = field(init=False, default_factory=dict, repr=False)
    """How the model takes packed rows, by the windows that they reach beyond."""
    _routes: OrderedDict[Hashable, Routing] = field(init=False, default_factory=OrderedDict, repr=False)
    _leaves: tuple[int, dict[str, list[nn.Parameter]]] = field(init=False, default=(-1, {}), repr=False)
    """The bank's structure count, and adapter to its leaves."""
    _deterministic: set[bool] = field(init=False, default_factory=set, repr=False)
    """Values of `gradient_checkpointing` under which the base was seen to draw no random numbers."""

    model_passes: dict[Hashable, TrainingPass] = field(init=False, default_factory=dict, repr=False)
    """Of batches for a model of any kind, by their loss."""

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            check_choice("loss", self.loss, LOSSES)
        self.gradient_checkpointing |= self.activation_offloading

    @property
    def loss_function(self) -> Loss:
        """The loss as a function."""
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    def head(self) -> SplitHead | None:
        """The checked split of body and head, or None; looked for again when the head was wrapped by an adapter since."""
        head = output_head(self.bank.model)
        if not self._probed or head is not self._probed_head:
            self._split, self._probed_head, self._probed = split_head(self.bank), head, True
            if self._split is None and isinstance(head, nn.Module):
                _tell_of_logits(self.bank.model, head)
        return self._split

    def folded(self) -> bool:
        """Whether the model folds rows and tokens into one dimension before an adapted layer."""
        if self._folded is None or self._folded[0] != self.bank.structure:
            self._folded = (self.bank.structure, folds_tokens(self.bank))
        return self._folded[1]

    def maskless(self, length: int) -> bool:
        """Whether passes over rows of `length` tokens do without attention masks.

        So they do for a causal model on a GPU, since batches are padded on the right.
        """
        split = self.head()
        if split is None or self.bank.device.type != "cuda":
            return False
        if self._maskless is None or self._maskless[0] is not split:
            self._maskless = split, 0, 0
        _, limit, asked = self._maskless
        if limit < length and asked < length:
            found = self._longest_without_masks(split, length)
            limit = max(limit, found)  # shorter rows do without all the same
            self._maskless = split, limit, length if found else ANY  # what needs masks does so in longer rows too
        return length <= limit

    def _longest_without_masks(self, split: SplitHead, length: int) -> int:
        try:
            return longest_without_masks(self.bank, split, length)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        warn_once("there was no memory to find out whether attention does without masks, so it gets them: slower.")
        return 0

    def packing(self, length: int) -> Packing:
        """How the model takes packed rows of `length` tokens. Raises ConfigError for a model that can't."""
        reached = windows(self.bank.model, length)
        if reached not in self._packing:
            self._packing[reached] = find_packing(self.bank, self.head(), length)
        return self._packing[reached]

    def attention(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        """Our attention in the model, as this batch needs it."""
        modules, device, length = self.bank.model.modules(), self.bank.device, batch.input_ids_NL.shape[1]
        if batch.packed:
            return own_attention(modules, device, packed=self.packing(length).by_attention)
        split = self.head()
        half = split is not None and split.head.weight.dtype in flash.DTYPES
        return own_attention(modules, device, maskless=self.maskless(length), fast=half, length=length)

    def all_fused(self, routing: Routing) -> bool:
        """Whether every adapted layer's product is compiled into a block of the model's, under this route."""
        structure, fused = self._fused
        if structure != self.bank.structure or not fused or not all(block.in_place for block in fused):
            self._fused = self.bank.structure, fused_blocks(self.bank)
            self.graphs.forget()  # of other blocks, or slots
            if not self._fused[1] and self._asked != self.bank.structure:
                self._asked = self.bank.structure
                self._tell_why_not()
        compiled = self._fused[1]
        return bool(compiled) and not any(block.failed for block in compiled) and takes_tables(routing)

    def _tell_why_not(self) -> None:
        """Say once which layers or blocks keep passes from being captured."""
        model = self.bank.model
        if paths := left_out(self.bank):
            warn_once(
                f"passes aren't captured as CUDA graphs, so small ones wait for the host: {len(paths)} adapted layers are in "
                f"no compiled block ({paths[0]!r} for one). Leave them out of {named_by(self.bank, paths)}, or silence this with "
                "Engine(cuda_graphs=False)."
            )
        elif not self.uncompiled and compiles(model) and not fused_blocks(self.bank, whole=False):
            warn_once(
                f"passes aren't captured as CUDA graphs, so small ones wait for the host: the blocks of {type(model).__name__} "
                "aren't compiled. lorabank.engine.compiling.compile_blocks(model) compiles them; Engine(cuda_graphs=False) "
                "silences this."
            )

    @property
    def blocks(self) -> Sequence[FusedBlock]:
        """The fused blocks that `all_fused` found."""
        return self._fused[1]

    @property
    def deterministic(self) -> bool:
        """Whether the base was seen to draw no random numbers, as it is run now."""
        return self.gradient_checkpointing in self._deterministic

    def routing(self, routes: Sequence[RowRoute], length: int) -> Routing:
        """The routing of rows of `length` tokens, without dropout."""
        # a list of all tokens takes the host milliseconds, which only a GPU notices
        fold = length if self.bank.device.type != "cuda" or self.folded() else 1
        if not all(isinstance(route, str) or route is BASE for route in routes):
            return row_routing(self.bank, routes, fold, exact=False)
        key = (self.bank.structure, self.bank.device, tuple(routes), fold)
        if key not in self._routes:
            self._routes[key] = row_routing(self.bank, routes, fold, exact=False)
            if len(self._routes) > ROUTES:
                self._routes.popitem(last=False)
        self._routes.move_to_end(key)
        return self._routes[key]

    def leaves(self, names: Iterable[str]) -> dict[str, list[nn.Parameter]]:
        """Adapter to its trainable leaves."""
        if self._leaves[0] != self.bank.structure:
            self._leaves = (self.bank.structure, {})
        known = self._leaves[1]
        return {name: known[name] if name in known else known.setdefault(name, self.bank.parameters(name)) for name in names}

    @property
    def scales_losses(self) -> bool:
        """Whether the base is in fp16, which has no room for small gradients."""
        return any(p.dtype == torch.float16 for p in itertools.islice(self.bank.model.parameters(), LOOKED_AT))

    def release(self) -> bool:
        """Give back memory that is kept for speed. True when there was any."""
        held = self.graphs.drop()
        for kept in self.model_passes.values():
            held = kept.graphs.drop() or held
        if self.bank.device.type == "cuda":
            torch.cuda.empty_cache()
        return held

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around a forward pass: a check, until it has passed once, that the base draws no random numbers."""
        if self.base_dropout or self.deterministic:
            yield
            return
        with no_random_draws(self.bank.device, " (with gradient_checkpointing)" if self.gradient_checkpointing else ""):
            yield
        self._deterministic.add(self.gradient_checkpointing)
