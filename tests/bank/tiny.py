"""Tiny random models of every kind that the bank meets, and a way to make adapters that do something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lorabank import AdapterConfig, attach
from lorabank.bank.bank import AdapterBank

VOCABULARY = 48


class Handwritten(nn.Module):
    """A module of nobody's library: an embedding, a gated block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16, bias=False)) for _ in range(2))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class TorchEncoder(nn.Module):
    """torch's own encoder layers, whose fast path reads weights without calling the layers."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input_ids)))


class Pictures(nn.Module):
    """Convolutions of every kind over ids that are laid out as pictures: plain, strided, dilated, in groups, depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16, padding_idx=0)
        self.positions = nn.Embedding(8, 16)
        self.along = nn.Conv1d(16, 12, 3, padding=1, groups=2)
        self.blocks = nn.ModuleList(
            [
                nn.Conv2d(12, 12, 3, padding="same", dilation=2, padding_mode="circular"),
                nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
                nn.Conv2d(12, 16, 1, stride=(2, 1)),
            ]
        )
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device)[None])
        h = self.along(h.transpose(1, 2)).unflatten(2, (2, -1))
        for block in self.blocks:
            h = torch.tanh(block(h))
        return self.head(h.flatten(2).mT.contiguous())  # on another layout torch multiplies a frozen weight otherwise


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=64, **(sizes | changes))
    )


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def neox() -> GPTNeoXForCausalLM:
    """The heads' q, k and v take turns in its fused layer."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=8
    )
    return BertForSequenceClassification(config)


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def bart() -> BartForConditionalGeneration:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, **sizes)
    )


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
    )


def gpt_oss() -> GptOssForCausalLM:
    """Its experts' matrices lie the other way round, gate and up take turns, and there are biases."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2, **sizes
        )
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj_bias"):
                p.normal_(std=0.1)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "bart": bart,
    "handwritten": Handwritten,
    "torch encoder": TorchEncoder,
    "pictures": Pictures,
    "mixtral": mixtral,
    "gpt-oss": gpt_oss,
    "decomposed llama": llama,
    "decomposed gpt2": gpt2,
    "decomposed pictures": Pictures,
    "sliced gpt2": gpt2,
    "sliced neox": neox,
    "decomposed sliced gpt2": gpt2,
    "decomposed sliced neox": neox,
    "biased sliced gpt2": gpt2,
    "biased sliced neox": neox,
    "biased gpt2": gpt2,
    "biased bert": bert,
    "biased pictures": Pictures,
    "decomposed biased gpt2": gpt2,
    "rows of tied llama": lambda: llama(tie_word_embeddings=True),
    "rows of handwritten": Handwritten,
    "tied ends of llama": lambda: llama(tie_word_embeddings=True),
    "pissa on slices of gpt2": gpt2,
    "olora llama": llama,
}
TARGETS: dict[str, Any] = {
    "pictures": ["all-linear", "all-conv", "all-embedding"],
    "decomposed pictures": ["all-linear", "all-conv", "all-embedding"],
    "sliced gpt2": ["q", "v", "c_proj"],
    "sliced neox": ["q", "k", "query_key_value.v", "mlp"],
    "decomposed sliced gpt2": ["q", "v", "c_proj"],
    "decomposed sliced neox": ["q", "k", "query_key_value.v", "mlp"],
    "biased sliced gpt2": ["v", "c_proj"],  # what reaches q is too small: rounding shows in it
    "biased sliced neox": ["q", "query_key_value.v", "mlp"],
    "biased pictures": ["all-linear", "all-conv"],
    "tied ends of llama": ["all-linear", "embed_tokens"],
    "pissa on slices of gpt2": ["q", "v", "c_proj"],
    "biased bert": ["value", "dense"],  # a key's bias is the same for all scores of a query, so its gradient is zero
}
"""What the tests adapt, where it isn't `all-linear`."""
EXTRAS: dict[str, dict[str, Any]] = {
    "biased gpt2": {"bias": "all", "lora_bias": True},
    "biased bert": {"bias": "lora_only"},
    "biased pictures": {"bias": "all", "lora_bias": True},
    "biased sliced gpt2": {"bias": "lora_only", "lora_bias": True},
    "biased sliced neox": {"lora_bias": True},
    "decomposed biased gpt2": {"bias": "all"},
    "rows of tied llama": {"trainable_token_indices": list(range(5, 30, 2))},
    "rows of handwritten": {"trainable_token_indices": {"embed": list(range(30, 4, -1))}},
    "tied ends of llama": {"ensure_weight_tying": True},
    "pissa on slices of gpt2": {"init": "pissa"},
    "olora llama": {"init": "olora"},
}
"""What their adapters train beside A and B."""
MIXTURES = ("mixtral", "gpt-oss")
"""Models whose experts take the tokens of all rows together: a base row's sums may be rounded otherwise beside other rows."""


def make(name: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode with fixed random weights."""
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def ids(rows: int, tokens: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The model's answer, rows first, whatever kind it is."""
    if isinstance(model, T5ForConditionalGeneration | BartForConditionalGeneration):
        return model(input_ids=input_ids, decoder_input_ids=input_ids.flip(1), use_cache=False).logits
    if isinstance(model, Handwritten | TorchEncoder | Pictures):
        return model(input_ids)
    return model(input_ids=input_ids).logits


def fill(bank: AdapterBank, name: str, size: float = 0.3) -> None:
    """Give B random values: a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, p in bank.named_parameters(name):
            if key.endswith(".magnitude"):
                p.mul_(1 + size * torch.randn(p.shape, generator=generator))
            elif key.endswith((".bias", ".rows")):
                p.add_(size * torch.randn(p.shape, generator=generator))
            elif key.endswith(".B") or not p.any():  # an embedding's A starts at zero
                p.copy_(torch.randn(p.shape, generator=generator) * size / p.shape[0] ** 0.5)


def add(bank: AdapterBank, name: str, size: float = 0.3, **config: Any) -> None:
    """An adapter that changes the output."""
    bank.add(name, AdapterConfig(**{"rank": 3, "alpha": 6, "modules_to_save": [], **config}), seed=len(bank.names))
    fill(bank, name, size)


def two(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, AdapterBank]:
    """A model with a bank of two different adapters, `a` and `b`."""
    model = make(name, seed).to(dtype)
    bank = attach(model)
    targets, use_dora = TARGETS.get(name, "all-linear"), name.startswith("decomposed")
    extras = EXTRAS.get(name, {})
    add(bank, "a", targets=targets, use_dora=use_dora, **extras)
    add(bank, "b", targets=targets, rank=5, alpha=2, use_rslora=True, use_dora=use_dora, **extras)
    return model, bank


def gradients(bank: AdapterBank) -> dict[str, Tensor]:
    """Copies of all gradients; zeros where there is none."""
    return {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in bank.named_parameters()}


def clear(bank: AdapterBank) -> None:
    for p in bank.parameters():
        p.grad = None


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {
        key: value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for key, value in model.state_dict().items()
    }
