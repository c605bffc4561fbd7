"""The vLLM plugin against stand-ins of what it meets in vLLM 0.32 and 0.33; `make test-vllm` runs it in the real one."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastft.integrations import vllm as plugin
from fastft.integrations import vllm_sites
from fastft.integrations.vllm_sites import COUNT
from fastft.ops.grouped import FIELDS

from . import vllm_stand_ins as vllm

K, WIDTHS, SLOTS, RANK = 40, (24, 16, 16), 4, 16


class Served:
    """A model of one packed layer, its manager and our wrapper."""

    def __init__(self, dtype=torch.float32, slots=SLOTS, capacity=32):
        torch.manual_seed(0)
        self.layer = vllm.Layer(slots, RANK, K, WIDTHS, dtype)
        self.wrapper = plugin.wrapper_class(vllm.PunicaWrapperBase)(
            capacity, max_batches=8, device="cpu", lora_config=vllm.LoRAConfig(slots, RANK)
        )
        manager = type("Manager", (vllm.LoRAModelManager,), {})
        plugin.tell_activations(manager)
        self.manager, self.dtype = manager({"qkv": self.layer}, slots, self.wrapper), dtype

    def load(self, number, rank, members=(0, 1, 2)):
        a = [torch.randn(rank, K, dtype=self.dtype) / 6 if i in members else None for i in range(3)]
        b = [torch.randn(n, rank, dtype=self.dtype) / 6 if i in members else None for i, n in enumerate(WIDTHS)]
        self.manager.adapters[number] = {"qkv": (a, b)}
        self.manager.activate_adapter(number)

    def unload(self, number):
        self.manager.deactivate_adapter(number)

    def expected(self, y, x, rows):
        """In float64, from what was loaded."""
        out = y.double().clone()
        for t, number in enumerate(rows):
            first = 0
            for width, a, b in zip(WIDTHS, *self.manager.adapters[number]["qkv"]) if number else ():
                if a is not None:
                    out[t, first : first + width] += x[t].double() @ a.double().t() @ b.double().t()
                first += width
        return out

    def run(self, rows, padded=0, how="linear"):
        """(result, expectation) of one batch; `padded` rows follow, as CUDA graphs have them."""
        self.manager.set_adapter_mapping(vllm.LoRAMapping(tuple(rows), tuple(rows)))
        x = torch.randn(len(rows) + padded, K).to(self.dtype)
        y = torch.randn(len(rows) + padded, sum(WIDTHS)).to(self.dtype)
        expected = self.expected(y, x, list(rows) + [0] * padded)
        HOW[how](self, y, x)
        return y, expected

    def site(self):
        (site,) = self.wrapper.sites
        return site


def linear(served, y, x):
    layer = served.layer
    served.wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)


def in_two_calls(served, y, x):
    """As fully sharded layers do, which communicate between the two."""
    layer = served.layer
    buffers = torch.zeros(3, len(x), RANK)
    served.wrapper.add_shrink(buffers, x, layer.lora_a_stacked, 1.0)
    served.wrapper.add_expand(y, buffers, layer.lora_b_stacked, layer.output_slices, offset_start=0, add_input=True)


def compiled(served, y, x):
    torch.compile(linear, backend="aot_eager", fullgraph=True)(served, y, x)


def compiled_in_two_calls(served, y, x):
    torch.compile(in_two_calls, backend="aot_eager", fullgraph=True)(served, y, x)


HOW = {
    "linear": linear,
    "in two calls": in_two_calls,
    "compiled": compiled,
    "compiled in two calls": compiled_in_two_calls,
}


def close(got, expected, dtype=torch.float32):
    torch.testing.assert_close(
        got.double(), expected, **{torch.float32: {"atol": 1e-5, "rtol": 1e-5}}.get(dtype, {"atol": 0.03, "rtol": 0.02})
    )


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_batch(how, dtype):
    served = Served(dtype)
    served.load(1, 8), served.load(2, 4, members=(0, 2)), served.load(3, RANK)
    for rows in ([1, 0, 2, 3, 0, 1, 3, 0], [0, 0, 0], [3], [2, 1, 1]):
        y, expected = served.run(rows, padded=2, how=how)
        close(y, expected, dtype)


def test_rows_without_adapter_keep_their_bits():
    served = Served(slots=2)
    served.load(1, 8), served.load(2, RANK)  # the last slot is full: what -1 would name
    served.manager.set_adapter_mapping(vllm.LoRAMapping((0, 1, 0), (0, 1, 0)))
    x, y = torch.full((4, K), torch.nan), torch.randn(4, sum(WIDTHS))
    before = y.clone()
    linear(served, y, x)
    assert y[[0, 2, 3]].equal(before[[0, 2, 3]]) and y[1].isnan().any()


def test_only_true_ranks_are_read():
    served = Served()
    served.load(1, 3), served.load(2, 8, members=(0, 1)), served.load(3, RANK)
    served.run([1, 2, 3])
    site = served.site()
    assert site.pieces[..., COUNT].tolist() == [[3, 3, 3], [8, 8, 0], [RANK] * 3, [0, 0, 0]]
    read = set()
    for piece in site.pieces.flatten(0, 1).tolist():
        piece = dict(zip(FIELDS, piece))
        for table, width in (("left", "x_width"), ("right", "y_width")):
            for start in site.offsets[piece[table] : piece[table] + piece["count"]].tolist():
                read.update(range(start, start + piece[width]))
    needed = 3 * (3 * K + sum(WIDTHS)) + 8 * (2 * K + 40) + RANK * (3 * K + sum(WIDTHS))
    assert len(read) == needed  # numbers; with padding it would be 3 adapters of RANK
    poison = torch.ones(len(site.store), dtype=torch.bool)
    poison[list(read)] = False
    site.store[poison] = torch.nan
    close(*served.run([3, 0, 2, 1, 2]))


@pytest.mark.parametrize("how", ["linear", "in two calls"])
def test_slots_are_used_again(how):
    """A smaller adapter after a larger one in the same slot; nothing of the larger one is left."""
    served = Served(slots=2)
    served.load(1, RANK), served.load(2, 4)
    close(*served.run([1, 2, 0], how=how))
    served.unload(1)
    served.load(3, 2, members=(1,))
    assert served.manager.lora_index_to_id == [3, 2]
    close(*served.run([3, 2, 0], how=how))
    assert 3 not in dict.fromkeys(r for site in served.wrapper.sites for r in site.pieces[0, :, COUNT].tolist())


def test_an_adapter_loaded_again_in_place_is_seen():
    """Neither mapping nor slots change, so vLLM does not call update_metadata."""
    served = Served(slots=2)
    served.load(1, 8)
    close(*served.run([1, 0]))
    served.unload(1)
    served.load(1, 4)
    close(*served.run([1, 0]))


def test_stacks_changed_by_others_are_seen():
    served = Served()
    served.load(1, 8), served.load(2, 4)
    close(*served.run([1, 2]))
    a, b = (torch.randn(2, K),) * 3, [torch.randn(n, 2) for n in WIDTHS]
    served.layer.set_lora(0, a, b)
    served.manager.adapters[1] = {"qkv": (a, b)}
    close(*served.run([2, 1]))


def test_stacks_changed_by_others_are_seen_when_another_slot_was_filled_before_the_next_batch():
    served = Served(slots=2)
    served.load(1, 8)
    close(*served.run([1, 0]))
    a, b = (torch.randn(2, K),) * 3, [torch.randn(n, 2) for n in WIDTHS]
    served.layer.set_lora(0, a, b)
    served.manager.adapters[1] = {"qkv": (a, b)}
    served.load(2, 4)
    close(*served.run([1, 2]))


def test_what_an_op_writes_and_what_it_leaves():
    """Two scales of one stack, a B that is padded beyond y (a vocabulary), and columns beside the slices."""
    sites = vllm_sites.Sites()
    route = vllm_sites.Route(sites, 2, 8, "cpu")
    route.fill([1, 0, 1], {1: 0})
    x, a, b = torch.randn(3, 8), torch.randn(2, 1, 4, 8), torch.randn(2, 1, 12, 4)
    own, delta = torch.tensor([0, 2]), x @ a[0, 0].t() @ b[0, 0, :10].t()
    for scale in (1.0, 0.5):
        y, want = torch.ones(3, 10), torch.ones(3, 10)
        want[own] += scale * delta[own]
        vllm_sites.linear_(y, x, [a], [b], [12], scale, True, route)
        torch.testing.assert_close(y, want)
    s, y, want = torch.randn(3, 4), torch.ones(3, 10), torch.ones(3, 10)
    want[:, 3:8] = 0
    want[own, 3:8] = s[own] @ b[0, 0, :5].t()
    vllm_sites.expand_(y, [s], [b], [5], 3, False, route)
    torch.testing.assert_close(y, want)


def test_nothing_is_copied_while_nothing_changes(monkeypatch):
    served = Served()
    served.load(1, 8)
    served.run([1])
    learned = []
    monkeypatch.setattr(type(served.site()), "learn", lambda site, slots: learned.append(slots))
    served.run([1, 0]), served.run([0])
    assert learned == []
    served.load(2, 8)
    assert learned == [slice(1, 2)]


def test_addresses_stay():
    """What a CUDA graph reads: the same tensors in every step."""
    served = Served()
    served.load(1, 8)
    served.run([1])
    site, route = served.site(), served.wrapper.tokens
    before = [t.data_ptr() for t in (site.store, site.offsets, site.pieces, *route.of(1))]
    served.load(2, 12)
    served.run([1, 2, 0, 2])
    assert [t.data_ptr() for t in (site.store, site.offsets, site.pieces, *route.of(4))] == before
    assert route.of(4)[1].tolist() == [0, 1, 3, 0]


def test_layers_that_see_the_first_rows_only():
    served = Served()
    served.load(1, 8)
    served.manager.set_adapter_mapping(vllm.LoRAMapping((0, 1, 1, 1), (0, 1, 1, 1)))
    x, y = torch.randn(2, K), torch.zeros(2, sum(WIDTHS))
    expected = served.expected(y, x, [0, 1])
    linear(served, y, x)
    close(y, expected)


def test_logits_follow_the_sampled_rows():
    """Four tokens, logits of two; float32 logits over bfloat16 states; the vocabulary's padding has no adapter."""
    served = Served(torch.bfloat16)
    served.load(1, 8), served.load(2, 4)
    served.manager.set_adapter_mapping(vllm.LoRAMapping((1, 1, 2, 0), (2, 1)))
    a, b = torch.zeros(SLOTS, 1, RANK, K).bfloat16(), torch.zeros(SLOTS, 1, 50, RANK).bfloat16()
    a[:2, 0, :6], b[:2, 0, :, :6] = torch.randn(2, 6, K), torch.randn(2, 50, 6)
    x, y = torch.randn(2, K).bfloat16(), torch.randn(2, 48)
    expected = y.double()
    for t, slot in enumerate((1, 0)):
        expected[t] += (x[t].double() @ a[slot, 0].double().t() @ b[slot, 0].double().t())[:48]
    served.wrapper.add_lora_logits(y, x, a, b, 1.0)
    close(y, expected)


def test_embedding():
    served = Served()
    served.load(1, 8), served.load(2, 4)
    served.manager.set_adapter_mapping(vllm.LoRAMapping((2, 0, 1), (2, 0, 1)))
    b = torch.zeros(SLOTS, 1, 20, RANK)
    b[:2, 0, :, :5] = torch.randn(2, 20, 5)
    x, y = torch.randn(3, RANK), torch.randn(3, 20)
    expected = y.clone()
    expected[0] += b[1, 0] @ x[0]
    expected[2] += b[0, 0] @ x[2]
    served.wrapper.add_lora_embedding(y, x, b, add_input=True)
    close(y, expected.double())


def test_full_linear():
    served = Served()
    served.load(1, 8), served.load(2, 4)
    served.manager.set_adapter_mapping(vllm.LoRAMapping((2, 0, 1), (2, 0, 1)))
    weight, bias, enabled = torch.randn(SLOTS, 1, 5, K), torch.randn(SLOTS, 5), torch.tensor([True, False, False, False])
    x, y = torch.randn(3, K), torch.randn(3, 5)
    expected = y.clone()
    expected[2] = weight[0, 0] @ x[2] + bias[0]
    served.wrapper.apply_lora_full_linear(y, x, weight, bias, enabled)
    close(y, expected.double())


def test_output_of_the_adapters_alone():
    """add_inputs=False: how vLLM runs base and adapters on two streams."""
    served = Served()
    served.load(1, 8)
    served.run([1, 0])
    x, y = torch.randn(2, K), torch.full((2, sum(WIDTHS)), torch.nan)
    layer = served.layer
    served.wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, WIDTHS, add_inputs=False)
    close(y, served.expected(torch.zeros_like(y), x, [1, 0]))


def test_stacks_written_in_inference_mode():
    served = Served()
    with torch.inference_mode():
        served.load(1, 8)
        close(*served.run([1, 0]))
    served.unload(1)
    served.load(2, 4)
    close(*served.run([0, 2]))


def test_experts_are_refused():
    with pytest.raises(NotImplementedError, match="--lora-target-modules"):
        Served().wrapper.add_lora_w13(None, None, (), (), None, None)


def test_more_rows_than_promised_are_refused():
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Served(capacity=4).run([0] * 5)


def test_another_contract_is_refused():
    class Newer(vllm.PunicaWrapperBase):
        def add_shrink(self, y, x, lora_a_stacked, scale, ranks): ...

        def add_lora_tower(self): ...

    Newer.__abstractmethods__ |= {"add_lora_tower"}
    Newer.add_lora_tower.__isabstractmethod__ = True
    with pytest.raises(RuntimeError, match="add_shrink has a parameter ranks; add_lora_tower is abstract.*VLLM_PLUGINS"):
        plugin.wrapper_class(Newer)


@pytest.mark.parametrize(
    "name,device,ours", [("cpu", "cpu", 1), ("cuda", "cuda", 1), ("rocm", "cuda", 0), ("xpu", "xpu", 0)]
)
def test_register_replaces_the_platform_s_choice(monkeypatch, caplog, name, device, ours):
    platforms = SimpleNamespace(current_platform=vllm.platform(name, device))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(platforms=platforms))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    plugin.register(), plugin.register()
    assert platforms.current_platform.get_punica_wrapper() == (plugin.WRAPPER if ours else "theirs")
    assert ("none for vLLM's Platform" in caplog.text) == (not ours)


def test_importing_it_imports_no_vllm():
    code = "import sys, fastft.integrations.vllm; assert 'vllm' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
