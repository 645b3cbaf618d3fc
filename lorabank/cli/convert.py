"""`lorabank convert`: an adapter from one tool's files into another's."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lorabank.cli.folders import chosen_path, refuse_existing
from lorabank.cli.parser import CommandParser, positive
from lorabank.config.convert import dtype_name
from lorabank.config.paths import expanded
from lorabank.errors import ConfigError, ModelError
from lorabank.wording import counted

if TYPE_CHECKING:
    from lorabank.formats.convert import Conversion

FORMS = ("kohya", "diffusers", "peft")
DTYPES = ("keep", "fp32", "bf16", "fp16")

EXAMPLES = """\
examples:
  lorabank convert style.safetensors out/style --to diffusers       what it is, is told by its content
  lorabank convert out/style style.safetensors --to kohya --dtype fp16 --lossy
  lorabank convert loha.safetensors out/style --to peft --rank 16 --lossy
  lorabank convert unet-lora style.safetensors --to kohya --component unet

What was written is read back and compared. Lossless, or refused before anything is written; with --lossy the error is printed.
"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="an adapter into another tool's files: kohya, diffusers, PEFT",
        description="Convert an adapter between the files of kohya (and LyCORIS), diffusers and PEFT. Loads no base model.",
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", help="adapter file or folder, in any of the forms")
    parser.add_argument("target", metavar="TARGET", help="what to write: a .safetensors file (kohya) or a folder; must not exist")
    parser.add_argument("--to", required=True, choices=FORMS, help="form to write")
    parser.add_argument("--lossy", action="store_true", help="write what is not exact too, and print how large the error is")
    parser.add_argument(
        "--dtype", type=dtype_name, default="keep", choices=DTYPES, help="of the tensors (default: %(default)s, as they are)"
    )
    parser.add_argument("--rank", type=positive, metavar="N", help="highest rank of LoHa and LoKr layers (default: all of it)")
    parser.add_argument("--component", metavar="NAME", help="one model: unet, text_encoder, …; PEFT's side has no such prefix")
    parser.add_argument(
        "--model", "--base", metavar="FOLDER", help="model or pipeline folder, to resolve names that are not known"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was done."""
    source = chosen_path(args.source, place="SOURCE")
    target = refuse_existing(args.target, "TARGET")
    if args.to == "kohya" and target.suffix != ".safetensors":
        raise ConfigError(f"TARGET: kohya's form is one file, so its name ends in .safetensors, such as {target}.safetensors")
    if args.to == "peft" and target.suffix == ".safetensors":
        raise ConfigError(f"TARGET: PEFT's form is a folder, so its name doesn't end in .safetensors: {target.with_suffix('')}")
    from lorabank.formats import convert as forms

    model, folder, about = None, None, {}
    if args.model:
        from lorabank.models.skeleton import PIPELINE, skeleton
        from lorabank.training.task import TASK_KEY

        folder = expanded(args.model, place="--model", kind=ModelError)
        if not folder.is_dir():
            raise ModelError(f"--model: {folder} is no folder here. Names are resolved by a model's configuration alone.")
        model = skeleton(folder)
        about = {TASK_KEY: "text-to-image"} if (folder / PIPELINE).is_file() and not args.component else {}
    done = forms.convert(
        source,
        target,
        args.to,
        lossy=args.lossy,
        dtype=forms.DTYPES.get(args.dtype),
        rank=args.rank,
        component=args.component,
        model=model,
        base_model=str(folder.resolve()) if folder is not None and not args.component else None,
        metadata=about,
    )
    for line in described(done, args.to):
        print(line)
    return 0


def described(done: Conversion, to: str) -> list[str]:
    """What a conversion did, a line for each thing."""
    from lorabank.formats.components import components, split

    layers = done.adapter.layers
    parts = [f"{name or 'model'} {sum(split(path)[0] == name for path in layers)}" for name in components(list(layers))]
    lines = [
        f"{done.source} to {to}: {counted(len(layers), 'layer')} ({', '.join(parts)}), {done.adapter.num_parameters:,} parameters"
    ]
    if done.resolved:
        lines.append(f"names: resolved by {'the model' if done.resolved == 'model' else 'the written table, without a model'}")
    if done.decomposed:
        worst = max(done.decomposed, key=lambda path: done.decomposed[path].error)
        how = done.decomposed[worst]
        kinds = " and ".join(sorted({one.kind for one in done.decomposed.values()}))
        ranks = sorted(one.rank for one in done.decomposed.values())
        lines.append(
            f"{kinds}: {counted(len(done.decomposed), 'layer')} became LoRA of rank {ranks[0]} to {ranks[-1]}; "
            f"largest relative error "
            f"{how.error:.2g} ({worst}, full rank {how.full_rank})"
        )
    for path, why in list(done.dropped.items())[:5]:
        lines.append(f"left out: {path}: {why}")
    if len(done.dropped) > 5:
        lines.append(f"left out: {len(done.dropped) - 5} more layers")
    if done.kept:
        lines.append(f"metadata kept: {_listed(done.kept)}")
    if done.lost:
        lines.append(f"metadata left out: {_listed(done.lost)}")
    if done.unchecked:
        lines.append("fingerprint left out: it names the base's parameters as they were before; loading won't check the base")
    lines.append(f"written and read back: {done.error}")
    if done.beside:
        lines.append(f"its biases, token rows and modules in full: relative error at most {done.beside:.2g}")
    lines.append(f"saved: {done.path}")
    return lines


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
