"""The stand-ins that the normal tests use have the signatures of this vLLM."""

import importlib.util
import inspect
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: make test-vllm")

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper import punica_selector
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.platforms.interface import Platform

from fastft.integrations import vllm as plugin

STAND_INS = Path(__file__).parent.parent / "integrations" / "vllm_stand_ins.py"
spec = importlib.util.spec_from_file_location("vllm_stand_ins", STAND_INS)
stand_ins = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_ins)


def parameters(function):
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", [n for n, f in vars(stand_ins.PunicaWrapperBase).items() if inspect.isfunction(f)])
def test_signatures(name):
    theirs, own = parameters(getattr(PunicaWrapperBase, name)), parameters(getattr(stand_ins.PunicaWrapperBase, name))
    if name in ("moe_lora_align_block_size", "add_lora_fused_moe", "add_lora_w13", "add_lora_w2"):
        assert own == theirs[: len(own)]  # refused, so the stand-ins have the first parameters only
    else:
        assert own == theirs


def test_abstract_methods():
    assert PunicaWrapperBase.__abstractmethods__ == stand_ins.PunicaWrapperBase.__abstractmethods__


def test_the_wrapper_fits():
    assert plugin.obstacles(plugin.wrapper_class(PunicaWrapperBase)) == []


def test_names_that_the_plugin_uses():
    for name in ("is_cuda", "is_cpu", "get_punica_wrapper"):
        own = getattr(stand_ins.platform("cpu", "cpu"), name)
        assert parameters(own) == parameters(getattr(Platform(), name))
    assert "current_platform.get_punica_wrapper()" in inspect.getsource(punica_selector.get_punica_wrapper)
    assert parameters(LoRAModelManager.activate_adapter)[:2] == parameters(stand_ins.LoRAModelManager.activate_adapter)
    source = inspect.getsource(LoRAModelManager)
    assert "self.punica_wrapper_mapping" in source and "self.lora_index_to_id" in source
    call = "self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices"
    assert call in inspect.getsource(BaseLinearLayerWithLoRA)
