"""Mixed batches of accelerated PEFT models on the grouped ops: which calls take them, and that nothing stale is used."""

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch

import fastft
from fastft.integrations import peft_bank, peft_tuner, peft_watch
from tests.integrations.peft_models import accelerated, peft, peft_llama, randomize
from tests.methods.models import llama, tokens

NAMES = ["default", "b", "__base__", "b"]


def model(dtype=torch.float32, **config):
    plain = peft_llama(("default",))
    plain.add_adapter("b", peft.LoraConfig(r=5, lora_alpha=20, use_rslora=True, target_modules=["q_proj", "down_proj"]))
    if config:
        plain.add_adapter("odd", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], **config))
    return randomize(plain).to(dtype).eval()


def logits(m, names=NAMES, ids=None):
    with torch.no_grad():
        return m(input_ids=tokens(len(names)) if ids is None else ids, adapter_names=names).logits


def grouped(m, names=NAMES):
    """The logits, and how many sites took the grouped ops."""
    with fastft.testing.record() as calls:
        found = logits(m, names)
    return found, sum(call.op in ("grouped_add_", "grouped_expand_") for call in calls)


@pytest.mark.parametrize("length", [1, 7])
def test_all_layers_take_them(length):
    plain = model()
    fast = accelerated(plain)
    ids = tokens(4)[:, :length]
    torch.testing.assert_close(logits(fast, ids=ids), logits(plain, ids=ids))
    layers = sum(type(m).__name__ == "Linear" and hasattr(m, "lora_A") for m in fast.modules())
    assert grouped(fast)[1] == layers > 4


CHANGES = ["in place", "replaced", "data", "scale", "modules", "lists", "deleted and added", "reloaded"]


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_used(change):
    plain = model()
    fast = accelerated(plain)
    before = logits(fast)
    for m in (plain, fast):
        layers = [x for x in m.modules() if hasattr(x, "lora_A") and "b" in x.lora_A]
        with torch.no_grad():
            if change == "deleted and added":
                m.delete_adapter("b")
                m.add_adapter("b", peft.LoraConfig(r=3, target_modules=["up_proj"]))
                for x in m.modules():
                    if hasattr(x, "lora_A") and "b" in x.lora_A:
                        x.lora_B["b"].weight.fill_(0.1)
                        x.lora_A["b"].weight.fill_(0.1)
                m.eval()
            for x in layers if change != "deleted and added" else ():
                weight = x.lora_B["b"].weight
                if change == "in place":
                    weight.mul_(2)
                elif change == "replaced":
                    x.lora_B["b"].weight = torch.nn.Parameter(weight * 2)
                elif change == "data":
                    weight.data = weight.data * 2
                elif change == "modules":
                    x.lora_B["b"] = copy.deepcopy(x.lora_B["b"])
                    x.lora_B["b"].weight.mul_(2)
                elif change == "lists":
                    x.lora_B = copy.deepcopy(x.lora_B)
                    x.lora_B["b"].weight.mul_(2)
                elif change == "scale":
                    x.scaling["b"] *= 2.0
        if change == "reloaded":
            state = {k: v * 2 for k, v in peft.get_peft_model_state_dict(m, adapter_name="b").items()}
            peft.set_peft_model_state_dict(m, state, adapter_name="b")
    got = logits(fast)
    torch.testing.assert_close(got, logits(plain))
    assert not torch.allclose(got[1], before[1])


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_steps(fused):
    """The fused ones, which transformers takes by default, count no versions."""
    plain = model()
    fast = accelerated(plain)
    before = logits(fast)
    for m in (plain, fast):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1, fused=fused)
        m(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    got = logits(fast)
    torch.testing.assert_close(got, logits(plain), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[0], before[0])


def test_adapters_that_were_loaded_in_inference_mode(tmp_path):
    """They count no versions, so that PEFT's way takes them; the layers' other adapters are not held up."""
    plain = model()
    plain.save_pretrained(tmp_path, selected_adapters=["b"])
    fast = accelerated(plain)
    with torch.inference_mode():
        for m in (plain, fast):
            m.load_adapter(tmp_path / "b", "later")
    for names in (["later", "b", "__base__", "default"], ["later"] * 4):
        torch.testing.assert_close(logits(fast, names), logits(plain, names))
    bank = peft_tuner._banks[fast.base_model]
    made = dict(bank._banks)
    logits(fast, ["later", "b", "__base__", "default"])
    assert all(bank._banks[layer] is own for layer, own in made.items())
    for m in (plain, fast):
        m.delete_adapter("later")
    assert grouped(fast)[1] > 4


def test_only_layers_that_changed_are_laid_out_again():
    fast = accelerated(model())
    logits(fast)
    bank = peft_tuner._banks[fast.base_model]
    before, changed = dict(bank._banks), list(bank._banks)[3]
    with torch.no_grad():
        changed.lora_A["default"].weight.mul_(2)
    logits(fast)
    assert [layer for layer, made in bank._banks.items() if made is not before[layer]] == [changed]
    logits(fast, ["b", "__base__"])  # fewer adapters than are laid out
    assert all(bank._banks[layer] is before[layer] for layer in before if layer is not changed)
    changed.lora_B["default"] = copy.deepcopy(changed.lora_B["default"])
    logits(fast)
    assert [layer for layer, made in bank._banks.items() if made is not before[layer]] == [changed]


def test_adapters_that_come_later_and_orders_of_names():
    plain = model()
    fast = accelerated(plain)
    for names in (["b"] * 4, NAMES, ["__base__"] * 4, NAMES[::-1]):
        torch.testing.assert_close(logits(fast, names), logits(plain, names))
    for m in (plain, fast):
        m.add_adapter("c", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for x in m.modules():
            if hasattr(x, "lora_A") and "c" in x.lora_A:
                x.lora_B["c"].weight.data.fill_(0.2)
                x.lora_A["c"].weight.data.fill_(0.3)
        m.eval()
    names = ["c", "b", "c", "__base__"]
    torch.testing.assert_close(logits(fast, names), logits(plain, names))


def test_what_does_not_fit_goes_the_other_way():
    plain = model(lora_bias=True)
    fast = accelerated(plain)
    names = ["odd", "b", "default", "odd"]
    got, count = grouped(fast, names)
    torch.testing.assert_close(got, logits(plain, names))
    everything = grouped(fast)[1]
    assert 0 < count < everything, "only the layers that the odd adapter is in"


def test_dropout_that_is_on_goes_the_other_way():
    """As it is in what `add_adapter` makes, in a model that evaluates too."""
    fast = accelerated(model())
    fast.add_adapter("late", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], lora_dropout=0.5))
    names = ["late", "b", "default", "late"]
    dropouts = [m.lora_dropout["late"] for m in randomize(fast).modules() if hasattr(m, "lora_A") and "late" in m.lora_A]
    (first, count), (second, _) = grouped(fast, names), grouped(fast, names)
    everything = grouped(fast)[1]
    assert count == everything - len(dropouts) > 0
    assert not torch.allclose(first[0], second[0]) and torch.equal(first[2], second[2])
    fast.eval()
    got, count = grouped(fast, names)
    assert count == everything
    torch.testing.assert_close(got, logits(fastft.restore(copy.deepcopy(fast)), names))
    dropouts[1].train()
    assert grouped(fast, names)[1] == everything - 1
    assert not torch.equal(logits(fast, names), got)
    dropouts[1].p = 0.0
    again, count = grouped(fast, names)
    assert count == everything and torch.equal(again, got)


def test_variants_are_not_laid_out_as_plain_ones():
    for m in (model(use_dora=True), accelerated(model(use_dora=True))):
        with pytest.raises(ValueError, match="DoRA"):
            logits(m, ["odd", "b", "default", "odd"])


def test_adapters_of_two_dtypes_are_not_laid_out_together():
    """Or the float32 one would be rounded to what the other is."""
    plain = model(torch.bfloat16)
    everything = grouped(accelerated(plain))[1]
    for name, parameter in plain.named_parameters():
        if name.endswith(".b.weight"):
            parameter.data = parameter.data.float()
    (got, count), want = grouped(accelerated(plain)), logits(copy.deepcopy(plain).float())
    assert 0 < count < everything, "only the layers that b is not in"
    error = (got.float() - want).norm() / want.norm()
    assert error <= 1.2 * (logits(plain).float() - want).norm() / want.norm()


def test_float32_adapters_on_a_bfloat16_base():
    plain = model()
    for name, parameter in plain.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    fast = accelerated(plain)
    (got, count), want = grouped(fast), logits(copy.deepcopy(plain).float())
    assert count and got.dtype == torch.bfloat16
    error = (got.float() - want).norm() / want.norm()
    assert error <= 1.2 * (logits(plain).float() - want).norm() / want.norm()


def test_gradients_take_the_other_way_and_restore_frees_the_memory():
    fast = accelerated(model()).requires_grad_(True)
    with fastft.testing.record() as calls:
        fast(input_ids=tokens(4), adapter_names=NAMES).logits.sum().backward()
    assert not any(call.op.startswith("grouped") for call in calls)
    logits(fast)
    assert fast.base_model in peft_tuner._banks
    fastft.restore(fast)
    assert fast.base_model not in peft_tuner._banks


def scaled(m, **scales):
    for x in m.modules():
        for name, scale in scales.items():
            if hasattr(x, "lora_A") and name in x.lora_A:
                x.set_scale(name, scale)


def test_what_changed_while_others_were_laid_out_and_then_changed_back():
    plain = model()
    fast = accelerated(plain)
    logits(fast)
    for m in (plain, fast):
        scaled(m, default=2.0, b=0.0)
    logits(fast, ["default"] * 2)  # b, which this batch does not name, lies beside it
    for m in (plain, fast):
        scaled(m, default=1.0, b=1.0)
    torch.testing.assert_close(logits(fast, ["b"] * 2), logits(plain, ["b"] * 2))


def test_exchanged_memory_that_comes_back():
    plain = model()
    fast = accelerated(plain)
    averages = {}
    for steps, names in ((1, ["default"]), (2, ["b"])):
        for m in (plain, fast):
            for name, parameter in m.named_parameters():
                if "lora_B" in name:
                    other = averages.setdefault((m, name), torch.full_like(parameter, 0.1))
                    averages[m, name], parameter.data = parameter.data, other
        for each in (names, NAMES):
            torch.testing.assert_close(logits(fast, each * (5 - steps)), logits(plain, each * (5 - steps)))


def test_deleted_adapters_are_freed():
    fast = accelerated(model())
    freed = []
    for i in range(3):
        fast.add_adapter(f"user{i}", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        fast.eval()
        logits(fast, ["b", f"user{i}"])
        freed.append(weakref.ref(next(p for n, p in fast.named_parameters() if f"lora_A.user{i}" in n)))
        fast.delete_adapter(f"user{i}")
    logits(fast, ["default"])
    gc.collect()
    assert not any(reference() is not None for reference in freed)


@pytest.mark.parametrize("again", ["other factors", "the same scale"])
def test_hot_swapping(again, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    plain = peft_llama(("default",))
    other = randomize(peft_llama(("default",), lora_alpha=8 if again == "the same scale" else 16), seed=9)
    other.save_pretrained(tmp_path)
    fast = accelerated(plain)
    names = ["default", "__base__"]
    before = logits(fast.eval(), names)
    for m in (plain, fast):
        hotswap_adapter(m, tmp_path, adapter_name="default", torch_device="cpu")
        m.eval()
    got = logits(fast, names)
    torch.testing.assert_close(got, logits(plain, names))
    assert not torch.allclose(got[0], before[0])


def test_hot_swapping_by_a_function_that_was_imported_before():
    from peft.utils import hotswap

    peft_tuner.follow_unseen_writes()
    before = inspect.unwrap(hotswap.hotswap_adapter_from_state_dict)
    plain = peft_llama(("default",)).eval()
    fast = accelerated(plain)
    logits(fast, ["default"])
    for m in (plain, fast):
        state = {name: value * 2 for name, value in m.state_dict().items() if "lora_" in name}
        before(m, state, "default", m.peft_config["default"])
    torch.testing.assert_close(logits(fast, ["default"]), logits(plain, ["default"]))


def test_hot_swapping_is_followed_where_nobody_called_accelerate(monkeypatch):
    """As in a process that an accelerated model was sent to."""
    fast, followed = pickle.loads(pickle.dumps(accelerated(model()))), []
    monkeypatch.setattr(peft_tuner, "follow_unseen_writes", lambda: followed.append(True))
    logits(fast)
    assert followed


def test_what_arrow_subtracts_from_the_adapters_it_routes_to(tmp_path):
    """In its first forward, and in the first one after another adapter came."""
    for i in range(3):
        randomize(peft_llama(("default",)), seed=i).save_pretrained(tmp_path / str(i))
    paths = [str(tmp_path / str(i)) for i in range(3)]
    config = peft.ArrowConfig(top_k=1, use_gks=True)
    plain = peft.create_arrow_model(llama(), paths[:1], config, general_adapter_paths=paths[1:2]).eval()
    fast = accelerated(plain)
    for name in ("task_0", "late"):
        if name == "late":
            for m in (plain, fast):
                m.load_adapter(paths[2], "late")
        before = logits(fast, [name] * 2)
        for m in (plain, fast):
            m(input_ids=tokens())
        after, sites = grouped(fast, [name] * 2)
        assert sites and not torch.allclose(before, after)
        torch.testing.assert_close(after, logits(plain, [name] * 2))
        done = peft_watch._unseen_writes
        fast(input_ids=tokens())
        assert peft_watch._unseen_writes == done  # or all would be made again after each forward of the router


def test_a_deleted_adapter_is_freed_at_once():
    fast = accelerated(model())
    logits(fast)
    freed = weakref.ref(next(p for n, p in fast.named_parameters() if "lora_A.b" in n))
    fast.delete_adapter("b")
    logits(fast, ["default"])
    assert freed() is None


@pytest.mark.parametrize("back", [False, True])
def test_a_failure_while_adapters_are_laid_out_leaves_nothing_stale(back, monkeypatch):
    plain = model()
    fast = accelerated(plain)
    logits(fast)
    for m in (plain, fast):
        scaled(m, b=3.0)
    calls, lay_out = [], peft_bank._lay_out

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        lay_out(*args)

    monkeypatch.setattr(peft_bank, "_lay_out", failing)
    with pytest.raises(MemoryError):
        logits(fast)
    if back:
        for m in (plain, fast):
            scaled(m, b=1.0)
    torch.testing.assert_close(logits(fast), logits(plain))
