"""Merging a model folder tensor by tensor: the numbers of `merge`, what can't be mapped by name, and the memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lorabank import attach
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import FingerprintError, MergeError, ModelError, OutputError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.formats.fingerprint import Fingerprint
from lorabank.merging.merge import merge
from lorabank.merging.shards import merge_folder
from tests.bank.tiny import fill
from tests.merging.conftest import gpt2, llama

MakeAdapter = Callable[..., Adapter]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


def merged_in_memory(folder: Path, adapter: Adapter, out: Path, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    merge(model, adapter, say=None, **options)
    model.save_pretrained(out)
    return tensors_in(out)


@pytest.fixture(params=["llama", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model, and its folder in files of at most 20 kB."""
    model: LlamaForCausalLM | GPT2LMHeadModel = llama() if request.param == "llama" else gpt2()
    model.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    return model, tmp_path / "base"


@pytest.mark.filterwarnings("ignore:merge.* of the adapter's change was lost")
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_merge_in_memory_bit_for_bit(
    saved: tuple[nn.Module, Path], make_adapter: MakeAdapter, tmp_path: Path, dtype: torch.dtype
) -> None:
    model, folder = saved
    adapter = make_adapter(model)
    said: list[str] = []
    report = merge_folder(folder, adapter, tmp_path / "out", dtype=dtype, strength=0.7, say=said.append)
    expected = merged_in_memory(folder, adapter, tmp_path / "memory", dtype, strength=0.7)
    assert_equal(tensors_in(tmp_path / "out"), expected)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert loaded.dtype == dtype and not info["missing_keys"] and not info["unexpected_keys"]
    other = merge(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), adapter, strength=0.7, say=None).report
    assert report == other and said == [str(report)]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()}


def test_what_the_adapter_leaves_alone_is_copied_byte_by_byte(
    saved: tuple[nn.Module, Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, folder = saved
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    adapter = make_adapter(model, ("q_proj", "c_attn"), size=0.0)
    busy: list[tuple[str, int, int]] = []
    merge_folder(folder, adapter, tmp_path / "out", say=None, busy=lambda *words: busy.append(words))
    names = {path.name for path in folder.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert_equal(tensors_in(tmp_path / "out"), tensors_in(folder))
    for name in names - {path.name for path in folder.glob("*.safetensors")}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    total = len(tensors_in(folder))
    assert busy[0] == ("merging", 0, total) and busy[-1] == ("merging", total, total)


def test_a_checkpoint_of_the_base_model_lacks_the_prefix(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """GPT-2's own release: `h.0.attn.c_attn.weight` for `transformer.h.0.attn.c_attn.weight`."""
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix("transformer."): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    adapter = make_adapter(model)
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    merge(model, adapter, say=None)
    assert_equal(dict(found.state_dict()), dict(model.state_dict()))
    assert set(tensors_in(tmp_path / "out")) == set(load_file(file))


def test_a_decomposed_adapter_is_merged_the_same(
    saved: tuple[nn.Module, Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, folder = saved
    plain = make_adapter(model)
    layers = {path: replace(layer, magnitude=torch.rand(layer.B.shape[0]) + 0.5) for path, layer in plain.layers.items()}
    adapter = replace(plain, layers=layers, metadata={"base_storage": "nf4"})
    report = merge_folder(folder, adapter, tmp_path / "out", say=None)
    assert_equal(tensors_in(tmp_path / "out"), merged_in_memory(folder, adapter, tmp_path / "memory", torch.float32))
    assert report.trained_in == "nf4" and 0.05 < report.base_error < 0.15
    with pytest.raises(MergeError, match="is merged whole"):
        merge_folder(folder, adapter, tmp_path / "half", strength=0.5)


@pytest.mark.filterwarnings("ignore:merge.* of the adapter's change was lost")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decomposed_slices_and_embeddings_are_merged_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    """The other outputs' norms are those of the numbers that are merged into, and they stay as they are."""
    gpt2().save_pretrained(tmp_path / "base", max_shard_size="20kB")
    bank = attach(gpt2())
    bank.add("a", AdapterConfig(rank=2, targets=["q", "v", "wpe"], use_dora=True))
    fill(bank, "a")
    adapter = replace(bank.adapter("a"), base_norms={})
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", dtype=dtype, say=None)
    found = tensors_in(tmp_path / "out")
    assert_equal(found, merged_in_memory(tmp_path / "base", adapter, tmp_path / "memory", dtype))
    name, size = "transformer.h.0.attn.c_attn.weight", gpt2().config.n_embd
    base = tensors_in(tmp_path / "base")[name].to(dtype)
    assert torch.equal(found[name][:, size : 2 * size], base[:, size : 2 * size])
    assert not torch.equal(found[name][:, :size], base[:, :size])


def test_another_base_is_told_from_single_numbers(
    saved: tuple[nn.Module, Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, folder = saved
    other = type(model)(model.config)  # type: ignore[arg-type]
    adapter = replace(make_adapter(model), fingerprint=Fingerprint.of(other), base_model="other")
    with pytest.raises(FingerprintError, match=r"trained on another base \(other\): parameter '.*' holds .* here, recorded was"):
        merge_folder(folder, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_folder(folder, adapter, tmp_path / "out", force=True, say=None)


def test_experts_that_are_stacked_at_load_can_not_be_mapped(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
        num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    assert any(".experts.0.w1." in name for name in tensors_in(tmp_path / "base"))
    adapter = make_adapter(model, ("q_proj",))
    merge_folder(tmp_path / "base", adapter, tmp_path / "out", say=None)  # attention is stored as it is
    assert_equal(tensors_in(tmp_path / "out"), merged_in_memory(tmp_path / "base", adapter, tmp_path / "m", torch.float32))
    path = "model.layers.0.mlp.experts"
    stacked = replace(adapter, layers={path: AdapterLayer(torch.ones(1, 16), torch.ones(64, 1), 1.0)})
    with pytest.raises(MergeError, match=rf"'{path}'"):
        merge_folder(tmp_path / "base", stacked, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_names_that_conversions_make_are_not_taken_for_stored_ones(tmp_path: Path) -> None:
    from lorabank.merging.checkpoint import names_in_model

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=2))
    experts = "model.layers.0.block_sparse_moe.experts"
    keys = [f"{experts}.0.w1.weight", f"{experts}.0.w2.weight", "model.layers.0.block_sparse_moe.gate.weight", "lm_head.weight"]
    names = names_in_model(model, iter(keys))
    assert names.stored == {"model.layers.0.mlp.gate.weight": keys[2], "lm_head.weight": keys[3]}
    assert set(names.converted) == {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}
    with pytest.raises(ModelError, match=r"holds 'model\.layers\.0\.mlp\.gate\.weight' twice"):
        names_in_model(model, iter([keys[2], "model.layers.0.mlp.gate.weight"]))


def test_what_is_refused_leaves_nothing(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    model = llama()
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base, max_shard_size="20kB")
    adapter = make_adapter(model)
    first = next(iter(adapter.layers))
    layer = adapter.layers[first]
    for changes, error, message in (
        ({"layers": {}}, MergeError, "has no layers"),
        ({"layers": {first + "x": layer}}, MergeError, rf"no layer '{first}x'.*did you mean '{first}'"),
        ({"layers": {first: replace(layer, A=torch.ones(4, 9))}}, MergeError, "made for 9 → 32 features"),
        ({"layers": {first: replace(layer, B=layer.B * float("nan"))}}, ModelError | ValueError, "NaN or infinity"),
    ):
        with pytest.raises(error if isinstance(error, type) else ValueError, match=message):
            merge_folder(base, replace(adapter, **changes), out)
    with pytest.raises(MergeError, match="dtype should be float32"):
        merge_folder(base, adapter, out, dtype=torch.int8)
    with pytest.raises(OutputError, match="exists already"):
        merge_folder(base, adapter, base)
    with pytest.raises(MergeError, match=r"\+ ΔW is too large for torch\.float16"):
        huge = replace(adapter, layers={first: replace(layer, scaling=1e9)})
        merge_folder(base, huge, out, dtype=torch.float16)
    assert list(out.iterdir()) == []
    files = sorted(base.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-5])
    with pytest.raises(ModelError, match="truncated"):
        merge_folder(base, adapter, out)
    files[0].unlink()
    with pytest.raises(ModelError, match="names files that aren't in the folder: model-00001"):
        merge_folder(base, adapter, out)
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        merge_folder(base, adapter, out)


def test_a_weight_of_another_shape_or_storage_is_named(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapter = replace(make_adapter(model, ("q_proj",)), fingerprint=None)
    file, name = tmp_path / "base" / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    held = load_file(file)
    for value, message in (
        (held[name][:16], rf"{name} is \(32, 32\) in the model and \(16, 32\) in model.safetensors"),
        (held[name].to(torch.float8_e4m3fn), rf"{name} is stored as F8_E4M3; expected float32"),
        (None, rf"{name} is not among the checkpoint's tensors"),
    ):
        save_file({key: tensor for key, tensor in {**held, name: value}.items() if tensor is not None}, file, {"format": "pt"})
        with pytest.raises(MergeError, match=message):
            merge_folder(tmp_path / "base", adapter, tmp_path / "out")


def test_an_interrupt_leaves_no_folder_that_is_half_written(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="20kB")

    def stop(activity: str, done: int, total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folder(tmp_path / "base", make_adapter(model), tmp_path / "out", say=None, busy=stop)
    assert list((tmp_path / "out").iterdir()) == []


WIDTH, BLOCKS = 768, 12
MEASURE = """
import resource, sys
import torch
from lorabank.formats.adapter import Adapter
from lorabank.merging.shards import merge_folder
torch.set_num_threads(1)
small, large, adapter, out = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_folder(small, Adapter.load(adapter + "-small"), out + "-small", say=None, force=True)
adapter = Adapter.load(adapter)
before = peak()
report = merge_folder(large, adapter, out, say=None, force=True)
print(len(report.layers), before, peak())
"""


def _wide(folder: Path, blocks: int) -> int:
    """A random Llama in bf16, a file a block; returns its bytes."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 8, "vocab_size": 64}
    config = LlamaConfig(num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    weight_map, total = {}, 0
    for part, names in parts.items():
        tensors = {name: torch.zeros(shapes[name], dtype=torch.bfloat16).uniform_(-0.1, 0.1) for name in names}
        save_file(tensors, folder / f"model-{part}.safetensors", {"format": "pt"})
        weight_map.update(dict.fromkeys(names, f"model-{part}.safetensors"))
        total += sum(value.nbytes for value in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:merge.* of the adapter's change was lost")
def test_memory_is_that_of_one_tensor_not_of_the_model(tmp_path: Path) -> None:
    """In a process of its own: what the peak rises by, after a merge of one block has loaded all the code."""
    _wide(tmp_path / "small", 1)
    size = _wide(tmp_path / "large", BLOCKS)
    for suffix, blocks in (("-small", 1), ("", BLOCKS)):
        layers = {
            f"model.layers.{i}.mlp.{leaf}": AdapterLayer(torch.randn(4, n_in), torch.randn(n_out, 4), 0.1)
            for i in range(blocks)
            for leaf, n_in, n_out in (("up_proj", WIDTH, 2 * WIDTH), ("down_proj", 2 * WIDTH, WIDTH))
        }
        whole = {f"model.layers.{i}.mlp.gate_proj": {"weight": torch.randn(2 * WIDTH, WIDTH)} for i in range(blocks)}
        config = AdapterConfig(rank=4, alpha=0.4, targets=["mlp"], modules_to_save=["gate_proj"])
        Adapter(config=config, layers=layers, modules=whole).save(tmp_path / f"adapter{suffix}")
    words = [str(tmp_path / name) for name in ("small", "large", "adapter", "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, before, peak = map(int, done.stdout.split())
    rise, tensor = (peak - before) * 1024, 2 * WIDTH * WIDTH * 2
    assert count == 2 * BLOCKS
    assert rise < 8 * tensor < size / 5, f"{rise / 2**20:.1f} MiB more for a model of {size / 2**20:.1f} MiB"
    changed = tensors_in(tmp_path / "out")
    before_merge = tensors_in(tmp_path / "large")
    assert sum(not torch.equal(value, before_merge[name]) for name, value in changed.items()) == count + BLOCKS
