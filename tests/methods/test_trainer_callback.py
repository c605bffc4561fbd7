"""Where handle.callback() saves the adapter: beside what Trainer has written."""

import os
from types import SimpleNamespace

import pytest

import fastft

from .sparse_net import NAMES, Net

pytest.importorskip("transformers")


def test_each_trial_of_a_search_has_its_adapter_in_its_own_checkpoint(tmp_path):
    from transformers import TrainerState

    handle = fastft.attach(Net(), fastft.LoRA(r=2, target_modules=NAMES))
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    for number, folder in enumerate(("checkpoint-3", "run-0/checkpoint-3", "lr/a/checkpoint-3", "lr/a/checkpoint-6")):
        searches = not folder.startswith("checkpoint")
        state = TrainerState(global_step=int(folder[-1]), is_hyper_param_search=searches)
        (tmp_path / folder).mkdir(parents=True)
        state.save_to_json(str(tmp_path / folder / "trainer_state.json"))
        os.utime(tmp_path / folder / "trainer_state.json", (number, number))
        handle.callback().on_save(arguments, state, None)
        assert {p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("adapter")} >= {folder}
        assert len(list(tmp_path.rglob("adapter"))) == number + 1
