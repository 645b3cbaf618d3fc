"""Real small things for the commands: a saved model with a tokenizer, an adapter that fits it, and a stand-in for the engine."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorabank
from lorabank.config.adapter import AdapterConfig
from lorabank.data.formats import Example
from lorabank.data.prompt import turns_of
from lorabank.formats.adapter import Adapter, AdapterLayer


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def adapter_folder(base_folder: Path, tmp_path: Path) -> Path:
    """Rank 4 on q and v of two blocks; v's B is still zero."""
    torch.manual_seed(1)
    layers = {
        f"model.layers.{index}.self_attn.{name}": AdapterLayer(
            torch.randn(4, 16) * 0.1, torch.randn(16, 4) * (0.1 if name == "q_proj" else 0.0), 8.0
        )
        for index in range(2)
        for name in ("q_proj", "v_proj")
    }
    config = AdapterConfig(rank=4, targets=["q_proj", "v_proj"])
    return Adapter(config=config, layers=layers, base_model=str(base_folder), task_type="CAUSAL_LM").save(tmp_path / "adapter")


class FakeApi(types.ModuleType):
    """Stands for `lorabank.api`: answers `NAME says LAST PROMPT` word by word, and remembers its calls."""

    def __init__(self) -> None:
        super().__init__("lorabank.api")
        self.calls: list[tuple[str, Any]] = []
        self.names = ["formal", "terse"]
        self.kept: list[int] = []
        """Calls made before the process was told to keep freed memory. The test's own process is left alone."""
        self.fails: Exception | None = None
        """What training, preview and evaluation raise."""

    def keep_freed_memory(self) -> bool:
        self.kept.append(len(self.calls))
        return True

    def load_run(self, folder: str, adapters: list[str] | None, *, device: str, dtype: str, task: str | None) -> Any:
        assert task is None
        self.calls.append(("load_run", (folder, adapters, device, dtype)))
        return types.SimpleNamespace(bank=None, model=None, tokenizer=None, names=self.names, notes=("a note",))

    def generate_stream(
        self, run: Any, rows: Sequence[Any], max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> Iterator[list[str | None]]:
        rows = [(name, turns_of(prompt) if isinstance(prompt, Example) else prompt) for name, prompt in rows]
        self.calls.append(("generate_stream", (list(rows), max_new_tokens, temperature, top_p, seed)))
        answers = [f"{name} says {messages[-1]['content']}".split(" ") for name, messages in rows]
        for index in range(max(map(len, answers))):
            yield [f"{' ' if index else ''}{words[index]}" if index < len(words) else None for words in answers]

    def evaluate(self, model: str, data: Any, adapters: list[str] | None, **options: Any) -> dict[str, dict[str, float]]:
        self.calls.append(("evaluate", (model, adapters, data, options)))
        if self.fails:
            raise self.fails
        options["say"]("2 rows read")
        return {"base": {"loss": 3.2, "bleu": 4.0}, "formal": {"loss": 1.1, "bleu": 30.0}}

    def preview(self, config: Any, *, count: int, pictures: str) -> None:
        self.calls.append(("preview", (config, count, pictures)))
        if self.fails:
            raise self.fails

    def train(self, config: Any, *, resume: bool | str, dry_run: bool, listeners: Sequence[Any]) -> Any:
        from lorabank.training.events import RunResult

        self.calls.append(("train", (config, resume, dry_run, listeners)))
        if self.fails:
            raise self.fails
        return RunResult(output=config.output, seconds=1.0, adapters={}, interrupted=config.seed == 130)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "lorabank.api", fake)
    monkeypatch.setattr(lorabank, "api", fake, raising=False)
    monkeypatch.setattr("lorabank.training.allocation.keep_freed_memory", fake.keep_freed_memory)
    return fake
