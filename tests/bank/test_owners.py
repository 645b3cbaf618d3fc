"""What modules do with layers inside them: folded rows, ways past a layer, and that transformers' own are all named."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from lorabank import BASE, attach
from lorabank.bank.owners import BYPASSED, ELSEWHERE, FOLDING, PASSED
from lorabank.errors import RoutingError, UnreachedLayerError
from tests.bank.families import FAMILIES
from tests.bank.family import MIXED, ROWS, answers, bank_of, check_close
from tests.bank.tiny import add, clear, gradients


class OPTDecoderLayer(nn.Module):
    """Folds rows and tokens, by its name as OPT's does."""

    __module__ = "transformers_modules.made.for.tests"

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class MambaMixer(nn.Module):
    """Reads a weight past its layer in training mode, by its name as Mamba's does where its kernels are."""

    __module__ = "transformers_modules.made.for.tests"

    def __init__(self) -> None:
        super().__init__()
        self.x_proj, self.out_proj = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.x_proj(x)
        return torch.nn.functional.linear(x, self.out_proj.weight) if self.training else self.out_proj(x)


class Tower(nn.Module):
    """Is given the patches of all pictures, and where each begins."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        return self.proj(patches)


class Sees(nn.Module):
    """Takes ids beside them, so that what else it has keeps rows apart."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = Tower(), nn.Linear(6, 4)

    def forward(self, input_ids: Tensor, patches: Tensor, image_grid_thw: Tensor) -> Tensor:
        return self.head(torch.randn(*input_ids.shape, 6)) + self.tower(patches, image_grid_thw).sum()


def test_packed_pictures_are_known_by_their_grids() -> None:
    """Three patches in all for three rows, two of which have no picture: nothing else tells them apart."""
    bank = attach(Sees())
    add(bank, "a")
    given = torch.zeros(3, 2, dtype=torch.int64), torch.randn(3, 6), torch.tensor([[1, 1, 3]])
    bank.model(*given)
    with pytest.raises(RoutingError, match=r"'tower.proj' can't tell the rows apart: .*patches of all"), bank.route(["a"] * 3):
        bank.model(*given)
    bank.remove("a")
    add(bank, "head", targets="head")
    with bank.route(["head", BASE, BASE]):
        bank.model(*given)


def test_a_class_of_that_name_of_someone_elses_is_not_meant() -> None:
    class MambaMixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dt_proj = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.dt_proj(x)

    bank = attach(nn.Sequential(MambaMixer()))
    add(bank, "a")
    assert list(bank.adapter("a").layers) == ["0.dt_proj"]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("rows", "repeat"), [(3, None), (6, ("interleave", 2)), (6, ("tile", 2))])
def test_folded_rows_are_those_ahead_of_the_fold(rows: int, repeat: Any, use_dora: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OPTDecoderLayer())
    bank = attach(model)
    add(bank, "a", use_dora=use_dora)
    add(bank, "b", use_dora=use_dora)
    route = ["a", BASE, "b"]
    each = route if repeat is None else [r for r in route for _ in range(2)] if repeat[0] == "interleave" else route * 2
    x = torch.randn(rows, 5, 6)
    with bank.route(route, repeat=repeat):
        mixed = model(x)
    mixed.square().sum().backward()
    found = gradients(bank)
    clear(bank)
    for row, name in enumerate(each):
        with bank.route(name):
            alone = model(x[row : row + 1])
        torch.testing.assert_close(mixed[row], alone[0])
        if name is not BASE:
            alone.square().sum().backward()
    for key, g in gradients(bank).items():
        torch.testing.assert_close(found[key], g, rtol=1e-4, atol=1e-4)


def test_a_fold_of_other_rows_than_the_routes_is_an_error() -> None:
    """Two rows of three tokens are as long, folded, as the route's three rows of two."""
    model = nn.Sequential(OPTDecoderLayer())
    bank = attach(model)
    add(bank, "a")
    for rows in (2, 6):
        message = rf"'0.fc1': the route names 3 rows, and the module that folds them .* was given {rows}"
        with pytest.raises(RoutingError, match=message), bank.route(["a", BASE, "a"]):
            model(torch.randn(rows, 3, 6))


def test_hooks_go_with_the_bank_and_stay_out_of_copies() -> None:
    model = nn.Sequential(OPTDecoderLayer(), MambaMixer().eval())
    bank = attach(model)
    add(bank, "a", targets=["fc1", "out_proj"])
    twin = copy.deepcopy(model)
    twin[0](torch.randn(2, 3, 6))
    assert isinstance(twin[0].fc1, nn.Linear)
    twin[1].train()
    twin[1](torch.randn(2, 3, 6))  # the plain base: nothing to be passed
    bank.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_is_passed_is_an_error_whenever_it_happens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), MambaMixer())
    bank = attach(model.eval())
    add(bank, "a", targets=["0", "out_proj"])
    x = torch.randn(2, 3, 6)
    model(x)
    model.train()
    with pytest.raises(
        UnreachedLayerError, match=r"'1.out_proj' has adapters and wasn't called: in training mode .*kernels read"
    ):
        model(x)
    bank.remove("a")
    add(bank, "b", targets=["0"])
    model(x)


def test_recomputed_blocks_know_their_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OPTDecoderLayer())
    bank = attach(model)
    add(bank, "a")
    x = torch.randn(3, 5, 6, requires_grad=True)
    grads = []
    for recompute in (False, True):
        clear(bank)
        with bank.route(["a", BASE, "a"]):
            y = (
                torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False, context_fn=bank.checkpoint_context)
                if recompute
                else model(x)
            )
        y.square().sum().backward()
        grads.append(gradients(bank))
    for key, g in grads[0].items():
        torch.testing.assert_close(grads[1][key], g)


@pytest.mark.filterwarnings("ignore:.*rank 2 is above what layer")  # gates of one feature
@pytest.mark.parametrize("name", ["opt", "swin", "sam", "timesformer", "qwen2_moe", "patchtst", "mobilevit", "clap_audio_model"])
def test_without_the_table_rows_would_be_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the entries are needed, and a class that none names isn't guessed at."""
    family = FAMILIES[name]
    expected = bank_of(family)
    with expected.route(MIXED):
        found = answers(expected.model, family)
    assert found
    monkeypatch.setattr("lorabank.bank.owners.FOLDING", {})
    bank = bank_of(family)
    with pytest.raises(RoutingError, match=rf"names {ROWS} rows, but the layer's input has"), bank.route(MIXED):
        answers(bank.model, family)
    with bank.route("a"), expected.route("a"):
        check_close(answers(bank.model, family), answers(expected.model, family))


# ---- transformers' own ----------------------------------------------------------------------------------------------------

LAYERS = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D"}
ELSEWHERE_THAN_FORWARD = re.compile(r"__init__|init_\w*weights|_init_weights|_?tie_weights")
LOOKS = {"dtype", "device", "shape", "data", "_is_hf_initialized"}
OLDER = {r"Deepseek(V2|Ocr2Text)Moe"}
LEFT = {
    ("BloomAttention", "dense"),  # with slow_but_exact, which a model has or has not: found at the first forward
    ("BloomMLP", "dense_4h_to_h"),
    ("Gemma4AssistantForCausalLM", "lm_head"),  # output heads, whose weight is read beside their call
    ("Gemma4UnifiedAssistantForCausalLM", "lm_head"),
}


def _attribute_of_self(node: ast.AST) -> str | None:
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) else None


def _weights_read(source: str) -> Iterator[tuple[str, str]]:
    """(class, layer) of layers whose weight a method multiplies by or hands on, instead of looking at its dtype or so."""
    for owner in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        layers = set()
        for node in ast.walk(owner):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                made = node.value.func
                name = made.attr if isinstance(made, ast.Attribute) else made.id if isinstance(made, ast.Name) else ""
                layers |= {_attribute_of_self(target) for target in node.targets if name in LAYERS}
        for method in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
            if ELSEWHERE_THAN_FORWARD.fullmatch(method.name):
                continue
            inside = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
                    layer, above = _attribute_of_self(node.value), inside[node]
                    looked_at = isinstance(above, ast.Attribute) and above.attr in LOOKS
                    checked = isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and above.func.id == "isinstance"
                    if layer in layers and layer is not None and not looked_at and not checked:
                        yield owner.name, layer


def test_every_layer_that_transformers_passes_is_named() -> None:
    """By reading its code: a weight that is read past its layer is an adapter that does nothing there."""
    folder = Path(transformers.__file__).parent / "models"
    files = (file.read_text(encoding="utf-8") for file in sorted(folder.glob("*/modeling_*.py")))
    classes = (part for text in files for part in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if part.startswith("class "))
    read = {pair for source in classes if re.search(r"self\.\w+\.weight", source) for pair in _weights_read(source)}
    assert len(read) > 30
    unnamed = {
        (owner, layer)
        for owner, layer in read - LEFT
        if not any(re.fullmatch(name, owner) and layer in layers for name, (layers, _) in BYPASSED.items())
        and not any(re.fullmatch(name, owner) and re.fullmatch(layers, layer) for name, (layers, _) in PASSED.items())
    }
    assert unnamed == set()


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="the tables have later versions' classes, too")
def test_the_tables_name_classes_that_there_are() -> None:
    """But for what older versions alone have."""
    folder = Path(transformers.__file__).parent / "models"
    sources = "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("*/modeling_*.py"))
    classes = set(re.findall(r"^class (\w+)\(", sources, re.MULTILINE))
    for name in {*FOLDING, *ELSEWHERE, *PASSED, *BYPASSED} - OLDER:
        for part in re.split(r"\|(?![^(]*\))", name):
            assert any(re.fullmatch(part, found) for found in classes), part
