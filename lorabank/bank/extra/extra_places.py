"""Where an adapter's extras are in a model: which biases its settings mean, which rows of which tables, and whether they fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lorabank.bank.adaptable import adaptable_layers, unsupported_linear_maps
from lorabank.bank.extra.biased import is_norm
from lorabank.bank.extra.extras import BIAS, ROWS, Extras
from lorabank.bank.kinds import EMBEDDING, EXPERTS, layer_kind
from lorabank.bank.multihead import in_attention
from lorabank.bank.slices import FusedSlice
from lorabank.bank.target_parts import as_list, matches
from lorabank.bank.tied import sharers, tied_pairs, warn_apart
from lorabank.bank.wrapping import Adapted, unwrapped
from lorabank.config.adapter import AdapterConfig
from lorabank.errors import TargetError, closest
from lorabank.formats.adapter import Adapter


@dataclass(frozen=True)
class ExtraPlaces:
    """An adapter's extras in a model."""

    extras: Mapping[str, Extras] = field(default_factory=dict)
    """By path, of layers that have A and B too and of others."""
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """The modules at these paths, and at `shared`'s."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Path of a layer whose weight is an embedding's with rows of its own → the embedding's path, whose rows it reads."""

    def of(self, path: str) -> Extras:
        """Those of one place."""
        return self.extras.get(path, Extras())


def planned(
    name: str,
    model: nn.Module,
    config: AdapterConfig,
    chosen: Mapping[str, nn.Module],
    shared: Mapping[str, str],
    kept: Collection[str],
) -> ExtraPlaces:
    """What `config` asks for beside A and B in `chosen`. `kept`: names of parameters that the model trains itself.

    Raises TargetError, naming the layer, for what can't be trained there. Warns of rows of a weight that others have too.
    """
    found: dict[str, Extras] = {}
    modules: dict[str, nn.Module] = {}
    if config.lora_bias:
        for path, layer in chosen.items():
            _check_lora_bias(path, layer)
            found[path] = Extras(lora_bias=True)
    if config.bias != "none":
        for path, module in _biases(model, config, chosen, kept).items():
            if path in shared:
                raise TargetError(
                    f"bias: {path!r} reads the adapter's numbers of an embedding (ensure_weight_tying) and has a bias, which "
                    "can't be trained beside that. Leave one of them out."
                )
            found[path] = replace(found.get(path, Extras()), bias=True)
            modules[path] = module
    own = _rows(model, config)
    ends = _tied_ends(model, own)
    for path, ids in own.items():
        found[path] = replace(found.get(path, Extras()), ids=ids)
    for path in (*own, *ends):
        modules[path] = adaptable_layers(model)[path]
    _check_apart(own, ends, chosen, found)
    for path, others in sharers(adaptable_layers(model) if own else {}).items():
        if path in own and (apart := [other for other in others if other not in (*own, *ends)]):
            warn_apart(name, path, apart)
    return ExtraPlaces(found, _in_order(model, modules), ends)


def check_not_kept(model: nn.Module, kept: Collection[str], places: ExtraPlaces) -> None:
    """Raise TargetError where an adapter has rows or a bias of what trains beside the base (`kept`: names of parameters)."""
    trained = {id(p) for name, p in model.named_parameters() if name in kept}
    for path, module in places.modules.items():
        extras = places.of(path)
        for role, has in (("weight", extras.ids), ("bias", extras.bias)):
            if has and id(module._parameters.get(role)) in trained:
                what = "trainable_token_indices" if role == "weight" else "bias"
                raise TargetError(
                    f"{what}: the {role} of {path!r} trains beside the base already (keep_trainable). Leave it out of one."
                )


def places_in(model: nn.Module, adapter: Adapter) -> ExtraPlaces:
    """The extras of a trained adapter, which fits the model (`check_extras`), with their values."""
    found: dict[str, Extras] = {}
    modules: dict[str, nn.Module] = {}
    known = {**adaptable_layers(model), **_modules(model)}
    for path, bias in adapter.biases.items():
        found[path], modules[path] = Extras(bias=True, values={BIAS: bias}), known[path]
    for path, own in adapter.token_rows.items():
        before = found.get(path, Extras())
        found[path] = replace(before, ids=own.ids, values={**before.values, ROWS: own.rows})
        modules[path] = known[path]
    ends = _tied_ends(model, adapter.token_rows)
    return ExtraPlaces(found, _in_order(model, modules | {head: known[head] for head in ends}), ends)


def merged(low_rank: Extras, extras: Extras) -> Extras:
    """What a layer's own values say (a lora_bias) with what else there is in its place."""
    return Extras(
        bias=low_rank.bias or extras.bias,
        lora_bias=low_rank.lora_bias or extras.lora_bias,
        ids=low_rank.ids or extras.ids,
        values={**low_rank.values, **extras.values},
    )


def extras_misfits(model: nn.Module, adapter: Adapter) -> list[str]:
    """What of an adapter's biases and rows isn't this model's, each as a part of a sentence."""
    modules, wrong = _modules(model), list[str]()
    for path, bias in adapter.biases.items():
        there = modules[path]._parameters.get("bias") if path in modules else None
        if there is None:
            wrong.append(f"{path}.bias: the model has no such bias{closest(path, modules)}")
        elif there.shape != bias.shape:
            wrong.append(f"{path}.bias: made for {tuple(bias.shape)}, the model's is {tuple(there.shape)}")
        elif why := _no_bias_place(model, path, modules[path]):
            wrong.append(f"{path}.bias: {why}")
    for path, own in adapter.token_rows.items():
        layer = modules.get(path)
        why = f"the model has no such module{closest(path, modules)}" if layer is None else _no_table(layer)
        if layer is None or why:
            wrong.append(f"token rows of {path}: {why}")
            continue
        ids, width = layer.get_parameter("weight").shape
        if own.rows.shape[1] != width:
            wrong.append(f"token rows of {path}: made for {own.rows.shape[1]} features, the model's table has {width}")
        elif max(own.ids) >= ids:
            wrong.append(f"token rows of {path}: {_beyond(max(own.ids), ids)}")
        elif path in adapter.layers:
            wrong.append(f"token rows of {path}: it has A and B there too, which don't go together")
    asked = adapter.config.trainable_token_indices
    ends = _tied_ends(model, adapter.token_rows)
    for end, table in ends.items():
        inside = (name for name, has in _changes(adapter).items() if any(end == at or end.startswith(f"{at}.") for at in has))
        if what := next(inside, None):
            wrong.append(f"token rows of {table}: {end} has its weight and reads them, and {what} there too: leave one out")
    held = {*adapter.token_rows, *ends}
    for name in asked if isinstance(asked, Mapping) and adapter.token_rows else ():
        if not any(path == name or path.endswith(f".{name}") for path in held):
            wrong.append(f"token rows of {name}: trainable_token_indices names it and the adapter has none: it is incomplete")
    if lacking := _lacking_biases(modules, adapter):
        wrong.append(
            f"{lacking[0]}.bias: bias is {adapter.config.bias!r} and the adapter has none for it: it is incomplete. Fetch it "
            "again, or name the module in exclude_modules of adapter_config.json if it was left out on purpose"
        )
    for path, layer in adapter.layers.items():
        if layer.lora_bias is not None and (layer.looks_up or layer.stack or layer.attention):
            wrong.append(f"{path}: it has a lora_bias, which embeddings, stacks of experts and attention can't")
    return wrong


def _changes(adapter: Adapter) -> dict[str, Collection[str]]:
    """What goes with rows of a tied weight at none of its ends → paths of the modules where the adapter has it."""
    return {"it has A and B": adapter.layers, "its bias is trained": adapter.biases, "it is trained in full": adapter.modules}


def _lacking_biases(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    """Modules whose bias a whole file has, and this adapter hasn't.

    PEFT saves all biases of the model for bias: all, whatever it excludes, but those in modules that it saves in full. An adapter
    of a bank, which a fingerprint tells, may lack some: of parameters that went on training beside the base.
    """
    mode, exclude = adapter.config.bias, as_list(adapter.config.exclude)
    biased = [p for p, module in modules.items() if module._parameters.get("bias") is not None and p not in adapter.biases]
    if mode == "lora_only":
        adapted = adapter.adapted
        return [path for path in biased if path in adapted]
    if mode == "none" or adapter.fingerprint is not None:
        return []
    apart = tuple(f"{path}." for path in adapter.modules)
    return [
        path
        for path in biased
        if not (apart and f"{path}.".startswith(apart))
        and not {"lora_A", "lora_B"} & set(path.split("."))
        and not any(matches(part, path) for part in exclude)
    ]


def _in_order(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """As the model has them, whatever settings or a file say: an optimizer's state goes by the order of leaves."""
    return {path: modules[path] for path in _modules(model) if path in modules}


_NO_LORA_BIAS = {EMBEDDING: "an embedding", EXPERTS: "a stack of experts"}


def _check_lora_bias(path: str, layer: nn.Module) -> None:
    kind = layer_kind(layer)
    if kind is not None and (kind.storage in _NO_LORA_BIAS or in_attention(layer)):
        what = _NO_LORA_BIAS.get(kind.storage, "a projection of nn.MultiheadAttention")
        raise TargetError(
            f"lora_bias: {path!r} is {what}, whose lora_B can't have a bias. Leave it out of targets, or lora_bias."
        )


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by path; wrapped ones as they were, without what our wrappers hold beside them."""
    found: dict[str, nn.Module] = {}
    beside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if f"{path}.".startswith(beside) and beside:
            continue
        if isinstance(module, Adapted):
            beside = (*beside, f"{path}.lora.".lstrip("."))
        found[path] = unwrapped(module)
    return found


def _biases(
    model: nn.Module, config: AdapterConfig, chosen: Mapping[str, nn.Module], kept: Collection[str]
) -> dict[str, nn.Module]:
    """Modules whose bias is trained, by path."""
    known = _modules(model)
    exclude = as_list(config.exclude)
    adapted = (path.rpartition(".")[0] if isinstance(layer, FusedSlice) else path for path, layer in chosen.items())
    wanted = dict.fromkeys(adapted) if config.bias == "lora_only" else known
    attentions = [path for path, module in known.items() if isinstance(module, nn.MultiheadAttention)]
    found: dict[str, nn.Module] = {}
    for path in wanted:
        within = next((attention for attention in attentions if f"{path}.".startswith(f"{attention}.")), None)
        if within is not None:
            if any(matches(part, within) for part in exclude):
                continue
            raise TargetError(
                f"bias: {config.bias!r} means those of {within!r}, an nn.MultiheadAttention, which can't be trained yet. Leave "
                "it out with exclude=[...], or leave bias out."
            )
        module = known.get(path)
        if module is None or module._parameters.get("bias") is None or f"{path}.bias".lstrip(".") in kept:
            continue
        if any(matches(part, path) for part in exclude):
            continue
        if why := _no_bias_place(model, path, module):
            raise TargetError(
                f"bias: {config.bias!r} means {path}.bias, which can't be trained: {why}. bias='lora_only' trains the biases of "
                "adapted layers, and exclude=[...] leaves modules out."
            )
        found[path] = module
    if not found:
        of = "of the adapted layers" if config.bias == "lora_only" else "of the model"
        more = ", bias='all' means those of all modules" if config.bias == "lora_only" else ""
        raise TargetError(f"bias: {config.bias!r}: no module {of} has a bias. Leave bias out{more}.")
    return found


def _no_bias_place(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why a module's bias can't be an adapter's, None where it can."""
    if path in adaptable_layers(model) or is_norm(module):
        return None if path else "the model itself is that one layer; put it into an nn.Sequential or a module of yours"
    if any(name in path.split(".") for name in ("lora_A", "lora_B")):
        return "it is another PEFT method's"
    return unsupported_linear_maps(model).get(path, f"what a {type(module).__name__} does with it isn't known")


def _rows(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Path of each table to the ids whose rows are trained."""
    asked = config.trainable_token_indices
    if not asked:
        return {}
    known = _modules(model)
    named = asked if isinstance(asked, Mapping) else {_input_embedding(model, known): asked}
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in named.items():
        paths = [path for path in known if path == name or path.endswith(f".{name}")]
        if len(paths) != 1:
            tables = [path for path, module in known.items() if isinstance(module, nn.Embedding)]
            what = "no module" if not paths else f"{len(paths)} modules ({', '.join(paths[:3])})"
            raise TargetError(
                f"trainable_token_indices: {name!r} names {what} of the model{closest(name, known)}. Its embeddings: "
                f"{', '.join(tables) or 'none'}"
            )
        if why := _no_table(known[paths[0]]):
            raise TargetError(f"trainable_token_indices: {paths[0]!r}: {why}. Name an embedding.")
        size = known[paths[0]].get_parameter("weight").shape[0]
        if max(ids) >= size:
            raise TargetError(f"trainable_token_indices: {paths[0]!r}: {_beyond(max(ids), size)}")
        found[paths[0]] = tuple(ids)
    for end, table in _ends_of(model).items():
        if end in found and table in found and found.pop(end) != found[table]:
            raise TargetError(
                f"trainable_token_indices: {end!r} and {table!r} have one weight, and other ids are named for "
                f"each. Name {table!r} alone: the other follows it."
            )
    return found


def _beyond(token: int, size: int) -> str:
    return (
        f"id {token} is outside of its {size} rows. Where tokens were added to the tokenizer, call "
        "model.resize_token_embeddings(len(tokenizer)) before attach"
    )


def _own_table(model: nn.Module, known: Mapping[str, nn.Module]) -> list[str]:
    """Path of the table that the model itself says tokens are looked up in; nothing where it doesn't say."""
    get = getattr(model, "get_input_embeddings", None)
    table = get() if callable(get) else None
    return [path for path, module in known.items() if isinstance(table, nn.Module) and module is unwrapped(table)][:1]


def _input_embedding(model: nn.Module, known: Mapping[str, nn.Module]) -> str:
    """Path of the model's table of tokens."""
    paths = _own_table(model, known)
    if not paths:
        tables = [path for path, module in known.items() if isinstance(module, nn.Embedding)]
        paths = tables if len(tables) == 1 else []
    if not paths:
        raise TargetError(
            "trainable_token_indices: which embedding holds the tokens isn't known of this model. Name it: "
            "trainable_token_indices={'embed': [ids]}"
        )
    return paths[0]


def _no_table(layer: nn.Module) -> str | None:
    """Why a module has no rows that could be an adapter's."""
    kind = layer_kind(layer)
    if kind is None or kind.storage not in (EMBEDDING, "linear"):
        return f"a {type(layer).__name__} has no rows for ids that could be trained"
    return None


def _ends_of(model: nn.Module) -> dict[str, str]:
    """Path of each layer that follows an embedding of its weight → the embedding's path.

    A head follows its embedding. Of the model's own table of tokens all follow, as in PEFT: T5's `shared` is called by nothing,
    and stands for the encoder's, the decoder's and the head's.
    """
    layers = adaptable_layers(model)
    found = tied_pairs(layers)
    for table in _own_table(model, layers):
        found |= dict.fromkeys(sharers(layers).get(table, ()), table)
    return found


def _tied_ends(model: nn.Module, own: Collection[str]) -> dict[str, str]:
    """The layers that read the rows of a table in `own` and have none themselves → the table's path."""
    if not own:
        return {}
    return {end: table for end, table in _ends_of(model).items() if table in own and end not in own}


def _check_apart(own: Collection[str], ends: Mapping[str, str], chosen: Collection[str], found: Mapping[str, Extras]) -> None:
    for path in (*own, *ends):
        if path in chosen:
            raise TargetError(
                f"trainable_token_indices: {path!r} has A and B of the adapter as well, and one of them would be lost on the "
                "other. Leave it out of targets (exclude=[...])."
            )
    for head in ends:
        if found.get(head):
            raise TargetError(
                f"trainable_token_indices: {head!r} reads the rows of {ends[head]!r}, whose weight it has, and its bias is "
                f"trained too (bias='all'). Leave {head!r} out (exclude=[...])."
            )
