"""What linear layers see while a model runs over calibration batches. The model is left exactly as it was, also by an error.

A batch is a mapping of keyword arguments, a tuple or list of positional ones, or a tensor; its tensors are moved to the
device of the model's first parameter. The model runs in evaluation mode.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def mean_squared_inputs(model: nn.Module, names: Iterable[str], calibration: Iterable[Any]) -> dict[str, Tensor]:
    """Module name -> mean over tokens of the squares of each in-feature, [K] in at least float32, of the linears `names`.

    Tokens that the batch's attention_mask [batch, tokens] leaves out don't count; in an encoder-decoder,
    decoder_attention_mask is meant for the modules of the decoder. Experts count the tokens that are sent to them.

    Raises:
        ValueError: no batches; a module that no token reaches; padding where a module's input doesn't show which it is.
    """
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(names, 0)
    batch: Mapping[str, Any] = {}

    def watch(name):
        def hook(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            rows = _unmasked(x, _mask(model, name, batch), name)
            norms = torch.linalg.vector_norm(rows, dim=0, dtype=torch.promote_types(rows.dtype, torch.float32))
            sums[name] = sums[name] + norms.square() if name in sums else norms.square()
            tokens[name] += rows.shape[0]

        return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        for name in tokens:
            stack.callback(watch(name).remove)
        for args, batch in _batches(model, calibration):  # the hooks read batch
            model(*args, **batch)
    for name, count in tokens.items():
        if not count:
            raise ValueError(f"no token of the calibration reaches {name!r}")
    return {name: sums[name] / count for name, count in tokens.items()}


def visit_gradients(
    model: nn.Module, names: Iterable[str], calibration: Iterable[Any], visit: Callable[[str, Tensor], None]
) -> None:
    """Call `visit(name, dW)` for every batch and linear of `names` that the loss depends on; dW is stored like the weight.

    Each dW is dropped before the next is made, so that one at a time is held. The model must return a scalar or something
    with a scalar `loss`.

    Raises:
        ValueError: no batches; no loss; a loss that depends on none of the linears.
    """
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())  # of trained weights under adapters: these only seem to train
        warnings.filterwarnings("ignore", "a weight requires a gradient while adapters train parts of it in place")
        stack.enter_context(_weights_as_leaves(model, names, visit))
        for args, kwargs in _batches(model, calibration):
            output = model(*args, **kwargs)
            loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError("the model gave no scalar loss for a calibration batch; do the batches have labels?")
            if not loss.requires_grad:
                raise ValueError("the loss of a calibration batch depends on none of the layers that are scored")
            loss.backward()


@contextmanager
def _weights_as_leaves(model, names, visit):
    """Only the weights of `names` require gradients, as new parameters over the same memory: what hangs on the old ones
    (.grad, hooks, an optimizer's or a gradient reducer's) sees nothing."""
    modules = {name: model.get_submodule(name) for name in names}
    weights = {name: module._parameters["weight"] for name, module in modules.items()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def visitor(name):
        def hook(leaf):
            grad, leaf.grad = leaf.grad, None
            visit(name, grad.detach())

        return hook

    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for name, module in modules.items():
            leaf = nn.Parameter(weights[name].detach())
            leaf.register_post_accumulate_grad_hook(visitor(name))
            module._parameters["weight"] = leaf
        yield
    finally:
        for name, module in modules.items():
            module._parameters["weight"] = weights[name]
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _evaluating(model):
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _batches(model, calibration) -> Iterator[tuple[tuple, Mapping[str, Any]]]:
    """(positional, keyword arguments) of every batch, on the model's device. Raises ValueError if there is none."""
    device, empty = next(model.parameters()).device, True
    for batch in calibration:
        empty = False
        batch = _moved((batch,) if isinstance(batch, Tensor) else batch, device)
        if isinstance(batch, Mapping):
            yield (), batch
        elif isinstance(batch, (tuple, list)):
            yield tuple(batch), {}
        else:
            raise TypeError(f"a calibration batch is a {type(batch).__name__}; it must be a mapping, a tuple or a tensor")
    if empty:
        raise ValueError("calibration has no batches; an iterator can be read only once")


def _moved(value, device):
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(inner, device) for inner in value)
    return value


def _mask(model, name, batch) -> Tensor | None:
    """The attention_mask for what `name` reads, if it leaves anything out."""
    split = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask = batch.get("decoder_attention_mask" if split and "decoder" in name.split(".") else "attention_mask")
    return None if mask is None or bool((mask != 0).all()) else mask != 0


def _unmasked(x, mask, name) -> Tensor:
    """[rows, K] of x [..., K] without masked tokens."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    if mask.dim() != 2 or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        raise ValueError(
            f"{name!r} reads a tensor of shape {list(x.shape)}, of which the attention_mask {list(mask.shape)} doesn't tell "
            "the padding; calibrate with batches that have none"
        )
    return rows[mask.reshape(-1).to(rows.device)]
