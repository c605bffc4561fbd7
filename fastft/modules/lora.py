"""`LoRALinear`: an `nn.Linear` with a frozen base and a trained low-rank term."""

import math

import torch
from torch import nn

from ..ops.lora_linear import lora_linear


class LoRALinear(nn.Linear):
    """``y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`` with W and bias frozen (LoRA, Hu et al. 2021, arXiv:2106.09685).

    Positionally an `nn.Linear`; an `nn.Linear` is turned into one by `from_linear`.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        r: rank R >= 0; 0 is the frozen linear alone.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023).
        lora_dropout: probability in [0, 1] with which an element of x is dropped from the low-rank term in training.

    Attributes:
        weight [N, K], bias [N]: frozen parameters, named as in `nn.Linear`.
        lora_A [R, K], lora_B [N, R]: trained parameters in `dtype`; casting them to float32 (``layer.lora_A.data.float()``
            or PEFT's habit) is supported at the speed of the cast's extra bytes. A starts Kaiming-uniform, B at zero.
        merged: whether `weight` holds the low-rank term.

    Raises:
        ValueError: r < 0, or a dropout outside [0, 1].
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
    ):
        if not (isinstance(r, int) and r >= 0):
            raise ValueError(f"r is {r!r}; the rank must be an integer >= 0")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"lora_dropout is {lora_dropout}; it must lie in [0, 1]")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        self.register_buffer("_pristine", None, persistent=False)  # weight's own bits while merged
        self.reset_lora_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False):
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
        )
        layer.weight, layer.bias = linear.weight.requires_grad_(False), linear.bias
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        for name in ("lora_A", "lora_B"):
            setattr(layer, name, nn.Parameter(torch.empty_like(getattr(layer, name), device=linear.weight.device)))
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "lora_A"):  # nn.Linear.__init__ calls this before they exist
            self.reset_lora_parameters()

    def reset_lora_parameters(self):
        """A Kaiming-uniform as an `nn.Linear`'s weight, B zero: the layer computes the base's output."""
        if self.r:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x):
        """x [..., K] to [..., N]."""
        if self.merged:
            return super().forward(x)
        p = self.lora_dropout if self.training else 0.0
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, p)

    @property
    def merged(self) -> bool:
        return self._pristine is not None

    @torch.no_grad()
    def merge(self):
        """Fold the low-rank term into `weight`: formed in float32 and rounded once. Merging twice does nothing.

        Raises:
            ValueError: the adapter is not finite.
        """
        if self.merged:
            return
        if not (self.lora_A.isfinite().all() and self.lora_B.isfinite().all()):
            raise ValueError("the adapter holds NaN or infinity; nothing was merged")
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        total = self.weight.to(dtype, copy=True)
        total.addmm_(self.lora_B.to(dtype), self.lora_A.to(dtype), alpha=self.scaling)
        self._pristine = self.weight.detach().clone()
        self.weight.copy_(total)

    @torch.no_grad()
    def unmerge(self):
        """Give `weight` back the bits it had before `merge` (a copy, since subtracting would not be exact)."""
        if self.merged:
            self.weight.copy_(self._pristine)
            self._pristine = None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a file must never hold the term twice
            destination[prefix + "weight"] = self._pristine

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if self.merged:
            errors.append(f"{prefix or 'this layer'} is merged; unmerge() it before loading a state dict")
            return
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if not any(prefix + name in state_dict for name in ("lora_A", "lora_B")):
            # A plain Linear's state dict: the adapter keeps its values.
            missing[before:] = [key for key in missing[before:] if key not in (prefix + "lora_A", prefix + "lora_B")]

    def extra_repr(self):
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
            + (", use_rslora=True" if self.use_rslora else "")
            + (", merged" if self.merged else "")
        )
