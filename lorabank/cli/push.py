"""`lorabank push`: an adapter folder to a model hub."""

from __future__ import annotations

import argparse

from lorabank.cli.folders import chosen_path
from lorabank.cli.parser import CommandParser
from lorabank.wording import counted

EXAMPLES = """\
examples:
  lorabank push out/support/formal me/formal
  lorabank push out/support/formal me/formal --private --revision v2 --base Qwen/Qwen3-0.6B

The folder is checked first, NaN and the base's name too; then it goes up as one commit, with a model card that says how to
load it from there. Adapter, tokenizer, chat template, README.md and LICENSE files go up, and nothing else. The token is the one
of `hf auth login`, or HF_TOKEN; HF_ENDPOINT names another hub.
"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Arguments of `push`."""
    parser = subparsers.add_parser(
        "push",
        help="upload an adapter to a model hub",
        description="Upload an adapter folder to a model hub, with a model card.",
        epilog=EXAMPLES,
    )
    parser.add_argument("folder", metavar="FOLDER", help="adapter folder, or FOLDER:NAME of several in a folder")
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository on the hub; made if it doesn't exist")
    parser.add_argument("--private", action="store_true", help="make it a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if it doesn't exist (default: the main one)")
    parser.add_argument("--base", "--model", metavar="HUB_ID", help="the base model's hub id (default: the one that it names)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, upload, print the address."""
    from huggingface_hub import constants, get_token

    from lorabank.training.publish import push

    folder = chosen_path(args.folder, place="FOLDER")
    done = push(
        folder,
        args.repository,
        token=get_token(),
        private=args.private,
        revision=args.revision,
        base=args.base,
        endpoint=constants.ENDPOINT,
    )
    print(f"pushed: {counted(len(done.files), 'file')} ({', '.join(done.files)})")
    if done.stayed:
        print(f"not uploaded: {', '.join(done.stayed)}")
    print(done.url)
    return 0
