"""What the tests of the public functions share: random layers, the plain composition, gradients, saved bytes."""

import torch
import torch.nn.functional as F

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def layer(t=(6,), k=40, n=24, r=4, act=F32, adapter=F32, device="cpu", seed=0):
    """x [*t, k], frozen weight [n, k] and bias [n], trained A [r, k] and B [n, r]."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size, dtype):
        return torch.randn(*size, generator=g).to(dtype).to(device)

    x = draw(*t, k, dtype=act).requires_grad_()
    w, bias = draw(n, k, dtype=act), draw(n, dtype=act)
    return x, w, bias, draw(r, k, dtype=adapter).requires_grad_(), draw(n, r, dtype=adapter).requires_grad_()


def composition(x, w, bias, a, b, scale=1.0):
    """PEFT's forward: base, cast, two linears, scale, add, cast back."""
    return (F.linear(x, w, bias) + F.linear(F.linear(x.to(a.dtype), a), b) * scale).to(x.dtype)


def grads(f, inputs, dy):
    inputs = [i.detach().clone().requires_grad_(i.requires_grad) for i in inputs]
    out = f(*inputs)
    out.backward(dy)
    return [out.detach(), *(i.grad for i in inputs if i.requires_grad)]


def saved_bytes(f, *besides):
    """Bytes of the storages that autograd keeps for backward, without those of `besides`; and what f returned."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    for t in besides:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values()), y


def seeded(f, *fixed):
    """f with the same dropout masks at every call, and `fixed` as its last arguments."""

    def run(*inputs):
        torch.manual_seed(0)
        return f(*inputs, *fixed)

    return run
