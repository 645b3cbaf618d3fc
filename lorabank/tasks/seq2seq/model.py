"""Encoder-decoders: how they are loaded, told languages, and made to write. N rows, S source and T target tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.config.seq2seq import Seq2SeqConfig
from lorabank.engine.model_batch import Tensors
from lorabank.engine.modes import evaluation_mode
from lorabank.errors import ConfigError, Setting, closest
from lorabank.models.load_class import load_class, tokenizer_of
from lorabank.training.task import BaseRequest, Say, TaskBase

IGNORED = -100
"""Target of what is padding, as transformers has it."""
_SHOWN = 12


def load_seq2seq(request: BaseRequest, say: Say) -> TaskBase:
    """The model and its tokenizer. Raises ModelError and ConfigError."""
    from transformers import AutoModelForSeq2SeqLM

    base = load_class(
        request.model,
        AutoModelForSeq2SeqLM,
        tokenizer_of,
        dtype=request.dtype,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        say=say,
    )
    return TaskBase(model=base.model, processor=base.processor, name=request.model, folder=base.folder, notes=base.notes)


def check_encoder_decoder(model: nn.Module) -> PreTrainedModel:
    """The model as what it has to be. Raises ConfigError for another."""
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(model).__name__} is no encoder-decoder of transformers (T5, BART, mBART …). For a language model that "
            "continues text use task text-generation."
        )
    if not isinstance(model.config.pad_token_id, int):
        raise ConfigError(
            f"{type(model).__name__}: its configuration names no pad token. Set model.config.pad_token_id = "
            "tokenizer.pad_token_id."
        )
    return model


def positions(model: PreTrainedModel) -> int | None:
    """Tokens that a text may have, by the tables of positions; None where distances are learned instead (T5)."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 1 else None


def set_languages(tokenizer: Any, config: Seq2SeqConfig) -> None:
    """Tell a tokenizer of several languages which two it is about. Raises ConfigError for codes that it doesn't have."""
    if not _has_languages(tokenizer):
        return
    for setting, code in (("source_lang", config.source_lang), ("target_lang", config.target_lang)):
        known = _codes(tokenizer)
        if code is None:
            raise ConfigError(
                Setting(f"seq2seq.{setting}"),
                f": {type(tokenizer).__name__} has a code for each language; say which: {', '.join(known[:_SHOWN])}, …",
            )
        if code not in known:
            raise ConfigError(
                Setting(f"seq2seq.{setting}"),
                f": {code!r} is no language of {type(tokenizer).__name__}{closest(code, known)}: {', '.join(known[:_SHOWN])}, …",
            )
    tokenizer.src_lang, tokenizer.tgt_lang = config.source_lang, config.target_lang


def _has_languages(tokenizer: Any) -> bool:
    return "src_lang" in inspect.signature(type(tokenizer).__init__).parameters


def _codes(tokenizer: Any) -> list[str]:
    """Codes of languages: special tokens that name one, `en_XX`, or `__en__` for `en`."""
    usual = {tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.mask_token}
    return sorted(str(token).strip("_") for token in tokenizer.all_special_tokens if token not in usual and "_" in str(token))


def decoder_inputs(model: PreTrainedModel, labels_NT: Tensor) -> Tensor:
    """What the decoder reads: the targets one to the right, behind what the model begins with.

    By the model's own function where transformers gives it one (mBART begins with the language, which ends its targets).
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)  # not of every class
    if own is not None:
        return cast("Tensor", own(labels=labels_NT))
    start = model.config.decoder_start_token_id
    if not isinstance(start, int):
        raise ConfigError(f"{type(model).__name__}: its configuration names no decoder_start_token_id. Set it first.")
    shifted = labels_NT.new_full(labels_NT.shape, start)
    shifted[:, 1:] = labels_NT[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, cast("int", model.config.pad_token_id))


def row_losses(model: nn.Module, inputs: Tensors, targets: Tensors) -> Tensor:
    """−Σ log p of each row's target tokens, nats (N,)."""
    logits = model(**inputs, use_cache=False).logits
    labels_NT = targets["labels"]
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels_NT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels_NT.shape).sum(1)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """How an answer of the model begins, which no target decides."""

    start: int
    """First token that the decoder reads."""
    forced: int | None
    """First token of every target (BART's start of text, mBART-50's language); None: the first is the text's."""


def beginning(model: PreTrainedModel, tokenizer: Any) -> Beginning:
    """Read off two targets as training has them, so that an answer begins as what was trained."""
    first, second = (tokenizer(text_target=text)["input_ids"] for text in ("a", "the other"))
    where = model.device if model.device.type != "meta" else torch.device("cpu")  # a model without weights begins alike
    start = int(decoder_inputs(model, torch.tensor([first], device=where))[0, 0])
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    forced = first[0] if first[0] == second[0] and first[0] in special and first[0] != tokenizer.eos_token_id else None
    return Beginning(start=start, forced=forced)


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How texts are looked for."""

    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


def write(
    bank: AdapterBank,
    tokenizer: Any,
    sources: Sequence[Sequence[int]],
    routes: Sequence[RowRoute],
    *,
    begin: Beginning,
    manner: Manner,
    max_new_tokens: int,
) -> list[str]:
    """Each row's likeliest text, token by token or by beams, all rows in the same passes, each under its route.

    A text ends where the model has no further position for it.
    """
    model: Any = bank.model
    length = max(map(len, sources))
    ids = torch.full((len(sources), length), int(model.config.pad_token_id))
    mask = torch.zeros_like(ids)
    for i, own in enumerate(sources):
        ids[i, : len(own)] = torch.tensor(list(own))
        mask[i, : len(own)] = 1
    repeat = ("interleave", manner.beams) if manner.beams > 1 else None
    with torch.no_grad(), evaluation_mode(model.modules()), bank.route(list(routes), repeat=repeat):
        found = model.generate(
            input_ids=ids.to(bank.device),
            attention_mask=mask.to(bank.device),
            max_new_tokens=min(max_new_tokens, positions(model) or max_new_tokens),  # the start is read, the last one isn't
            max_length=None,
            min_length=0,
            num_beams=manner.beams,
            do_sample=False,
            early_stopping=False,
            length_penalty=manner.length_penalty,
            no_repeat_ngram_size=manner.no_repeat_ngram_size,
            decoder_start_token_id=begin.start,
            forced_bos_token_id=begin.forced,
        )
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
