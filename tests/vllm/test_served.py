"""vLLM with the plugin, on CPU, end to end: `make test-vllm`. One engine at a time, a minute each on two cores."""

import gc
import importlib.metadata
import os

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: make test-vllm")

# In one process, so that the stacks can be looked at; and with compiled graphs of this run only.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")

import tiny
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from fastft.integrations import vllm as plugin
from fastft.integrations.vllm_sites import COUNT

MODES = ["eager", "fully sharded", "compiled"]
TOKENS = 12


def compile_with_adapters(monkeypatch):
    """vLLM 0.32 compiles nothing on CPUs once there are adapters; on GPUs it does."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config.__func__

    def and_compile(cls, config):
        check(cls, config)
        config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
        config.compilation_config.backend = "inductor"
        config.compilation_config.ir_enable_torch_wrap = False

    monkeypatch.setattr(platform, "check_and_update_config", classmethod(and_compile))


class Served:
    def __init__(self, folder, mode):
        self.folder, self.numbers = folder, {}
        self.base = tiny.model()
        self.base.save_pretrained(folder / "model")
        self.adapters = {None: (None, {})}
        self.llm = LLM(
            model=str(folder / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=mode != "compiled",
            enable_lora=True,
            max_loras=3,
            max_lora_rank=64,
            fully_sharded_loras=mode == "fully sharded",
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=256,
        )
        self.manager = self.llm.apply_model(lambda model: model.lora_manager)[0]
        (self.wrapper,) = self.manager.punica_wrapper_mapping.values()

    def write(self, name, rank, **options):
        self.adapters[name] = tiny.adapter(self.base, self.folder / name, rank, **options)

    def check(self, names):
        """One batch, a prompt of its own for each; every answer is that of the merged model alone."""
        generator = torch.Generator().manual_seed(len(names))
        prompts = [torch.randint(0, tiny.VOCABULARY, (5 + 3 * i,), generator=generator).tolist() for i in range(len(names))]
        requests = [
            LoRARequest(n, self.numbers.setdefault(n, 1 + len(self.numbers)), self.adapters[n][0]) if n else None
            for n in names
        ]
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False)
        outputs = self.llm.generate(
            [{"prompt_token_ids": p} for p in prompts], sampling, lora_request=requests, use_tqdm=False
        )
        for name, prompt, output in zip(names, prompts, outputs):
            assert list(output.outputs[0].token_ids) == tiny.greedy(self.base, self.adapters[name][1], prompt, TOKENS), name


@pytest.fixture(scope="module", params=MODES)
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(folder / "cache"))
        if request.param == "compiled":
            compile_with_adapters(monkeypatch)
        made = Served(folder, request.param)
        made.write("rank8", 8, seed=1)
        made.write("rank4", 4, seed=2, targets=("q_proj", "v_proj", "down_proj", "lm_head"))
        made.write("rank16", 16, rslora=True, seed=3)
        made.write("rank2", 2, seed=4, targets=("k_proj", "up_proj"))
        made.write("rank5", 5, seed=5)
        yield made
        made.llm.llm_engine.engine_core.shutdown()
        del made
        gc.collect()


def test_the_plugin_is_found_and_chosen(served):
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "fastft"]
    assert entry.load() is plugin.register
    assert type(served.wrapper) is plugin.FastftPunicaWrapper


def test_mixed_batch(served):
    served.check(["rank8", None, "rank4", "rank16", None, "rank8", "rank16", "rank4"])
    served.check([None, None])
    served.check(["rank16"])


def test_padding_is_not_read(served):
    """Of 3 slots of rank 64, the rows that the pieces name are those of the adapters."""
    served.check(["rank8", "rank4", "rank16"])
    ranks = {"rank8": 8, "rank4": 4, "rank16": 16}
    slots = {name: served.manager.lora_index_to_id.index(served.numbers[name]) for name in ranks}
    read = dict.fromkeys(ranks, 0)
    for site in served.wrapper.sites:
        for name, slot in slots.items():
            counts = site.pieces[slot, :, COUNT]
            assert set(counts.tolist()) <= {0, ranks[name]}
            read[name] += int(counts.sum())
        # Nobody would notice in the answers if it were read and zero.
        for factors in site.copies:
            for _, rows in factors:
                for name, slot in slots.items():
                    rows[slot, ranks[name] :] = torch.nan
    assert all(read.values())
    served.check(["rank8", None, "rank4", "rank16"])


def test_adapters_come_and_go(served):
    """Slots are used again by smaller adapters: nothing of the larger ones is left."""
    served.check(["rank16", "rank8", "rank4"])
    served.check(["rank2", "rank5", None, "rank2"])
    served.check(["rank16", "rank2", "rank5"])
    for name in ("rank16", "rank5"):
        served.llm.llm_engine.remove_lora(served.numbers[name])
    served.check(["rank2", None, "rank8", "rank4", "rank2"])
    served.check(["rank8", "rank16", None])


def test_an_adapter_is_loaded_again_in_place(served):
    served.check(["rank8", None])
    served.adapters["rank8"] = tiny.adapter(served.base, served.folder / "again", 3, seed=9)
    number = served.numbers["rank8"]
    served.llm.llm_engine.add_lora(LoRARequest("rank8", number, served.adapters["rank8"][0], load_inplace=True))
    served.check(["rank8", None])
