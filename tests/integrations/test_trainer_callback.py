"""DeltaLoRACallback: adapters of checkpoints, their push, the best model, the logs, and a run without movement."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, find_triples
from deltaopt.integrations.trainer import DeltaLoRACallback, DeltaLoRAFactory
from tests.support.compare import relative
from tests.support.models import RATIO, Rows, causal_lm, deltas, transformers, weights
from tests.support.nightly import later
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.trainer_runs import Run, arguments, distance, logits_from, logits_of, trainer_of

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

EXACT = 2e-5
"""Logits of float32 models that are the same; they differ by 0.1 and more where W's movement is missing."""

each_movement = pytest.mark.parametrize(
    ("rule", "start"), [("in_place", "zero"), ("in_place", "later"), ("folded", "later")]
)


@each_movement
def test_each_checkpoint_has_an_adapter_that_is_the_trained_model(rule, start, accelerator_of, tmp_path):
    run = Run(tmp_path, rule, start, max_steps=4).train()
    steps = [4] if start == "later" else [2, 4]
    assert sorted(tmp_path.glob("checkpoint-*/export")) == [tmp_path / f"checkpoint-{step}/export" for step in steps]
    for step in steps:
        trained = run.record.logits[step]
        assert distance(logits_from(tmp_path / f"checkpoint-{step}" / "export"), trained) < EXACT
        assert not (tmp_path / f"checkpoint-{step}" / "deltaopt_state.pt").exists()


@pytest.mark.parametrize(("start", "step", "rank", "server"), [("zero", 2, 3, 8), ("later", 4, 6, 8)])
def test_the_log_says_once_what_a_server_has_to_allow(start, step, rank, server, accelerator_of, tmp_path, caplog):
    """The rank that was written, and the next one of 1, 8, 16, ..., which vLLM takes."""
    with caplog.at_level(logging.WARNING):
        Run(tmp_path, start=start, max_steps=4).train()
    said = [record.getMessage() for record in caplog.records if "to serve" in record.getMessage()]
    words = f"is the adapter to use and to serve (rank {rank}; vLLM: --max-lora-rank {server})"
    assert said == [
        f"DeltaLoRACallback: {tmp_path}/checkpoint-{step}/export {words}. The adapter in {tmp_path}/checkpoint-{step} "
        "itself is for resuming: W has moved with it."
    ]


def test_a_callback_that_inherits_counts_as_well(accelerator_of, tmp_path):
    """It writes the movement next to the adapter, so that a save warns of nothing: a warning would be an error."""

    class Own(DeltaLoRACallback):
        pass

    run = Run(tmp_path, save_only_model=True, max_steps=2)
    run.trainer.remove_callback(DeltaLoRACallback)
    run.trainer.add_callback(Own())
    run.train()
    assert (tmp_path / "checkpoint-2" / "export").is_dir()


def test_where_no_w_has_moved_the_checkpoint_itself_is_right(accelerator_of, tmp_path):
    run = Run(tmp_path, "folded", "zero", max_steps=4).train()
    for step in (2, 4):
        assert not (tmp_path / f"checkpoint-{step}" / "export").exists()
        assert distance(logits_from(tmp_path / f"checkpoint-{step}"), run.record.logits[step]) < EXACT


def test_an_adapter_of_an_earlier_run_does_not_stay(accelerator_of, tmp_path):
    Run(tmp_path, "in_place", max_steps=2).train()
    run = Run(tmp_path, "folded", options={"lr": 2e-2}, max_steps=2).train()
    for step in (2,):
        assert distance(logits_from(tmp_path / f"checkpoint-{step}" / "export"), run.record.logits[step]) < EXACT


def test_an_adapter_that_cannot_be_written_is_named(accelerator_of, tmp_path):
    """An optimizer that has been given three of the layers: the change of the others is not known to it."""
    model = causal_lm(torch.float32)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, find_triples(model)[:3], lr=1e-2)
    args = arguments(tmp_path, max_steps=1, save_strategy="steps")
    trainer = transformers.Trainer(model, args, train_dataset=Rows(9), optimizers=(optimizer, None))
    trainer.add_callback(DeltaLoRACallback(trainer))
    with pytest.warns(UserWarning, match=r"(?s)checkpoint-1/export was not written, and the adapter .* is no triple"):
        trainer.train()


class Uploads:
    """Stands in for the network: what would be sent, when it would be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        self.sent: list[tuple[str, dict[str, bytes]]] = []
        done = SimpleNamespace(is_done=lambda: True, done=lambda: True, result=lambda: None)

        def upload_folder(api: Any, *, folder_path: str, path_in_repo: str = "", **options: Any) -> Any:
            ignored = [pattern.rstrip("*") for pattern in options.get("ignore_patterns") or []]
            files = {
                str(file.relative_to(folder_path)): file.read_bytes()
                for file in sorted(Path(folder_path).rglob("*"))
                if file.is_file() and not str(file.relative_to(folder_path)).startswith(tuple(ignored or ["\0"]))
            }
            self.sent.append((path_in_repo, files))
            return done

        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
        monkeypatch.setattr(
            huggingface_hub.HfApi, "create_repo", lambda api, repo_id, **options: SimpleNamespace(repo_id="me/it")
        )


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_push_holds_the_adapter_that_is_the_trained_model(accelerator_of, tmp_path, monkeypatch):
    """In the repository and, where checkpoints are pushed, next to the one that is resumed."""
    uploads = Uploads(monkeypatch)
    settings = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_model_id": "me/it", "max_steps": 4}
    run = Run(tmp_path / "run", **settings).train()
    assert [place for place, _ in uploads.sent] == ["", "checkpoint-2", "", "checkpoint-4"]
    for (_, files), step in zip(uploads.sent, [2, 2, 4, 4], strict=True):
        pushed = unpacked(files, tmp_path / f"pushed-{len(files)}-{step}")
        assert distance(logits_from(pushed / "export"), run.record.logits[step]) < EXACT


def test_the_last_push_holds_the_model_of_the_end(accelerator_of, tmp_path, monkeypatch):
    """Which is not that of the last step, after load_best_model_at_end."""
    uploads = Uploads(monkeypatch)
    settings = {"push_to_hub": True, "hub_strategy": "end", "hub_model_id": "me/it", "max_steps": 4}
    run = Run(tmp_path / "run", **best_at(2), **settings)
    score_by_step(run, 2)
    run.train()
    run.trainer.push_to_hub()
    ((_, files),) = uploads.sent
    assert distance(logits_from(unpacked(files, tmp_path / "pushed") / "export"), run.record.logits[2]) < EXACT
    assert distance(logits_from(tmp_path / "run" / "checkpoint-4" / "export"), run.record.logits[4]) < EXACT


def best_at(step: int) -> dict[str, Any]:
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }


def score_by_step(run: Run, best: int) -> None:
    trainer = run.trainer
    trainer.compute_metrics = lambda predictions: {"score": -abs(trainer.state.global_step - best)}


BEST = {
    "in place": ("in_place", "zero", {}, False),
    "in place, after K": ("in_place", "later", {"start_step": 1}, False),
    "in place, before K": ("in_place", "later", {"start_step": 3}, False),
    "in place, without optimizer.pt": ("in_place", "zero", {}, True),
    "in place, another ratio": ("in_place", "zero", {"update_ratio": lambda step: 1.0 + step % 3}, False),
    "folded": ("folded", "zero", {}, False),
    "folded, after K": ("folded", "later", {"start_step": 1}, False),
    "folded, before K": ("folded", "later", {"start_step": 3}, False),
}


BY_OTHER_TESTS = ("in place", "folded", "folded, before K")
"""The run that goes on from its best model is in place, and tests/integrations/test_trainer.py has the folded one."""


@pytest.mark.parametrize("case", [later(case) if case in BY_OTHER_TESTS else case for case in BEST])
def test_the_best_model_is_the_best_steps_with_its_w(case, accelerator_of, tmp_path):
    rule, start, options, small = BEST[case]
    settings = {**best_at(2), "save_only_model": small, "max_steps": 4}
    run = Run(tmp_path, rule, start, options=options, **settings)
    score_by_step(run, 2)
    run.train()
    assert run.trainer.state.best_global_step == 2
    now = logits_of(run.model)
    assert distance(now, run.record.logits[2]) < EXACT
    assert distance(now, run.record.logits[4]) > 500 * EXACT


def test_training_goes_on_from_the_best_model(accelerator_of, tmp_path):
    """What W was asked to move by is what it has moved by."""
    run = Run(tmp_path, **{**best_at(2), "max_steps": 4})
    base = weights(run.model)
    score_by_step(run, 2)
    run.train().train()
    assert run.optimizer.step_count == 8
    change = deltas(run.model)
    for name, W in weights(run.model).items():
        assert relative(W - base[name], RATIO * change[name]) < 1e-4


@pytest.mark.filterwarnings("ignore:the base of .* is what their weights were at rebase:UserWarning")
def test_a_w_that_cannot_follow_the_best_model_is_named(accelerator_of, tmp_path):
    """Somebody has taken W as another base meanwhile."""
    run = Run(tmp_path, **{**best_at(2), "max_steps": 4})
    score_by_step(run, 2)

    class Rebases(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                run.optimizer.rebase()

    run.trainer.add_callback(Rebases())
    match = r"(?s)has loaded A and B of .*checkpoint-2, and W could not follow.*counts from another base"
    with pytest.warns(UserWarning, match=match):
        run.train()


def test_every_reporter_gets_the_figures(accelerator_of, tmp_path):
    """TensorBoard, which is called before the callbacks of the user; Trainer's own history; a callback added before."""
    pytest.importorskip("tensorboard", reason="runs where tensorboard is installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"report_to": ["tensorboard"], "logging_strategy": "steps", "logging_steps": 2, "save_strategy": "no"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
        run = Run(tmp_path / "run", **settings).train()
    names = {
        f"deltaopt/{name}"
        for name in (
            "displacement_norm",
            "relative_displacement",
            "cosine_to_base",
            "effective_rank",
            "moved_weights",
            "skipped_updates",
        )
    }
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent)).Reload()
    history = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6]
    assert {tag for tag in events.Tags()["scalars"] if "deltaopt" in tag} == {f"train/{name}" for name in names}
    for name in names:
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert written == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in history]
    norms = [entry["deltaopt/displacement_norm"] for entry in history]
    assert 0 < norms[0] < norms[-1]
    for logs in run.record.logs:
        assert names <= logs.keys() or "loss" not in logs
        assert not (names & logs.keys()) or "loss" in logs


NOTHING = {
    "K": ({"start_step": 9}, r"start_step is 9, and the run took 3 steps\. Give a smaller start_step"),
    "ratio": ({"update_ratio": 0.0}, r"update_ratio was 0\. Give a larger one"),
    "lr": ({"lr": 0.0}, r"the learning rate was 0 in every step"),
}


@pytest.mark.parametrize(
    ("case", "rule"), [("K", "in_place"), ("K", "folded"), ("ratio", "folded"), ("lr", "in_place")]
)
def test_a_run_that_has_moved_nothing_says_why(case, rule, accelerator_of, tmp_path):
    options, reason = NOTHING[case]
    run = Run(tmp_path, rule, options=options, max_steps=3, save_strategy="no")
    with pytest.warns(UserWarning, match=rf"has moved no weight in this run, which was plain LoRA: {reason}"):
        run.train()


def test_factors_without_gradients_are_the_reason(accelerator_of, tmp_path):
    run = Run(tmp_path, max_steps=2, save_strategy="no")
    run.model.base_model.model.model.norm.weight.requires_grad_()
    for name, p in run.model.named_parameters():
        if "lora_" in name:
            p.register_hook(lambda grad: None)
    run.trainer.compute_loss = lambda model, inputs, **kwargs: model.base_model.model.model.norm.weight.sum()
    with pytest.warns(UserWarning, match="no gradients reached A and B"):
        run.train()


def test_an_optimizer_that_is_not_ours_is_refused_by_name(accelerator_of, tmp_path):
    trainer = trainer_of(arguments(tmp_path), (torch.optim.AdamW, {"lr": 1e-2}), causal_lm())
    trainer.add_callback(DeltaLoRACallback(trainer))
    with pytest.raises(TypeError, match=r"Trainer's optimizer is of AdamW, expected .*\(DeltaLoRAFactory, "):
        trainer.train()


def test_the_callback_wants_its_own_trainer(accelerator_of, tmp_path):
    run = Run(tmp_path / "one")
    with pytest.raises(TypeError, match=r"expected the Trainer, got a LlamaForCausalLM: trainer\.add_callback"):
        DeltaLoRACallback(causal_lm().unload())
    other = Run(tmp_path / "two", max_steps=1)
    other.trainer.remove_callback(DeltaLoRACallback)
    other.trainer.add_callback(DeltaLoRACallback(run.trainer))
    with pytest.raises(ValueError, match="it was made for another Trainer"):
        other.train()
    other.trainer.remove_callback(DeltaLoRACallback)
    other.trainer.add_callback(DeltaLoRACallback(other.trainer))
    other.train()


def test_a_callback_that_no_trainer_has_is_named(accelerator_of, tmp_path):
    run = Run(tmp_path)
    args, state, control = run.trainer.args, run.trainer.state, run.trainer.control
    optimizer = DeltaLoRAOptimizer.for_model(run.model, torch.optim.AdamW, lr=1e-2)
    with pytest.raises(ValueError, match="no Trainer with these arguments has it among its callbacks"):
        DeltaLoRACallback().on_train_begin(args, state, control, optimizer=optimizer)


def test_a_callback_may_be_given_as_a_class(accelerator_of, tmp_path):
    """Trainer makes it then. Two Trainers at once do not get mixed up."""
    other = Run(tmp_path / "other")
    factory = (DeltaLoRAFactory, {"inner": torch.optim.AdamW, "lr": 1e-2})
    settings = arguments(tmp_path / "own", max_steps=1, save_strategy="steps", save_steps=1)
    trainer = trainer_of(settings, factory, causal_lm(torch.float32), callbacks=[DeltaLoRACallback])
    trainer.train()
    assert (tmp_path / "own" / "checkpoint-1" / "export").is_dir()
    assert other.trainer.state.global_step == 0
