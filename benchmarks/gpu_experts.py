"""Mixtures of experts on one GPU: a LoRA training step over stacked expert weights, ours and PEFT's (`target_parameters`).

    python benchmarks/gpu_experts.py --output experts.json
    python benchmarks/gpu_experts.py --tiny                      # the check alone, tiny, on a CPU too

Random weights in bf16, true widths, few blocks, a vocabulary of 32,000; rank 16 on all linear layers, experts included.
`plain_ms` is ours uncompiled, our kernels switched off. `eight` is eight adapters of 512 tokens each in one pass beside eight
steps of PEFT.

Routers choose anew wherever rounding moves a token across a border, so two right results in bf16 differ by more than rounding.
What is timed is therefore checked in fp32, at its own widths on 128 tokens a row: loss and every gradient, PEFT and ours with the
grouped kernels beside ours on plain torch. In bf16 the losses are compared. A model whose check fails prints no number.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers as hf
from gpu_families import NAME, PASSES, RANK, System, own_loss, ratios
from gpu_model import ALPHA, GIB, RATE, WARM_UP, as_batch, free, spread, timed
from gpu_results import Results
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorabank as lb
from lorabank.engine.compiling import compile_blocks, uncompile_blocks
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.kernels.gpu import runtime
from lorabank.optim.slot_optimizer import SlotOptimizer

VOCABULARY, EIGHT, SHORT = 32000, 8, 512
LOSS = 0.02
"""How far losses in bf16 may differ, relative."""
_WORDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _qwen3(*, blocks: int, small: bool) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}
    if not small:  # Qwen3-30B-A3B's
        sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}
    heads = (
        {"num_attention_heads": 4, "num_key_value_heads": 2} if small else {"num_attention_heads": 32, "num_key_value_heads": 4}
    )
    config = hf.Qwen3MoeConfig(**_WORDS, **sizes, **heads, num_hidden_layers=blocks, norm_topk_prob=True, intermediate_size=64)
    return hf.Qwen3MoeForCausalLM(config)


def _mixtral(*, blocks: int, small: bool) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4, "num_attention_heads": 4}
    if not small:  # Mixtral-8x7B's
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_attention_heads": 32}
    config = hf.MixtralConfig(**_WORDS, **sizes, num_key_value_heads=2 if small else 8, num_hidden_layers=blocks)
    return hf.MixtralForCausalLM(config)


MODELS: Mapping[str, tuple[Callable[..., PreTrainedModel], int]] = {"qwen3-moe": (_qwen3, 6), "mixtral": (_mixtral, 2)}
"""Name → (what makes it, blocks)."""


def build(name: str, device: torch.device, dtype: torch.dtype, *, small: bool) -> PreTrainedModel:
    """Random weights, the same for the same model, device and dtype."""
    make, blocks = MODELS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make(blocks=2 if small else blocks, small=small).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def ours(model: PreTrainedModel, names: Sequence[str] = (NAME,), *, compiled: bool = False) -> tuple[System, lb.AdapterBank]:
    """Our engine, with adapters that already do something."""
    bank = lb.attach(model)
    for name in names:
        bank.add(name, lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets="all-linear"))
        with torch.no_grad():
            for i, leaf in enumerate(bank.parameters(name)):
                leaf.copy_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i)) * 0.02)
    engine, optimizer = Engine(bank, cuda_graphs=compiled), SlotOptimizer(bank)
    for name in names:
        optimizer.add(name)

    def run(given: Any) -> Callable[[], float]:
        found = forward_backward(engine, given["batch"])
        return lambda: found[names[0]].mean

    def update(given: Any) -> object:
        return optim_step(optimizer, dict.fromkeys(names, RATE), dict.fromkeys(names, given["summed"]))

    leaves = dict(bank.named_parameters(names[0]))
    trained = sum(leaf.numel() for leaf in bank.parameters(names[0]))
    return System(leaves=leaves, trained=trained, run=run, update=update, bank=bank, summed=True, graphs=engine.graphs), bank


def pefts(model: PreTrainedModel, adapter: lb.Adapter, folder: Path) -> System:
    """PEFT with the same adapter, read from our file, its usual way: autocast, adapters in fp32, fused AdamW."""
    import peft

    adapter.save(folder)
    half, device = next(model.parameters()).dtype != torch.float32, next(model.parameters()).device.type
    wrapped = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True, autocast_adapter_dtype=True)
    trained = {name: leaf for name, leaf in wrapped.named_parameters() if leaf.requires_grad}
    for leaf in trained.values():
        leaf.data = leaf.data.float()
    leaves: dict[str, nn.Parameter] = {}
    for path in {path.rpartition(".")[0] if layer.stack else path for path, layer in adapter.layers.items()}:
        owner = path if "experts" not in path else path.replace(".gate_up_proj", ".base_layer").replace(".down_proj", "")
        for role in "AB":
            leaves[f"{path}.{role}"] = trained[f"base_model.model.{owner}.lora_{role}.default.weight"]
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, fused=device == "cuda")

    def run(given: Any) -> Callable[[], float]:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = own_loss(wrapped, {"input_ids": given["ids"], "labels": given["ids"], "targets": given["ids"]})
        loss.backward()
        return lambda: float(loss.detach())

    def update(given: Any) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return System(leaves=leaves, trained=sum(p.numel() for p in trained.values()), run=run, update=update)


def given_of(rows: int, tokens: int, device: torch.device, names: Sequence[str] = (NAME,)) -> Any:
    """Random texts, the same each time."""
    ids = torch.randint(14, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))
    each = rows // len(names)
    return {"ids": ids.to(device), "batch": as_batch(ids, [n for n in names for _ in range(each)]), "summed": each * (tokens - 1)}


def seen(system: System, given: Any, *, theirs: bool, count: int) -> tuple[float, dict[str, Tensor]]:
    """The loss and all gradients of one pass; PEFT's in our layout."""
    read = system.run(given)
    found = {}
    for key, leaf in system.leaves.items():
        assert leaf.grad is not None
        g = leaf.grad.float()
        if theirs and key.endswith(".B"):
            g = g.view(len(g), -1, count).permute(2, 1, 0).flatten(0, 1) if "experts" in key else g.t()
        found[key] = g / (1 if theirs else given["summed"])
        leaf.grad = None
    return read(), found


def _plainly(call: Callable[[], Any]) -> Any:
    os.environ[runtime.SWITCH] = "0"
    try:
        return call()
    finally:
        del os.environ[runtime.SWITCH]


def check(name: str, device: torch.device, folder: Path, *, small: bool) -> dict[str, dict[str, float]]:
    """`ratios` in fp32, of PEFT and of ours with the kernels. Raises RuntimeError where a result is wrong."""
    given = given_of(2, 12 if small else 128, device)
    model = build(name, device, torch.float32, small=small)
    count = next(p.shape[0] for p in model.parameters() if p.ndim == 3)
    system, bank = ours(model)
    plain = _plainly(lambda: seen(system, given, theirs=False, count=count))
    others = {"ours": seen(system, given, theirs=False, count=count)} if runtime.available(device) else {}
    adapter = bank.adapter(NAME)
    bank.detach()
    theirs = pefts(model, adapter, folder)
    others["peft"] = seen(theirs, given, theirs=True, count=count)
    record = {}
    for which, mine in others.items():
        found = ratios(mine, plain, plain, torch.float32)
        wrong = {key: round(value, 3) for key, value in found.items() if not value <= 1}
        if wrong:
            raise RuntimeError(f"{which} beside plain torch, in parts of what may be: {dict(list(wrong.items())[:6])}")
        worst = max(found, key=lambda key: found[key])
        record[which] = {key: round(found[key], 4) for key in ("loss", "all gradients", worst)}
    return record


def measure(name: str, args: argparse.Namespace, results: Results, folder: Path) -> None:
    """Check a model, then time it; prints and keeps each row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results.record["check"][name] = found = check(name, device, folder, small=args.tiny)
    print(f"check {name}: passed, in parts of what is allowed {found}", flush=True)
    free()
    if args.tiny:
        return
    names = [f"slot{i}" for i in range(EIGHT)]
    for item, (rows, tokens), adapters in (
        ("2x2048", (2, 2048), [NAME]),
        ("2x256", (2, 256), [NAME]),
        ("eight-512", (8, SHORT), names),
    ):
        row: dict[str, Any] = {
            "item": f"experts-{name}-{item}",
            "family": name,
            "tokens": rows * tokens,
            "blocks": MODELS[name][1],
        }
        given, losses = given_of(rows, tokens, device, adapters), {}
        model = build(name, device, torch.bfloat16, small=False)
        system, bank = ours(model, adapters, compiled=True)
        adapter = bank.adapter(adapters[0])  # before it is trained: the same start for PEFT
        row["trained"] = system.trained
        step = partial(system.step, given)
        losses["plain"] = _plainly(lambda system=system, given=given: _passed(system, given))
        blocks = compile_blocks(model)
        for _ in range(PASSES):
            losses["ours"] = _passed(system, given)
        row["captured"] = bool(system.graphs._captured)
        uncompile_blocks(blocks)
        _plainly(lambda step=step: timed(step, 2))
        row |= spread(_plainly(lambda step=step: timed(step, args.steps)), "plain_")
        blocks = compile_blocks(model)
        torch.cuda.reset_peak_memory_stats()
        timed(step, WARM_UP)
        row |= spread(timed(step, args.steps), "")
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        uncompile_blocks(blocks)
        bank.detach()
        del bank, system, step, blocks
        free()
        mine = given_of(rows // len(adapters), tokens, device)
        theirs = pefts(model, adapter, folder)
        losses["peft"] = _passed(theirs, mine) if len(adapters) == 1 else losses["ours"]
        step = partial(theirs.step, mine)
        torch.cuda.reset_peak_memory_stats()
        timed(step, WARM_UP)
        row |= spread(timed(step, args.steps), "peft_")
        row["peft_peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        row["peft_steps"] = len(adapters)
        row["losses"] = {key: round(value, 4) for key, value in losses.items()}
        if any(abs(value - losses["plain"]) > LOSS * losses["plain"] for value in losses.values()):
            raise RuntimeError(f"losses in bf16 disagree: {row['losses']}")
        results.add(row)
        print(line(row), flush=True)
        del model, theirs, step
        free()


def _passed(system: System, given: Any) -> float:
    read = system.run(given)
    for leaf in system.leaves.values():
        leaf.grad = None
    if system.bank is not None:
        for leaf in system.bank.parameters():
            leaf.grad = None
    return read()


def line(row: Mapping[str, Any]) -> str:
    """An item as a line of the table."""
    peft = row["peft_ms"] * row["peft_steps"]
    cells = [row["item"].removeprefix("experts-"), f"{peft:.1f}", f"{row['plain_ms']:.1f}", f"{row['ms']:.1f}"]
    cells += [f"{peft / row['ms']:.2f}", f"{row['peft_peak_gib']:.1f}", f"{row['peak_gib']:.1f}"]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print, keep."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    made.add_argument("--output", type=Path, help="JSON file, rewritten after every item")
    made.add_argument("--steps", type=int, default=8, help="timed steps")
    made.add_argument("--commit", help="what is measured, where the folder isn't a git repository")
    made.add_argument("--tiny", action="store_true", help="only the check, of tiny models; on a CPU too")
    made.add_argument("--folder", type=Path, default=Path("/tmp/gpu_experts"), help="where adapters are written for PEFT to read")
    args = made.parse_args(arguments)
    if not torch.cuda.is_available() and not args.tiny:
        sys.exit("gpu_experts.py needs a GPU; --tiny runs its check without one")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    results = Results.start("experts", args.output, gpu=gpu, revision=args.commit, check={})
    failures = results.record.setdefault("failures", {})
    for name in args.models:
        try:
            measure(name, args, results, args.folder / name)
        except Exception as error:  # noqa: BLE001  the next model may still give its numbers
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"[:500]
            results.write()
        free()
    if rows := results.record["rows"]:
        header = "| work | PEFT ms | ours, plain torch ms | ours ms | × PEFT | PEFT GiB | ours GiB |"
        print("\n".join([header, "| --- " * 7 + "|", *map(line, rows)]))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
