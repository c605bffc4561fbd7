"""PEFT's adapted q, k and v, or gate and up, share their input as ours do (`modules.groups`): one read of x for all A's, and
one dX.
"""

from torch import nn

from ..methods.grouping import siblings
from ..modules.groups import ProjectionGroup


class PeftGroup(ProjectionGroup):
    """Accelerated layers; what they share is found out anew by each round, as all of PEFT's."""

    def _factors(self, x, p):
        found = [member.projection(x) for member in self.members]
        if any(one is None or one.dropout != p or one.lora_A.dtype is not found[0].lora_A.dtype for one in found):
            return None
        return [one.lora_A for one in found]


def group_layers(layers: dict[str, nn.Module]) -> None:
    """Group the accelerated layers that probably read one input, by their names in a model."""
    for names in siblings(layers, in_features=lambda layer: layer.in_features):
        members = [layers[name] for name in names]
        before = members[0]._fastft.group
        if before is None or before.members != members:
            group = PeftGroup(names, members)
            for member in members:
                member._fastft.group = group
