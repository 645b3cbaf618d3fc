"""The command line of `train` and `preview`: a configuration file and flags over it. Every setting is a flag by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabank.config.aliases import ALIASES
from lorabank.config.coerce import field_types, is_mapping, is_switch
from lorabank.config.parse import build, read_tree
from lorabank.config.train import AdapterRun, TrainConfig
from lorabank.config.translate import PLACES, SECTIONS, SHORTHANDS, Settings, translate
from lorabank.config.typed import named_as_typed
from lorabank.errors import ConfigError, closest

COMMAND_FLAGS = ("adapter", "resume", "dry_run", "help", "debug")
SWITCHES = frozenset(name for kind in SECTIONS.values() for name, hint in field_types(kind).items() if is_switch(hint))
PATTERNS = frozenset(name for name, hint in field_types(AdapterRun).items() if is_mapping(hint))
"""Settings of an adapter that hold names with values, such as `rank_pattern`."""
_BOOLEAN_WORDS = ("true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What the command line of a run says."""

    config: TrainConfig
    notes: Sequence[str]
    """What was translated, chosen or replaced, a sentence each."""
    resume: bool | str = False
    """True: the newest checkpoint of the output folder; a text: that checkpoint."""
    dry_run: bool = False
    source: str | None = None
    """The configuration file, as it was given."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Place of each setting that a flag gave (`defaults.rank`) to that flag as it was typed, for `named_as_typed`."""


def parse_train_arguments(argv: Sequence[str]) -> TrainArguments:
    """`[FILE] [--flag value …]` as a configuration: flags win over the file, an adapter's own flag over a general one.

    Raises ConfigError for anything unknown, of the wrong type, or missing (model, data), in the flag's name where it was one.
    """
    tokens = _tokens(argv)
    settings = translate(read_tree(tokens.source)) if tokens.source else Settings()
    if tokens.resume and tokens.source and Path(tokens.source).is_dir():
        settings.values["run"]["output"] = tokens.source  # a copied or moved run goes on where it is, not where it was
    with named_as_typed(tokens.typed):
        places = _overlay(settings, tokens)
    _shortcuts(settings)
    with named_as_typed(places):
        config, notes = build(settings)
    _check_complete(config)
    return TrainArguments(
        config=config, notes=tuple(notes), resume=tokens.resume, dry_run=tokens.dry_run, source=tokens.source, flags=places
    )


@dataclass
class _Tokens:
    tree: dict[Any, object]
    adapters: dict[str, dict[Any, object]]
    typed: dict[str, str]
    """`--` and the path of each flag to the flag as it was typed."""
    source: str | None = None
    resume: bool | str = False
    dry_run: bool = False


def _tokens(argv: Sequence[str]) -> _Tokens:
    found = _Tokens(tree={}, adapters={}, typed={})
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            if token.startswith("-") and len(token) > 1:
                raise ConfigError(f"{token}: unknown flag. Flags begin with two dashes, such as --rank 16")
            if found.source is not None:
                raise ConfigError(
                    f"{token!r}: one configuration file is enough, and {found.source!r} was given. Is a flag's name missing?"
                )
            found.source = token
            continue
        flag, has_value, value = token[2:].partition("=")
        path = flag.replace("-", "_").split(".")
        if flag.startswith("adapters."):  # an adapter's name keeps its dashes
            path = ["adapters", *_adapter_path(flag.split(".")[1:])]
        if path == ["resume"]:
            found.resume = (
                value
                if has_value
                else _optional(rest, lambda word: not word.endswith((".yaml", ".yml", ".json", ".toml"))) or True
            )
        elif path == ["dry_run"]:
            found.dry_run = True
        elif path == ["adapter"]:
            _adapter_flag(value if has_value else _required(rest, token), found)
        else:
            path = _assign(path, value if has_value else None, rest, found.tree, token)
            found.typed["--" + ".".join(path)] = f"--{flag}"
    return found


def _adapter_path(parts: list[str]) -> list[str]:
    """An adapter's name, which may hold dots, and the setting behind it: the last part, or a pattern and its layer."""
    plain = [part.replace("-", "_") for part in parts]
    cut = next((i for i in range(1, len(plain) - 1) if plain[i] in PATTERNS), len(plain) - 1)
    if cut == 0:
        return parts
    return [".".join(parts[:cut]), plain[cut], *([".".join(parts[cut + 1 :])] if parts[cut + 1 :] else [])]


def _assign(path: list[str], value: str | None, rest: list[str], tree: dict[Any, object], token: str) -> list[str]:
    """Put a flag's value into the tree; returns the path of the setting that it is."""
    name = path[-1]
    if value is None and name.startswith("no_") and name[3:] in SWITCHES and name not in ALIASES:
        path, value = [*path[:-1], name[3:]], "false"
    if value is None:
        _check_known(path, token)
        if name in SWITCHES:
            value = _optional(rest, lambda word: word.lower() in _BOOLEAN_WORDS) or "true"
        elif name in ALIASES and (not rest or rest[0].startswith("--")):
            value = "true"  # other tools' switches, such as --bf16
        else:
            value = _required(rest, token)
    for part in path[:-1]:
        branch = tree.setdefault(part, {})
        if isinstance(branch, str) and part == "data":  # --data FILE --data.max-length 512
            tree[part] = branch = dict[Any, object](train=branch)
        if not isinstance(branch, dict):
            raise ConfigError(f"{token}: --{part} was given a value of its own ({branch!r})")
        tree = branch
    if path == ["data"]:
        branch = tree.get("data")
        if isinstance(branch, dict):
            branch["train"] = value
        else:
            tree["data"] = value
        return ["data", "train"]
    tree[path[-1]] = value
    return path


def _check_known(path: list[str], token: str) -> None:
    """A misspelt flag is named before its value is missed."""
    translate_names = set(ALIASES) | set(SHORTHANDS) | set(field_types(TrainConfig)) | {"val", "test"}
    if len(path) == 1 and path[0] not in translate_names:
        try:
            translate({path[0]: "x"}, prefix="--", quiet=True)
        except ConfigError as error:
            hint = closest(path[0], translate_names | set(COMMAND_FLAGS)).replace("_", "-").replace("mean '", "mean '--")
            reason = str(error).partition(": ")[2]
            raise ConfigError(
                f"{token}: unknown flag{hint}" if reason.startswith("unknown setting") else f"{token}: {reason}"
            ) from None


def _optional(rest: list[str], accept: Any) -> str | None:
    return rest.pop(0) if rest and not rest[0].startswith("--") and accept(rest[0]) else None


def _required(rest: list[str], token: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"{token}: expected a value after it, got {rest[0] if rest else 'nothing'}")
    return rest.pop(0)


def _adapter_flag(text: str, found: _Tokens) -> None:
    """`formal,data=f.jsonl,targets=q,v,rank=16`; a part without `=` belongs to the value before it."""
    parts = re.split(r",(?![^\[{]*[\]}])", text)
    start = "--adapter " if "=" in parts[0] else f"--adapter {parts[0]},"
    name = "default" if "=" in parts[0] else parts.pop(0)
    if name in found.adapters:
        raise ConfigError(
            f"--adapter {text}: there is an adapter {name!r} already. Give each a name of its own, all its settings in one flag."
        )
    entry = found.adapters[name] = {}
    key = None
    for part in parts:
        head, equals, value = part.partition("=")
        if equals:
            key = head.strip().replace("-", "_")
            entry[key] = value
        elif key is None:
            raise ConfigError(f"--adapter {text}: expected key=value after the name, got {part!r}")
        else:
            entry[key] = f"{entry[key]},{part}"
        typed = f"--adapters.{name}.{key}"
        found.typed[typed] = start + part if equals else f"{found.typed[typed]},{part}"


def _overlay(settings: Settings, tokens: _Tokens) -> dict[str, str]:
    """Put the flags over the file's settings; returns the place of each setting that they gave to the flag as it was typed."""
    flags = translate(tokens.tree, prefix="--", quiet=True)
    own = translate({"adapters": tokens.adapters}, prefix="--") if tokens.adapters else Settings()
    for section, values in flags.values.items():
        settings.values[section].update(values)
    for name in flags.values["adapter"]:
        flag = flags.origins.get(("adapter", name), "")
        if flag.startswith("--defaults."):
            continue
        for adapter, entry in settings.adapters.items():
            if name in entry:
                settings.notes.append(
                    f"{tokens.typed.get(flag, flag)} replaces adapters.{adapter}.{name} ({entry.pop(name)}) of the file"
                )
    if "train" in flags.values["data"] and settings.adapters and all("data" in entry for entry in settings.adapters.values()):
        first = next(iter(settings.adapters))
        raise ConfigError(
            f"--data: every adapter of the file has data of its own. Use --adapters.{first}.data FILE, or leave --data out."
        )
    for source in (flags, own):
        settings.notes += source.notes
        settings.foreign_ranks |= source.foreign_ranks
        for adapter, entry in source.adapters.items():
            if source is flags and tokens.source and adapter not in settings.adapters and adapter not in own.adapters:
                hint = closest(adapter, settings.adapters)
                raise ConfigError(f"--adapters.{adapter}: the file has no such adapter{hint}. `--adapter {adapter},…` adds one.")
            settings.adapters.setdefault(adapter, {}).update(entry)
    return _places(settings, [flags, own], tokens.typed)


def _places(settings: Settings, sources: Sequence[Settings], typed: Mapping[str, str]) -> dict[str, str]:
    """Where messages may find what the flags of `sources` gave, also through what adapters take over from the defaults."""
    places: dict[str, str] = {}
    for source in sources:
        found: dict[str, str] = {}
        for (home, name), key in source.origins.items():
            section = PLACES[home] if home in PLACES else home.removeprefix("--")
            place = section + ("betas" if name in ("beta1", "beta2") else name)
            found[place] = f"{found[place]} and {typed.get(key, key)}" if place in found else typed.get(key, key)
        places |= found
    if "eval.early_stopping" in places and "early_stopping" not in settings.values["adapter"]:
        places["defaults.early_stopping"] = places["eval.early_stopping"]
    general = {place.partition(".")[2]: flag for place, flag in places.items() if place.startswith(PLACES["adapter"])}
    for adapter, entry in (settings.adapters or {"default": {}}).items():
        inherited = {f"adapters.{adapter}.{name}": flag for name, flag in general.items() if name not in entry}
        places = {**inherited, **places}
    return places


def _shortcuts(settings: Settings) -> None:
    """An output folder where none was named."""
    if settings.values["run"].get("output"):
        return
    data = settings.values["data"].get("train") or next(
        (entry["data"] for entry in settings.adapters.values() if entry.get("data")), None
    )
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(str(data)).stem) if data else "run"
    settings.values["run"]["output"] = f"out/{stem or 'run'}"
    settings.notes.append(f"output: out/{stem or 'run'} (not named; --output FOLDER changes it)")


def _check_complete(config: TrainConfig) -> None:
    if not config.model:
        raise ConfigError(
            "model: missing. Name the base with --model (a hub id such as Qwen/Qwen3-0.6B, or a folder), or `model:` in the file."
        )
    runs: Mapping[str, Any] = config.adapters or {"default": config.defaults}
    for name, run in runs.items():
        if not (run.data or config.data.train):
            which = f"adapter {name!r} has no data. " if config.adapters else ""
            raise ConfigError(
                f"data: missing. {which}Name the training rows with --data FILE.jsonl, or `data: {{train: FILE}}` in the file."
            )


def flag_places() -> dict[str, type]:
    """Prefix of every section's flags to its dataclass, for the list of all settings."""
    return {PLACES[section]: kind for section, kind in SECTIONS.items()}
