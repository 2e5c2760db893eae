"""Curation of generated data: sources, filters, selection and outputs of the verb curate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError

FILTERS = (
    "finished", "length", "format", "tags", "readable", "reasoning", "paragraphs", "code", "language", "repetition",
    "right", "agreement", "contamination", "judge",
)  # fmt: skip
"""Filters of single rows, in the order in which they are best applied: those that take longer come later."""
DEFAULT_FILTERS = tuple(name for name in FILTERS if name != "judge")
OUTPUTS = ("conversations", "samples", "prompts", "pairs", "review")
STYLES = ("as_sampled", "think", "r1_zero", "special_token")
FORMATS = ("think", "strict", "lenient", "any")


@dataclass(kw_only=True, slots=True)
class CurateSourceConfig:
    """One source: samples (question and response), conversations (messages, or prompt and response) or prompts."""

    path: str = ""
    """A file (.jsonl, .json, .parquet, .arrow; JSON also gzipped), or the folder of a Hugging Face dataset."""
    split: str = "train"
    """Split to read from a folder."""
    subset: str = ""
    """Configuration to read from a folder that has several; empty takes the one that its README calls default."""
    domain: str = ""
    """Domain of all its rows, for quotas; empty takes each row's field `domain`, else the source's name."""
    skip: list[str] = field(default_factory=list)
    """Filters that its rows pass unchecked: general data, for one, have no true answers to compare with."""
    question_field: str = "question"
    """Field of a sample with the question."""
    response_field: str = "response"
    """Field of a sample with the response."""
    truth_field: str = "truth"
    """Field of a sample or prompt with the true answer; rows without it may have it in `answer`."""
    reasoning_field: str = ""
    """Field with a response whose reasoning is put before a sample's own response, which then is its summary:
    `given_response` of samples in the prompt style summary. Empty for none."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path", self.path, "must name a file of rows or a dataset's folder")


@dataclass(kw_only=True, slots=True)
class FilterLimitsConfig:
    """Parameters of the filters; the name of the filter stands first."""

    format: str = "think"
    """format: think (a closed think element, then a summary), strict or lenient (as reward.format_style, with answer
    tags), or any (a response that is not blank)."""
    shortest_response: int = 1
    """length: least characters of a response."""
    longest_response: int = 0
    """length: most characters of a response; 0 sets no limit."""
    text_share: float = 0.35
    """readable: least share of letters and digits among the characters that are no white space."""
    longest_word: int = 100
    """readable: most letters and digits without a break, in Latin script."""
    fewest_reasoning_words: int = 5
    """reasoning: least words, numbers and signs of the reasoning; a Chinese character is a word."""
    longest_paragraph: int = 500
    """paragraphs: most words, numbers and signs of a paragraph of the reasoning, up to a line break."""
    language_share: float = 1.0
    """language: least share of words that are in the target language; words of the question do not count."""
    repetition_ngram_size: int = 20
    """repetition: size in words of the n-grams whose repetitions count."""
    repetition_share: float = 0.4
    """repetition: largest share of n-grams that occurred before in the response."""
    loop_times: int = 4
    """repetition: repetitions in a row of a phrase that make a loop."""
    loop_words: int = 24
    """repetition: least words of a loop, all its repetitions together."""
    judge_score: float = 0.5
    """judge: least score that keeps a row, 0 to 1; see reward.judge_config."""

    def __post_init__(self) -> None:
        one_of(self, "format", FORMATS)
        within(self, 0.0, 1.0, "text_share", "language_share", "repetition_share", "judge_score")
        at_least(self, 0, "shortest_response", "longest_response", "fewest_reasoning_words")
        at_least(self, 1, "longest_word", "longest_paragraph", "repetition_ngram_size", "loop_words")
        at_least(self, 2, "loop_times")
        if 0 < self.longest_response < self.shortest_response:
            allowed = f"must be at least shortest_response={self.shortest_response}, or 0"
            raise ConfigError("longest_response", self.longest_response, allowed)


@dataclass(kw_only=True, slots=True)
class HeldOutConfig:
    """What training data must not contain: the filter contamination drops such rows, and the output prompts never has
    such a prompt."""

    paths: list[str] = field(default_factory=list)
    """Files or folders with evaluation prompts."""
    split: str = "test"
    """Split to read from folders."""
    fields: list[str] = field(default_factory=lambda: ["question", "prompt", "problem"])
    """Fields of a row with a text; every one that the row has counts."""
    ngram: int = 10
    """Words in a row that question or response must not share with a text (DeepSeek-R1's evaluation: 10). A text of
    fewer words counts where it is the whole question. Formats of numbers, case and markdown do not matter."""
    world: bool = True
    """Whether the generated worlds' own held-out prompts count: expressions and questions by data.eval_fraction."""

    def __post_init__(self) -> None:
        at_least(self, 2, "ngram")
        if not self.fields:
            raise ConfigError("fields", "[]", "must name at least one field")


@dataclass(kw_only=True, slots=True)
class PassRateConfig:
    """Which prompts the output prompts has, by the share of their samples that are right."""

    min_samples: int = 1
    """Fewest samples with a verdict; 0 also keeps prompts without one, whose pass rate is null."""
    drop_always_right: bool = True
    """Whether prompts whose samples are all right are dropped: no group of them has an advantage."""
    drop_always_wrong: bool = True
    """Whether prompts whose samples are all wrong are dropped."""

    def __post_init__(self) -> None:
        at_least(self, 0, "min_samples")


@dataclass(kw_only=True, slots=True)
class PairsConfig:
    """Preference pairs from samples of one prompt."""

    by: str = "verdict"
    """verdict (a right response is chosen before a wrong one) or reward (the one with the higher reward)."""
    margin: float = 0.0
    """Least difference of the rewards, by reward; 0 takes any difference."""
    per_prompt: int = 1
    """Most pairs of a prompt; no response is in two."""
    max_length_ratio: float = 4.0
    """Largest ratio of the two lengths in characters (R1's pairs have comparable lengths); 0 sets no limit."""

    def __post_init__(self) -> None:
        one_of(self, "by", ("verdict", "reward"))
        at_least(self, 0, "margin", "max_length_ratio")
        at_least(self, 1, "per_prompt")


@dataclass(kw_only=True, slots=True)
class CurateConfig:
    """Rejection sampling and data assembly: which rows are kept, and what is written."""

    sources: dict[str, CurateSourceConfig] = field(default_factory=dict)
    """Name -> source; read in this order."""
    outputs: list[str] = field(default_factory=lambda: ["conversations"])
    """Files to write: conversations (for sft), samples (the same rows as question and response, for the prompt style
    rewrite), prompts (with pass rates, for grpo and sample), pairs (for dpo and reward_model) and review (for a
    person)."""
    filters: list[str] = field(default_factory=lambda: list(DEFAULT_FILTERS))
    """Filters of single rows, in order; the first that refuses a row drops it."""
    limits: FilterLimitsConfig = field(default_factory=FilterLimitsConfig)
    """Parameters of the filters."""
    verdict: str = "verify"
    """Where the verdict on a response is from: verify (the verifier of the row's task compares it with the true answer)
    or recorded (the row's field `correct`)."""
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """What training data must not contain."""
    review: str = ""
    """File of a person's decisions, review.jsonl of an earlier run: `decision` is accept, reject, edit (then `edited`
    is the response) or empty. Empty: none."""
    undecided: str = "keep"
    """What happens to rows without a decision in `review`: keep, or hold (back)."""
    duplicates: bool = True
    """Whether only the first is kept of rows with equal question and response, but for case, spacing, markdown and
    formats of numbers."""
    near_duplicates: str = "prompt"
    """Rows among which a response with nearly the same words as an earlier one is dropped (MinHash): prompt (those of
    the same prompt), all (those whose question has the same numbers and signs) or off."""
    near_share: float = 0.7
    """Least share of three-word sequences in common that makes responses near duplicates."""
    per_prompt: int = 0
    """Most rows of a prompt; 0 sets no limit."""
    prefer: str = "random"
    """Which rows of a prompt are kept: random, short or reward (the highest)."""
    quotas: dict[str, int] = field(default_factory=dict)
    """Domain -> most rows, drawn at random (R1: 600,000 of reasoning and 200,000 of general data); fewer are named as a
    shortfall. Domains without a quota are kept whole."""
    style: str = "as_sampled"
    """How conversations spell a response: as_sampled, think (<think>REASONING</think> SUMMARY), r1_zero (the summary in
    answer tags) or special_token (|special_token|REASONING|special_token|SUMMARY, R1's cold start)."""
    shuffle: bool = True
    """Whether the rows of conversations, samples and pairs are put in random order, which mixes the sources."""
    pass_rate: PassRateConfig = field(default_factory=PassRateConfig)
    """Which prompts are written."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """Which pairs are written."""
    dropped_examples: int = 20
    """Rows of each filter that dropped.jsonl shows."""
    rows_per_part: int = 1024
    """Rows that are filtered together; a killed job loses one such part at most."""
    max_bad_rows: int = 0
    """Rows that cannot be read and may be dropped; more than this are an error."""

    def __post_init__(self) -> None:
        at_least(self, 0, "dropped_examples", "max_bad_rows", "per_prompt")
        at_least(self, 1, "rows_per_part")
        within(self, 0.5, 1.0, "near_share")
        one_of(self, "verdict", ("verify", "recorded"))
        one_of(self, "undecided", ("keep", "hold"))
        one_of(self, "near_duplicates", ("prompt", "all", "off"))
        one_of(self, "prefer", ("random", "short", "reward"))
        one_of(self, "style", STYLES)
        _each_of(self.filters, FILTERS, "filters")
        _each_of(self.outputs, OUTPUTS, "outputs")
        for name, source in self.sources.items():
            _each_of(source.skip, self.filters, f"sources.{name}.skip")
        for domain, rows in self.quotas.items():
            if rows < 0:
                raise ConfigError(f"quotas.{domain}", rows, "must be at least 0")


def _each_of(names: Sequence[str], allowed: Sequence[str], key: str) -> None:
    """Refuse a name that is not allowed, and one that is given twice."""
    for name in names:
        if name not in allowed:
            raise ConfigError(key, name, f"must be one of {', '.join(allowed)}")
        if names.count(name) > 1:
            raise ConfigError(key, name, "must not be given twice")
