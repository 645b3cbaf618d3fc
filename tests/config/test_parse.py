"""A run's file to a TrainConfig and back, and what a wrong file is told."""

from __future__ import annotations

import math
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from lorabank.config.coerce import field_types
from lorabank.config.parse import config_from_dict, dump_yaml, load_config, to_dict
from lorabank.config.train import AdapterRun, DataConfig, EvalConfig, SaveConfig, TrainConfig
from lorabank.errors import AdapterNameError, ConfigError

DESIGN = """\
model: Qwen/Qwen3-0.6B
base_dtype: bf16
output: out/support
data: {train: chat.jsonl, val_split: 0.05, max_length: 2048, train_on: assistant}
defaults:
  rank: 16
  alpha: 32
  targets: all-linear
  learning_rate: auto
  lr_scheduler: linear
  warmup_ratio: 0.03
  batch_size: 8
  gradient_accumulation: 1
  epochs: 2
adapters:
  formal: {data: formal.jsonl}
  terse:  {data: terse.jsonl, rank: 64, loraplus_ratio: 16, learning_rate: 1e-4}
eval: {every: 100, metrics: [loss, rouge], samples: 4, early_stopping: 3}
save: {every: 200, keep: 2}
report_to: [tensorboard]
seed: 42
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_file_of_the_design(tmp_path: Path) -> None:
    config, notes = load_config(write(tmp_path, DESIGN))
    assert notes == []
    assert config.model == "Qwen/Qwen3-0.6B"
    assert config.data == DataConfig(train="chat.jsonl", val_split=0.05, max_length=2048, train_on="assistant")
    assert list(config.adapters) == ["formal", "terse"]
    formal, terse = config.adapters["formal"], config.adapters["terse"]
    assert (formal.rank, formal.data, formal.learning_rate) == (16, "formal.jsonl", "auto")
    assert (terse.rank, terse.loraplus_ratio, terse.learning_rate) == (64, 16.0, 1e-4)
    assert config.eval.metrics == ("loss", "rouge")
    assert formal.early_stopping == terse.early_stopping == 3


def test_a_written_configuration_reloads_to_an_equal_value(tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, DESIGN))
    again, notes = load_config(write(tmp_path, dump_yaml(config), "config.yaml"))
    assert again == config
    assert notes == []
    assert load_config(tmp_path)[0] == config  # a run folder stands for its config.yaml


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(model="m", adapters={"a": AdapterRun(targets=["q", "v"], layers=[0, 1], rank_pattern={"q_proj": 4})}),
        TrainConfig(defaults=AdapterRun(early_stopping=5), adapters={"a": AdapterRun(), "b": AdapterRun(betas=[0.8, 0.9])}),
        TrainConfig(eval=EvalConfig(early_stopping=2), adapters={"a": AdapterRun(rank=3)}, report_to=["wandb"]),
        TrainConfig(data=DataConfig(val_split=10, prompt="{a}: ü", completion="{b}", chat=False)),
    ],
)
def test_configurations_made_in_python_reload_too(config: TrainConfig, tmp_path: Path) -> None:
    assert config_from_dict(to_dict(config))[0] == config
    assert load_config(write(tmp_path, dump_yaml(config)))[0] == config


def test_an_adapter_can_opt_out_of_early_stopping() -> None:
    tree = {"adapters": {"a": {"early_stopping": None}, "b": {}}, "eval": {"early_stopping": 2}}
    config, _ = config_from_dict(tree)
    assert config.adapters["a"].early_stopping is None
    assert config.adapters["b"].early_stopping == 2
    assert config_from_dict(to_dict(config))[0] == config


def test_toml_and_json(tmp_path: Path) -> None:
    toml = write(tmp_path, 'model = "m"\n[adapters.a]\nrank = 4\n', "run.toml")
    json = write(tmp_path, '{"model": "m", "adapters": {"a": {"rank": 4}}}', "run.json")
    assert load_config(toml) == load_config(json)


def test_settings_at_the_top_find_their_place() -> None:
    config, notes = config_from_dict({"rank": 4, "max_length": 64, "metrics": ["bleu"], "batch_size": 2, "data": "f.jsonl"})
    assert (config.defaults.rank, config.defaults.batch_size) == (4, 2)
    assert (config.data.max_length, config.data.train, config.eval.metrics) == (64, "f.jsonl", ("bleu",))
    assert "rank: read as defaults.rank" in notes


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001"])
def test_numbers_that_yaml_reads_as_text(text: str, tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, f"defaults: {{learning_rate: {text}}}\nmax_steps: 1e3\n"))
    assert config.defaults.learning_rate == 1e-4
    assert config.defaults.max_steps == 1000


BAD: list[tuple[dict[str, Any], str]] = [
    ({"modle": "x"}, "modle: unknown setting (did you mean 'model'?)"),
    ({"adapters": {"formal": {"rnak": 3}}}, "adapters.formal.rnak: unknown setting (did you mean 'rank'?)"),
    ({"defaults": {"leraning_rate": 1}}, "defaults.leraning_rate: unknown setting (did you mean 'learning_rate'?)"),
    ({"data": {"max_lenght": 3}}, "data.max_lenght: unknown setting (did you mean 'max_length'?)"),
    ({"data": {"rank": 3}}, "data.rank: unknown here; there is `defaults.rank`"),
    ({"images": {"bad_rows": "stop"}}, "images.bad_rows: is `data.bad_rows` now, for every task: drop or stop"),
    ({"speech": {"bad_rows": "skip"}}, "speech.bad_rows: is `data.bad_rows` now"),
    ({"detection": {"bad_pictures": "stop"}}, "detection.bad_pictures: is `data.bad_rows` now"),
    ({"diffusion": {"bad_pictures": "skip"}}, "diffusion.bad_pictures: is `data.bad_rows` now"),
    ({"synthesis": {"bad_rows": "refuse"}}, "synthesis.bad_rows: is `data.bad_rows` now"),
    ({"task": "summarization", "data": {"packing": True}}, "data.packing: is for text-generation, and this run's task is summ"),
    (
        {"task": "text-classification", "speech": {"beams": 3}},
        "speech.beams: is for automatic-speech-recognition, and this run's task is text-classification. Leave it out.",
    ),
    ({"seq2seq": {"prefix": "sum: "}}, "seq2seq.prefix: is for summarization, translation, text2text-generation, and this run's"),
    ({"speech": {"long_audio": "skip"}}, "speech.long_audio: expected one of drop, cut, split, stop, got 'skip'"),
    ({"every": 3}, "every: unknown here; there is `eval.every` and `save.every`"),
    ({"defaults": {"rank": "sixteen"}}, "defaults.rank: expected a whole number, got 'sixteen'"),
    ({"defaults": {"rank": True}}, "defaults.rank: expected a whole number, got True"),
    ({"defaults": {"rank": 1.5}}, "defaults.rank: expected a whole number, got 1.5"),
    ({"defaults": {"rank": None}}, "defaults.rank: expected a whole number, got nothing"),
    ({"defaults": {"rank": 0}}, "defaults.rank: expected a whole number ≥ 1, got 0"),
    ({"adapters": {"a": {"dropout": 1.5}}}, "adapters.a.dropout: expected a number in [0, 1), got 1.5"),
    ({"adapters": {"a": {"layers": ["x"]}}}, "adapters.a.layers[0]: expected a whole number, got 'x'"),
    ({"defaults": {"use_rslora": 3}}, "defaults.use_rslora: expected true or false, got 3"),
    ({"defaults": {"learning_rate": "fast"}}, "defaults.learning_rate: expected a number or 'auto', got 'fast'"),
    ({"model": 7}, "model: expected text, got 7"),
    ({"adapters": ["a"]}, "adapters: expected names with settings"),
    ({"adapters": {1: {}}}, "adapters: expected names, got 1"),
    ({"defaults": 3}, "defaults: expected settings, got 3"),
    ({"report_to": ["wandbb"]}, "(did you mean 'wandb'?)"),
    ({"defaults": {"betas": [0.9]}}, "defaults.betas: expected two numbers"),
    ({"defaults": {"learning_rate": math.nan}}, "defaults.learning_rate: expected a finite number, got nan"),
    ({"defaults": {"learning_rate": "nan"}}, "defaults.learning_rate: expected a finite number, got nan"),
    ({"adapters": {"a": {"alpha": math.inf}}}, "adapters.a.alpha: expected a finite number, got inf"),
    ({"defaults": {"alpha_pattern": {"q": math.nan}}}, "defaults.alpha_pattern['q']: expected a finite number, got nan"),
    ({"data": {"val_split": math.nan}}, "data.val_split: expected a finite number, got nan"),
    ({"data": {"val_split": 2.5}}, "data.val_split: expected a share in [0, 1) or a whole number of rows, got 2.5"),
    ({"data": {"nan_rows": math.nan}}, "data.nan_rows: expected text, got nan"),
    ({"eval_steps": math.nan}, "eval_steps: expected a finite number, got nan"),
    ({"save_steps": "inf"}, "save_steps: expected a finite number, got 'inf'"),
    ({"adapters": {"a": {"seed": -1}}}, "adapters.a.seed: expected a whole number ≥ 0, got -1"),
    ({3: 4}, "expected the name of a setting, got 3"),
]


@pytest.mark.parametrize(("tree", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_is_wrong_is_named_with_its_place(tree: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", [TrainConfig, DataConfig, AdapterRun, EvalConfig, SaveConfig])
def test_no_number_may_be_nan(kind: type) -> None:
    """Every setting that is a number, in a file as in Python."""
    place = {DataConfig: "data", AdapterRun: "defaults", EvalConfig: "eval", SaveConfig: "save"}.get(kind)
    scalars = {name: hint for name, hint in field_types(kind).items() if typing.get_origin(hint) in (None, types.UnionType)}
    numbers = [name for name, hint in scalars.items() if {int, float} & set(typing.get_args(hint) or (hint,))]
    assert numbers
    for name in numbers:
        with pytest.raises(ConfigError, match=rf"{name}: expected .*, got nan"):
            config_from_dict({place: {name: math.nan}} if place else {name: math.nan})
        with pytest.raises(ConfigError, match=rf"{name}: expected .*, got nan"):
            kind(**{name: math.nan})


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "base", "checkpoints", "a b", "-x"])
def test_adapter_names_are_path_components(name: str) -> None:
    with pytest.raises(AdapterNameError):
        config_from_dict({"adapters": {name: {}}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "expected settings (`key: value`), got list"),
        ("model: a\nmodel: b\n", "line 2: 'model' is set twice"),
        ("defaults:\n  rank: 1\n  rank: 2\n", "line 3: 'rank' is set twice"),
        ("model: [a\n", "line 2: not valid YAML"),
        ("model: \x00", "not valid YAML"),
    ],
)
def test_a_broken_file_names_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_gets_the_closest(tmp_path: Path) -> None:
    write(tmp_path, DESIGN, "run.yaml")
    with pytest.raises(ConfigError, match=r"no such configuration file \(did you mean 'run.yaml'\?\)"):
        load_config(tmp_path / "rnu.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"without config.yaml"):
        load_config(tmp_path / "empty")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff\xfe\xfa")
    with pytest.raises(ConfigError, match="can't be read as text"):
        load_config(tmp_path / "latin.yaml")
