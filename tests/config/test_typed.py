"""Messages name a setting by its flag where a flag gave it, and nothing else is touched."""

from __future__ import annotations

import pickle
import shlex
from pathlib import Path

import pytest

from lorabank.config.flags import parse_train_arguments
from lorabank.config.parse import config_from_dict
from lorabank.config.typed import as_typed, named_as_typed
from lorabank.data.row import NanError
from lorabank.errors import ConfigError, DataError, LorabankError, OutputError, Setting

FLAGS = {
    "defaults.rank": "--rank",
    "defaults.rank_pattern": "--rank-pattern",
    "data.val": "--val",
    "data.train": "--data",
    "seed": "--seed",
    "model": "--model",
    "--learning_rate": "--learning-rate",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defaults.rank: expected 1, got 0", "--rank: expected 1, got 0"),
        ("defaults.rank_pattern.q: expected a number", "--rank-pattern.q: expected a number"),
        ("defaults.rank_pattern['q']: expected a number", "--rank-pattern['q']: expected a number"),
        ("data.val: no file 'data.val'. Set data.val_split", "--val: no file 'data.val'. Set data.val_split"),
        ("out: other settings: defaults.rank: was 1; seed: was 2", "out: other settings: --rank: was 1; --seed: was 2"),
        ("model 'x': no such folder", "--model 'x': no such folder"),
        ("--learning_rate and --lr both set it", "--learning-rate and --lr both set it"),
    ],
)
def test_what_is_named(text: str, expected: str) -> None:
    assert as_typed(text, FLAGS) == expected
    assert as_typed(text, {}) == text


@pytest.mark.parametrize(
    "text",
    [
        "give `data.train` or /tmp/data.train or data.train.jsonl:3",
        "the model has a seed, and its seed is 3",
        "defaults.alpha: expected a number",
        "adapters.seed.alpha: expected a number",
        "--learning_rates: unknown setting",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert as_typed(text, FLAGS) == text


KINDS = [kind for kind in LorabankError.__subclasses__() if kind.__module__ == LorabankError.__module__]


@pytest.mark.parametrize("error", [*(kind("seed: wrong") for kind in KINDS), NanError("x", "seed: wrong")])
def test_the_kind_of_error_stays(error: LorabankError) -> None:
    """A NanError is made from a column: what comes out is the DataError that it is."""
    kind = DataError if isinstance(error, NanError) else type(error)
    with pytest.raises(kind, match=r"^--seed: wrong") as caught, named_as_typed(FLAGS):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_named_and_words_are_not_searched(kind: type[LorabankError]) -> None:
    error = kind(Setting("data.val"), "[0] and ", Setting("data.limit"), ": no 'x'; seed: data.train")
    assert str(error) == "data.val[0] and data.limit: no 'x'; seed: data.train"
    with pytest.raises(kind) as caught, named_as_typed(FLAGS):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value) == "--val[0] and data.limit: no 'x'; seed: data.train"
    assert caught.value.settings == (Setting("--val"), Setting("data.limit"))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.parts) == (str(error), error.parts)


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"defaults": {"rank": 0}}, "defaults.rank"),
        ({"defaults": {"rank": "x"}}, "defaults.rank"),
        ({"adapters": {"v1.data": {"alpha": -1}}}, "adapters.v1.data.alpha"),
        ({"adapters": {"a": {"rank_pattern": {"q.x": 0}}}}, "adapters.a.rank_pattern"),
        ({"adapters": {"a": {"alpha_pattern": {"q": "x"}}}}, "adapters.a.alpha_pattern"),
        ({"defaults": {"betas": [0.9, 2]}}, "defaults.betas"),
        ({"defaults": {"betas": [0.9, "x"]}}, "defaults.betas"),
        ({"defaults": {"targets": []}}, "defaults.targets"),
        ({"defaults": {"init_lora_weights": "corda"}}, "defaults.init_lora_weights"),
        ({"data": {"max_length": 0}}, "data.max_length"),
        ({"data": {"max_lenght": 1}}, "data.max_lenght"),
        ({"eval": {"every": -1}}, "eval.every"),
        ({"seed": -1}, "seed"),
        ({"fp16": "perhaps"}, "fp16"),
    ],
)
def test_errors_of_a_configuration_carry_their_setting(tree: dict[str, object], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"model": "M", **tree})
    assert caught.value.settings == (Setting(place),)
    assert str(caught.value).startswith(place)


def test_an_adapter_called_like_a_setting_of_another() -> None:
    """`adapters.v1.data` is a flag's place, and the beginning of another adapter's settings."""
    with (
        pytest.raises(ConfigError, match=r"^adapters\.v1\.data\.rank: expected a whole number ≥ 1, got 0"),
        named_as_typed({"adapters.v1.data": "--adapter v1,data=f"}),
    ):
        config_from_dict({"model": "M", "adapters": {"v1.data": {"rank": 0}}})


def test_an_error_about_something_else_is_the_same_object() -> None:
    error = OutputError("disk full")
    with pytest.raises(OutputError) as caught, named_as_typed(FLAGS):
        raise error
    assert caught.value is error
    with pytest.raises(ValueError, match="seed: wrong"), named_as_typed(FLAGS):
        raise ValueError("seed: wrong")


def places(line: str) -> dict[str, str]:
    return dict(parse_train_arguments(shlex.split(line)).flags)


def test_places_of_flags() -> None:
    assert places("--model M --data.max-length 9 --data f")["data.train"] == "--data"
    found = places(
        "--model=M --data f --lora_r 4 --data.max-length 9 --no-compile --adam-beta1 0.8 --adam-beta2 0.9 --early-stopping 2"
    )
    assert found == {
        "model": "--model",
        "data.train": "--data",
        "data.max_length": "--data.max-length",
        "compile": "--no-compile",
        "defaults.rank": "--lora_r",
        "adapters.default.rank": "--lora_r",
        "defaults.betas": "--adam-beta1 and --adam-beta2",
        "adapters.default.betas": "--adam-beta1 and --adam-beta2",
        "eval.early_stopping": "--early-stopping",
        "defaults.early_stopping": "--early-stopping",
        "adapters.default.early_stopping": "--early-stopping",
    }


def test_places_of_adapters_flags(tmp_path: Path) -> None:
    """What an adapter has of its own is not what the general flag gave, in a file as on the line."""
    found = places("--model M --adapter my-a,data=f,targets=q,v --adapters.my-a.alpha 3 --adapter b,data=g,rank=2 --rank 4")
    assert found["adapters.my-a.targets"] == "--adapter my-a,targets=q,v"
    assert found["adapters.my-a.alpha"] == "--adapters.my-a.alpha"
    assert (found["adapters.my-a.rank"], found["adapters.b.rank"]) == ("--rank", "--adapter b,rank=2")
    file = tmp_path / "run.yaml"
    file.write_text("model: M\ndata: f\nseed: 3\nadapters: {a: {rank: 2, alpha: 3}, b: {}}\n")
    found = places(f"{file} --defaults.rank 4 --alpha 5")
    assert "adapters.a.rank" not in found and "seed" not in found and "model" not in found
    assert (found["adapters.b.rank"], found["adapters.a.alpha"]) == ("--defaults.rank", "--alpha")


def test_what_the_file_said_keeps_its_place(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: M\ndata: f\ndefaults: {rank: 0}\n")
    with pytest.raises(ConfigError, match=r"^defaults\.rank: expected"):
        places(f"{file} --alpha 3")
    file.write_text("model: M\ndata: f\nadapters: {a: {alpha: -1}}\n")
    with pytest.raises(ConfigError, match=r"^adapters\.a\.alpha: expected"):
        places(f"{file} --defaults.alpha 3")
    with pytest.raises(ConfigError, match=r"^--alpha: expected"):
        places(f"{file} --alpha 0")
