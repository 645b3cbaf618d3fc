"""Messages and figures that the pages quote are those that the code gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorabank as lb
from lorabank.bank.bank import AdapterBank
from lorabank.config.parse import config_from_dict
from lorabank.data.prepare import prepare
from lorabank.engine.step import Engine
from lorabank.formats.convert import convert
from lorabank.formats.files import refuse_pickle
from lorabank.formats.vllm import vllm_adapter
from lorabank.models.gguf_write import check_family
from lorabank.models.names import check_not_closed
from lorabank.planner.learning_rate import LORA_FACTOR, SHORT_RUN_FACTOR, SHORT_RUN_STEPS
from lorabank.training.publish import base_on_hub
from lorabank.training.run_folder import RunFolder
from tests.docs.pages import ROOT, cells, code
from tests.training.tiny import tiny_model, tiny_tokenizer


def _two() -> tuple[nn.Module, AdapterBank]:
    model = tiny_model()
    bank = lb.attach(model)
    for name in ("formal", "terse"):
        bank.add(name, lb.AdapterConfig(rank=2, targets=["q"]))
    return model, bank


IDS = torch.ones(8, 3, dtype=torch.int64)


def _no_route(folder: Path) -> None:
    _two()[0](input_ids=IDS)


def _rows_multiplied(folder: Path) -> None:
    model, bank = _two()
    with bank.route(["formal", "terse"]):
        model(input_ids=IDS)


def _misspelt_target(folder: Path) -> None:
    lb.attach(tiny_model()).add("formal", lb.AdapterConfig(targets=["q_porj"]))


def _left_out(folder: Path) -> None:
    lb.attach(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))).add("formal", lb.AdapterConfig(rank=1))


def _token_beyond(folder: Path) -> None:
    lb.attach(tiny_model()).add("formal", lb.AdapterConfig(rank=2, trainable_token_indices=[258]))


def _other_base(folder: Path) -> None:
    bank = lb.attach(tiny_model(seed=1))
    bank.load("formal", _two()[1].adapter("formal"))


def _existing_folder(folder: Path) -> None:
    (folder / "kept.txt").write_text("mine")
    RunFolder(folder).refuse_existing()


def _unknown_columns(folder: Path) -> None:
    prepare(lb.DataConfig(), tiny_tokenizer(), seed=0, train=[{"question": "1?", "answer": "yes"}])


def _nan(folder: Path) -> None:
    prepare(lb.DataConfig(), tiny_tokenizer(), seed=0, train=[{"text": "one"}, {"text": float("nan")}])


def _kohya(folder: Path, name: str, up: float = 1.0) -> Path:
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.full((4, 2), up)}
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


def _unknown_name(folder: Path) -> object:
    return lb.Adapter.load(_kohya(folder, "lora_unet_joint_blocks_0_x"))


def _overflowed(folder: Path) -> object:
    return lb.Adapter.load(_kohya(folder, "lora_unet_mid_block_attentions_0_proj_in", torch.inf))


def _unheld(folder: Path) -> object:
    layer = lb.AdapterLayer(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    layers = {"unet.mid_block.attentions.0.proj_in": layer, "unet.own.to_q": layer}
    lb.Adapter(config=lb.AdapterConfig(rank=2, alpha=2), layers=layers).save(folder / "a")
    return convert(folder / "a", folder / "b.safetensors", "kohya")


def _pickle(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "adapter_model.bin")
    refuse_pickle(folder / "adapter_model.bin")


def _packing(folder: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    Engine(lb.attach(BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=1)))).packing(8)


def _vllm_refuses(folder: Path) -> None:
    layer = lb.AdapterLayer(torch.zeros(600, 8), torch.zeros(8, 600), 1.0)
    vllm_adapter(lb.Adapter(config=lb.AdapterConfig(rank=600), layers={"q_proj": layer}))


def _lacking(folder: Path) -> None:
    _, bank = _two()
    adapter = bank.adapter("formal")
    bank.detach().save_pretrained(folder / "base")  # pyright: ignore[reportCallIssue]
    weights = load_file(folder / "base" / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    lb.merge_folder(folder / "base", adapter, folder / "merged")


def _no_sum(folder: Path) -> None:
    bank = lb.attach(tiny_model())
    bank.add("formal", lb.AdapterConfig(rank=2, targets=["q"], modules_to_save=["lm_head"]))
    lb.combine([(bank.adapter("formal"), 0.7), (bank.adapter("formal"), 0.7)])


def _merged_gguf(folder: Path) -> None:
    check_family("gemma", where=str(folder))


def _plain_adapter() -> lb.Adapter:
    return lb.Adapter(config=lb.AdapterConfig(rank=1), layers={"q": lb.AdapterLayer(torch.zeros(1, 8), torch.zeros(8, 1), 1.0)})


PROVOKE: list[Callable[[Path], object]] = [
    lambda folder: config_from_dict({"defaults": {"rnak": 8}}),
    _misspelt_target,
    _left_out,
    lambda folder: lb.attach(tiny_model()).add("formal", lb.AdapterConfig(modules_to_save=["lm_haed"])),
    _no_route,
    _rows_multiplied,
    _token_beyond,
    _other_base,
    _existing_folder,
    lambda folder: config_from_dict({"task": "text-classification", "speech": {"beams": 3}}),
    _nan,
    _unknown_columns,
    _unknown_name,
    _overflowed,
    _unheld,
    _pickle,
    lambda folder: check_not_closed("GPT-3"),
    _vllm_refuses,
    _lacking,
    _no_sum,
    _merged_gguf,
    lambda folder: base_on_hub(str(folder), "out/formal"),
    _packing,
]
"""What provokes each message of the page's table, in its order."""

_ROWS = [row for row in cells(ROOT / "docs" / "errors.md") if len(row) == 2]
MESSAGES = [code(row[0])[0] for row in _ROWS[_ROWS.index(["message", "the way out"]) + 2 :]]


@pytest.mark.parametrize(("message", "provoke"), list(zip(MESSAGES, PROVOKE, strict=True)))
def test_messages_are_those_of_the_code(message: str, provoke: Callable[[Path], object], tmp_path: Path) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    with pytest.raises(lb.LorabankError) as caught:
        provoke(tmp_path)
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.filterwarnings("ignore:merge.*lost to rounding")
@pytest.mark.parametrize(("change", "lost"), [(0.0007, 0.90), (0.007, 0.25), (0.05, 0.04)])
def test_what_a_merge_into_bf16_loses(change: float, lost: float) -> None:
    torch.manual_seed(0)
    shares = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Sequential(nn.Linear(512, 512, bias=False)).to(dtype)
        bank = lb.attach(model)
        bank.add("x", lb.AdapterConfig(rank=8))
        adapter = bank.adapter("x")
        bank.detach()
        A, B = adapter.layers["0"].A, torch.randn(512, 8)
        B *= change * model[0].weight.float().norm() / (B @ A).norm()
        shares[dtype] = lb.merge(model, replace(adapter, layers={"0": lb.AdapterLayer(A, B, 1.0)})).report.lost_share
    assert shares[torch.bfloat16] == pytest.approx(lost, rel=0.15)
    assert shares[torch.float32] < 0.001
    assert f"| {change:g} | about {100 * lost:.0f} % | under 0.1 % |" in (ROOT / "docs" / "merging.md").read_text(
        encoding="utf-8"
    )


def test_how_the_automatic_learning_rate_is_described() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"{LORA_FACTOR:g} × a published fit" in text
    assert f"({SHORT_RUN_FACTOR:g} × up to {SHORT_RUN_STEPS} steps)" in text
