"""How torch.compile divides a compiled block into forward and backward for a GPU that isn't there, as a process of its own.

    python partition_blocks.py llama all products inputs inputs:mlps inputs:fp8

Prints a JSON line for each way to keep (`:mlps`: with gated MLPs as ops of their own, `:fp8`: over an fp8 base): frozen
products, MLP ops and attentions in backward's code, bytes a token that forward keeps besides its inputs. Nothing is computed:
compiled code gives zeros of the right shapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule, Node
from triton.backends.compiler import GPUTarget

from lorabank import quantize_base
from lorabank.bank.bank import AdapterBank
from lorabank.engine.attention import own_attention
from lorabank.engine.compiling import repeated_blocks, uncompile_blocks
from lorabank.engine.fused_block import FusedBlock
from lorabank.kernels import fp8
from lorabank.kernels.gpu import border_writing, keeping, runtime
from tests.engine.tiny import make_bank, make_model

ROWS, TOKENS = 2, 40


class Target:
    """What Triton asks of a GPU to read a kernel: its generation."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def divide(bank: AdapterBank, way: str) -> dict[str, Any]:
    """What forward and backward of the model's first compiled block are made of."""
    kept, _, how = way.partition(":")
    seen: list[GraphModule] = []

    def record(graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(graph_module)
        results = _results(graph_module)

        def run(given: list[Any]) -> list[Any]:
            given.clear()
            return [_zeros(result) for result in results]

        run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]  # how torch knows that it takes a list
        return run

    halve = keeping.KeepAttention() if kept == "attention" else min_cut_rematerialization_partition
    partition = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=halve)
    torch._dynamo.register_backend(partition, name=f"divided_{kept}{how}")
    torch._dynamo.reset()
    blocks = repeated_blocks(bank.model)
    for block in blocks:
        block._compiled_call_impl = FusedBlock(block, kept=kept, borders=how == "mlps", backend=f"divided_{kept}{how}")
    body: Any = bank.model.get_submodule(bank.model.base_model_prefix)  # pyright: ignore[reportArgumentType]
    with bank.route("a"), own_attention(bank.model.modules(), torch.device("cuda"), maskless=True):
        hidden = body(input_ids=torch.ones(ROWS, TOKENS, dtype=torch.int64), use_cache=False).last_hidden_state
    hidden.float().sum().backward()
    uncompile_blocks(blocks)
    forward, backward = seen[0], next(module for module in seen if module is not seen[0] and _is_backward(module))
    saved = [node for node in _results(forward)[1:] if isinstance(node, Node) and node.op != "placeholder"]
    return {
        "kept": way,
        "mlps": _mlp_ops(backward),
        "products": _count(backward, "add_product"),
        "again": _made_again(backward),
        "attentions": sum(map(_is_attention, backward.graph.nodes)),
        "bytes": sum(_bytes_a_token(node) for node in saved),
    }


def _is_backward(module: GraphModule) -> bool:
    return any("tangents" in node.name for node in module.graph.nodes if node.op == "placeholder")


def _count(module: GraphModule, name: str) -> int:
    return sum(any(name in str(arg) for arg in node.args) for node in module.graph.nodes if "functionalized" in str(node.target))


def _made_again(backward: GraphModule) -> list[str]:
    """Sizes (in, out) of the frozen weights whose products backward computes again: those that no gradient goes into."""
    late: set[Node] = set()
    found: list[str] = []
    for node in backward.graph.nodes:
        if (node.op == "placeholder" and "tangents" in node.name) or not late.isdisjoint(node.all_input_nodes):
            late.add(node)
        elif "functionalized" in str(node.target) and any("add_product" in str(arg) for arg in node.args):
            found.append("x".join(str(int(n)) for n in node.kwargs["right"].meta["val"].shape))
    return sorted(found)


def _mlp_ops(module: GraphModule) -> list[str]:
    names = [str(node.target).split(".") for node in module.graph.nodes]
    return sorted(name[1] for name in names if name[0] == "lorabank" and name[1].startswith(("lora_mlp", "lora_gated")))


def _is_attention(node: Node) -> bool:
    return "scaled_dot_product" in str(node.target) and "backward" not in str(node.target)


def _results(module: GraphModule) -> list[Any]:
    return list(next(node for node in module.graph.nodes if node.op == "output").args[0])  # pyright: ignore[reportArgumentType]


def _zeros(result: Any) -> Any:
    if not isinstance(result, Node):
        return result
    value = result.meta["val"]
    return torch.zeros([int(n) for n in value.shape], dtype=value.dtype) if isinstance(value, torch.Tensor) else int(value)


def _bytes_a_token(node: Node) -> int:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return 0
    return int(value.numel()) * value.element_size() // (ROWS * TOKENS)


def main() -> None:
    """Divide a family's block once for each way to keep."""
    triton.runtime.driver.set_active(Target())
    vars(runtime)["missing"] = lambda device: None  # or blocks on a CPU would stay as they are
    vars(border_writing)["write"] = lambda *args: None
    family, *ways = sys.argv[1:]
    for kept in ways:
        model = make_model(family, spread=1.0).bfloat16()
        if kept.endswith(":fp8"):
            vars(fp8)["MULTIPLE"] = 16  # these blocks are tiny
            quantize_base(model, "fp8", say=lambda line: None)
        bank = make_bank(family, ("a",), model=model)
        with torch.no_grad(), bank.route("a"):
            model(input_ids=torch.ones(1, 3, dtype=torch.int64))  # every layer has been reached
        sys.stdout.write(json.dumps(divide(bank, kept)) + "\n")
        bank.detach()


if __name__ == "__main__":
    main()
