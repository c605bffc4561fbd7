"""`SparseDeltaLinear`: an `nn.Linear` with a frozen base, of which chosen entries train."""

import torch
from torch import nn

from ..ops.entries import Entries
from ..ops.partial_linear import Part, partial_linear
from ..ops.sparse import gather_entries, write_entries_
from .stores import Seen, SeenWeight, has_gradient, surely_zero


class SparseDeltaLinear(nn.Linear):
    """``y = x Wᵀ + bias`` with W and bias frozen but for chosen entries of W, which are round(pretrained + delta).

    The delta stands in the weight, so forward and dX cost what the frozen layer's cost; of dW only the entries are computed
    (SpIEL, Ansell et al. 2024, arXiv:2401.16405). `fastft.attach` does the same to the layers of a model.

    Positionally an `nn.Linear`; an `nn.Linear` is turned into one by `from_linear`.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        mask: bool [N, K], or
        indices: integers, row-major positions in the weight; one of the two says which entries train.

    Attributes:
        weight [N, K], bias [N]: frozen parameters. ``state_dict`` shows the pretrained weight, whatever stands in it.
        delta [E]: trained parameter, float32 (float64 for float64 weights), in the row-major order of the entries.
        starts, columns: the entries, see `ops.sparse`.

    Any optimizer over the parameters that require gradients trains it: what it changed is written before the next forward.

    Raises:
        ValueError: both or neither of `mask` and `indices`, positions out of range or given twice, a mask of another shape.
    """

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, mask=None, indices=None
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self._choose(mask, indices)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, mask=None, indices=None) -> "SparseDeltaLinear":
        """One that holds `linear`'s own weight and bias (not copies). Raises as the constructor does."""
        layer, bias = cls.__new__(cls), linear.bias is not None
        nn.Linear.__init__(layer, linear.in_features, linear.out_features, bias, "meta", linear.weight.dtype)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._choose(mask, indices)
        layer.train(linear.training)
        return layer

    def _choose(self, mask, indices):
        if (mask is None) == (indices is None):
            raise ValueError("give either mask or indices")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != self.weight.shape):
            want = f"torch.bool {list(self.weight.shape)}"
            raise ValueError(f"the mask is {mask.dtype} {list(mask.shape)}, it must be {want}")
        shape = tuple(self.weight.shape)
        entries = Entries.of_mask(mask) if mask is not None else Entries.of_flat(torch.as_tensor(indices), shape)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        device = self.weight.device
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.delta = nn.Parameter(torch.zeros(len(entries), dtype=wide, device=device))
        self.register_buffer("starts", entries.starts.to(device))
        self.register_buffer("columns", entries.columns.to(device))
        self.register_buffer("_base", None, persistent=False)  # the entries' pretrained bits, while a delta stands
        self._forget()  # `_written`: the delta that was written; `_into`: the weight as it was then
        self._trained = False  # a gradient came since, and an optimizer may not tell that it changed the delta
        self._part = None

    def extra_repr(self):
        return f"{super().extra_repr()}, entries={len(self.columns)}"

    @property
    def entries(self) -> Entries:
        return Entries(self.starts, self.columns, tuple(self.weight.shape))

    def forward(self, input):
        self._write()
        if self._part is None:
            self._part = Part("entries", self.entries)
        return partial_linear(input, self.weight, self.bias, self._part, _Noted.apply(self.delta, self))

    @torch.no_grad()
    def _write(self):
        """Bring the weight up to date with the delta."""
        self._check_own()
        if self._base is None:
            self._base = gather_entries(self.weight, self.starts, self.columns)
        else:
            self._follow_weight()
            if self._written.still(self.delta) and not self._trained:
                return
        write_entries_(self.weight, self.starts, self.columns, self._base, self.delta.detach())
        if not self._written.still(self.delta):  # a graph that saved the weight must notice; the same bits do no harm
            torch.autograd.graph.increment_version(self.weight)
        self._written, self._trained = Seen(self.delta), has_gradient(self.delta)
        self._into = SeenWeight() if torch.compiler.is_compiling() else SeenWeight(self.weight)

    def _check_own(self):
        """The delta must not get into a tensor of somebody else's: a ``state_dict`` shows the pretrained weight."""
        if type(self.weight) is nn.Parameter or "_is_replica" in self.__dict__ or torch.compiler.is_compiling():
            return  # DataParallel's replicas have copies
        if "weight" in self._parameters:
            advice = "give functional_call the delta alone ({'delta': ...}); FSDP and fully_shard don't go with this layer"
        else:
            advice = "pruning and parametrizations compute it from others; remove them (parametrize.remove_parametrizations)"
        raise RuntimeError(
            f"the weight is a {type(self.weight).__name__} of shape {list(self.weight.shape)} and not the layer's own "
            f"Parameter, the only one in which the delta can stand: {advice}"
        )

    def _follow_weight(self):
        """What something else wrote into the weight while no delta but 0 stood in it is the base from now on. Raises
        RuntimeError while another stands in it."""
        weight = self.weight
        if torch.compiler.is_compiling() or self._into.still(weight) or "_is_replica" in self.__dict__:
            return
        owns, same = self._written.of(self.delta), self._written.still(self.delta)

        def untouched():
            return same and surely_zero(self.delta)

        if self._into.is_new_base(weight, owns, same and not self._trained, untouched, self._holds):
            self._base = gather_entries(weight, self.starts, self.columns)
        if owns:  # else it is functional_call's, for this forward
            self._into = SeenWeight(weight)

    def _holds(self) -> bool:
        """Does the weight hold what the delta makes of the pretrained bits?"""
        want = self.weight.detach().clone()
        write_entries_(want, self.starts, self.columns, self._base, self.delta.detach())
        return torch.equal(want, self.weight)

    @torch.no_grad()
    def restore(self):
        """Put the pretrained bits back into the weight; the next forward writes the delta again."""
        if self._base is not None:
            self._follow_weight()
            write_entries_(self.weight, self.starts, self.columns, self._base, None)
            self._forget()

    def _forget(self):
        """No delta stands in the weight. (Module.to may swap tensors, which no weak reference may know.)"""
        self._base, self._written, self._into = None, Seen(), SeenWeight()

    def _apply(self, fn, *args, **kwargs):
        delta, self._part = self.delta.data, None
        self.restore()
        super()._apply(fn, *args, **kwargs)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        if self.delta.dtype != wide:  # a cast of the model rounds its weights, not what was learnt
            self.delta.data = delta.to(self.weight.device, wide)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base is not None:
            self._follow_weight()
            weight = self.weight.detach().clone()
            write_entries_(weight, self.starts, self.columns, self._base, None)
            destination[prefix + "weight"] = weight

    def _load_from_state_dict(self, *args, **kwargs):
        if self._base is not None and not self._into.still(self.weight) and not self._holds():
            self._forget()
        self.restore()
        self._part = None
        super()._load_from_state_dict(*args, **kwargs)


class _Noted(torch.autograd.Function):
    """The delta as it is; its layer notes that a gradient came."""

    @staticmethod
    def forward(ctx, delta, layer):
        ctx.layer = layer
        return delta.view_as(delta)

    @staticmethod
    def backward(ctx, grad):
        ctx.layer._trained = True
        return grad, None
