"""A transformers tokenizer as GGUF keeps it: byte-level BPE, whose rule of splitting text is one that llama.cpp knows by name.

GGUF names that rule and doesn't hold it, so a tokenizer with another rule is refused: it would give other tokens in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, str] = {
    rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_WORDS}\p{{N}}{_REST}": "qwen2",
}
"""Regular expression of a `Split` → llama.cpp's name of the rule."""


def add_tokenizer(writer: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, size: int, *, where: str) -> None:
    """Add vocabulary, merges, special tokens and chat template to a `gguf.GGUFWriter`.

    size: rows of the embedding, which may be more than there are tokens. Raises ModelError for another kind of tokenizer.
    """
    import gguf

    data = _data(tokenizer, where)
    rule = pre_tokenizer(data)
    if rule is None:
        raise ModelError(
            f"{where}: its tokenizer is no byte-level BPE whose rule of splitting text is known here, so llama.cpp would give "
            "other tokens. Use llama.cpp's converter: python convert_hf_to_gguf.py FOLDER."
        )
    added = {item["id"]: item for item in data.get("added_tokens", [])}
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise ModelError(
            f"{where}: its tokenizer has the id {max(by_id)}, and its embedding {size} rows; use the model's own files."
        )
    tokens, types = [], []
    for index in range(size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        known = added.get(index)
        kind = gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED
        if known is not None:
            kind = gguf.TokenType.CONTROL if known["special"] else gguf.TokenType.USER_DEFINED
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    begins = list(tokenizer("a").input_ids)[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    special.add_special_token = {"bos": begins}
    special.special_token_ids = {
        name: index for name in ("bos", "eos", "pad", "unk") if (index := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    template = tokenizer.chat_template
    special.chat_template = template if isinstance(template, str) else None
    special.add_to_gguf(writer, quiet=True)


def pre_tokenizer(data: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how a `tokenizer.json` splits text; None for what isn't byte-level BPE or isn't known."""
    model = data["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):  # llama.cpp loads none without
        return None
    top = data.get("pre_tokenizer") or {}
    steps = top["pretokenizers"] if top.get("type") == "Sequence" else [top]
    *first, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(first) > 1:
        return None
    normalizer = (data.get("normalizer") or {}).get("type")
    if not first:
        return "gpt-2" if last.get("use_regex", True) and normalizer is None else None
    (step,) = first
    if step.get("type") == "Digits":
        alone = step.get("individual_digits") and last.get("use_regex", True) and normalizer is None
        return "smollm" if alone else None
    if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert") or last.get("use_regex", True):
        return None
    rule = SPLITS.get(step["pattern"].get("Regex", ""))
    return rule if normalizer == ("NFC" if rule == "qwen2" else None) else None


def _data(tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{where}: its tokenizer has no tokenizer.json. Use llama.cpp's converter: convert_hf_to_gguf.py FOLDER."
        )
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found
