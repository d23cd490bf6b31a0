"""The numbers in the sentences of docs/evidence.md come from the results, and none stands there that does not."""

import copy
import json
import math
import re
import statistics
from dataclasses import replace

import pytest

from benchmarks import RESULTS
from benchmarks.evidence import passages
from benchmarks.evidence.facts import HEADS, TEST_TEXTS, Facts, largest_difference, largest_gap, sampling_error
from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.passages import PASSAGES
from benchmarks.evidence.prose import Passage, filled_in
from benchmarks.evidence.result import read_results
from benchmarks.evidence.rows import HEAD_SWEEP, PLAIN_PAIRS, RANK_SWEEP, RATIO_SWEEP
from benchmarks.evidence.standing import Evidence
from benchmarks.tables import PAGES
from tests.benchmarks.made_results import complete, made

SETTING = {"steps": 40, "batch_size": 2, "max_length": 8}
LRS = dict.fromkeys(("adapter", "dense", "sgd"), (1e-3, 4e-3, 1.6e-2))

TABLE = re.compile(r"<!-- table: .*?<!-- end of table -->", re.DOTALL)
HEADING = re.compile(r"^(#.*$|\d+\. )", re.MULTILINE)
CODE, TARGET = re.compile(r"`[^`]*`"), re.compile(r"\]\([^)]*\)")

# Numbers that are no results: settings, rates that a sentence is about, definitions, and what others have published.
STATED = """
    alpha (1 + lambda) | K = 0 | lambda 2 | a linear decay to 0 | clipped at 1, | Python 3.11.7's
    from rank 8 to 6 on average between 10 % and 50 % of the run | takes 11 values | ratio 1 + lambda
    rsLoRA at r 8 is LoRA with alpha x 2.8 | its 95 % interval | leaves out 0 with a p above 0.05
    1 point of a percentage, BLEU, METEOR or ROUGE, 0.1 of NIST and CIDEr, 0.01 of TER, 0.02 of a loss
    less than 1 point would hardly | in 8 of 10 cases at 5 % | in 8 of 10 cases. | 12 classes | of 6 layers
    a Llama of 260,000 parameters | label smoothing 0.1 | length penalty 0.8 | LoRA of rank 4 | file of 4 bits
    at 0.005 a larger branch is too fast, at 0.0015 the head is too slow | interval contains 0 | p is above 0.05
    gradients of the factors are 1 + lambda times | is ruled out at 5 % | At 0.0015, with the
    On E2E K is 19 (2 with SmolLM2) and on WebNLG 10 | learning rate x 3 | paper's Table 6
    more than lambda 2 gives | (lr 0.005) | rate here, 0.005, is | paper's Fig. 3 | from step 0 | K > 0 at most 2 r
    Up to r 8 Delta-LoRA was not shown | lambda 2 from the first steps | with r 32 its best rate
    In short runs with r 8 do not | Bold: a corrected p below 0.05 | corrected p is below 0.05 | A limit 1 + lambda
    whose interval leaves out 0 | with r 16, since r 4 learns little | on 200 of the 1,862 | On WebNLG with r 16 Delta
    With r 16 it was ahead | So with r 16 or more
    LoRA with r 16 on E2E
    standard error 1.4 points) | alpha / r = 2 at 47.4 % with a forgetting of 0.059
    alpha / r = 8 at 51.3 % with 0.111 | lambda 3 computes | After 500 or 1,000 steps | 300 steps leave
    Llama-3.2-3B | rank 64 | SST-2 | GPT-2 | E2E | all-MiniLM-L6-v2 | stories260k | SmolLM2-135M-Instruct | SmolLM2
    on 320 texts, 80 steps of 4, and tested on 24 of the 630
    chosen after 14 steps | and at most 64 new
"""


def test_numbers_are_filled_in_wherever_the_page_breaks_its_lines():
    passage = Passage("it takes {} to {} ms, not {}.", lambda facts: ["1.5", "20", "+1,000"])
    page = "Here it\n  takes 3 to 4e-05 ms,\nnot -7. It takes 3 ms.\n"
    assert filled_in(page, [passage], None) == "Here it\n  takes 1.5 to 20 ms,\nnot +1,000. It takes 3 ms.\n"


@pytest.mark.parametrize("count", [0, 2])
def test_a_sentence_has_to_stand_in_the_page_once(count):
    with pytest.raises(ValueError, match=f"{count} times, expected once: 'LoRA has {{}}'"):
        filled_in("LoRA has 3. " * count, [Passage("LoRA has {}", lambda facts: ["4"])], None)


def test_a_sentence_whose_words_do_not_hold_has_to_be_written_anew():
    passage = Passage("the best is {}", lambda facts: ["4"], lambda facts: facts == "other results")
    assert filled_in("the best is 3", [passage], "other results") == "the best is 4"
    with pytest.raises(ValueError, match="write it anew: 'the best is"):
        filled_in("the best is 3", [passage], "these results")


def test_there_are_as_many_numbers_as_places():
    with pytest.raises(ValueError, match="1 numbers for 2 places: '3 to 4'"):
        filled_in("3 to 4", [Passage("{} to {}", lambda facts: ["1"])], None)


def test_the_direction_of_a_size_is_that_of_the_words():
    assert passages._positive(0.36) == "0.4"
    with pytest.raises(ValueError, match=r"the page says that -0\.36 is above 0, write it anew"):
        passages._positive(-0.36)


@pytest.mark.parametrize(("number", "text"), [(-0.04, "0.0"), (0.04, "0.0"), (-0.06, "-0.1"), (1.25, "+1.2")])
def test_what_is_rounded_to_zero_has_no_sign(number, text):
    assert passages._signed(number, 1) == text


def test_no_other_number_stands_in_a_sentence():
    page = next(page for page in PAGES if page.name == "evidence.md").read_text()
    for known in (TABLE, *(passage.pattern for passage in PASSAGES["docs/evidence.md"]), HEADING, CODE, TARGET):
        page = known.sub(" ", page)
    page = " ".join(page.split())
    phrases = [phrase for line in STATED.strip().splitlines() for phrase in line.strip().split(" | ")]
    for phrase in sorted(phrases, key=len, reverse=True):
        page, count = re.subn(re.escape(phrase), " ", page, flags=re.IGNORECASE)
        assert count, f"{phrase!r} is not on the page any more"
    assert not (found := re.findall(r".{0,40}\d.{0,40}", page)), found


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    compared = ("full", "lora", "delta", "alpha", "restarts", *(row.name for pair in PLAIN_PAIRS for row in pair))
    experiments = [
        Experiment("docstrings", "tiny", compared, SETTING, LRS, seeds=3),
        *(
            Experiment("docstrings", "tiny", [row.name for row in rows], SETTING, LRS, seeds=3)
            for rows in (HEAD_SWEEP, RATIO_SWEEP, RANK_SWEEP)
        ),
    ]
    grid, folder = Grid("test", tuple(experiments)), tmp_path_factory.mktemp("costs")
    (folder / "cost_cpu.json").write_text(json.dumps({"rows": {"lora": {"state_bytes": 2}}}))
    return Facts(Evidence(complete(grid), grid), folder)


def of(facts, row, lr=None):
    """Return the test runs of a row by their seeds, at its tuned rate or another one."""
    runs = [run for run in facts.evidence.results if (run.setting.row, run.setting.split) == (row, "test")]
    return {run.setting.seed: run for run in runs if lr is None or run.setting.lr == lr}


@pytest.mark.parametrize(("task", "end"), [("docstrings", ""), (HEADS, "-head")])
def test_facts_are_those_of_the_runs(facts, task, end):
    ours, theirs = of(facts, f"delta{end}"), of(facts, f"lora{end}")
    apart = [100 * (ours[seed].metrics["accuracy"] - theirs[seed].metrics["accuracy"]) for seed in range(3)]
    assert facts.points(task, "delta") == pytest.approx(statistics.fmean(apart))
    half = 4.302653 * statistics.stdev(apart) / math.sqrt(3)  # Student's t of 2 degrees of freedom at 97.5 %
    assert facts.bounds(task, "delta") == pytest.approx(
        (statistics.fmean(apart) - half, statistics.fmean(apart) + half)
    )
    assert facts.lr(task, "delta") == ours[0].setting.lr
    ranks = [
        statistics.fmean(layer["effective_rank"] for run in runs.values() for layer in run.layers)
        for runs in (ours, theirs)
    ]
    assert facts.rank(task, "delta") == pytest.approx(ranks[0] / ranks[1])


def test_parameters_are_counted_in_lora_s(facts):
    changed = Facts(Evidence(copy.deepcopy(facts.evidence.results), facts.evidence.grid), facts.folder)
    for run in of(changed, "full").values():
        run.trained *= 3
    assert (changed.trained("docstrings", "full"), changed.trained("docstrings", "delta")) == (3, 1)


def test_shown_are_the_rows_with_a_corrected_p_below_5_percent(facts):
    results = copy.deepcopy(facts.evidence.results)
    changed = Facts(Evidence(results, facts.evidence.grid), facts.folder)
    for metric, gain in (("accuracy", 0.01), ("loss", -0.1)):
        for seed, run in of(changed, "lora").items():
            run.metrics[metric] = 0.5 + 0.1 * seed
            of(changed, "full")[seed].metrics[metric] = run.metrics[metric] + gain * (1 + 0.001 * seed)
            for row in ("delta", "alpha", "restarts"):
                of(changed, row)[seed].metrics[metric] = run.metrics[metric] + gain * (-1) ** seed
    assert changed.shown("docstrings") == changed.shown("docstrings", "loss") == {"full"}
    for seed, gain in enumerate((0.010, 0.013, 0.008)):  # p = 0.02 by itself
        of(changed, "delta")[seed].metrics["accuracy"] = of(changed, "lora")[seed].metrics["accuracy"] + gain
    assert 0.01 < changed.apart("docstrings", "delta").p < 0.05
    assert changed.shown("docstrings") == {"full"}


def test_rows_that_are_shown_to_forget_more_or_less_than_lora(facts):
    grid = Grid("test", (Experiment("e2e", "tiny", ("lora", "delta", "alpha"), SETTING, LRS, seeds=3),))
    results = complete(grid)
    for run in results:
        seed, row = run.setting.seed, run.setting.row
        more = {"delta": 1 + 0.001 * seed, "alpha": 0.5 * (-1) ** seed}.get(row, 0)
        run.forgetting = (1.0, 2 + 0.1 * seed + more)
    assert Facts(Evidence(results, grid), facts.folder).shown_to_forget_otherwise() == {("e2e", "delta")}


def test_gaps_are_the_largest_over_seeds_and_steps(facts):
    pair, runs = facts.pair(1), [of(facts, row.name) for row in PLAIN_PAIRS[1]]
    losses = [abs(a - b) for s in range(3) for a, b in zip(*(by_seed[s].losses for by_seed in runs), strict=True)]
    assert largest_gap(pair) == pytest.approx(max(losses))
    values = [abs(runs[0][s].metrics["accuracy"] - runs[1][s].metrics["accuracy"]) for s in range(3)]
    assert largest_difference(pair, "accuracy") == pytest.approx(max(values))


def test_the_choice_of_texts_has_the_error_of_a_share(facts):
    share = statistics.fmean(run.metrics["accuracy"] for run in of(facts, "lora").values())
    assert sampling_error(facts, "docstrings") == pytest.approx(100 * math.sqrt(share * (1 - share) / 572))


@pytest.mark.parametrize(("task", "texts"), TEST_TEXTS.items())
def test_the_accuracies_are_shares_of_so_many_texts(task, texts):
    runs = read_results(RESULTS / "evidence/full")
    right = [texts * run.metrics["accuracy"] for run in runs if (run.setting.task, run.setting.split) == (task, "test")]
    assert right
    assert right == pytest.approx([round(number) for number in right], abs=1e-3)


@pytest.mark.parametrize(("start", "row"), [(0.2, "delta-ratio2-k20"), (0.0, "delta-head")])
def test_a_cell_over_lambda_and_k_is_found(facts, start, row):
    assert list(facts.swept(2.0, start).results) == [of(facts, row)[seed] for seed in range(3)]


def test_a_missing_cell_over_lambda_and_k_is_said_to_be_missing(facts):
    without = [run for run in facts.evidence.results if run.setting.row != "delta-ratio2-k20"]
    with pytest.raises(KeyError, match="no runs of delta-ratio2-k20"):
        Facts(Evidence(without, facts.evidence.grid), facts.folder).swept(2.0, 0.2)


@pytest.mark.parametrize(("rank", "ending"), [(8, "-head"), (32, "-r32")])
def test_rows_of_a_rank_are_compared_with_each_other(facts, rank, ending):
    ours, theirs = of(facts, f"delta{ending}"), of(facts, f"alpha{ending}")
    assert list(facts.of_rank(rank, "delta").results) == [ours[seed] for seed in range(3)]
    apart = [ours[seed].metrics["accuracy"] - theirs[seed].metrics["accuracy"] for seed in range(3)]
    assert facts.apart_at_rank(rank, "delta", "alpha").mean == pytest.approx(statistics.fmean(apart))


def test_the_sweeps_show_what_is_far_from_lora(facts):
    """Differences that hardly vary over seeds are shown, those that vary as much as they are large are not."""
    changed = Facts(Evidence(copy.deepcopy(facts.evidence.results), facts.evidence.grid), facts.folder)
    near = [row.name for row in (*HEAD_SWEEP[1:], *RATIO_SWEEP, *RANK_SWEEP)]
    for seed in range(3):
        for row in ("lora-head", *near):
            of(changed, row)[seed].metrics["accuracy"] = 0.5 + 0.1 * seed + (0.05 * (-1) ** seed if row in near else 0)
        for row in ("lora-r2", "lora-r4", "lora-r16", "lora-r32"):
            of(changed, row)[seed].metrics["accuracy"] = 0.5 + 0.1 * seed
        for row in ("delta-ratio8-k50", "delta-r32"):
            of(changed, row)[seed].metrics["accuracy"] = 0.6 + 0.1 * seed + 1e-4 * seed
    assert changed.shown_of_ratios() == {(8.0, 0.5)}
    assert changed.shown_of_ranks() == {(32, "delta")}


def test_what_was_made_a_second_time_has_facts_of_its_own(facts):
    with pytest.raises(KeyError, match="no runs were made a second time"):
        _ = facts.again
    rows = ("lora-head", "delta-head")
    second = [copy.deepcopy(run) for run in facts.evidence.results if run.setting.row in rows]
    for run in second:
        run.metrics["accuracy"] += 0.02 * ((run.setting.row, run.setting.split) == ("delta-head", "test"))
    both = Facts(Evidence(facts.evidence.results, facts.evidence.grid, second), facts.folder)
    assert set(both.again.cells(HEADS)) == {"lora", "delta"}
    assert both.again.points(HEADS, "delta") == pytest.approx(facts.points(HEADS, "delta") + 2)
    assert set(both.twice) == {"lora-head", "delta-head"}


def test_the_costs_are_those_of_the_file(facts):
    assert facts.cost == {"lora": {"state_bytes": 2}}


def test_tuning_runs_are_those_held_out(facts):
    tuning = [run for run in facts.evidence.results if (run.setting.row, run.setting.split) == ("delta", "tuning")]
    losses = {run.setting.lr: run.metrics["loss"] for run in tuning if not run.diverged}
    assert facts.lr_by_loss("delta") == min(losses, key=losses.__getitem__)
    at = next(run for run in tuning if run.setting.lr == 4e-3)
    assert facts.held_out("docstrings", "delta", 4e-3) == at.metrics["accuracy"]
    accuracies = {run.setting.lr: run.metrics["accuracy"] for run in tuning if not run.diverged}
    assert facts.held_out_of("delta", "accuracy") == accuracies
    assert facts.held_out_by_seed("delta", "accuracy", 4e-3) == {at.setting.seed: at.metrics["accuracy"]}
    with pytest.raises(KeyError, match="docstrings has no row sgd"):
        facts.held_out_of("sgd", "accuracy")


@pytest.mark.parametrize("row", ["delta-head", "delta-r32"])
def test_another_rate_than_the_tuned_one_is_found_or_said_to_be_missing(facts, row):
    tuned = of(facts, row)
    there = [made(replace(run.setting, lr=5e-3)) for run in tuned.values()]
    more = Facts(Evidence([*facts.evidence.results, *there], facts.evidence.grid), facts.folder)
    assert more.at_rate(row, 5e-3).results == tuple(there)
    assert more.at_rate(row, tuned[0].setting.lr).results == tuple(tuned.values())
    with pytest.raises(KeyError, match=f"no runs of {row} at 7"):
        more.at_rate(row, 7.0)


def test_the_tuning_of_a_row_of_a_sweep(facts):
    """What the loss would choose is the lowest of the means."""
    tuning = [r for r in facts.evidence.results if (r.setting.row, r.setting.split) == ("lora-r32", "tuning")]
    losses = {run.setting.lr: run.metrics["loss"] for run in tuning if not run.diverged}
    assert facts.held_out_of("lora-r32", "loss") == losses
    assert facts.lr_by_loss("lora-r32") == min(losses, key=losses.__getitem__)
