"""LoRA layers where no gradient is asked for, on a CPU.

In decoding, a GEMM of few tokens pushes all else out of the caches, so that what an adapter costs is the memory that its
Python and its ops touch: `lora_linear`, which is made for training, took 130 to 300 us a layer (2048 x 2048, rank 16, AMD
EPYC), an addition of two plain matrix products 60 to 110. Here it is two calls, with as few questions before them as can be.
"""

from collections.abc import Callable

from torch import Tensor, float32, is_autocast_enabled, is_grad_enabled
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.functional import linear

from .dora import dora_expand_
from .lora import lora_add_, lora_shrink
from .registry import KERNEL_DTYPES, conditions

_PLAIN = frozenset((Tensor, Parameter))
_ready: dict[tuple, tuple[Callable, ...]] = {}  # a LoRA?, conditions, dtypes of x and A -> what the registry would run


def lora_inference(x, weight, bias, a, b, scale, g=None):
    """``x Wᵀ + bias + scale · x Aᵀ Bᵀ``, as `lora_linear` of the same tensors; with `g` [N], float32, DoRA's factors, what
    stands before the bias is multiplied by them.

    None where `lora_linear` has to be asked: gradients are asked for, something follows or changes all calls, or these are
    no plain tensors on a CPU that fit. Not for graphs that torch.compile makes, in which Python costs nothing.
    """
    if is_grad_enabled():
        return None
    if not (type(x) in _PLAIN and type(weight) in _PLAIN and type(a) in _PLAIN and type(b) in _PLAIN and x.is_cpu):
        return None
    if (
        _len_torch_dispatch_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _profiler_enabled()
        or is_autocast_enabled("cpu")
    ):
        return None
    try:  # the ops look at shapes, dtypes and devices before they write, but have not `lora_linear`'s words for them
        x, a, b, now, plain = x.contiguous(), a.contiguous(), b.contiguous(), conditions(), g is None
        ops = _ready.get((plain, now, x.dtype, a.dtype)) or _choose(plain, now, x, a, b)
        if ops is None:
            return None
        if plain:
            y = linear(x, weight, bias)
            ops[0](y, x, a, b, scale)
            return y
        u, rows = linear(x, weight), x.view(-1, x.shape[-1])
        s = ops[0](rows, a, [a.shape[0]], 0.0, None)[0]
        return ops[1](u.view(rows.shape[0], -1), s, b, g, bias, scale).view(u.shape)
    except RuntimeError:
        return None


def _choose(plain, now, x, a, b) -> tuple[Callable, ...] | None:
    """What is called for a LoRA (`plain`) or a DoRA; None for dtypes that no kernel takes."""
    if x.dtype not in KERNEL_DTYPES or a.dtype not in (x.dtype, float32):
        return None
    if now is None:  # somebody records, whom they tell
        return (lora_add_,) if plain else (lora_shrink, dora_expand_)
    rows = x.view(-1, x.shape[-1])
    if plain:
        found = (lora_add_.direct(rows, rows, a, b, 1.0),)
    else:
        found = lora_shrink.direct(rows, a, [a.shape[0]], 0.0, None), dora_expand_.direct(rows, rows, b, a, None, 1.0)
    _ready[plain, now, x.dtype, a.dtype] = found
    return found


def few_tokens(x) -> bool:
    """Are x [..., K] so few tokens that one read of them for several adapters saves nothing? They stay in a cache."""
    return x.dim() > 0 and x.numel() <= 32 * x.shape[-1]
