"""Does `lorabank export --to gguf` write what llama.cpp reads? Checks with the real tool, in an environment of its own.

    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python==0.3.36        # builds llama.cpp: about 8 minutes on two cores
    python scripts/check_llama_cpp.py tokens --python LLAMA/bin/python --gguf BASE.gguf --work WORK formal=OUT/formal
    python scripts/check_llama_cpp.py tiny --python LLAMA/bin/python
    python scripts/check_llama_cpp.py folder --python LLAMA/bin/python
    python scripts/check_llama_cpp.py convert --source llama.cpp

`tokens`: greedy tokens and log-probabilities of the bank beside llama.cpp's, for the base, each adapter file and each merged
model. The base is unpacked to fp32 first, since llama.cpp rounds activations beside quantised weights. `tiny`: the same for a
tiny random GPT-2, an embedding, and stacked experts. `folder`:
transformers models (SmolLM2, tiny random ones) written as GGUF. `convert`: for a tiny random model of every architecture
in the table but GPT-2, the tensors of our adapter file beside those of llama.cpp's own converter, convert_lora_to_gguf.py
(`--source`: llama.cpp's source tree, which the source package of llama-cpp-python carries). It turns PEFT's GPT-2 files as if
their A and B lay transposed, as the weights do, and they don't. All exit 1 where something differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lorabank.formats.adapter import Adapter

ROOT = Path(__file__).resolve().parents[1]
GENERATE = ROOT / "studies" / "llama_cpp" / "generate_llama_cpp.py"
COMPARE = ROOT / "studies" / "vllm" / "compare.py"
MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


def child(*words: object, **environment: str) -> None:
    """Run a command with the repository on the path; exits with its status where that isn't 0."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", **environment}
    done = subprocess.run([str(word) for word in words], env=env, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def tokens(args: argparse.Namespace) -> None:
    """`tokens`: export, generate on both sides, compare."""
    from lorabank.formats.gguf_adapter import write_adapter_gguf
    from lorabank.formats.gguf_base import read_base
    from lorabank.merging.gguf import merge_gguf
    from lorabank.models.load import locate

    model = locate(args.model)
    adapters = dict(item.split("=", 1) for item in args.adapters)
    args.work.mkdir(parents=True, exist_ok=True)
    base = args.work / "base.gguf"
    merge_gguf(args.gguf, None, base, dtype="f32", all_tensors=True)
    rows, pairs = [f"base={base}"], []
    for name, folder in adapters.items():
        adapter = Adapter.load(folder)
        written = write_adapter_gguf(adapter, read_base(model), args.work / f"{name}.gguf")
        merged = merge_gguf(base, adapter, args.work / f"{name}-merged.gguf", dtype="f32")
        print(
            f"{name}: alpha {written.alpha:g}, {written.tensors} tensors, {written.folded} layers folded; {merged.changed} merged"
        )
        rows += [f"{name}={base}+{written.file}", f"{name}-merged={merged.file}"]
        pairs += [f"{name}={folder}", f"{name}-merged={folder}"]
    prompts, answers = args.work / "prompts.json", args.work / "llama_cpp.json"
    options = [word for flag, value in (("--prompt", args.prompt), ("--system", args.system)) if value for word in (flag, value)]
    count = ["--count", args.count, "--max-new-tokens", args.tokens]
    child(sys.executable, COMPARE, "prompts", "--model", model, "--data", args.data, *count, *options, "--output", prompts)
    child(args.python, GENERATE, "--prompts", prompts, "--output", answers, "--threads", args.threads, *rows)
    check = ["--prompts", prompts, "--vllm", answers, "--output", args.work / "result.json", "--threads", args.threads]
    child(sys.executable, COMPARE, "check", "--model", model, "--tool", "llama.cpp", "--twins", *check, *pairs)


def convert(args: argparse.Namespace) -> None:
    """`convert`: our adapter files beside those of llama.cpp's converter, tensor by tensor."""
    import gguf
    import numpy as np

    from lorabank.formats.gguf_adapter import write_adapter_gguf
    from lorabank.formats.gguf_base import ARCHITECTURES, read_base

    wrong = 0
    for kind in (kind for kind in ARCHITECTURES if kind != "gpt2"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            adapter = tiny_adapter(kind, folder / "base")
            adapter.save(folder / "adapter")
            write_adapter_gguf(adapter, read_base(folder / "base"), folder / "ours.gguf")
            script = args.source / "convert_lora_to_gguf.py"
            command = [args.python, script, "--base", folder / "base", "--outtype", "f32", "--outfile", folder / "theirs.gguf"]
            done = subprocess.run([*map(str, command), str(folder / "adapter")], capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{kind:>12}: their converter stopped: {done.stderr.strip().splitlines()[-1]}")
                wrong += 1
                continue
            ours, theirs = (
                {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(folder / f"{side}.gguf").tensors}
                for side in ("ours", "theirs")
            )
            differing = [name for name in ours.keys() | theirs.keys() if not _equal(ours.get(name), theirs.get(name))]
            wrong += bool(differing)
            print(f"{kind:>12}: {len(ours)} tensors, {f'DIFFERENT: {sorted(differing)[:4]}' if differing else 'equal'}")
    sys.exit(1 if wrong else 0)


def _equal(ours: object, theirs: object) -> bool:
    import numpy as np

    return isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray) and np.array_equal(ours, theirs)


def tiny_adapter(kind: str, folder: Path) -> Adapter:
    """A random adapter of a tiny random model of this kind, which is saved to `folder`."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    import lorabank as lb

    config = CONFIG_MAPPING[kind](**SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    targets = ["attention"] if kind in MIXTURES else "all-linear"  # their converter reads no stacks of PEFT's
    return randomised(lb.attach(model), lb.AdapterConfig(rank=4, alpha=8, targets=targets))


def randomised(bank: Any, config: Any) -> Adapter:
    """An adapter of large random numbers, which stays in the bank as `tiny`."""
    bank.add("tiny", config)
    with torch.no_grad():
        for parameter in bank.parameters("tiny"):
            parameter.normal_(std=0.3)
    return bank.adapter("tiny")


def tiny(args: argparse.Namespace) -> None:
    """`tiny`: a GPT-2, an embedding, and experts, beside llama.cpp."""
    import lorabank as lb
    from lorabank.formats.gguf_adapter import write_adapter_gguf
    from lorabank.formats.gguf_base import read_base
    from lorabank.merging.gguf import merge_gguf

    sys.path.insert(0, str(GENERATE.parent))
    import tiny_models  # pyright: ignore[reportMissingImports]  (a script beside the study's others)

    spec = {"prompts": [list(range(3, 60))], "max_new_tokens": 24, "stop_token_ids": []}
    cases = {
        "gpt2": (tiny_models.gpt2, lb.AdapterConfig(rank=4, alpha=8, alpha_pattern={"c_fc": 3.0})),
        "embedding": (tiny_models.llama, lb.AdapterConfig(rank=4, alpha=8, targets=["embed_tokens", "q_proj"])),
        "qwen3_moe": (tiny_models.mixture, lb.AdapterConfig(rank=4, alpha=8, rank_pattern={"down_proj": 2})),
        "mixtral": (functools.partial(tiny_models.mixture, kind="mixtral"), lb.AdapterConfig(rank=4, alpha=8)),
    }
    wrong = 0
    for name, (build, config) in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            model = build(work / "base.gguf")
            bank = lb.attach(model)
            adapter = randomised(bank, config)
            write_adapter_gguf(adapter, read_base(work / "base.gguf"), work / "a.gguf")
            merge_gguf(work / "base.gguf", adapter, work / "m.gguf", dtype="f32")
            (work / "prompts.json").write_text(json.dumps(spec))
            rows = [f"base={work}/base.gguf", f"adapter={work}/base.gguf+{work}/a.gguf", f"merged={work}/m.gguf"]
            child(args.python, GENERATE, "--prompts", work / "prompts.json", "--output", work / "out.json", *rows)
            for row, (found,) in json.loads((work / "out.json").read_text())["answers"].items():
                prompt, tokens_found = spec["prompts"][0], found["tokens"]
                with torch.no_grad(), bank.route([lb.BASE if row == "base" else "tiny"]):
                    logits = model(torch.tensor([prompt + tokens_found])).logits[0, len(prompt) - 1 : -1].double()
                same = logits.argmax(-1).tolist() == tokens_found
                apart = (logits.log_softmax(-1).topk(2, -1).values - torch.tensor(found["top2"])).abs().max()
                wrong += not same
                print(
                    f"{name:>10} {row:>8}: {len(tokens_found)} tokens {'equal' if same else 'DIFFER'}, at most {apart:.1e} apart"
                )
    sys.exit(1 if wrong else 0)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("llama", "mistral", "qwen2", "qwen3")},
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
}
"""Tiny random models that are written as GGUF from transformers: name → (`model_type`, settings beside SIZES)."""


def folder(args: argparse.Namespace) -> None:
    """`folder`: transformers models written as GGUF, and the tokenizer of one, beside llama.cpp."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from lorabank.models.gguf_write import write_model_gguf
    from lorabank.models.load import load_base

    base = load_base(args.model, dtype="fp32", device="cpu")
    ids = base.tokenizer("Explain 3 + 45 = 48, naïve café:\n\n  - ")["input_ids"]
    models: dict[str, Any] = {args.model: base.model}
    for name, (kind, more) in FOLDERS.items():
        torch.manual_seed(0)
        settings = {
            **SIZES,
            **more,
            "vocab_size": len(base.tokenizer),
            "max_position_embeddings": 256,
            "moe_intermediate_size": 96,
        }
        models[name] = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings)).eval()
        with torch.no_grad():
            for key, parameter in models[name].named_parameters():
                parameter.mul_(20.0 if key.endswith("mlp.gate.weight") else 3.0 if parameter.ndim > 1 else 1.0)
    wrong = 0
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as scratch:
            file, told = Path(scratch) / "m.gguf", Path(scratch) / "prompts.json"
            write_model_gguf(model, base.tokenizer, base.folder, file, where=name)
            told.write_text(json.dumps({"prompts": [ids], "max_new_tokens": 24, "stop_token_ids": []}))
            child(args.python, GENERATE, "--prompts", told, "--output", Path(scratch) / "out.json", f"m={file}")
            (found,) = json.loads((Path(scratch) / "out.json").read_text())["answers"]["m"]
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *found["tokens"]]])).logits[0, len(ids) - 1 : -1].double()
        same = logits.argmax(-1).tolist() == found["tokens"]
        apart = (logits.log_softmax(-1).topk(2, -1).values - torch.tensor(found["top2"])).abs().max()
        wrong += not same
        print(f"{name:>22}: {len(found['tokens'])} tokens {'equal' if same else 'DIFFER'}, at most {apart:.1e} apart", flush=True)
    sys.exit(1 if wrong else 0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("tokens", help="greedy tokens beside llama.cpp's")
    one.add_argument("--python", required=True, help="the interpreter of llama-cpp-python's environment")
    one.add_argument("--gguf", type=Path, required=True, help="the base as GGUF, in a storage that gguf unpacks")
    one.add_argument("--model", default="smollm2-135m-instruct", help="the same base for transformers (default: %(default)s)")
    one.add_argument("--data", type=Path, default=ROOT / "examples/data/e2e_test.jsonl", help="JSONL with the prompts")
    one.add_argument("--prompt", help="template of the user turn, as in training")
    one.add_argument("--system", help="system turn, as in training")
    one.add_argument("--count", type=int, default=8, help="prompts (default %(default)s)")
    one.add_argument("--tokens", type=int, default=48, help="longest answer (default %(default)s)")
    one.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    one.add_argument("--work", type=Path, required=True, help="folder for the files; two fp32 copies of the base go there")
    one.add_argument("adapters", nargs="+", metavar="NAME=FOLDER")
    one.set_defaults(run=tokens)
    three = commands.add_parser("tiny", help="a tiny GPT-2, and an embedding, beside llama.cpp's")
    three.add_argument("--python", required=True, help="the interpreter of llama-cpp-python's environment")
    three.set_defaults(run=tiny)
    four = commands.add_parser("folder", help="transformers models written as GGUF, beside llama.cpp's")
    four.add_argument("--python", required=True, help="the interpreter of llama-cpp-python's environment")
    four.add_argument("--model", default="smollm2-135m-instruct", help="a model whose tokenizer is used (default: %(default)s)")
    four.set_defaults(run=folder)
    two = commands.add_parser("convert", help="adapter files beside those of llama.cpp's converter")
    two.add_argument("--source", type=Path, required=True, help="llama.cpp's source tree")
    two.add_argument("--python", default=sys.executable, help="interpreter for the converter (default: this one)")
    two.set_defaults(run=convert)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
