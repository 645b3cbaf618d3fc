"""What recomputation keeps beside a block's inputs where it waits on the host: the way `attention` of `KEEPS` in grouping.py.

Kept are what attention gave (with what its own backward takes, like the log-sum-exp) and the hidden state behind the product that
follows it. So neither is computed again: only what comes before the attention, and what comes after that hidden state. Both are
found in the traced graph by how its operations depend on one another, so no family is named here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import custom_graph_pass
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import is_sym_node
from torch.utils.checkpoint import CheckpointPolicy

from lorabank.notices import warn_once

Halves = tuple[GraphModule, GraphModule]
_BASE: Any = getattr(custom_graph_pass, "CustomPartitionerFn", object)
SUPPORTED = _BASE is not object
"""Whether this torch lets inductor's partitioner be replaced. Without, blocks keep their inputs alone."""
_aten = torch.ops.aten
_PRODUCTS = frozenset(
    {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.linear, _aten.matmul, _aten._scaled_mm}
)
_VIEWS = frozenset(
    {_aten.view, _aten._unsafe_view, _aten.reshape, _aten.permute, _aten.transpose, _aten.t, _aten.expand, _aten.alias,
     _aten.slice, _aten.select, _aten.squeeze, _aten.unsqueeze, _aten.as_strided, _aten.split, _aten.detach}
)  # fmt: skip


class KeepAttention(_BASE):
    """How the joint graph of a block is divided; in the place of torch's own partitioner, which does the work behind tags.

    A graph without an attention that is one operation keeps its inputs, as `KEEPS["inputs"]` does.
    """

    def __call__(self, graph_module: GraphModule, joint_inputs: Sequence[object], **given: Any) -> Halves:
        """(forward, backward)"""
        kept = kept_nodes(graph_module, given["num_fwd_outputs"])
        if kept:
            _tag(graph_module, kept)
            try:
                return _halves(1.0, graph_module, joint_inputs, given)
            except RuntimeError as error:
                warn_once(f"compile: blocks keep their inputs alone, and recompute more: {str(error).splitlines()[0]}")
        return _halves(0.0, graph_module, joint_inputs, given)  # without a budget torch doesn't look at tags

    def uuid(self) -> str:
        """What torch's caches of compiled code know it by: to be changed with what is kept."""
        return "lorabank.keeping:1"


def _halves(budget: float, graph_module: GraphModule, joint_inputs: Sequence[object], given: dict[str, Any]) -> Halves:
    with functorch_config.patch(activation_memory_budget=budget):
        return min_cut_rematerialization_partition(graph_module, joint_inputs, **given)


def kept_nodes(graph_module: GraphModule, outputs: int) -> list[Node]:
    """Every attention in forward, and for each the hidden state behind the product that follows it, where there is one."""
    given_back = list(next(node for node in graph_module.graph.nodes if node.op == "output").args[0])[:outputs]
    results = {node for node in given_back if isinstance(node, Node)}
    forward = _needed_for(results)
    kept: list[Node] = []
    for node in graph_module.graph.nodes:
        if node in forward and is_attention(node):
            hidden = _behind(node, forward, results)
            kept += [node] if hidden is None or hidden in kept else [node, hidden]
    return kept


def is_attention(node: Node) -> bool:
    """Whether this computes attention as one operation: torch's own, over plain or packed rows."""
    name = str(node.target)
    return isinstance(node.target, torch._ops.OpOverload) and ("attention" in name or "attn" in name) and "backward" not in name


def _needed_for(results: set[Node]) -> set[Node]:
    found, todo = set(results), list(results)
    while todo:
        fresh = [node for node in todo.pop().all_input_nodes if node not in found]
        found.update(fresh)
        todo += fresh
    return found


def _behind(attention: Node, forward: set[Node], results: set[Node]) -> Node | None:
    """The last tensor between the first product behind an attention and the next that all of the attention's effect goes through.

    In most families the sum of the block's input and of the output projection: norm and MLP read it, and the block's last sum.
    """
    order = {node: place for place, node in enumerate(node for node in attention.graph.nodes if node in forward)}
    never, reached, furthest = len(order), {attention}, -1
    products, after, found = 0, 0, None
    for node, place in order.items():
        if node is not attention and reached.isdisjoint(node.all_input_nodes):
            continue
        if is_sym_node(node):
            continue  # a size
        reached.add(node)
        products += node is not attention and _is_product(node)
        if node is not attention and furthest <= place and products:  # nothing that was reached so far is read any later
            after = after or products
            if products > after:
                break
            if _can_be_kept(node):
                found = node
        furthest = max(furthest, never if node in results else max(order[user] for user in node.users if user in order))
    return found


def _is_product(node: Node) -> bool:
    """Whether this is more than a pass over its inputs: a product of torch's, or anything that torch doesn't know."""
    target = node.target
    if target is operator.getitem:
        return False
    if isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims"):
        return target.overloadpacket in _PRODUCTS
    return True


def _can_be_kept(node: Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not None and packet not in _VIEWS and isinstance(node.meta.get("val"), torch.Tensor)


def _tag(graph_module: GraphModule, kept: Sequence[Node]) -> None:
    """Tell torch's partitioner: `kept` are saved, all else of what doesn't depend on gradients is computed again."""
    in_backward: set[Node] = set()
    left: set[Node] = set(kept)
    for node in graph_module.graph.nodes:
        given = node.all_input_nodes
        if (node.op == "placeholder" and "tangents" in str(node.target)) or not in_backward.isdisjoint(given):
            in_backward.add(node)
        elif node in kept:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            left.add(node)  # drawn: it would come out otherwise a second time
        elif node.op == "call_function" and not is_sym_node(node) and not _part_of(node, left):
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def _part_of(node: Node, left: set[Node]) -> bool:
    """Whether this is one of an operation's several results: they are what is saved of it."""
    return node.target is operator.getitem and node.args[0] in left
