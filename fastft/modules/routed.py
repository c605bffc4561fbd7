"""Linears of a served model whose tokens each name their own adapter: what they become while an engine runs the model.

A *site* is one linear, or several that read one input (q, k and v; gate and up) whose weights then lie in one buffer: one
GEMM, one shrink and one expand (`ops.grouped`) compute all of them. The member that is called first computes, the others
take their columns if they are called with the same tensor, unchanged, in the same batch; else the whole site is computed
again. So a wrong guess of which linears belong together costs time, never a wrong result. Where one wide GEMM is slower than
several (see `APART_WEIGHTS`), each member's writes its columns of the site's output.

What tokens have which adapters stands in a `BatchRoute`, which the engine sets before each forward; where adapters lie, in
what `RoutedModel.bind` was given. A batch without adapters runs the same GEMM and nothing else, and rows without an adapter
have the same bits in either. For inference only: with gradients enabled a routed layer raises.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.grouped import grouped_add_, grouped_expand_, grouped_shrink, in_one_call
from .adapted_linear import Adapted
from .packed import are_packed, into_one, packing_obstacle, shares_memory
from .route import BatchRoute, Site

# From so many weights of a site on, a CPU computes a site's float32 members one by one: its library takes longer the wider a
# product of few rows is (AMD EPYC, 8 tokens from 2048 features to 2 x 5632: 1.29 of the time). Narrower, and in 16 bits at
# any size, one product is as quick or quicker.
APART_WEIGHTS = 1 << 21

# Up to so many tokens the shrink of a GPU's batch runs on a stream beside the base GEMM, which leaves units idle there.
OVERLAP_ROWS = 256


class RoutedSite:
    """What the members of a site share."""

    __slots__ = (
        *("site", "modules", "route", "weight", "bias", "sizes", "waiting", "warned", "in_features", "out_features", "name"),
        *("store", "offsets", "columns", "pieces", "widths", "side", "fork", "join", "overlap_rows"),
        *("conditions", "dtype", "ops"),
    )

    def __init__(self, site: Site, modules: list[nn.Module], route: BatchRoute):
        self.site, self.modules, self.route, self.name = site, modules, route, site.name
        self.in_features, self.out_features = site.in_features, site.out_features
        self.sizes = [width for _, _, width in site.outputs]
        self.weight = self.bias = self.waiting = self.side = None
        self.store = self.offsets = self.columns = self.pieces = None
        self.widths: dict[str, int | None] = {}
        self.conditions = self.dtype = self.ops = None
        self.warned, self.overlap_rows = False, 0
        if len(modules) > 1:
            self.pack()

    # ---- the weights of several members

    def pack(self) -> None:
        """The members' weights become slices of one buffer, their biases too."""
        self.weight = into_one([module.weight for module in self.modules])
        self.bias = None if self.modules[0].bias is None else into_one([module.bias for module in self.modules])

    def unpack(self) -> None:
        """Each Parameter gets memory of its own again."""
        with torch.inference_mode(False):
            for module in self.modules:
                for parameter in (module.weight, module.bias):
                    if parameter is not None and shares_memory(parameter):
                        parameter.data = parameter.data.clone()
        self.weight = self.bias = self.waiting = None

    def intact(self) -> bool:
        """Are the members' Parameters the slices of the buffer, as they were packed?"""
        if self.weight is None:
            return len(self.modules) == 1
        return are_packed(self.modules, self.weight, self.bias, trainable=True)

    # ---- forward

    def open(self, at: int, x):
        """The columns of member `at`; those of the others wait for them."""
        if torch.is_grad_enabled():
            _refuse_gradients()
        if self.weight is None:  # the model was moved since
            self.pack()
        route, waiting = self.route, self.waiting
        if waiting is not None and waiting[2] == route.step and waiting[0] is not x and not self.warned:
            self._warn(f"got another input while {waiting[4]} of its members had not been called with the last one")
        y = self.adapted(None, x) if route.active else self._base(None, x)
        columns = list(y.unsafe_split_with_sizes(self.sizes, -1))
        own, columns[at] = columns[at], None
        if x.is_inference():  # which don't count their changes
            if not self.warned:
                self._warn("gets tensors of torch.inference_mode; run the model under torch.no_grad instead")
            self.waiting = None
        else:
            self.waiting = [x, x._version, route.step, columns, len(columns) - 1]
        return own

    def adapted(self, member, x):
        """The base's output on x (`member`'s own, or that of the packed weights) with what the adapters add."""
        route, width = self.route, self.widths.get(self.name)
        if width is None:  # nothing in memory adds anything here
            return self._base(member, x)
        # As few steps as can be: a GEMM has emptied the caches of all that they need.
        count = x.numel() // self.in_features
        if count != route.rows:
            raise RuntimeError(
                f"{self.name} got {count} rows, but the batch's route has {route.rows}, so nobody knows whose they are: "
                "adapters on layers that see other rows than the batch's tokens (experts, encoders) can't be served"
            )
        if route.conditions is None or route.conditions != self.conditions or x.dtype is not self.dtype:
            self._choose_ops(x, width)
        y, add = None, self.ops[2]
        if add is not None:
            y = self._base(member, x)
            if y.dtype is x.dtype and y.is_contiguous() and x.is_contiguous():
                store, offsets, columns, pieces = self.store, self.offsets, self.columns, self.pieces
                add(y, x, store, offsets, columns, pieces, route.segments, route.assignments, None, 1, width)
                return y
        return self._on_matrices(member, x, y, width)

    def _on_matrices(self, member, x, y, width):
        """The same for any strides and dtypes, and in two ops where there is no one for both; y: the base's output, or
        None."""
        where, plan = (self.store, self.offsets), (self.pieces, self.route.segments, self.route.assignments)
        rows, s = x.reshape(-1, self.in_features), None
        if rows.stride(1) != 1 or (len(rows) > 1 and rows.stride(0) < self.in_features):  # across, or one row many times
            rows = rows.contiguous()
        if y is None and len(rows) <= self.overlap_rows and width:
            y, s = self._beside(member, x, (rows, *where, *plan, 1, width))
        elif y is None:
            y = self._base(member, x)
        if y.dtype is not rows.dtype:  # under autocast, or of a quantised layer
            rows, s = rows.to(y.dtype), None
            self._choose_ops(rows, width)
        if not y.is_contiguous():  # of some libraries' quantised layers
            y = y.contiguous()
        out, (shrink, expand, add) = y.view(-1, self.out_features), self.ops
        if add is not None:
            add(out, rows, *where, self.columns, *plan, None, 1, width)
            return y
        if s is None:
            s = shrink(rows, *where, *plan, 1, width) if width else self._no_sums(rows)
        expand(out, rows, s, *where, self.columns, *plan, None, 1)
        return y

    def _choose_ops(self, rows, width) -> None:
        """What runs the ops; the same in every step, until the dtype changes or somebody forces or records backends."""
        route, whole = self.route, in_one_call(rows.device)
        self.conditions, self.dtype = route.conditions, rows.dtype
        if route.conditions is None:
            self.ops = grouped_shrink, grouped_expand_, grouped_add_ if whole else None
            return
        where, batch = (self.store, self.offsets), (self.pieces, route.segments, route.assignments)
        if whole:
            self.ops = None, None, grouped_add_.direct(rows, rows, *where, self.columns, *batch, None, 1, width)
            return
        s = rows.new_empty((0, width), dtype=torch.promote_types(rows.dtype, torch.float32))
        expand = grouped_expand_.direct(rows, rows, s, *where, self.columns, *batch, None, 1)
        self.ops = grouped_shrink.direct(rows, *where, *batch, 1, width), expand, None

    def _no_sums(self, rows):
        """S where no adapter in memory has low-rank factors or rows."""
        shape = len(self.route.assignments), 0
        return rows.new_empty(shape, dtype=torch.promote_types(rows.dtype, torch.float32))

    def _base(self, member, x):
        if member is None:
            if x.dtype is torch.float32 and self._apart():
                return self._each_member(x)
            return F.linear(x, self.weight, self.bias)
        own = member._parameters
        if member.plain is nn.Linear and "weight" in own and "bias" in own:  # past its look-up of parameters
            return F.linear(x, own["weight"], own["bias"])
        return member.plain.forward(member, x)

    def _apart(self) -> bool:
        weight = self.weight
        if weight.numel() < APART_WEIGHTS or weight.device.type != "cpu" or weight.dtype is not torch.float32:
            return False
        return not torch.is_autocast_enabled("cpu")

    def _each_member(self, x):
        """The packed weights' product, one GEMM a member."""
        y = x.new_empty((*x.shape[:-1], self.out_features))
        rows, columns = x.reshape(-1, self.in_features), y.view(-1, self.out_features).split(self.sizes, 1)
        for module, out in zip(self.modules, columns):
            if module.bias is None:
                torch.mm(rows, module.weight.t(), out=out)
            else:
                torch.addmm(module.bias, rows, module.weight.t(), out=out)
        return y

    def _beside(self, member, x, plan):
        """The shrink on a stream of its own while the base GEMM runs; both have ended for what follows. A CUDA graph takes
        this as a fork and a join. What the side stream allocates is used by this thread's stream alone, and that is waited
        for before the side stream's next work, so memory is never reused too early."""
        now, side = torch.cuda.current_stream(x.device), self.side
        self.fork.record(now)
        side.wait_event(self.fork)
        with torch.cuda.stream(side):
            s = self.ops[0](*plan)
            self.join.record(side)
        y = self._base(member, x)
        now.wait_event(self.join)
        return y, s

    def _warn(self, what) -> None:
        self.warned = True
        warnings.warn(f"{self.name} {what}: each call computes the whole group, which is slow", stacklevel=3)


class Routed:
    """Mixed into the class of a linear, plain or quantised, that is a site by itself."""

    plain: type

    def forward(self, input):
        if torch.is_grad_enabled():
            _refuse_gradients()
        site = self._site
        if site.route.active:
            return site.adapted(self, input)
        return self.plain.forward(self, input)

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self._site.weight = None  # memory of another place or dtype: packed again by the next forward
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if not self._site.intact():  # load_state_dict(assign=True)
            self._site.weight = None


class RoutedMember(Routed):
    """Mixed into the class of an nn.Linear that shares a site with others."""

    def forward(self, input):
        site, at = self._site, self._at
        waiting = site.waiting
        if waiting is not None and waiting[0] is input and waiting[1] == input._version and waiting[2] == site.route.step:
            columns = waiting[3]
            own = columns[at]
            if own is not None:
                columns[at] = None
                waiting[4] -= 1
                if waiting[4] == 0:
                    site.waiting = None
                return own
        return site.open(at, input)


def _refuse_gradients():
    raise RuntimeError(
        "this model's linears are routed to many adapters, which is for inference: run it under torch.no_grad(), or "
        "uninstall the routing"
    )


@functools.cache
def routed_class(cls: type, member: bool) -> type:
    mixin = RoutedMember if member else Routed
    return type(f"Routed{cls.__name__}", (mixin, cls), {"plain": cls})


def group_obstacle(modules: list[nn.Module]) -> str | None:
    """Why these linears can't be one site, or None."""
    other = next((m for m in modules if type(m) is not nn.Linear), None)
    if other is not None:
        return f"one is a {type(other).__name__}"
    return packing_obstacle(modules, trainable=True)


class RoutedModel:
    """A model whose sites are routed.

    Attributes:
        sites: in the model's order. tokens: the route of all sites but the output head's. heads: that of the output head,
            which sees the rows that `logits_to_keep` leaves.
    """

    def __init__(self, model: nn.Module, sites: list[Site], head: nn.Module | None = None):
        modules = dict(model.named_modules())
        check_sites(modules, sites)
        self.sites, self.tokens, self.heads = list(sites), BatchRoute(), BatchRoute()
        self._sites: list[RoutedSite] = []
        try:
            for site in self.sites:  # one after the other, so that no more than one group's weights are in memory twice
                self._install(site, [modules[name] for name in site.members], head)
        except BaseException:  # out of memory
            self.uninstall()
            raise

    def _install(self, site, members, head) -> None:
        shared = RoutedSite(site, members, self.heads if head in members else self.tokens)
        self._sites.append(shared)
        for at, member in enumerate(members):
            member._site, member._at = shared, at
            member.__class__ = routed_class(type(member), len(members) > 1)

    def bind(self, memory, overlap: bool | None = None) -> None:
        """Where the adapters lie.

        Args:
            memory: has `store`, `offsets`, `columns` (tensors on the model's device), `pieces` and `widths` (by site name:
                int64 [slots, P, 10], and the columns of S). `widths` is looked at in every forward; a site that is not in
                it, or with None, has no adapter in memory.
            overlap: on a GPU, run shrinks of small batches beside the base GEMM. Default: yes.
        """
        on_gpu = memory.store.device.type == "cuda" and overlap is not False
        side = torch.cuda.Stream(memory.store.device) if on_gpu else None
        for shared in self._sites:
            shared.store, shared.offsets, shared.columns = memory.store, memory.offsets, memory.columns
            shared.pieces, shared.widths = memory.pieces[shared.name], memory.widths
            shared.side, shared.overlap_rows = side, OVERLAP_ROWS if on_gpu else 0
            if on_gpu:
                shared.fork, shared.join = torch.cuda.Event(), torch.cuda.Event()

    def intact(self) -> bool:
        """Do all packed weights and biases still lie in their buffers? Whoever gives a Parameter other memory (``p.data =
        ...``; moving the model and loading a state dict are seen) must call `repack`."""
        return all(shared.intact() for shared in self._sites)

    def repack(self) -> None:
        for shared in self._sites:
            if not shared.intact():
                shared.pack()

    def uninstall(self) -> None:
        """Classes, bits and memory of the model as they were. The second call does nothing."""
        for shared in self._sites:
            for module in shared.modules:
                module.__class__ = module.plain
                del module._site, module._at
            if len(shared.modules) > 1:
                shared.unpack()
        self._sites = []


def check_sites(modules: dict[str, nn.Module], sites) -> None:
    """Raises ValueError, before anything is touched, for sites that this model can't have."""
    if hasattr(modules[""], "peft_config"):
        raise ValueError("the model holds PEFT adapters; unload() them before serving, and serve their folders")
    for name, module in modules.items():
        if isinstance(module, Routed):
            raise ValueError(f"{name!r} is routed already; a model runs in one engine at a time: uninstall the other first")
        if isinstance(module, Adapted):
            raise ValueError(
                f"{name!r} holds a fastft adapter; save and detach it, or merge_and_unload() it, before serving"
            )
    seen: set[str] = set()
    for site in sites:
        unknown = [name for name in site.members if name not in modules]
        if unknown or seen & set(site.members):
            raise ValueError(f"site {site.name!r}: {unknown or 'its members'} are not in the model, or in two sites")
        seen.update(site.members)
        if len(site.members) > 1 and (reason := group_obstacle([modules[name] for name in site.members])):
            raise ValueError(f"site {site.name!r} can't be packed: {reason}")
