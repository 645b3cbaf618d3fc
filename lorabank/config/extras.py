"""What an adapter trains beside A and B, as settings: biases, a bias of lora_B, rows of an embedding. Checks of their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorabank.errors import ConfigError, Setting

BIAS_MODES = ("none", "all", "lora_only")
TokenIndices = Sequence[int] | Mapping[str, Sequence[int]]


def frozen_indices(value: object) -> TokenIndices:
    """`trainable_token_indices` with tuples of ids, as it is kept. Raises ConfigError for what is no id, or stands twice."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str) or not name:
                raise ConfigError(
                    _SETTING, f": expected names of embeddings with ids, such as {{embed_tokens: [5]}}, got {name!r}"
                )
        return {str(name): _ids(ids, f"[{name!r}]") for name, ids in value.items() if not _empty(ids)}
    return _ids(value, "")


_SETTING = Setting("trainable_token_indices")


def _empty(ids: object) -> bool:
    return isinstance(ids, Sequence) and len(ids) == 0


def _ids(ids: object, part: str) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise ConfigError(_SETTING, f"{part}: expected a list of token ids, got {ids!r}")
    seen: set[int] = set()
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ConfigError(
                _SETTING,
                f"{part}: expected token ids ≥ 0, got {token!r}. tokenizer.convert_tokens_to_ids(...) gives a token's id.",
            )
        if token in seen:
            raise ConfigError(_SETTING, f"{part}: id {token} stands there twice. Name each id once.")
        seen.add(token)
    return tuple(ids)


def check_extras(bias: object, lora_bias: bool, use_dora: bool) -> None:
    """Raise ConfigError for values that don't go together."""
    if bias not in BIAS_MODES:
        raise ConfigError(
            Setting("bias"),
            f": expected one of {', '.join(BIAS_MODES)}, got {bias!r}. lora_only trains the biases of adapted layers, all "
            "those of every module.",
        )
    if lora_bias and use_dora:
        raise ConfigError(
            Setting("lora_bias"),
            ": goes with plain LoRA only, and use_dora is on. bias='lora_only' trains the layers' own biases.",
        )
