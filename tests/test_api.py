"""`lorabank.train` from objects and from files, and what is loaded from the folder that it leaves."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lorabank as lb
from lorabank import api
from lorabank.config.parse import load_config
from lorabank.engine import compiling
from lorabank.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    DataError,
    FingerprintError,
    LorabankError,
    ModelError,
    OutputError,
)
from lorabank.kernels.gpu import runtime
from lorabank.notices import warn_once
from lorabank.training.given import public_name
from tests.training.test_joint import Recorder
from tests.training.tiny import files_of, tiny_model, tiny_rows, tiny_tokenizer, write_rows

SHORT: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "learning_rate": 5e-3, "eval": {"every": 2, "samples": 0}, "threads": 1}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two adapters, from files."""
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.jsonl", tiny_rows())
    settings = {
        **SHORT,
        "model": str(base),
        "output": str(folder / "out"),
        "data": {"train": str(rows), "val_split": 5, "system": "Be brief."},
        "adapters": {"terse": {"rank": 8}, "formal": {"rank": 4, "alpha": 8}},
        "eval": {"metrics": ["loss", "rouge"], "samples": 2, "max_new_tokens": 5},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    result = lb.train(folder / "run.yaml")
    assert {item.status for item in result.adapters.values()} == {"finished"}
    return folder / "out"


# ---- objects --------------------------------------------------------------------------------------------------------


def test_a_model_object_is_afterwards_as_it_was(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    model.train()
    result = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), adapters={"a": {"rank": 4}}, **SHORT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.training
    bank = lb.attach(model)
    bank.load("a", result.trained["a"])
    ids = torch.arange(8).expand(2, 8)
    with torch.no_grad(), bank.route(["a", lb.BASE]):
        logits = model(input_ids=ids).logits
    assert not torch.equal(logits[0], logits[1])
    bank.detach()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look at its inputs
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_model_that_was_compiled_for_the_run_is_plain_afterwards(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    logger, warnings = logging.getLogger("torch._dynamo"), list[int]()
    told = Recorder()
    told.on_step = lambda record: warnings.append(logger.getEffectiveLevel())  # type: ignore[method-assign]
    before = logger.level, logger.getEffectiveLevel()
    result = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), compile=True, listeners=[told], **SHORT)
    assert [notice.text for notice in told.notices].count(api.ON_CPU) == 1
    assert set(warnings) == {logging.ERROR} and (logger.level, logger.getEffectiveLevel()) == before
    plain = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), **SHORT)
    assert all(block._compiled_call_impl is None for block in model.model.layers)
    for path, layer in result.trained["default"].layers.items():
        torch.testing.assert_close(layer.B, plain.trained["default"].layers[path].B, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("said", [None, False])
def test_blocks_are_compiled_on_a_gpu_unless_that_is_switched_off(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, said: bool | None
) -> None:
    def compile_blocks(model: nn.Module, *, recompute: bool) -> list[nn.Module]:
        asked.append(recompute)
        return list(model.model.layers[:1])  # type: ignore[union-attr,index]

    asked: list[bool] = []
    monkeypatch.setattr(compiling, "compile_blocks", compile_blocks)
    monkeypatch.setattr(compiling, "_place", lambda model: (torch.device("cuda"), torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv(runtime.SWITCH, raising=False)
    told = Recorder()
    lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), compile=said, listeners=[told], **SHORT)
    assert asked == ([False] if said is None else [])
    assert [n.text for n in told.notices if "compile: false leaves that out" in n.text] == (
        [api.COMPILING.format("half a minute")] if said is None else []
    )


def test_where_blocks_are_compiled_by_themselves(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(runtime.SWITCH, raising=False)
    assert compiling.uncompiled_because(model.cpu()) == ""
    monkeypatch.setattr(compiling, "_place", lambda model: (torch.device("cuda"), torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert compiling.uncompiled_because(model) == (
        "Tesla T4 has compute capability 7.5; compiling unasked needs 8.0 or newer, so compile: true tries it"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert compiling.uncompiled_because(model) is None
    assert compiling.uncompiled_because(nn.Linear(2, 2)) == "Linear has no row of blocks of one class"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in str(compiling.uncompiled_because(model))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv(runtime.SWITCH, "0")
    assert compiling.uncompiled_because(model) == ""


def test_a_gpu_on_which_nothing_is_compiled_unasked_is_told(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "uncompiled_because", lambda model: "Tesla T4 is too old")
    told, quiet = Recorder(), Recorder()
    lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), listeners=[told], **SHORT)
    lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), compile=False, listeners=[quiet], **SHORT)
    said = [n.text for n in told.notices if "aren't compiled" in n.text]
    assert said == ["the model's blocks aren't compiled, so steps are slower: Tesla T4 is too old. compile: false silences this"]
    assert not [n for n in quiet.notices if "compiled" in n.text]


def test_a_gpu_that_can_not_compile_trains_uncompiled_and_says_so(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_place", lambda model: (torch.device("cuda"), torch.float32))
    monkeypatch.setattr(runtime, "missing", lambda device: "Triton is not installed (pip install triton)")
    monkeypatch.delenv(runtime.SWITCH, raising=False)
    warn_once.cache_clear()
    told, data = Recorder(), tiny_rows()
    result = lb.train(
        model=model, tokenizer=tokenizer, data=data, compile=True, gradient_checkpointing=True, listeners=[told], **SHORT
    )
    (notice,) = [notice for notice in told.notices if notice.text.startswith("compile: ")]
    assert notice.level == "warning"
    assert "LlamaForCausalLM stay uncompiled, and steps slower: Triton is not installed (pip install triton)" in notice.text
    plain = lb.train(model=model, tokenizer=tokenizer, data=data, compile=False, gradient_checkpointing=True, **SHORT)
    assert torch.equal(
        result.trained["default"].layers["model.layers.0.mlp.up_proj"].B,
        plain.trained["default"].layers["model.layers.0.mlp.up_proj"].B,
    )


@pytest.mark.parametrize(("dtype", "noted"), [(torch.float16, False), (torch.float64, True)])
def test_a_model_in_an_unusual_dtype_trains_and_is_noted_where_it_is_slow(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, noted: bool
) -> None:
    told = Recorder()
    result = lb.train(model=model.to(dtype), tokenizer=tokenizer, data=tiny_rows(), listeners=[told], **SHORT)
    assert any(notice.text.startswith("the base is in fp64") for notice in told.notices) == noted
    assert all(layer.B.isfinite().all() and layer.B.any() for layer in result.trained["default"].layers.values())


def test_nothing_is_written_without_an_output(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), adapters={"a": {}, "b": {}}, **SHORT)
    assert list(tmp_path.iterdir()) == []
    assert result.output == ""
    assert result.trained.keys() == {"a", "b"}
    assert all(isinstance(adapter, lb.Adapter) for adapter in result.trained.values())
    assert "tensor" not in repr(result), "the weights stay out of the print"
    result.trained["a"].save(tmp_path / "a")
    assert lb.Adapter.load(tmp_path / "a").config.rank == 16


def test_an_error_leaves_the_model_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(LorabankError, match="q_prj"):
        lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), adapters={"a": {}, "b": {"targets": ["q_prj"]}}, **SHORT)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("LoRA" in type(module).__name__ for module in model.modules())


def test_values_for_adapters(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    from peft import LoraConfig

    adapters: dict[str, Any] = {
        "run": lb.AdapterRun(rank=2, max_steps=2),
        "config": lb.AdapterConfig(rank=3, targets=["q", "v"]),
        "peft": LoraConfig(r=5, lora_alpha=10, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "dict": {"r": 6, "lora_alpha": 12},
    }
    result = lb.train(model=model, tokenizer=tokenizer, data=tiny_rows(), adapters=adapters, **SHORT)
    assert {name: adapter.config.rank for name, adapter in result.trained.items()} == {
        "run": 2,
        "config": 3,
        "peft": 5,
        "dict": 6,
    }
    assert {name: item.steps for name, item in result.adapters.items()} == {"run": 2, "config": 3, "peft": 3, "dict": 3}
    assert result.trained["peft"].config.alpha == 10
    assert {path.rsplit(".", 1)[-1] for path in result.trained["config"].layers} == {"q_proj", "v_proj"}


def test_rows_as_objects(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    train, val = datasets.Dataset.from_list(tiny_rows(20)), datasets.Dataset.from_list(tiny_rows(7, "other"))
    both = datasets.DatasetDict({"train": train, "validation": val})

    def counts(data: Any, adapters: dict[str, Any], **more: Any) -> dict[str, dict[str, int]]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        lb.train(model=model, tokenizer=tokenizer, data=data, adapters=adapters, output=str(out), **{**SHORT, **more})
        return {name: part["splits"] for name, part in json.loads((out / "data_report.json").read_text()).items()}

    assert counts(train, {"a": {}}, val_split=4) == {"data": {"train": 16, "val": 4, "test": 0}}
    assert counts(both, {"a": {}}) == {"data": {"train": 20, "val": 7, "test": 0}}
    own = {"a": tiny_rows(10), "b": train}
    assert counts(own, {"a": {}, "b": {}}, val_split=2) == {
        "a": {"train": 8, "val": 2, "test": 0},
        "b": {"train": 18, "val": 2, "test": 0},
    }


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"tokenizer": None}, ConfigError, "tokenizer: missing. text-generation .* needs a tokenizer of transformers"),
        ({"data": None}, ConfigError, "data: missing"),
        ({"data": {"frmal": [], "formal": []}}, AdapterNameError, "did you mean 'formal'"),
        ({"data": {"rows": [1]}}, DataError, "splits with 'train'"),
        ({"data": [{"prompt": float("nan"), "completion": "x"}] * 3}, DataError, "NaN, a missing value, in 3 of 3 rows"),
        ({"data": [{"prompt": float("nan"), "completion": "x"}] * 3, "nan_rows": "drop"}, DataError, "none of the 3 rows"),
        ({"nan_rows": "skip"}, ConfigError, "data.nan_rows: expected one of stop, drop, got 'skip'"),
        ({"data": "./rows.jsnl"}, DataError, "no file or folder"),
        ({"adapters": {}}, ConfigError, "dict of name to settings"),
        ({"adapters": {"a/b": {}}}, AdapterNameError, "a/b"),
        ({"adapters": {"Base": {}}}, AdapterNameError, "taken by lorabank"),
        ({"adapters": {"metrics.jsonl": {}}}, AdapterNameError, "has a file of that name"),
        ({"adapters": {"a": {"rnak": 3}}}, ConfigError, "did you mean 'rank'"),
        ({"base_dtype": "bf16"}, ConfigError, "the model given is torch.float32"),
        ({"learning_rat": 1}, ConfigError, "did you mean 'learning_rate'"),
        ({"resume": True}, ConfigError, "needs the run's folder"),
        ({"report_to": ["mlflow"]}, ConfigError, "mlflow needs output, the run's folder"),
    ],
)
def test_bad_arguments(
    arguments: dict[str, Any],
    kind: type[Exception],
    message: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    good: dict[str, Any] = {**SHORT, "model": model, "tokenizer": tokenizer, "data": tiny_rows(), "adapters": {"formal": {}}}
    with pytest.raises(kind, match=message):
        lb.train(**{**good, **arguments})
    assert all(p.requires_grad for p in model.parameters())


def test_bad_names_in_a_configuration(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows(8))
    out = str(tmp_path / "out")
    with pytest.raises(ModelError, match="keeps it closed"):
        lb.train(model="GPT-3", data=str(rows), output=out)
    with pytest.raises(DataError, match=r"did you mean 'rows.jsonl'"):
        lb.train(model=str(base), data=str(tmp_path / "row.jsonl"), output=out)
    with pytest.raises(ConfigError, match="not both"):
        lb.train(lb.TrainConfig(model=str(base)), output=out)
    assert not Path(out).exists()


def test_dry_run(base: Path, run_folder: Path, tmp_path: Path) -> None:
    result = lb.train(model=str(base), data=tiny_rows(), output=str(tmp_path / "out"), dry_run=True, **SHORT)
    assert result.adapters["default"].status == "not trained (dry run)"
    assert list(tmp_path.iterdir()) == []


# ---- the run folder -------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(run_folder: Path, base: Path) -> None:
    names = {path.name for path in run_folder.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "data_report.json",
        "formal",
        "hardest_rows.json",
        "loss.png",
        "metrics.jsonl",
        "samples.md",
        "terse",
    }
    adapter = {path.name for path in (run_folder / "formal").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja", "last"} <= adapter
    assert json.loads((run_folder / "formal" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    card = (run_folder / "formal" / "README.md").read_text()
    assert f"vllm serve {base} " in card
    assert "| rank | 4 |" in card
    assert "| rouge1 |" in card
    hardest = json.loads((run_folder / "hardest_rows.json").read_text())
    losses = [row["loss"] for row in hardest["formal"]]
    assert losses == sorted(losses, reverse=True)
    assert ".jsonl:" in hardest["formal"][0]["origin"]
    samples = (run_folder / "samples.md").read_text()
    assert samples.count("**Prompt**") == 2
    assert samples.count("| formal |") == samples.count("| base |") == 2


def test_its_configuration_runs_again_to_the_same_bytes(run_folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    config, notes = load_config(run_folder / "config.yaml")
    assert notes == []
    assert config == load_config(run_folder.parent / "run.yaml")[0]
    lb.train(replace(config, output=str(tmp_path / "again")))
    for name in ("formal", "terse"):
        assert files_of(tmp_path / "again" / name) == files_of(run_folder / name)


def test_an_existing_folder_is_refused_and_left_alone(run_folder: Path, base: Path, tmp_path: Path) -> None:
    before = files_of(run_folder)
    with pytest.raises(OutputError, match=f"lorabank train {run_folder} --resume"):
        lb.train(run_folder / "config.yaml")
    assert files_of(run_folder) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="isn't a run of lorabank"):
        lb.train(model=str(base), data=tiny_rows(), output=str(tmp_path), **SHORT)


def test_what_resume_refuses(run_folder: Path, base: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    config, _ = load_config(run_folder / "config.yaml")
    before = files_of(run_folder)
    adapters = {**config.adapters, "formal": replace(config.adapters["formal"], learning_rate=1e-3, rank=5)}
    with pytest.raises(CheckpointError, match=r"adapters\.formal\.rank: was 4, is 5; adapters\.formal\.learning_rate: was 0.005"):
        lb.train(replace(config, adapters=adapters), resume=True)
    other = write_rows(tmp_path / "rows.jsonl", tiny_rows(40, "else"))
    with pytest.raises(CheckpointError, match="training rows of terse have changed"):
        lb.train(replace(config, data=replace(config.data, train=str(other))), resume=True)
    with pytest.raises(CheckpointError, match="adapters: were formal, terse, are formal"):
        lb.train(replace(config, adapters={"formal": config.adapters["formal"]}), resume=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step-9'.*step-3"):
        lb.train(config, resume="step-9")
    tiny_model(seed=5).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="the base model's weights have changed"):
        lb.train(replace(config, model=str(tmp_path / "model")), resume=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        lb.train(replace(config, output=str(tmp_path / "absent")), resume=True)
    assert files_of(run_folder) == before


def test_a_damaged_checkpoint_is_named(base: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "save": {"every": 1, "keep": 3}}
    config = {"model": str(base), "data": tiny_rows(), "output": str(tmp_path / "out")}
    lb.train(**config, **settings)
    checkpoints = tmp_path / "out" / "checkpoints"
    weights = (tmp_path / "out" / "default" / "adapter_model.safetensors").read_bytes()
    state = checkpoints / "step-3" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"step-3: the checkpoint can't be read.*--resume NAME: step-1, step-2"):
        lb.train(**config, **settings, resume=True)
    result = lb.train(**config, **settings, resume="step-2")
    assert result.adapters["default"].status == "finished"
    assert (tmp_path / "out" / "default" / "adapter_model.safetensors").read_bytes() == weights


def test_init_from(run_folder: Path, base: Path, tmp_path: Path) -> None:
    told = Recorder()
    start = lb.Adapter.load(run_folder / "formal")
    settings = {**SHORT, "max_steps": 1, "learning_rate": 1e-9, "rank": 32}
    result = lb.train(
        model=str(base),
        data=tiny_rows(),
        init_from=str(run_folder / "formal"),
        listeners=[told],
        output=str(tmp_path / "o"),
        **settings,
    )
    found = result.trained["default"]
    assert found.config.rank == 4
    assert all(torch.allclose(found.layers[path].B, layer.B, atol=1e-6) for path, layer in start.layers.items())
    assert any("rank 4, alpha 8" in notice.text and "rank of this run give way" in notice.text for notice in told.notices)
    assert "| rank | 4 |" in (tmp_path / "o" / "default" / "README.md").read_text()
    with pytest.raises(FingerprintError, match=r"init_from: .* was trained on another base model"):
        lb.train(
            model=tiny_model(seed=9), tokenizer=tiny_tokenizer(), data=tiny_rows(), init_from=str(run_folder / "formal"), **SHORT
        )


# ---- talking to it --------------------------------------------------------------------------------------------------


def test_load_run(run_folder: Path, base: Path) -> None:
    run = api.load_run(run_folder, device="cpu")
    assert run.names == ["terse", "formal"], "in the run's order"
    assert api.load_run(run_folder, ["formal", "base"]).names == ["formal"]
    assert api.load_run(run_folder, ["base"]).names == []
    assert api.load_run(str(base)).names == []
    assert api.load_run(run_folder / "formal").names == ["formal"]
    assert api.load_run(run_folder / "formal" / "last").names == ["formal"]
    with pytest.raises(AdapterNameError, match=r"no adapter 'frmal' .did you mean 'formal'"):
        api.load_run(run_folder, ["frmal"])


def test_load_run_with_a_template_of_its_own(base: Path, tmp_path: Path) -> None:
    """The tokenizer that it was trained with is used, not the base's; a folder called base is no base."""
    tokenizer = tiny_tokenizer("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}")
    lb.train(
        model=LlamaForCausalLM.from_pretrained(base), tokenizer=tokenizer, data=tiny_rows(), output=str(tmp_path / "o"), **SHORT
    )
    run = api.load_run(tmp_path / "o")
    assert run.tokenizer.chat_template == tokenizer.chat_template
    (tmp_path / "o" / "default").rename(tmp_path / "base")
    assert api.load_run(tmp_path / "base").names == ["adapter"]
    with pytest.raises(CheckpointError, match="it didn't end"):
        api.load_run(tmp_path / "o")


def test_evaluate(run_folder: Path, tmp_path: Path) -> None:
    config, _ = load_config(run_folder / "config.yaml")
    end = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    scores = api.evaluate(run_folder, config.data, metrics=["loss", "perplexity", "rouge"], max_new_tokens=5)
    assert scores.keys() == {"terse", "formal", "base"}
    for name in ("terse", "formal"):
        assert scores[name]["loss"] == pytest.approx(end["adapters"][name]["best_metrics"]["loss"], rel=1e-5)
        assert scores[name]["rougeL"] == pytest.approx(end["adapters"][name]["best_metrics"]["rougeL"])
    rows = write_rows(tmp_path / "test.jsonl", tiny_rows(6, "new"))
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**tiny_rows(1)[0], "prompt": ""}) + "\n")
    said: list[str] = []
    other = api.evaluate(run_folder, lb.DataConfig(test=str(rows)), ["formal"], max_rows=3, say=said.append)
    assert other.keys() == {"formal"}
    assert said[0].startswith("7 rows read (") and said[0].endswith("6 kept: 6 test")
    assert said[1].startswith("dropped 1: ") and f"{rows}:7" in said[1]
    with pytest.raises(ConfigError, match="did you mean 'rouge'"):
        api.evaluate(run_folder, config.data, metrics=["rogue"])


def test_evaluate_scores_the_base_on_each_adapters_rows(base: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", tiny_rows(16, name * 3))
    adapters = {name: {"data": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")}
    result = lb.train(model=str(base), adapters=adapters, output=str(tmp_path / "o"), **SHORT)
    config, _ = load_config(tmp_path / "o" / "config.yaml")
    scores = api.evaluate(tmp_path / "o", config.data)
    assert scores.keys() == {"a", "b", "base (a's rows)", "base (b's rows)"}
    for name in ("a", "b"):
        assert scores[f"base ({name}'s rows)"]["loss"] == pytest.approx(result.base_metrics_of[name]["loss"], rel=1e-5)
    one = api.evaluate(tmp_path / "o", config.data, ["b", "base"])
    assert one["base"]["loss"] == pytest.approx(result.base_metrics_of["b"]["loss"], rel=1e-5)


def test_an_answer_as_it_comes(run_folder: Path) -> None:
    from lorabank.engine.generate import sample
    from lorabank.engine.sampling import SamplingConfig

    run = api.load_run(run_folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "name 3"}]
    jobs = [("formal", messages), ("base", messages), ("terse", messages[1:])]
    steps = list(api.generate_stream(run, jobs, max_new_tokens=12))
    whole = ["".join(step[i] or "" for step in steps) for i in range(3)]
    assert not any("\ufffd" in (text or "") for step in steps for text in step if text and text.endswith("\ufffd"))
    from lorabank.data.prompt import chat_prompt_ids

    prompts = [chat_prompt_ids(run.tokenizer, m) for _, m in jobs]
    found = sample(run.bank, prompts, ["formal", lb.BASE, "terse"], config=SamplingConfig(max_new_tokens=12), end_ids=[1])
    assert whole == [run.tokenizer.decode(f.tokens, skip_special_tokens=True).rstrip("\ufffd") for f in found]
    held = json.loads((run_folder / "hardest_rows.json").read_text())["formal"][0]
    prompt = held["prompt"].split("user\n")[1].split("<|im_end|>")[0]
    asked = run.tokenizer.decode(chat_prompt_ids(run.tokenizer, [messages[0], {"role": "user", "content": prompt}]))
    assert asked == held["prompt"], "training put the run's system turn before it, and so must whoever asks"


def test_half_a_character_is_never_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    from lorabank.training.streaming import TextStream

    stream = TextStream(tokenizer)
    ids = tokenizer("aé€😀b", add_special_tokens=False)["input_ids"]
    parts = [stream.add(token) for token in ids]
    assert [part for part in parts if part] == ["a", "é", "€", "😀", "b"]
    assert len(parts) == 11
    cut = TextStream(tokenizer)
    assert "".join([*(cut.add(token) for token in ids[:-3]), cut.end()]) == "aé€", "what the length limit cut is left out"


def test_the_base_is_named_so_that_other_tools_can_load_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id stays; a folder is named in full; our alias and a GGUF file mean nothing to others."""
    converted = tmp_path / "converted"
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    monkeypatch.chdir(base.parent)
    assert public_name("Qwen/Qwen3-0.6B", converted) == "Qwen/Qwen3-0.6B"
    assert public_name("gpt2", converted) == "gpt2"
    assert public_name("tiny", Path("tiny")) == str(base)
    assert public_name("SmolLM2-135M-Instruct", converted) == str(converted)
    assert public_name(str(gguf), converted) == str(converted)
