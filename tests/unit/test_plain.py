"""Numbers and strings of numpy, torch and subclasses become Python's own, and nothing else changes."""

import enum
import math
from collections import OrderedDict
from fractions import Fraction

import pytest
import torch

from deltaopt.plain import as_float, as_int, plain

numpy = pytest.importorskip("numpy", reason="runs where numpy is installed")


class Size(enum.IntEnum):
    SMALL = 3


class Word(str):
    """Says something else than it is, as enums of strings do."""

    __slots__ = ()

    def __str__(self):
        return "another word"


WHOLE = [3, numpy.int64(3), numpy.uint8(3), torch.tensor(3), Size.SMALL]
NUMBERS = [
    *WHOLE,
    0.1,
    numpy.float64(0.1),
    numpy.float32(0.1),
    numpy.float16(0.5),
    numpy.longdouble(0.5),
    torch.tensor(0.25),
    torch.tensor(1.5, dtype=torch.bfloat16),
    Fraction(1, 4),
]
NO_NUMBERS = ["2", None, True, numpy.True_, torch.tensor(True), 1j, numpy.complex64(1), torch.ones(1), numpy.ones(1)]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_a_number_is_a_float_of_the_same_value(number):
    found = as_float(number)
    assert type(found) is float
    assert found == number


@pytest.mark.parametrize("number", WHOLE, ids=repr)
def test_a_whole_number_is_an_int(number):
    assert type(as_int(number)) is int
    assert as_int(number) == 3


@pytest.mark.parametrize("number", [2.0, numpy.float64(2), torch.tensor(2.0), Fraction(2)])
def test_a_float_is_no_int(number):
    assert as_int(number) is None


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value):
    assert as_float(value) is None
    assert as_int(value) is None


def test_a_tensor_that_would_have_to_train_or_be_waited_for_is_no_number():
    assert as_float(torch.tensor(1.0, requires_grad=True)) is None
    assert as_float(torch.tensor(1.0, device="meta")) is None


def test_an_int_that_no_float_holds_is_infinite():
    assert as_float(10**400) == math.inf
    assert as_float(-(10**400)) == -math.inf


def test_a_tree_is_converted_where_it_has_to_be():
    kept, tensor = {"a": [1, 2.0, "x", None, True]}, torch.ones(2)
    tree = {numpy.str_("k"): (numpy.float64(0.5), [numpy.int64(2), Word("w")]), "kept": kept, "t": tensor}
    found = plain(tree)
    assert found == {"k": (0.5, [2, "w"]), "kept": kept, "t": tensor}
    assert [type(key) for key in found] == [str, str, str]
    ratio, (count, word) = found["k"]
    assert (type(ratio), type(count), type(word)) == (float, int, str)
    assert found["kept"] is kept
    assert found["t"] is tensor
    assert type(tree["k"][0]) is numpy.float64  # the tree that came is not changed


@pytest.mark.parametrize("value", [torch.ones(1), Fraction(1, 3), {1}, object(), [1, (2.0, {"a": "b"})], True])
def test_anything_else_is_returned_itself(value):
    assert plain(value) is value


def test_an_ordered_dict_keeps_its_order_and_its_attributes():
    state = OrderedDict(b=numpy.float32(1), a=2)
    state._metadata = {"version": 1}
    found = plain(state)
    assert type(found) is OrderedDict
    assert list(found.items()) == [("b", 1.0), ("a", 2)]
    assert found._metadata == {"version": 1}


def test_a_list_in_itself_ends():
    cycle = [numpy.float64(1)]
    cycle.append(cycle)
    assert type(plain(cycle)[0]) is float
