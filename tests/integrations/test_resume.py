"""A run that stops, or is killed, and goes on comes to what it would have come to anyway; else it is refused."""

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import lr_scheduler

import deltaopt
from deltaopt import DeltaLoRAOptimizer, WeightMismatchError
from tests.support import crash_loop
from tests.support.compare import assert_same_bits, bits
from tests.support.models import (
    RATIO,
    Rows,
    batches,
    causal_lm,
    deltas,
    loss_of,
    optimizer_for,
    peft,
    transformers,
    weights,
)

pytestmark = [
    # PEFT asks transformers models by a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What torch says of a checkpoint of one process, which is what these tests write.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]

STOP, DATA = 4, batches(8)

REBUILT = 1e-6
"""A float32 W that was rebuilt from its ledger, and what was trained with it since: relative, Frobenius norm."""

each_kind = pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "auto"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "compensated")],
    ids=["float32", "bfloat16", "bfloat16-compensated"],
)


class Run:
    """A model in training with all that a checkpoint has to bring back. The factors are float32, as PEFT has them."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model = causal_lm(dtype, factors=torch.float32)
        self.optimizer = optimizer_for(self.model, **options)
        self.scheduler = lr_scheduler.OneCycleLR(self.optimizer, max_lr=2e-2, total_steps=2 * len(DATA))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)

    def train(self, data: list[Tensor]) -> None:
        for ids in data:
            self.optimizer.zero_grad()
            self.scaler.scale(loss_of(self.model, ids)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **self.small_state()}

    def small_state(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.load_small(state)

    def load_small(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])


def begun(dtype: torch.dtype = torch.float32, start_step: int = 1, rounding: str = "auto") -> Run:
    """A run that is to be resumed."""
    return Run(dtype, start_step=start_step, rounding=rounding, rounding_seed=1)


def fresh(dtype: torch.dtype = torch.float32, pristine: bool = False, rounding: str = "auto") -> Run:
    """What a new process has: settings of its own, other factors, and a base that is the pristine one or another."""
    run = Run(dtype, start_step=99, rounding=rounding)
    run.optimizer.groups[0].update_ratio = 3.0
    scramble(run.model, lambda name: "lora_" in name or not pristine)
    return run


@torch.no_grad()
def scramble(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        if chosen(name):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal, their tensors bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def assert_same_runs(run: Run, other: Run) -> None:
    """Down to the ledgers, the moments and the schedule."""
    assert_same_bits(other.model, bits(run.model))
    assert same(run.state(), other.state())


def assert_close(model: nn.Module, other: nn.Module, tolerance: float = REBUILT) -> None:
    """The parameters are equal to rounding."""
    expected = bits(model)
    for name, parameter in other.named_parameters():
        assert relative(parameter, expected[name]) <= tolerance, name


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.double()).norm() / b.double().norm())


def adapter_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "lora_" in key}


def by_torch_save(run: Run, folder: Path) -> None:
    torch.save(run.state(), folder / "last.pt")


def by_torch_load(run: Run, folder: Path) -> None:
    run.load(torch.load(folder / "last.pt", weights_only=True))


def by_deltaopt_save(run: Run, folder: Path) -> None:
    deltaopt.save(run.state(), folder / "last.pt")


def by_deltaopt_load(run: Run, folder: Path) -> None:
    run.load(deltaopt.load(folder / "last.pt"))


def by_dcp_save(run: Run, folder: Path, **options: Any) -> None:
    states = dcp.get_state_dict(run.model, run.optimizer, options=dcp.StateDictOptions(**options))
    checkpoint.save(
        {**dict(zip(("model", "optimizer"), states, strict=True)), **run.small_state()}, checkpoint_id=folder
    )


def by_dcp_load(run: Run, folder: Path, **options: Any) -> None:
    """As torch's recipe has it: the state of the fresh objects says what is read from the files."""
    options = dcp.StateDictOptions(**options)
    model, optimizer = dcp.get_state_dict(run.model, run.optimizer, options=options)
    state = {"model": model, "optimizer": optimizer, **run.small_state()}
    checkpoint.load(state, checkpoint_id=folder)
    dcp.set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    run.load_small(state)


FULL = {"full_state_dict": True, "cpu_offload": True}


def by_full_dcp_save(run: Run, folder: Path) -> None:
    options = dcp.StateDictOptions(**FULL)
    state = {
        "model": dcp.get_model_state_dict(run.model, options=options),
        "optimizer": dcp.get_optimizer_state_dict(run.model, run.optimizer, options=options),
    }
    torch.save({**state, **run.small_state()}, folder / "last.pt")


def by_full_dcp_load(run: Run, folder: Path) -> None:
    state = torch.load(folder / "last.pt", weights_only=True)
    options = dcp.StateDictOptions(**FULL)
    dcp.set_model_state_dict(run.model, state["model"], options=options)
    dcp.set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=options)
    run.load_small(state)


def by_adapter_save(run: Run, folder: Path) -> None:
    torch.save({**run.state(), "model": peft.get_peft_model_state_dict(run.model)}, folder / "last.pt")


def by_adapter_load(run: Run, folder: Path) -> None:
    state = torch.load(folder / "last.pt", weights_only=True)
    peft.set_peft_model_state_dict(run.model, state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.load_small(state)


WHOLE = {
    "torch.save": (by_torch_save, by_torch_load),
    "deltaopt.save": (by_deltaopt_save, by_deltaopt_load),
    "dcp": (by_dcp_save, by_dcp_load),
    "dcp_full": (by_full_dcp_save, by_full_dcp_load),
}
ADAPTER = {
    "torch.save": (by_adapter_save, by_adapter_load),
    "dcp": tuple(functools.partial(by, ignore_frozen_params=True, strict=False) for by in (by_dcp_save, by_dcp_load)),
}


@each_kind
@pytest.mark.parametrize("way", WHOLE)
def test_with_the_whole_model_a_run_goes_on_bit_for_bit(way, dtype, rounding, tmp_path):
    save, load = WHOLE[way]
    run, other = begun(dtype, rounding=rounding), fresh(dtype, rounding=rounding)
    run.train(DATA[:STOP])
    save(run, tmp_path)
    run.train(DATA[STOP:])
    load(other, tmp_path)
    assert other.optimizer.step_count == STOP
    other.train(DATA[STOP:])
    assert_same_runs(run, other)


@each_kind
def test_a_run_goes_back_to_its_own_checkpoint_bit_for_bit(dtype, rounding):
    """In the same process, with the same objects."""
    run = begun(dtype, rounding=rounding)
    run.train(DATA[:STOP])
    state = copy.deepcopy(run.state())
    run.train(DATA[STOP:])
    end = copy.deepcopy(run.state())
    run.load(state)
    run.train(DATA[STOP:])
    assert same(run.state(), end)


@each_kind
def test_accelerate_goes_on_bit_for_bit(dtype, rounding, accelerator_of, tmp_path):
    """`prepare` of the fresh objects loads the optimizer's own state, then `load_state` the saved one."""

    def prepared(accelerator, run):
        run.scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
        run.model, optimizer, run.scheduler = accelerator.prepare(run.model, run.optimizer, run.scheduler)

        def train(data):
            for ids in data:
                optimizer.zero_grad()
                accelerator.backward(loss_of(run.model, ids))
                optimizer.step()
                run.scheduler.step()

        return train

    run, other, accelerator = begun(dtype, rounding=rounding), fresh(dtype, rounding=rounding), accelerator_of()
    train = prepared(accelerator, run)
    train(DATA[:STOP])
    accelerator.save_state(tmp_path)
    train(DATA[STOP:])

    accelerator = accelerator_of()
    go_on = prepared(accelerator, other)
    accelerator.load_state(tmp_path)
    assert other.optimizer.step_count == STOP
    go_on(DATA[STOP:])
    assert_same_runs(run, other)


@pytest.mark.parametrize("start_step", [1, STOP + 2])
@pytest.mark.parametrize("way", ADAPTER)
def test_from_the_base_and_the_adapter_a_run_goes_on_to_rounding(way, start_step, tmp_path):
    """Whether W had moved when it was saved, or was still to."""
    save, load = ADAPTER[way]
    run, other = begun(start_step=start_step), fresh(pristine=True)
    base = weights(other.model)
    run.train(DATA[:STOP])
    save(run, tmp_path)
    load(other, tmp_path)
    assert_close(run.model, other.model)
    moved = [relative(W, base[name]) for name, W in weights(other.model).items()]
    assert all(change > 1000 * REBUILT for change in moved) if start_step < STOP else not any(moved)
    for r in (run, other):
        r.train(DATA[STOP:])
    assert_close(run.model, other.model)
    assert all(relative(W, base[name]) > 1000 * REBUILT for name, W in weights(other.model).items())


@pytest.mark.parametrize("way", ADAPTER)
def test_a_bfloat16_weight_is_rebuilt_with_one_rounding_and_says_so(way, tmp_path):
    save, load = ADAPTER[way]
    run, other = begun(torch.bfloat16), fresh(torch.bfloat16, pristine=True)
    base = {triple.name: triple.W.double() for triple in other.optimizer.triples}
    run.train(DATA[:STOP])
    save(run, tmp_path)
    with pytest.warns(
        RuntimeWarning, match=rf"16-bit W of {len(base)} layers .* was rebuilt .*, rounded once"
    ) as caught:
        load(other, tmp_path)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    for triple, saved in zip(other.optimizer.triples, run.optimizer.triples, strict=True):
        exact = base[triple.name] + run.optimizer.displacement(triple.name).product().double()
        W = triple.W.double()
        spacing = torch.ldexp(torch.ones_like(W), torch.frexp(W).exponent - 8)  # 8 bits from 1/2 on
        assert bool(((W - exact).abs() <= 1.001 * spacing).all())  # a neighbour: rounded stochastically
        assert not torch.equal(triple.W, saved.W)  # that one was rounded at each step
    assert same(adapter_of(other.model.state_dict()), adapter_of(run.model.state_dict()))
    before = weights(other.model)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert all(torch.equal(W, before[name]) for name, W in weights(other.model).items())
    other.train(DATA[STOP:])


def trainer_for(model: nn.Module, folder: Path, route: str, **options: Any) -> tuple[transformers.Trainer, list]:
    """A Trainer that saves at steps 3 and 6 of 8, and the list of the batches that it will have seen."""
    arguments = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 3,
        "disable_tqdm": True,
        **options,
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=Rows(9),
        eval_dataset=Rows(2),
        **ROUTES[route](model),
    )
    seen, compute_loss = [], trainer.compute_loss

    def listening(model, inputs, **kwargs):
        seen.append(inputs["input_ids"].clone())
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = listening
    return trainer, seen


class Factory:
    """No Optimizer class, hence called as `Factory()(model, **options)`, with the adapters loaded already."""

    def __call__(self, model: nn.Module, **options: Any) -> DeltaLoRAOptimizer:
        return DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, **options)


ROUTES = {
    "optimizers": lambda model: {"optimizers": (optimizer_for(model, start_step=2), None)},
    "factory": lambda model: {
        "optimizer_cls_and_kwargs": (Factory, {"lr": 1e-2, "update_ratio": RATIO, "start_step": 2})
    },
}


@pytest.mark.parametrize("route", ROUTES)
def test_trainer_resumes_from_the_base_and_the_adapter(route, accelerator_of, tmp_path):
    """From either checkpoint, from one twice, and from the checkpoint of a run that was itself resumed."""

    def ran(name, resume_from=None):
        trainer, seen = trainer_for(causal_lm(torch.float32), tmp_path / name, route)
        trainer.train(resume_from_checkpoint=resume_from)
        assert trainer.optimizer.optimizer.step_count == trainer.state.global_step == 8
        return trainer.model, seen

    whole, seen = ran("whole")
    middle = str(tmp_path / "whole" / "checkpoint-3")
    assert not (tmp_path / "whole" / "checkpoint-3" / "model.safetensors").exists()
    resumed, seen_then = ran("resumed", middle)
    assert len(seen) == 16
    assert same(seen[6:], seen_then)
    assert_close(whole, resumed)
    assert_same_bits(ran("again", middle)[0], bits(resumed))
    assert_close(whole, ran("late", str(tmp_path / "whole" / "checkpoint-6"))[0])
    assert_close(whole, ran("chain", str(tmp_path / "resumed" / "checkpoint-6"))[0])


def test_trainer_trained_twice_on_one_model_is_refused_at_the_second_resume(accelerator_of, tmp_path):
    """W is then what the first run left it at, neither the base nor what was saved: it takes a fresh model."""
    model = causal_lm(torch.float32)
    trainer, _ = trainer_for(model, tmp_path, "optimizers")
    trainer.train()
    end = weights(model)
    with pytest.raises(WeightMismatchError, match=r"W has other contents .* not what it was before its first move"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(model), end)


class Watch(transformers.TrainerCallback):
    """Notes the effective weight of every layer after each step."""

    def __init__(self) -> None:
        self.effective: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.effective[state.global_step] = effective(model)


def effective(model: nn.Module) -> dict[str, Tensor]:
    change = deltas(model)
    return {name: W + change[name] for name, W in weights(model).items()}


@pytest.mark.parametrize("route", ROUTES)
def test_resync_after_load_best_model_at_end_gives_the_best_step(route, accelerator_of, tmp_path):
    """Trainer has put the best step's A and B beside the last step's W."""
    model, watch = causal_lm(torch.float32), Watch()
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer, _ = trainer_for(
        model, tmp_path, route, load_best_model_at_end=True, metric_for_best_model="score", **every_step
    )
    trainer.compute_metrics = lambda predictions: {"score": -abs(trainer.state.global_step - 5)}
    trainer.add_callback(watch)
    trainer.train()
    assert trainer.state.best_global_step == 5
    expected = watch.effective[5]
    assert all(relative(W, expected[name]) > 1000 * REBUILT for name, W in effective(model).items())
    trainer.optimizer.optimizer.resync()
    assert all(relative(W, expected[name]) <= REBUILT for name, W in effective(model).items())
    W = weights(model)
    trainer.optimizer.optimizer.resync()
    assert same(weights(model), W)


def test_dcp_carries_ledgers_of_several_terms_into_a_fresh_optimizer(tmp_path):
    """The fresh optimizer says what is read, and has no term of its own."""
    run, others = begun(), (fresh(), fresh(pristine=True))
    for ratio, data in ((RATIO, DATA[:2]), (1.1, DATA[2:4]), (0.4, DATA[4:6])):
        run.optimizer.groups[0].update_ratio = ratio
        run.train(data)
    assert all(len(account.ledger.terms) == 3 for account in run.optimizer.accounts())
    options: dict[str, Any] = {"ignore_frozen_params": True, "strict": False}
    by_dcp_save(run, tmp_path / "whole")
    by_dcp_save(run, tmp_path / "adapter", **options)
    by_dcp_load(others[0], tmp_path / "whole")
    by_dcp_load(others[1], tmp_path / "adapter", **options)
    for r in (run, *others):
        assert r.optimizer.groups[0].update_ratio == 0.4
        r.train(DATA[6:])
    assert_same_runs(run, others[0])
    assert_close(run.model, others[1].model)


def test_a_flattened_optimizer_state_is_refused_when_it_is_saved():
    """By torch: it would drop what can not be told for each parameter."""
    run = begun()
    run.train(DATA[:2])
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
    with pytest.raises(NotImplementedError, match=r"Flattening optimizer state_dict only supports .*'str'"):
        dcp.get_optimizer_state_dict(run.model, run.optimizer, options=options)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda run: pickle.loads(pickle.dumps(run))}


@each_kind
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_run_goes_on_bit_for_bit(way, dtype, rounding):
    """With its model, in the middle; and the two have nothing in common."""
    run = begun(dtype, rounding=rounding)
    run.train(DATA[:STOP])
    other = COPIES[way](run)
    middle = copy.deepcopy(run.state())
    other.train(DATA[STOP:])
    assert same(run.state(), middle)
    run.train(DATA[STOP:])
    assert_same_runs(run, other)


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Any], str]:
    """A whole state of a run at STOP, and the name of one of its layers."""
    run = begun()
    run.train(DATA[:STOP])
    return run.state(), run.optimizer.triples[3].name


def target(model_state: dict[str, Tensor] | None = None) -> Run:
    """What a state is loaded into: a model, and an optimizer with moments and a step count of its own."""
    run = fresh(pristine=True)
    run.optimizer.groups[0].update_ratio = 0.0
    run.train(DATA[:2])
    if model_state is not None:
        run.model.load_state_dict(model_state, strict=False)
    return run


def refused(run: Run, state: Any, error: type[Exception], message: str) -> str:
    """Loading `state` raises, and leaves the model and the optimizer as they are."""
    before = copy.deepcopy(everything_of(run))
    objects = [id(run.optimizer.inner), id(run.optimizer.state), *map(id, run.model.parameters())]
    with pytest.raises(error, match=message) as caught:
        run.optimizer.load_state_dict(state)
    assert same(everything_of(run), before)
    assert [id(run.optimizer.inner), id(run.optimizer.state), *map(id, run.model.parameters())] == objects
    return str(caught.value)


def everything_of(run: Run) -> list[Any]:
    groups = [[group.update_ratio, group.start_step] for group in run.optimizer.groups]
    counts = [run.optimizer.step_count, run.optimizer.skipped_updates]
    return [bits(run.model), run.state(), groups, counts]


def named_in(message: str) -> list[tuple[str, str]]:
    """(layer, letter) of each line of a WeightMismatchError."""
    lines = [line.strip().split(": ") for line in message.splitlines() if line.startswith("  ")]
    return [(name, told[0]) for name, told in lines]


def names(run: Run) -> list[str]:
    return [triple.name for triple in run.optimizer.triples]


def test_an_optimizer_state_that_is_loaded_before_the_adapter(trained):
    run = target()
    message = refused(run, trained[0]["optimizer"], WeightMismatchError, "Load the model's weights .* before the opt")
    assert named_in(message) == [(name, letter) for name in names(run) for letter in "AB"]


@pytest.mark.parametrize("pristine", [True, False])
def test_the_factors_of_another_adapter(trained, pristine):
    """In one layer; the others' W would be rebuilt, or is what was saved."""
    state, name = trained
    run = target(adapter_of(state["model"]) if pristine else state["model"])
    scramble(run.model, lambda parameter: parameter.startswith(name) and "lora_" in parameter)
    message = refused(run, state["optimizer"], WeightMismatchError, "A has other contents than when the state was sav")
    assert named_in(message) == [(name, "A"), (name, "B")]


@pytest.mark.parametrize("pristine", [True, False])
def test_a_weight_that_was_pruned(trained, pristine):
    """It is refused by the names of the layers; as the new base it is gone on with."""
    state, name = trained
    run = target(adapter_of(state["model"]) if pristine else state["model"])
    pruned = [name, names(run)[-1]]
    for triple in run.optimizer.triples:
        if triple.name in pruned:
            triple.W[0, 0] = 0.0
    message = refused(run, state["optimizer"], WeightMismatchError, r"deltaopt.without_ledger\(state\)")
    assert named_in(message) == [(layer, "W") for layer in pruned]

    W = weights(run.model)
    run.optimizer.load_state_dict(deltaopt.without_ledger(state["optimizer"]))
    assert same(weights(run.model), W)
    assert run.optimizer.step_count == STOP
    moments = {key: value["exp_avg"] for key, value in state["optimizer"]["state"].items()}
    assert same({key: value["exp_avg"] for key, value in run.optimizer.state_dict()["state"].items()}, moments)
    before = {triple.name: triple.W.clone() for triple in run.optimizer.triples}
    run.train(DATA[STOP:])
    for triple in run.optimizer.triples:
        moved = run.optimizer.displacement(triple.name).product()
        assert relative(before[triple.name] + moved, triple.W) <= REBUILT
        assert float(moved.norm()) > 1000 * REBUILT * float(triple.W.norm())


def test_a_checkpoint_that_was_cut_off(tmp_path):
    """As a plain torch.save leaves it when it is killed, wherever that was."""
    run = begun()
    run.train(DATA[:2])
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save(run.state(), whole)
    content = whole.read_bytes()
    deltaopt.load(whole)
    for size in {*range(0, len(content), len(content) // 60), *range(8), *(len(content) - n for n in range(1, 30))}:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut.pt can not be read, it was cut off"):
            deltaopt.load(cut)


def first_ledger(state: dict[str, Any]) -> Any:
    """The number of the parameter whose state holds the first ledger."""
    return next(number for number, entries in state["state"].items() if entries["deltaopt"])


def test_an_edited_ledger(trained):
    state = copy.deepcopy(trained[0]["optimizer"])
    run = target(trained[0]["model"])
    number = first_ledger(state)
    text = state["state"][number]["deltaopt"]
    for place in range(0, len(text), max(1, len(text) // 12)):
        state["state"][number]["deltaopt"] = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        refused(run, state, ValueError, "a saved ledger was edited or cut off: its checksum differs")
    state["state"][number]["deltaopt"] = text[:-1]
    refused(run, state, ValueError, "a saved ledger was edited or cut off: its checksum differs")
    state["state"][number]["deltaopt"] = text
    run.optimizer.load_state_dict(state)


def test_a_missing_ledger(trained):
    state, run = copy.deepcopy(trained[0]["optimizer"]), target(trained[0]["model"])
    state["state"][first_ledger(state)]["deltaopt"] = ""
    refused(run, state, ValueError, rf"no ledger for {names(run)[0]}: .* dropped or cut the optimizer's `state`")


def test_a_state_without_its_states(trained):
    """Some tools keep the param groups alone."""
    state, run = trained[0]["optimizer"], target(trained[0]["model"])
    message = refused(run, {**state, "state": {}}, ValueError, "has no ledger for .* dropped or cut the opt")
    assert all(name in message for name in names(run))


@pytest.mark.parametrize("keeps", ["whole", "adapter"])
def test_a_run_that_is_killed_again_and_again_comes_to_what_it_would_have(keeps, tmp_path):
    """25 times, at any moment, many of them in the middle of a save: the file is an old one or a new one, always."""
    steps, kills, killed = 200, 25, tmp_path / "killed.pt"
    command = [sys.executable, "-m", "tests.support.crash_loop", killed, keeps, *map(str, (steps, kills, 0))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0, "no kill fell into a save"

    crash_loop.train(tmp_path / "whole.pt", keeps, steps)
    ends = [deltaopt.load(path) for path in (tmp_path / "whole.pt", killed)]
    assert ends[0]["step"] == ends[1]["step"] == steps
    if keeps == "whole":
        assert same(*ends)
    else:
        assert same(*(end["scheduler"] for end in ends))
    # Of an adapter, W too: this rebuilds it.
    whole, resumed = (crash_loop.train(path, keeps, steps) for path in (tmp_path / "whole.pt", killed))
    assert_close(whole, resumed, 0.0 if keeps == "whole" else REBUILT)
