"""Every row of docs/inner-optimizers.md is what its optimizer does; where it is not "yes", the page says why."""

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="runs where bitsandbytes is installed")
pytest.importorskip("galore_torch", reason="runs where galore_torch is installed")
pytest.importorskip("lion_pytorch", reason="runs where lion_pytorch is installed")
pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("prodigyopt", reason="runs where prodigyopt is installed")
pytest.importorskip("pytorch_optimizer", reason="runs where pytorch_optimizer is installed")
pytest.importorskip("schedulefree", reason="runs where schedulefree is installed")
pytest.importorskip("torchao", reason="runs where torchao is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

from tests.inner_optimizers.checks import cells_of, without_ours
from tests.inner_optimizers.page import PAGE, read, rendered
from tests.inner_optimizers.row import COLUMNS, row
from tests.inner_optimizers.table import CELLS, ROWS
from tests.support.strategies import RULES

pytestmark = pytest.mark.extra

WRITE = "run `python -m tests.inner_optimizers`, which writes the page, and read what changed"


@pytest.mark.parametrize(("kind", "rule"), CELLS, ids=[f"{kind.key}-{rule}" for kind, rule in CELLS])
def test_the_page_says_what_an_optimizer_does(kind, rule):
    found = cells_of(kind, rule)
    for column in COLUMNS:
        if found[column] not in ("yes", "-"):
            assert kind.note(rule, column), f"{column}: {found[column]}, and no note says why and what to do"
    assert read(PAGE.read_text("utf8"))[0].get((kind.key, rule)) == found, WRITE


def test_the_page_is_the_one_that_the_rows_make():
    """The versions of the libraries may be others than those installed."""
    text = PAGE.read_text("utf8")
    found, versions = read(text)
    assert found.keys() == {(kind.key, rule) for kind, rule in CELLS}, WRITE
    assert rendered(found, versions) == text, WRITE


def test_the_rows_have_names_of_their_own_and_every_optimizer_of_torch():
    names = [kind.key for kind in ROWS]
    assert len({*names}) == len(names)
    for name, value in vars(torch.optim).items():
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer":
            assert any(key.startswith(f"torch `{name}`") for key in names), name


class WithNoise(torch.optim.SGD):
    """Steps differently in each object: no reference is followed, and no run resumed."""

    objects = 0

    def __init__(self, params, lr):
        super().__init__(params, lr)
        WithNoise.objects += 1
        self.more = 1 + 1e-9 * WithNoise.objects

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(self.more)
        return super().step(closure)


class WithoutAll(torch.optim.AdamW):
    """Saves the first moments only, and takes zero for the second ones."""

    def state_dict(self):
        state = super().state_dict()
        for entries in state["state"].values():
            entries["exp_avg_sq"] = torch.zeros_like(entries["exp_avg_sq"])
        return state


class Forgetful(torch.optim.AdamW):
    """Loads other moments than were saved."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for entries in self.state.values():
            entries["exp_avg"] = entries["exp_avg"] * 0.5


@pytest.mark.parametrize("rule", RULES)
def test_what_does_not_follow_resume_or_keep_its_format_is_seen(rule):
    assert cells_of(row("torch", WithNoise, lr=0.01), rule)["follows"] == "no"
    assert cells_of(row("torch", WithNoise, lr=0.01), rule)["resumes"].startswith("no")
    assert cells_of(row("torch", Forgetful, lr=0.01), rule) == {
        "follows": "yes",
        "resumes": "no, as without Delta-LoRA",
        "format": "no",
    }
    assert cells_of(row("torch", WithoutAll, lr=0.01), rule)["resumes"] == "no, as without Delta-LoRA"


def test_what_is_refused_is_told_apart_by_who_refuses():
    assert cells_of(row("torch", torch.optim.LBFGS), "folded")["follows"].startswith('refused: "LBFGS evaluates')
    by_itself = cells_of(row("torch", torch.optim.AdamW, lr=-1.0), "in_place")
    assert by_itself == {
        "follows": 'refused by the optimizer itself: "Invalid learning rate: -1.0"',
        "resumes": "-",
        "format": "-",
    }


def test_ours_is_taken_out_by_the_names_of_keys():
    state = {
        "state": {0: {"deltaopt.ledger.q": "", "moment": 1}, 1: {"deltaopt": ""}, "k": 2},
        "param_groups": [{"params": [0, 1], "lr": 0.1, "deltaopt": {}}],
    }
    assert without_ours(state) == {
        "state": {0: {"moment": 1}, "k": 2},
        "param_groups": [{"params": [0, 1], "lr": 0.1}],
    }
    assert without_ours({**state, "deltaopt.inner": {"slow": 1}}) == {"slow": 1}
