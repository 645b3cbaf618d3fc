"""What a model's name says before anything is read: closed models, hub ids, paths, aliases."""

from __future__ import annotations

import re
from pathlib import Path

from lorabank.errors import ModelError, closest

SMOLLM2 = "smollm2-135m-instruct"
WHISPER_TINY_EN = "whisper-tiny.en"
ALIASES = (SMOLLM2, WHISPER_TINY_EN)
"""Names that stand for a model which lorabank fetches from the package index; matched without regard to case."""

_CLOSED_NAMES = (
    (
        re.compile(
            r"(text-)?(davinci|babbage|curie)(-\d+)?|chat-?gpt.*|gpt-?[345](?!all|-?x|-?j|-?neo)[\w.-]*|o[134](-(mini|pro|preview))*"
        ),
        "OpenAI",
    ),
    (re.compile(r"dall-?e(-?[23])?|sora(-?\d.*)?"), "OpenAI"),
    (re.compile(r"claude[\w.-]*"), "Anthropic"),
    (re.compile(r"gemini[\w.-]*|bard|imagen[\w.-]*"), "Google"),
    (re.compile(r"midjourney[\w.-]*|mid-journey[\w.-]*"), "Midjourney"),
)
_CLOSED_OWNERS = {"openai", "anthropic", "google", "midjourney"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_not_closed(name: str) -> None:
    """Raise ModelError when `name` is a model whose weights nobody outside its owner has ('GPT-3', 'Claude 4')."""
    owner, _, model = name.strip().lower().rpartition("/")
    if owner and owner not in _CLOSED_OWNERS:
        return
    plain = re.sub(r"[\s_]+", "-", model)
    for pattern, company in _CLOSED_NAMES:
        if pattern.fullmatch(plain):
            raise ModelError(
                f"model {name!r}: {company} keeps it closed, so there are no weights to adapt. "
                f"Use an open model, such as {SMOLLM2!r} or the hub id 'Qwen/Qwen3-0.6B'."
            )


def alias(name: str) -> str | None:
    """The alias that `name` spells, in any case, or None."""
    lowered = name.strip().lower()
    return lowered if lowered in ALIASES else None


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id: `model` or `owner/model`."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def is_path(name: str) -> bool:
    """Whether `name` can only be meant as a path on this machine."""
    return (
        name.startswith(("/", "./", "../", "~", "\\"))
        or name.endswith("/")
        or name.count("/") > 1
        or name.lower().endswith(".gguf")
    )


def closest_sibling(path: Path) -> str:
    """' (did you mean 'x'?)' for the entry beside `path` with the most similar name, or ''."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    hint = closest(path.name, (entry.name for entry in parent.iterdir()))
    name = re.search(r"'(.*)'", hint)
    return f" (did you mean {str(parent / name.group(1))!r}?)" if name else ""
