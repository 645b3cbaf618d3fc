"""Where an adapter's weights start: random A and zero B, or another adapter's (`init_from`)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lorabank.bank.bank import AdapterBank, all_layers, saved_modules
from lorabank.bank.extra.extra_places import merged, places_in
from lorabank.bank.fit import at_home
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import FingerprintError, TargetError
from lorabank.formats.adapter import Adapter
from lorabank.kernels.native import library
from lorabank.training.events import Notice
from lorabank.training.jobs import AdapterJob
from lorabank.training.prepared import Original, prepared
from lorabank.training.task import Task

_ABOUT_LAYERS = ("targets", "exclude", "layers:", "rank_pattern", "alpha_pattern", "modules_to_save")
"""How the bank's messages begin that are about a setting."""


def add_adapter(bank: AdapterBank, name: str, job: AdapterJob, original: Original, task: Task[Any]) -> list[Notice]:
    """Add the adapter of a job to the bank. Returns what the user should know: the bank's warnings, settings that gave way.

    `original`: loads the model as it was before quantisation, for adapters that start from what that took.
    """
    notices: list[Notice] = []
    with warnings_as(notices, adapter=name):
        library.loaded()  # compiled now, if ever: a warning in the middle of training would tear the progress display
        told = _add(bank, name, job, original, task)
    return [*notices, Notice(text=told, adapter=name)] if told else notices


@contextlib.contextmanager
def warnings_as(notices: list[Notice], *, adapter: str | None = None) -> Iterator[None]:
    """Append to `notices` what warns inside; about an adapter, if it is one's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for item in caught:
        if issubclass(item.category, UserWarning):
            text = str(item.message).removeprefix(f"adapter {adapter!r}: ")
            notices.append(Notice(text=text, adapter=adapter, level="warning"))
        else:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


def _add(bank: AdapterBank, name: str, job: AdapterJob, original: Original, task: Task[Any]) -> str | None:
    wanted = job.run.adapter_config()
    if job.run.init_from is None:
        try:
            bank.add(name, prepared(bank, name, job, original, task), seed=job.seed, num_labels=task.labels(name))
        except TargetError as error:  # the bank knows the setting, not where it stands
            place = f"adapters.{name}." if str(error).startswith(_ABOUT_LAYERS) else f"adapter {name!r}: "
            raise TargetError(f"{place}{error}") from error
        return None
    start = Adapter.load(job.run.init_from)
    difference = None if start.fingerprint is None else start.fingerprint.compare(bank.fingerprint)
    if difference is not None:
        of = f" ({start.base_model})" if start.base_model else ""
        raise FingerprintError(
            f"adapters.{name}.init_from: {job.run.init_from} was trained on another base model{of}: {difference}. "
            "Start from an adapter of this base, or leave init_from out."
        )
    bank.load(name, replace(start, config=replace(start.config, dropout=wanted.dropout)), seed=job.seed)
    return f"starts from {job.run.init_from}: {_shape(start.config)}, as in that file{_gave_way(wanted, start.config)}"


def _shape(config: AdapterConfig) -> str:
    targets = config.targets if isinstance(config.targets, str) else ", ".join(config.targets)
    return f"{'DoRA, ' if config.use_dora else ''}rank {config.rank}, alpha {config.alpha:g}, targets {targets}"


_EXTRAS = ("bias", "lora_bias", "trainable_token_indices")


def _gave_way(wanted: AdapterConfig, found: AdapterConfig) -> str:
    names = ("rank", "alpha", "targets", "use_rslora", "use_dora", "ensure_weight_tying", "modules_to_save", *_EXTRAS)
    plain = AdapterConfig()
    asked = [name for name in names if getattr(wanted, name) not in (getattr(plain, name), getattr(found, name))]
    return f" (the settings {', '.join(asked)} of this run give way to it)" if asked else ""


def restart_adapter(bank: AdapterBank, name: str, job: AdapterJob) -> None:
    """Set an adapter's values back to where they started."""
    if job.run.init_from is None:
        bank.restart(name)
        return
    start = at_home(bank.model, Adapter.load(job.run.init_from))
    for layer in all_layers(bank):
        slot = layer.slots.get(name)
        if slot is not None and not slot.shared:
            values = layer.values_of(start.layers)
            more = places_in(bank.model, start).of(layer.path)
            layer.write(name, values._replace(extras=merged(values.extras, more)))
    saved = saved_modules(bank)
    saved.write(name, saved.fitting(name, start))


def adapter_is_finite(bank: AdapterBank, name: str) -> bool:
    """Whether every value of the adapter is a number."""
    return all(bool(leaf.isfinite().all()) for leaf in bank.parameters(name))
