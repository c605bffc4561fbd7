"""Training an attached model: losses over two forwards, checkpointing, compilation, optimizers, transformers' Trainer."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fastft
from fastft.methods import Method, handles

from .models import attached, llama, logits, randomize, tokens, transformers

X = tokens()


def test_disabled_between_forward_and_backward_matches_two_models():
    """A preference loss: the policy's forward, a disabled one for the reference, then the backward."""
    model = llama()
    handle = attached(model, lora_dropout=0.0)
    policy = copy.deepcopy(model)
    out = model(X).logits.log_softmax(-1)
    with torch.no_grad(), handle.disabled():
        reference = model(X).logits.log_softmax(-1)
    torch.nn.functional.logsigmoid(out - reference).mean().backward()
    expected = policy(X).logits.log_softmax(-1)
    base = logits(llama()).log_softmax(-1)
    assert torch.equal(base, reference)
    torch.nn.functional.logsigmoid(expected - base).mean().backward()
    for one, two in zip(handle.parameters(), handles(policy)["default"].parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing(reentrant, inside):
    """Also when the backward, which recomputes the adapted forward, runs inside the disabled block."""
    model = llama()
    handle = attached(model, lora_dropout=0.3)
    twin = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    torch.manual_seed(1)
    loss = model(X, labels=X).loss
    with handle.disabled():
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    torch.manual_seed(1)
    twin(X, labels=X).loss.backward()
    for one, two in zip(handle.parameters(), handles(twin)["default"].parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7)


def test_compile_without_graph_breaks():
    model = llama(num_hidden_layers=1)
    plain = logits(model)
    handle = attached(model, bias="all", modules_to_save=["lm_head"])
    apart = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), apart, rtol=1e-5, atol=1e-5)
    with handle.disabled():
        torch.testing.assert_close(logits(compiled), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(compiled), apart, rtol=1e-5, atol=1e-5)
    compiled(X, labels=X).loss.backward()
    gradients = [parameter.grad.clone() for parameter in handle.parameters()]
    model.zero_grad()
    model(X, labels=X).loss.backward()
    for one, parameter in zip(gradients, handle.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)
    assert handles(compiled)["default"] is handle


def test_compiled_models_follow_switches():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    first, second = (fastft.attach(model, fastft.LoRA(r=2, target_modules=["0", "1"]), name) for name in ("one", "two"))
    randomize(first, 1)
    randomize(second, 2)
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), torch.randn(3, 6)
    seen = []

    def same():
        seen.append(model(x))
        assert torch.equal(compiled(x), seen[-1])

    same()
    first.merge()
    same()
    with first.disabled():
        same()
    second.set_active(False)
    same()
    first.unmerge()
    same()
    assert not torch.allclose(seen[2], seen[1]) and not torch.allclose(seen[3], seen[1])


def test_optimizer_and_step():
    model = llama()

    calls = []

    class Counting(fastft.LoRA):
        def after_update(self, handle):
            calls.append(handle)

    assert Method.known["LORA"] is fastft.LoRA  # a subclass is no new kind of file
    handle = fastft.attach(model, Counting(target_modules=["q_proj"]))
    optimizer = handle.optimizer(lr=1e-2, weight_decay=0.1)
    assert optimizer.defaults["fused"] and optimizer.defaults["weight_decay"] == 0.1
    handle.step()
    torch.optim.SGD([torch.ones(1, requires_grad=True)]).step()  # an optimizer of something else
    handle.step()
    assert not calls
    for expected, stepping in enumerate((optimizer, optimizer, torch.optim.SGD(model.parameters())), 1):
        model(X, labels=X).loss.backward()
        stepping.step()
        handle.step()
        handle.step()
        assert calls == [handle] * expected


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainer_with_callback_resumes_bit_for_bit(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 6)]

    def run(folder, steps, resume=None, reentrant=False):
        model = llama()
        torch.manual_seed(1)
        handle = fastft.attach(model, fastft.LoRA(r=4, target_modules="all-linear", lora_dropout=0.1))
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            disable_tqdm=True,
            logging_steps=1,
            gradient_checkpointing=reentrant,
            gradient_checkpointing_kwargs={"use_reentrant": True} if reentrant else None,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[handle.callback()])
        trainer.train(resume_from_checkpoint=resume)
        return handle

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4, resume=True)
    for (name, one), two in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, two), name
    loaded = fastft.load(llama(), tmp_path / "whole" / "checkpoint-4" / "adapter")
    for one, two in zip(whole.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, two)
    checkpointed = run(tmp_path / "reentrant", 2, reentrant=True)
    assert all(p.abs().max() > 0 for n, p in checkpointed.named_parameters() if "lora_B" in n)


def test_trainer_that_forgot_the_adapter(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = fastft.attach(model, fastft.LoRA(target_modules=["q_proj"]))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 6)]
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[handle.callback()],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    with pytest.raises(RuntimeError, match=r"4 parameters of adapter 'default' are not in the optimizer"):
        trainer.train()


def test_an_update_while_merged_is_refused():
    handle = attached(llama())
    optimizer = handle.optimizer(lr=0.1)
    for parameter in handle.parameters():
        parameter.grad = torch.ones_like(parameter)
    handle.merge()
    with pytest.raises(RuntimeError, match="while it is merged.*unmerge"):
        optimizer.step()


def test_an_optimizer_without_the_adapter_is_noticed():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made before attach: it holds no adapter
    handle = fastft.attach(model, fastft.LoRA(r=2, target_modules=["q_proj"]))
    model(X).logits.sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="no optimizer that holds its parameters"):
        handle.step()


class Reads(nn.Module):
    """The second layer's weight is read without a call."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.c(nn.functional.linear(self.a(x), self.b.weight))


def test_layers_that_no_gradient_reaches_are_named_once():
    model = Reads()
    handle = fastft.attach(model, fastft.LoRA(r=2, target_modules=["a", "b", "c"]))
    optimizer = handle.optimizer()
    model(torch.randn(4, 6)).sum().backward()
    with pytest.warns(UserWarning, match=r"no gradient reached b.lora_A.default, b.lora_B.default of adapter 'default'"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_parameters_without_gradients_for_good_reasons_are_not_named():
    """Frozen, in another optimizer, stepped one by one in backward, or all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in ("frozen", "others", "in backward", "all"):
            model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
            handle = attached(model, target_modules=["0", "1"])
            first, *rest = handle.parameters()
            if case == "frozen":
                first.requires_grad_(False)
            optimizers = [torch.optim.SGD([p], lr=0.1) for p in (first, *rest)]
            optimizers = [handle.optimizer()] if case in ("frozen", "all") else optimizers
            if case == "in backward":
                for parameter, optimizer in zip((first, *rest), optimizers, strict=True):
                    parameter.register_post_accumulate_grad_hook(lambda p, o=optimizer: o.step() or o.zero_grad())
            if case != "all":
                model(torch.randn(4, 6)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            assert handle._ever_updated


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("method", [fastft.S2FT(down_ratio=0.1), fastft.LIFT(density=0.05)], ids=["s2ft", "lift"])
def test_any_optimizer_updates_what_it_holds(method, several, fused):
    """Also without the first parameter, and several of them: what fused ones change counts no version."""
    model = llama()
    handle = fastft.attach(model, method)
    frozen, *trained = handle.parameters()
    frozen.requires_grad_(False)
    groups = [[p] for p in trained] if several else [trained]
    optimizers = [torch.optim.AdamW(group, lr=0.1, fused=fused) for group in groups]
    before = model(X, labels=X).loss
    before.backward()
    for optimizer in optimizers:
        optimizer.step()
    after = model(X, labels=X).loss
    handle.refresh()
    assert after != before and torch.equal(model(X, labels=X).loss, after)
    assert handle._updated


def test_a_trainer_may_leave_out_what_is_frozen():
    handle = attached(llama())
    next(handle.parameters()).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in handle.parameters() if p.requires_grad])
    handle.callback().on_train_begin(None, transformers.TrainerState(max_steps=1), None, optimizer=optimizer)


def test_pickling_an_attached_model():
    import pickle

    model = llama()
    attached(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), logits(model))
    handles(twin)["default"].merge()
    torch.testing.assert_close(logits(twin), logits(model))


@pytest.mark.parametrize("method", [fastft.LoRA(target_modules=["up"]), fastft.SparseMask(indices={"up": [1, 5]})])
def test_what_was_attached_in_inference_mode_trains(method):
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(6, 4)})
    with torch.inference_mode():
        handle = fastft.attach(model, method)
        model.up(torch.ones(6))
    optimizer = handle.optimizer(lr=0.1)
    model.up(torch.ones(6)).sum().backward()
    optimizer.step()
    assert all(parameter.any() for parameter in handle.parameters())
