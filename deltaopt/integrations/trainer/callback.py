"""DeltaLoRACallback: the movement of W in Trainer's checkpoints, its best model and its logs."""

from __future__ import annotations

import logging
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from deltaopt.checkpoint.files import PathLike, load, save
from deltaopt.integrations.peft import save_adapter
from deltaopt.integrations.peft.adalora import AdaLoraTriple
from deltaopt.integrations.trainer.factory import DeltaLoRAFactory
from deltaopt.integrations.trainer.fsdp import is_of_fsdp, resync_from
from deltaopt.integrations.trainer.owner import is_owned, trainer_of
from deltaopt.integrations.trainer.reasons import Reasons
from deltaopt.integrations.trainer.small_state import saves_adapter_alone, small_state, whole_state
from deltaopt.metrics import has_moved, movement_metrics
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.small_states import leave_out_compensation
from deltaopt.synced import ranks_of
from deltaopt.wrappers import unwrap

EXPORT = "export"
"""The folder next to a checkpoint's own adapter, with the adapter that gives the trained model on the base."""

OF_ADALORA = "lora"
"""The folder in `EXPORT` where AdaLoRA trained. Trainer loads every adapter right below a checkpoint into the model
that resumes, and PEFT lets no model hold an adapter of LoRA next to one of AdaLoRA."""

STATE = "deltaopt_state.pt"
"""The file of a checkpoint that has no ``optimizer.pt``."""

POINTER = "deltaopt"
"""Of this callback's entry in the ``stateful_callbacks`` of ``trainer_state.json``."""

PREFIX = "deltaopt/"

logger = logging.getLogger(__name__)


class DeltaLoRACallback(TrainerCallback):  # type: ignore[misc]
    """Lets what Trainer writes, loads and logs be right although W moves.

    - Once a W has moved, each checkpoint gets a folder ``export`` with an adapter that gives the trained model on the
      pristine base, for `PeftModel.from_pretrained` and for servers; it is in ``export/lora`` where AdaLoRA trained. A
      push to the Hub holds it too. The checkpoint's own adapter is for resuming: next to an unmoved W it is another
      model.
    - With ``save_only_model=True``, where Trainer writes no ``optimizer.pt``, the checkpoint gets a small file with the
      movement of W, and a resumed run takes it from there. The inner optimizer and the schedule start afresh then.
    - After ``load_best_model_at_end`` W is that of the best step too.
    - Each training log gets the figures of `deltaopt.metrics.movement_metrics`, under "deltaopt/", for every reporter.
    - Where Trainer saves the adapter alone, ``optimizer.pt`` leaves out what compensated rounding cut off from each W,
      which is rebuilt from the base.
    - A run in which no W has moved says so at its end, with the reason.
    - With several processes they are compared when training begins, at each save and when it ends:
      `DeltaLoRAOptimizer.check_synced`. Every element of each W is read for that.

    Args:
        trainer: whose callback it is. Default: it finds the Trainer that has it among its callbacks. When training
            begins it takes the first place among them, so that the others see what it has added to the logs.
        resume_from: the folder of the checkpoint that is resumed, if it was written with ``save_only_model=True`` and
            has been moved since.
        check_ranks: compare the processes. Turn it off where they have other layers on purpose.

    Raises:
        TypeError: if `trainer` is none; when training begins, if Trainer's optimizer is no `DeltaLoRAOptimizer`.
        ValueError: when training begins, if the callback is another Trainer's, or the run is resumed without the
            movement of W, or with that of another run. `WeightMismatchError` is one: A and B are not those of the
            checkpoint. W is left alone then.
        RanksDisagreeError: when training begins or ends and at a save, in all processes, if they are not the same.

    Example:
        >>> callbacks = [DeltaLoRACallback()]  # Trainer(..., callbacks=callbacks)
    """

    def __init__(self, trainer: Any = None, resume_from: PathLike | None = None, *, check_ranks: bool = True) -> None:
        if trainer is not None and not hasattr(trainer, "callback_handler"):
            raise TypeError(
                f"DeltaLoRACallback: expected the Trainer, got a {type(trainer).__name__}: "
                "trainer.add_callback(DeltaLoRACallback(trainer)), or Trainer(callbacks=[DeltaLoRACallback()])"
            )
        self._given = trainer
        self._found: Any = None
        self._resume_from = resume_from
        self._check_ranks = check_ranks
        self._run = uuid.uuid4().hex
        self._reasons = Reasons()
        self._exported: set[tuple[Path, int]] = set()
        self._leaving_out: RemovableHandle | None = None
        self._has_said_rank = False

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Find the optimizer, take up the movement of W from a checkpoint without ``optimizer.pt``, and go first."""
        optimizer = unwrapped(optimizer)
        trainer = self._trainer_with(args)
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._reasons = Reasons()
        self._save_whole_states()
        if saves_adapter_alone(trainer.accelerator.unwrap_model(trainer.model)):
            self._leaving_out = leave_out_compensation(optimizer)
        if state.global_step > 0:
            self._resume(args, state, optimizer)
        pointer = {"run": self._run, "folder": str(self._run_folder(args)), "small": bool(args.save_only_model)}
        state.stateful_callbacks[POINTER] = pointer
        self._check(args, optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Note what a run without any movement has to say at its end."""
        self._reasons.note(unwrapped(optimizer))

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures of the movement to a training log."""
        if logs is None or "loss" not in logs:
            return
        figures = {PREFIX + name: value for name, value in movement_metrics(unwrapped(optimizer)).items()}
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Write the adapter for the pristine base into the checkpoint, and the small state if it has no other."""
        optimizer, folder = unwrapped(optimizer), self._checkpoint(args, state)
        self._check(args, optimizer)
        self._export(args, state, model, optimizer, folder)
        if args.save_only_model:
            content = {"run": self._run, "step": state.global_step, "optimizer": small_state(optimizer)}
            if args.should_save:
                save(content, folder / STATE)

    def on_push_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Write that adapter before files are sent to the Hub: into the checkpoint, and into what is sent."""
        optimizer = unwrapped(optimizer)
        checkpoint = self._checkpoint(args, state)
        if optimizer.is_sharded:
            self._keep_pushed_right(args, state)
            return
        if self._trainer_with(args).is_in_train and checkpoint.is_dir():
            self._export(args, state, model, optimizer, checkpoint)
        self._export(args, state, model, optimizer, Path(args.output_dir))

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Let W follow the best step's A and B; say if no W has moved in this run."""
        optimizer = unwrapped(optimizer)
        nothing = not has_moved(optimizer)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._follow_best(Path(state.best_model_checkpoint), optimizer, self._trainer_with(args))
        self._exported.clear()
        self._save_whole_states()
        self._check(args, optimizer)
        if args.push_to_hub and optimizer.is_sharded:  # one process alone will push
            self._export(args, state, model, optimizer, Path(args.output_dir))
        if nothing:
            warnings.warn(
                f"Delta-LoRA has moved no weight in this run, which was plain LoRA: {self._reasons.of(optimizer)}",
                UserWarning,
                stacklevel=2,
            )

    def _check(self, args: Any, optimizer: DeltaLoRAOptimizer) -> None:
        if self._check_ranks and args.world_size > 1:
            optimizer.check_synced()

    def _save_whole_states(self) -> None:
        if self._leaving_out is not None:
            self._leaving_out.remove()
            self._leaving_out = None

    def _resume(self, args: Any, state: Any, optimizer: DeltaLoRAOptimizer) -> None:
        """Check that W is that of the checkpoint, or move it there from the small state.

        Raises:
            ValueError: if the movement of W is nowhere.
        """
        pointer = (state.stateful_callbacks or {}).get(POINTER)
        step = state.global_step
        if pointer is None or not pointer["small"]:
            if optimizer.step_count == 0:
                raise ValueError(
                    f"DeltaLoRACallback: the run is resumed at step {step} without the optimizer's state: Trainer has "
                    "loaded no optimizer.pt and scheduler.pt, and the checkpoint was not written with this callback "
                    "and save_only_model=True. How far W had moved is not known. Resume from a checkpoint that holds "
                    "it; or, for a plain LoRA checkpoint, load its adapter into the model and begin a new run"
                )
            return
        name = f"checkpoint-{step}"
        places = [
            *(Path(folder) for folder in (self._resume_from, args.resume_from_checkpoint) if folder is not None),
            Path(pointer["folder"]) / name,
            self._run_folder(args) / name,
        ]
        seen = []
        for place in dict.fromkeys(places):
            if not (place / STATE).is_file():
                continue
            content = load(place / STATE)
            if content.get("run") == pointer["run"] and content.get("step") == step:
                optimizer.load_state_dict(whole_state(content["optimizer"], optimizer))
                logger.warning(
                    f"DeltaLoRACallback: W is that of step {step}, from {place / STATE}. The checkpoint has no "
                    "optimizer.pt (save_only_model=True): the inner optimizer starts without moments, and the schedule "
                    "at its beginning."
                )
                return
            seen.append(str(place / STATE))
        found = f"; {', '.join(seen)} is of another run or step" if seen else ""
        raise ValueError(
            f"DeltaLoRACallback: the run is resumed at step {step} from a checkpoint without optimizer.pt "
            f"(save_only_model=True), and its {STATE} is not in {', '.join(map(str, dict.fromkeys(places)))}{found}. "
            "Without it how far W had moved is not known. Give the folder that is resumed: "
            "DeltaLoRACallback(resume_from=folder)"
        )

    def _follow_best(self, folder: Path, optimizer: DeltaLoRAOptimizer, trainer: Any) -> None:
        """Move W to where it was at the best step, whose A and B Trainer has loaded."""
        if not any(weight.moved for weight in optimizer.weights()):
            return  # a folded branch follows A and B
        try:
            if is_of_fsdp(trainer) and not (folder / STATE).is_file():
                resync_from(folder, trainer, optimizer)
                return
            if (folder / "optimizer.pt").is_file():
                state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            else:
                state = whole_state(load(folder / STATE)["optimizer"], optimizer)
            optimizer.resync(state)
        except (ValueError, RuntimeError, OSError) as error:
            warnings.warn(
                f"load_best_model_at_end has loaded A and B of {folder}, and W could not follow, so that the model is "
                f"not the best one: {error}. Begin a new process and resume from that checkpoint to have it",
                UserWarning,
                stacklevel=3,
            )

    def _export(self, args: Any, state: Any, model: nn.Module, optimizer: DeltaLoRAOptimizer, folder: Path) -> None:
        """Write the adapter for the pristine base, if the adapter of `folder` itself is not that.

        Where parameters are sharded all processes have to come here, and one of them writes.
        """
        trainer, mark, target = self._trainer_with(args), (folder, state.global_step), folder / EXPORT
        if any(isinstance(triple, AdaLoraTriple) for triple in optimizer.triples):
            target = target / OF_ADALORA
        writes = args.should_save or optimizer.is_sharded
        if not writes or (mark in self._exported and trainer.is_in_train):
            return
        if not any(weight.moved for weight in optimizer.weights()):
            # An earlier run may have left an adapter there, which must not stay next to the new one.
            left = [target.exists()]
            if optimizer.is_sharded:  # and the processes may see other disks
                left = list(ranks_of(None).gather("on_save()", left[0]).values())
            if not any(left):
                return
        try:
            saved = save_adapter(trainer.accelerator.unwrap_model(model), optimizer, target)
        except (ValueError, TypeError, RuntimeError) as error:
            if not args.should_save:
                return
            warnings.warn(
                f"{target} was not written, and the adapter in {folder} alone is not the trained model: {error}",
                UserWarning,
                stacklevel=3,
            )
            return
        self._exported = {each for each in self._exported if each[1] == state.global_step} | {mark}
        if args.should_save and not self._has_said_rank:
            self._has_said_rank = True
            logger.warning(
                f"DeltaLoRACallback: {target} is the adapter to use and to serve (rank {saved.rank}; {saved.server}). "
                f"The adapter in {folder} itself is for resuming: W has moved with it."
            )

    def _keep_pushed_right(self, args: Any, state: Any) -> None:
        """See that no adapter of another step is sent, in the one process that sends, which cannot make one alone."""
        target = Path(args.output_dir)
        if (target, state.global_step) in self._exported and not self._trainer_with(args).is_in_train:
            return
        shutil.rmtree(target / EXPORT, ignore_errors=True)
        warnings.warn(
            f"what is pushed now has no folder {EXPORT!r} with the adapter for the pristine base: the weights are "
            "sharded, so that all processes have to make it, and one of them pushes. It is in each checkpoint when "
            "that is complete, and in what trainer.push_to_hub() sends after the training",
            UserWarning,
            stacklevel=3,
        )

    def _trainer_with(self, args: Any) -> Any:
        """Return the Trainer whose callback this is, and whose arguments these are.

        Raises:
            ValueError: if another one was given, or none has it.
        """
        if self._given is not None and not is_owned(self, self._given):
            raise ValueError(
                "DeltaLoRACallback: it was made for another Trainer. Make one for each: "
                "Trainer(callbacks=[DeltaLoRACallback()])"
            )
        if self._given is None and (self._found is None or self._found.args is not args):
            self._found = trainer_of(self, args)
        return self._given or self._found

    def _run_folder(self, args: Any) -> Path:
        """Return the folder of the checkpoints, which is one for each trial in a hyperparameter search."""
        trainer = self._trainer_with(args)
        return Path(trainer._get_output_dir(getattr(trainer, "_trial", None)))

    def _checkpoint(self, args: Any, state: Any) -> Path:
        return self._run_folder(args) / f"checkpoint-{state.global_step}"


def unwrapped(optimizer: Any) -> DeltaLoRAOptimizer:
    """Return the optimizer that accelerate, and maybe another optimizer, has wrapped.

    Raises:
        TypeError: if there is no `DeltaLoRAOptimizer` in it.
    """
    try:
        return unwrap(optimizer)
    except TypeError:
        found = getattr(optimizer, "optimizer", optimizer)
        raise TypeError(
            f"DeltaLoRACallback: Trainer's optimizer is of {type(found).__name__}, expected a DeltaLoRAOptimizer. Give "
            f"Trainer one: optimizer_cls_and_kwargs=({DeltaLoRAFactory.__name__}, "
            '{"inner": torch.optim.AdamW, "lr": 2e-4}), or optimizers=(optimizer, None); or leave the callback out'
        ) from None
