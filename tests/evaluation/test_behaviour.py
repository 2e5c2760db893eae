"""What counts as mixed languages and as reflection."""

import time

import pytest

from megatron_r1.evaluation.behaviour import mixes_languages, reflection_words

PLAIN = "First add three and four. That is seven. "


@pytest.mark.parametrize(
    ("text", "mixed"),
    [
        (PLAIN * 10, False),
        (PLAIN + "\u7136\u540e\u4e58\u4ee5\u4e8c\u3002", True),
        ("\u5148\u628a\u4e09\u548c\u56db\u76f8\u52a0\uff0c\u5f97\u4e03\u3002", False),
        ("\u5148\u628a\u4e09\u548c\u56db\u76f8\u52a0, so the sum is seven", True),
        (PLAIN + "\u0442\u043e\u0433\u0434\u0430 \u0441\u0435\u043c\u044c", True),
        (PLAIN * 20 + "as \u738b showed", False),  # one quoted name of 160 words
        ("\u89e3\uff1a$x = \\frac{1}{2}$\uff0c\u6240\u4ee5 f(x) = 3 \u5398\u7c73\u3002", False),
        ("\u7b54\u6848\u662f ```python\nprint('seven and some more words')\n```", False),
        ("3 + 4 = 7 \u2192 7", False),
        ("", False),
    ],
)
def test_mixed_languages_are_those_of_the_prose(text, mixed):
    assert mixes_languages(text) is mixed


def test_reflection_words_are_whole_words_in_any_case():
    assert reflection_words("Wait, that is WRONG; but check it. However, I verify: an error? A mistake, retry!") == 9
    assert reflection_words("waiter, button, checked, errors, wrongly, evaluates") == 0
    assert reflection_words("evaluate evaluate") == 2


def test_long_responses_cost_milliseconds():
    text = PLAIN * 3000  # 126,000 characters, as of 32,768 tokens
    started = time.perf_counter()
    mixes_languages(text)
    reflection_words(text)
    assert time.perf_counter() - started < 0.5
