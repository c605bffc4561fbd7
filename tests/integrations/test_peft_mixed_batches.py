"""Batches that name an adapter for each sample, from several threads, through failures and checkpointing."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.integrations import peft_mixed
from tests.integrations.peft_models import accelerated, assert_same_gradients, layer, one, paths, peft, peft_llama, randomize
from tests.methods.models import tokens

NAMES = ["default", "b", "__base__", "b"]


class Everything(nn.Module):
    """One of each kind of adapted layer that takes mixed batches, and one that is trained in full."""

    def __init__(self, use_checkpoint=None):
        super().__init__()
        self.emb, self.conv, self.up, self.down = nn.Embedding(20, 8), nn.Conv1d(5, 5, 1), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head, self.config, self.use_checkpoint = nn.Linear(8, 3), {"model_type": "test"}, use_checkpoint

    def forward(self, ids):
        x = self.conv(self.emb(ids))
        if self.use_checkpoint is None:
            return self.head(x + self.block(x))
        return self.head(x + checkpoint(self.outer, x, use_reentrant=self.use_checkpoint))

    def outer(self, x):
        return checkpoint(self.block, x, use_reentrant=self.use_checkpoint)

    def block(self, x):
        return self.down(torch.tanh(self.up(x)))


def everything(use_checkpoint=None, **config):
    torch.manual_seed(0)
    targets = {"target_modules": ["emb", "conv", "up", "down"], "modules_to_save": ["head"], **config}
    model = peft.get_peft_model(Everything(use_checkpoint), peft.LoraConfig(r=3, **targets))
    model.add_adapter("b", peft.LoraConfig(r=2, **targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


IDS = torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(0))


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


def test_all_kinds_of_layers():
    model = everything()
    want = model(IDS, adapter_names=NAMES)
    fast = fastft.accelerate(copy.deepcopy(model))
    got = fast(IDS, adapter_names=NAMES)
    torch.testing.assert_close(got, want)
    assert paths(fast) == {"low-rank part": 2}
    found = []
    for m in (fast, model):
        m.requires_grad_(True)
        m(IDS, adapter_names=NAMES).square().sum().backward()
        found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert_same_gradients(*found)
    copied = copy.deepcopy(fast)
    torch.testing.assert_close(copied(IDS, adapter_names=NAMES), want)
    fastft.restore(fast)
    torch.testing.assert_close(fast(IDS, adapter_names=NAMES), want)
    assert {type(m) for m in fast.modules()} == {type(m) for m in model.modules()}
    assert not [key for m in fast.modules() for key in m.__dict__ if "fastft" in key]
    torch.testing.assert_close(copied(IDS, adapter_names=NAMES), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_sample_gets_what_its_adapter_alone_gives(dtype):
    model = fastft.accelerate(layer(dtype=dtype, adapters=("default", "b"), lora_bias=True)).eval()
    x = torch.randn(4, 6, 24).to(dtype)
    mixed = one(model)(x, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        one(model).set_adapter([] if name == "__base__" else [name])
        alone, eps = one(model)(x)[i], torch.finfo(dtype).eps  # rounded once where the mixed batch rounds twice
        assert ((mixed[i] - alone).abs() <= 2 * eps * (1 + alone.abs())).all()


def test_generation_with_beams():
    model = randomize(peft_llama(("default", "b"))).eval()
    fast = accelerated(model)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "adapter_names": NAMES, "pad_token_id": 0}
    want = model.generate(input_ids=tokens(4), **options)
    assert torch.equal(fast.generate(input_ids=tokens(4), **options), want)
    t5 = pytest.importorskip("transformers").T5ForConditionalGeneration
    config = t5.config_class(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = peft.get_peft_model(t5(config), peft.LoraConfig(r=3, target_modules=["q", "v"]))  # beams: not in its encoder
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q", "wo"]))
    randomize(model, std=1.0).eval()
    want = model.generate(input_ids=tokens(4), **options)
    assert torch.equal(accelerated(model).generate(input_ids=tokens(4), **options), want)


def test_refusals_are_those_of_peft():
    model, fast = everything(), fastft.accelerate(everything())
    for names, match in ((["default", "nobody", "b", "b"], "nobody"), (["default"], "Length of `adapter_names`")):
        for m in (model, fast):
            with pytest.raises(ValueError, match=match):
                m(IDS, adapter_names=names)
    assert hooks(fast) == 0 < hooks(model)  # (what PEFT leaves behind)
    with pytest.raises(ValueError, match="training mode"):
        fast.train()(IDS, adapter_names=NAMES)
    fast.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        fast(IDS, adapter_names=NAMES)
    dora = fastft.accelerate(layer(use_dora=True)).eval()
    with pytest.raises(ValueError, match="DoRA"):
        one(dora)(torch.randn(1, 24), adapter_names=["default"])


def test_a_failed_call_leaves_nothing_behind():
    fast = fastft.accelerate(everything())
    plain = fast(IDS)

    def fail(module, args):
        raise KeyError("broken")

    handle = fast.base_model.model.down.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="broken"):
        fast(IDS, adapter_names=NAMES)
    handle.remove()
    assert hooks(fast) == 0 and peft_mixed._table.get() is None and not peft_mixed._any_running
    assert torch.equal(fast(IDS), plain)


def test_models_do_not_get_each_others_names():
    outer, inner = fastft.accelerate(everything()), fastft.accelerate(everything())
    want, plain = outer(IDS, adapter_names=NAMES), inner(IDS)
    seen = []
    outer.base_model.model.down.base_layer.register_forward_pre_hook(lambda module, args: seen.append(inner(IDS)))
    torch.testing.assert_close(outer(IDS, adapter_names=NAMES), want)
    assert torch.equal(seen[0], plain)


def test_layers_that_come_later():
    model = fastft.accelerate(peft_llama(("default",)))
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"]))
    randomize(model).eval()
    plain = fastft.restore(copy.deepcopy(model))
    got, want = (m(input_ids=tokens(4), adapter_names=NAMES).logits for m in (model, plain))
    torch.testing.assert_close(got, want)


def test_layers_that_came_past_the_tuner_are_accelerated_when_asked_for():
    model = fastft.accelerate(peft_llama(("default", "b"), target_modules=["q_proj"])).eval()
    config = peft.LoraConfig(r=4, target_modules=["v_proj"])
    peft.inject_adapter_in_model(config, model.base_model.model, adapter_name="default")
    want = model(tokens(2), adapter_names=["default", "b"]).logits
    late = [row for row in fastft.report(model) if "v_proj" in row.name]
    assert {(row.kind, row.path, row.reason) for row in late} == {
        ("lora.Linear", "peft", "not accelerated: call fastft.accelerate")
    }
    fastft.accelerate(model, strict=True)
    assert {row.path for row in fastft.report(model) if "v_proj" in row.name} == {"fused"}
    torch.testing.assert_close(model(tokens(2), adapter_names=["default", "b"]).logits, want)


def test_compiled():
    model = everything()
    want, plain = model(IDS, adapter_names=NAMES), model(IDS)
    fast = fastft.accelerate(model)
    fast.get_base_model().compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(fast(IDS), plain)
        torch.testing.assert_close(fast(IDS, adapter_names=NAMES), want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread"])
def test_checkpointed_regions_see_the_names_of_their_forward(reentrant, elsewhere):
    """Nested regions, two batches of other names in one backward, and backward on a thread of its own."""
    model = everything().requires_grad_(True)
    batches = NAMES, ["b", "b", "default", "default"]

    def gradients(model):
        model.zero_grad(set_to_none=True)
        loss = sum(model(IDS, adapter_names=names).square().sum() * (i + 1) for i, names in enumerate(batches))
        loss = loss + model(IDS).sum()
        if elsewhere:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    want = gradients(model)
    recomputed = everything(use_checkpoint=reentrant).requires_grad_(True)
    got = gradients(fastft.accelerate(recomputed))
    assert_same_gradients(got, want, 1e-4)
    assert peft_mixed._table.get() is None and not peft_mixed._any_running


def test_threads():
    """10,000 calls by two threads with names of their own: none gets the other's (of PEFT's about 6,000 do)."""
    model = fastft.accelerate(layer(adapters=("default", "b"))).eval()
    x = torch.randn(2, 24)
    names = ["default", "b"], ["b", "__base__"]
    with torch.no_grad():
        wants = [model(x, adapter_names=own) for own in names]
    wrong, errors, together = [0, 0], [], threading.Barrier(2)

    def work(which):
        try:
            together.wait()
            with torch.no_grad():
                for _ in range(5000):
                    y = model(x, adapter_names=names[which])
                    wrong[which] += not torch.equal(y, wants[which])
        except Exception as error:
            errors.append(error)

    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(torch_threads)
    assert not errors and wrong == [0, 0]
    assert hooks(model) == 0 and not peft_mixed._any_running


def test_threads_on_a_whole_model():
    model = fastft.accelerate(peft_llama(("default", "b"))).eval()
    ids, names = tokens(2), (["default", "b"], ["__base__", "default"], None)
    with torch.no_grad():
        wants = [model(input_ids=ids, adapter_names=own).logits for own in names]
    wrong = [0, 0, 0]

    def work(which):
        with torch.no_grad():
            for _ in range(40):
                y = model(input_ids=ids, adapter_names=names[which]).logits
                wrong[which] += not torch.equal(y, wants[which])

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0, 0]
