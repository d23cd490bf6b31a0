"""FSDP2 under Accelerate and Trainer on CPUs, where accelerate leaves its FSDP plugin out without a word.

Only what decides that is replaced: the kind of hardware that accelerate sees. Its own code shards the model, swaps the
parameters of the optimizer, and saves and loads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Let accelerate take its processes for those of several GPUs when it is set up, and leave the device as it is."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    set_up = AcceleratorState.__init__

    def on_several_devices(state: Any, *args: Any, **kwargs: Any) -> None:
        if AcceleratorState._shared_state == {}:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        set_up(state, *args, **kwargs)

    with mock.patch.object(AcceleratorState, "__init__", on_several_devices):
        yield


def plugin(**options: Any) -> Any:
    """FSDP2 as a configuration of accelerate asks for it: each decoder layer is sharded."""
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **options,
    )
