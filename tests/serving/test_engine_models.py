"""Models that an engine refuses before it starts."""

import pytest

from fastft.serving import Engine
from tests.serving.tiny import llama


def test_a_model_on_several_devices_is_refused():
    spread = llama()
    spread.model.layers[1].to("meta")  # as offloading leaves it, and in place of another GPU
    with pytest.raises(ValueError, match=r"lies on several devices \(cpu, meta\).*serves one that lies on one"):
        Engine(spread)
    mapped = llama()
    mapped.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "lm_head": 1}
    with pytest.raises(ValueError, match=r"lies on several devices \(0, 1, cpu\).*device_map=\{'': 0\}"):
        Engine(mapped)
    mapped.hf_device_map = {"": "cpu"}
    Engine(mapped).close()
