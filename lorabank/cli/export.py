"""`lorabank export`: an adapter in the form that another tool reads."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabank.cli.export_task import check_task
from lorabank.cli.folders import chosen_path, refuse_existing, whole_folder
from lorabank.cli.parser import CommandParser
from lorabank.config.convert import dtype_name
from lorabank.config.typed import named_as_typed
from lorabank.errors import ConfigError, ModelError, OutputError, closest
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.formats.adapter import Adapter

EXAMPLES = """\
examples:
  lorabank export out/support/formal --to vllm --output exported/formal
  lorabank export out/support/formal --to gguf --output formal.gguf
  lorabank export out/support/formal --to gguf --merged --output merged.gguf
  lorabank export out/support/formal --to gguf --merged --base base.gguf --output merged.gguf
  lorabank export out/support/formal --to ollama --base base.gguf --output exported/ollama

vllm: PEFT's files with each layer's scaling folded into B and one rank for all, as any vLLM reads them.
gguf: an adapter for llama.cpp (`llama-cli -m BASE.gguf --lora FILE`), or with --merged a whole model.
ollama: the same beside a Modelfile (`ollama create NAME -f FOLDER/Modelfile`).
"""

NO_TEMPLATE = (
    "There is no chat template here that could be put into ollama's language. Add a TEMPLATE: without one ollama may send the "
    "bare prompt."
)


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `export`."""
    parser = subparsers.add_parser(
        "export",
        help="write an adapter for vLLM, llama.cpp or ollama",
        description="Write an adapter in the form that another tool reads, or say why it can't be.",
        epilog=EXAMPLES,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or file")
    parser.add_argument("--to", metavar="TOOL", required=True, help=f"{', '.join(EXPORTS)}")
    parser.add_argument("--output", metavar="PATH", required=True, help="folder (gguf: file) to write; must not exist")
    parser.add_argument(
        "--base", "--model", metavar="MODEL", help="base: folder, GGUF file or hub id (default: the one that it names)"
    )
    parser.add_argument("--merged", action="store_true", help="gguf, ollama: a whole model, the adapter in its weights")
    parser.add_argument(
        "--dtype", type=gguf_dtype, metavar="TYPE", help="gguf: f32 or f16 of an adapter (f32); also bf16, q8_0 merged (f16)"
    )
    parser.add_argument(
        "--all-tensors", action="store_true", help="--merged: every matrix in --dtype, not only those that change"
    )
    parser.add_argument("--force", action="store_true", help="gguf, ollama: even where the base seems to be another model")
    parser.add_argument("--from", dest="from_name", metavar="NAME", help="ollama: its own name of the base, for FROM")
    return parser


def gguf_dtype(text: str) -> str:
    """GGUF's name of a storage, however it is spelled."""
    name = dtype_name(text)
    return {"fp32": "f32", "fp16": "f16"}.get(name, name)


def run(args: argparse.Namespace) -> int:
    """Export; what can't be is refused before anything is written."""
    if args.to not in EXPORTS:
        raise ConfigError(f"--to: expected one of {', '.join(EXPORTS)}, got {args.to!r}{closest(args.to, EXPORTS)}")
    unused = {"--merged": args.merged, "--dtype": args.dtype, "--force": args.force} if args.to == "vllm" else {}
    unused |= {"--all-tensors": args.all_tensors} if not args.merged else {}
    unused |= {"--from": args.from_name} if args.to != "ollama" or args.merged else {}
    if wrong := [flag for flag, value in unused.items() if value]:
        merged = " --merged" if args.merged else ""
        raise ConfigError(f"{wrong[0]}: means nothing with --to {args.to}{merged}. Leave it out.")
    output = refuse_existing(args.output)
    from lorabank.formats.adapter import Adapter

    adapter = Adapter.load(args.adapter)
    check_task(args.to, adapter, args.base or adapter.base_model, str(args.adapter))
    EXPORTS[args.to](args, adapter, output)
    return 0


def to_vllm(args: argparse.Namespace, adapter: Adapter, output: Path) -> None:
    """A folder of PEFT's files."""
    from lorabank.formats.vllm import check_shapes, vllm_adapter, vllm_rank
    from lorabank.formats.vllm_experts import model_type_of
    from lorabank.models.load import check_name
    from lorabank.training.serving import HEAD, vllm_line

    base = args.base or adapter.base_model
    if args.base:  # what an adapter names by itself may lie on another machine
        check_name(args.base)
    folder = Path(base).expanduser() if base and Path(base).expanduser().is_dir() else None
    exported = vllm_adapter(adapter, where=args.adapter, model_type=model_type_of(folder) if folder else None)
    if folder:
        check_shapes(exported, folder, where=args.adapter)
    with whole_folder(output) as scratch:
        exported.save(scratch)
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    if any(layer.stack for layer in adapter.layers.values()):
        print("note: vLLM runs adapters of experts on a GPU only; for a CPU merge them (lorabank merge) and serve that")
    if adapter.modules:
        print(f"note: {HEAD}")
    was = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    print(
        f"saved: {output} ({counted(len(exported.layers), 'layer')}, rank {was} as {vllm_rank(exported)}, scaling folded into B)"
    )
    print(vllm_line(base or "MODEL", {output.name: str(output)}, vllm_rank(exported)))


def to_gguf(args: argparse.Namespace, adapter: Adapter, output: Path) -> None:
    """A GGUF file."""
    if output.suffix.lower() != ".gguf":
        raise OutputError(f"--output {output}: a GGUF file is written, so its name should end with .gguf")
    base = base_of(args, adapter)
    write_gguf(args, adapter, base, output)
    if args.merged:
        print(f"try it: {shlex.join(['llama-cli', '-m', str(output)])}")
    else:
        file = str(base) if base.is_file() else "BASE.gguf"
        print(f"try it: {shlex.join(['llama-cli', '-m', file, '--lora', str(output)])}")


def to_ollama(args: argparse.Namespace, adapter: Adapter, output: Path) -> None:
    """A folder with a GGUF file and a Modelfile."""
    from lorabank.formats.modelfile import modelfile
    from lorabank.models.chat_templates import tokenizer_for, turn_template

    base = base_of(args, adapter)
    name = "model.gguf" if args.merged else "adapter.gguf"
    found = tokenizer_for(chosen_path(args.adapter, place="ADAPTER"), base)
    template, stop = turn_template(found[0]) if found else (None, [])
    with whole_folder(output) as scratch:
        write_gguf(args, adapter, base, scratch / name, shown=output / name)
        origin = f"./{name}" if args.merged else args.from_name or str(base.resolve())
        note = "" if template or args.from_name else NO_TEMPLATE
        text = modelfile(origin, adapter=None if args.merged else f"./{name}", template=template, stop=stop, note=note)
        (scratch / "Modelfile").write_text(text, encoding="utf-8")
    if found:
        print(f"chat template: of the tokenizer in {found[1]}")
    if note:
        print(f"note: {note}")
    print(f"saved: {output / 'Modelfile'}")
    print(f"try it: {shlex.join(['ollama', 'create', output.name, '-f', str(output / 'Modelfile')])}")


EXPORTS: Mapping[str, Callable[[argparse.Namespace, Any, Path], None]] = {"vllm": to_vllm, "gguf": to_gguf, "ollama": to_ollama}
"""Tool → what writes for it."""


def base_of(args: argparse.Namespace, adapter: Adapter) -> Path:
    """The base's folder, or its GGUF file. Raises ModelError where it isn't said, or isn't there."""
    from lorabank.config.paths import expanded
    from lorabank.models.load import locate

    name = args.base or adapter.base_model
    if not name:
        raise ModelError(f"{args.adapter}: the adapter doesn't name its base model. Name it with --base.")
    path = expanded(name, place="--base", kind=ModelError)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    return locate(name)


@contextmanager
def gguf_of(base: Path, beside: Path) -> Iterator[Path]:
    """The base as a GGUF file: itself, or written for this from a transformers folder, in the dtype that it is stored in."""
    if base.is_file():
        yield base
        return
    from lorabank.cli.merge import stored_dtype
    from lorabank.formats.gguf_base import require_gguf
    from lorabank.formats.scratch import scratch_beside
    from lorabank.formats.vllm_experts import model_type_of
    from lorabank.models.gguf_write import check_family, write_model_gguf
    from lorabank.models.load import load_base

    require_gguf()
    check_family(model_type_of(base), where=str(base))  # before anything is loaded
    print(f"loading {base} …", file=sys.stderr, flush=True)
    loaded = load_base(str(base), dtype=stored_dtype(str(base)), device="cpu")
    with scratch_beside(beside) as scratch:
        write_model_gguf(loaded.model, loaded.tokenizer, base, scratch / f"{base.name}.gguf", where=str(base))
        del loaded
        yield scratch / f"{base.name}.gguf"


def write_gguf(args: argparse.Namespace, adapter: Adapter, base: Path, file: Path, *, shown: Path | None = None) -> None:
    """The adapter, or the merged model, as one file; says what was done."""
    from lorabank.formats.gguf_base import check_base
    from lorabank.merging.shards import check_folder_base

    where = str(args.adapter)
    if not args.force:
        with named_as_typed({"force=True": "--force"}):
            check_base(adapter, base, where=where) if base.is_file() else check_folder_base(base, adapter)
    if args.merged:
        from lorabank.merging.gguf import merge_gguf

        dtype = args.dtype or "f16"
        with gguf_of(base, file) as source:
            done = merge_gguf(source, adapter, file, dtype=dtype, all_tensors=args.all_tensors, where=where)
        lost = f"{done.lost_share:.2%} of the change lost to rounding"
        print(f"saved: {shown or file} ({done.changed} weights changed, {done.copied} tensors copied; {lost} in {dtype})")
        return
    from lorabank.formats.gguf_adapter import write_adapter_gguf
    from lorabank.formats.gguf_base import read_base

    written = write_adapter_gguf(adapter, read_base(base), file, dtype=args.dtype or "f32", where=where)
    folded = f", {written.folded} layers' scaling folded into B" if written.folded else ""
    print(f"saved: {shown or file} ({written.tensors} tensors, alpha {written.alpha:g}{folded})")
