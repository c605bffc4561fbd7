"""Every kind of adapter's folder, packed, scattered over a pool and multiplied, is the dense delta; what is not served is
refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastft
from fastft.checkpoint.files import CONFIG, WEIGHTS, AdapterFileError
from fastft.ops import grouped
from fastft.serving.packing import Packer
from fastft.serving.patterns import slow_because
from fastft.serving.sites import find_sites
from tests.methods.models import gpt2, llama

from .kinds import LORA, S2FT, methods, write, write_lift, write_sft
from .pool import pool

SMALL = 1024  # bytes a page: rows of B in parts, blocks of entries and tables of rows that end with the page


def wide(**options):
    """With outputs of more than a small page, and more rows of one piece than a table in one holds."""
    return llama(intermediate_size=160, vocab_size=600, **options)


def packed(folder, model=None, dtype=torch.float32, page_bytes=SMALL, **options):
    model = wide() if model is None else model
    sites = find_sites(model)
    return sites, Packer(model, sites, dtype=dtype, page_bytes=page_bytes, **options).pack(folder)


def assert_computes(sites, adapter, deltas, dtype=torch.float32, page_bytes=SMALL, rtol=1e-6):
    """Slot 1 of 2; the other is the same adapter elsewhere. The reference runs in float64 on what the pool holds."""
    memory = pool(sites, [adapter, adapter], dtype, page_bytes)
    segments = torch.tensor([[0, 0, 1], [1, 1, 4]], dtype=torch.int32)
    assignments = torch.tensor([4, 0, 2, 3, 1], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    touched = set()
    for site in sites:
        x = torch.randn(5, site.in_features, generator=generator, dtype=torch.float64)
        y = torch.zeros(5, site.out_features, dtype=torch.float64)
        store = torch.where(memory.store.isfinite(), memory.store, 0).double()  # garbage that nobody may read
        tables, pieces = (store, memory.offsets), memory.pieces[site.name]
        with fastft.testing.use("reference"):
            s = grouped.grouped_shrink(x, *tables, pieces, segments, assignments, 1, memory.widths[site.name])
            grouped.grouped_expand_(y, x, s, *tables, memory.columns, pieces, segments, assignments, None, 1)
        want = torch.zeros_like(y)
        for name, first, width in site.outputs:
            if name in deltas:
                want[[4, 0, 2, 3], first : first + width] = x[[4, 0, 2, 3]] @ deltas[name].t()
                touched.add(name)
        assert (y - want).norm() <= rtol * want.norm(), site.name
    assert touched == deltas.keys()
    assert adapter.pieces.keys() == {s.name for s in sites if deltas.keys() & set(s.members)}


@pytest.mark.parametrize("page_bytes", [SMALL, 262144])
@pytest.mark.parametrize("kind", [*LORA, *S2FT, "spiel", "mask"])
def test_every_kind(kind, page_bytes, tmp_path):
    deltas = write(tmp_path, methods(wide())[kind], make=wide)
    sites, adapter = packed(tmp_path, page_bytes=page_bytes)
    assert_computes(sites, adapter, deltas, page_bytes=page_bytes)
    most = Packer(wide(), sites, dtype=torch.float32, page_bytes=page_bytes).max_pieces
    assert all(len(rows) <= most[name] for name, rows in adapter.pieces.items())
    if page_bytes == SMALL:  # what this size is for
        names = {"patterns": "lm_head", "rows": "model.layers.0.mlp.gate_proj+up_proj"}
        assert kind not in names or len(adapter.pieces[names[kind]]) > 2, adapter.pieces.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "columns", "rows", "spiel"])
def test_values_are_rounded_once(kind, dtype, tmp_path):
    deltas = write(tmp_path, methods(wide())[kind], make=wide)
    sites, adapter = packed(tmp_path, dtype=dtype)
    assert_computes(sites, adapter, deltas, dtype, rtol=torch.finfo(dtype).eps)
    held, values = adapter.blob.view(dtype), load_file(tmp_path / WEIGHTS).values()
    want = torch.cat([value.flatten() for value in values if value.is_floating_point()])
    assert torch.isin(want.to(dtype).float(), held.float()).all()


def test_entries_of_lift_that_stopped_training(tmp_path):
    deltas = write_lift(tmp_path)
    assert_computes(*packed(tmp_path, llama()), deltas)


@pytest.mark.parametrize("method", ["spiel", "mask"])
def test_absolute_values(method, tmp_path):
    deltas = write(tmp_path, methods(llama())[method], absolute=True)
    # A difference of float32 values that are larger than what is left.
    assert_computes(*packed(tmp_path, llama().double()), deltas, rtol=1e-5)


def test_absolute_values_of_16_bit_are_subtracted_in_float32(tmp_path):
    method = fastft.SparseMask(mask={"model.layers.0.mlp.up_proj": torch.ones(24, 16, dtype=torch.bool)})
    deltas = write(tmp_path, method, absolute=True, dtype=torch.bfloat16)
    assert {t.dtype for key, t in load_file(tmp_path / WEIGHTS).items() if key.endswith("value")} == {torch.bfloat16}
    sites, adapter = packed(tmp_path, llama().to(torch.bfloat16))
    assert_computes(sites, adapter, deltas)


def test_files_of_others(tmp_path):
    deltas = write_sft(tmp_path / "given")
    assert_computes(*packed(tmp_path / "given", llama()), deltas)
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.ShiraConfig(r=1, target_modules=["up_proj", "o_proj"], init_weights=False))
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().to_dense().double()
        for name, module in model.named_modules()
        if hasattr(module, "shira_weight") and hasattr(module, "get_delta_weight")
    }
    model.save_pretrained(tmp_path / "shira")
    assert_computes(*packed(tmp_path / "shira", llama()), deltas)
    config = peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=["up_proj", "q_proj", "lm_head"], init_lora_weights=False
    )
    model = peft.get_peft_model(llama(), config)
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")
    }
    model.save_pretrained(tmp_path / "lora")
    assert_computes(*packed(tmp_path / "lora", llama()), deltas)


@pytest.mark.parametrize(
    "method",
    [
        fastft.LoRA(r=3, target_modules=["c_attn", "c_proj", "c_fc"]),
        fastft.SpIEL(density=0.05),
        fastft.S2FT(down_ratio=0.3, o_ratio=0.5, up_ratio=0.2),
    ],
    ids=lambda method: method.peft_type,
)
def test_weights_that_are_stored_transposed(method, tmp_path):
    deltas = write(tmp_path, method, make=gpt2)
    assert_computes(*packed(tmp_path, gpt2()), deltas)


def test_a_block_of_entries_that_is_larger_than_usual(tmp_path):
    """One row of more entries than a block has, and rows without any."""
    model = llama(intermediate_size=20000, num_hidden_layers=1)
    mask = torch.zeros(16, 20000, dtype=torch.bool)
    mask[2, :19000] = mask[3, ::7] = mask[15, 5] = True
    method = fastft.SparseMask(mask={"model.layers.0.mlp.down_proj": mask})
    deltas = write(tmp_path, method, make=lambda: llama(intermediate_size=20000, num_hidden_layers=1))
    sites, adapter = packed(tmp_path, model, page_bytes=262144)
    assert_computes(sites, adapter, deltas, page_bytes=262144)
    with pytest.raises(AdapterFileError, match=r"must lie together, but a page has 1,024: serve with larger pages"):
        packed(tmp_path, model)


# ---- identity


def test_digest_is_of_what_is_computed(tmp_path):
    write(tmp_path / "a", methods(llama())["lora"])
    write(tmp_path / "b", methods(llama())["lora"])
    write(tmp_path / "other", methods(llama())["lora"], seed=4)
    digests = {name: packed(tmp_path / name, llama())[1].digest for name in ("a", "b", "other")}
    assert digests["a"] == digests["b"] != digests["other"] and len(digests["a"]) == 64
    assert packed(tmp_path / "a", llama(), dtype=torch.bfloat16, page_bytes=4096)[1].digest == digests["a"]
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    for change, same in (({"lora_dropout": 0.5}, True), ({"lora_alpha": 7}, False)):
        (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, **change}))
        assert (packed(tmp_path / "a", llama())[1].digest == digests["a"]) == same


def test_digest_tells_places_and_values_apart(tmp_path):
    """Or, after an update, requests would read what the adapter before has left in the cache of prefixes."""

    def entry(column):
        mask = torch.zeros(8, 16, dtype=torch.bool)
        mask[3, column] = True
        return fastft.SparseMask(mask={"model.layers.0.self_attn.k_proj": mask})

    def moved(folder):
        tensors = load_file(folder / WEIGHTS)
        key = next(key for key in tensors if key.endswith("down_proj.s2ft_units"))
        units = tensors[key].tolist()
        units[0] = next(unit for unit in range(24) if unit not in units)
        save_file({**tensors, key: torch.tensor(sorted(units), dtype=torch.int32)}, folder / WEIGHTS)

    columns = methods(llama())["columns"]
    for name, method, seed in (
        ("entry", entry(15), 3),
        ("another place", entry(14), 3),
        ("another value", entry(15), 4),
        ("columns", columns, 3),
        ("other columns", columns, 3),
        ("other values", columns, 4),
    ):
        write(tmp_path / name, method, seed=seed, dtype=torch.float32)
    moved(tmp_path / "other columns")
    digests = [packed(folder, llama())[1].digest for folder in tmp_path.iterdir()]
    assert len(digests) == len(set(digests)) == 6


# ---- refusals


@pytest.mark.parametrize(
    "method,match",
    [
        (fastft.LoRA(target_modules=["q_proj"], use_dora=True), "use_dora can't be served; served are LoRA"),
        (fastft.LoRA(target_modules=["q_proj"], lora_bias=True), "lora_bias can't be served"),
        (
            fastft.LoRA(target_modules=["q_proj"], bias="lora_only"),
            "bias='lora_only': it replaces tensors that all requests share; served are LoRA",
        ),
        (
            fastft.LoRA(target_modules=["q_proj"], modules_to_save=["lm_head"]),
            r"modules_to_save=\['lm_head'\]: it replaces tensors",
        ),
        (fastft.SpIEL(density=0.1, modules_to_save=["norm"]), r"modules_to_save=\['norm'\]: it replaces tensors"),
        (fastft.LoRA(target_modules=["q_proj"], r=9), "the rank of .*q_proj' is 9; at most 8 is served"),
    ],
)
def test_kinds_that_are_not_served(method, match, tmp_path):
    write(tmp_path, method)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:9])  # refused before tensors are looked at
    with pytest.raises(AdapterFileError, match=match):
        packed(tmp_path, llama(), max_rank=8)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_files_that_do_not_fit(tmp_path):
    write(tmp_path, fastft.LoRA(r=3, target_modules=["q_proj"]), dtype=torch.float32)
    good = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def refused(match, tensors=None, error=AdapterFileError, model=None, dtype=torch.float32, limit=1 << 20, **config):
        for name, data in good.items():
            (tmp_path / name).write_bytes(data)
        weights = load_file(tmp_path / WEIGHTS)
        weights.update(tensors or {})
        save_file(weights, tmp_path / WEIGHTS)
        (tmp_path / CONFIG).write_text(json.dumps({**json.loads(good[CONFIG]), **config}))
        with pytest.raises(error, match=match):
            packed(tmp_path, model or llama(), dtype=dtype, max_bytes=limit)

    refused("1 tensors are not expected by this model and config: extra", {"extra": torch.zeros(2)})
    refused("wrong shape", {KEY: torch.zeros(4, 16)})
    refused("not finite", {KEY: torch.full((3, 16), torch.inf)})
    refused("unsupported dtype", {KEY: torch.zeros(3, 16, dtype=torch.complex64)})
    refused(r"values beyond what torch\.float16 holds", {KEY: torch.full((3, 16), 1e5)}, dtype=torch.float16)
    refused(r"has [\d,]+ bytes; at most 100 are read", limit=100)
    refused("no module matches", target_modules=["nowhere"])
    refused("Embedding; only .* can be adapted", target_modules=["q_proj", "embed_tokens"])
    refused("trainable_token_indices", trainable_token_indices=[1])
    refused("'IA3' is not supported; supported: ", peft_type="IA3")
    refused("init_lora_weights='pissa' changed the base weights", init_lora_weights="pissa")
    refused("wrong shape", model=llama(hidden_size=32))
    refused("missing", target_modules=["q_proj", "o_proj"])
    refused("target_modules: .* may take very long to match: it repeats what repeats", target_modules=r"(\w+\.?)+q_proj")
    refused("rank_pattern: .* may take very long", rank_pattern={r"(a|aa)+b": 3})
    refused("rank_pattern .* it has 300 regular expressions; at most 256", rank_pattern={f"x{i}.*": 3 for i in range(300)})
    refused("it has 300 regular expressions", rank_pattern={f"(a|aa)+{i}": 3 for i in range(300)})
    refused("together have too many repeats", alpha_pattern={f"x{i}.*a.*b.*c.*": 3 for i in range(2)})
    refused("its names have 300 different lengths", rank_pattern={"x" * i: 3 for i in range(1, 301)})
    refused("alpha|float", lora_alpha=1e300)
    for name in (WEIGHTS, CONFIG):
        (tmp_path / CONFIG).write_bytes(good[CONFIG])
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError):
            packed(tmp_path, llama())


def test_modules_that_are_no_sites(tmp_path):
    write(tmp_path, fastft.LoRA(r=3, target_modules=["q_proj", "down_proj"]))
    model = llama()
    sites = [site for site in find_sites(model) if "down_proj" not in site.name]
    with pytest.raises(AdapterFileError, match="down_proj' can't have adapters while it is served"):
        Packer(model, sites, dtype=torch.float32).pack(tmp_path)


@pytest.mark.parametrize(
    "slow",
    [
        r"(a+)+b",
        r"((a*)b?)*",
        r"(a|ab)*c",
        r"(?:x\d{1,9}){2,}",
        ".*a.*b.*c.*d.*e",
        "a" * 5000,
        "(?=(a+)+)b",
        ".?" * 22 + "X",
        "(?:.|..)" * 22 + "X",
        "(a?){22}a{22}X",
        "(?:.?.?.?.?.?.?.?){3}X",
        "(?i)" + "(?:A|a.?)" * 22 + "X",
        ".*.*.*.*" + ".?" * 3 + "X",
        "(" * 2000 + "a" + ")" * 2000,
    ],
    ids=lambda pattern: pattern[:30],
)
def test_patterns_that_could_take_for_ever(slow):
    assert slow_because(slow)


@pytest.mark.parametrize(
    "fine",
    [
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.(?:[0-9]|1[0-5])\.self_attn\.(q|k|v|o)_proj",
        r"^(?!.*visual).*(?:q_proj|k_proj|v_proj).*$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
        r"layers\.\d+\.(mlp\.)?down_proj",
        "(",  # not ours to refuse
        r"a{3}(?:bc)*",
        r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"model\.layers\.(?:[0-9]|1[0-9]|2[0-7])\.(?:self_attn|mlp)\.(?:q|k)_proj",
        r".*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|qkv_proj|qkv|gate_up_proj|dense).*?",
        "|".join(f"layer{i}_proj" for i in range(250)),
    ],
)
def test_patterns_that_people_write(fine):
    assert slow_because(fine) is None


def test_the_largest_rank_is_served(tmp_path):
    deltas = write(tmp_path, fastft.LoRA(r=3, target_modules=["q_proj"]))
    assert_computes(*packed(tmp_path, llama(), max_rank=3), deltas)


def test_options_of_the_packer():
    for options, error in (
        ({"dtype": torch.float64}, TypeError),
        ({"dtype": torch.float32, "page_bytes": 1000}, ValueError),
    ):
        with pytest.raises(error):
            Packer(llama(), [], **options)
