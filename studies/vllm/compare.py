"""Do lorabank and vLLM say the same with the same adapters? Greedy tokens of both. Runs in lorabank's environment.

    python compare.py prompts --model FOLDER --data rows.jsonl --output prompts.json
    (then generate_vllm.py in vLLM's environment)
    python compare.py check --model FOLDER --prompts prompts.json --vllm vllm.json --output result.json formal=OUT/formal …

The exit status of `check` is 0 when every row agrees, differences at near-ties apart (which are listed), and 1 otherwise; 1 too
when base and adapters, or two adapters, answer every prompt alike, for then the agreement says nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

NEAR_TIE = 1e-3
"""Logits. Two fp32 forwards that sum in another order differ by about 1e-4 here: a choice by less than this may go either way."""


TWIN = "-merged"
"""Ends the name of an adapter that is meant to answer as the one without it."""

Answers = dict[str, list[dict[str, Any]]]
"""By adapter name, a prompt each: `tokens` and `top2`, as generate_vllm.py writes them."""


def versions(*packages: str) -> dict[str, str]:
    """The installed versions, Python's among them."""
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; exits naming the line that isn't one."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            sys.exit(f"{path}:{number}: expected a JSON object ({error})")
        if not isinstance(row, dict):
            sys.exit(f"{path}:{number}: expected an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def conversation(row: dict[str, Any], template: str | None, system: str | None) -> list[dict[str, str]]:
    """The turns before the first answer: from `template` with the row's columns, or from `messages`, `prompt` or `mr`."""
    if template is not None:
        turns = [{"role": "user", "content": template.format_map(row)}]
    elif "messages" in row:
        turns = list(row["messages"])
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        turns = turns[: answers[0]] if answers else turns
    elif isinstance(row.get("prompt"), list):
        turns = list(row["prompt"])
    elif "prompt" in row or "mr" in row:
        turns = [{"role": "user", "content": row["prompt"] if "prompt" in row else row["mr"]}]
    else:
        sys.exit(
            f"expected rows with messages, prompt or mr, got the columns {sorted(row)}: give --prompt with a template of them"
        )
    if system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def write_prompts(args: argparse.Namespace) -> int:
    """`compare.py prompts`: the first `count` different prompts of a data file as token ids."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts: list[list[int]] = []
    for row in read_rows(args.data):
        turns = conversation(row, args.prompt, args.system)
        ids = [int(i) for i in tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]]
        if ids not in prompts:
            prompts.append(ids)
        if len(prompts) == args.count:
            break
    if not prompts:
        sys.exit(f"{args.data}: no rows")
    ends = [GenerationConfig.from_pretrained(args.model).eos_token_id, tokenizer.eos_token_id]
    stop = sorted({int(i) for end in ends if end is not None for i in (end if isinstance(end, list) else [end])})
    spec = {"prompts": prompts, "max_new_tokens": args.max_new_tokens, "stop_token_ids": stop}
    args.output.write_text(json.dumps(spec) + "\n", encoding="utf-8")
    lengths = [len(ids) for ids in prompts]
    print(f"wrote {args.output}: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, stop at {stop}")
    return 0


def load_bank(folder: Path, adapters: dict[str, Path]) -> tuple[Any, Any]:
    """The base model in fp32 and a bank over it that holds every adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    import lorabank as lb

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bank = lb.attach(model)
    for name, path in adapters.items():
        bank.load(name, lb.Adapter.load(path))
    return model, bank


def routes(names: list[str]) -> list[Any]:
    """One route entry a row: `base` becomes `lb.BASE`."""
    import lorabank as lb

    return [lb.BASE if name == "base" else name for name in names]


def generate(model: Any, bank: Any, names: list[str], spec: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Greedy tokens by adapter name, one list a prompt. Base and all adapters answer a prompt as rows of one batch."""
    import torch

    answers: dict[str, list[list[int]]] = {name: [] for name in names}
    for ids in spec["prompts"]:
        rows = torch.tensor([ids] * len(names))
        with torch.no_grad(), bank.route(routes(names)):
            output = model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=spec["max_new_tokens"],
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                eos_token_id=spec["stop_token_ids"],
                pad_token_id=spec["stop_token_ids"][0],
            )
        for name, row in zip(names, output[:, len(ids) :].tolist(), strict=True):
            answers[name].append(until_stop(row, spec["stop_token_ids"]))
    return answers


def until_stop(tokens: list[int], stop: list[int]) -> list[int]:
    """Tokens up to the first stop token, that token included."""
    for i, token in enumerate(tokens):
        if token in stop:
            return tokens[: i + 1]
    return tokens


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Index of the first token that differs, or None."""
    if ours == theirs:
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def replay(model: Any, bank: Any, name: str, prompt: list[int], answer: list[int]) -> tuple[Any, Any]:
    """Log-probabilities of the answer's two likeliest tokens (n, 2), and the top-2 logit gap (n,), from one forward over both."""
    import torch

    with torch.no_grad(), bank.route(routes([name])):
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    top = logits.log_softmax(-1).topk(2, dim=-1).values
    return top, top[:, 0] - top[:, 1]


def compare(model: Any, bank: Any, spec: dict[str, Any], ours: dict[str, list[list[int]]], theirs: Answers) -> dict[str, Any]:
    """By adapter name: rows that agree, differences with their top-2 logit gaps, and how far apart the log-probabilities are."""
    summary: dict[str, Any] = {}
    for name, rows in ours.items():
        differences, distances, gaps, tokens = [], [], [], 0
        for index, (prompt, row, other) in enumerate(zip(spec["prompts"], rows, theirs[name], strict=True)):
            top, gap = replay(model, bank, name, prompt, row)
            at = first_difference(row, other["tokens"])
            same = len(row) if at is None else at
            tokens += same
            gaps += gap.tolist()
            for mine, their in zip(top.tolist()[:same], other["top2"], strict=False):
                distances += [abs(a - b) for a, b in zip(mine, their, strict=True)]
            if at is not None:
                apart = float(gap[at]) if at < len(row) else None
                differences.append(
                    {
                        "prompt": index,
                        "token": at,
                        "lorabank": row[at : at + 1],
                        "vllm": other["tokens"][at : at + 1],
                        "top2_logit_gap": apart,
                        "near_tie": apart is not None and apart < NEAR_TIE,
                    }
                )
        summary[name] = {
            "rows": len(rows),
            "rows_that_agree": len(rows) - len(differences),
            "tokens_that_agree": tokens,
            "differences": differences,
            "largest_top2_logprob_distance": max(distances, default=0.0),
            "smallest_top2_logit_gap": min(gaps, default=0.0),
            "rows_unlike_base": sum(a != b for a, b in zip(rows, ours["base"], strict=True)),
        }
    return summary


def print_summary(summary: dict[str, Any], tool: str) -> None:
    """One line an adapter, then one a difference."""
    for name, part in summary.items():
        print(
            f"{name:>12}: {part['rows_that_agree']} of {part['rows']} rows agree ({part['tokens_that_agree']} tokens); "
            f"top-2 log-probabilities at most {part['largest_top2_logprob_distance']:.1e} apart; "
            f"closest choice {part['smallest_top2_logit_gap']:.1e}; {part['rows_unlike_base']} rows unlike the base's"
        )
        for item in part["differences"]:
            kind = "near-tie" if item["near_tie"] else "DIFFERENT"
            gap = "none" if item["top2_logit_gap"] is None else f"{item['top2_logit_gap']:.1e}"
            print(
                f"{'':>14}prompt {item['prompt']} token {item['token']}: lorabank {item['lorabank']} {tool} {item['vllm']}, "
                f"our top-2 logit gap {gap} ({kind})"
            )


def check(args: argparse.Namespace) -> int:
    """`compare.py check`: generate with the bank, compare with vLLM's file, print and write the result."""
    import torch

    import lorabank as lb

    adapters = {}
    for item in args.adapters:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            sys.exit(f"adapter {item!r}: expected NAME=FOLDER")
        adapters[name] = Path(folder)
    spec = json.loads(args.prompts.read_text(encoding="utf-8"))
    theirs = json.loads(args.vllm.read_text(encoding="utf-8"))
    names = ["base", *adapters]
    if set(theirs["answers"]) != set(names):
        sys.exit(f"{args.vllm} holds {sorted(theirs['answers'])}, expected {sorted(names)}: give both the same adapters")
    torch.set_num_threads(args.threads)
    model, bank = load_bank(args.model, adapters)
    ours = generate(model, bank, names, spec)
    summary = compare(model, bank, spec, ours, theirs["answers"])
    print_summary(summary, args.tool)
    agree = all(item["near_tie"] for part in summary.values() for item in part["differences"])
    expected = {f"{name}{TWIN}" for name in names} if args.twins else set[str]()
    pairs = [(a, b) for a, b in itertools.combinations(names, 2) if b != f"{a}{TWIN}" or b not in expected]
    twins = [f"{a} and {b}" for a, b in pairs if ours[a] == ours[b]]
    for pair in twins:
        print(f"{pair} answer every prompt alike, so a mix-up would not show: train longer, or give other prompts")
    document = {
        "agree": agree and not twins,
        "indistinguishable": twins,
        "adapters": summary,
        "near_tie_logits": NEAR_TIE,
        "prompts": len(spec["prompts"]),
        "max_new_tokens": spec["max_new_tokens"],
        "vllm": {key: theirs[key] for key in ("versions", "settings", "seconds")},
        "lorabank": {
            "versions": {"lorabank": lb.__version__} | versions("torch", "transformers", "safetensors"),
            "ranks": {name: bank.config(name).rank for name in adapters},
            "threads": args.threads,
        },
        "tokens": {name: {"lorabank": ours[name], "vllm": [row["tokens"] for row in theirs["answers"][name]]} for name in names},
    }
    args.output.write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(f"{'agree' if document['agree'] else 'DO NOT AGREE'}; wrote {args.output}")
    return 0 if document["agree"] else 1


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    prompts = commands.add_parser("prompts", help="write prompts as token ids")
    prompts.add_argument("--model", type=Path, required=True, help="folder of the base model")
    prompts.add_argument(
        "--data", type=Path, required=True, help="JSONL with messages, prompt or mr, or other columns and --prompt"
    )
    prompts.add_argument("--prompt", help="template of the user turn with columns in braces, as in training")
    prompts.add_argument("--system", help="system turn, as in training")
    prompts.add_argument("--count", type=int, default=16, help="prompts (default 16)")
    prompts.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default 64)")
    prompts.add_argument("--output", type=Path, required=True, help="JSON to write")
    prompts.set_defaults(run=write_prompts)
    checking = commands.add_parser("check", help="generate with lorabank and compare with vLLM's tokens")
    checking.add_argument("--model", type=Path, required=True, help="folder of the base model")
    checking.add_argument("--prompts", type=Path, required=True, help="JSON from `compare.py prompts`")
    checking.add_argument("--vllm", type=Path, required=True, help="JSON from generate_vllm.py")
    checking.add_argument("--output", type=Path, required=True, help="JSON to write")
    checking.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    checking.add_argument("--tool", default="vLLM", help="whose tokens these are, for messages (default %(default)s)")
    checking.add_argument(
        "--twins", action="store_true", help=f"NAME{TWIN} is the adapter NAME in another form, and answers alike"
    )
    checking.add_argument("adapters", nargs="+", metavar="NAME=FOLDER", help="the adapters that the tool ran")
    checking.set_defaults(run=check)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
