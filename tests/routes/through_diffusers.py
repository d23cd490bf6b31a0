"""Routes of diffusers."""

from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict

from tests.routes.route import route
from tests.routes.runs import Model, Run, UNetRun


@route(
    "diffusers",
    "`Pipeline.save_lora_weights(dir, get_peft_model_state_dict(unet))`, `unet.load_lora_adapter(dir)`",
    UNetRun,
)
def save_lora_weights(run: Run) -> Model:
    run.train()
    StableDiffusionPipeline.save_lora_weights(run.folder, unet_lora_layers=get_peft_model_state_dict(run.model))
    other = run.base()
    other.load_lora_adapter(run.folder, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    return other


@route("diffusers", "`unet.save_lora_adapter(dir)`, `unet.load_lora_adapter(dir)`", UNetRun)
def save_lora_adapter(run: Run) -> Model:
    run.train()
    run.model.save_lora_adapter(run.folder)
    other = run.base()
    other.load_lora_adapter(run.folder, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    return other


@route("diffusers", "`unet.fuse_lora()`, `unet.unload_lora()`, `save_pretrained(dir)`, `from_pretrained(dir)`", UNetRun)
def fuse_lora(run: Run) -> Model:
    run.train()
    run.model.fuse_lora()
    run.model.unload_lora()
    run.model.save_pretrained(run.folder)
    return type(run.model).from_pretrained(run.folder)


@route("diffusers", "`unet.state_dict()` into another one with an adapter", UNetRun)
def unet_state_dict(run: Run) -> Model:
    run.train()
    other = run.fresh()
    other.load_state_dict(run.model.state_dict())
    return other
