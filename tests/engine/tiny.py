"""Tiny random language models of many families, rows for them, and a joint training loop in a few lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorabank import BASE, AdapterConfig, attach
from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.bank.starts.adapter_start import AdapterStart
from lorabank.engine.batch import Batch, make_batch
from lorabank.engine.step import Engine, SlotLoss, forward_backward, optim_step
from lorabank.optim.schedules import learning_rate_factor
from lorabank.optim.slot_optimizer import OptimizerConfig, SlotOptimizer

VOCABULARY = 61
END_IDS = (2, 7, 11, 13)

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OTHER: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BLOCKS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_OTHER}

FAMILIES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA, sliding_window=5)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=5, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_LLAMA, logit_scale=0.25)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_LLAMA, logits_scaling=3.0, embedding_multiplier=2.0)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=4, **_OTHER)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**_BLOCKS, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.3)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_OTHER)),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_BLOCKS, intermediate_size=48, max_position_embeddings=128)),
    "bert": lambda: hf.BertLMHeadModel(hf.BertConfig(**_BLOCKS, intermediate_size=48, is_decoder=True)),
    "bart": lambda: hf.BartForCausalLM(
        hf.BartConfig(
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            max_position_embeddings=128,
            is_encoder_decoder=False,
            is_decoder=True,
            forced_eos_token_id=None,
            dropout=0.3,
            activation_dropout=0.2,
            attention_dropout=0.1,
            **_OTHER,
        )
    ),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **_OTHER)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA, num_local_experts=4, output_router_logits=True)),
}
"""Family to a model with dropout of its own where the family has any by default."""

TARGETS: Mapping[str, Sequence[str]] = {
    "bart": ["re:.*self_attn.*", "fc1", "fc2"],  # a decoder alone has cross-attention that nothing calls
    "mamba": ["in_proj", "out_proj"],
}
SPLITS = {"llama", "qwen3", "mistral", "gemma2", "cohere", "granite", "gpt2", "opt", "bloom", "neox", "mamba", "mixtral"}
"""Families whose logits are a linear head's, with nothing after it but a scale or a cap that the configuration names."""


def make_model(family: str = "llama", *, spread: float = 4.0) -> PreTrainedModel:
    """The same weights each time, spread so that outputs are far from uniform."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(spread)
    return model.eval()


def make_bank(
    family: str = "llama", names: Sequence[str] = ("a", "b"), *, model: nn.Module | None = None, **config: Any
) -> AdapterBank:
    """A bank whose adapters already do something, each of another rank."""
    bank = attach(make_model(family) if model is None else model)
    for name in names:
        add(bank, name, rank=2 + 2 * names.index(name), **{"targets": TARGETS.get(family, "all-linear"), **config})
    return bank


def add(bank: AdapterBank, name: str, *, strength: float = 0.2, **config: Any) -> None:
    """An adapter whose start depends on its name alone."""
    seed = sum(name.encode())
    bank.add(name, AdapterConfig(**config), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in bank.parameters(name):
            p.add_(torch.randn(p.shape, generator=generator).to(p.device) * strength)


def tokens(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random texts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(14, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def batch_of(
    lengths: Sequence[int], routes: Sequence[RowRoute] | RowRoute = BASE, *, seed: int = 0, prompt: int = 2, **kwargs: Any
) -> Batch:
    """Random rows, trained from token `prompt` on."""
    return make_batch([(ids, [float(i >= prompt) for i in range(len(ids))]) for ids in tokens(lengths, seed)], routes, **kwargs)


def gradients(bank: AdapterBank, name: str) -> dict[str, Tensor]:
    """Copies of an adapter's gradients by leaf."""
    return {key: p.grad.clone() for key, p in bank.named_parameters(name) if p.grad is not None}


def clear(bank: AdapterBank) -> None:
    """Drop all gradients."""
    for p in bank.parameters():
        p.grad = None


def values(bank: AdapterBank, name: str) -> dict[str, Tensor]:
    """Copies of an adapter's leaves."""
    return {key: p.detach().clone() for key, p in bank.named_parameters(name)}


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of two sets of tensors, relative to each expected tensor's largest entry.

    Where a tensor is below a hundredth of the largest (gradients of q and k, which cancel), relative to that hundredth.
    """
    assert found.keys() == expected.keys()
    assert expected
    largest = {key: float(e.abs().max()) for key, e in expected.items()}
    floor = max(1e-12, 0.01 * max(largest.values()))
    scale = {key: max(floor, value) for key, value in largest.items()}
    return max(float((found[key] - e).abs().max()) / scale[key] for key, e in expected.items())


def backward(
    bank: AdapterBank, batch: Batch, engine: Engine | None = None, **kwargs: Any
) -> tuple[dict[str, SlotLoss], dict[str, dict[str, Tensor]]]:
    """Losses and fresh gradients of one pass."""
    clear(bank)
    losses = forward_backward(engine or Engine(bank), batch, **kwargs)
    return losses, {name: gradients(bank, name) for name in losses}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One adapter's training: its own rows in their order, batch size, accumulation, optimizer and schedule."""

    name: str
    rank: int
    rows: Sequence[Sequence[int]]
    batch_size: int = 2
    accumulation: int = 1
    learning_rate: float = 1e-2
    schedule: str = "constant"
    warmup: int = 0
    steps: int = 20
    dropout: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    targets: str | Sequence[str] = "all-linear"
    use_dora: bool = False
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Settings of what is trained beside A and B."""
    modules_to_save: Sequence[str] | None = None
    prepare: Callable[[AdapterBank, AdapterConfig], AdapterStart] | None = None
    """Makes the start that data, or other weights, are needed for."""


def train(make_base: Callable[[], nn.Module], jobs: Sequence[Job], **engine: Any) -> dict[str, dict[str, Tensor]]:
    """Train all jobs in joint passes; each adapter's final leaves."""
    bank = attach(make_base())
    optimizer = SlotOptimizer(bank)
    for job in jobs:
        config = AdapterConfig(
            rank=job.rank,
            dropout=job.dropout,
            targets=job.targets,
            use_dora=job.use_dora,
            modules_to_save=job.modules_to_save,
            **job.extras,
        )
        bank.add(job.name, job.prepare(bank, config) if job.prepare else config, seed=sum(job.name.encode()))
        optimizer.add(job.name, job.optimizer)
    verbs = Engine(bank, **engine)
    seen = {job.name: 0 for job in jobs}
    weights = {job.name: 0.0 for job in jobs}
    while running := [job for job in jobs if optimizer.steps(job.name) < job.steps]:
        rows: list[tuple[Sequence[int], Sequence[float]]] = []
        routes: list[str] = []
        examples: list[int] = []
        for job in running:
            for i in range(job.batch_size):
                place = seen[job.name] * job.batch_size + i
                ids = job.rows[place % len(job.rows)]
                rows.append((ids, [0.0, 0.0, *[1.0] * (len(ids) - 2)]))
                routes.append(job.name)
                examples.append(place % (job.batch_size * job.accumulation))
        losses = forward_backward(
            verbs, make_batch(rows, routes, examples=examples), steps={job.name: optimizer.steps(job.name) for job in running}
        )
        due = []
        for job in running:
            seen[job.name] += 1
            weights[job.name] += losses[job.name].tokens
            if seen[job.name] % job.accumulation == 0:
                due.append(job)
        rates = {
            job.name: job.learning_rate * learning_rate_factor(job.schedule, optimizer.steps(job.name), job.steps, job.warmup)
            for job in due
        }
        if due:
            optim_step(optimizer, rates, {job.name: weights[job.name] for job in due})
            weights |= {job.name: 0.0 for job in due}
    return {job.name: values(bank, job.name) for job in jobs}


llama = partial(make_model, "llama")
