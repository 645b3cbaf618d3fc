from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from lorabank.errors import AdapterFileError, FingerprintError, MergeError
from lorabank.formats.adapter import Adapter, AdapterLayer
from lorabank.merging import merge as merge_module
from lorabank.merging.check import check_merged
from lorabank.merging.merge import merge
from lorabank.merging.outputs import adapter_beside

MakeAdapter = Callable[..., Adapter]
MakeLlama = Callable[..., LlamaForCausalLM]
IDS = torch.arange(24).reshape(2, 12) % 64


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


def quiet_merge(*args: object, **kwargs: object) -> merge_module.MergeHandle:
    """A merge whose loss to rounding isn't the point of the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="merge: .* lost to rounding")
        return merge(*args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_law5_merged_equals_unmerged_and_unmerge_restores_every_bit(
    base: nn.Module, make_adapter: MakeAdapter, dtype: torch.dtype, strength: float
) -> None:
    adapter = make_adapter(base)
    base.to(dtype)
    before = state(base)
    with torch.no_grad(), adapter_beside(base, adapter, strength=strength):
        expected = base(IDS).logits
    handle = quiet_merge(base, adapter, strength=strength)
    with torch.no_grad():
        merged = base(IDS).logits
    eps = torch.finfo(dtype).eps
    assert (merged - expected).abs().max() <= 64 * eps * expected.abs().max()
    assert not same_bits(before, state(base))
    handle.unmerge()
    assert same_bits(before, state(base))


def test_law5_the_weights_are_base_plus_delta(base: nn.Module, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(base)
    before = state(base)
    merge(base, adapter)
    changed = {name for name, value in state(base).items() if not torch.equal(value, before[name])}
    assert changed == {f"{path}.weight" for path in adapter.layers}
    for path, layer in adapter.layers.items():
        delta = layer.delta() if isinstance(base.get_submodule(path), nn.Linear) else layer.delta().t()
        torch.testing.assert_close(base.get_submodule(path).get_parameter("weight"), before[f"{path}.weight"] + delta)


def test_trap13_the_lost_part_of_a_small_delta_is_reported(make_llama: MakeLlama, make_adapter: MakeAdapter) -> None:
    shares = []
    for size in (1e-5, 1e-3, 0.1):
        model = make_llama().bfloat16()
        adapter = make_adapter(model, size=size)
        before = state(model)
        handle = quiet_merge(model, adapter)
        lost, total = 0.0, 0.0
        for path, layer in adapter.layers.items():
            kept = model.get_submodule(path).get_parameter("weight").detach().double() - before[f"{path}.weight"].double()
            lost += float((kept - layer.delta().double()).square().sum())
            total += float(layer.delta().double().square().sum())
        assert handle.report.lost_share == pytest.approx((lost / total) ** 0.5, rel=1e-3)
        assert set(handle.report.layers) == set(adapter.layers)
        assert f"{100 * handle.report.lost_share:.1f} %" in str(handle.report)
        shares.append(handle.report.lost_share)
    assert shares[0] > 0.5 > shares[1] > shares[2]


def test_trap13_a_merge_that_loses_most_warns_and_float32_does_not(make_llama: MakeLlama, make_adapter: MakeAdapter) -> None:
    model = make_llama()
    adapter = make_adapter(model, size=1e-5)
    assert merge(model, adapter).report.lost_share < 0.01  # a warning would be an error here
    with pytest.warns(UserWarning, match="lost to rounding in bfloat16"):
        merge(make_llama().bfloat16(), adapter)


def test_an_adapter_without_change_loses_nothing(base: nn.Module, make_adapter: MakeAdapter) -> None:
    before = state(base)
    handle = merge(base, make_adapter(base, size=0.0))
    assert handle.report.lost_share == 0
    assert "0 %" in str(handle.report)
    assert same_bits(before, state(base))


def test_two_merges_are_taken_back_last_first(base: nn.Module, make_adapter: MakeAdapter) -> None:
    before = state(base)
    first = merge(base, make_adapter(base, seed=1))
    second = merge(base, make_adapter(base, seed=2), force=True)
    with pytest.raises(MergeError, match="written to since"):
        first.unmerge()
    second.unmerge()
    with pytest.raises(MergeError, match="already taken back"):
        second.unmerge()
    first.unmerge()
    assert same_bits(before, state(base))


def test_a_base_that_was_written_to_is_not_overwritten(base: nn.Module, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(base)
    handle = merge(base, adapter)
    with torch.no_grad():
        base.get_submodule(list(adapter.layers)[-1]).get_parameter("weight")[0, 0] += 1
    before = state(base)
    with pytest.raises(MergeError, match="written to since"):
        handle.unmerge()
    assert same_bits(before, state(base))


def test_unmerge_after_a_change_of_dtype_is_refused(base: nn.Module, make_adapter: MakeAdapter) -> None:
    handle = merge(base, make_adapter(base))
    base.bfloat16()
    with pytest.raises(MergeError, match="convert the model back"):
        handle.unmerge()


def test_another_base_is_refused_unless_forced(make_llama: MakeLlama, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(make_llama(0))
    model = make_llama(1)
    before = state(model)
    with pytest.raises(FingerprintError, match=r"another base \(tiny\): parameter"):
        merge(model, adapter)
    assert same_bits(before, state(model))
    merge(model, adapter, force=True)
    assert not same_bits(before, state(model))


def bad_adapters(adapter: Adapter) -> dict[str, tuple[Adapter, str, type[Exception]]]:
    path, layer = next(iter(adapter.layers.items()))
    last = list(adapter.layers)[-1]

    def with_layers(**layers: AdapterLayer) -> Adapter:
        return replace(adapter, layers={**adapter.layers, **layers})

    nan = AdapterLayer(adapter.layers[last].A * float("nan"), adapter.layers[last].B, 1.0)
    return {
        "misspelt": (with_layers(**{path + "x": layer}), f"did you mean '{path}'", MergeError),
        "unknown": (with_layers(zzz=layer), "not among the model's layers: 'zzz'", MergeError),
        "embedding": (
            with_layers(**{"model.embed_tokens": layer}),
            "made for a linear layer, the model's layer is a Embedding",
            MergeError,
        ),
        "shape": (
            with_layers(**{last: AdapterLayer(torch.ones(2, 5), torch.ones(7, 2), 1.0)}),
            "made for 5 → 7 features",
            MergeError,
        ),
        "nan": (with_layers(**{last: nan}), f"{last}.*NaN or infinity", AdapterFileError),
        "empty": (replace(adapter, layers={}), "no layers", MergeError),
    }


@pytest.mark.parametrize("name", ["misspelt", "unknown", "embedding", "shape", "nan", "empty"])
def test_what_does_not_fit_is_named_before_anything_is_changed(
    make_llama: MakeLlama, make_adapter: MakeAdapter, name: str
) -> None:
    model = make_llama()
    before = state(model)
    adapter, says, error = bad_adapters(make_adapter(model))[name]
    with pytest.raises(error, match=says):
        merge(model, adapter)
    assert same_bits(before, state(model))


def test_a_quantised_or_meta_weight_is_named(make_llama: MakeLlama, make_adapter: MakeAdapter) -> None:
    model = make_llama()
    adapter = make_adapter(model)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(MergeError, match=r"q_proj\.weight is stored as torch\.uint8"):
        merge(model, adapter)
    with torch.device("meta"):
        empty = make_llama()
    with pytest.raises(MergeError, match="meta device"):
        merge(empty, adapter)


def test_tied_weights_are_refused_by_name(make_llama: MakeLlama, make_adapter: MakeAdapter) -> None:
    model = make_llama(tied=True)
    before = state(model)
    with pytest.raises(MergeError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        merge(model, make_adapter(model, ("q_proj", "lm_head")))
    assert same_bits(before, state(model))
    untied = make_llama()
    merge(untied, make_adapter(untied, ("q_proj", "lm_head")))


def test_one_layer_used_in_two_places_is_refused(make_adapter: MakeAdapter) -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(MergeError, match=r"0\.weight is tied to 2\.weight"):
        merge(model, make_adapter(model, ("0",)))


def test_overflow_in_float16_is_named_and_undone(make_llama: MakeLlama, make_adapter: MakeAdapter) -> None:
    model = make_llama().half()
    before = state(model)
    with pytest.raises(MergeError, match=r"too large for torch\.float16"):
        merge(model, make_adapter(model, size=1e6))
    assert same_bits(before, state(model))


def test_a_layer_that_computes_something_else_fails_the_check_and_is_undone(
    make_llama: MakeLlama, make_adapter: MakeAdapter
) -> None:
    model = make_llama()
    adapter = make_adapter(model)
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    layer.register_forward_hook(lambda module, args, output: output.clamp(-0.01, 0.01))
    before = state(model)
    with pytest.raises(MergeError, match=r"check of 'model\.layers\.1\.self_attn\.q_proj' failed"):
        merge(model, adapter)
    assert same_bits(before, state(model))
    merge(model, adapter, check=False)
    assert not same_bits(before, state(model))


def test_an_interrupt_leaves_the_base(make_llama: MakeLlama, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    before = state(model)
    real, calls = merge_module.merge_layer, []

    def interrupted(*args: object) -> object:
        calls.append(args)
        result = real(*args)  # type: ignore[arg-type]
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(merge_module, "merge_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(model, make_adapter(model))
    assert same_bits(before, state(model))


def test_strength_must_be_a_number(base: nn.Module, make_adapter: MakeAdapter) -> None:
    with pytest.raises(MergeError, match="strength"):
        merge(base, make_adapter(base), strength=float("nan"))


def test_a_merge_leaves_the_callers_random_numbers(base: nn.Module, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(base)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    merge(base, adapter)
    assert torch.equal(torch.rand(3), expected)


def test_the_saved_merged_model_loads_in_plain_transformers(
    base: PreTrainedModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(base)
    with torch.no_grad(), adapter_beside(base, adapter):
        expected = base(IDS).logits
    merge(base, adapter)
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_merged_logits_are_checked_and_the_model_is_left_as_it_was(base: nn.Module, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(base)
    before = state(base)
    base.train()
    found = check_merged(base, adapter, {"input_ids": IDS})
    assert base.training
    assert same_bits(before, state(base))
    assert found.difference < 1e-4 < 1e-2 < found.change
    assert found.agreement == 1.0
    assert found.report.lost_share < 1e-3
    assert "100.0%" in str(found)
    assert check_merged(base, adapter, IDS, strength=0.0).change == 0


def test_a_plain_module_with_a_tensor_output(make_adapter: MakeAdapter) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    adapter = make_adapter(model, ("0", "2"), size=1.0)
    found = check_merged(model, adapter, torch.randn(3, 6))
    assert found.difference < 1e-5 < found.change
    copied = copy.deepcopy(model)
    merge(copied, adapter).unmerge()
    assert same_bits(state(copied), state(model))


def test_a_merge_says_what_rounding_lost_and_compares_the_models_own_outputs(
    make_llama: MakeLlama, make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_llama()
    adapter = make_adapter(model)
    inputs = {"input_ids": torch.arange(6)[None]}
    before = {name: p.clone() for name, p in model.named_parameters()}
    handle = merge(model, adapter, inputs=inputs)
    first, second = capsys.readouterr().out.splitlines()
    assert first == str(handle.report) and "lost to rounding" in first
    assert second == str(handle.logits) and "merged and unmerged outputs differ by at most" in second
    assert handle.logits is not None
    assert handle.logits.difference < 1e-3 * handle.logits.change
    handle.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    silent: list[str] = []
    merge(model, adapter, say=silent.append)
    assert len(silent) == 1 and not capsys.readouterr().out


def test_comparing_outputs_leaves_every_modules_mode_and_an_empty_batch_is_refused(make_adapter: MakeAdapter) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    model[1].eval()
    adapter = make_adapter(model, ("0", "2"))
    before = state(model)
    merge(model, adapter, inputs=torch.randn(3, 16), say=None).unmerge()
    assert [module.training for module in model] == [True, False, True]
    with pytest.raises(MergeError, match="hold no row"):
        merge(model, adapter, inputs=torch.randn(0, 16), say=None)
    assert same_bits(state(model), before)
