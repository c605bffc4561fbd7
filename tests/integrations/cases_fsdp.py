"""fully_shard in two processes (see `processes`)."""

from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.modules.sharding import shares, weights_come_and_go
from tests.methods.models import llama

from .ranks import ROWS, accelerated, assert_trained_alike, attached, modules, train, whole


def shard(made, within=None, **options):
    """As trainers do: each layer and the root; before that each module in them of the class `within`."""
    for module in [m for layer in made.layers for m in layer.modules() if within and isinstance(m, within)]:
        fully_shard(module, **options)
    for layer in made.layers:
        fully_shard(layer, **options)
    fully_shard(made.model, **options)
    return made


def doubled(made):
    """Its state dict with other base weights."""
    values = made.model.state_dict().items()
    return {name: value * 2 if name.endswith("weight") else value for name, value in values}


def load_whole(model, values):
    """Load into a sharded model what every rank has whole."""
    own = model.state_dict()
    model.load_state_dict({name: shares(value, own[name]) for name, value in values.items()})


@pytest.mark.parametrize("within", [None, nn.Linear, LoraLayer], ids=["layers", "linears", "PEFT's layers"])
def test_trains_as_one_process(rank, make, within):
    expected = train(make(), ROWS)
    made = make()
    peft = isinstance(made.model, PeftModel)
    if within is LoraLayer and not peft:
        return
    if within is nn.Linear and peft and made.model.peft_config["default"].use_dora:
        return  # PEFT's own path, which reads the weight of a base layer that nobody called, fails
    shard(made, within)
    assert all(isinstance(p, DTensor) for p in made.model.parameters())
    with fastft.testing.record() as calls:
        found = train(made, ROWS.chunk(2)[rank])
    assert_trained_alike(found, expected)
    if peft and within is nn.Linear:  # of layers that gather what they hold when they are called, and we don't call them
        assert not calls and {row.path for row in fastft.report(made.model)} == {"peft"}
        assert {row.reason for row in fastft.report(made.model)} == {"lora_A or lora_B is hooked or no plain Linear"}
        return
    assert {call.backend for call in calls} == {"cpu"} and "lora_grad_sb" in {call.op for call in calls}
    if peft:
        report = fastft.report(made.model)
        assert report.calls == {"fused": 3 * 14, "low-rank part": 0, "peft": 0}
        assert {(row.kind, row.path, row.reason) for row in report} == {("lora.Linear", "fused", "")}
    if made.handle:
        assert all(state.grouped for state in made.handle.groups)


def test_the_handles_optimizer(rank):
    expected = attached()
    expected = train(expected, ROWS, expected.handle.optimizer(lr=1e-2))
    made = shard(attached())
    assert_trained_alike(train(made, ROWS.chunk(2)[rank], made.handle.optimizer(lr=1e-2)), expected)
    made.handle.step()


def test_sharded_save_and_load(rank, make, folder, request):
    """torch.distributed.checkpoint, by the parameters' names, also into a model that is wrapped otherwise."""
    made = shard(make())
    train(made, ROWS.chunk(2)[rank], steps=1)
    at = f"{folder}/{request.node.name}"
    dcp.save({"model": get_model_state_dict(made.model)}, checkpoint_id=at)
    other = shard(make(), LoraLayer if isinstance(made.model, PeftModel) else nn.Linear)
    assert not torch.equal(other.logits(), made.logits())  # and DoRA's norms have been asked for
    state = {"model": get_model_state_dict(other.model)}
    dcp.load(state, checkpoint_id=at)
    set_model_state_dict(other.model, state["model"])
    assert torch.equal(other.logits(), made.logits())


def test_norms_follow_what_is_loaded(rank):
    """What is gathered for a forward doesn't count its changes: a norm that was kept would be that of the old weight."""
    for kind in (attached, modules):
        made, plain = shard(kind(use_dora=True)), kind(use_dora=True)
        assert weights_come_and_go()
        made.logits()
        values = doubled(plain)
        load_whole(made.model, values)
        plain.model.load_state_dict(values)
        torch.testing.assert_close(made.logits(), plain.logits())


def test_the_whole_state_dict_is_the_unsharded_ones(rank, make):
    found = get_model_state_dict(shard(make()).model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # the others get nothing
        expected = make().model.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "bias": "all", "modules_to_save": ["norm"]}])
def test_an_adapter_is_saved_whole(rank, folder, options, request):
    at = f"{folder}/{request.node.name}"
    made = shard(attached(**options))
    train(made, ROWS.chunk(2)[rank], steps=1)
    assert made.handle.sharded
    made.handle.save(at)  # on return it is there for all
    model = llama()
    fastft.load(model, at)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ROWS).logits, made.logits(), rtol=1e-5, atol=1e-6)
    other = shard(attached(**options))
    other.handle.restore(at)
    for (name, one), two in zip(made.handle.named_parameters(), other.handle.parameters(), strict=True):
        assert isinstance(two, DTensor) and torch.equal(whole(one), whole(two)), name
    assert torch.equal(other.logits(), made.logits())


def test_rank_0_alone_writes(rank, folder, monkeypatch):
    from fastft.methods import handle_files

    written = []
    monkeypatch.setattr(handle_files, "write_adapter", lambda at, config, tensors: written.append(tensors))
    made = shard(attached())
    made.handle.save(f"{folder}/nothing")
    assert len(written) == (rank == 0)
    assert all(type(t) is torch.Tensor for tensors in written for t in tensors.values())


def test_a_failure_to_write_reaches_the_caller(rank, folder):
    made = shard(attached())
    if rank == 0:
        with open(f"{folder}/file", "w"), pytest.raises(OSError):
            made.handle.save(f"{folder}/file/adapter")
    else:
        made.handle.save(f"{folder}/file/adapter")


def test_the_trainers_callback_gathers_on_every_rank(rank, folder):
    transformers = pytest.importorskip("transformers")
    made = shard(attached())
    arguments = transformers.TrainingArguments(output_dir=f"{folder}/trainer", use_cpu=True, report_to="none")
    state = transformers.TrainerState(global_step=3, is_world_process_zero=rank == 0, is_local_process_zero=rank == 0)
    made.handle.callback().on_save(arguments, state, None)
    saved = load_file(f"{folder}/trainer/checkpoint-3/adapter/adapter_model.safetensors")
    assert len(saved) == len(list(made.handle.parameters()))


def test_what_needs_whole_weights_is_refused(rank):
    made = shard(attached())
    for call in ("merge", "unmerge", "merge_and_unload", "detach"):
        with pytest.raises(RuntimeError, match=f"can't {call} adapter 'default' while its model is sharded"):
            getattr(made.handle, call)()
    with pytest.raises(ValueError, match=r"the weight of 'model.layers.0.self_attn.q_proj' is divided among"):
        fastft.attach(made.model, fastft.LoRA(target_modules=["q_proj"]), "second")
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    with pytest.raises(ValueError, match="attach first, then call fully_shard"):
        fastft.attach(model, fastft.LoRA(target_modules="all-linear"))
    with pytest.raises(TypeError, match="FSDPLinear"):
        fastft.LoRALinear.from_linear(fully_shard(nn.Linear(4, 4)))


@pytest.mark.parametrize("layers", [False, True], ids=["the root alone", "layers"])
def test_after_an_evaluation(rank, folder, layers, request):
    """Until the next backward the root holds what it gathered: bfloat16, and nothing that is written there stays."""
    at = f"{folder}/{request.node.name}"
    made = attached(modules_to_save=["norm"])
    for module in [*(made.layers if layers else ()), made.model]:
        fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    handle, before = made.handle, [whole(p).detach().clone() for p in made.handle.parameters()]
    for call in ("merge", "unmerge", "merge_and_unload", "detach"):
        made.logits()
        assert not all(isinstance(p, DTensor) for p in handle.parameters())
        with pytest.raises(RuntimeError, match=f"can't {call} .* while its model is sharded"):
            getattr(handle, call)()
    made.logits()
    with pytest.raises(ValueError, match="is divided among processes already"):
        fastft.attach(made.model, fastft.LoRA(target_modules=["q_proj"]), "second")
    made.logits()
    handle.save(at)
    assert {t.dtype for t in load_file(f"{at}/adapter_model.safetensors").values()} == {torch.float32}
    made.logits()
    optimizer = handle.optimizer(lr=1.0)
    train(made, ROWS.chunk(2)[rank], optimizer, steps=1)
    assert not any(torch.equal(whole(p), old) for p, old in zip(handle.parameters(), before, strict=True))
    made.logits()
    handle.restore(at)
    made.logits()
    assert handle.sharded
    assert all(torch.equal(whole(p), old) for p, old in zip(handle.parameters(), before, strict=True))


def test_a_peft_model_is_saved_whole(rank, folder):
    """By the state dict that transformers' Trainer hands to save_pretrained under FSDP."""
    made = shard(accelerated())
    train(made, ROWS.chunk(2)[rank], steps=1)
    values = get_model_state_dict(made.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        made.model.save_pretrained(f"{folder}/peft", state_dict=values)
    torch.distributed.barrier()
    model = PeftModel.from_pretrained(llama(), f"{folder}/peft")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ROWS).logits, made.logits(), rtol=1e-5, atol=1e-6)


def test_between_forwards_a_report_says_what_a_forward_will_do(rank):
    made = shard(accelerated())
    assert {row.path for row in fastft.report(made.model)} == {"fused"}
    made.logits()
    assert fastft.report(made.model).calls == {"fused": 14, "low-rank part": 0, "peft": 0}
    made.model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.to(torch.float64)
    reason = "lora_A is float64, lora_B float32"
    assert reason in {row.reason for row in fastft.report(made.model) if row.path == "peft"}


def test_disabled_is_the_base(rank):
    made = shard(attached())
    with torch.no_grad():
        expected = llama()(input_ids=ROWS).logits
    assert not torch.allclose(made.logits(), expected)
    with made.handle.disabled():
        torch.testing.assert_close(made.logits(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(rank, reentrant):
    def checkpointed():
        made = attached()
        made.model.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_())
        for layer in made.layers:
            forward = layer.forward
            layer.forward = lambda x, _f=forward, **k: checkpoint(partial(_f, **k), x, use_reentrant=reentrant)
        return made

    expected = train(checkpointed(), ROWS)
    assert_trained_alike(train(shard(checkpointed()), ROWS.chunk(2)[rank]), expected)


def test_mixed_precision(rank):
    """Under a policy a forward sees everything in bfloat16, while float32 trains."""
    losses, *_ = train(attached(), ROWS)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    made = shard(attached(), mp_policy=policy)
    with fastft.testing.record() as calls:
        found, *_ = train(made, ROWS.chunk(2)[rank])
    torch.distributed.all_reduce(found)
    torch.testing.assert_close(found.float() / 2, losses, rtol=2e-2, atol=2e-2)
    assert {call.backend for call in calls} == {"cpu"}
    assert {p.dtype for p in made.handle.parameters()} == {torch.float32}


def test_packed_weights_are_left_alone(rank, monkeypatch):
    monkeypatch.setattr(fastft.modules.packed, "ONE_GEMM_DEVICES", {"cpu", "cuda"})
    expected = train(attached(), ROWS)
    made = shard(attached(pack_weights=True))
    assert_trained_alike(train(made, ROWS.chunk(2)[rank]), expected)
    assert {state.unpacked for state in made.handle.groups} == {"fully_shard moves the weights for every forward"}
    plain = attached()
    values = doubled(plain)
    load_whole(made.model, values)
    plain.model.load_state_dict(values)
    torch.testing.assert_close(made.logits(), plain.logits())


@pytest.mark.parametrize("efficient", [False, True])
def test_as_accelerate_prepares_a_model(rank, make, efficient):
    """On a CPU accelerate chooses DistributedDataParallel whatever is asked for, so its FSDP2 is called by hand."""
    utils = pytest.importorskip("accelerate.utils.fsdp_utils")
    accelerate = pytest.importorskip("accelerate")
    made, expected = make(), train(make(), ROWS)
    accelerator = accelerate.Accelerator(cpu=True)
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=efficient)
    plugin.auto_wrap_policy = lambda module, recurse, nonwrapped_numel, **_: module in set(made.layers)
    accelerator.state.fsdp_plugin = plugin
    utils.fsdp2_prepare_model(accelerator, made.model)
    assert_trained_alike(train(made, ROWS.chunk(2)[rank]), expected)
