"""A tokenizer's chat template as what it writes around turns, and where answers stop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorabank.formats.choice import MARK
from lorabank.formats.modelfile import Turns, TurnTemplate, read_template
from lorabank.models.load import load_tokenizer
from lorabank.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer_config.json"


def tokenizer_for(adapter: Path, base: Path) -> tuple[PreTrainedTokenizerBase, Path] | None:
    """The tokenizer beside the adapter (its template is the one of the training), else the base's, and where it lies.

    The folder around an adapter's is its own where that is an adapter's too (`formal/last`, PEFT's subfolders). None where there
    is no tokenizer.
    """
    from transformers import AutoTokenizer

    around = (adapter.parent,) if adapter.is_file() or (adapter.parent / MARK).is_file() else ()
    folder = next((path for path in (adapter, *around, base) if (path / TOKENIZER_FILE).is_file()), None)
    if folder is None:
        return (load_tokenizer(str(base)), base) if base.is_file() else None
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True), folder


def turn_template(tokenizer: PreTrainedTokenizerBase) -> tuple[TurnTemplate | None, list[str]]:
    """(what the chat template writes around turns, or None where it does more; the words at which an answer ends)."""
    from jinja2 import TemplateError

    stop = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    if not tokenizer.chat_template:
        return None, stop

    def render(turns: Turns, begin: bool) -> str | None:
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin)
        except TemplateError:  # many templates refuse a system turn
            return None
        return text if isinstance(text, str) else None

    ids = tokenizer("a").input_ids
    adds_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    found = read_template(render, bos=str(tokenizer.bos_token) if adds_bos else None)
    if found is not None:
        end = found.around["assistant"][1].strip()
        stop += [token for token in tokenizer.all_special_tokens if end.startswith(str(token))]
    return found, list(dict.fromkeys(map(str, stop)))
