"""LoRA layers where no gradient is asked for, on a CPU.

In decoding, a GEMM of few tokens pushes all else out of the caches, so that what an adapter costs is the memory that its
Python and its ops touch: `lora_linear`, which is made for training, took 130 to 300 us a layer (2048 x 2048, rank 16, AMD
EPYC), an addition of two plain matrix products 60 to 110. Here it is two calls, with as few questions before them as can be.
"""

from torch import Tensor, float32, is_autocast_enabled, is_grad_enabled
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.nn.functional import linear

from .lora import lora_add_
from .registry import KERNEL_DTYPES, conditions

_PLAIN = frozenset((Tensor, Parameter))
_ready: dict[tuple, object] = {}  # what `lora_add_` runs


def lora_inference(x, weight, bias, a, b, scale):
    """``x Wᵀ + bias + scale · x Aᵀ Bᵀ``, as `lora_linear` of the same tensors.

    None where `lora_linear` has to be asked: gradients are asked for, something follows or changes all calls, or these are
    no plain tensors on a CPU that fit.
    """
    if is_grad_enabled() or is_compiling():
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
        x, now = x.contiguous(), conditions()
        key = now, x.dtype, a.dtype
        add = _ready.get(key) if now is not None else lora_add_  # which tells those who record
        if add is None:
            if x.dtype not in KERNEL_DTYPES or a.dtype not in (x.dtype, float32):
                return None
            add = _ready[key] = lora_add_.direct(x, x, a, b, scale)
        y = linear(x, weight, bias)
        add(y, x, a.contiguous(), b.contiguous(), scale)
    except RuntimeError:
        return None
    return y


def few_tokens(x) -> bool:
    """Are x [..., K] so few tokens that one read of them for several adapters saves nothing? They stay in a cache."""
    return x.dim() > 0 and x.numel() <= 32 * x.shape[-1]
