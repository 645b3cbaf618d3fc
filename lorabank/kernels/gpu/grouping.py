"""Passes over a traced block: adapted layers that belong together become one op.

A gated MLP whose weights have borders becomes `lorabank::lora_mlp_open` and `lora_mlp_close`, one over an fp8 base
`lora_gated_open` and `lora_gated_close`; layers that read the same x become one `lorabank::lora_joined` where their weights have
borders, else one `lorabank::lora_linears`. The passes look at the graph alone, so they serve every model whose block has such
layers, and leave the others as they are.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch._dynamo import lookup_backend
from torch.fx import Graph, GraphModule, Node

from lorabank.kernels.gpu import bordered_op as _bordered_op  # noqa: F401  registers lorabank::lora_mlp_open
from lorabank.kernels.gpu import gated_mlp, keeping, siblings
from lorabank.kernels.gpu import gated_op as _gated_op  # noqa: F401  registers lorabank::lora_gated_open
from lorabank.kernels.gpu import joined_op as _joined_op  # noqa: F401  registers lorabank::lora_joined
from lorabank.kernels.gpu import siblings_op as _siblings_op  # noqa: F401  registers lorabank::lora_linears

_PRODUCT_OPS = (
    torch.ops.lorabank.add_product,
    torch.ops.lorabank.add_four_bit,
    torch.ops.lorabank.four_bit_product,
    torch.ops.lorabank.lora_mlp_open,
    torch.ops.lorabank.lora_mlp_close,
    torch.ops.lorabank.lora_gated_open,
    torch.ops.lorabank.lora_gated_close,
    torch.ops.lorabank.lora_joined,
)
Backend = Callable[[GraphModule, list[Any]], Any]
_SHARED = ("order", "tiles", "chunks", "spans", "storage", "width")
_FIELDS = ("x", "base", "bias", "A", "B", "ranks", "scaling", "order", "tiles", "chunks", "spans", "storage", "width", "drops")
_OF_BATCH = 2
"""Tensors in `drops` that are the batch's; one of each layer follows."""


KEEPS: Mapping[str, Mapping[str, Any]] = {
    "all": {},
    "products": {
        "ban_recompute_used_far_apart": False,
        "ban_recompute_long_fusible_chains": False,
        "ban_recompute_materialized_backward": False,
    },
    "inputs": {"activation_memory_budget": 0.0},
    "attention": {"activation_memory_budget": 0.0},
}
"""What forward keeps for backward, as settings of torch's partitioner. `all`: whatever saves time. `products`: what products and
attention gave or need; norms and activation functions are computed again, fused into what reads them. `inputs`: nothing else;
backward computes again what it needs, which the block's last product is no part of. `attention`: inputs and what keeping.py
picks, so that attention and the product behind it aren't computed again either; the same as `inputs` but in inductor."""


KEPT_WHOLE = frozenset({"all", "products"})
"""Those of `KEEPS` with which no product is made again."""


@functools.cache
def grouping(name: str, kept: str = "all") -> Backend:
    """torch.compile's backend of that name, behind the passes. One object for the same arguments, or compiled code isn't shared.

    `kept`: one of `KEEPS`.
    """
    backend: Any = lookup_backend(name)

    def compiled(graph_module: GraphModule, inputs: list[Any]) -> Any:
        hoist_weights(graph_module)
        fuse_mlps(graph_module, again=kept not in KEPT_WHOLE)
        join_layers(graph_module)
        group_siblings(graph_module)
        with functorch_config.patch(dict(KEEPS[kept])), _dividing(kept):
            return backend(graph_module, inputs)

    if name == "inductor":
        _realize_inputs()
    return compiled


def _realize_inputs() -> None:
    """Have inductor make one tensor of what several of our products read, such as a norm's result.

    It does so for the ops that it knows to need a tensor; others it gets to know as it comes to them, which is too late for the
    first graph of a process: there each product would get a copy of its own.
    """
    try:
        from torch._inductor.lowering import add_needs_realized_inputs
    except ImportError:
        return
    for op in _PRODUCT_OPS:
        add_needs_realized_inputs(op)


def _dividing(kept: str) -> contextlib.AbstractContextManager[Any]:
    if kept != "attention" or not keeping.SUPPORTED:
        return contextlib.nullcontext()
    return inductor_config.patch(custom_partitioner_fn=keeping.KeepAttention())


def hoist_weights(graph_module: GraphModule) -> None:
    """Take the weights out of the tensors that they lie in before anything else: what reads one is free to move up then."""
    places = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    given = set(places)
    sizes = {node for node in places if isinstance(node.meta.get("example_value"), torch.SymInt)}
    for node in list(graph_module.graph.nodes):
        inputs = node.all_input_nodes
        sized = node.target == "size" and given.issuperset(inputs)
        if sized or (node.target in _OF_SIZES and inputs and sizes.issuperset(inputs)):
            sizes.add(node)
        elif node.target != "narrow" or not (given | sizes).issuperset(inputs):
            continue
        if places:
            places[-1].append(node)
        places.append(node)
    graph_module.recompile()


def fuse_mlps(graph_module: GraphModule, *, again: bool = False) -> int:
    """Put two ops in the place of every down(act(gate(x)) · up(x)) of adapted layers with borders or in fp8; returns how many.

    `again`: the block will be computed again in backward.
    """
    graph, found = graph_module.graph, 0
    for down in [node for node in graph.nodes if _is_layer(node)]:
        layers = _gate_and_up(down)
        if layers is not None and _undisturbed([*layers[:2], _end_of(layers[0], down)[0]]):
            gate, up, activation = layers
            between = _between(gate, up, down)
            replace = _replace_gated if _storage(down) == "fp8" else _replace_mlp
            replace(graph_module, gate, up, down, activation, again)
            for node in between:  # these alone: to torch.fx whatever works in place and isn't read again is dead, too
                if not node.users:
                    graph.erase_node(node)
            found += 1
    if found:
        graph.lint()
        graph_module.recompile()
    return found


def _gate_and_up(down: Node) -> tuple[Node, Node, str] | None:
    """The layers and the activation that make the input of `down`, if it is act(gate(x)) · up(x) and nothing else reads it."""
    product = down.args[0]
    if not isinstance(product, Node) or product.target not in _PRODUCTS or len(product.users) > 1 or len(product.args) != 2:
        return None
    for left, right in (product.args, product.args[::-1]):
        activation = _activation_of(left)
        if activation is None or not isinstance(left, Node) or len(left.users) > 1:
            continue
        gate, up = _layer_of(left.args[0]), _layer_of(right)
        if gate is None or up is None or gate is up or not _alike([gate, up, down]) or not _fits(gate, up, down):
            continue
        width = down.args[_FIELDS.index("width")]
        if gate.args[0] is up.args[0] and isinstance(width, int) and width <= gated_mlp.WIDEST_RANK:
            return gate, up, activation
    return None


def _undisturbed(nodes: Sequence[Node]) -> bool:
    """Whether nothing works in place from the first of the nodes to the last: what they read may be read sooner or later then."""
    order = list(nodes[0].graph.nodes)
    places = sorted(order.index(node) for node in nodes)
    return not any(map(_works_in_place, order[places[0] : places[-1]]))


def _works_in_place(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    return named or node.target in _IN_PLACE or node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True


def _between(gate: Node, up: Node, down: Node) -> list[Node]:
    """What stands between an MLP's input and its last layer, from the end on: what its ops leave without a reader."""
    product: Any = down.args[0]
    acted = next(term for term in product.args if term.target is not operator.getitem)
    results = [user for layer in (gate, up) for user in layer.users]
    return [product, acted, *results, gate, up]


def _fits(gate: Node, up: Node, down: Node) -> bool:
    """Whether the ops for an MLP take such layers: its products have no place for a bias, nor for a mask on h."""
    args: dict[str, Any] = dict(zip(_FIELDS, down.args, strict=True))
    sides = {_storage(gate), _storage(up)}
    placed = sides == {"bordered:before", "bordered:behind"} and args["storage"] == "bordered:below"
    if not (placed or sides == {"fp8"}) or args["bias"] is not None or args["drops"]:
        return False
    first, last = (_base(layer)[0].meta.get("example_value") for layer in (gate, down))  # (F, I) and (I, F): y is like x
    return isinstance(first, torch.Tensor) and isinstance(last, torch.Tensor) and first.shape[1] == last.shape[0]


def _storage(node: Node) -> str:
    return str(node.args[_FIELDS.index("storage")])


def _activation_of(node: Any) -> str | None:
    if not isinstance(node, Node) or node.op != "call_function" or len(node.args) != 1:
        return None
    if node.target is torch.nn.functional.silu and not node.kwargs.get("inplace"):
        return "silu"
    if node.target is torch.nn.functional.gelu and node.kwargs == {"approximate": "tanh"}:
        return "gelu_tanh"
    return None


def _layer_of(node: Any) -> Node | None:
    """The adapted layer whose y this is, if nothing else reads that y."""
    if not isinstance(node, Node) or node.target is not operator.getitem or node.args[1] != 0 or len(node.users) != 1:
        return None
    layer = node.args[0]
    return layer if isinstance(layer, Node) and _is_layer(layer) else None


def _is_layer(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.lorabank.lora_linear and not node.kwargs


def _alike(nodes: Sequence[Node]) -> bool:
    """Whether layers agree in what they must share: the batch's tables, storage, width, and having a bias and dropout or none."""
    return len({_shared(node) for node in nodes}) == 1


def _shared(node: Node) -> tuple[Any, ...]:
    args: dict[str, Any] = dict(zip(_FIELDS, node.args, strict=True))
    args["storage"] = args["storage"].partition(":")[0]  # where a border is makes no difference to a layer by itself
    return (*(args[name] for name in _SHARED), args["bias"] is None, len(args["base"]), *args["drops"][:_OF_BATCH])


def _replace_mlp(graph_module: GraphModule, gate: Node, up: Node, down: Node, activation: str, again: bool) -> None:
    graph, (last, like, residual) = graph_module.graph, _end_of(gate, down)
    x, bases, _, As, Bs, ranks, scalings, *shared, _, width, _ = _joined([gate, up, down])
    each = len(bases) // 3
    with graph.inserting_before(last):
        first = x, bases[: 2 * each], As[:2], Bs[:2], ranks[:2], scalings[:2], *shared, width, _storage(up) == "bordered:before"
        opened = graph.call_function(torch.ops.lorabank.lora_mlp_open, first)
        gate_NF, up_NF, *xas = (graph.call_function(operator.getitem, (opened, i)) for i in range(4))
        onto = None if residual is None else graph.call_method("flatten", (residual, 0, -2))
        given = (
            onto, gate_NF, up_NF, xas, bases[2 * each :], Bs[:2], As[2], Bs[2], ranks, scalings[2], *shared, width, activation,
            again,
        )  # fmt: skip
        closed = graph.call_function(torch.ops.lorabank.lora_mlp_close, given)
    _take_over(graph, down, last, like, closed)


def _replace_gated(graph_module: GraphModule, gate: Node, up: Node, down: Node, activation: str, again: bool) -> None:
    graph, (last, like, residual) = graph_module.graph, _end_of(gate, down)
    x, bases, _, As, Bs, ranks, scalings, *shared, _, width, _ = _joined([gate, up, down])
    each = len(bases) // 3
    with graph.inserting_before(last):
        first = x, bases[: 2 * each], As[:2], Bs[:2], ranks[:2], scalings[:2], *shared, width
        opened = graph.call_function(torch.ops.lorabank.lora_gated_open, first)
        gate_NF, up_NF, *xas = (graph.call_function(operator.getitem, (opened, i)) for i in range(4))
        onto = None if residual is None else graph.call_method("flatten", (residual, 0, -2))
        given = onto, x, gate_NF, up_NF, xas, bases, As, Bs, ranks, scalings, *shared, width, activation, again
        closed = graph.call_function(torch.ops.lorabank.lora_gated_close, given)
    _take_over(graph, down, last, like, closed)


def _end_of(gate: Node, down: Node) -> tuple[Node, Node, Node | None]:
    """(the node that an MLP ends with, a tensor of y's shape, the residual that y is added to there or None)."""
    added = _added_to(down)
    x: Any = gate.args[0]
    return (down, x, None) if added is None else (*added, added[1])


def _take_over(graph: Graph, down: Node, last: Node, like: Node, closed: Node) -> None:
    """Whoever read the layer, or the sum that it was added in, reads the op."""
    with graph.inserting_after(closed):
        y, xa = (graph.call_function(operator.getitem, (closed, i)) for i in range(2))
    with graph.inserting_after(y):
        y = graph.call_method("view_as", (y, like))
    if last is not down:
        last.replace_all_uses_with(y)
        graph.erase_node(last)
    for user in list(down.users):
        user.replace_all_uses_with(y if user.args[1] == 0 else xa)
        graph.erase_node(user)
    graph.erase_node(down)


def _added_to(down: Node) -> tuple[Node, Node] | None:
    """(the sum, its other term) if all that becomes of a layer's y is a sum with another tensor like it, a residual."""
    results = [user for user in down.users if user.args[1] == 0]
    if len(results) != 1 or len(results[0].users) != 1:
        return None
    total, y = next(iter(results[0].users)), results[0]
    if total.op != "call_function" or total.target not in _SUMS or total.kwargs or len(total.args) != 2:
        return None
    other = next((term for term in total.args if term is not y), None)
    like, mine = (node.meta.get("example_value") if isinstance(node, Node) else None for node in (other, y))
    if not isinstance(other, Node) or not isinstance(like, torch.Tensor) or not isinstance(mine, torch.Tensor):
        return None
    return (total, other) if like.dtype == mine.dtype and like.shape == mine.shape and like.ndim > 1 else None


def _joined(nodes: Sequence[Node]) -> tuple[Any, ...]:
    """The arguments of an op for all of the layers. Of their x it takes the first."""
    columns: list[list[Any]] = [list(column) for column in zip(*(node.args for node in nodes), strict=True)]
    x, bases, biases, As, Bs, ranks, scalings, *shared, drops = columns
    flat = [tensor for base in bases for tensor in base]
    joint = [*drops[0][:_OF_BATCH], *(tensor for mine in drops for tensor in mine[_OF_BATCH:])]
    biases = [] if biases[0] is None else biases
    return x[0], flat, biases, As, Bs, ranks, scalings, *(column[0] for column in shared), joint


def join_layers(graph_module: GraphModule) -> int:
    """Put one op in the place of layers with joined weights, where all of them read the same x; returns how many layers."""
    graph, places = graph_module.graph, {node: i for i, node in enumerate(graph_module.graph.nodes)}
    alike: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if _is_layer(node) and _storage(node).startswith("joined:") and not node.args[_FIELDS.index("drops")]:
            alike[(node.args[0], _base(node)[2], *_shared(node))].append(node)
    joined = 0
    for nodes in alike.values():
        first = nodes[0]  # the others move up to it
        ready = all(places[arg] < places[first] for node in nodes for arg in node.all_input_nodes) and _undisturbed(nodes)
        nodes.sort(key=_storage)
        if ready and [_storage(node) for node in nodes] == [f"joined:{i}/{len(nodes)}" for i in range(len(nodes))]:
            _replace_joined(graph_module, nodes, first)
            joined += len(nodes)
    if joined:
        graph.lint()
        graph_module.recompile()
    return joined


def _base(node: Node) -> list[Node]:
    return node.args[_FIELDS.index("base")]  # pyright: ignore[reportReturnType]


def _replace_joined(graph_module: GraphModule, nodes: Sequence[Node], first: Node) -> None:
    graph, count = graph_module.graph, len(nodes)
    x, bases, biases, As, Bs, ranks, scalings, *shared, _, width, _ = _joined(nodes)
    with graph.inserting_before(first):
        op = graph.call_function(torch.ops.lorabank.lora_joined, (x, bases, biases, As, Bs, ranks, scalings, *shared, width))
        results = [graph.call_function(operator.getitem, (op, i)) for i in range(2 * count)]
    for i, node in enumerate(nodes):
        for user in list(node.users):
            user.replace_all_uses_with(results[i if user.args[1] == 0 else count + i])
            graph.erase_node(user)
        graph.erase_node(node)


def group_siblings(graph_module: GraphModule) -> int:
    """Group what can be grouped, in place; returns how many layers are in a group now."""
    graph, places = graph_module.graph, {node: i for i, node in enumerate(graph_module.graph.nodes)}
    alike: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if _is_layer(node):
            alike[(node.args[0], *_shared(node))].append(node)
    grouped = 0
    for nodes in alike.values():
        ready = [node for node in nodes if all(places[arg] < places[nodes[0]] for arg in node.all_input_nodes)]
        width = nodes[0].args[_FIELDS.index("width")]
        narrow = isinstance(width, int) and width <= siblings.WIDEST
        for start in range(0, len(ready) if narrow else 0, siblings.MOST):
            some = ready[start : start + siblings.MOST]
            if len(some) > 1 and _undisturbed(some):
                _replace_siblings(graph_module, some)
                grouped += len(some)
    if grouped:
        graph.lint()
        graph_module.recompile()
    return grouped


def _replace_siblings(graph_module: GraphModule, nodes: Sequence[Node]) -> None:
    graph, count = graph_module.graph, len(nodes)
    with graph.inserting_before(nodes[0]):
        joint = graph.call_function(torch.ops.lorabank.lora_linears, _joined(nodes))
    for i, node in enumerate(nodes):
        for user in list(node.users):  # takes y or xAᵀ off the pair: there is nothing else to do with it
            with graph.inserting_after(joint):
                result = graph.call_function(operator.getitem, (joint, i if user.args[1] == 0 else count + i))
            user.replace_all_uses_with(result)
            graph.erase_node(user)
        graph.erase_node(node)


_OF_SIZES = frozenset({operator.getitem, operator.sub})
"""What `LayerCall.base_of` is traced as, besides `size` and `narrow`."""
_PRODUCTS = (operator.mul, torch.mul)
_SUMS = (operator.add, torch.add)
_IN_PLACE = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
     operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.setitem}
)  # fmt: skip
