"""One thread a worker, deterministic data, hypothesis profiles, and the markers for CUDA and for the night."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support")

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True}
settings.register_profile("default", max_examples=25, **common)
settings.register_profile("nightly", **{**common, "max_examples": 1000, "derandomize": False})
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
settings.load_profile(PROFILE)


def pytest_collection_modifyitems(config, items):
    if PROFILE != "nightly":
        later = [item for item in items if "nightly" in item.keywords]
        items[:] = [item for item in items if "nightly" not in item.keywords]
        config.hook.pytest_deselected(items=later)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):  # not `keywords`, which has the names of folders too
            item.add_marker(pytest.mark.skip(reason="no CUDA device here; `make cuda` runs it where there is one"))


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    from tests.support import internals  # after register_assert_rewrite

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A test that interrupts at every line leaves contexts of autocast open, and their cache of casts goes stale.
    for _ in range(torch.autocast_increment_nesting()):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    internals.renew_locks()  # it leaves them locked, too, for all threads but the main one


@pytest.fixture
def accelerator_of():
    """Makes Accelerators on the CPU; their global state is forgotten before and after."""
    accelerate = pytest.importorskip("accelerate", reason="runs where accelerate is installed")
    from tests.support.accelerate_state import forgotten  # after register_assert_rewrite

    with forgotten():
        yield lambda **options: accelerate.Accelerator(cpu=True, **options)
