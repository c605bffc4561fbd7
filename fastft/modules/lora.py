"""`LoRALinear`: an `nn.Linear` with a frozen base and a trained low-rank term."""

import math

import torch
from torch import is_grad_enabled, nn
from torch.compiler import is_compiling

from ..ops.lora_inference import lora_inference
from ..ops.lora_linear import lora_linear
from .merging import holds_pristine
from .norms import RowNorms, factor, keep_wide

_PARTS = ("lora_A", "lora_B", "lora_bias", "lora_magnitude")


class LoRALinear(nn.Linear):
    """``y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`` with W and bias frozen (LoRA, Hu et al. 2021, arXiv:2106.09685).

    With `use_dora` ``y = g ∘ (x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ) + bias``, g = lora_magnitude / ‖W + scaling · B A‖ by rows,
    the norm a constant in backward (DoRA, Liu et al. 2024, arXiv:2402.09353).

    Positionally an `nn.Linear`; an `nn.Linear` is turned into one by `from_linear`.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        r: rank R >= 0; 0 is the frozen linear alone.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023,
            arXiv:2312.03732).
        lora_dropout: probability in [0, 1] with which an element of x is dropped from the low-rank term in training.
        use_dora: train the magnitude of each output apart from its direction; see `fastft.LoRA` for dropout's part in it.
        lora_bias: train a bias on B, which adds scaling · lora_bias; not with `use_dora`.

    Attributes:
        weight [N, K], bias [N]: frozen parameters, named as in `nn.Linear`.
        lora_A [R, K], lora_B [N, R]: trained parameters in `dtype`; casting them to float32 (``layer.lora_A.data.float()``
            or PEFT's habit) is supported at the speed of the cast's extra bytes. A starts Kaiming-uniform, B at zero.
        lora_magnitude [N]: trained, at least float32, or None; ‖W‖ by rows at the start, and when a plain Linear's state
            dict is loaded. Whoever fills `weight` otherwise calls `reset_lora_parameters`.
        lora_bias [N]: trained, or None; zero at the start.
        merged: whether `weight` (and `bias`) hold the low-rank term.

    Raises:
        ValueError: r < 0, a dropout outside [0, 1], or both `use_dora` and `lora_bias`.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        r=8,
        lora_alpha=8,
        lora_dropout=0.0,
        use_rslora=False,
        use_dora=False,
        lora_bias=False,
    ):
        if use_dora and lora_bias:
            raise ValueError("lora_bias and use_dora can't be combined, as in PEFT: DoRA multiplies weights, not biases")
        if not (isinstance(r, int) and r >= 0):
            raise ValueError(f"r is {r!r}; the rank must be an integer >= 0")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"lora_dropout is {lora_dropout}; it must lie in [0, 1]")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.use_dora = use_dora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        magnitude_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        for name, wanted, kind in (("lora_bias", lora_bias, dtype), ("lora_magnitude", use_dora, magnitude_dtype)):
            value = nn.Parameter(torch.empty(out_features, device=device, dtype=kind)) if wanted else None
            self.register_parameter(name, value)
        self.register_buffer("_pristine", None, persistent=False)  # weight's own bits while merged
        self.register_buffer("_pristine_bias", None, persistent=False)  # and bias's, if lora_bias is merged into it
        self._norms = RowNorms()
        self.reset_lora_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False, use_dora=False, lora_bias=False
    ):
        """Wrap a linear layer; its weight and bias Parameters are shared, not copied, and become frozen.

        Raises:
            TypeError: `linear` is not exactly an `nn.Linear`: a subclass may hold more than a weight and a bias
                (another adapter, a parametrisation), or be read by its owner without a call (`nn.MultiheadAttention`).
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"from_linear takes an nn.Linear itself, not {type(linear).__module__}.{type(linear).__qualname__}"
            )
        # Built on meta, so that no second weight is ever allocated.
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
        )
        layer.weight, layer.bias = linear.weight.requires_grad_(False), linear.bias
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        for name in layer._own_parts():
            setattr(layer, name, nn.Parameter(torch.empty_like(getattr(layer, name), device=linear.weight.device)))
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "lora_A"):  # nn.Linear.__init__ calls this before they exist
            self.reset_lora_parameters()

    def reset_lora_parameters(self):
        """A Kaiming-uniform as an `nn.Linear`'s weight, B and its bias zero, m ‖W‖: the layer computes the base's output."""
        if self.r:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)
        self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self):
        if self.use_dora and not (self.weight.is_meta or self.lora_magnitude.is_meta):
            self.lora_magnitude.copy_(self._norm())

    def _norm(self):
        return self._norms(self.weight, self.lora_A, self.lora_B, self.scaling)

    def _apply(self, fn, *args, **kwargs):
        self._norms.forget()
        magnitude = None if self.lora_magnitude is None else self.lora_magnitude.data
        super()._apply(fn, *args, **kwargs)
        if magnitude is not None:
            keep_wide(self.lora_magnitude, magnitude, self.weight)
        return self

    def _own_parts(self):
        return [name for name in _PARTS if getattr(self, name) is not None]

    def forward(self, x):
        """x [..., K] to [..., N]."""
        if not (is_grad_enabled() or is_compiling()) and (y := self._without_gradient(x)) is not None:
            return y
        bias = self.bias
        if self.merged:
            if not holds_pristine(self.weight, self._pristine):
                return super().forward(x)
            bias = bias if self._pristine_bias is None else self._pristine_bias
        p = self.lora_dropout if self.training else 0.0
        norm = self._norm() if self.use_dora else None
        return lora_linear(
            x,
            self.weight,
            bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            p,
            lora_bias=self.lora_bias,
            magnitude=self.lora_magnitude,
            weight_norm=norm,
        )

    def _without_gradient(self, x):
        """The output in the commonest cases, past `nn.Module.__getattr__`; None otherwise."""
        own = self.__dict__
        get = own["_parameters"].get
        if own["_buffers"]["_pristine"] is not None or (own["training"] and own["lora_dropout"]):
            return None
        if get("lora_bias") is not None:
            return None
        weight, a, b, scale, g = get("weight"), get("lora_A"), get("lora_B"), own["scaling"], None
        if own["use_dora"]:
            norms, magnitude = own["_norms"], self.lora_magnitude
            g = norms.kept_factor(weight, a, b, scale, magnitude)
            g = norms.factor(magnitude, self._norm()) if g is None else g
        return lora_inference(x, weight, get("bias"), a, b, scale, g)

    @property
    def merged(self) -> bool:
        return self._pristine is not None

    @torch.no_grad()
    def merge(self):
        """Fold the low-rank term into `weight` (and `bias`): formed in float32, rounded once. Merging twice does nothing.

        Raises:
            ValueError: the adapter is not finite, or `lora_bias` has no `bias` to go into.
        """
        if self.merged:
            return
        if not all(getattr(self, name).isfinite().all() for name in self._own_parts()):
            raise ValueError("the adapter holds NaN or infinity; nothing was merged")
        if self.lora_bias is not None and self.bias is None:
            raise ValueError("there is no bias that lora_bias could be added to; nothing was merged")
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        total = self.weight.to(dtype, copy=True)
        total.addmm_(self.lora_B.to(dtype), self.lora_A.to(dtype), alpha=self.scaling)
        if self.use_dora:
            total.mul_(factor(self.lora_magnitude, self._norm())[:, None])
        with torch.inference_mode(False):  # the copies live longer than a block in inference mode
            self._pristine = self.weight.detach().clone()
            self._pristine_bias = None if self.lora_bias is None else self.bias.detach().clone()
        self.weight.copy_(total)
        if self.lora_bias is not None:
            self.bias.copy_(self.bias.to(dtype) + self.scaling * self.lora_bias.to(dtype))

    @torch.no_grad()
    def unmerge(self):
        """Give `weight` and `bias` back the bits from before `merge` (copies, since subtracting would not be exact)."""
        if self.merged:
            self.weight.copy_(self._pristine)
            if self._pristine_bias is not None:
                self.bias.copy_(self._pristine_bias)
            self._pristine = self._pristine_bias = None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a file must never hold the term twice
            destination[prefix + "weight"] = self._pristine
            if self._pristine_bias is not None:
                destination[prefix + "bias"] = self._pristine_bias

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if self.merged:
            errors.append(f"{prefix or 'this layer'} is merged; unmerge() it before loading a state dict")
            return
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        own = [prefix + name for name in _PARTS]
        if not any(key in state_dict for key in own):
            # A plain Linear's state dict: the adapter keeps its values, but magnitudes are those of the new weight.
            missing[before:] = [key for key in missing[before:] if key not in own]
            if prefix + "weight" in state_dict:
                self._reset_magnitude()

    def extra_repr(self):
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
            + (", use_rslora=True" if self.use_rslora else "")
            + (", use_dora=True" if self.use_dora else "")
            + (", lora_bias=True" if self.lora_bias is not None else "")
            + (", merged" if self.merged else "")
        )
