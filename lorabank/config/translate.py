"""From a raw tree (YAML, flags) to settings by section: own keys, shorthands, other tools' keys. No value is typed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from lorabank.config import aliases
from lorabank.config.convert import OptimizerSteps
from lorabank.config.tasks import TASK_SECTIONS, TASK_SHORTHANDS
from lorabank.config.train import AdapterRun, DataConfig, EvalConfig, SaveConfig, TrainConfig
from lorabank.errors import ConfigError, Setting, closest
from lorabank.wording import counted

SECTIONS: dict[str, type] = {
    "run": TrainConfig,
    "data": DataConfig,
    "adapter": AdapterRun,
    "eval": EvalConfig,
    "save": SaveConfig,
    **TASK_SECTIONS,
}
PLACES = {"run": "", "adapter": "defaults."} | {name: f"{name}." for name in SECTIONS if name not in ("run", "adapter")}
"""Where a section's settings stand in a file."""
NESTED = ("data", "defaults", "adapters", "eval", "save", *TASK_SECTIONS)

_FIELDS = {section: frozenset(f.name for f in fields(kind)) for section, kind in SECTIONS.items()}


def _shorthands() -> dict[str, str]:
    """Settings whose name says where they belong, so that they may stand at the top: name to section."""
    homes = dict(TASK_SHORTHANDS)
    for section in ("eval", "data", "adapter"):  # the later wins: `batch_size` at the top is the adapters'
        homes |= dict.fromkeys(_FIELDS[section], section)
    for name in ("every", "keep", "early_stopping", "best"):
        homes.pop(name, None)
    homes |= {"early_stopping": "eval", "language": "speech"}
    return {name: section for name, section in homes.items() if name not in _FIELDS["run"]}


SHORTHANDS = _shorthands()


@dataclass
class Settings:
    """Untyped settings in our names, with the key that each came from."""

    values: dict[str, dict[str, object]] = field(default_factory=lambda: {section: {} for section in SECTIONS})
    adapters: dict[str, dict[str, object]] = field(default_factory=dict)
    origins: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    foreign_ranks: dict[str, str] = field(default_factory=dict)
    """Place to the key of another tool that set a rank there."""


def translate(tree: Mapping[object, object], *, prefix: str = "", quiet: bool = False) -> Settings:
    """Sort a raw tree into sections. `prefix` (`--` for flags) goes before places in messages.

    Raises ConfigError for an unknown key (with the closest known), a refused one, or two keys that set the same.
    """
    settings = Settings()
    top: dict[object, object] = {}
    for key, value in tree.items():
        name = _normal(key, prefix)
        if name == "adapters":
            _adapters(value, settings, prefix)
        elif name in NESTED:
            section = "adapter" if name == "defaults" else name
            if name == "data" and isinstance(value, str):
                value = {"train": value}
            _section(_mapping(value, prefix + name), section, f"{prefix}{name}.", settings, settings.values)
        else:
            top[key] = value
    _section(top, "run", prefix, settings, settings.values, quiet=quiet)
    return settings


def _adapters(value: object, settings: Settings, prefix: str) -> None:
    if value is None:
        return
    for name, entry in _mapping(
        value, f"{prefix}adapters", "names with settings, such as {formal: {data: formal.jsonl}}"
    ).items():
        if not isinstance(name, str):
            raise ConfigError(Setting(f"{prefix}adapters"), f": expected names, got {name!r}. Put it in quotes if it is one.")
        own: dict[str, dict[str, object]] = {section: {} for section in SECTIONS}
        place = f"{prefix}adapters.{name}"
        _section(_mapping(entry, place), "adapter", f"{place}.", settings, own)
        settings.adapters[name] = own["adapter"]


def _section(
    raw: Mapping[object, object],
    section: str,
    place: str,
    settings: Settings,
    target: dict[str, dict[str, object]],
    *,
    quiet: bool = False,
) -> None:
    def put(found: Mapping[str, object], key: str) -> None:
        for path, value in found.items():
            home, _, name = path.partition(".")
            if section not in ("run", home):
                raise ConfigError(Setting(place + key), f": belongs to `{PLACES[home]}{name}`, not here")
            slot = (home if home != "adapter" or section == "run" else place, name)
            if home == "adapter" and place.endswith("defaults."):
                slot = ("adapter", name)
            if slot in settings.origins and target[home].get(name) != value:
                raise ConfigError(
                    Setting(place + key),
                    " and ",
                    Setting(settings.origins[slot]),
                    " both set ",
                    Setting(_ours(path, section, place)),
                    ". Keep one of them.",
                )
            settings.origins[slot] = place + key
            target[home][name] = value

    for key, value in raw.items():
        name = _normal(key, place)
        try:
            if name in _FIELDS[section]:
                convert = aliases.OWN.get((section, name))
                put(convert(value) if convert else {f"{section}.{name}": value}, name)
            elif name in aliases.ALIASES:
                _alias(name, value, section, place, settings, put)
            elif name in aliases.CHECKED:
                aliases.CHECKED[name](value)
                settings.notes.append(f"{place}{name}: read, changes nothing")
            elif name in aliases.REFUSED:
                if not _is_off(value):
                    raise ConfigError(aliases.REFUSED[name])
            elif name in aliases.IGNORED:
                settings.notes.append(f"{place}{name}: has no effect, since {aliases.IGNORED[name]}")
            elif section == "run" and name in SHORTHANDS:
                home = SHORTHANDS[name]
                own = aliases.OWN.get((home, name))
                put(own(value) if own else {f"{home}.{name}": value}, name)
                if not quiet:
                    settings.notes.append(f"{place}{name}: read as {PLACES[home]}{name}")
            else:
                raise ConfigError(_unknown(name, section))
        except ConfigError as error:
            if error.settings:  # it has its place already
                raise
            raise ConfigError(Setting(place + name), ": ", *error.parts) from None


def _alias(
    name: str, value: object, section: str, place: str, settings: Settings, put: Callable[[Mapping[str, object], str], None]
) -> None:
    alias = aliases.ALIASES[name]
    found = alias.convert(value) if alias.convert else {alias.to: value}
    put(found, name)
    said = ", ".join(f"{_ours(path, section, place)} = {_shown(part)}" for path, part in found.items())
    settings.notes.append(
        f"{place}{name} ({alias.tool}): read as {said}" if said else f"{place}{name} ({alias.tool}): changes nothing"
    )
    if alias.to == "adapter.rank":
        settings.foreign_ranks[place] = name


def _ours(path: str, section: str, place: str) -> str:
    home, _, name = path.partition(".")
    name = {"beta1": "betas[0]", "beta2": "betas[1]"}.get(name, name)
    return f"{PLACES[home] if section == 'run' else place.removeprefix('--')}{name}"


def _shown(value: object) -> str:
    return counted(value.steps, "optimizer step") if isinstance(value, OptimizerSteps) else str(value)


def _unknown(name: str, section: str) -> str:
    if moved := aliases.MOVED.get((section, name)):
        return f"is `{moved}` now, for every task: drop or stop"
    known = set(_FIELDS[section]) | set(aliases.ALIASES) | (set(SHORTHANDS) if section == "run" else set())
    hint = closest(name, _FIELDS[section]) or closest(name, known)
    elsewhere = [f"`{PLACES[home]}{name}`" for home, names in _FIELDS.items() if name in names and home != section]
    if elsewhere:
        return f"unknown here; there is {' and '.join(elsewhere)}"
    return f"unknown setting{hint}"


def _is_off(value: object) -> bool:
    if isinstance(value, str):
        return value.lower() in ("", "false", "no", "off", "none", "null", "0")
    return not value


def _mapping(value: object, place: str, expected: str = "settings") -> Mapping[object, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(Setting(place), f": expected {expected}, got {value!r}")
    return value


def _normal(key: object, place: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(Setting(place) if place else "configuration", f": expected the name of a setting, got {key!r}")
    return key.replace("-", "_")
