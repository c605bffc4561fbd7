"""PEFT's adapted q, k and v, or gate and up, share their input as ours do (`modules.groups`): one read of x for all A's, and
one dX.
"""

import weakref

from torch import nn

from ..methods.grouping import siblings
from ..modules.groups import ProjectionGroup


def _nobody() -> None:
    """In place of a weak reference to a member that is not known."""


class PeftGroup(ProjectionGroup):
    """Accelerated layers, each of which knows the group and its place in it (`Record`).

    The group does not hold them, or they would keep each other alive until Python looks for cycles, and a copy of one would
    take the others along. In a copy of a group the members are who call it from their places.
    """

    def __init__(self, names):
        super().__init__(names, [_nobody] * len(names))

    def __getstate__(self):
        return {**super().__getstate__(), "members": [_nobody] * len(self.names)}

    def join(self, member) -> None:
        self.members[member._fastft.place] = weakref.ref(member)

    def consists_of(self, members) -> bool:
        return [known() for known in self.members] == members and all(member._fastft.group is self for member in members)

    def _place(self, member):
        place = member._fastft.place
        known = self.members[place]()
        if known is None:
            self.join(member)  # for the forwards to come: in this one, others may have run already
        return place if known is member else None  # None also for a replica of DataParallel's

    def _factors(self, x, i, projection):
        """What PEFT's layers add is found out anew by each round."""
        found = []
        for j, known in enumerate(self.members):
            one = projection if j == i else self._projection(known(), x)
            if one is None or one.dropout != projection.dropout or one.lora_A.dtype is not projection.lora_A.dtype:
                return None
            found.append(one.lora_A)
        return found

    def _projection(self, member, x):
        record = None if member is None else member.__dict__.get("_fastft")  # not of layers that were restored
        return member.projection(x) if record is not None and record.group is self else None


def group_layers(layers: dict[str, nn.Module], share: bool) -> None:
    """Group the accelerated layers that probably read one input, by their names in a model; or none."""
    wanted = siblings(layers, in_features=lambda layer: layer.in_features) if share else []
    found = {}
    for names in wanted:
        members = [layers[name] for name in names]
        before = members[0]._fastft.group
        usable = before is not None and before.reason is None and before.consists_of(members)
        group = before if usable else PeftGroup(names)
        found.update({member: (group, place) for place, member in enumerate(members)})
    for layer in layers.values():
        record = layer._fastft
        record.group, record.place = found.get(layer, (None, 0))
        if record.group is not None:
            record.group.join(layer)
