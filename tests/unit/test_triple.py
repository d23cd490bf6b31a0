"""LoRATriple: where its tensors are, what it is called, and what a merged branch makes of it."""

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.compare import refused
from tests.support.small import HandmadeLayer, refuses_triples, small_layer, small_triple

numpy = pytest.importorskip("numpy", reason="runs where numpy is installed")


def test_repr_shows_name_shapes_and_scaling():
    triple = small_triple("layer0.q", scaling=0.5)
    assert repr(triple) == "LoRATriple('layer0.q': W (4, 6), A (4, 2), B (2, 6), scaling=0.5)"


def test_module_and_name_follow_a_replaced_parameter():
    linear = nn.Linear(6, 4, bias=False).requires_grad_(False)
    _, A, B = small_layer()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [LoRATriple((linear, "weight"), A, B, name="q")], lr=0.1)
    old = linear.weight
    linear.weight = nn.Parameter(old.detach().clone(), requires_grad=False)
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    assert not torch.equal(linear.weight, old)


def test_a_dotted_name_leads_through_submodules():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 4, bias=False)))
    assert LoRATriple((model, "0.0.weight"), *small_layer()[1:]).W is model[0][0].weight


@pytest.mark.parametrize(
    ("position", "source"), [(0, "weight"), (1, nn.Linear(2, 4)), (2, None), (0, (nn.Linear(6, 4), 3)), (0, (1, 2, 3))]
)
def test_refuses_what_is_no_tensor_and_no_place_of_one(position, source):
    sources = list(small_layer())
    sources[position] = source
    with pytest.raises(TypeError, match=rf"{'WAB'[position]} is a tensor or \(module, 'attribute.path'\), got a?"):
        LoRATriple(*sources)


def test_refuses_an_unknown_layout():
    with pytest.raises(ValueError, match=r"layout is one of linear, transposed, .*, got 'diagonal'"):
        small_triple(layout="diagonal")


@pytest.mark.parametrize("bounds", [(2, 2), (-1, 2), (3, 1), (0,), [0, 2], (0.0, 2.0), 3])
def test_refuses_rows_and_columns_that_are_no_ranges(bounds):
    with pytest.raises(ValueError, match=r"rows is \(start, stop\) with 0 <= start < stop"):
        small_triple(rows=bounds)
    with pytest.raises(ValueError, match=r"columns is \(start, stop\) with 0 <= start < stop"):
        small_triple(columns=bounds)


def test_rows_and_columns_take_whole_numbers_of_other_libraries():
    triple = small_triple(rows=(numpy.int64(0), torch.tensor(3)), columns=(0, numpy.uint8(4)))
    assert (triple.rows, triple.columns) == ((0, 3), (0, 4))
    assert {type(bound) for bound in triple.rows + triple.columns} == {int}


def test_a_name_of_its_own_is_not_written_into_the_users_triple():
    first, second = LoRATriple(*small_layer()), LoRATriple(*small_layer())
    one = DeltaLoRAOptimizer(torch.optim.SGD, [first, second])
    other = DeltaLoRAOptimizer(torch.optim.SGD, [second, first])
    assert first.name is None
    assert [t.name for t in one.triples] == [t.name for t in other.triples] == ["triple0", "triple1"]


@pytest.mark.parametrize("name", ["", "model.layers.0.q", "Schicht übrigens 層", "x" * 10_000, "a\nb"])
def test_takes_any_name_as_a_plain_string(name):
    class Name(str):
        __slots__ = ()

    for triple in (small_triple(Name(name)), small_triple().named(Name(name))):
        assert (type(triple.name), triple.name, triple.label) == (str, name, name)


@pytest.mark.parametrize("name", [3, b"q", ("q",)])
def test_refuses_a_name_that_is_no_string(name):
    with pytest.raises(TypeError, match=r"the name of a triple is a str, got (3|b'q'|\('q',\))"):
        small_triple(name)


def test_refuses_a_name_that_no_file_holds():
    with pytest.raises(ValueError, match=r"the name 'q\\ud800' cannot be written in UTF-8: surrogates not allowed"):
        small_triple("q\ud800")


def test_refuses_a_merged_branch_at_registration_and_at_a_step():
    module = HandmadeLayer()
    triple = module.triple()
    module.merged = True
    assert "q: the branch is merged into W" in refuses_triples(triple)
    module.merged = False
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    module.A.grad, module.B.grad = torch.ones(5, 3), torch.ones(3, 7)
    before = module.weight.detach().clone()
    module.merged = True
    refused(
        optimizer.step,
        RuntimeError,
        "W cannot be moved now:\n  q: the branch is merged into W",
        kept=lambda: [p.detach().clone() for p in module.parameters()],
    )
    module.merged = False
    optimizer.step()
    assert not torch.equal(module.weight, before)


def test_refuses_an_attribute_that_is_gone():
    module = HandmadeLayer()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [module.triple()], lr=0.1)
    del module.A
    with pytest.raises(RuntimeError, match=r"q: A is not in its HandmadeLayer .*misspelt, or the adapter was deleted"):
        optimizer.step()
