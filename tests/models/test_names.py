"""What a name alone says: closed models, aliases, hub ids, paths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorabank.errors import ModelError
from lorabank.models.load import locate
from lorabank.models.names import alias, check_not_closed, closest_sibling, is_hub_id, is_path

CLOSED = """GPT-3|gpt3|GPT-3.5-turbo|gpt-4o|gpt-4.1-mini|gpt-5|ChatGPT|text-davinci-003|o1|o3-mini|openai/gpt-4o|DALL-E|DALL-E 3|
dalle2|Sora|Claude|claude-3-5-sonnet|Claude 4|anthropic/claude-opus-4|Gemini|gemini-2.5-pro|google/gemini-pro|Bard|Midjourney|
midjourney v6""".replace("\n", "").split("|")
OPEN = """gpt2|gpt2-medium|openai-gpt|openai/gpt-oss-20b|gpt-oss-120b|EleutherAI/gpt-neox-20b|gpt-neo-125m|gpt-j-6b|
nomic-ai/gpt4all-j|lmsys/gpt-4-imitation|google/gemma-3-1b-it|openai/whisper-tiny|someone/claude-style-llama|
dalle-mini/dalle-mini|Qwen/Qwen3-0.6B|smollm2-135m-instruct|opt-125m|olmo""".replace("\n", "").split("|")


@pytest.mark.parametrize("name", CLOSED)
def test_closed_models_have_no_weights(name: str) -> None:
    with pytest.raises(ModelError, match="no weights to adapt"):
        locate(name)


@pytest.mark.parametrize("name", OPEN)
def test_open_models_are_not_taken_for_closed_ones(name: str) -> None:
    check_not_closed(name)


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-4").mkdir()
    assert locate("gpt-4") == Path("gpt-4")


def test_alias_in_any_case() -> None:
    assert alias("SmolLM2-135M-Instruct") == "smollm2-135m-instruct"
    assert alias("HuggingFaceTB/SmolLM2-135M-Instruct") is None


def test_paths_and_hub_ids() -> None:
    assert [is_path(name) for name in ("./x", "~/x", "/x", "a/b/c", "x.gguf", "a/b", "x")] == [True] * 5 + [False] * 2
    assert [is_hub_id(name) for name in ("gpt2", "a/b", "a/b/c", "a b", "", "a..b")] == [True, True, False, False, False, False]


def test_a_misspelt_folder_names_the_closest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama-tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert closest_sibling(Path("models/lama-tiny")) == " (did you mean 'models/llama-tiny'?)"
    for name in ("models/lama-tiny", str(tmp_path / "models" / "lama-tiny")):
        with pytest.raises(ModelError, match=r"no such folder or file \(did you mean '.*models/llama-tiny'\?\)"):
            locate(name)


@pytest.mark.parametrize("name", ["", "  ", "two words", "a/b\\c d"])
def test_names_that_can_be_nothing(name: str) -> None:
    with pytest.raises(ModelError, match=r"no name given|neither a folder, a GGUF file nor a hub id"):
        locate(name)


def test_importing_models_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "huggingface_hub", "numpy", "gguf")
    code = f"import sys, lorabank.models, lorabank.models.smollm2; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
