"""Linears whose rows name their adapters: one mixed batch against merged models, what can be routed."""

import pytest
import torch
from torch import nn

import fastft
from fastft.modules.packed import into_one
from fastft.modules.route import Site
from fastft.ops.grouped import grouped_add_, grouped_expand_, grouped_shrink
from fastft.ops.registry import BackendError
from fastft.serving.packing import Packer
from fastft.serving.sites import find_sites, install
from tests.integrations.quantized import KINDS, quantized
from tests.methods.models import assert_same, gpt2, llama, snapshot
from tests.modules.routing import PAGE, Block, X, both, one_adapter, route, same
from tests.serving.kinds import methods, write
from tests.serving.pool import pool

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def reference():
    with torch.no_grad(), fastft.testing.use("reference"):
        yield


@pytest.fixture(params=["reference", "cpu"])
def backend(request, reference):
    if reason := grouped_shrink.missing(request.param, "cpu") or grouped_expand_.missing(request.param, "cpu"):
        pytest.skip(reason)
    with fastft.testing.use(request.param):
        yield request.param


def packed_ids(sequences):
    """Arguments of one forward of all sequences in one row: positions of their own, and no sequence sees another."""
    lengths = [len(s) for s in sequences]
    owner = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    seen = (owner[:, None] == owner) & (positions[:, None] >= positions)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    return owner, {"input_ids": torch.cat(sequences)[None], "position_ids": positions[None], "attention_mask": mask}


NAMES = ["lora", "rslora", "patterns", "columns", "rows", "spiel"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(model, its routing, adapters by slot, folders): every kind of adapter in one pool."""
    model, root = llama(), tmp_path_factory.mktemp("adapters")
    folders = {}
    for number, name in enumerate(NAMES):
        folders[name] = root / name
        with torch.enable_grad():
            write(folders[name], methods(llama())[name], seed=number, dtype=torch.float32)
    routed = install(model)
    packer = Packer(model, routed.sites, dtype=torch.float32, page_bytes=PAGE)
    adapters = [packer.pack(folder) for folder in folders.values()]
    routed.bind(pool(routed.sites, adapters, torch.float32, PAGE))
    return model, routed, folders


def test_one_batch_of_every_kind_is_each_merged_model(served, backend):
    model, routed, folders = served
    generator = torch.Generator().manual_seed(5)
    sequences = [torch.randint(0, 50, (n,), generator=generator) for n in (3, 5, 1, 4, 6, 2, 3, 4)]
    slots = [2, 0, -1, 5, 1, 3, 4, 0]
    owner, inputs = packed_ids(sequences)
    both(routed, [slots[i] for i in owner.tolist()])
    got = model(**inputs).logits[0]
    for i, (sequence, slot) in enumerate(zip(sequences, slots)):
        alone = llama()
        if slot >= 0:
            fastft.load(alone, folders[NAMES[slot]]).merge()
        want = alone(sequence[None]).logits[0]
        torch.testing.assert_close(got[owner == i], want, rtol=1e-4, atol=2e-5)


def test_rows_without_adapter_have_the_bits_of_a_batch_without(served, backend):
    model, routed, _ = served
    generator = torch.Generator().manual_seed(6)
    owner, inputs = packed_ids([torch.randint(0, 50, (4,), generator=generator) for _ in range(5)])
    both(routed, [-1] * len(owner))
    want = model(**inputs).logits[0]
    plain = llama()(**inputs).logits[0]
    torch.testing.assert_close(want, plain, rtol=1e-5, atol=1e-6)
    slots = [[0, -1, 4, -1, 5][i] for i in owner.tolist()]
    both(routed, slots)
    got = model(**inputs).logits[0]
    base = torch.tensor(slots) < 0
    assert torch.equal(got[base], want[base])
    assert ((got - want)[~base].abs().amax(1) > 1e-4).all()


def test_the_head_sees_the_rows_that_are_kept(served, backend):
    model, routed, folders = served
    ids = torch.arange(12).view(3, 4)
    route(routed.tokens, [2] * 4 + [-1] * 4 + [0] * 4)
    route(routed.heads, [2, -1, 0])
    got = model(ids, logits_to_keep=1).logits
    for row, name in ((0, "patterns"), (2, "lora")):
        alone = llama()
        fastft.load(alone, folders[name]).merge()
        torch.testing.assert_close(got[row], alone(ids[row : row + 1]).logits[0, -1:], rtol=1e-4, atol=2e-5)
    with pytest.raises(RuntimeError, match="lm_head got 12 rows, but the batch's route has 3"):
        model(ids)


CONFIGS = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "cohere": {},
    "starcoder2": {},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_models_take_columns_of_one_matrix(kind):
    """Their attention views, transposes and normalises what projections return; more than one row has gaps between rows."""
    torch.manual_seed(0)
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "max_position_embeddings": 64, **CONFIGS[kind]}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config)).eval()
    ids = torch.arange(24).view(2, 12)
    want = model(ids).logits
    generated = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
    routed = install(model)
    assert any(len(site.members) > 1 for site in routed.sites) == (kind not in ("phi3",))
    route(routed.tokens, [-1] * 24)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=6, do_sample=False), generated)
    routed.uninstall()
    assert torch.equal(model(ids).logits, want)


# ---- installing


def test_uninstalling_restores_everything():
    model = llama()
    flags = [p.requires_grad_(i % 2 == 0) for i, p in enumerate(model.parameters())]
    before, own = snapshot(model), sum(p.untyped_storage().nbytes() for p in flags)
    storages = lambda: {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}  # noqa: E731
    routed = install(model)
    assert sum(storages().values()) == own and len(storages()) < len(flags)
    with pytest.raises(ValueError, match="is routed already"):
        install(model)
    routed.uninstall()
    routed.uninstall()
    assert_same(before, snapshot(model))
    assert sum(storages().values()) == own and len(storages()) == len(flags)
    install(model).uninstall()


def test_installing_that_fails_leaves_the_model(monkeypatch):
    model, calls = llama(), []
    before = snapshot(model)

    def out_of_memory(parameters):
        calls.append(len(parameters))
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return into_one(parameters)

    monkeypatch.setattr("fastft.modules.routed.into_one", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        install(model)
    assert_same(before, snapshot(model))


def test_models_that_hold_adapters_are_refused():
    model = llama()
    before = snapshot(model)
    handle = fastft.attach(model, fastft.LoRA(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj' holds a fastft adapter; save and detach it"):
        install(model)
    handle.detach()
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="holds PEFT adapters"):
        install(wrapped)
    wrapped.unload()
    install(model).uninstall()
    assert before[1] == snapshot(model)[1]


def test_which_linears_are_sites():
    names = lambda model: [site.name for site in find_sites(model)]  # noqa: E731
    assert names(gpt2())[:3] == [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    assert names(llama())[-1] == "lm_head" and len(names(llama())) == 9
    site = find_sites(llama())[0]
    layer = "model.layers.0.self_attn"
    assert site.outputs == ((f"{layer}.q_proj", 0, 16), (f"{layer}.k_proj", 16, 8), (f"{layer}.v_proj", 24, 8))
    assert (site.in_features, site.out_features) == (16, 32)
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)]), "other": nn.Linear(4, 4)})
    model["hooked"] = nn.Linear(4, 4)
    model["hooked"].forward = lambda x: x
    model["encoder"] = nn.TransformerEncoderLayer(8, 2, 16)
    assert names(model) == ["other"]
    tied = Block()
    tied.k_proj.weight = tied.v_proj.weight
    assert names(tied) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    bias = Block()
    bias.q_proj.bias = None
    assert names(bias) == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_sites_that_do_not_fit_are_refused():
    model = Block()
    before = snapshot(model)
    site = find_sites(model)[0]
    other = Site("o", ("o_proj", "q_proj"), 6, (("o_proj", 0, 8), ("q_proj", 8, 6)))
    for sites, match in (([site, site], "in two sites"), ([other], "can't be packed"), ([Site("x", ("x",), 1, ())], "'x'")):
        with pytest.raises(ValueError, match=match):
            install(model, sites)
    assert_same(before, snapshot(model))


# ---- adapters on layers of other kinds


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_linears(kind, tmp_path):
    make = lambda: quantized(kind, llama(hidden_size=32, intermediate_size=64, num_hidden_layers=1))  # noqa: E731
    model = make()
    routed = one_adapter(model, tmp_path, fastft.LoRA(r=4, target_modules=["q_proj", "up_proj", "down_proj"]))
    assert all(len(site.members) == 1 for site in routed.sites)
    want = make()
    ids = torch.arange(8).view(2, 4)
    base = want(ids).logits
    fastft.load(want, tmp_path)
    both(routed, [0] * 4 + [-1] * 4)
    got = model(ids).logits
    torch.testing.assert_close(got[:1], want(ids[:1]).logits, rtol=1e-4, atol=1e-4)
    assert (got[:1] - base[:1]).abs().max() > 1e-3
    both(routed, [-1] * 8)
    torch.testing.assert_close(model(ids).logits, base)
    routed.uninstall()
    torch.testing.assert_close(model(ids).logits, base)


def test_weights_that_are_stored_transposed(tmp_path):
    model, want, ids = gpt2(), gpt2(), torch.arange(8).view(2, 4)
    routed = one_adapter(model, tmp_path, fastft.LoRA(r=4, target_modules=["c_attn", "c_proj"]))
    base = want(ids).logits
    fastft.load(want, tmp_path).merge()
    both(routed, [0] * 4 + [-1] * 4)
    got = model(ids).logits
    torch.testing.assert_close(got[0], want(ids).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], base[1], rtol=1e-5, atol=1e-6)


def test_autocast_and_inputs_that_lie_across(tmp_path):
    """Under autocast the base's output is 16-bit, and what is added to it too; an input may be a transposed matrix."""
    model = Block()
    routed = one_adapter(model, tmp_path, fastft.LoRA(r=2, target_modules=["q_proj", "o_proj"]))
    route(routed.tokens, [0, -1, 0])
    want = model.q_proj(X)
    same(model.q_proj(X.t().contiguous().t()), want)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.q_proj(X)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_rows_that_overlap(backend, tmp_path):
    """One row for all tokens, say: no kernel takes it as it lies."""
    model = Block()
    routed = one_adapter(model, tmp_path, fastft.LoRA(r=2, target_modules=["o_proj"]))
    route(routed.tokens, [0, -1, 0])
    for x in (X[0, :6].expand(3, 6), X[0, :6].expand(1, 3, 6), X.flatten().as_strided((3, 6), (2, 1))):
        same(model.o_proj(x), model.o_proj(x.contiguous()))


def test_backends_are_chosen_anew_for_another_dtype_and_another_wish(tmp_path):
    if reason := grouped_add_.missing("cpu", "cpu"):
        pytest.skip(reason)
    model, x = Block(), X[:, :6]
    routed = one_adapter(model, tmp_path, fastft.LoRA(r=2, target_modules=["o_proj"]))
    with fastft.testing.use("cpu"):
        route(routed.tokens, [0, -1, 0])
        want = model.o_proj(x)
        with pytest.raises(BackendError, match="float64 activations"):
            model.double().o_proj(x.double())
        assert torch.equal(model.float().o_proj(x), want)
    with fastft.testing.use("cuda"):
        route(routed.tokens, [0, -1, 0])
        with pytest.raises(BackendError, match="these are on cpu"):
            model.o_proj(x)


def test_memory_that_fills(tmp_path):
    """A site's first adapter may need no sums of A, or there may be none; what comes later counts from then on."""
    model = Block()
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    entries = {name: torch.arange(0, getattr(model, name).weight.numel(), 3) for name in names}
    with torch.enable_grad():
        for folder, method in (
            ("a", fastft.SparseMask(indices=entries)),
            ("b", fastft.LoRA(r=2, target_modules=["q_proj"])),
        ):
            handle = fastft.attach(model, method)
            for parameter in handle.parameters():
                parameter.data.fill_(0.5)
            handle.save(tmp_path / folder)
            handle.detach()
    routed = install(model)
    packer = Packer(model, routed.sites, dtype=torch.float32, page_bytes=PAGE)
    adapters = [packer.pack(tmp_path / name) for name in "ab"]
    memory = pool(routed.sites, adapters, torch.float32, PAGE)
    widths, memory.widths = memory.widths, dict.fromkeys(memory.widths)
    routed.bind(memory)
    for site, width in ((None, None), (0, 0), (0, 2)):
        if site is not None:
            memory.widths[routed.sites[site].name] = width
        for slot, folder in enumerate("ab"):
            if width is None or (width == 0 and slot == 1):
                continue
            route(routed.tokens, [slot] * 3)
            want = Block()
            fastft.load(want, tmp_path / folder).merge()
            same(model.q_proj(X), want.q_proj(X))
    assert widths[routed.sites[0].name] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and graphs are a GPU's")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_streams_and_graphs(backend, overlap, tmp_path):
    if reason := grouped_shrink.missing(backend, "cuda"):
        pytest.skip(reason)
    ids, make = torch.arange(8).view(2, 4), lambda: llama(hidden_size=64, intermediate_size=128)
    with torch.enable_grad():
        write(tmp_path, fastft.LoRA(r=4, target_modules="all-linear"), make=make, dtype=torch.float32)
    want = make()
    fastft.load(want, tmp_path).merge()
    want, ids, model = want(ids).logits.cuda(), ids.cuda(), make().cuda()
    routed = install(model)
    adapter = Packer(model, routed.sites, dtype=torch.float32, page_bytes=PAGE).pack(tmp_path)
    routed.bind(pool(routed.sites, [adapter], torch.float32, PAGE, device="cuda"), overlap)
    segments, assignments = torch.tensor([[0, 0, 8]], dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    with fastft.testing.use(backend):
        for target in (routed.tokens, routed.heads):
            target.set(segments.cuda(), assignments.cuda(), True, 8)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-3, atol=1e-3)
        graph, static = torch.cuda.CUDAGraph(), ids.clone()
        with torch.cuda.graph(graph):
            out = model(static).logits
    static.zero_()
    graph.replay()
    assert not torch.allclose(out, want, rtol=1e-3, atol=1e-3)
    static.copy_(ids)
    graph.replay()
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)
