"""Step time and peak memory of LoRA training in peer systems on one GPU, the same work for each.

The project's shared `bench/peers_gpu.py`, with Unsloth's QLoRA and a memory cap added; the printed keys are the same. Random
weights in the shape of Llama-3.1-8B, bf16, r=16 on all seven linear layers, causal LM loss. gpu_peers.py runs it for the table.

    python peers_gpu.py --impl peak                       # matrix-product ceilings of this GPU
    python peers_gpu.py --impl peft --bs 2 --seq 2048
    python peers_gpu.py --impl peft-liger|peft-compile|unsloth|unsloth-qlora [--ckpt 1|2] [--layers 32] [--rank 16]

--ckpt 1: activation checkpointing; 2: Unsloth's offloaded checkpoints. unsloth-qlora: bitsandbytes NF4 with double
quantisation, quantised while the bf16 weights load, embedding and head in bf16. Needs torch, transformers, peft; liger-kernel
for -liger; unsloth, unsloth_zoo, bitsandbytes, trl, datasets<5, cut_cross_entropy, torchao, tyro, hf_transfer, msgspec,
structlog, nest-asyncio, json5, diffusers for unsloth. No network.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ap = argparse.ArgumentParser()
ap.add_argument("--impl", required=True)
ap.add_argument("--bs", type=int, default=2)
ap.add_argument("--seq", type=int, default=2048)
ap.add_argument("--ckpt", type=int, default=0)
ap.add_argument("--layers", type=int, default=32)
ap.add_argument("--rank", type=int, default=16)
ap.add_argument("--steps", type=int, default=8)
ap.add_argument("--tokenizer", help="folder with any small tokenizer; Unsloth wants one beside the model")
ap.add_argument("--cap-gib", type=float, help="memory that the process may take")
args = ap.parse_args()
if args.impl.startswith("unsloth"):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"))
    import unsloth  # noqa: F401  must come before transformers
import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def timed_ms(step: Callable[[], Any], warmup: int, runs: int) -> tuple[float, Any]:
    """(the upper median of the runs' milliseconds, what the last one gave)."""
    out = None
    for _ in range(warmup):
        out = step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        out = step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median_high(times), out


def peak() -> None:
    """Print the rates of bf16 and fp8 matrix products."""
    for m, n, k in [(8192, 8192, 8192), (4096, 14336, 4096), (16384, 14336, 4096)]:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        ms, _ = timed_ms(lambda x=x, w=w: x @ w.T, 5, 30)
        xq, wq = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        sx, sw = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")

        def product(xq: Any = xq, wq: Any = wq, sx: Any = sx, sw: Any = sw) -> torch.Tensor:
            return torch._scaled_mm(xq, wq.T, sx, sw, out_dtype=torch.bfloat16, use_fast_accum=True)

        ms8, _ = timed_ms(product, 5, 30)
        rates = {"bf16_tflops": round(2 * m * n * k / ms / 1e9), "fp8_tflops": round(2 * m * n * k / ms8 / 1e9)}
        print(json.dumps({"impl": "peak", "m": m, "n": n, "k": k, **rates, "gpu": torch.cuda.get_device_name()}), flush=True)


def llama(layers: int) -> Any:
    """Random weights in bf16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    return model


def saved_llama() -> str:
    """A folder with the model, for Unsloth, which loads from folders only."""
    folder = Path(tempfile.gettempdir()) / f"llama_{args.layers}"
    if not folder.exists():
        model = llama(args.layers)
        model.save_pretrained(folder)
        if args.tokenizer:
            shutil.copytree(args.tokenizer, folder, dirs_exist_ok=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return str(folder)


def build_unsloth() -> Any:
    """Unsloth's model with its adapter, in bf16 or in 4 bits."""
    from unsloth import FastLanguageModel

    in_4bit = args.impl == "unsloth-qlora"
    model, _ = FastLanguageModel.from_pretrained(
        saved_llama(), max_seq_length=args.seq, dtype=torch.bfloat16, load_in_4bit=in_4bit, local_files_only=True
    )
    if in_4bit:
        check_4bit(model)
    return FastLanguageModel.get_peft_model(
        model, r=args.rank, target_modules=TARGETS, lora_alpha=32, lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth" if args.ckpt == 2 else bool(args.ckpt), max_seq_length=args.seq,
    )  # fmt: skip


def check_4bit(model: Any) -> None:
    """Unsloth falls back to 16 bits quietly: raise RuntimeError then."""
    import bitsandbytes

    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    kinds = {m.weight.quant_state.quant_type for m in layers}
    if len(layers) != 7 * args.layers or kinds != {"nf4"}:
        raise RuntimeError(f"{len(layers)} 4-bit layers of kinds {kinds}, not {7 * args.layers} of nf4")


def build() -> Any:
    """The peer's model with its adapter."""
    if args.impl.startswith("unsloth"):
        return build_unsloth()
    if "liger" in args.impl:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = llama(args.layers)
    if not args.impl.startswith("full"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))
    if args.ckpt:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def main() -> None:
    """Measure the peer and print a line of JSON."""
    if args.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib / total))
    torch.manual_seed(0)
    model = build().train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    forward = torch.compile(model) if "compile" in args.impl else model
    ids = torch.randint(0, 128000, (args.bs, args.seq), device="cuda")

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = forward(input_ids=ids, labels=ids, attention_mask=None)
            loss = out.loss if hasattr(out, "loss") else out[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    ms, loss = timed_ms(step, 3, args.steps)
    tokens = args.bs * args.seq
    params = args.layers * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) + 128256 * 4096
    useful = tokens * (2 * params + args.layers * 2 * args.seq * 4096) * 2
    found = {
        "impl": args.impl, "batch": args.bs, "seq": args.seq, "ckpt": args.ckpt, "layers": args.layers, "rank": args.rank,
        "ms": round(ms, 1), "tokens_per_s": round(tokens / ms * 1e3), "useful_tflops": round(useful / ms / 1e9, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "loss": float(loss),
        "trainable": sum(p.numel() for p in trainable), "gpu": torch.cuda.get_device_name(),
    }  # fmt: skip
    print(json.dumps(found), flush=True)


if args.impl == "peak":
    peak()
else:
    try:
        main()
    except Exception:  # noqa: BLE001  whatever a peer raises: its trace, and a code that says so
        traceback.print_exc()
        sys.exit(1)
