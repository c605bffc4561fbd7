"""PEFT's adapted q, k and v, or gate and up, share their input as ours do (`modules.groups`): one read of x for all A's, and
one dX."""

from torch import nn

from ..methods.grouping import siblings
from ..modules.groups import ProjectionGroup
from ..modules.projection import Projection


class PeftGroup(ProjectionGroup):
    """Accelerated `lora.Linear`s; what they share is found out anew by each round, as all of PEFT's."""

    def linear(self, member, x, weight, bias, a, b, scale, p):
        """What `lora_linear` gives for the member, or None if it is to run alone."""
        return self.project(member, x, weight, bias, Projection("", a, b, scale, p))

    def _factors(self, x, p):
        found = [member.plain_arguments(x) for member in self.members]
        if any(own is None or own.p != p or own.lora_A.dtype is not found[0].lora_A.dtype for own in found):
            return None
        return [own.lora_A for own in found]


def group_layers(layers: dict[str, nn.Module]) -> None:
    """Group the accelerated layers that probably read one input, by their names in a model."""
    plain = {name: layer.base_layer for name, layer in layers.items() if type(layer.base_layer) is nn.Linear}
    for names in siblings(plain):
        members = [layers[name] for name in names]
        before = members[0]._fastft.group
        if before is None or before.members != members:
            group = PeftGroup(names, members)
            for member in members:
                member._fastft.group = group
