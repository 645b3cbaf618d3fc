"""Two shifts of a small T5: adapters trained jointly and alone, against full fine-tuning and the base as it is.

    python studies/forms/base.py --e2e FOLDER --output out/forms/base
    python studies/forms/run.py --e2e FOLDER --base out/forms/base

`figures`: descriptions of forms with prices in pounds and ratings of 5, which the base has never seen. `form`: the way back, a
form of a description. Rates and ranks are chosen by validation loss; all adapters of a search are trained in one pass a step.
Each method has the same rows in the same order, the same steps, schedule and loss. results/result.json is written after each
part; a run that was cut off goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import lorabank as lb
from lorabank import api
from lorabank.config.train import EvalConfig, SaveConfig, TrainConfig
from lorabank.models.quiet import quiet_transformers
from lorabank.optim.schedules import learning_rate_factor
from lorabank.tasks import task_kind
from lorabank.tasks.seq2seq.model import row_losses
from lorabank.training.data_sets import RowObjects
from lorabank.training.streams import RowStream

sys.path.insert(0, str(Path(__file__).parent))
from e2e import task_files
from scores import all_scores, slot_match

HERE = Path(__file__).parent
TASK, TASKS = "translation", ("figures", "form")
RANK, WARMUP, SEED = 16, 0.03, 1
Files = Mapping[str, Mapping[str, Path]]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def config_of(args: argparse.Namespace, adapters: Mapping[str, lb.AdapterRun], output: Path | None = None) -> TrainConfig:
    """Of a run of adapters; with one and no output of a plain model's rows."""
    return TrainConfig(
        task=TASK,
        model=str(args.base),
        output=str(output or ""),
        adapters=adapters,
        eval=EvalConfig(every=args.steps // 3, samples=0, batch_size=32),
        save=SaveConfig(every=0),
        seed=SEED,
        device="cpu",
        threads=args.threads,
    )


def train_adapters(args: argparse.Namespace, files: Files, wanted: Sequence[tuple[str, int, float]], output: Path) -> Path:
    """The folder of adapters (task, rank, rate), trained in one pass a step; one that has ended is taken as it is."""
    if not (output / "metrics.jsonl").exists() or ended(output) is None:
        runs = {
            name_of(*each): lb.AdapterRun(
                rank=each[1],
                data=str(files[each[0]]["train"]),
                val_data=str(files[each[0]]["val"]),
                batch_size=args.batch,
                max_steps=args.steps,
                learning_rate=each[2],
                warmup_ratio=WARMUP,
            )
            for each in wanted
        }
        lb.train(config_of(args, runs, output), resume=output.exists())
    return output


def name_of(task: str, rank: int, rate: float) -> str:
    """Of an adapter."""
    return f"{task}-r{rank}-{rate:g}"


def ended(output: Path) -> dict[str, Any] | None:
    """How a run ended; None where it hasn't."""
    last = json.loads((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return last if last["event"] == "end" and not last["interrupted"] else None


def curve(output: Path, name: str) -> list[tuple[int, float]]:
    """(step, validation loss) of an adapter."""
    events = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(e["step"], e["metrics"]["loss"]) for e in events if e["event"] == "eval" and e["adapter"] == name]


def training_losses(output: Path, name: str) -> dict[int, float]:
    """Step to loss of an adapter."""
    events = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {e["step"]: e["loss"] for e in events if e["event"] == "step" and e["adapter"] == name}


def parameters(output: Path, name: str) -> int:
    """Numbers in an adapter."""
    return sum(t.numel() for layer in lb.Adapter.load(output / name).layers.values() for t in (layer.A, layer.B))


def train_full(args: argparse.Namespace, files: Files, task: str, rate: float, output: Path) -> dict[str, Any]:
    """Full fine-tuning in a plain loop, on the adapters' rows in their order; the model goes into `output`."""
    with quiet_transformers():
        model: Any = AutoModelForSeq2SeqLM.from_pretrained(str(args.base)).eval()  # no dropout, as for the adapters
        tokenizer: Any = AutoTokenizer.from_pretrained(str(args.base))
    config = config_of(args, {task: lb.AdapterRun()})
    kind: Any = task_kind(TASK).open(config, model, tokenizer, {})
    rows = RowObjects(train=str(files[task]["train"]), val=str(files[task]["val"]))
    sets = kind.read(config, rows).by_adapter[task]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    stream, points, began = RowStream(sets.train, args.batch, SEED), [], time.process_time()
    for step in range(args.steps):
        made = batch_of(kind, [sets.train[i] for i in stream.batch(step)])
        factor = learning_rate_factor("linear", step, args.steps, math.ceil(WARMUP * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        (row_losses(model, made.inputs, made.targets).sum() / sum(made.weights)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (args.steps // 3) == 0:
            points.append((step + 1, val_loss(kind, model, sets.val)))
            say(f"full {task} {rate:g}: step {step + 1}, validation loss {points[-1][1]:.4f}")
    with quiet_transformers():
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, "val": points[-1][1], "curve": points, "cpu_seconds": round(time.process_time() - began)}


def batch_of(kind: Any, rows: Sequence[Any]) -> Any:
    """What the model takes of rows."""
    return kind.batch([[row] for row in rows], [lb.BASE] * len(rows), examples=range(len(rows)), draws=[0] * len(rows))


def val_loss(kind: Any, model: Any, rows: Sequence[Any]) -> float:
    """Nats a target token."""
    ordered, losses, tokens = sorted(rows, key=lambda row: row.size), 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(ordered), 32):
            made = batch_of(kind, ordered[start : start + 32])
            losses += float(row_losses(model, made.inputs, made.targets).sum())
            tokens += sum(made.weights)
    return losses / tokens


def written(args: argparse.Namespace, files: Files, task: str, source: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name to scores on a task's test rows, and to what it wrote: `texts`."""
    references: dict[str, list[str]] = {}
    for line in files[task]["test"].read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        references.setdefault(row["source"], []).append(row["target"])
    asked, output = args.work / f"{task}-sources.jsonl", args.work / "written.jsonl"
    asked.write_text("".join(json.dumps({"source": text}, ensure_ascii=False) + "\n" for text in references), encoding="utf-8")
    output.unlink(missing_ok=True)
    api.predict(source, asked, output, list(names), batch_size=32, device="cpu", task=TASK, options={"max_new_tokens": 96})
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        texts = [row[name] for row in rows]
        found[name] = {"scores": all_scores(task, list(references), texts, list(references.values())), "texts": texts}
    return found


class Study:
    """What results/result.json has so far, and how the rest comes about."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.files = args, task_files(args.e2e, args.work, args.each)
        settings = {"steps": args.steps, "batch": args.batch, "seed": SEED, "each": args.each}
        self.document: dict[str, Any] = {"settings": settings, "torch": torch.__version__, "runs": {}, "samples": {}}
        if args.results.exists():
            self.document = json.loads(args.results.read_text(encoding="utf-8"))
            if self.document["settings"] != settings:
                sys.exit(f"{args.results}: of other settings ({self.document['settings']}); give other --results")
        self.runs: dict[str, Any] = self.document["runs"]

    def keep(self) -> None:
        """Write it."""
        self.args.results.parent.mkdir(parents=True, exist_ok=True)
        self.args.results.write_text(json.dumps(self.document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def adapters(self, method: str, wanted: Sequence[tuple[str, int, float]]) -> None:
        """Train what is lacking of these, in one pass a step."""
        wanted = [(task, rank, rate) for task, rank, rate in wanted if f"{method}/{task}/r{rank}/{rate:g}" not in self.runs]
        keys = [f"{method}/{task}/r{rank}/{rate:g}" for task, rank, rate in wanted]
        if not wanted:
            return
        folder, began = "-".join([method, *(name_of(*each) for each in wanted)]), time.process_time()
        output = train_adapters(self.args, self.files, wanted, self.args.work / folder)
        for key, each in zip(keys, wanted, strict=True):
            name = name_of(*each)
            points = curve(output, name)
            self.runs[key] = {
                "parameters": parameters(output, name),
                "val": points[-1][1],
                "curve": points,
                "folder": folder,
                "together": len(wanted),
                "cpu_seconds": round(time.process_time() - began),
            }
            say(f"{key}: validation loss {points[-1][1]:.4f}")
        self.keep()

    def full(self, task: str, rate: float) -> None:
        """Fine-tune everything, unless it was done."""
        key, folder = f"full/{task}/all/{rate:g}", f"full-{task}-{rate:g}"
        if key not in self.runs:
            self.runs[key] = train_full(self.args, self.files, task, rate, self.args.work / folder) | {"folder": folder}
            self.keep()

    def best(self, start: str) -> str:
        """The run of lowest validation loss whose key starts so."""
        return min((key for key in self.runs if key.startswith(start)), key=lambda key: self.runs[key]["val"])

    def test(self, key: str, task: str) -> None:
        """Scores of a run, or of `base`, on a task's test rows."""
        entry = self.runs.setdefault(key, {})
        if task in entry.setdefault("test", {}):
            return
        method, own, rank, rate = key.split("/") if key != "base" else ("base", "", "", "")
        adapter = method in ("lora", "alone")
        name = f"{own}-{rank}-{rate}" if adapter else "base"
        source = self.args.base if key == "base" else self.args.work / entry["folder"]
        found = written(self.args, self.files, task, source, [name])[name]
        entry["test"][task] = found["scores"]
        if task in self.document["samples"]:
            self.document["samples"][task][key] = found["texts"][:: max(1, len(found["texts"]) // 6)][:6]
        say(f"{key} on {task}: {json.dumps({k: round(v, 3) for k, v in found['scores'].items()})}")
        self.keep()

    def apart(self, task: str, rate: float) -> None:
        """How far the training losses of an adapter alone are from those of the same one in the joint run, by step."""
        alone = self.runs[f"alone/{task}/r{RANK}/{rate:g}"]
        folders = [self.args.work / entry["folder"] for entry in (alone, self.runs[f"lora/{task}/r{RANK}/{rate:g}"])]
        mine, other = (training_losses(folder, name_of(task, RANK, rate)) for folder in folders)
        most = {
            end: max(abs(mine[step] / other[step] - 1) for step in mine if step <= end) for end in (10, 40, 100, self.args.steps)
        }
        alone["apart"] = {str(end): share for end, share in most.items()}
        self.keep()

    def humans(self, task: str) -> None:
        """Slots that the references have themselves, and a few of them."""
        rows = [json.loads(line) for line in self.files[task]["test"].read_text(encoding="utf-8").splitlines()]
        if task != "form":
            found = slot_match([row["source"] for row in rows], [row["target"] for row in rows])
            self.runs.setdefault("references", {}).setdefault("test", {})[task] = found
        firsts = {row["source"]: row["target"] for row in reversed(rows)}
        pairs = [(source, firsts[source]) for source in dict.fromkeys(row["source"] for row in rows)]
        self.document["samples"].setdefault(task, {})["rows"] = pairs[:: max(1, len(pairs) // 6)][:6]
        self.keep()


def main() -> None:
    """All parts that results/result.json lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", type=Path, required=True, help="folder with devset.csv and testset_w_refs.csv")
    parser.add_argument("--base", type=Path, required=True, help="folder that base.py wrote")
    parser.add_argument("--work", type=Path, default=Path("out/forms"), help="where runs are written")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--each", type=int, default=9, help="of the test descriptions, for the way back")
    parser.add_argument("--lora", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--full", nargs="+", type=float, default=[5e-4, 2e-3])
    parser.add_argument("--ranks", nargs="*", type=int, default=[4, 64], help="others than 16, at the best rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "result.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    study = Study(args)
    for task in ("words", *TASKS):
        study.humans(task)
        study.test("base", task)
    study.adapters("lora", [(task, RANK, rate) for rate in args.lora for task in TASKS])
    for task in TASKS:
        study.test(study.best(f"lora/{task}/r{RANK}/"), task)
    for task in TASKS:
        for rate in args.full:
            study.full(task, rate)
        study.test(study.best(f"full/{task}/"), task)
    rates = {task: float(study.best(f"lora/{task}/r{RANK}/").split("/")[3]) for task in TASKS}
    for task in TASKS:
        study.adapters("alone", [(task, RANK, rates[task])])
        study.apart(task, rates[task])
        study.test(f"alone/{task}/r{RANK}/{rates[task]:g}", task)
    for key in ("lora/figures/", "full/figures/"):
        study.test(study.best(f"{key}r{RANK}/" if key.startswith("lora") else key), "words")
    if args.ranks:
        study.adapters("lora", [(task, rank, rates[task]) for rank in args.ranks for task in TASKS])
        for task in TASKS:
            for rank in args.ranks:
                study.test(f"lora/{task}/r{rank}/{rates[task]:g}", task)
    for key in [key for key in study.runs if study.runs[key].get("test") and key != "references"]:
        for task in (task for task in TASKS if task in study.runs[key]["test"]):
            study.test(key, f"{task}-dev")


if __name__ == "__main__":
    main()
