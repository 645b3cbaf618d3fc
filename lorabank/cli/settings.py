"""`lorabank train --list-settings`: every setting with its default, and what its docstring says."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import MISSING, Field, fields
from itertools import pairwise

from lorabank.config.adapter import AdapterConfig
from lorabank.config.flags import flag_places

SHARED_NAMES = ("data", "seed")
"""Settings of the run as well as of an adapter; the short flag is the run's."""


def print_settings() -> int:
    """Print all settings by section. The texts are those under the fields of the dataclasses, so that they can't differ."""
    shared = field_docs(AdapterConfig)
    for place, kind in flag_places().items():
        docs = field_docs(kind)
        print(f"\n{place.rstrip('.') or 'the run'}" + (" (and each of adapters.NAME)" if place == "defaults." else ""))
        for item in fields(kind):
            default = _default(item)
            if default is None:  # a section of its own
                continue
            short = item.name if item.name not in SHARED_NAMES else f"adapters.NAME.{item.name}"
            flag = "--" + (short if place == "defaults." else place + item.name).replace("_", "-")
            text = docs.get(item.name) or shared.get(item.name, "")
            print(f"  {flag:<30} {default:<15} " + textwrap.fill(text, 96, subsequent_indent=" " * 49))
    return 0


def field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    docs = {}
    for item, after in pairwise(body):
        match item, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _default(item: Field[object]) -> str | None:
    if item.default is not MISSING:
        value = item.default
        return "–" if value in (None, "", ()) else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "–" if item.name.endswith("_pattern") else None
