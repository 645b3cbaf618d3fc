"""Weights of an adapter in a combination: one number, or one for each layer, block or part of a model.

A mapping names parts, and the first part that matches a layer gives its weight:

  - names of modules that stand next to each other in the layer's path: `mlp`, `layers.3`, `self_attn.q_proj`;
  - in them globs (`*`, `?`, `[…]`) and ranges of numbers (`layers.0-11`); `re:…` is a regular expression for a whole path;
  - `*`, every layer; layers that no part matches are an error, not a guess;
  - nested mappings join their names: `{"unet": {"down": 0.9}}` is `unet.down`. diffusers' short names are understood: `down`,
    `mid`, `up`, `block_0`, and a list for the attentions of a block;
  - kohya's names of a U-Net's blocks: `BASE` (the text encoders), `IN00` to `IN11`, `MID` or `M00`, `OUT00` to `OUT11`. A list of
    12, 17, 20 or 26 numbers gives them all, in the order of A1111's block weights.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorabank.errors import MergeError, closest

Weights = float | Mapping[str, Any] | Sequence[float]
"""A number; a mapping from parts to numbers, or to mappings and lists as diffusers has them; kohya's list of block weights."""

BLOCK_LISTS: Mapping[int, tuple[str, ...]] = {
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{n:02}" for n in range(6))),
    17: ("BASE", *(f"IN{n:02}" for n in (1, 2, 4, 5, 7, 8)), "MID", *(f"OUT{n:02}" for n in range(3, 12))),
    20: ("BASE", *(f"IN{n:02}" for n in range(9)), "MID", *(f"OUT{n:02}" for n in range(9))),
    26: ("BASE", *(f"IN{n:02}" for n in range(12)), "MID", *(f"OUT{n:02}" for n in range(12))),
}
"""How many numbers → the blocks that they are for: attention of SDXL, of SD 1 and 2; every block of SDXL, of SD 1 and 2."""
EVERY = "*"
"""Every layer that no earlier part matched; the one part that may find none left."""
_SHORT = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


def layer_weights(weights: Weights, paths: Iterable[str], who: str) -> dict[str, float]:
    """Each layer's weight. Raises MergeError for what is no finite number, parts that match nothing, layers without a part."""
    paths = list(paths)
    if not isinstance(weights, Mapping | Sequence) or isinstance(weights, str):
        return dict.fromkeys(paths, _number(weights, who))
    if isinstance(weights, Mapping):
        parts, must_match = _flat(weights, (), who), True
    else:
        parts, must_match = _blocks(weights, who), False  # a list can't leave out the blocks that this adapter hasn't
    if not parts:
        raise MergeError(f"combine: {who} names no part; expected such as {{'mlp': 0.8, '*': 0.5}}")
    found: dict[str, float] = {}
    for part, weight in parts.items():
        matched = [path for path in paths if _matches(part, path, who)]
        new = [path for path in matched if path not in found]
        if must_match and not new and part != EVERY:
            why = (
                f"leaves nothing for {part!r}: earlier parts match all its layers, and the first that matches counts"
                if matched
                else f"names {part!r}, which matches no layer of the adapter{closest(part, _names(paths))}"
            )
            raise MergeError(f"combine: {who} {why}")
        found.update(dict.fromkeys(new, weight))
    left = [path for path in paths if path not in found]
    if left:
        other = "they aren't in a U-Net's blocks; give a mapping" if not must_match else "add a last part '*' for the others"
        raise MergeError(f"combine: {who} says nothing of {len(left)} layers, such as {left[0]!r}: {other}")
    return {path: found[path] for path in paths}


def as_text(weights: Weights) -> str:
    """The weights in the command line's form, `0.7` or `mlp=0.8,*=0.5`."""
    if isinstance(weights, Mapping):
        return ",".join(f"{part}={weight:g}" for part, weight in _flat(weights, (), "weights").items())
    return ",".join(f"{weight:g}" for weight in weights) if isinstance(weights, Sequence) else f"{weights:g}"


def from_text(text: str) -> Weights:
    """`as_text`'s form. Raises MergeError."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise MergeError(f"weight {text!r}: expected a number, PART=NUMBER,… or kohya's block weights with commas")
    if "=" not in text:
        numbers = [_parsed(item, text) for item in items]
        return numbers[0] if len(numbers) == 1 else numbers
    found: dict[str, float] = {}
    for item in items:
        part, equals, weight = (side.strip() for side in item.rpartition("="))
        if not equals or not part:
            raise MergeError(f"weight {text!r}: {item!r} should be PART=NUMBER, such as mlp=0.8")
        if part in found:
            raise MergeError(f"weight {text!r}: {part!r} has two weights")
        found[part] = _parsed(weight, text)
    return found


def _parsed(item: str, text: str) -> float:
    try:
        return _number(float(item), f"{text!r}")
    except ValueError:
        raise MergeError(f"weight {text!r}: {item!r} is no number") from None


def _number(value: object, who: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MergeError(f"combine: {who} should be a number, got {value!r}")
    return float(value)


def _flat(weights: Mapping[str, Any], above: tuple[str, ...], who: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not name:
            raise MergeError(f"combine: {who}: expected names of parts, got {name!r}")
        inside = (*above, name)
        if isinstance(value, Mapping):
            found.update(_flat(value, inside, who))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found.update({".".join((*inside, f"attentions.{i}")): _number(one, who) for i, one in enumerate(value)})
        else:
            found[".".join(inside)] = _number(value, f"{who} for {'.'.join(inside)!r}")
    return found


def _blocks(weights: Sequence[float], who: str) -> dict[str, float]:
    if len(weights) not in BLOCK_LISTS:
        known = ", ".join(map(str, BLOCK_LISTS))
        raise MergeError(f"combine: {who} is a list of {len(weights)} numbers; kohya's block weights are {known}")
    names = BLOCK_LISTS[len(weights)]
    return {name: _number(weight, f"{who} for {name}") for name, weight in zip(names, weights, strict=True)}


@functools.lru_cache(maxsize=1024)
def _pattern(part: str, who: str) -> re.Pattern[str]:
    """What finds the part in a path."""
    if part.startswith("re:"):
        try:
            return re.compile(rf"\A(?:{part[3:]})\Z")
        except re.error as error:
            raise MergeError(f"combine: {who}: {part!r} is no regular expression: {error}") from error
    if part == EVERY:
        return re.compile("")
    block = _block(part)
    return re.compile(rf"(?:^|\.)(?:{block or '[.]'.join(map(_segment, part.split('.')))})(?:\.|$)")


def _matches(part: str, path: str, who: str) -> bool:
    return _pattern(part, who).search(path) is not None


def _segment(name: str) -> str:
    """A regular expression for one name of a path."""
    if numbers := re.fullmatch(r"(\d+)-(\d+)", name):
        return f"(?:{'|'.join(str(n) for n in range(int(numbers[1]), int(numbers[2]) + 1))})" if _rising(numbers) else "(?!)"
    if block := re.fullmatch(r"block_(\d+)", name):
        return f"(?:{name}|{block[1]})"
    if name in _SHORT:
        return f"(?:{name}|{_SHORT[name]})"
    return "".join(_glob(piece) for piece in re.split(r"(\*|\?|\[[^\]]+\])", name))


def _glob(piece: str) -> str:
    if piece in ("*", "?"):
        return "[^.]*" if piece == "*" else "[^.]"
    if piece.startswith("[") and piece.endswith("]"):
        return "[" + ("^" if piece[1] == "!" else "") + re.escape(piece[1:-1].removeprefix("!")).replace(r"\-", "-") + "]"
    return re.escape(piece)


def _rising(numbers: re.Match[str]) -> bool:
    return int(numbers[1]) <= int(numbers[2])


def _block(part: str) -> str | None:
    """A regular expression for kohya's name of a block, by which input and output blocks are counted through; None for others.

    Block n of a U-Net with two layers a level (SD 1, SD 2, SDXL): every third input block is a downsampler, the first `conv_in`.
    """
    if part == "BASE":
        return r"text_encoder(?:_\d+)?|text_model|te\d?"
    if part in ("MID", "M00"):
        return "mid_block"
    named = re.fullmatch(r"(IN|OUT)(\d\d)", part)
    if named is None:
        return None
    number = int(named[2])
    if named[1] == "OUT":
        level, place = divmod(number, 3)
        last = rf"|up_blocks\.{level}\.upsamplers\.0" if place == 2 else ""
        return rf"up_blocks\.{level}\.(?:attentions|resnets)\.{place}{last}"
    if number == 0:
        return "conv_in"
    level, place = divmod(number - 1, 3)
    return rf"down_blocks\.{level}\." + (r"downsamplers\.0" if place == 2 else rf"(?:attentions|resnets)\.{place}")


def _names(paths: Sequence[str]) -> set[str]:
    """What a part may have meant: every name in the paths, and the paths."""
    return {name for path in paths for name in path.split(".")} | set(paths)
