"""Whisper tiny.en on the Free Spoken Digit Dataset: a speaker held out, and three speakers' adapters jointly and each alone.

    python studies/spoken_digits/run.py --data fsdd.zip            # took an hour of a busy core
    python studies/spoken_digits/run.py --data fsdd.zip --device cuda

Writes results/result.json after each part; `table.py` makes the tables and the picture of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jiwer
import recordings
import torch
import transformers

import lorabank as lb
from lorabank import api
from lorabank.config.train import DataConfig
from lorabank.tasks.speech.scores import normaliser
from lorabank.training.console import ConsoleListener

HERE = Path(__file__).parent
MODEL = "whisper-tiny.en"
SPEAKERS = ("george", "jackson", "nicolas")
HELD_OUT = "yweweler"
METRICS = ["loss", "wer", "cer", "wer_normalized", "cer_normalized"]


def settings(args: argparse.Namespace, steps: int, batch: int, every: int, rows: int) -> dict[str, Any]:
    """What all runs share."""
    return {
        "model": MODEL,
        "task": "automatic-speech-recognition",
        "device": args.device,
        "threads": args.threads,
        "rank": 8,
        "batch_size": batch,
        "max_steps": steps,
        "learning_rate": args.learning_rate,
        "speech": {"window": args.window},
        "eval": {
            "every": every,
            "metrics": METRICS,
            "max_new_tokens": 12,
            "max_rows": rows,
            "max_prompts": rows,
            "batch_size": 16,
            "samples": 10,
        },
        "save": {"every": 0},
    }


def trained(args: argparse.Namespace, name: str, files: Mapping[str, Path], adapters: list[str], **how: int) -> dict[str, Any]:
    """One run: its scores, those during training, and its seconds."""
    output = args.work / "runs" / name
    console = ConsoleListener()
    mine = {one: {"data": str(files[f"train/{one}"]), "val_data": str(files[f"test/{one}"])} for one in adapters}
    try:
        result = lb.train(output=str(output), adapters=mine, listeners=[console], **settings(args, **how))
    finally:
        console.close()
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [event["clock"]["tokens_per_second"] for event in events if event["event"] == "step"]
    return {
        "adapters": {one: dict(result.adapters[one].best_metrics) for one in adapters},
        "base": {one: dict(result.base_metrics_of[one]) for one in adapters},
        "best_step": {one: result.adapters[one].best_step for one in adapters},
        "curve": [
            {"adapter": event["adapter"], "step": event["step"], **event["metrics"]}
            for event in events
            if event["event"] == "eval"
        ],
        "seconds": round(result.seconds, 1),
        "audio_seconds_a_second": round(sum(seconds) / len(seconds), 2),
    }


def difference(args: argparse.Namespace, name: str) -> float:
    """‖Δ of the joint run − Δ of the run alone‖ / ‖Δ alone‖ over all layers of an adapter's last step."""
    joint, alone = (lb.Adapter.load(args.work / "runs" / run / name / "last") for run in ("joint", f"alone-{name}"))
    apart = sum(
        float((joint.layers[p].B @ joint.layers[p].A - layer.B @ layer.A).square().sum()) for p, layer in alone.layers.items()
    )
    whole = sum(float((layer.B @ layer.A).square().sum()) for layer in alone.layers.values())
    return (apart / whole) ** 0.5


def digits(text: str) -> str:
    """The digits of a transcript, whether as words or figures: Whisper's normaliser, and no spaces ("one two" is "12")."""
    return "".join(letter for letter in normaliser("en")(text) if letter.isdigit())


def main() -> None:
    """Run what isn't in the result file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="fsdd.zip of github.com/Jakobovski/free-spoken-digit-dataset")
    parser.add_argument("--work", type=Path, default=Path("out/spoken_digits"), help="folder for recordings and runs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--window", type=float, default=4.0, help="seconds that the model hears at once in training")
    parser.add_argument("--per-digit", type=int, default=4, help="training recordings of a digit and speaker")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    files = recordings.tables(args.data, args.work / "data", HELD_OUT, SPEAKERS, args.per_digit)
    path = args.results / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    about = {
        "date": time.strftime("%Y-%m-%d"), "model": MODEL, "window": args.window, "per_digit": args.per_digit, "rank": 8,
        "learning_rate": args.learning_rate, "device": args.device, "threads": args.threads, "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": platform.machine(), "speakers": SPEAKERS, "held_out": HELD_OUT,
    }  # fmt: skip

    def part(name: str, make: Any) -> None:
        if name not in result:
            result[name] = make()
            result["about"] = about
            path.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")

    def base() -> dict[str, dict[str, float]]:
        """The model as it comes, over its own 30 seconds."""
        how: dict[str, Any] = {
            "metrics": METRICS,
            "max_new_tokens": 12,
            "device": args.device,
            "task": "automatic-speech-recognition",
        }
        return {
            name: api.evaluate(MODEL, DataConfig(test=str(files[f"test/{name}"])), ["base"], max_rows=20, **how)["base"]
            for name in (*SPEAKERS, "others")
        }

    def connected() -> dict[str, Any]:
        """Four digits in a row, which no adapter has heard: what is written, and its digits beside those that were said."""
        rows = recordings.connected(args.work / "data" / "connected", args.work / "data" / "recordings", HELD_OUT, 20, 4)
        own, window = args.work / "connected-30s.jsonl", args.work / "connected-window.jsonl"
        for file in (own, window):
            file.unlink(missing_ok=True)
        api.predict(MODEL, rows, own, ["base"], task="automatic-speech-recognition", device=args.device)
        api.predict(args.work / "runs" / "held-out", rows, window, ["base", "others"], device=args.device)
        read = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in (own, window)]
        heard = {"base": read[0], "base, window": read[1], "others, window": read[1]}
        return {
            name: {
                "digit_errors": jiwer.cer(
                    [digits(line["transcription"]) for line in lines], [digits(line[name.split(",")[0]]) for line in lines]
                ),
                "first": {"said": lines[0]["transcription"], "written": lines[0][name.split(",")[0]][:80]},
            }
            for name, lines in heard.items()
        }

    torch.set_num_threads(args.threads)
    short = {"steps": 16, "batch": 4, "every": 8, "rows": 30}
    part("held_out", lambda: trained(args, "held-out", files, ["others"], steps=40, batch=8, every=10, rows=50))
    part("joint", lambda: trained(args, "joint", files, list(SPEAKERS), **short))
    for name in SPEAKERS:
        part(f"alone-{name}", lambda name=name: trained(args, f"alone-{name}", files, [name], **short))
    part("difference", lambda: {name: difference(args, name) for name in SPEAKERS})
    part("base", base)
    part("connected", connected)


if __name__ == "__main__":
    main()
