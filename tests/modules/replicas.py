"""What nn.DataParallel makes of a model for one device and forward; without GPUs it makes none itself."""

from collections import OrderedDict

from torch import nn


def replica(module: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate` does."""
    made = module._replicate_for_data_parallel()
    made._former_parameters = OrderedDict()
    for name, child in module._modules.items():
        setattr(made, name, None if child is None else replica(child))
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:  # a copy is no leaf, so an attribute
            made._former_parameters[name] = copied = parameter.clone()
            setattr(made, name, copied)
    for name, buffer in module._buffers.items():
        setattr(made, name, None if buffer is None else buffer.clone())
    return made
