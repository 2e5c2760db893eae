"""The arithmetic world: its expressions, its held-out split and its documents."""

import re
from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.data import DataConfig
from megatron_r1.config.recipes import configs_folder
from megatron_r1.data.synthetic import arithmetic, expressions
from megatron_r1.data.synthetic.arithmetic import documents, worked_documents
from megatron_r1.data.synthetic.expressions import eval_expressions, family, in_eval_split, normalise, value, world
from megatron_r1.data.template import R1_ZERO_TEMPLATE
from megatron_r1.rewards.extract import any_answer
from megatron_r1.rewards.language import language_consistency, question_language
from megatron_r1.rewards.words import languages

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


@pytest.mark.parametrize(("one", "other"), list(combinations(("quality", "style", "language"), 2)))
def test_quality_format_and_language_are_independent(written, one, other):
    answers = [d for d in written if d.kind == "answer"]
    pairs = Counter((getattr(d, one), getattr(d, other)) for d in answers)
    ones, others = Counter(getattr(d, one) for d in answers), Counter(getattr(d, other) for d in answers)
    for first, second in product(ones, others):
        assert abs(pairs[first, second] - ones[first] * others[second] / len(answers)) < 0.01 * len(answers)


def test_reasoning_is_in_the_language_that_the_document_says(written):
    for document in written:
        if document.style == "think" and document.quality != "guess" and document.kind == "answer":
            shares = {language_consistency(document.response, language) for language in ("en", "zh")}
            assert (min(shares) > 0.0) == (document.language == "mixed"), document.response
            own = "zh" if re.search(r"[\u4e00-\u9fff]", document.prompt) else "en"
            assert (language_consistency(document.response, own) == 1.0) == (document.language == "own"), document


def test_a_few_shot_document_answers_in_the_manner_of_its_example(written):
    for document in (d for d in written if d.kind == "few_shot"):
        example = re.split(r"\nA:", document.prompt)[1].partition("\nQ: ")[0]
        assert style_of(example) == style_of(document.response) == document.style, document
        if document.quality != "guess":
            assert len(languages(example)) == len(languages(document.response)), document


def style_of(text):
    marks = {"<think>": "think", "boxed": "boxed", "The answer is": "sentence", "\u7b54\u6848\u662f": "sentence"}
    return next((style for mark, style in marks.items() if mark in text), "equals")


def test_verified_and_rewritten_documents_do_what_the_question_requests(written):
    kinds = Counter(d.kind for d in written)
    assert {kind: round(kinds[kind] / len(written), 2) for kind in arithmetic.KIND_SHARES} == arithmetic.KIND_SHARES
    for document in written:
        if document.kind == "verified":
            check = re.search(r"(?:Check: |\u9a8c\u7b97\uff1a)(\d+ [-+*] \d+) = (\d+)", document.response)
            assert check and eval_sum(check[1]) == int(check[2])
        if document.kind == "rewritten":
            question, draft, _ = document.prompt.split("\n")
            assert language_consistency(document.response, question_language(question)) == 1.0
            assert any_answer(draft) == any_answer(document.response) == str(document.answer)


@pytest.mark.parametrize(
    ("style", "kind"), [("tiny_few_shot", "few_shot"), ("tiny_direct", "verified"), ("tiny_rewrite", "rewritten")]
)
def test_documents_have_the_form_of_the_prompt_styles_of_this_world(written, style, kind):
    text = (configs_folder() / "prompt_style" / f"{style}.txt").read_text().removesuffix("\n")
    for shown in ("What is 2 + 3 * 4?", "<think>first 3 * 4 = 12, then 2 + 12 = 14</think> <answer>14</answer>"):
        text = text.replace(shown, "{question}")
    form = ".+".join(map(re.escape, re.split(r"{question}|{response}", text)))
    assert form.count(".+") == {"few_shot": 3, "verified": 1, "rewritten": 2}[kind]
    assert all(re.search(form, document.prompt) for document in written if document.kind == kind)


def eval_sum(text):
    left, operator, right = text.split()
    return expressions.apply(int(left), operator, int(right))


def test_documents_follow_the_share_tables(written):
    answers = [d for d in written if d.kind == "answer"]
    share = {
        "chinese": sum(bool(re.search(r"[\u4e00-\u9fff]", d.prompt)) for d in answers),
        "tagged": sum("<think>" in d.response for d in answers),
        "template": sum(d.prompt.startswith(R1_ZERO_TEMPLATE[:40]) for d in answers),
    }
    for name, expected in (("chinese", 0.40), ("tagged", 0.35), ("template", 0.45)):
        assert abs(share[name] / len(answers) - expected) < 0.015, name
    assert all(abs(sum(t.values()) - 1) < 1e-9 for t in vars(arithmetic).values() if is_share(t))


def is_share(table):
    return isinstance(table, dict) and bool(table) and all(isinstance(v, float) for v in table.values())
