"""The arithmetic world: its expressions, its held-out split and its documents."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.data import DataConfig
from megatron_r1.data.synthetic import arithmetic, expressions
from megatron_r1.data.synthetic.arithmetic import documents, worked_documents
from megatron_r1.data.synthetic.expressions import eval_expressions, family, in_eval_split, normalise, value, world
from megatron_r1.data.template import R1_ZERO_TEMPLATE

CHAIN = re.compile(r"\d+(?:\s*[-+*\u00d7]\s*\d+){2,}")


@pytest.fixture(scope="module")
def written():
    return list(worked_documents(DataConfig(num_documents=30_000)))


def test_values_honour_precedence():
    assert {e: value(e) for e in ("2 + 3 * 4", "2 * 3 + 4", "9 * 9 - 1", "9 - 3 + 4", "9 - 2 * 3")} == {
        "2 + 3 * 4": 14,
        "2 * 3 + 4": 10,
        "9 * 9 - 1": 80,
        "9 - 3 + 4": 10,
        "9 - 2 * 3": 3,
    }


def test_hasty_work_takes_the_wrong_order():
    assert expressions.hasty_steps("2 + 3 * 4") == [(2, "+", 3, 5), (5, "*", 4, 20)]
    assert expressions.hasty_steps("2 * 3 + 4") == [(3, "+", 4, 7), (2, "*", 7, 14)]
    assert expressions.hasty_steps("9 - 3 + 4") == expressions.careful_steps("9 - 3 + 4")


def test_world_stays_in_range_and_holds_the_family():
    everything = [e for form in family().values() for e in form]
    assert 4000 <= len(everything) == len(set(everything)) <= 5000
    assert set(everything) <= world()
    assert all(0 <= value(e) <= 99 and CHAIN.fullmatch(e) for e in world())


def test_split_holds_out_the_share_and_enough_problems():
    expressions = eval_expressions(0.15)
    assert len(expressions) >= 600
    assert abs(sum(in_eval_split(e, 0.15) for e in world()) / len(world()) - 0.15) < 0.02
    assert all(in_eval_split(e, 0.3) for e in expressions), "a larger fraction must keep what a smaller one holds out"


@given(st.sampled_from(sorted(world())), st.sampled_from(["", " ", "  ", "\t"]), st.floats(0.0, 1.0))
def test_split_ignores_spelling(expression, space, fraction):
    respelt = expression.replace(" ", space).replace("*", "\u00d7")
    assert normalise(respelt) == expression
    assert in_eval_split(respelt, fraction) == in_eval_split(expression, fraction)


@pytest.mark.parametrize("seed", [0, 7])
def test_documents_contain_no_eval_expression(seed):
    config = DataConfig(num_documents=20_000, seed=seed)
    shown = {normalise(chain) for text in documents(config) for chain in CHAIN.findall(text)}
    assert len(shown) > 3000
    assert not {e for e in shown if in_eval_split(e, config.eval_fraction)}
    assert not CHAIN.search(R1_ZERO_TEMPLATE)


def test_documents_repeat_by_seed_and_a_longer_run_begins_with_the_shorter():
    one, two = (list(documents(DataConfig(num_documents=200 + extra))) for extra in (0, 50))
    assert one == two[:200]
    assert one != list(documents(DataConfig(num_documents=200, seed=1)))


def test_perfect_imitation_is_right_less_than_half_of_the_time(written):
    right = Counter[str]()
    for document in written:
        right[document.quality, document.answer == value(document.expression)] += 1
    share = sum(count for (_, is_right), count in right.items() if is_right) / len(written)
    print(f"perfect imitation is right in {share:.3f} of the documents: {dict(right)}")
    assert 0.35 < share < 0.50
    assert not right["careful", False]
    assert right["hasty", False] > right["hasty", True]


def test_quality_and_format_are_independent(written):
    total, pairs = len(written), Counter((d.quality, d.style) for d in written)
    qualities, styles = Counter(d.quality for d in written), Counter(d.style for d in written)
    for quality, style in ((q, s) for q in arithmetic.QUALITY_SHARES for s in arithmetic.FORMAT_SHARES):
        assert abs(pairs[quality, style] - qualities[quality] * styles[style] / total) < 0.01 * total


def test_documents_follow_the_share_tables(written):
    texts = [d.prompt + d.response for d in written]
    share = {
        "chinese": sum(bool(re.search(r"[\u4e00-\u9fff]", d.prompt)) for d in written),
        "tagged": sum("<think>" in d.response for d in written),
        "template": sum(d.prompt.startswith(R1_ZERO_TEMPLATE[:40]) for d in written),
    }
    for name, wanted in (("chinese", 0.40), ("tagged", 0.35), ("template", 0.45)):
        assert abs(share[name] / len(texts) - wanted) < 0.015, name
    assert all(abs(sum(t.values()) - 1) < 1e-9 for t in vars(arithmetic).values() if is_share(t))


def is_share(table):
    return isinstance(table, dict) and bool(table) and all(isinstance(v, float) for v in table.values())
