"""`lorabank merge`: an adapter into the base weights, as a model of its own."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

from lorabank.cli.folders import chosen_path, refuse_existing, whole_folder
from lorabank.cli.loading import add_machine
from lorabank.cli.parser import CommandParser
from lorabank.config.typed import named_as_typed
from lorabank.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lorabank.formats.adapter import Adapter
    from lorabank.merging.report import MergeReport
    from lorabank.models.load_task import LoadedTask

EXAMPLES = """\
examples:
  lorabank merge out/support/formal --output merged/formal
  lorabank merge formal-adapter --model Qwen/Qwen3-0.6B --dtype fp32 --output merged/formal
  lorabank merge formal-adapter --model folder-of-70b --by-shard --output merged/formal

The merged folder loads in plain transformers, an image pipeline's in plain diffusers. --dtype auto keeps weights as the base
stores them. Merging into bf16 rounds a part of the change away: how much is printed.
"""

PROBE = "The merged model is asked to read this sentence, and so is the base with the adapter beside it: 3 + 4 = 7, naïve café."
"""Text on which logits are compared; any will do."""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `merge`."""
    parser = subparsers.add_parser(
        "merge",
        help="write an adapter into the base weights, as a model folder",
        description="Write an adapter into the base weights and save the result as a model folder for plain transformers.",
        epilog=EXAMPLES,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or file")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder to write; must not exist")
    parser.add_argument("--model", "--base", metavar="BASE", help="base model (default: the one that the adapter names)")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="factor on the change (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="merge even where the adapter says that it belongs to another base")
    parser.add_argument(
        "--by-shard",
        action="store_true",
        help="one tensor at a time, for a model that doesn't fit into memory",
    )
    add_machine(parser)
    return parser


TIE, VOCABULARY = "tie_word_embeddings", "vocab_size"
FLAGS = {"force=True": "--force", "strength": "--strength"}
"""What messages of the library speak of, as it is typed here."""


def run(args: argparse.Namespace) -> int:
    """Merge, print what rounding lost, save model and tokenizer."""
    with named_as_typed(FLAGS):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    folder = refuse_existing(args.output)
    if args.dtype in ("fp8", "nf4"):
        raise ConfigError(
            f"--dtype {args.dtype}: a merged folder holds plain weights, which any tool reads. Merge in bf16 or fp32; a model in "
            f"memory is merged into as it is stored, {args.dtype} too, by lorabank.merge."
        )
    import torch

    from lorabank.formats.adapter import Adapter
    from lorabank.formats.slices import without_slices
    from lorabank.merging.merge import merge
    from lorabank.merging.ties import untie
    from lorabank.models.load_task import load_for
    from lorabank.models.quiet import quiet_transformers

    adapter = Adapter.load(args.adapter)  # merging makes one layer of slices itself, with the norms of the weights at hand
    name = args.model or adapter.base_model
    if not name:
        raise ModelError(f"{args.adapter}: the adapter doesn't name its base model. Name it with --model.")
    if is_pipeline(name, adapter):
        from lorabank.cli.merge_pipeline import merge_into_pipeline

        return merge_into_pipeline(args, adapter, name, folder)
    if is_classifier(name):
        from lorabank.cli.merge_classifier import merge_into_classifier

        return merge_into_classifier(args, adapter, name, folder)
    if args.by_shard:
        return _by_shard(args, adapter, name, folder)
    print(f"loading {name} …", file=sys.stderr, flush=True)
    whole = without_slices(adapter, lambda path, outputs: torch.ones(outputs))  # of which only the places are looked at
    base = load_for(name, whole, dtype=stored_dtype(name) if args.dtype == "auto" else args.dtype, device=args.device)
    parted = bool(untie(base.model, whole))
    inputs = probe(base)
    handle = merge(base.model, adapter, strength=args.strength, force=args.force, inputs=inputs, say=None)
    print_report(handle.report)
    print(f"on a sentence: {handle.logits}" if inputs else "outputs weren't compared: the model reads more than a sentence")
    with quiet_transformers(), whole_folder(folder) as scratch:
        base.model.save_pretrained(scratch)
        if base.causal and base.tokenizer is not None:
            base.tokenizer.save_pretrained(scratch)
        else:
            copy_rest(base.folder, scratch)
        told = what_changed(args.adapter, adapter, base.folder, scratch, parted=parted)
    print_saved(folder, told)
    return 0


def probe(base: LoadedTask) -> dict[str, Tensor] | None:
    """A sentence as the model reads it; None for one that reads other things."""
    from lorabank.bank.task_class import reads_text

    if base.tokenizer is None or not reads_text(base.model):
        return None
    ids = base.tokenizer(PROBE, return_tensors="pt")["input_ids"].to(base.model.device)
    longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and longest > 2:  # a short table of positions; two of RoBERTa's are padding's
        ids = ids[:, : longest - 2]
    return {"input_ids": ids, "decoder_input_ids": ids} if base.model.config.is_encoder_decoder else {"input_ids": ids}


def copy_rest(source: Path, target: Path) -> None:
    """What lies beside a model's weights and configuration, as it stands: its tokenizer, or what prepares its pictures."""
    from lorabank.merging.shards import WEIGHT_FILES

    for path in sorted(source.iterdir()):
        weights = path.name.removesuffix(".index.json").endswith(WEIGHT_FILES)
        if path.is_file() and not weights and not path.name.startswith(".") and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def what_changed(source: str, adapter: Adapter, base: Path, merged: Path, *, parted: bool) -> list[str]:
    """Lines on what the merged folder has that the base hasn't; puts the adapter's tokenizer where its tokens are more.

    parted: whether weights that were tied aren't any more.
    """
    from lorabank.bank.in_full.heads import DENOISING
    from lorabank.tasks.merged_processor import fit_processor
    from lorabank.tasks.merged_task import write_task

    before, after = settings_in(base), settings_in(merged)
    told: list[str] = []
    if (said := fit_processor(merged, adapter)) is not None:
        told.append(said)
    told += write_task(merged, adapter)
    if adapter.modules:
        more = f" and {len(adapter.modules) - 3} more" if len(adapter.modules) > 3 else ""
        told.append(f"taken over in full: {', '.join(list(adapter.modules)[:3])}{more}")
    if "id2label" in after and len(after["id2label"]) != len(before.get("id2label") or "12"):
        names = list(after["id2label"].values())
        unnamed = names[0] == "LABEL_0"
        told.append(
            f"labels: {len(names)}, called LABEL_0 …: give them names in config.json (id2label, label2id)"
            if unnamed
            else f"labels: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}"
        )
    if (noised := DENOISING.get(str(after.get("model_type")))) and len(after.get("id2label") or "") != len(
        before.get("id2label") or ""
    ):
        told.append(f"{noised}: zeros, for other labels than the base's. Only training with noised boxes reads it")
    if parted:
        told.append(f"the output head and the embedding are two weights now ({TIE}: false)")
    if "pad_token_id" in after and after["pad_token_id"] is None and auto_class(merged) == "AutoModelForSequenceClassification":
        told.append("no pad_token_id: set the one of training in config.json, by which rows of several lengths know their ends")
    if VOCABULARY in before and after.get(VOCABULARY) != before[VOCABULARY]:
        told.append(f"tokens: {after.get(VOCABULARY)}, the base's were {before[VOCABULARY]}; {_tokenizer(source, merged)}")
    return told


def _tokenizer(source: str, merged: Path) -> str:
    """Put the tokenizer beside the adapter into the merged folder, and say so."""
    from lorabank.models.chat_templates import tokenizer_for

    found = tokenizer_for(chosen_path(source, place="ADAPTER"), merged)
    if found is None or found[1] == merged:
        return "there is no tokenizer beside the adapter that knows them, so add one to the folder"
    found[0].save_pretrained(merged)
    return f"the tokenizer is that in {found[1]}"


def settings_in(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def auto_class(folder: Path) -> str:
    """What of transformers loads a model folder."""
    from lorabank.bank.task_class import auto_name

    said = settings_in(folder)
    return auto_name(str((said.get("architectures") or ["?"])[0]), str(said.get("model_type")))


def print_saved(folder: Path, told: list[str]) -> None:
    """The last words."""
    print("\n".join([*told, f"saved: {folder} (a plain model: {auto_class(folder)}.from_pretrained({str(folder)!r}))"]))


def stored_dtype(name: str) -> str:
    """Our name of the storage that most numbers of a base have in its files; `auto` for one that a model isn't loaded in."""
    import torch

    from lorabank.models.dtypes import stored_in
    from lorabank.models.load import locate

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", None: "auto"}
    return names[stored_in(locate(name, say=lambda line: print(line, file=sys.stderr, flush=True)))]


def is_pipeline(name: str, adapter: Adapter) -> bool:
    """Whether the base is a pipeline of diffusers: by what lies there, or by what the adapter was trained for."""
    from lorabank.config.paths import expanded
    from lorabank.training.task import TASK_KEY

    path = expanded(name, place="model")
    index = "model_index.json"
    inside = path.is_dir() and (path.resolve().parent / index).is_file()  # one of its models, which is refused there by name
    if (path / index).is_file() or inside or adapter.metadata.get(TASK_KEY) == "text-to-image":
        return True
    if (path / "config.json").is_file():
        return False
    parts = {path.partition(".")[0] for path in adapter.layers}  # of an adapter of another tool, over a hub id
    blocks = ("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")  # GPT-2 has a `transformer`, too
    return bool(parts & {"unet", "text_encoder", "text_encoder_2"}) or any(path.startswith(blocks) for path in adapter.layers)


def is_classifier(name: str) -> bool:
    """Whether the base is a classifier of pictures of another library than transformers, or a merged one."""
    from lorabank.config.paths import expanded
    from lorabank.config.tasks import form_of_model
    from lorabank.models.efficientnet_lite import EFFICIENTNET_LITE

    own = name.strip().lower() == EFFICIENTNET_LITE or name.startswith("timm:")
    return own or form_of_model(expanded(name, place="model")) == "image-classification"


def _by_shard(args: argparse.Namespace, adapter: Adapter, name: str, folder: Path) -> int:
    """Merge the model's files one tensor at a time; no forward pass, so no outputs to compare."""
    from lorabank.merging.shards import merge_folder
    from lorabank.models.folder import check_folder
    from lorabank.models.load import locate, pick_device, pick_dtype
    from lorabank.training.busy import BusyBar

    source = locate(name, say=lambda line: print(line, file=sys.stderr, flush=True))
    check_folder(source)
    dtype = None if args.dtype == "auto" else pick_dtype(args.dtype, pick_device("cpu"))
    with whole_folder(folder) as scratch, BusyBar() as bar:
        report = merge_folder(source, adapter, scratch, strength=args.strength, dtype=dtype, force=args.force, say=None, busy=bar)
        parted = settings_in(scratch).get(TIE) is False and settings_in(source).get(TIE) is not False
        told = what_changed(args.adapter, adapter, source, scratch, parted=parted)
    print_report(report)
    print_saved(folder, told)
    return 0


def print_report(report: MergeReport) -> None:
    """How large the change is and how much of it rounding lost, by kind of layer."""
    import math

    from rich.console import Console

    from lorabank.formats.measure import kind_of
    from lorabank.training.tables import new_table

    kinds: dict[str, list[str]] = {}
    for path in report.layers:
        kinds.setdefault(kind_of(path), []).append(path)
    table = new_table()
    table.add_column("layers", style="cyan", no_wrap=True)
    for head in ("number", "‖Δ‖/‖W‖", "lost of Δ", "worst layer"):
        table.add_column(head, justify="right")
    for kind, paths in kinds.items():
        found = [report.layers[path] for path in paths]
        delta, weight, lost = (math.hypot(*(getattr(layer, key) for layer in found)) for key in ("delta", "weight", "lost"))
        worst = max(layer.share for layer in found)
        change = f"{delta / weight:.2g}" if weight else "–"
        table.add_row(kind, str(len(paths)), change, f"{lost / delta:.2%}" if delta else "–", f"{worst:.2%}")
    table.add_section()
    table.add_row("all", str(len(report.layers)), f"{report.relative_change:.2g}", f"{report.lost_share:.2%}", "")
    Console().print(table)
    if report.extras:
        delta, lost = (math.hypot(*(getattr(each, key) for each in report.extras.values())) for key in ("delta", "lost"))
        print(f"biases and tables of rows: {len(report.extras)}, lost of their change {lost / delta if delta else 0.0:.2%}")
    print(f"weights in {', '.join(report.dtypes)}")
    if report.trained_in:
        print(f"trained on a {report.trained_in} base: these weights differ from it by ‖W − Wq‖/‖W‖ = {report.base_error:.2%}")
