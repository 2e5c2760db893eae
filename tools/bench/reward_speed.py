"""Verdicts per second: mathematics beside math-verify called plainly, programs beside bare processes.

`tools/bench/reward_speed.py [--answers 400] [--programs 24] [--rounds 5]`

Mathematical answers are drawn: fractions, roots, polynomials, points and plain numbers, half of them wrong. Plainly
means a loop that parses and verifies in this process, with math-verify's own time limits. Ours verifies in processes
that can be killed, as many as there are cores.

Programs are drawn too: each reads numbers and is right or wrong on its tests. A bare process runs the same interpreter
without a sandbox and without limits but time; both sides run as many at a time as there are cores. Ours is what
`reward.accuracy` does with a response: find the program, run it in bubblewrap on each test, compare the outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from math_verify import parse, verify

from megatron_r1.config.reward import MathConfig, SandboxConfig
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.rewards.code import CodeReward, same_output
from megatron_r1.rewards.mathematics import MathVerifier
from megatron_r1.rewards.sandbox.command import PYTHON
from tools.bench.comparison import alternate, describe, seconds_of

CORES = len(os.sched_getaffinity(0))
Pair = tuple[str, str]
"""An answer and the true answer."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=400)
    parser.add_argument("--programs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def expressions(chance: random.Random, count: int) -> list[Pair]:
    """Answers in another form than the true one; half of them are wrong."""
    pairs = []
    for number in range(count):
        a, b, c = (chance.randint(2, 40) for _ in range(3))
        off = number % 2
        answer, truth = chance.choice(
            [
                (rf"\frac{{{a * c + off}}}{{{b * c}}}", rf"\frac{{{a}}}{{{b}}}"),
                (rf"{a + off}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}"),
                (rf"x^2+{a + b}x+{a * b + off}", f"(x+{a})(x+{b})"),
                (rf"({a}, {b + off})", rf"({a},\frac{{{b * c}}}{{{c}}})"),
            ]
        )
        pairs.append((answer, truth))
    return pairs


def numbers(chance: random.Random, count: int) -> list[Pair]:
    """Plain numbers; half of them are wrong."""
    return [(str(n + number % 2), str(n)) for number in range(count) for n in [chance.randint(0, 10_000)]]


def plainly(pairs: list[Pair]) -> list[bool]:
    """What a user of math-verify would write."""
    return [bool(verify(parse(rf"\boxed{{{truth}}}"), parse(rf"\boxed{{{answer}}}"))) for answer, truth in pairs]


def compare(
    title: str, unit: str, work: int, ours: Callable[[], object], theirs: Callable[[], object], given: int
) -> None:
    """Check that both sides say the same, then measure them in turns.

    Raises:
        SystemExit: they do not.
    """
    if ours() != theirs():
        raise SystemExit(f"{title}: the two sides do not agree")
    found = alternate({"plain": seconds_of(theirs), "ours": seconds_of(ours)}, given)
    print(f"{title}\n{describe(found, 'plain', work, unit)}\n")


def programs(chance: random.Random, count: int) -> list[tuple[Prompt, str]]:
    """Prompts of four tests each, and programs that are right on all, or wrong on those with a large sum."""
    drawn = []
    for number in range(count):
        factor = chance.randint(2, 9)
        tests = [[chance.randint(0, 100) for _ in range(chance.randint(1, 50))] for _ in range(4)]
        truth = {
            "language": "python",
            "inputs": [" ".join(map(str, test)) for test in tests],
            "outputs": [f"{factor * sum(test)}\n" for test in tests],
        }
        cap = "" if number % 2 else "total = min(total, 1000)\n"
        program = f"total = sum(map(int, input().split()))\n{cap}print({factor} * total)\n"
        drawn.append((Prompt(str(number), "", json.dumps(truth), "", "code"), program))
    return drawn


def bare(prompt: Prompt, program: str) -> float:
    """The share of tests that a program passes, each run as a process like any other."""
    tests, passed = json.loads(prompt.answer), 0
    for given, expected in zip(tests["inputs"], tests["outputs"], strict=True):
        run = subprocess.run([*PYTHON, "-c", program], input=given.encode(), capture_output=True, timeout=10)
        passed += run.returncode == 0 and same_output(run.stdout, expected)
    return passed / len(tests["inputs"])


def main() -> None:
    given = arguments()
    chance = random.Random(given.seed)
    with_forms, plain_numbers = expressions(chance, given.answers), numbers(chance, given.answers)
    verifier = MathVerifier(MathConfig(workers=CORES))
    try:
        for title, pairs in (("mathematics, expressions", with_forms), ("mathematics, numbers", plain_numbers)):
            answers, truths = [answer for answer, _ in pairs], [truth for _, truth in pairs]

            def ours(answers: list[str] = answers, truths: list[str] = truths) -> object:
                return verifier.verdicts(answers, truths)

            def theirs(pairs: list[Pair] = pairs) -> object:
                return plainly(pairs)

            compare(title, "verdicts", len(pairs), ours, theirs, given.rounds)
    finally:
        verifier.close()
    drawn = programs(chance, given.programs)
    prompts, texts = [prompt for prompt, _ in drawn], [f"```python\n{program}```" for _, program in drawn]
    reward = CodeReward(SandboxConfig(max_parallel=CORES))

    def in_processes() -> object:
        with ThreadPoolExecutor(CORES) as threads:
            return list(threads.map(lambda one: bare(*one), drawn))

    compare("programs", "tests", 4 * len(drawn), lambda: reward.score(prompts, texts), in_processes, given.rounds)


if __name__ == "__main__":
    main()
