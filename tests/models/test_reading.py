"""A model that transformers reads with a library that isn't here: the library and what to install are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from lorabank.errors import MissingExtraError
from lorabank.models.reading import lacks_package, tokenizer_in, weights_of


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "\nTimmBackbone requires the timm library but it was not found in your environment. You can install it with pip:\n",
            "model 'm': it needs timm, which isn't installed: pip install 'lorabank[timm]'",
        ),
        ("No module named 'tiktoken'", "model 'm': it needs tiktoken, which isn't installed: pip install tiktoken"),
        ("something else\nand more", "model 'm': a package that it needs isn't installed (something else)."),
    ],
)
def test_what_to_install(said: str, message: str) -> None:
    assert str(lacks_package("m", ImportError(said))) == message


def test_weights_and_tokenizers_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backbone:
        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> None:
            raise ImportError("Backbone requires the timm library but it was not found")

    with pytest.raises(MissingExtraError, match=r"lorabank\[timm\]"):
        weights_of("m", Backbone, tmp_path, None, dtype=torch.float32)
    (tmp_path / "spiece.model").touch()
    monkeypatch.setattr(transformers, "AutoTokenizer", Backbone)
    with pytest.raises(MissingExtraError, match=r"lorabank\[timm\]"):
        tokenizer_in("m", tmp_path, trust_remote_code=False)
