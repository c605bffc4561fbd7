"""What cases in several processes share (a pytest plugin in each of them, see `processes`): the process group, models that
are made alike in every rank, and the comparison with one process."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastft
from tests.methods.models import llama, randomize, tokens

ROWS = tokens(rows=4, length=9)


@pytest.fixture(scope="session")
def group():
    """The process group, for as long as the process lives; this process's rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    yield dist.get_rank()
    dist.destroy_process_group()


@pytest.fixture
def rank(group):
    dist.barrier()  # nobody reads what another rank has not finished writing in the case before
    return group


@pytest.fixture(scope="session")
def folder(group, tmp_path_factory):
    """One folder for all ranks."""
    name = [str(tmp_path_factory.mktemp("shared")) if group == 0 else None]
    dist.broadcast_object_list(name)
    return name[0]


class Blocks(nn.Module):
    """`LoRALinear` modules by themselves, in layers that fully_shard can wrap."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(50, 16).requires_grad_(False)
        self.layers = nn.ModuleList(
            nn.Sequential(fastft.LoRALinear(16, 24, r=4, **options), nn.GELU(), fastft.LoRALinear(24, 16, r=3, **options))
            for _ in range(2)
        )

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Made:
    """A model, its layers in the order in which fully_shard wraps them, and what trains in it."""

    def __init__(self, model, layers, handle=None):
        self.model, self.layers, self.handle = model, layers, handle
        self.wrapped = model

    def named_parameters(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def loss(self, rows):
        if isinstance(self.model, Blocks):
            return self.wrapped(rows).square().mean()
        return self.wrapped(input_ids=rows, labels=rows).loss

    def logits(self, rows=ROWS):
        with torch.no_grad():
            return self.wrapped(rows) if isinstance(self.model, Blocks) else self.wrapped(input_ids=rows).logits


def attached(**options):
    model = llama()
    torch.manual_seed(1)
    handle = fastft.attach(model, fastft.LoRA(**{"r": 4, "target_modules": "all-linear", **options}))
    randomize(handle)
    return Made(model, model.model.layers, handle)


def modules(**options):
    torch.manual_seed(1)
    model = Blocks(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return Made(model, model.layers)


def accelerated(**options):
    from peft import LoraConfig, get_peft_model

    model = llama()
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options))
    fastft.accelerate(model)
    return Made(model, model.base_model.model.model.layers)


# The kinds that every case goes through, by name.
KINDS = {
    "attached": attached,
    "attached, DoRA": lambda: attached(use_dora=True),
    "attached, biases and copies": lambda: attached(lora_bias=True, bias="all", modules_to_save=["norm"]),
    "modules": modules,
    "modules, DoRA": lambda: modules(use_dora=True),
    "modules, bias on B": lambda: modules(lora_bias=True),
    "PEFT": accelerated,
    "PEFT, DoRA": lambda: accelerated(use_dora=True),
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def whole(t):
    """A parameter or gradient, gathered if it is sharded."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(made, rows, optimizer=None, steps=3):
    """Losses and, of the first step, gradients; then the parameters."""
    optimizer = optimizer or torch.optim.AdamW(made.named_parameters().values(), lr=1e-2)
    losses, gradients = [], None
    for _ in range(steps):
        loss = made.loss(rows)
        loss.backward()
        losses.append(loss.detach())
        if gradients is None:
            gradients = {name: whole(p.grad).clone() for name, p in made.named_parameters().items()}
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), gradients, {n: whole(p.detach()).clone() for n, p in made.named_parameters().items()}


def assert_trained_alike(found, expected, ranks=2):
    """`found`: of this rank, on its part of the rows; `expected`: of one process on all of them."""
    losses, gradients, parameters = found
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / ranks, expected[0], rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected[1].keys() and len(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    # Adam's first steps go by the sign of a gradient, so where that is next to nothing they are luck.
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[2][name], rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
