"""lora.c against the definition, in every width of vector, and what happens where it can't be had."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorabank.engine.batch import make_batch
from lorabank.engine.step import Engine, forward_backward
from lorabank.kernels import ops
from lorabank.kernels.base import BASE_PRODUCTS
from lorabank.kernels.native import build as native_build
from lorabank.kernels.native import library as native_library
from lorabank.kernels.native import lora as native
from lorabank.kernels.segments import DropoutDraw, Segment
from tests.engine.tiny import make_bank
from tests.kernels.cases import Case, assert_same, make_case, make_plan, run

no_library = native_library.loaded() is None
pytestmark = pytest.mark.skipif(no_library, reason="no C compiler here, or no OpenMP runtime that torch loads")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    ends = sorted(draw(st.lists(st.integers(0, 12), min_size=2 * count, max_size=2 * count)))
    return make_case(
        shape=(12, tokens, draw(st.integers(1, 70))),
        outputs=draw(st.integers(1, 70)),
        rows=[slice(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)],
        ranks=[draw(st.integers(1, 35)) for _ in range(count)],
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), how=st.sampled_from(["fused", "added"]))
def test_random_shapes_ranks_and_rows(library: ctypes.CDLL, case: Case, how: str) -> None:
    assert native.suits(case.x, case.x.new_empty(1), case.segments)
    assert_same(run(case, how), run(case, "reference"), rtol=1e-4, atol=1e-4)


def test_a_row_depends_neither_on_its_neighbours_nor_on_threads(library: ctypes.CDLL) -> None:
    case = make_case(shape=(40, 5, 600), outputs=500, rows=[slice(0, 17), slice(17, 40)], ranks=[16, 5], bias=False)
    case.weight_OI.zero_()  # torch's own products may depend on threads
    whole = run(case, "fused")
    torch.set_num_threads(2)  # the package's fixture sets one thread
    try:
        again = run(case, "fused")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(whole.y, again.y)
    for name, gradient in whole.gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, again.gradients[name] if again.gradients[name] is not None else torch.empty(0)), name
    x, y = case.x[3:4].contiguous(), torch.zeros(1, 5, 500)
    alone = [Segment(rows=slice(0, 1), A_RI=case.segments[0].A_RI, B_RO=case.segments[0].B_RO, scaling=0.5)]
    native.expand_into(y, x, native.Places.of(1, alone, x), alone)
    among = torch.zeros(40, 5, 500)
    native.expand_into(among, case.x, native.Places.of(40, case.segments, case.x), case.segments)
    assert torch.equal(y[0], among[3])


def test_frozen_tensors_and_an_input_without_gradient(library: ctypes.CDLL) -> None:
    case = make_case(rows=[slice(0, 3), slice(3, 4)], ranks=[2, 3])
    for frozen in (frozenset[str](), frozenset({"A0"}), frozenset({"B0", "B1"}), frozenset({"A0", "A1", "B0"})):
        for x_grad in (False, True):
            assert_same(run(case, "fused", x_grad=x_grad, frozen=frozen), run(case, "reference", x_grad=x_grad, frozen=frozen))


def test_an_adapter_that_isnt_finite_stays_alone(library: ctypes.CDLL) -> None:
    case = make_case(shape=(20, 4, 40), outputs=40, rows=[slice(0, 9), slice(9, 20)], ranks=[16, 16])
    clean = run(case, "fused")
    case.segments[0].A_RI[3, 2] = float("nan")
    found = run(case, "fused")
    assert found.y[:9].isnan().any()
    assert torch.equal(found.y[9:], clean.y[9:])
    for name in ("A1", "B1"):
        mine, theirs = found.gradients[name], clean.gradients[name]
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


def test_what_goes_through_it() -> None:
    def segment(**changes: object) -> Segment:
        defaults: dict[str, object] = {"rows": slice(0, 2), "A_RI": torch.zeros(2, 8), "B_RO": torch.zeros(2, 6), "scaling": 1.0}
        return Segment(**(defaults | changes))  # type: ignore[arg-type]

    x, y = torch.zeros(4, 3, 8), torch.zeros(4, 3, 6)
    assert native.suits(x, y, [segment(), segment(rows=slice(2, 4))])
    draw = DropoutDraw(probability=0.5, seed=0, step=0, examples_U=torch.arange(2))
    assert not native.suits(x, y, [])
    assert not native.suits(x, y, [segment(), segment(rows=slice(1, 3))])
    assert not native.suits(x, y, [segment(rows=torch.tensor([0, 2]))])
    assert not native.suits(x, y, [segment(weights_U=torch.ones(2))])
    assert not native.suits(x, y, [segment(dropout=draw)])
    assert not native.suits(x, y, [segment(A_RI=torch.zeros(8, 2).t())])
    assert not native.suits(x.double(), y.double(), [segment()])
    assert not native.suits(x.bfloat16(), y.bfloat16(), [segment()])
    assert not native.suits(x.to("meta"), y.to("meta"), [segment()])
    assert not native.suits(x, y.transpose(0, 1), [segment()])


def test_joint_training_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = native.gradients
    monkeypatch.setattr(native, "gradients", lambda *args: calls.append(len(args[4])) or real(*args))
    bank = make_bank("llama")
    batch = make_batch([([1, 2, 3], [1.0] * 3)] * 4, ["a", "a", "b", "b"])
    forward_backward(Engine(bank), batch)
    assert calls
    assert set(calls) == {2}


def test_the_library_is_compiled_once(tmp_path: Path) -> None:
    first = native_build.library_path(tmp_path)
    assert first is not None
    made = first.stat().st_mtime_ns
    assert native_build.library_path(tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert list(tmp_path.iterdir()) == [first]
    assert native_build.library_path(tmp_path, ("-O1", "-fPIC", "-fopenmp")) != first


def test_the_library_shares_torchs_threads() -> None:
    program = (
        "import pathlib, torch; from lorabank.kernels.native import library\n"
        "def runtimes(): return {line.split()[-1] for line in pathlib.Path('/proc/self/maps').read_text().splitlines()"
        " if line.split('/')[-1].startswith(('libgomp', 'libomp', 'libiomp'))}\n"
        "before = runtimes(); assert before, 'torch loads none'; assert library.loaded() is not None\n"
        "assert runtimes() == before, (before, runtimes())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native_build.library_path(tmp_path) is None


def test_switched_off_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native_build.SWITCH, "0")
    assert native_build.library_path(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"weren't compiled by .*no-such-flag.*LORABANK_NATIVE=0"):
        assert native_build.library_path(tmp_path, ("-fno-such-flag",)) is None
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cant_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="weren't compiled"):
        assert native_build.library_path(tmp_path / "kernels") is None


def test_a_library_that_cant_be_loaded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "lora.so"
    broken.write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="can't be loaded"):
        assert native_library.load_or_warn(broken) is None
    with pytest.warns(UserWarning, match="can't be loaded.*lora_through"):
        assert native_library.load_or_warn(Path(native_build.openmp_runtime() or "")) is None


def test_a_damaged_library_is_made_anew(tmp_path: Path) -> None:
    """Loading half a library would end the process with a bus error."""
    whole = native_build.library_path(tmp_path)
    assert whole is not None
    content = whole.read_bytes()
    for part in (len(content) // 2, 0):
        whole.write_bytes(content[:part])
        again = native_build.library_path(tmp_path)
        assert again is not None
        assert [again] == list(tmp_path.iterdir())
        assert again.stat().st_size >= len(content) // 2
        whole = again


def test_a_compiler_may_come_with_flags_and_say_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "my gcc"
    tool.write_bytes(b"#!/bin/sh\nprintf '\\377 hm' >&2\nexec gcc \"$@\"\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CC", f"'{tool}' -g0")
    assert native_build.compiler() == (str(tool), "-g0")
    assert native_build.library_path(tmp_path / "cache") is not None
    monkeypatch.setenv("CC", "nosuchcompiler")
    assert native_build.compiler() is not None


@pytest.mark.parametrize(
    "form", [lambda t: t.t().contiguous().t() if t.dim() == 2 else t, lambda t: t.double()], ids=["columns", "fp64"]
)
def test_what_was_saved_may_come_back_in_another_form(form: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case = make_case(shape=(8, 6, 48), outputs=32, rows=[slice(0, 4), slice(4, 8)], ranks=[4, 8])
    expected = run(case, "fused")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: form(t) if t.is_floating_point() else t):
        found = run(case, "fused")
    assert_same(found, expected)


def test_both_paths_leave_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(shape=(8, 6, 48), outputs=32, rows=[slice(0, 4), slice(4, 8)], ranks=[4, 8])
    compiled = run(case, "fused")
    monkeypatch.setattr(native_library, "loaded", lambda: None)
    plain = run(case, "fused")
    assert_same(compiled, plain, rtol=1e-4, atol=1e-4)
    y = ops.lora_linear(case.x, [case.weight_OI], case.bias_O, BASE_PRODUCTS["linear"], make_plan(case.segments, case.units))
    torch.testing.assert_close(y, plain.y, rtol=1e-4, atol=1e-4)
