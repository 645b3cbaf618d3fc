"""`lorabank export`: the files that it writes, and what it refuses before it writes any."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabank.cli.main import main
from lorabank.formats.adapter import Adapter
from lorabank.formats.modelfile import Turns, TurnTemplate, modelfile, read_template
from tests.models.conftest import CHAT_TEMPLATE
from tests.models.test_gguf import write_gguf

CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"


@pytest.fixture
def gguf_base(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def export(*words: object) -> int:
    return main(["export", *map(str, words)])


def test_vllm(adapter_folder: Path, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "vllm"
    assert export(adapter_folder, "--to", "vllm", "--output", out) == 0
    text = capsys.readouterr().out
    assert "4 layers, rank 4 as 8, scaling folded into B" in text
    assert f"vllm serve {base_folder} --enable-lora --max-lora-rank 8 --lora-modules vllm={out}" in text.splitlines()
    before, after = Adapter.load(adapter_folder), Adapter.load(out)
    for path, layer in before.layers.items():
        torch.testing.assert_close(after.layers[path].delta(), layer.delta())
    assert {layer.scaling for layer in after.layers.values()} == {1.0}


def test_gguf(adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.gguf"
    assert export(adapter_folder, "--to", "gguf", "--output", out) == 0
    assert f"saved: {out} (8 tensors, alpha 32)" in capsys.readouterr().out
    assert "blk.1.attn_v.weight.lora_b" in {tensor.name for tensor in gguf.GGUFReader(out).tensors}


def test_gguf_merged_of_a_folder_needs_a_tokenizer_that_is_known(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    assert export(adapter_folder, "--to", "gguf", "--merged", "--output", out) == 2
    assert "its tokenizer is no byte-level BPE whose rule of splitting text is known here" in capsys.readouterr().err
    assert not out.exists()


def test_gguf_merged_of_another_model(
    adapter_folder: Path, gguf_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    assert export(adapter_folder, "--to", "gguf", "--merged", "--base", gguf_base, "--output", out) == 2
    assert re.search(
        r"layer 'model\.layers\.0\.self_attn\.q_proj' changes a weight of \(16, 16\).*\(32, 32\)", capsys.readouterr().err
    )
    assert not out.exists()


def fitting(folder: Path, base: str) -> Path:
    """An adapter of the tiny model that `write_gguf` writes."""
    from tests.formats.test_gguf_adapter import trained

    adapter = trained()
    return Adapter(config=adapter.config, layers=adapter.layers, base_model=base).save(folder)


def test_gguf_merged(gguf_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = fitting(tmp_path / "fits", str(gguf_base))
    out = tmp_path / "m.gguf"
    assert export(adapter, "--to", "gguf", "--merged", "--dtype", "f32", "--output", out) == 0
    text = capsys.readouterr().out
    assert "14 weights changed" in text
    assert f"llama-cli -m {out}" in text
    field = gguf.GGUFReader(out).get_field("general.architecture")
    assert field is not None
    assert field.contents() == "llama"


def test_a_base_that_the_adapter_was_not_trained_on(gguf_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from lorabank.formats.fingerprint import Fingerprint, sampled

    fits = Adapter.load(fitting(tmp_path / "fits", str(gguf_base)))
    other = {"model.norm.weight": sampled(torch.linspace(1, 2, 32), vocabulary=False)}
    adapter = replace(fits, fingerprint=Fingerprint(tensors=other)).save(tmp_path / "other")
    out = tmp_path / "m.gguf"
    for flags in ([], ["--merged"]):
        assert export(adapter, "--to", "gguf", *flags, "--output", out) == 2
        assert "was trained on another base than 'tiny.gguf'" in capsys.readouterr().err
        assert not out.exists()
    assert export(adapter, "--to", "gguf", "--merged", "--force", "--output", out) == 0


def test_no_template_is_said(gguf_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.models.conftest import byte_tokenizer

    adapter = fitting(tmp_path / "fits", str(gguf_base))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} turns"
    tokenizer.save_pretrained(adapter)
    assert export(adapter, "--to", "ollama", "--output", tmp_path / "out") == 0
    assert "note: There is no chat template here that could be put into ollama's language" in capsys.readouterr().out
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert 'TEMPLATE "' not in text
    assert text.startswith("# There is no chat template")


def test_ollama(gguf_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = fitting(tmp_path / "fits", str(gguf_base))
    out = tmp_path / "ollama"
    assert export(adapter, "--to", "ollama", "--output", out) == 0
    assert sorted(item.name for item in out.iterdir()) == ["Modelfile", "adapter.gguf"]
    text = (out / "Modelfile").read_text()
    assert f"FROM {gguf_base.resolve()}\nADAPTER ./adapter.gguf\n" in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert f"ollama create ollama -f {out / 'Modelfile'}" in capsys.readouterr().out
    # the mark that opens a turn is this tokenizer's begin token too, which it doesn't add by itself: it stays
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in text
    assert text.count('"""') == 2


def test_ollama_merged_and_by_its_own_name(gguf_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = fitting(tmp_path / "fits", str(gguf_base))
    assert export(adapter, "--to", "ollama", "--merged", "--output", tmp_path / "whole") == 0
    text = (tmp_path / "whole" / "Modelfile").read_text()
    assert "FROM ./model.gguf\n" in text
    assert "ADAPTER" not in text
    assert export(adapter, "--to", "ollama", "--from", "smollm2:135m", "--output", tmp_path / "named") == 0
    assert "FROM smollm2:135m\n" in (tmp_path / "named" / "Modelfile").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "vlm", "--output", "out"], "--to: expected one of vllm, gguf, ollama, got 'vlm' (did you mean 'vllm'?)"),
        (["--to", "vllm", "--merged", "--output", "out"], "--merged: means nothing with --to vllm --merged"),
        (["--to", "vllm", "--dtype", "f16", "--output", "out"], "--dtype: means nothing with --to vllm"),
        (["--to", "vllm", "--force", "--output", "out"], "--force: means nothing with --to vllm"),
        (["--to", "gguf", "--all-tensors", "--output", "o.gguf"], "--all-tensors: means nothing with --to gguf"),
        (["--to", "gguf", "--from", "x", "--output", "o.gguf"], "--from: means nothing with --to gguf"),
        (["--to", "gguf", "--output", "out"], "--output out: a GGUF file is written, so its name should end with .gguf"),
        (
            ["--to", "gguf", "--dtype", "f8", "--output", "o.gguf"],
            "an adapter's GGUF storage: expected one of f32, f16, got 'f8'",
        ),
        (["--to", "gguf", "--base", "nowhere/", "--output", "o.gguf"], "no such folder"),
        (["--to", "vllm", "--base", "./nowhere", "--output", "o"], "model './nowhere': no such folder or file"),
        (["--to", "vllm", "--base", ".", "--output", "o"], "holds no model (no config.json, no weights)"),
    ],
)
def test_what_does_not_go_together(
    words: list[str],
    message: str,
    adapter_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(adapter_folder, *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize("tool", ["vllm", "gguf", "ollama"])
def test_nan_is_named_and_nothing_is_written(
    tool: str, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    (adapter_folder / "lorabank.json").unlink()
    out = tmp_path / "out.gguf"
    assert export(adapter_folder, "--to", tool, "--output", out) == 2
    assert f"tensor {name!r} holds NaN or infinity" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("task", "tool", "way_out"),
    [
        ("image-classification", "vllm", "lorabank merge"),
        ("automatic-speech-recognition", "gguf", "lorabank merge"),
        ("text-classification", "ollama", "lorabank merge"),
        ("text-to-image", "vllm", "lorabank convert --to kohya"),
    ],
)
def test_what_is_no_language_models_is_refused_for_that_reason(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, tool: str, way_out: str
) -> None:
    adapter = Adapter.load(adapter_folder)
    replace(adapter, metadata={"task": task}).save(tmp_path / "other")
    out = tmp_path / ("x.gguf" if tool == "gguf" else "x")
    assert main(["export", str(tmp_path / "other"), "--to", tool, "--output", str(out)]) == 2
    text = capsys.readouterr().err
    assert f"is for {task}, and " in text and "gets adapters of language models from here (text-generation" in text
    assert way_out in text and not out.exists()


def test_a_base_that_is_no_language_model_says_so(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an adapter that says no task, such as PEFT's own: its base's configuration does."""
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    line = ["export", str(adapter_folder), "--to", "vllm", "--base", str(tmp_path / "vit"), "--output", str(tmp_path / "x")]
    assert main(line) == 2
    assert "is for a 'vit' model, and vLLM gets adapters of language models from here" in capsys.readouterr().err


def test_an_adapter_without_a_base(adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = Adapter.load(adapter_folder)
    nameless = Adapter(config=adapter.config, layers=adapter.layers).save(tmp_path / "nameless")
    assert export(nameless, "--to", "gguf", "--output", tmp_path / "a.gguf") == 2
    assert "doesn't name its base model. Name it with --base" in capsys.readouterr().err
    assert export(nameless, "--to", "vllm", "--output", tmp_path / "v") == 0
    assert "vllm serve MODEL" in capsys.readouterr().out


def test_an_output_that_exists_is_kept(adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.gguf"
    out.write_text("mine")
    assert export(adapter_folder, "--to", "gguf", "--output", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


# Chat templates in ollama's language ------------------------------------------------------------------------------------


def chatml(turns: Turns, begin: bool) -> str:
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": "Be kind."}, *turns]
    return "".join(CHATML.format(**turn) for turn in turns) + ("<|im_start|>assistant\n" if begin else "")


def test_a_template_that_writes_around_turns_is_read() -> None:
    found = read_template(chatml)
    assert found is not None
    assert found.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert found.default_system == "Be kind."
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert found.render(turns) == chatml(turns, True)
    assert found.in_go() == (
        '{{- range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )
    assert 'SYSTEM """Be kind."""' in modelfile("x", template=found)


def test_the_begin_token_that_the_tokenizer_adds_is_left_out() -> None:
    found = read_template(lambda turns, begin: f"<s>{chatml(turns, begin)}", bos="<s>")
    assert found is not None
    assert found.around["system"][0] == "<|im_start|>system\n"


@pytest.mark.parametrize(
    "render",
    [
        lambda turns, begin: None if turns[0]["role"] == "system" else chatml(turns, begin),
        lambda turns, begin: chatml([{**turn, "content": turn["content"].upper()} for turn in turns], begin),
        lambda turns, begin: f"{len(turns)} turns\n{chatml(turns, begin)}",
        lambda turns, begin: chatml(turns[-1:], begin),
        lambda turns, begin: chatml(turns, begin).replace("<|im_end|>", "{{ end }}"),
    ],
    ids=["refuses a system turn", "changes the words", "counts", "forgets", "braces"],
)
def test_a_template_that_does_more_is_not_put_into_go(render: object) -> None:
    assert read_template(render) is None  # type: ignore[arg-type]


def test_turns_of_a_role_alone_are_rendered_alike() -> None:
    template = TurnTemplate(around={"user": ("<u>", "</u>")}, begin="<a>", default_system=None)
    assert template.render([{"role": "user", "content": "x"}]) == "<u>x</u><a>"
    assert "{% for m in messages %}" in CHAT_TEMPLATE  # what the tiny GGUF carries
