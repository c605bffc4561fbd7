"""Every op of the registry on drawn problems, on every C++ library that runs here, against the reference."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft import _native
from fastft.ops import registry
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
