"""Families beyond Llama on one GPU: what the same code path is worth there, no file of ours for any of them.

    python benchmarks/gpu_families.py --output families.json     # all seven; --families qwen3 vit: some
    python benchmarks/gpu_families.py --tiny                     # the checks alone, tiny, on a CPU too

Random weights in bf16, true widths, few blocks, a vocabulary of 32,000; one adapter of rank 16 on all linear layers. `ms` is a
whole training step over compiled blocks, `plain_ms` ours uncompiled and kernel by kernel, `peft_ms` PEFT over transformers as
peers_gpu.py runs it (autocast, adapters in fp32, fused AdamW). The base draws no random numbers on either side.

Text models train through our engine, the others in a loop of one's own with `lb.TrainingPass`. Both capture passes as CUDA
graphs: column `captured`. Loss and gradients are checked first, in the form that is timed, at every size: ours against ours
uncompiled, and PEFT against that, within what rounding to bf16 does to it (its distance from a copy in fp32). A family whose
check fails prints no number; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers as hf
from gpu_model import ALPHA, RATE, WARM_UP, as_batch, free, spread, timed
from gpu_results import Results
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lorabank as lb
from lorabank.engine.batch import Batch
from lorabank.engine.compiling import compile_blocks
from lorabank.engine.graphs import PassGraphs
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.optim.slot_optimizer import SlotOptimizer

Row = dict[str, Any]
Seen = tuple[float, Mapping[str, Tensor]]
"""The mean loss, and `<layer>.A` (rank, in) or `<layer>.B` (rank, out) to its gradient, fp32."""

NAME, RANK = "adapter", 16
VOCABULARY, LABELS, PATCHES = 32000, 1000, 197
HEARD, BANDS = 500, 80
"""Places of sound that Whisper's encoder puts out, ten seconds (released models: thirty), and bands of it."""
PASSES = 4
"""Before results are looked at: the fourth of a shape is a replay of its captured graph."""
FACTOR, WHOLE = 3.0, 1.5
"""How far other right results may be, in distances of ours uncompiled from itself in fp32: a leaf's gradient from ours uncompiled
(two paths of equal error differ by √2 times it, by twice at worst), and all gradients as one vector from fp32."""
SLACK = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""Besides, relative: the order of sums, and a last rounding of A, B and xA, which uncompiled blocks keep in fp32."""
NEGLIGIBLE, LOOSEST, LOSS = 0.01, 0.25, {torch.float32: 1e-5, torch.bfloat16: 2e-3}
"""A leaf's gradient below this part of the largest leaf's (q and k, which cancel) is held to that part; rounding that moves all
gradients further than the second leaves nothing to compare; the third is of two losses, relative."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model's sizes and its work. `head`: numbers of an attention head; `window`: tokens that a local layer looks back."""

    width: int = 32
    inner: int = 48
    heads: int = 4
    blocks: int = 2
    kv_heads: int = 2
    head: int = 8
    window: int = 1024
    positions: int = 4096
    """Longest text."""
    work: Sequence[tuple[int, int]] = ((2, 2048), (2, 256))
    """(rows, tokens of each), the large one first; of Whisper the text's tokens. Never one row, which is compiled anew."""


TINY = Family(window=5, work=[(2, 12)])
FAMILIES: Mapping[str, Family] = {  # 1.7B; 4B; 7B v0.3; medium; large; large; small
    "qwen3": Family(width=2048, inner=6144, heads=16, kv_heads=8, head=128, blocks=8),
    "gemma3": Family(width=2560, inner=10240, heads=8, kv_heads=4, head=256, blocks=6),
    "mistral": Family(width=4096, inner=14336, heads=32, kv_heads=8, head=128, blocks=4),
    "gpt2": Family(width=1024, inner=4096, heads=16, blocks=12, positions=1024, work=((4, 1024), (2, 256))),
    "bert": Family(width=1024, inner=4096, heads=16, blocks=12, positions=512, work=((8, 512), (2, 256))),
    "vit": Family(width=1024, inner=4096, heads=16, blocks=12, work=((21, PATCHES), (3, PATCHES))),
    "whisper": Family(width=768, inner=3072, heads=12, blocks=6, positions=448, work=((7, 64), (2, 64))),
}


def model_of(name: str, f: Family) -> PreTrainedModel:
    """The family's model, without dropout."""
    more: dict[str, Any]
    words: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide: dict[str, Any] = {"hidden_size": f.width, "intermediate_size": f.inner, "num_attention_heads": f.heads}
    wide |= {"num_hidden_layers": f.blocks, "num_labels": LABELS}
    causal = {**words, **wide, "num_key_value_heads": f.kv_heads, "head_dim": f.head, "max_position_embeddings": f.positions}
    if name == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**causal))
    if name == "mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(**causal, sliding_window=None))
    if name == "gemma3":
        kinds = ["sliding_attention"] * (f.blocks - 1) + ["full_attention"]
        more = {"query_pre_attn_scalar": f.head, "sliding_window": f.window, "layer_types": kinds}
        return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**causal, **more))
    if name == "gpt2":
        more = {"n_embd": f.width, "n_inner": f.inner, "n_head": f.heads, "n_layer": f.blocks, "n_positions": f.positions}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**words, **more, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    if name == "bert":
        more = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": f.positions}
        return hf.BertForSequenceClassification(hf.BertConfig(**words, **wide, **more))
    if name == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(**wide))
    each = {"layers": f.blocks, "attention_heads": f.heads, "ffn_dim": f.inner}
    more = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in each.items()} | {"dropout": 0.0}
    more |= {"d_model": f.width, "num_mel_bins": BANDS, "max_source_positions": HEARD, "max_target_positions": f.positions}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**words, **more, decoder_start_token_id=1))


def build(name: str, family: Family, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, the same for the same family, device and dtype."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return model_of(name, family).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Given:
    """A batch on the device."""

    inputs: Mapping[str, Tensor]
    """The model's arguments, and `targets`. With `labels` among them, as causal models take them, the loss is the model's own."""
    tokens: int
    """That blocks work on, an encoder's and a decoder's together."""
    batch: Batch | None = None
    """The same for our engine, on the host, where that trains such models."""
    summed: int = 1
    """Tokens over which the engine sums gradients."""


def given_to(name: str, work: tuple[int, int], like: Tensor) -> Given:
    """Random numbers, the same for the same work in any dtype: texts to predict, texts or pictures of a class, sound and text."""
    torch.manual_seed(0)
    rows, length = work
    ids, classes = torch.randint(14, VOCABULARY, (rows, length)), torch.randint(LABELS, (rows,)).to(like.device)
    there = ids.to(like.device)
    if name == "bert":
        return Given({"input_ids": there, "targets": classes}, rows * length)
    if name == "vit":
        return Given({"pixel_values": torch.randn(rows, 3, 224, 224).bfloat16().to(like), "targets": classes}, rows * PATCHES)
    if name == "whisper":
        heard = torch.randn(rows, BANDS, 2 * HEARD).bfloat16().to(like)
        inputs = {"input_features": heard, "decoder_input_ids": there, "targets": there.roll(-1, 1)}
        return Given(inputs, rows * (HEARD + length))
    inputs = {"input_ids": there, "labels": there, "targets": there}
    return Given(inputs, rows * length, as_batch(ids, [NAME]), rows * (length - 1))


@dataclass(frozen=True, kw_only=True)
class System:
    """A model with one adapter in training."""

    leaves: Mapping[str, nn.Parameter]
    trained: int
    """Numbers that are trained."""
    run: Callable[[Given], Callable[[], float]]
    """A pass, forward and backward. What comes back gives the mean loss, and waits for it."""
    update: Callable[[Given], object]
    """The optimizer's step; drops the gradients."""
    turned: bool = False
    """Whether B is (out, rank), as PEFT has it."""
    bank: lb.AdapterBank | None = None
    summed: bool = False
    """Whether gradients are sums over tokens, as our engine's are."""
    graphs: PassGraphs = field(default_factory=PassGraphs)

    def step(self, given: Given) -> None:
        """A whole training step."""
        self.run(given)
        self.update(given)

    def seen(self, given: Given, passes: int = 1) -> Seen:
        """Of the last of some passes; nothing is changed."""
        found: Seen = (0.0, {})
        for _ in range(passes):
            read = self.run(given)
            gradients = {key: leaf.grad.float() for key, leaf in self.leaves.items() if leaf.grad is not None}
            scale = given.summed if self.summed else 1
            turned = {key: g.t() if self.turned and key.endswith(".B") else g for key, g in gradients.items()}
            found = read(), {key: g / scale for key, g in turned.items()}
            for leaf in self.leaves.values():
                leaf.grad = None
        return found


def own_loss(model: Callable[..., Any], given: Mapping[str, Tensor]) -> Tensor:
    """The mean loss, in fp32."""
    inputs: dict[str, Any] = {key: value for key, value in given.items() if key != "targets"}
    out = model(**inputs, **({"use_cache": False} if inputs.keys() & {"labels", "decoder_input_ids"} else {}))
    return out.loss if "labels" in inputs else cross_entropy(out.logits.float().flatten(0, -2), given["targets"].flatten())


def ours(model: PreTrainedModel, given: Given, *, compiled: bool, use_dora: bool = False) -> System:
    """Through the engine where it trains such models, else in a loop of one's own. The adapter is the same each time."""
    bank = lb.attach(model)
    bank.add(NAME, lb.AdapterConfig(rank=RANK, alpha=ALPHA, targets="all-linear", modules_to_save=[], use_dora=use_dora))
    with torch.no_grad():
        for i, (key, leaf) in enumerate(bank.named_parameters(NAME)):  # B isn't zero, so that A has a gradient
            if not key.endswith(".magnitude"):
                leaf.copy_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i)) * 0.02)
    if compiled:
        compile_blocks(model)
    optimizer = SlotOptimizer(bank)
    optimizer.add(NAME)
    train = lb.TrainingPass(bank, partial(own_loss, model), cuda_graphs=compiled)
    engine = None if given.batch is None else Engine(bank, cuda_graphs=compiled)

    def run(given: Given) -> Callable[[], float]:
        if engine is not None and given.batch is not None:
            found = forward_backward(engine, given.batch)[NAME]
            return lambda: found.mean
        loss = train(given.inputs, NAME)
        return lambda: float(loss)

    def update(given: Given) -> object:
        return optim_step(optimizer, {NAME: RATE}, {NAME: given.summed})

    leaves = dict(bank.named_parameters(NAME))
    trained = sum(leaf.numel() for leaf in bank.parameters())
    graphs = (engine or train).graphs
    return System(leaves=leaves, trained=trained, run=run, update=update, bank=bank, summed=engine is not None, graphs=graphs)


def pefts(model: PreTrainedModel, adapter: lb.Adapter) -> System:
    """PEFT with the same adapter on the same layers, its usual way."""
    import peft

    turned = any(isinstance(module, Conv1D) for module in model.modules())
    targets, use_dora = list(adapter.layers), any(layer.magnitude is not None for layer in adapter.layers.values())
    config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets, fan_in_fan_out=turned, use_dora=use_dora)
    half, device = next(model.parameters()).dtype != torch.float32, next(model.parameters()).device.type
    wrapped = peft.get_peft_model(model, config)
    trained = {name: leaf for name, leaf in wrapped.named_parameters() if leaf.requires_grad}
    leaves: dict[str, nn.Parameter] = {}
    for path, layer in adapter.layers.items():
        for role, value in (("A", layer.A), ("B", layer.B)):
            leaf = leaves[f"{path}.{role}"] = trained[f"base_model.model.{path}.lora_{role}.default.weight"]
            leaf.data.copy_(value)
        if layer.magnitude is not None:
            leaf = trained[f"base_model.model.{path}.lora_magnitude_vector.default.weight"]
            leaves[f"{path}.magnitude"] = leaf
            leaf.data.copy_(layer.magnitude)
    optimizer = torch.optim.AdamW(leaves.values(), lr=RATE, fused=True)

    def run(given: Given) -> Callable[[], float]:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = own_loss(wrapped, given.inputs)
        loss.backward()
        return lambda: float(loss.detach())

    def update(given: Given) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return System(leaves=leaves, trained=sum(p.numel() for p in trained.values()), run=run, update=update, turned=True)


def ratios(mine: Seen, other: Seen, exact: Seen, dtype: torch.dtype) -> dict[str, float]:
    """How far `mine` is off in parts of what it may be, by what rounding does to `other`: not all at most 1 is a wrong result."""
    (loss, found), (other_loss, others), (_, true) = mine, other, exact
    if found.keys() != true.keys():
        return {"leaves that have a gradient": float("nan")}
    flat = [torch.cat([gradients[key].reshape(-1) for key in true]) for gradients in (found, others, true)]
    off, usual = (float((flat[i] - flat[2]).norm() / flat[2].norm()) for i in (0, 1))
    rows = {"loss": abs(loss - other_loss) / abs(other_loss) / LOSS[dtype], "rounding": usual / LOOSEST}
    rows["all gradients"] = off / (WHOLE * usual + SLACK[dtype])
    largest = max(float(g.norm()) for g in true.values())
    for key, g in true.items():
        room = FACTOR * float((others[key] - g).norm()) + SLACK[dtype] * max(float(g.norm()), NEGLIGIBLE * largest)
        rows[key] = float((found[key] - others[key]).norm()) / room
    return rows


def systems_of(name: str, family: Family, given: Given, device: torch.device, dtype: torch.dtype) -> dict[str, System]:
    """`plain` and, as far as this machine has them, `peft` and `ours`; `exact` for the check. All with the same weights."""
    model = partial(build, name, family, device, dtype)
    plain = ours(model(), given, compiled=False)
    found = {"plain": plain, "exact": plain if dtype == torch.float32 else ours(model().float(), given, compiled=False)}
    if importlib.util.find_spec("peft") and plain.bank is not None:
        found["peft"] = pefts(model(), plain.bank.adapter(NAME))
    if device.type == "cuda":
        found["ours"] = ours(model(), given, compiled=True)
    return found


def check(systems: Mapping[str, System], given: Given, exactly: Given, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """`ratios` of PEFT and of ours compiled, as far as they are there. Raises RuntimeError where any result is wrong."""
    plain, exact, record = systems["plain"].seen(given), systems["exact"].seen(exactly), {}
    for name in [name for name in ("peft", "ours") if name in systems]:
        if systems[name].trained != systems["plain"].trained:
            raise RuntimeError(f"{name} trains {systems[name].trained:,} numbers, not {systems['plain'].trained:,}")
        found = ratios(systems[name].seen(given, PASSES if name == "ours" else 1), plain, exact, dtype)
        wrong = {key: round(value, 3) for key, value in found.items() if not value <= 1}  # NaN is wrong too
        if wrong:
            raise RuntimeError(f"results disagree, {name} beside plain, in parts of what they may: {wrong}")
        worst = max(found, key=lambda key: found[key])
        record[name] = {key: round(found[key], 4) for key in ("loss", "rounding", "all gradients", worst)}
    return record


def captured(system: System, shapes: int) -> str:
    """Whether passes of so many shapes are replayed as CUDA graphs."""
    graphs = system.graphs
    return "yes" if len(graphs._captured) >= shapes and not graphs.refused else f"no: {graphs.refused or 'see warnings'}"


def measure(name: str, args: argparse.Namespace, results: Results) -> None:
    """Check a family at all sizes, then time it; prints and keeps each row. Raises RuntimeError where a result is wrong."""
    torch._dynamo.reset()  # families share the code that is compiled, which holds only so many forms
    family, dtype = (TINY, torch.float32) if args.tiny else (FAMILIES[name], torch.bfloat16)
    like = torch.zeros((), device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)
    batches = [given_to(name, work, like) for work in family.work]
    systems = systems_of(name, family, batches[0], like.device, dtype)
    for given, work in zip(batches, family.work, strict=True):
        found = check(systems, given, given_to(name, work, like.float()), dtype)
        results.record["check"][f"{name}-{given.tokens}"] = found
        print(f"check {name}-{given.tokens}: passed, in parts of what is allowed {found}", flush=True)
    for given in [] if args.tiny else batches:
        row: Row = {"item": f"family-{name}-{given.tokens}", "family": name, "tokens": given.tokens, "blocks": family.blocks}
        row |= {"rows": len(given.inputs["targets"]), "width": family.width, "trained": systems["ours"].trained}
        for which, prefix in (("peft", "peft_"), ("plain", "plain_"), ("ours", "")):
            if which in systems:
                step = partial(systems[which].step, given)
                timed(step, WARM_UP)
                row |= spread(timed(step, args.steps), prefix)
        row["captured"] = captured(systems["ours"], len(batches))
        results.add(row)
        print(line(row), flush=True)


def line(row: Row) -> str:
    """An item as a line of the table."""
    shown = [f"{row[key]:.1f}" if key in row else "–" for key in ("peft_ms", "plain_ms", "ms")]
    shown += [f"{row[key] / row['ms']:.2f}" if key in row else "–" for key in ("peft_ms", "plain_ms")]
    return "| " + " | ".join([row["family"], f"{row['tokens']:,}", *shown, row["captured"]]) + " |"


def run_families(args: argparse.Namespace, results: Results) -> int:
    """Measure each family and print the table; the number of those that gave nothing, or not all."""
    failures, began = results.record.setdefault("failures", {}), time.perf_counter()
    for name in args.families:
        try:
            if time.perf_counter() - began > args.seconds:
                raise TimeoutError(f"not begun after {args.seconds:g} s")
            measure(name, args, results)
        except Exception as error:  # noqa: BLE001  the next families may still give their numbers
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name}: no number: {failures[name]}", flush=True)
            results.write()
        free()
    if rows := results.record["rows"]:
        header = "| family | tokens | PEFT ms | ours plain ms | ours ms | × PEFT | × plain | captured |"
        print("\n".join([header, "| --- " * 8 + "|", *map(line, rows)]))
    return len(failures)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    made.add_argument("--output", type=Path, help="JSON file, rewritten after every item")
    made.add_argument("--steps", type=int, default=8, help="timed steps")
    made.add_argument("--seconds", type=float, default=300.0, help="no further family after so long")
    made.add_argument("--commit", help="what is measured, where the folder isn't a git repository")
    made.add_argument("--tiny", action="store_true", help="only checks, of tiny models in fp32; on a CPU too, uncompiled there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print, keep."""
    args = parser().parse_args(arguments)
    if not torch.cuda.is_available() and not args.tiny:
        sys.exit("gpu_families.py needs a GPU; --tiny runs its checks without one")
    if importlib.util.find_spec("peft") is None:
        print("peft isn't installed: its column is left out", flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    results = Results.start("families", args.output, gpu=gpu, revision=args.commit, check={})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s)compile: .*uncompiled")  # such a step isn't the work to be measured
        return int(run_families(args, results) > 0)


if __name__ == "__main__":
    sys.exit(main())
