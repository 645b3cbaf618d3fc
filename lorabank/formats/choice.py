"""Folders that hold several adapters: which one is meant, by `folder:name` or by the folder itself.

PEFT writes the adapter called `default` into the folder that it is given, and each other one into a subfolder of its name.
Trainers leave folders of folders too: `checkpoint-500`, `last`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from lorabank.errors import AdapterFileError, closest
from lorabank.notices import warn_once

MARK = "adapter_config.json"
"""The file that makes a folder an adapter's."""
DEFAULT = "default"
"""PEFT's name of the adapter in the folder itself."""
_STAGE = re.compile(r"last|(checkpoint|step)-\d+")
"""Folders beside an adapter that hold the same one at another time of its training."""
_SHOWN = 6


def adapters_in(folder: Path) -> dict[str, Path]:
    """Name → folder of the adapters in `folder`, `default` for one in the folder itself, other stages of it left out.

    Where there is none, those two levels down are named by their relative paths: checkpoints lie in a folder of their own.
    """
    own = {DEFAULT: folder} if (folder / MARK).is_file() else {}
    inside = {path.parent.relative_to(folder).as_posix(): path.parent for path in folder.glob(f"*/{MARK}")}
    if not own and not inside:
        inside = {path.parent.relative_to(folder).as_posix(): path.parent for path in folder.glob(f"*/*/{MARK}")}
    kept = {name: inside[name] for name in sorted(inside, key=_in_order) if not (own and _STAGE.fullmatch(name))}
    return {**own, **{name: path for name, path in kept.items() if name not in own}}


def chosen(source: Path) -> Path:
    """The path that `source` means: itself where it exists, else the folder of `folder:name`.

    Raises AdapterFileError for a name that the folder doesn't hold, listing those that it does.
    """
    before, mark, name = str(source).rpartition(":")
    if source.exists() or not mark or not before or not Path(before).is_dir():
        return source
    folder = Path(before)
    found = adapters_in(folder)
    if name not in found:
        has = f"It holds {listed(found)}" if found else "It holds no adapters"
        raise AdapterFileError(f"{folder}: holds no adapter {name!r}{closest(name, found)}. {has}.")
    return found[name]


def say_which(folder: Path) -> None:
    """Warn, once for a folder, where it holds other adapters beside the one in it, which is the one that is read."""
    found = adapters_in(folder)
    others = [name for name, path in found.items() if path != folder] if found.get(DEFAULT) == folder else []
    if others:
        warn_once(
            f"{folder}: the adapter in the folder itself is taken (PEFT calls it 'default'). It holds others too: "
            f"{listed(others)}. To take one of them: {folder}:{others[0]}."
        )


def only_inside(folder: Path) -> str | None:
    """What to say of a folder that isn't an adapter's and holds some; None where it holds none."""
    found = adapters_in(folder)
    if not found or found.get(DEFAULT) == folder:
        return None
    what = f"holds {len(found)} adapters" if len(found) > 1 else "holds an adapter in a folder of its own"
    last = list(found)[-1] if all(_STAGE.fullmatch(Path(name).name) for name in found) else next(iter(found))
    return f"{folder}: {what}: {listed(found)}. Load one, such as {found[last]}, or {folder}:{last}."


def listed(names: Collection[str] | Mapping[str, object]) -> str:
    """The first names, and how many more there are."""
    shown = list(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _in_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """`checkpoint-1000` after `checkpoint-500`."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part)
