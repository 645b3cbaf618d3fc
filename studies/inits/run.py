"""What do inits from spectra and data bring? All of them as adapters of one bank, trained jointly on the same rows of E2E.

    python studies/inits/run.py
    python studies/inits/run.py --device cuda

For each seed the adapters are made once; each learning rate starts from there again. Over a base in fp32 the inits that need no
quantised base; LoftQ over one rounded to NF4 and kept in fp32 (`nf4`) or over bitsandbytes' (`nf4-bitsandbytes`, what
`base_dtype: nf4` is). All of it computes in fp32 on either device. Each base and seed has its results/<base>-<seed>.json, a
GPU's in results/gpu, written after each learning rate. A run that was cut off goes on from there; whatever fails is said, noted
in the file and left out, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from table import write
from torch import Tensor, nn

import lorabank as lb
from lorabank.bank.adaptable import linear_layers, output_head_paths
from lorabank.bank.bank import AdapterBank
from lorabank.bank.kinds import layer_kind
from lorabank.bank.starts.adapter_start import AdapterStart
from lorabank.bank.starts.spectral import principal
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
    "nf4-bitsandbytes": ("uniform", "loftq"),
}
"""By the base that they are trained over."""
RATES = (2e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3)
"""From that of PiSSA's own script to that of lorabank's `auto` for short runs."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cpu": {"bases": ["fp32", "nf4"], "seeds": [1, 2], "steps": 20, "rates": [3e-4, 2e-3, 2e-5], "validation_rows": 24},
    "cuda": {"bases": list(INITS), "seeds": [1, 2, 3], "steps": 60, "rates": list(RATES), "validation_rows": 200},
}
"""By device: what each can measure in a quarter of an hour or so a base."""
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


def in_bitsandbytes(model: nn.Module) -> dict[str, Tensor]:
    """Keep the linear layers as `base_dtype: nf4` does; returns what each weight lost."""
    whole = {path: layer.get_parameter("weight").detach().clone() for path, layer in linear_layers(model).items()}
    lost: dict[str, Tensor] = {}
    for path in lb.quantize_base(model, "nf4", say=say).layers:
        layer = model.get_submodule(path)
        kind = layer_kind(layer)
        assert kind is not None  # what `quantize_base` made
        lost[path] = whole[path] - kind.weight_oi(layer._parameters, torch.float32)
    return lost


def loftq_of(lost: Mapping[str, Tensor], config: lb.AdapterConfig) -> AdapterStart:
    """What `lorabank.loftq` gives for a base that bitsandbytes holds, where this one is rounded only."""
    scaling = config.scaling(config.rank, config.alpha)
    pairs = {path: [part.cpu() for part in principal(each, config.rank, scaling)] for path, each in lost.items()}
    return AdapterStart(config=config, A={p: a for p, (a, _) in pairs.items()}, B={p: b for p, (_, b) in pairs.items()})


def error_left(lost: Mapping[str, Tensor], made: AdapterStart) -> float:
    """‖W − Q − scaling B A‖ / ‖W − Q‖ over all layers."""
    scaling = made.config.scaling(made.config.rank, made.config.alpha)
    left = sum(float((each.cpu() - scaling * made.B[path] @ made.A[path]).square().sum()) for path, each in lost.items())
    return (left / sum(float(each.square().sum()) for each in lost.values())) ** 0.5


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
        original = given.get("original")
        made = loftq_of(given["lost"], config) if original is None else lb.loftq(bank, original, config)
        notes["error_left"] = error_left(given["lost"], made)
        bank.add(init, made, seed=seed)
    else:
        bank.add(init, config, seed=seed)
    notes["seconds"] = round(time.monotonic() - began, 1)
    notes["parameters"] = sum(p.numel() for p in bank.parameters(init))
    return notes


def starts(bank: AdapterBank, storage: str, seed: int, args: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """Add the adapter of each init; what there is to say of them, or why one couldn't be made."""
    notes: dict[str, Any] = {}
    for init in INITS[storage]:
        try:
            notes[init] = start(bank, init, seed, args, given)
        except Exception as error:  # noqa: BLE001  the others are worth having
            notes[init] = {"failed": failed(f"{storage}, seed {seed}, init {init}", error)}
    return notes


def failed(what: str, error: Exception) -> str:
    """Say it in full; its last line, for the results."""
    say(f"FAILED: {what}\n{''.join(traceback.format_exception(error))}")
    return f"{type(error).__name__}: {error}"


def losses_of(engine: Engine, names: Sequence[str], rows: Sequence[TokenRow]) -> dict[str, float]:
    """Validation losses, the base's among them."""
    size = 24 if engine.bank.device.type == "cpu" else 96
    return validation_losses(
        engine, dict.fromkeys((*names, BASE), rows), batch_size=size, busy=lambda activity, done, total: None
    )


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


def measure(storage: str, seed: int, args: argparse.Namespace, run: Results) -> None:
    """One bank over one base: every init at every learning rate that has no result yet."""
    rates = [rate for rate in args.rates if f"{rate:g}" not in run.found["rates"]]
    if not rates:
        say(f"{storage}, seed {seed}: all there")
        return
    base = load_base(args.model, dtype="fp32", device=args.device)
    data = rows_of(base)
    val = spread(data.val, args.validation_rows)
    given: dict[str, Any] = {"rows": data.train, "stream": RowStream(data.train, args.batch_size, seed)}
    if storage == "nf4":
        given["lost"] = rounded(base.model)
    elif storage == "nf4-bitsandbytes":
        given["original"] = copy.deepcopy(base.model)
        given["lost"] = in_bitsandbytes(base.model)
    bank = lb.attach(base.model)
    notes = starts(bank, storage, seed, args, given)
    given = {key: given[key] for key in ("rows", "stream")}  # weights from before quantisation may go
    say(f"{storage}, seed {seed}: {notes}")
    engine, optimizer = Engine(bank), SlotOptimizer(bank)
    for name in bank.names:
        optimizer.add(name)
    first = save_state(bank, optimizer)
    run.keep({"starts": notes, "before": losses_of(engine, bank.names, val)})
    for rate in rates:
        load_state(bank, optimizer, first)
        try:
            run.keep_rate(rate, train(engine, optimizer, rate, given["stream"], val, args))
        except Exception as error:  # noqa: BLE001  the other rates are worth having
            run.keep(
                {"failed": {**run.found.get("failed", {}), f"{rate:g}": failed(f"{storage}, seed {seed}, rate {rate:g}", error)}}
            )


class Results:
    """The file of a base and seed, written anew after each part."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Raises SystemExit where the file has results of other settings, or of another machine."""
        self.path = path
        self.found: dict[str, Any] = {**about, "rates": {}}
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))
            mine, theirs = _compared(about), _compared(self.found)
            if mine != theirs:
                sys.exit(f"{path} holds results of {theirs}, asked for are {mine}: give another --output, or delete it")
            self.found.pop("failed", None)  # it is tried again

    def keep(self, part: Mapping[str, Any]) -> None:
        """Take in what was found, and write."""
        self.found.update(part)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def keep_rate(self, rate: float, part: Mapping[str, Any]) -> None:
        """The same of a learning rate."""
        self.keep({"rates": {**self.found["rates"], f"{rate:g}": part}})

    @property
    def whole(self) -> bool:
        """Whether nothing failed."""
        return not self.found.get("failed") and not any("failed" in note for note in self.found.get("starts", {}).values())


def _compared(about: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for results to stand in one file."""
    settings = {key: value for key, value in about["settings"].items() if key not in ("rates", "threads")}
    return {"device": "cpu", **settings, "machine": about["machine"], "base": about["base"], "seed": about["seed"]}


def commit() -> str:
    """The commit that is measured, with a mark when files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine(device: str) -> str:
    """The GPU or the processor, as the system names it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Of what computes here."""
    found = {"torch": torch.__version__, "transformers": version("transformers"), "python": platform.python_version()}
    with contextlib.suppress(PackageNotFoundError):
        found["bitsandbytes"] = version("bitsandbytes")
    return found


def settings() -> argparse.Namespace:
    """The command line, with the device's defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="name or folder, as in lorabank's settings (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", choices=list(DEFAULTS), help="fp32 on both (default %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--bases", nargs="+", choices=list(INITS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step of each adapter")
    parser.add_argument("--rank", type=int, default=16, help="alpha is the same, so the scaling is 1")
    parser.add_argument("--eva-batches", type=int, default=4, help="micro-batches that EVA looks at")
    parser.add_argument("--validation-rows", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--commit", default=None, help="of these files, where they are no git checkout")
    parser.add_argument("--output", type=Path, help="default results, or results/gpu")
    args = parser.parse_args()
    for key, value in DEFAULTS[args.device].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.output = args.output or HERE / "results" / ("gpu" if args.device == "cuda" else "")
    return args


def main() -> int:
    """Measure, write; 1 where a part failed."""
    args = settings()
    name = Path(args.model).name if Path(args.model).is_dir() else args.model  # where a folder lies is nobody's business
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")  # fp32 is fp32 on a GPU too
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("output", "bases", "seeds", "rates", "commit")}
        | {"model": name},
        "versions": versions(),
        "machine": machine(args.device),
        "commit": args.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    runs = {
        (storage, seed): Results(args.output / f"{storage}-{seed}.json", {**about, "base": storage, "seed": seed})
        for seed in args.seeds
        for storage in args.bases
    }
    whole = True
    for (storage, seed), run in runs.items():
        try:
            measure(storage, seed, args, run)
        except Exception as error:  # noqa: BLE001  the other bases and seeds are worth having
            failed(f"{storage}, seed {seed}", error)
            whole = False
        whole = whole and run.whole
    write(args.output)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
