"""A reward of one's own: `megatron-r1 grpo reward=configs/reward/custom_example.py:score init.from=RUN`.

The function is called by keyword with lists of the same length, for many responses at a time, and returns one finite
number for each, in order. Several threads may call it at a time.
"""


def score(prompts: list[str], responses: list[str], answers: list[str], tasks: list[str]) -> list[float]:
    """1 for a response that ends with the true answer, less a little for each 100 characters.

    Args:
        prompts: the questions, without their template.
        responses: what the model wrote after them.
        answers: the true answers, or what the task's verifier needs.
        tasks: which kind of task each prompt is.
    """
    return [
        float(response.rstrip(" .\n").removesuffix("</answer>").rstrip().endswith(answer)) - 0.001 * len(response) / 100
        for response, answer in zip(responses, answers, strict=True)
    ]
