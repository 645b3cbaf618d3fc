"""The command line of a run: a file, flags over it, adapters one by one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lorabank.config.flags import TrainArguments, parse_train_arguments
from lorabank.config.parse import config_from_dict, to_dict
from lorabank.errors import ConfigError


def parse(line: str) -> TrainArguments:
    return parse_train_arguments(shlex.split(line))


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: M\noutput: out/x\ndata: all.jsonl\nadapters: {formal: {data: f.jsonl}, terse: {rank: 64, max_steps: 9}}\n"
    )
    return path


def test_the_common_case_needs_no_file_and_no_name() -> None:
    parsed = parse("--model M --data rows/chat.v2.jsonl --rank 8")
    assert parsed.config.model == "M"
    assert parsed.config.data.train == "rows/chat.v2.jsonl"
    assert parsed.config.defaults.rank == 8
    assert parsed.config.adapters == {}
    assert parsed.config.output == "out/chat.v2"
    assert any(note.startswith("output: out/chat.v2") for note in parsed.notes)


@pytest.mark.parametrize("flag", ["--learning-rate 1e-4", "--learning_rate 1e-4", "--learning-rate=1e-4", "--lr 1e-4"])
def test_dash_underscore_and_equals(flag: str) -> None:
    assert parse(f"--model M --data f {flag}").config.defaults.learning_rate == 1e-4


def test_adapters_from_flags() -> None:
    parsed = parse(
        "--model M --adapter formal,data=f.jsonl,rank=16 --adapter terse,data=t.jsonl,targets=q,v,mlp,rank=64 --alpha 8"
    )
    formal, terse = parsed.config.adapters.values()
    assert (formal.data, formal.rank, formal.alpha) == ("f.jsonl", 16, 8.0)
    assert (terse.data, terse.rank, terse.targets) == ("t.jsonl", 64, ("q", "v", "mlp"))
    bracket = parse("--model M --data d --adapter 'a,targets=[q,v],rank=2,rank_pattern={q_proj:4,v_proj:8}'").config.adapters["a"]
    assert (bracket.targets, bracket.rank, bracket.rank_pattern) == (("q", "v"), 2, {"q_proj": 4, "v_proj": 8})
    assert parse("--model M --adapter data=f,rank=2").config.adapters["default"].rank == 2
    dotted = parse("--model M --adapter v1.2-a,data=f --adapters.v1.2-a.learning-rate 1e-3 --adapters.v1.2-a.rank=3")
    assert dotted.config.adapters.keys() == {"v1.2-a"}
    assert (dotted.config.adapters["v1.2-a"].learning_rate, dotted.config.adapters["v1.2-a"].rank) == (1e-3, 3)


def test_nested_settings_by_dotted_name() -> None:
    config = parse("--model M --data f --data.max-length 512 --eval.every 50 --eval.metrics loss,bleu --save.keep 1").config
    assert (config.data.train, config.data.max_length) == ("f", 512)
    assert (config.eval.every, config.eval.metrics, config.save.keep) == (50, ("loss", "bleu"), 1)
    assert parse("--model M --data.max-length 512 --data f").config.data.train == "f"
    assert parse("--model M --data f --nan-rows drop").config.data.nan_rows == "drop"
    assert parse("--model M --data f --data.nan_rows=drop").config.data.nan_rows == "drop"


def test_switches() -> None:
    assert parse("--model M --data f --gradient-checkpointing --rank 4").config.gradient_checkpointing
    assert parse("--model M --data f --gradient-checkpointing true").config.gradient_checkpointing
    assert not parse("--model M --data f --no-gradient-checkpointing").config.gradient_checkpointing
    assert parse("--model M --data f --bf16").config.base_dtype == "bf16"
    assert parse("--model M --data f --dry-run").dry_run
    assert not parse("--model M --data f").config.data.packing
    for flag in ("--packing", "--data.packing", "--sample_packing"):
        assert parse(f"--model M --data f {flag}").config.data.packing


def test_the_file_and_flags_over_it(run_yaml: Path) -> None:
    parsed = parse(f"{run_yaml} --rank 8 --output out/y --adapters.terse.alpha 4 --adapter third,rank=2")
    config = parsed.config
    assert config.output == "out/y"
    assert {name: run.rank for name, run in config.adapters.items()} == {"formal": 8, "terse": 8, "third": 2}
    assert config.adapters["terse"].alpha == 4.0
    assert "--rank replaces adapters.terse.rank (64) of the file" in parsed.notes
    assert parse(f"{run_yaml} --defaults.rank 8").config.adapters["terse"].rank == 64
    assert parse(f"{run_yaml} --max-steps 3").config.adapters["terse"].max_steps == 3
    assert parse(f"{run_yaml} --gradient-checkpointing").source == str(run_yaml)
    assert parse(f"--gradient-checkpointing {run_yaml}").source == str(run_yaml)


def test_resume() -> None:
    assert parse("--model M --data f --resume").resume is True
    assert parse("--model M --data f --resume out/x/checkpoints/step-20").resume == "out/x/checkpoints/step-20"
    assert parse("--model M --data f").resume is False


def test_resume_before_the_file(run_yaml: Path) -> None:
    parsed = parse(f"--resume {run_yaml}")
    assert (parsed.resume, parsed.source) == (True, str(run_yaml))


def test_a_run_folder_is_its_configuration(run_yaml: Path) -> None:
    run_yaml.rename(run_yaml.with_name("config.yaml"))
    assert parse(str(run_yaml.parent)).config.output == "out/x"


def test_a_resumed_run_folder_is_its_own_output(run_yaml: Path) -> None:
    """A copy says `output: out/x`, the original's folder, which must be left alone."""
    run_yaml.rename(run_yaml.with_name("config.yaml"))
    for line in (f"{run_yaml.parent} --resume", f"--resume step-8 {run_yaml.parent}"):
        assert parse(line).config.output == str(run_yaml.parent)
    assert parse(f"{run_yaml.parent} --resume --output out/y").config.output == "out/y"
    assert parse(f"{run_yaml.parent / 'config.yaml'} --resume").config.output == "out/x"


def test_what_flags_made_reloads() -> None:
    config = parse("--model M --adapter a,data=f,targets=q,v,betas=0.8,0.9 --init-from x --report-to tensorboard,wandb").config
    assert config_from_dict(to_dict(config))[0] == config
    assert config.adapters["a"].betas == (0.8, 0.9)
    assert config.adapters["a"].init_from == "x"
    assert config.report_to == ("tensorboard", "wandb")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model M --data f --rnak 8", "--rnak: unknown flag (did you mean '--rank'?)"),
        ("--model M --data f --rnak=8", "--rnak: unknown setting (did you mean 'rank'?)"),
        ("--model M --data f --data.max-lenght 8", "--data.max-lenght: unknown setting (did you mean 'max_length'?)"),
        ("--model M --data f --adapter a,rnak=8", "--adapter a,rnak=8: unknown setting"),
        ("--model M --data f --rank eight", "--rank: expected a whole number, got 'eight'"),
        ("--model M --data f --rank 0", "--rank: expected a whole number ≥ 1, got 0"),
        ("--model M --data f --rank=0", "--rank: expected a whole number ≥ 1, got 0"),
        ("--model M --data f --defaults.rank 0", "--defaults.rank: expected a whole number ≥ 1, got 0"),
        ("--model M --data f --lora_r 0", "--lora_r: expected a whole number ≥ 1, got 0"),
        ("--model M --adapter a,data=f,rank=0", "--adapter a,rank=0: expected a whole number ≥ 1, got 0"),
        ("--model M --adapter v1.2,data=f --adapters.v1.2.rank 0", "--adapters.v1.2.rank: expected a whole number ≥ 1, got 0"),
        ("--model M --adapter v1.2,data=f --adapters.v1.2.rnak 1", "--adapters.v1.2.rnak: unknown setting"),
        ("--model M --data f --adapters.a 1", "--adapters.a: expected settings, got '1'"),
        ("--model M --adapter data=f,rank=0", "--adapter rank=0: expected a whole number ≥ 1, got 0"),
        ("--model M --data f --learning-rate nan", "--learning-rate: expected a finite number, got nan"),
        ("--model M --data f --warmup-ratio 1", "--warmup-ratio: expected a number in [0, 1), got 1.0"),
        ("--model M --data f --max_length 0", "--max_length: expected a whole number ≥ 1, got 0"),
        ("--model M --data f --eval.every -1", "--eval.every: expected a whole number ≥ 0, got -1"),
        ("--model M --data f --seed x", "--seed: expected a whole number, got 'x'"),
        ("--model M --data f --nan-rows skip", "--nan-rows: expected one of stop, drop, got 'skip'"),
        ("--model M --data f --data.nan-rows x", "--data.nan-rows: expected one of stop, drop, got 'x'"),
        ("--model M --data f --learning-rate 1 --lr 2", "--lr and --learning-rate both set defaults.learning_rate"),
        ("--model M --data f --rank", "--rank: expected a value after it, got nothing"),
        ("--model M --data f --rank --alpha 3", "--rank: expected a value after it, got --alpha"),
        ("--model M --data f -r 8", "-r: unknown flag. Flags begin with two dashes"),
        ("--model M", "data: missing"),
        ("--model M --adapter a,data=f --adapter b", "adapter 'b' has no data"),
        ("--data f", "model: missing"),
        ("a.yaml b.yaml", "'b.yaml': one configuration file is enough"),
        ("--model M --data f --adapter a,oops", "expected key=value after the name, got 'oops'"),
        ("--model M --data f --adapter a,rank=4 --adapter a,rank=8", "there is an adapter 'a' already"),
        ("--model M --adapter data=f --adapter data=g", "there is an adapter 'default' already"),
        ("--model M --data f --every 8", "--every: unknown here; there is `eval.every` and `save.every`"),
        ("--model M --data f --lora_r 8 --rank 8x", "both set defaults.rank"),
    ],
)
def test_wrong_lines(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert message in str(caught.value)
    assert not message.startswith("--") or str(caught.value).startswith(message)


def test_wrong_lines_over_a_file(run_yaml: Path) -> None:
    with pytest.raises(ConfigError, match=r"--adapters.fromal: the file has no such adapter \(did you mean 'formal'\?\)"):
        parse(f"{run_yaml} --adapters.fromal.rank 3")
    run_yaml.write_text("model: M\nadapters: {a: {data: f.jsonl}}\n")
    with pytest.raises(ConfigError, match="every adapter of the file has data of its own"):
        parse(f"{run_yaml} --data other.jsonl")


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("dash", ["_", "-"])
def test_a_pattern_of_an_adapter_whose_name_has_dots(name: str, dash: str) -> None:
    flag = f"--adapters.v1.2.{name.replace('_', dash)}.q_proj"
    config = parse_train_arguments(["--model", "m", "--data", "d.jsonl", "--output", "o", flag, "4"]).config
    assert getattr(config.adapters["v1.2"], name) == {"q_proj": 4}


@pytest.mark.parametrize(
    ("flag", "setting"),
    [("--resolution 64", "--resolution"), ("--language de", "--language"), ("--speech.beams 2", "--speech.beams")],
)
def test_a_flag_of_another_task_is_refused_as_it_was_typed(flag: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting}: is for .*, and this run's task is object-detection\. Leave it out"):
        parse(f"--model M --data f --task object-detection {flag}")
    assert parse("--model M --data f --task object-detection --speech.beams 1").config.speech.beams == 1  # the default
