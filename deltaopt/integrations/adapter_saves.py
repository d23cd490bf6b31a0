"""The functions of other libraries that take an adapter without the weight under it: the rows of `deltaopt.save_watch`.

Only names are here, so that no library is imported.
"""

from __future__ import annotations

from typing import Any

from deltaopt.save_watch import ADAPTER_SAVES, RESUMABLE_SAVES, AdapterSave

_PEFT = (
    "Write an adapter that does with deltaopt.integrations.peft.save_adapter(model, optimizer, directory), or all "
    "weights with model.merge_and_unload().save_pretrained(directory)"
)
_DIFFUSERS = (
    "Write an adapter that does with deltaopt.integrations.peft.save_adapter(model, optimizer, directory), which "
    "pipeline.load_lora_weights(directory) reads"
)
_WHOLE = (
    "Save all weights with model.state_dict(), or the factors that hold the whole change with "
    "deltaopt.export_adapter(optimizer)"
)


def _has_no_adapter_of_its_own(model: Any) -> bool:
    """Tell if transformers saves this model whole: it saves adapters alone only after its own ``add_adapter``."""
    return not getattr(model, "_hf_peft_config_loaded", False)


def _saves_the_movement(trainer: Any) -> bool:
    """Tell if a checkpoint of this Trainer holds how far W has moved: in optimizer.pt, or by DeltaLoRACallback."""
    saves_its_optimizer = not getattr(getattr(trainer, "args", None), "save_only_model", True)
    return saves_its_optimizer or _has_the_callback(trainer)


def _only_loads(_: Any) -> bool:
    return True


def _has_the_callback(owner: Any) -> bool:
    """Tell if this is a Trainer with a DeltaLoRACallback, which writes the movement of W next to each adapter."""
    callbacks = getattr(getattr(owner, "callback_handler", None), "callbacks", [])
    return any(kind.__name__ == "DeltaLoRACallback" for callback in callbacks for kind in type(callback).__mro__)


ADAPTER_SAVES.update(
    {
        ("peft", "save_pretrained"): AdapterSave("writes", _PEFT, adapter="adapter_name"),
        ("peft", "get_peft_model_state_dict"): AdapterSave("returns", _PEFT, adapter="adapter_name"),
        ("transformers", "save_pretrained"): AdapterSave("writes", _PEFT, _has_no_adapter_of_its_own),
        ("transformers", "get_adapter_state_dict"): AdapterSave("returns", _PEFT),
        ("diffusers", "save_lora_adapter"): AdapterSave("writes", _DIFFUSERS, takes_notes=False),
        # Of its training scripts.
        ("diffusers", "_collate_lora_metadata"): AdapterSave("describes", _DIFFUSERS, takes_notes=False),
        ("loralib", "lora_state_dict"): AdapterSave("returns", _WHOLE),
        ("litgpt", "save_lora_checkpoint"): AdapterSave("writes", _WHOLE),  # of its fine-tuning scripts
    }
)
RESUMABLE_SAVES.update(
    {
        ("transformers", "_save_checkpoint"): _saves_the_movement,
        ("transformers", "push_to_hub"): _has_the_callback,
        ("accelerate", "load_fsdp_model"): _only_loads,  # it asks for the adapter to learn its names and shapes
    }
)
