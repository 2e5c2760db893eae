"""The prompt template of DeepSeek-R1-Zero (DeepSeek-R1 report, Table 1), word for word.

The question takes the place of the word "prompt" and nothing else changes, so a question that ends with a question mark
reads `User: What is 2 + 3 * 4?. Assistant:`.
"""

from __future__ import annotations

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)


def fill_template(question: str) -> str:
    """The R1-Zero prompt that asks `question`; the response follows it without a space."""
    return R1_ZERO_TEMPLATE.replace("{prompt}", question)
