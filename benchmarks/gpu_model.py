"""What every GPU benchmark shares: the model of Llama-3.1-8B's shape, a training over it, and the clock."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the machine with the GPU may have the folder only

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.initialization import no_init_weights

import lorabank as lb
from lorabank.engine.batch import Batch, make_batch, pack_batch
from lorabank.engine.compiling import compile_blocks, uncompile_blocks
from lorabank.engine.results import SlotLoss
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.optim.slot_optimizer import SlotOptimizer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALPHA, RATE = 32.0, 1e-4
GIB = 2**30
WARM_UP = 5
"""Passes before the first timed one: a shape is captured as a CUDA graph at its third."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama; the defaults are Llama-3.1-8B's."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256

    @property
    def products(self) -> int:
        """Weights that are multiplied for each token: seven linear layers a block, and the head."""
        narrow = self.hidden * self.kv_heads // self.heads
        block = 2 * self.hidden * self.hidden + 2 * self.hidden * narrow + 3 * self.hidden * self.inner
        return self.layers * block + self.vocabulary * self.hidden

    def useful_tflop(self, rows: int, tokens: int) -> float:
        """TFLOP of a step's frozen forward and input-gradient products and causal attention, as peers_gpu.py counts them."""
        return rows * tokens * (2 * self.products + self.layers * 2 * tokens * self.hidden) * 2 / 1e12


def llama(shape: Shape, device: torch.device, *, seed: int = 0) -> PreTrainedModel:
    """Random weights in bf16, the same for the same seed and device."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval()


def llama_on_host(shape: Shape, drawn_on: torch.device, *, seed: int = 0) -> PreTrainedModel:
    """Such a model in the host's memory, its weights drawn one after the other on a device, where it never is as a whole."""
    with no_init_weights():  # a host is slow at random numbers
        model = llama(shape, torch.device("cpu"))
    generator = torch.Generator(drawn_on).manual_seed(seed)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            drawn = torch.empty_like(weight, device=drawn_on)
            weight.copy_(drawn.normal_(std=model.config.initializer_range, generator=generator))
    return model


def token_rows(rows: int, tokens: int, vocabulary: int) -> torch.Tensor:
    """Random token ids (rows, tokens), on the CPU, of the first 128,000 as peers_gpu.py has them."""
    return torch.randint(0, min(128000, vocabulary), (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))


def as_batch(ids_NL: torch.Tensor, names: Sequence[str], packed: int = 1) -> Batch:
    """Every token but an example's first trained; consecutive rows share an adapter. `packed`: examples of each row."""
    count = len(ids_NL)
    routes = [names[i * len(names) // count] for i in range(count)]
    rows = [[(part.tolist(), [0.0] + [1.0] * (len(part) - 1)) for part in row.chunk(packed)] for row in ids_NL]
    return pack_batch(rows, routes) if packed > 1 else make_batch([row[0] for row in rows], routes)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step trains."""

    rows: int
    tokens: int
    """Of each row."""
    ranks: tuple[int, ...] = (16,)
    """One adapter each."""
    packed: int = 1
    """Examples of each row."""
    storage: str = "bf16"
    """Of the frozen base: bf16, fp8 or nf4."""
    recompute: bool = False
    offload: bool = False
    """Keep what recomputation starts from on the host."""
    kept: str = "products"
    """What blocks keep for backward, as `compile_blocks` takes it."""
    borders: bool = True
    """LoRA in the borders of weights, likewise."""
    cap_gib: float | None = None
    """Memory that the process may take."""


def quantized(model: PreTrainedModel, storage: str, device: torch.device | None = None) -> PreTrainedModel:
    """The model with its frozen weights stored that way, those on `device`, one after the other; None: where they are.

    Raises RuntimeError where any of its blocks' layers is not.
    """
    if storage != "bf16":
        done = lb.quantize_base(model, storage, device=device)
        if done.kept or len(done.layers) != len(TARGETS) * model.config.num_hidden_layers:
            raise RuntimeError(f"not all of the base is in {storage}: {done}")
    return model


class Training:
    """A bank, an engine and an optimizer over a model. `close` leaves the model as it was."""

    def __init__(self, model: PreTrainedModel, work: Work, *, compiled: bool = True, graphs: bool = True) -> None:
        self.bank = lb.attach(model)
        self.names = [f"adapter{i}" for i in range(len(work.ranks))]
        for name, rank in zip(self.names, work.ranks, strict=True):
            self.bank.add(name, lb.AdapterConfig(rank=rank, alpha=ALPHA, targets=TARGETS))
        self._compiled: list[torch.nn.Module] = []
        if compiled:
            self._compiled = compile_blocks(model, blocks=model.model.layers, kept=work.kept, borders=work.borders)
        self.engine = Engine(
            self.bank,
            gradient_checkpointing=work.recompute,
            activation_offloading=work.offload,
            cuda_graphs=graphs,
        )
        self.optimizer = SlotOptimizer(self.bank)
        for name in self.names:
            self.optimizer.add(name)
        self._vocabulary, self._packed = model.config.vocab_size, work.packed
        self.use(work.rows, work.tokens)

    def use(self, rows: int, tokens: int) -> None:
        """Train on other rows from now on."""
        self.batch = as_batch(token_rows(rows, tokens, self._vocabulary), self.names, self._packed)

    def forward_backward(self) -> dict[str, SlotLoss]:
        """One joint pass; gradients pile up until `step` or `clear`."""
        return forward_backward(self.engine, self.batch)

    def step(self) -> dict[str, SlotLoss]:
        """A whole training step."""
        losses = self.forward_backward()
        optim_step(self.optimizer, dict.fromkeys(self.names, RATE), {name: loss.tokens for name, loss in losses.items()})
        return losses

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in self.bank.parameters():
            parameter.grad = None

    def close(self) -> None:
        """Take the adapters out of the model and give the memory back."""
        uncompile_blocks(self._compiled)
        self.bank.detach()
        del self.bank, self.engine, self.optimizer
        free()


class Bases:
    """One model at a time, built anew only where another one is asked for.

    One that is to be quantised is made on the host, as models/load.py loads one: the device never holds it unquantised.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._model: PreTrainedModel | None = None
        self._have: tuple[str, int] | None = None

    def get(self, storage: str = "bf16", layers: int | None = None) -> PreTrainedModel:
        """The base with its weights stored that way. `layers`: None for the shape's."""
        wanted = (storage, self.shape.layers if layers is None else layers)
        if self._model is None or self._have != wanted:
            self.drop()
            shape = replace(self.shape, layers=wanted[1])
            if storage == "bf16":
                self._model = llama(shape, self.device)
            else:
                self._model = quantized(llama_on_host(shape, self.device), storage, self.device)
                torch.nn.Module.to(self._model, self.device)  # what isn't quantised
            self._have = wanted
        return self._model

    def drop(self) -> None:
        """Free the model."""
        self._model = self._have = None
        free()


def free() -> None:
    """Give back what nobody holds any more, compiled code too."""
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def at_most(gib: float | None) -> Iterator[None]:
    """Tensors get no more memory than this inside, as on a smaller card; None: all there is."""
    if gib is None:
        yield
        return
    free()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / torch.cuda.get_device_properties(0).total_memory))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---- the clock ----------------------------------------------------------------------------------------------------------------


def timed(step: Callable[[], Any], steps: int, *, after: Callable[[], Any] | None = None) -> list[float]:
    """Milliseconds of each step, by CUDA events, the GPU idle at its start: what the peers' script does. `after` isn't timed."""
    times: list[float] = []
    for _ in range(steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        if after is not None:
            after()
    return times


def series(step: Callable[[], Any], steps: int) -> float:
    """Milliseconds a step by the wall clock, over steps that follow each other with one synchronisation at the end."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps * 1e3


def spread(times: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Median and range, in milliseconds."""
    found = {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
    return {prefix + name: round(value, 3) for name, value in found.items()}


def peak_gib() -> float:
    """The most that tensors took since the peak was reset."""
    return round(torch.cuda.max_memory_allocated() / GIB, 3)
