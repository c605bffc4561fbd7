import pytest
import torch

from fastft.bench import counting

CPU = torch.device("cpu")
KB = 256  # float32 numbers


def test_peak_is_what_lives_at_once():
    def run():
        a = torch.zeros(4 * KB)
        b = a + 1
        del a
        return b + torch.ones(2 * KB).repeat(2)

    # b with the short and the repeated ones; then b, the repeated ones and their sum.
    assert counting.peak_bytes(run, CPU) == max(4 + 2 + 4, 4 + 4 + 4) * 1024


def test_peak_counts_gradients_that_a_call_frees_and_makes_again():
    w = torch.randn(64 * KB, requires_grad=True)

    def run():
        w.grad = None
        (w * 2).square().sum().backward()

    run()
    # The product, which is saved, and its square; then the product, its gradient and w's, or an intermediate for one.
    assert 3 * 64 * 1024 <= counting.peak_bytes(run, CPU) <= 4 * 64 * 1024 + 64


def test_the_profilers_own_lines_are_not_printed(capfd):
    kept = torch.zeros(1000)

    def run():
        kept.resize_(0).resize_(100_000)

    run()
    counting.peak_bytes(run, CPU)
    assert capfd.readouterr().err == ""


def test_launches_count_ops_of_forward_and_backward():
    w, x = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4)
    assert counting.launches(lambda: x @ w.detach(), CPU) == 2, "detach and mm"
    forward = counting.launches(lambda: (x @ w).sum(), CPU)
    assert forward == 2
    assert counting.launches(lambda: (x @ w).sum().backward(), CPU) > forward


def test_an_op_of_ours_is_one_whatever_it_runs_on():
    from fastft import testing
    from fastft.ops.lora import lora_shrink

    x, a = torch.randn(8, 16), torch.randn(4, 16)

    def run():
        with torch.no_grad():
            lora_shrink(x, a, [4], 0.0, None)

    assert counting.launches(run, CPU) == 1
    with testing.use("reference"):
        assert counting.launches(run, CPU) == 1


def test_compiled_code_is_counted_as_it_runs_and_stays_compiled():
    ran = []

    def backend(graph, examples):
        return lambda *args: (ran.append(1), (args[-1].clone(),))[1]  # one op for three

    x = torch.ones(3)
    compiled = torch.compile(lambda x: (x * x + x) * x, backend=backend)
    assert counting.launches(lambda: compiled(x), CPU) == 1
    compiled(x)
    assert len(ran) == 2
    torch.compiler.reset()


def test_gpus_that_the_profiler_does_not_see_give_no_number(monkeypatch):
    monkeypatch.setattr(counting, "supported_activities", lambda: {counting.ProfilerActivity.CPU})
    assert counting.launches(lambda: pytest.fail("not needed"), torch.device("cuda")) is None
