"""Peers that are other libraries' GPU kernels: why they are absent, and that they are called as they ask to be, by stand-ins
with their interfaces, in plain PyTorch."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from fastft.bench import libraries, runner
from fastft.bench.e2e import step
from fastft.bench.ops import dora, grouped, lora

CPU = torch.device("cpu")


def module(monkeypatch, name, **members):
    """Put a module, and the packages it is in, where imports look first."""
    for end in range(1, name.count(".") + 1):
        package = types.ModuleType(".".join(name.split(".")[:end]))
        package.__path__ = []
        monkeypatch.setitem(sys.modules, package.__name__, package)
    made = types.ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.mark.parametrize("name", libraries.MODULES)
def test_reasons(monkeypatch, name):
    assert "run on GPUs only" in libraries.missing(name, "cpu")
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda module: None)
    assert f"pip install {libraries.PACKAGES[name]}" in libraries.missing(name, "cuda")
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda module: object())
    assert libraries.missing(name, "cuda") is None


def test_nothing_of_them_is_said_on_a_cpu_unless_asked():
    for cases in (lora.cases("cpu", ["tiny"]), grouped.cases("cpu", ["tiny-llama"]), step.cases("cpu", ["tiny-llama"])):
        for case in cases:
            assert not any(libraries.uses_one(name) for name in (*case.arms, *case.skipped))
    (case,) = lora.cases("cpu", ["tiny"], ["fp32"], [0.0], peer_names=["unsloth"])
    assert case.skipped == {"unsloth": "unsloth's kernels run on GPUs only"} and list(case.arms) == ["fastft"]
    case = next(grouped.cases("cpu", ["tiny-llama"], ["bf16"], peer_names=["vllm"]))
    assert case.skipped == {"vllm": "vllm's kernels run on GPUs only"}
    case = next(step.cases("cpu", ["tiny-llama"], dropouts=[0.0], peer_names=["liger", "fastft:liger"]))
    assert set(case.skipped) == {"liger", "fastft:liger"} and set(case.arms) == {"fastft", "fastft:ungrouped"}


@pytest.fixture
def installed(monkeypatch):
    """As on a GPU's machine with all of them. What PEFT looks for is there or not, as it is."""
    find, theirs = libraries.importlib.util.find_spec, {name.split(".")[0] for name in libraries.MODULES.values()}

    def found(name, *package):
        return object() if name.split(".")[0] in theirs else find(name, *package)

    monkeypatch.setattr(libraries.importlib.util, "find_spec", found)


class LoRA_W(torch.autograd.Function):
    """With unsloth's arguments; x is [batch, length, K], as it asks."""

    @staticmethod
    def forward(ctx, x, w, quant, a, b, scale):
        assert x.dim() == 3 and quant is None
        ctx.save_for_backward(x, w, a, b)
        ctx.scale = scale
        return x @ w.t() + scale * (x @ a.t() @ b.t())

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b = ctx.saved_tensors
        dy, rows, s = dy[0], x[0], ctx.scale
        return (dy @ w + s * dy @ b @ a)[None], None, None, s * (dy @ b).t() @ rows, s * dy.t() @ (rows @ a.t()), None


def test_unsloth(monkeypatch, installed):
    module(monkeypatch, "unsloth.kernels.fast_lora", LoRA_W=LoRA_W)
    found = {case.name: case for case in lora.cases("cuda", ["tiny"], ["fp32"])}
    case = found["layer r=16 p=0"]
    case.checker(d := case.inputs(CPU, 0))(case.arms["unsloth"])
    with pytest.raises(runner.WrongResult):
        case.checker(d)(lambda d: case.arms["unsloth"](replace(d, scale=d.scale * 1.01)))
    assert found["layer r=16 p=0.05"].skipped["unsloth"] == "it has no dropout"
    biased = next(lora.cases("cuda", ["qwen2.5-7b/q_proj"], ["bf16"], [0.0]))
    assert biased.skipped["unsloth"] == "it has no bias" and "unsloth" not in biased.arms


def liger_stand_in(calls):
    """Exchanges what Liger does: a function of transformers for all models, and methods of this one's modules."""
    from transformers.models.llama import modeling_llama

    def apply_liger_kernel_to_llama(model=None):
        rotate = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = lambda *args, **named: (calls.append("rotate"), rotate(*args, **named))[1]
        modeling_llama.LlamaRMSNorm = type("LigerRMSNorm", (modeling_llama.LlamaRMSNorm,), {})
        norm = model.model.norm
        inner = norm.forward
        norm.forward = lambda x: (calls.append("norm"), inner(x))[1]

    return apply_liger_kernel_to_llama


@pytest.mark.parametrize("name", ["liger", "fastft:liger"])
def test_liger(monkeypatch, installed, name):
    pytest.importorskip("peft")
    from transformers.models.llama import modeling_llama

    calls, before = [], dict(vars(modeling_llama))
    module(monkeypatch, "liger_kernel.transformers", apply_liger_kernel_to_llama=liger_stand_in(calls))
    case = next(step.cases("cuda", ["tiny-llama"], ["fp32"], [0.0]))
    d = case.inputs(CPU, 0)
    check = case.checker(d)
    check(case.arms[name])
    assert calls.count("norm") == 1 and calls.count("rotate") == d.model.config.num_hidden_layers
    calls.clear()
    check(case.arms["fastft"])  # others run what they ran before
    assert not calls and all(vars(modeling_llama)[key] is value for key, value in before.items())


def vllm_stand_in(monkeypatch, specializes):
    class LoRAKernelMeta:
        @staticmethod
        def make(max_loras, max_num_tokens, device):
            return LoRAKernelMeta()

        def prepare_tensors(self, mapping):
            assert mapping.dtype == torch.int32
            self.mapping = mapping

        if specializes:

            def meta_args(self, token_nums, specialize_active_lora):
                return (self.mapping,)
        else:

            def meta_args(self, token_nums):
                return (self.mapping,)

    def lora_shrink(x, a, s, mapping, scaling):
        assert s.dtype == torch.float32 and x.dtype == a[0].dtype
        for j, one in enumerate(a):
            s[j] = scaling * torch.einsum("tk,trk->tr", x.float(), one[mapping.long()].float())

    def lora_expand(s, b, y, mapping, offset_start, add_inputs):
        first = offset_start
        for j, one in enumerate(b):
            part = torch.einsum("tr,tnr->tn", s[j], one[mapping.long()].float())
            y[:, first : first + one.shape[1]] += part.to(y.dtype)
            first += one.shape[1]
        assert add_inputs and first == y.shape[1]

    members = {"LoRAKernelMeta": LoRAKernelMeta, "lora_shrink": lora_shrink, "lora_expand": lora_expand}
    module(monkeypatch, "vllm.lora.ops.triton_ops", **members)


@pytest.mark.parametrize("specializes", [True, False])
def test_vllm(monkeypatch, installed, specializes):
    vllm_stand_in(monkeypatch, specializes)
    for dtype, reason in (("bf16", None), ("fp32", "its kernels take 16-bit adapters, not torch.float32")):
        for case in grouped.cases("cuda", ["tiny-llama"], [dtype]):
            assert case.skipped.get("vllm") == reason
            if reason is None:
                case.checker(d := case.inputs(CPU, 0))(case.arms["vllm"])
                with pytest.raises(runner.WrongResult):
                    case.checker(d)(lambda d: libraries.vllm(d, grouped.SCALE / 2))


@pytest.mark.parametrize("family", [lora, dora], ids=["lora", "dora"])
def test_torch_compile_of_the_formula(monkeypatch, family):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # Inductor takes seconds, and is PyTorch's own matter
    (case,) = family.cases("cpu", ["tiny"], ["fp32"], [0.0], peer_names=["compile"])
    assert set(case.arms) == {"fastft", "compile"}
    case.checker(case.inputs(CPU, 0))(case.arms["compile"])
