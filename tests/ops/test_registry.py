"""The registry: choice of backend, forcing, strict mode, fallback warnings, recording."""

import subprocess
import sys
import warnings

import pytest
import torch

import fastft
from fastft.ops import lora, registry
from fastft.ops.lora_linear import lora_linear
from fastft.testing import BackendError, Call, FallbackWarning, record, use

F64 = torch.float64


def run(dtype=torch.float32):
    x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    a, b = torch.randn(2, 8, dtype=dtype, requires_grad=True), torch.randn(5, 2, dtype=dtype, requires_grad=True)
    return lora_linear(x, torch.randn(5, 8, dtype=dtype), None, a, b)


FORWARD, BACKWARD = ["lora_shrink", "lora_expand_"], ["lora_grad_sb", "lora_grad_a", "lora_grad_x_"]


def test_the_kernels_run_by_default_and_are_recorded():
    with record() as calls:
        run().sum().backward()
    assert [c.op for c in calls] == FORWARD + BACKWARD
    assert {c.backend for c in calls} == {"cpu"} and calls[0].config.startswith("fastft_cpu_")


def test_backward_keeps_the_forwards_backend_and_recorder():
    with use("reference"), record() as calls:
        y = run()
    y.sum().backward()  # outside: still the reference, still recorded
    assert [c.op for c in calls] == FORWARD + BACKWARD and {c.backend for c in calls} == {"reference"}
    assert calls[0] == Call("lora_shrink", "reference", None)


def test_recorders_nest_and_threads_do_not_mix():
    from concurrent.futures import ThreadPoolExecutor

    def count(n):
        with record() as calls:
            for _ in range(n):
                run()
        return len(calls)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(count, [1, 5, 3, 2])) == [2, 10, 6, 4]


def test_backward_of_one_forward_in_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    with record() as calls:
        loss = run().sum()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: loss.backward(retain_graph=True), range(20)))
    assert len(calls) == len(FORWARD) + 20 * len(BACKWARD)


@pytest.fixture
def fresh_warnings():
    before = set(registry._warned)
    registry._warned.clear()
    yield
    registry._warned.update(before)


def test_falling_back_warns_once_per_op_and_reason(fresh_warnings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(F64), run(F64)
    texts = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert len(texts) == 2 and "float64 activations" in texts[0] and "lora_shrink" in texts[0] and "lora_expand_" in texts[1]


def test_strict_mode_raises_instead(monkeypatch):
    monkeypatch.setenv("FASTFT_STRICT", "1")
    with pytest.raises(BackendError, match=r"float64 activations.*float64\[3, 8\] on cpu"):
        run(F64)
    with use("reference"):
        run(F64)  # asked for: no fallback


def test_a_forced_backend_that_cannot_run_says_why():
    with use("cpu"), pytest.raises(BackendError, match=r"lora_shrink cannot run on float64\[3, 8\].*cpu: .*float64"):
        run(F64)
    with (
        use("cuda"),
        pytest.raises(BackendError, match="cuda: (runs on cuda tensors|this torch has no CUDA|no CUDA device)"),
    ):
        run()
    with use("npu"), pytest.raises(BackendError, match=r"unknown backend 'npu' \(FASTFT_BACKEND or .*\); known: cpu, cuda"):
        run()


def test_environment_variable_forces_a_backend():
    code = (
        "import torch, fastft; from fastft.testing import record\n"
        "with record() as calls: fastft.LoRALinear(8, 8)(torch.randn(2, 8))\n"
        "print(sorted({c.backend for c in calls}))"
    )
    for backend in ("reference", "cpu"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"FASTFT_BACKEND": backend, "PATH": ""}
        )
        assert done.stdout.strip() == f"['{backend}']", done.stderr


def test_without_libraries_everything_runs_on_the_reference(tmp_path):
    """What a pure-Python install (FASTFT_NATIVE=0) does: a warning that says why, right results."""
    code = (
        "import pathlib, sys, warnings, torch, fastft._native\n"
        "fastft._native.LIB = pathlib.Path(sys.argv[1])\n"
        "layer = fastft.LoRALinear(8, 8)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    layer(torch.randn(2, 8)).sum().backward()\n"
        "assert layer.lora_B.grad.abs().sum() > 0\n"
        "print(caught[0].message)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "is not built" in done.stdout, done.stderr


def test_a_new_op_needs_no_existing_file():
    def reference(x, s):
        return x * s

    op = registry.Op("fastft_test_scale(Tensor x, float s) -> Tensor", reference, lambda x, s: torch.empty_like(x))
    try:
        namespaces, _ = registry._native.cpu_libraries()
        assert op.missing("cpu", "cpu") == f"no kernel of that name in the {' or the '.join(namespaces)} library"
        with use("reference"), record() as calls:
            assert torch.equal(torch.ops.fastft.fastft_test_scale(torch.ones(2), 3.0), torch.full((2,), 3.0))
        assert calls == [Call("fastft_test_scale", "reference", None)]
    finally:
        del registry.OPS["fastft_test_scale"]
    assert "fastft_test_scale" not in fastft.testing.available("cpu")


@pytest.mark.skipif("amx" not in registry._native.supported_isas(), reason="no AMX, or not built")
def test_a_library_takes_what_it_lacks_from_the_one_that_it_extends():
    x, index = torch.randn(20, 40).bfloat16(), torch.tensor([3, 1], dtype=torch.int32)
    with fastft.testing.cpu_isa("amx"), use("cpu"), record() as calls:
        torch.ops.fastft.gather_columns(x, index)
        torch.ops.fastft.lora_shrink(x, x[:8].contiguous(), [8], 0.0, None)
    assert [c.config for c in calls] == ["fastft_cpu_avx512_bf16", "fastft_cpu_amx"]


def test_the_function_behind_an_op():
    """What `direct` gives computes the same, and tells by `conditions` when it must be asked for again."""
    x, a = torch.randn(3, 8), torch.randn(2, 8)
    args = (x, a, [2], 0.0, None)
    op = registry.OPS["lora_shrink"]
    want, plain = op(*args)[0], registry.conditions()
    assert torch.equal(op.direct(*args)(*args)[0], want) and op.direct(*args) is op.direct(*args)
    with use("reference"):
        assert registry.conditions() != plain
        with record() as calls:
            assert registry.conditions() is None
            reference = op.direct(*args)(*args)[0]
    assert not calls  # past the registry
    torch.testing.assert_close(reference, want)
    with fastft.testing.cpu_isa("default"):
        assert registry.conditions() != plain
        assert op.direct(*args) is not None
    assert registry.conditions() == plain
    with use("triton"), pytest.raises(BackendError, match=r"lora_shrink cannot run on .*float64"):
        op.direct(x.double(), a.double(), [2], 0.0, None)


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_one_signature_serves_several_ops_on_like_tensors():
    x, a = torch.randn(3, 8), torch.randn(2, 8)
    args, op = (x, a, [2], 0.0, None), lora.lora_shrink
    signature = registry.signature_of((x, a))
    assert torch.equal(op.signed(signature, *args)[0], op(*args)[0])
    others = [registry.signature_of(tensors) for tensors in ((x, a.bfloat16()), (x.bfloat16(), a))]
    for context in (use("reference"), fastft.testing.cpu_isa("default")):
        with context:
            others.append(registry.signature_of((x, a)))
            assert op.signed(others[-1], *args)[0].shape == (3, 2)
    assert len({signature, *others}) == 5 and None not in others

    # Where somebody looks on, or an argument has its own dispatch, each call goes through PyTorch's dispatcher.
    for watcher in (record(), torch.enable_grad(), torch.profiler.profile(), Watching()):
        with watcher:
            assert registry.signature_of((x, a)) is None
            op.signed(None, *args)
    assert registry.signature_of((x, a.as_subclass(torch.nn.Buffer))) is None
    with record() as calls:
        op.signed(None, *args)
    assert [c.op for c in calls] == ["lora_shrink"]


def test_a_backend_of_missing_and_run_alone_is_called_without_gradients(monkeypatch):
    class Doubled:
        def missing(self, op, device):
            return None

        def run(self, op, args):
            return 2 * op.reference(*args)[0], None

    monkeypatch.setitem(registry.BACKENDS, "doubled", Doubled())
    x, a = torch.ones(3, 5), torch.ones(2, 5)
    with torch.no_grad(), fastft.testing.use("doubled"):
        for _ in range(2):
            assert lora.lora_shrink(x, a, [2], 0.0, None).unique().tolist() == [10.0]
