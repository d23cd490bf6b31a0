"""Lists of problems: every layer in one message, a shared problem in one sentence."""

import pytest

from deltaopt.messages import NAMED, WRITTEN_OUT, Problem, layers, names, problem_lines, problems_of, raise_problems

MANY = [f"layers.{i}.q" for i in range(224)]


def test_one_layer_stands_before_its_sentence():
    assert problem_lines([Problem("q", "it is tied"), Problem("k", "it is merged")]) == [
        "q: it is tied",
        "k: it is merged",
    ]


def test_a_shared_problem_is_one_sentence_with_the_layers_after_it():
    problems = [Problem("q", "it is tied"), Problem("k", "it is merged"), Problem("v", "it is tied")]
    assert problem_lines(problems) == ["it is tied (2 layers: q, v)", "k: it is merged"]


def test_many_layers_are_counted_and_the_first_ones_named():
    (line,) = problem_lines([Problem(name, "it has lora_dropout=0.05") for name in MANY])
    assert line.startswith("it has lora_dropout=0.05 (224 layers: layers.0.q, layers.1.q")
    assert line.endswith(f"layers.{NAMED - 1}.q, ...)")
    assert len(line) < 200


def test_names_are_cut_only_when_there_are_more():
    assert names(MANY[:NAMED]).endswith(MANY[NAMED - 1])
    assert names(MANY[: NAMED + 1]).endswith(f"{MANY[NAMED - 1]}, ...")


def test_layers_are_counted_in_singular_and_plural():
    assert layers(["q"]) == "1 layer (q)"
    assert layers(["q", "k"]) == "2 layers (q, k)"


def test_no_problem_raises_nothing():
    raise_problems(ValueError, "these cannot be used", [])


def test_all_problems_are_raised_at_once_with_what_to_do():
    problems = [*problems_of("q", ["A is wrong", "B is wrong"]), *problems_of("k", ["A is wrong"])]
    with pytest.raises(ValueError, match="these cannot be used") as caught:
        raise_problems(ValueError, "these cannot be used", problems, "Mend them")
    assert str(caught.value).split("\n") == [
        "these cannot be used:",
        "  A is wrong (2 layers: q, k)",
        "  q: B is wrong",
        "Mend them",
    ]


def test_sentences_that_differ_in_numbers_are_one_problem():
    problems = [
        Problem(f"layers.{i}.q", f"A has the shape ({i}, 3), and W {i / 4}e-3 of layers.{i}.k") for i in range(224)
    ]
    (line,) = problem_lines(problems)
    assert line.startswith("layers.0.q: A has the shape (0, 3), and W 0.0e-3 of layers.0.k (and likewise in 223 ")
    assert line.endswith(f"layers.1.q, layers.2.q, {', '.join(MANY[3 : NAMED + 1])}, ...)")


def test_of_many_problems_the_first_are_written_out_and_the_rest_counted():
    problems = [Problem(name, f"it is {kind}") for kind in "abcdefghij" for name in MANY]
    lines = problem_lines(problems)
    assert lines[0] == "it is a (224 layers: layers.0.q, layers.1.q, layers.2.q, ...)"
    assert len(lines) == 10  # they are short
    lines = problem_lines([Problem(name, f"{'it is ' * 50}{kind}") for kind in "abcdefghij" for name in MANY])
    assert lines[-1] == "... and 8 more problems"
    assert sum(map(len, lines[:-1])) <= WRITTEN_OUT


def test_a_problem_that_is_found_twice_is_written_once():
    assert problem_lines([Problem("q", "it is tied")] * 3) == ["q: it is tied"]


def test_a_layers_own_name_in_its_sentence_is_not_another_problem():
    (line,) = problem_lines([Problem(name, f"saved {name}, registered {name}") for name in ("q", "layer.k", "v")])
    assert line == "q: saved q, registered q (and likewise in 2 layers: layer.k, v)"


@pytest.mark.parametrize("labels", [[str(i) for i in range(400)], ["a", "b"]], ids=["numbers", "words"])
def test_a_layers_name_that_is_a_number_or_a_word_of_the_sentence_is_not_another_problem(labels):
    """As those of a Sequential: "0" is in "0.1", and "1" in "0.1" too."""
    (line,) = problem_lines(
        [Problem(name, "it is a layer with dropout=0.1: set it to 0 (section 4.2)") for name in labels]
    )
    assert line.startswith(f"it is a layer with dropout=0.1: set it to 0 (section 4.2) ({len(labels)} layers: ")
    (line,) = problem_lines([Problem(str(i), f"saved 0.{i}, registered {i}") for i in range(400)])
    assert line.startswith("0: saved 0.0, registered 0 (and likewise in 399 layers: 1, 2, ")
