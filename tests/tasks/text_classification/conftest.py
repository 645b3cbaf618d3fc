"""One thread, and a tiny BERT with its tokenizer as a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tasks.text_classification.tiny import tiny_bert, words_tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are faster on one thread, and their bits don't depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The body alone is worth anything: the head is made anew for each adapter."""
    folder = tmp_path_factory.mktemp("base") / "bert"
    tiny_bert().save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder
