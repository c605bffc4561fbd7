"""Every op of the registry on drawn problems, on every C++ library that runs here, against the reference."""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastft import _native
from fastft.ops import registry
from tests.fuzz import op_calls, op_problems
from tests.fuzz.op_problems import PROBLEMS
from tests.lengths import drawn
from tests.ops.drawing import on
from tests.ops.layers import BF16, F16, F32

pytestmark = pytest.mark.skipif(_native.cpu_library()[0] is None, reason=str(_native.cpu_library()[1]))
DTYPES = st.sampled_from([(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)])


def test_no_op_is_left_out():
    assert set(PROBLEMS) == set(registry.OPS)


@pytest.mark.parametrize("op", sorted(PROBLEMS))
def test_drawn(op):
    @drawn(6)
    @given(st.data(), st.sampled_from(_native.supported_isas()), DTYPES)
    def check(data, isa, dtypes):
        with on(isa):
            PROBLEMS[op](data, *dtypes)

    check()


@pytest.mark.parametrize("op", ["lora_shrink", "gather_columns", "sampled_product_", "count_at_least", "grouped_add_"])
def test_an_error_is_found(monkeypatch, op):
    def wrong(name, arguments, backend=None):
        found = original(name, arguments, backend)
        if backend is None and found[0].numel():
            found[0].view(-1)[0] += 1
        return found

    original = op_calls.called
    for module in (op_calls, op_problems):
        monkeypatch.setattr(module, "called", wrong)

    @settings(max_examples=20, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(st.data(), st.just(_native.supported_isas()[0]), st.just((F32, F32)))
    def check(data, isa, dtypes):
        with on(isa):
            PROBLEMS[op](data, *dtypes)

    with pytest.raises(AssertionError):
        check()
