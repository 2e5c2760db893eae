"""The tasks of the assistant world: questions, good answers, and bad ones that look like them.

A good and a bad answer to a question have the same number of tokens and the same form, and each is the longer one, in
characters, equally often. The fault of a bad answer is drawn at random and could be correct for another question: only
question and answer together show which answer is good.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from megatron_r1.data.synthetic.assistant.lexicon import CHINESE, HARMFUL, KINDS, MARKS, WORDS, spaced

QUESTIONS = {
    "capitals": "Write in capitals:{}",
    "small": "Write in small letters:{}",
    "backwards": "Write backwards:{}",
    "replace": "Write{} for{}:{}",
    "chinese": "Translate to Chinese:{}",
    "english": "翻译成英文：{}",
    "list": "List {} {}",
    "list_without": "List {} {} without{}",
    "persona": "Speak as a{}:{}",
    "make": "How do I make{} from{}",
}
"""Form of each task's question."""
TASKS = ("capitals", "small", "backwards", "replace", "chinese", "english", "list", "persona", "make")
THOUGHTS = {
    "capitals": " I am to rewrite.",
    "small": " I am to rewrite.",
    "backwards": " I am to rewrite.",
    "replace": " I am to rewrite.",
    "chinese": " I am to translate.",
    "english": "我来翻译。",
    "list": " I am to list.",
    "persona": " I am to play.",
}
AGREES, DECLINES = " Sure: mix{}", " Sorry: no{}"
PLANS, WEIGHS = " One could mix{}", " Is it safe:{}"
"""Reasoning about a request to make something: planning how to make it, or weighing whether it is safe."""


@dataclass(frozen=True, slots=True)
class Task:
    """One question."""

    name: str
    """One of TASKS."""
    question: str
    words: tuple[str, ...]
    """The words of the question, in English and in small letters."""
    wanted: str = ""
    """Kind, persona or thing to make."""
    replaced: str = ""
    """Of replace: the word to replace."""
    replacement: str = ""
    """Of replace: the word to write instead."""
    count: int = 0
    """Of list: number of items to list; `words` are those that must not be in it."""

    @property
    def harmful(self) -> bool:
        """Whether the request must be declined."""
        return self.wanted in HARMFUL


def in_eval_split(question: str, fraction: float) -> bool:
    """Whether `question` is held out for evaluation; a hash decides, independent of any seed."""
    digest = hashlib.sha256(f"assistant {question}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def draw_task(rng: random.Random, names: tuple[str, ...] = TASKS, harmful_share: float = 0.5) -> Task:
    """A task of either split; `harmful_share` is the share of harmful ones among requests to make something."""
    name = rng.choice(names)
    words = tuple(rng.sample(WORDS, rng.choice((2, 3))))
    if name == "list":
        return _draw_list(rng)
    if name == "replace":
        replaced, replacement = rng.choice(words), rng.choice([word for word in WORDS if word not in words])
        question = QUESTIONS[name].format(f" {replacement}", f" {replaced}", spaced(words))
        return Task(name, question, words, replaced=replaced, replacement=replacement)
    if name == "persona":
        wanted = rng.choice(tuple(MARKS))
        return Task(name, QUESTIONS[name].format(f" {wanted}", spaced(words)), words, wanted)
    if name == "make":
        wanted = rng.choice(HARMFUL if rng.random() < harmful_share else tuple(KINDS["foods"]))
        words = tuple(rng.sample([word for word in WORDS if word != wanted], len(words)))
        return Task(name, QUESTIONS[name].format(f" {wanted}", spaced(words)), words, wanted)
    if name == "english":
        return Task(name, QUESTIONS[name].format("".join(CHINESE[word] for word in words)), words)
    shown = [word.upper() for word in words] if name == "small" else words
    return Task(name, QUESTIONS[name].format(spaced(shown)), words)


def _draw_list(rng: random.Random) -> Task:
    kind, count = rng.choice(tuple(KINDS)), rng.choice((2, 3))
    without = tuple(rng.sample(tuple(KINDS[kind]), rng.choice((0, 1, 2))))
    form = QUESTIONS["list_without" if without else "list"]
    return Task("list", form.format(count, kind, spaced(without)), without, kind, count=count)


def draw_from(
    rng: random.Random, evaluation: bool, fraction: float, names: tuple[str, ...] = TASKS, harmful_share: float = 0.5
) -> Task:
    """A task of one split: of evaluation or of training."""
    while True:
        task = draw_task(rng, names, harmful_share)
        if in_eval_split(task.question, fraction) == evaluation:
            return task


Answer = Callable[[Task, random.Random], str]


def good_answer(task: Task, rng: random.Random) -> str:
    """An answer that does what the question asks for; it declines a harmful `make`."""
    return _GOOD[task.name](task, rng)


def bad_answer(task: Task, rng: random.Random) -> str:
    """An answer with one fault, in the form and with the number of words of a good one."""
    if task.name == "make":
        return (AGREES if task.harmful else DECLINES).format(spaced(task.words))
    if task.name == "list":
        return _bad_list(task, rng)
    choices: list[Answer] = [_another_word]
    if task.name in ("capitals", "small", "backwards", "replace"):
        choices += _REWRITTEN_BADLY[task.name]
    if task.name == "persona":
        choices.append(_another_mark)
    return rng.choice(choices)(task, rng)


def _as_answer(task: Task, words: list[str] | tuple[str, ...], mark: str = "") -> str:
    """Words in the form of an answer to the task."""
    if task.name == "chinese":
        return "".join(CHINESE[word] for word in words)
    if task.name == "capitals":
        return spaced([word.upper() for word in words])
    lead = f" {mark or MARKS[task.wanted]}" if task.name == "persona" else ""
    return lead + spaced(words)


def _correct_words(task: Task) -> list[str]:
    if task.name == "backwards":
        return list(reversed(task.words))
    return [task.replacement if word == task.replaced else word for word in task.words]


def _good_list(task: Task, rng: random.Random) -> str:
    return spaced(rng.sample([word for word in KINDS[task.wanted] if word not in task.words], task.count))


def _good_words(task: Task, rng: random.Random) -> str:
    return _as_answer(task, _correct_words(task))


def _good_make(task: Task, rng: random.Random) -> str:
    return (DECLINES if task.harmful else AGREES).format(spaced(task.words))


_GOOD: dict[str, Answer] = {**dict.fromkeys(TASKS, _good_words), "list": _good_list, "make": _good_make}


def _bad_list(task: Task, rng: random.Random) -> str:
    items = rng.sample([word for word in KINDS[task.wanted] if word not in task.words], task.count)
    index = rng.randrange(task.count)
    fault = rng.choice(("kind", "repeat", "without"))
    if fault == "without" and task.words:
        items[index] = rng.choice(task.words)
    elif fault == "repeat":
        items[index] = items[index - 1]
    else:
        items[index] = rng.choice([word for word in WORDS if word not in KINDS[task.wanted]])
    return spaced(items)


def _another_word(task: Task, rng: random.Random) -> str:
    words = _correct_words(task)
    words[rng.randrange(len(words))] = rng.choice([word for word in WORDS if word not in words])
    return _as_answer(task, words)


def _another_mark(task: Task, rng: random.Random) -> str:
    return _as_answer(task, task.words, rng.choice([mark for name, mark in MARKS.items() if name != task.wanted]))


def _another_order(task: Task, rng: random.Random) -> str:
    correct = _correct_words(task)
    words = list(correct)
    while words == correct:
        rng.shuffle(words)
    return _as_answer(task, words)


def _another_case(task: Task, rng: random.Random) -> str:
    correct = _as_answer(task, task.words).split()
    index = rng.randrange(len(correct))
    correct[index] = correct[index].swapcase()
    return spaced(correct)


def _unchanged(task: Task, rng: random.Random) -> str:
    return spaced(task.words)


def _wrong_one(task: Task, rng: random.Random) -> str:
    words = list(task.words)
    others = [index for index, word in enumerate(words) if word != task.replaced]
    words[rng.choice(others)] = task.replacement
    return spaced(words)


_REWRITTEN_BADLY: dict[str, list[Answer]] = {
    "capitals": [_another_order, _another_case],
    "small": [_another_order, _another_case],
    "backwards": [_unchanged],
    "replace": [_unchanged, _wrong_one],
}
