"""Format reward: reasoning and answer must be inside their tags (DeepSeek-R1, section 2.2.2)."""

from __future__ import annotations

from megatron_r1.rewards.extract import ANSWER, ANY_TAG, END_ANSWER, END_THINK, TAGS, THINK


def format_reward(response: str, style: str) -> float:
    """1.0 where the response has the required format, else 0.0; a tag that its prompt opened is part of it.

    strict: exactly `<think>...</think> <answer>...</answer>`, each tag once, only white space around the elements.
    lenient: a closed think element and after it an answer tag, which may be left open or be opened again instead of
    closed; other text around them is allowed.

    In both styles reasoning and answer must not be blank.

    Raises:
        ValueError: another style.
    """
    if style not in ("strict", "lenient"):
        raise ValueError(f"style={style}: must be strict or lenient")
    tags = ANY_TAG.findall(response)
    if style == "strict" and tags != list(TAGS):
        return 0.0
    if style == "lenient" and (tags[:3] != [THINK, END_THINK, ANSWER] or set(tags[3:]) - {ANSWER, END_ANSWER}):
        return 0.0
    texts = ANY_TAG.split(response)
    before, thought, between, answer = (text.strip() for text in texts[:4])
    if style == "strict" and (before or between or texts[4].strip()):
        return 0.0
    return float(bool(thought and answer))
