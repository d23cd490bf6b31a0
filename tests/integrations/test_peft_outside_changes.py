"""Adapters that are loaded or averaged into a model whose W has moved in place: the first evaluation says so, once."""

import copy
import warnings

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer
from tests.integrations.test_trainer import trainer_for, wrapped
from tests.support import internals
from tests.support.compare import bits
from tests.support.models import batches, loss_of, peft
from tests.support.peft_runs import ModelRun, peft_asks_by_an_old_name

pytestmark = [peft_asks_by_an_old_name, pytest.mark.extra]

TOLD = r"A and B of \d+ layers \(.*\) are not those that the last move of W left.*optimizer\.resync\(\), or load"
DATA = batches(4)


@pytest.fixture
def run():
    return ModelRun().train(DATA[:1])


def evaluate(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=DATA[0]).logits


def adapter(run):
    with warnings.catch_warnings(action="ignore"):  # it says that W is not in it
        return copy.deepcopy(peft.get_peft_model_state_dict(run.model))


def by_peft(run, best, folder):
    peft.set_peft_model_state_dict(run.model, best)


def by_torch(run, best, folder):
    state = {name.replace(".weight", ".default.weight"): value for name, value in best.items()}
    assert not run.model.load_state_dict(state, strict=False).unexpected_keys


def by_data(run, best, folder):
    for p in run.factors():
        p.data.copy_(p.data * 0.5)


def by_copy(run, best, folder):
    with torch.no_grad():
        for p in run.factors():
            p.copy_(p * 0.5)


def by_exchange(run, best, folder):
    for p in run.factors():
        p.data = p.data * 0.5


def by_a_folder(run, best, folder):
    other = ModelRun()
    peft.set_peft_model_state_dict(other.model, best)
    with warnings.catch_warnings(action="ignore"):
        other.model.save_pretrained(folder)
    run.model.load_adapter(folder, "default", is_trainable=True)


WAYS = {way.__name__: way for way in (by_peft, by_torch, by_data, by_copy, by_exchange, by_a_folder)}


@pytest.mark.parametrize("way", WAYS)
def test_the_first_evaluation_says_so_once(way, run, tmp_path):
    best = adapter(run)
    run.train(DATA[1:])
    evaluate(run.model)
    WAYS[way](run, best, tmp_path)
    with pytest.warns(UserWarning, match=TOLD) as caught:
        evaluate(run.model)
    assert len(caught) == 1
    evaluate(run.model)
    run.optimizer.resync()
    evaluate(run.model)
    WAYS["by_copy"](run, best, tmp_path)
    with pytest.warns(UserWarning, match=TOLD):
        evaluate(run.model)


def test_no_false_alarm(run):
    """Within our own events and after them, in rests, for casts, with the adapter off, and for copies."""
    evaluate(run.model)
    optimizer = run.optimizer
    for event in (optimizer.resync, optimizer.restart, optimizer.rebase):
        by_copy(run, None, None)
        event()
        evaluate(run.model)
        run.train(DATA)
        evaluate(run.model)
    state = copy.deepcopy(run.state())
    run.train(DATA[:2])
    run.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    evaluate(run.model)
    with optimizer.base_weights():
        by_copy(run, None, None)
        evaluate(run.model)
        run.model.load_state_dict({k: v for k, v in state["model"].items() if "lora_" in k}, strict=False)
    evaluate(run.model)
    by_copy(run, None, None)
    with run.model.disable_adapter():
        evaluate(run.model)
    optimizer.resync()
    evaluate(run.model.float())
    evaluate(run.model.double())
    optimizer.groups[0].update_ratio = 0.0
    run.train(DATA[:1])
    evaluate(run.model)
    by_copy(run, None, None)
    evaluate(run.model)


def test_not_before_the_first_move_and_not_folded():
    for options in ({"start_step": 3}, {"rule": "folded", "start": "later"}):
        run = ModelRun(**options).train(DATA[:2] if "rule" not in options else DATA)
        by_copy(run, None, None)
        evaluate(run.model)


def test_not_where_a_closure_evaluates():
    """Look at no factors that are on their way within a step."""
    run = ModelRun()
    optimizer = DeltaLoRAOptimizer.for_model(run.model, torch.optim.LBFGS, lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(run.model.eval(), DATA[0])
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    evaluate(run.model)


def test_on_a_gpu_too():
    run = ModelRun(internals.as_on_a_gpu(reports=iter(lambda: False, True))).train(DATA)
    evaluate(run.model)
    by_copy(run, None, None)
    with pytest.warns(UserWarning, match=TOLD):
        evaluate(run.model)


def test_in_a_compiled_model_the_mode_of_the_optimizer_says_so(run):
    """A graph looks at no factors; `eval`, which Trainer calls, does."""
    compiled = torch.compile(run.model, backend="eager", dynamic=False)
    before = evaluate(compiled)
    torch.testing.assert_close(before, evaluate(run.model), rtol=0, atol=1e-12)
    by_copy(run, None, None)
    evaluate(compiled)
    with pytest.warns(UserWarning, match=TOLD):
        run.optimizer.eval()


def test_trainer_that_loads_its_best_model(accelerator_of, tmp_path):
    """In place, without a callback: the evaluation after the training says so, and resync() mends it."""
    run = ModelRun()
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the best one is not the last one
    }
    trainer, _ = trainer_for(run.model, tmp_path, arguments=arguments)
    trainer.train()
    optimizer, best = wrapped(trainer), trainer.state.best_metric
    assert trainer.state.best_global_step < trainer.state.global_step
    with pytest.warns(UserWarning, match=TOLD):
        stale = trainer.evaluate()["eval_loss"]
    assert abs(stale - best) > 1e-6
    optimizer.resync()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-9)


AT_THE_BASE = r"the W of 10 layers \(.*\) was written by somebody else since.*neither is the output without the adapter"


def reference(run):
    """Evaluate the base, as DPO and GRPO do at each step."""
    with run.model.disable_adapter():
        return evaluate(run.model)


@torch.no_grad()
def average_all(run, earlier):
    for name, p in run.model.named_parameters():
        p.lerp_(earlier[name], 0.5)


def test_the_output_without_the_adapter_says_that_it_is_not_the_base():
    """After an average of the whole model; once, and not of one that is the base of what comes."""
    pristine = reference(ModelRun())
    run = ModelRun().train(DATA[:1])
    earlier = bits(run.model)
    run.train(DATA[1:])
    torch.testing.assert_close(reference(run), pristine, rtol=0, atol=1e-9)
    average_all(run, earlier)
    with pytest.warns(UserWarning, match=AT_THE_BASE) as caught:
        found = reference(run)
    assert len(caught) == 1
    assert float((found - pristine).abs().max()) > 1e-4
    average_all(run, earlier)
    reference(run)
    run.optimizer.rebase()
    found = reference(run)
    run.train(DATA)
    torch.testing.assert_close(reference(run), found, rtol=0, atol=1e-9)
    average_all(run, earlier)
    with pytest.warns(UserWarning, match=AT_THE_BASE):
        reference(run)


def test_no_false_alarm_at_the_base(run):
    """Where the present bits are written again, the base is loaded, or W is at its base or in a resumed run."""
    pristine = {name: p for name, p in ModelRun().model.state_dict().items() if "lora_" not in name}
    run.model.load_state_dict(run.model.state_dict())
    before = reference(run)
    state = copy.deepcopy(run.state())
    run.train(DATA)
    reference(run)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    torch.testing.assert_close(reference(run), before, rtol=0, atol=1e-9)
    with run.optimizer.base_weights():
        reference(run)
    reference(run)
    run.model.load_state_dict(pristine, strict=False)
    reference(run)
    run.optimizer.load_state_dict(state["optimizer"])
    torch.testing.assert_close(reference(run), before, rtol=0, atol=1e-9)
    run.optimizer.restart()
    run.train(DATA)
    torch.testing.assert_close(reference(run), before, rtol=0, atol=1e-9)
