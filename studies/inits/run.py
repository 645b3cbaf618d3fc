"""What do inits from spectra and data bring? All of them as adapters of one bank, trained jointly on the same rows of E2E.

    python studies/inits/run.py

For each seed the adapters are made once; each learning rate starts from there again. Over a base in fp32 the inits that need no
quantised base, over one rounded to NF4 LoftQ. Each base and seed has its results/<base>-<seed>.json,
written after each learning rate.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from table import write
from torch import Tensor, nn

import lorabank as lb
from lorabank.bank.adapter_start import AdapterStart
from lorabank.bank.bank import AdapterBank
from lorabank.bank.spectral import principal
from lorabank.bank.targets import linear_layers, output_head_paths
from lorabank.data.prepare import PreparedData, prepare
from lorabank.data.render import TokenRow
from lorabank.engine.batch import make_batch
from lorabank.engine.state import load_state, save_state
from lorabank.engine.step import Engine, forward_backward, optim_step
from lorabank.kernels import four_bit
from lorabank.models.load import LoadedBase, load_base
from lorabank.optim.slot_optimizer import SlotOptimizer
from lorabank.training.allocation import keep_freed_memory
from lorabank.training.evaluate import spread, validation_losses
from lorabank.training.streams import RowStream

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INITS: Mapping[str, Sequence[str]] = {
    "fp32": ("uniform", "orthogonal", "pissa", "olora", "eva"),
    "nf4": ("uniform", "loftq"),
}
"""By the base that they are trained over."""
BASE = "base"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def rows_of(base: LoadedBase) -> PreparedData:
    """E2E's rows as tokens."""
    folder = ROOT / "examples" / "data"
    data = lb.DataConfig(
        train=str(folder / "e2e_train.jsonl"), val=str(folder / "e2e_val.jsonl"), prompt="{mr}", completion="{ref}", system="",
        max_length=128,
    )  # fmt: skip
    return prepare(data, base.tokenizer, seed=42)


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """Round every linear layer but the head to NF4, in place and kept in fp32; returns what each weight lost."""
    lost: dict[str, Tensor] = {}
    heads = output_head_paths(model)
    for path, layer in linear_layers(model).items():
        if path in heads:
            continue
        weight = layer.get_parameter("weight").data
        near = four_bit.dequantize_plain(four_bit.quantize(weight), "nf4", (weight.shape[0], weight.shape[1]), weight.dtype)
        lost[path] = weight - near
        weight.copy_(near)
    return lost


def loftq_start(lost: Mapping[str, Tensor], config: lb.AdapterConfig) -> tuple[AdapterStart, float]:
    """What `lorabank.loftq` gives for a base that bitsandbytes holds, and ‖W − Q − scaling B A‖ / ‖W − Q‖ over all layers."""
    scaling = config.scaling(config.rank, config.alpha)
    pairs = {path: principal(each, config.rank, scaling) for path, each in lost.items()}
    left = sum(float((each - scaling * pairs[path][1] @ pairs[path][0]).square().sum()) for path, each in lost.items())
    share = (left / sum(float(each.square().sum()) for each in lost.values())) ** 0.5
    return AdapterStart(config=config, A={p: a for p, (a, _) in pairs.items()}, B={p: b for p, (_, b) in pairs.items()}), share


def eva_batches(rows: Sequence[TokenRow], stream: RowStream, count: int) -> list[dict[str, Tensor]]:
    """The first micro-batches that the adapter is going to be trained on."""
    found = []
    for position in range(count):
        batch = make_batch([rows[i].example for i in stream.batch(position)])
        labels = batch.input_ids_NL.masked_fill(batch.weights_NL == 0, -100)
        found.append({"input_ids": batch.input_ids_NL, "attention_mask": batch.attention_mask_NL, "labels": labels})
    return found


def start(bank: AdapterBank, init: str, seed: int, args: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """Add the adapter of an init; returns what there is to say of it."""
    began, notes = time.monotonic(), dict[str, Any]()
    config = lb.AdapterConfig(rank=args.rank, alpha=args.rank, init=init)
    if init == "eva":
        made = lb.eva(bank, eva_batches(given["rows"], given["stream"], args.eva_batches), config)
        ranks = [len(A) for A in made.A.values()]
        notes["ranks"] = [min(ranks), max(ranks), sum(ranks), len(ranks)]
        bank.add(init, made, seed=seed)
    elif init == "loftq":
        made, notes["error_left"] = loftq_start(given["lost"], config)
        bank.add(init, made, seed=seed)
    else:
        bank.add(init, config, seed=seed)
    notes["seconds"] = round(time.monotonic() - began, 1)
    notes["parameters"] = sum(p.numel() for p in bank.parameters(init))
    return notes


def losses_of(engine: Engine, names: Sequence[str], rows: Sequence[TokenRow]) -> dict[str, float]:
    """Validation losses, the base's among them."""
    return validation_losses(engine, dict.fromkeys((*names, BASE), rows), batch_size=24, busy=lambda activity, done, total: None)


def train(
    engine: Engine, optimizer: SlotOptimizer, rate: float, stream: RowStream, val: Sequence[TokenRow], args: argparse.Namespace
) -> dict[str, Any]:
    """All adapters on the same rows; losses by step, and on validation rows at the end."""
    names, began = engine.bank.names, time.monotonic()
    curves: dict[str, list[float]] = {name: [] for name in names}
    for step in range(args.steps):
        chosen = [stream.rows[i].example for i in stream.batch(step)]
        batch = make_batch(
            chosen * len(names), [name for name in names for _ in chosen], examples=list(range(len(chosen))) * len(names)
        )
        losses = forward_backward(engine, batch, steps=dict.fromkeys(names, step))
        optim_step(optimizer, dict.fromkeys(names, rate), {name: losses[name].tokens for name in names})
        for name in names:
            curves[name].append(round(losses[name].mean, 5))
        if step % 10 == 0:
            say(f"rate {rate:g} step {step}: " + ", ".join(f"{name} {curve[-1]:.4f}" for name, curve in curves.items()))
    validation = losses_of(engine, names, val)
    say(f"rate {rate:g} validation: " + ", ".join(f"{name} {loss:.4f}" for name, loss in validation.items()))
    return {"train": curves, "validation": validation, "seconds": round(time.monotonic() - began)}


def measure(storage: str, seed: int, args: argparse.Namespace, keep: Any) -> None:
    """One bank over one base: every init at every learning rate. `keep` takes each finished part."""
    base = load_base(args.model, dtype="fp32", device="cpu")
    data = rows_of(base)
    val = spread(data.val, args.validation_rows)
    given: dict[str, Any] = {"rows": data.train, "stream": RowStream(data.train, args.batch_size, seed)}
    if storage == "nf4":
        given["lost"] = rounded(base.model)
    bank = lb.attach(base.model)
    notes = {init: start(bank, init, seed, args, given) for init in INITS[storage]}
    say(f"{storage}, seed {seed}: {notes}")
    engine, optimizer = Engine(bank), SlotOptimizer(bank)
    for name in bank.names:
        optimizer.add(name)
    first = save_state(bank, optimizer)
    keep(storage, seed, None, {"starts": notes, "before": losses_of(engine, bank.names, val)})
    for rate in args.rates:
        load_state(bank, optimizer, first)
        keep(storage, seed, rate, train(engine, optimizer, rate, given["stream"], val, args))


def commit() -> str:
    """The commit that is measured, with a mark when files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def processor() -> str:
    """As the system names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name as in lorabank's settings (default %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 2e-3, 2e-5])
    parser.add_argument("--bases", nargs="+", default=list(INITS), choices=list(INITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step of each adapter")
    parser.add_argument("--rank", type=int, default=16, help="alpha is the same, so the scaling is 1")
    parser.add_argument("--eva-batches", type=int, default=4, help="micro-batches that EVA looks at")
    parser.add_argument("--validation-rows", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "settings": {key: value for key, value in vars(args).items() if key not in ("output", "bases", "seeds")},
        "versions": {"torch": torch.__version__, "transformers": version("transformers"), "python": platform.python_version()},
        "machine": processor(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    runs: dict[tuple[str, int], dict[str, Any]] = {}

    def keep(storage: str, seed: int, rate: float | None, found: Mapping[str, Any]) -> None:
        run = runs.setdefault((storage, seed), {**about, "base": storage, "seed": seed, "rates": {}})
        if rate is None:
            run.update(found)
        else:
            run["rates"][f"{rate:g}"] = found
        (args.output / f"{storage}-{seed}.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")

    for seed in args.seeds:
        for storage in args.bases:
            measure(storage, seed, args, keep)
    write(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
