"""How far a reader has to walk: a prompt from its file to the gradient, a weight from the optimizer to the server.

    python tools/walks.py

Each walk is a list of functions in the order of a run, `module:Qualified.name`; what a `with` statement enters is read
to its end there. The program reads the sources and counts what a reader opens: files, functions, their lines, and how
often code calls back into a file that the walk had left. Every function must exist and be mentioned by one before it: a
list that no longer describes the code fails.
"""

from __future__ import annotations

import ast
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_r1"


@dataclass(frozen=True)
class Figures:
    """What a walk costs its reader."""

    files: int
    file_lines: int
    functions: int
    function_lines: int
    returns: int
    """How often code calls back into a file that the walk had left; going on after a call does not count."""


@dataclass(frozen=True)
class Stop:
    """One function of a walk."""

    file: Path
    name: str
    """Its own name; of a class that is called, the class's."""
    lines: int
    mentions: frozenset[str]
    """Every name and attribute in its body."""


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _find(node: ast.AST, path: list[str]) -> ast.AST | None:
    """The definition at `path` below `node`, nested functions included."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == path[0]:
            if len(path) == 1:
                return child
            if (found := _find(child, path[1:])) is not None:
                return found
    return None


def _stop(place: str) -> Stop:
    """Raises LookupError: there is no such module or function."""
    module, _, qualified = place.partition(":")
    file = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    names = qualified.split(".")
    definition = _find(_tree(file), names) if file.is_file() else None
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        raise LookupError(f"{place} does not exist")
    mentions = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    mentions |= {node.attr for node in ast.walk(definition) if isinstance(node, ast.Attribute)}
    # A method that the language calls is mentioned by its class.
    own = names[-2] if names[-1] in ("__call__", "__init__", "__enter__", "__post_init__") else names[-1]
    return Stop(file, own, (definition.end_lineno or 0) - definition.lineno + 1, frozenset(mentions))


def walked(places: list[str]) -> Figures:
    """Counts of a walk.

    Args:
        places: `module:Qualified.name` each. A trailing ` via NAME` says by which name an earlier function mentions it,
            where that is not its own: a hook, a strategy, a table of functions.

    Raises:
        LookupError: a function does not exist, or no function before it mentions it.
    """
    stops: list[Stop] = []
    returns = 0
    for place in places:
        written, _, via = place.partition(" via ")
        stop = _stop(written)
        callers = [one for one in reversed(stops) if (via or stop.name) in one.mentions]
        caller = next((one for one in callers if one.file == stop.file), callers[0] if callers else None)
        if stops and caller is None:
            raise LookupError(f"nothing before {written} in the walk mentions {via or stop.name}")
        left = {one.file for one in stops} - {stops[-1].file} if stops else set()
        returns += stop.file in left and caller is not None and caller.file != stop.file
        stops.append(stop)
    functions = dict.fromkeys(stops)
    files = dict.fromkeys(stop.file for stop in stops)
    return Figures(
        files=len(files),
        file_lines=sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files),
        functions=len(functions),
        function_lines=sum(stop.lines for stop in functions),
        returns=returns,
    )


PROMPT = [
    "commands.grpo:run",
    "data.prompts.files:read_prompts",
    "data.row_files:rows_of",
    "data.row_files:numbered_rows",
    "data.prompts.files:_prompt",
    "data.chat.prompt_format:PromptFormatter.check",
    "commands.grpo:rollout_source",
    "train.loop:train",
    "rl.loop:reinforcement_step via reinforcement_step",
    "rl.loop:broadcast_rollout",
    "rl.loop:scatter_responses",
    "rl.generation.rollouts:Rollouts.take",
    "rollout.journal:Journal.read_all",
    "rl.generation.rollouts:Rollouts._sample",
    "rl.generation.rollouts:Rollouts._round",
    "data.prompts.prompts:FilePrompts.at",
    "data.chat.prompt_format:PromptFormatter.tokens",
    "data.chat.prompt_format:PromptFormatter.text",
    "data.chat.render:ChatTemplate.render",
    "data.tokenizer:Tokenizer.encode",
    "rollout.engine:Request.__post_init__",
    "rollout.engine:Sampling.__post_init__",
    "rollout.sglang.engine:SGLangEngine.generate",
    "rollout.sglang.engine:Background.run",
    "rollout.sglang.engine:SGLangEngine._generate",
    "rollout.sglang.pool.pool:Pool.generate",
    "rollout.sglang.pool.pool:split_into_calls",
    "rollout.sglang.pool.pool:InFlightLimit.reserve",
    "rollout.sglang.pool.pool:_Call.outcomes",
    "rollout.sglang.pool.pool:Pool.acquire",
    "rollout.sglang.pool.pool:choose",
    "rollout.sglang.pool.pool:_Call._try",
    "rollout.sglang.pool.pool:VersionsFromNowOn",
    "rollout.sglang.pool.server:Breaker.start",
    "rollout.sglang.pool.server:PoolServer.call",
    "rollout.sglang.client:Client.generate",
    "rollout.sglang.client:generate_body",
    "rollout.sglang.client:Client._call",
    "rollout.sglang.client:Client._attempt",
    "rollout.sglang.replies:parse_completions",
    "rollout.sglang.replies:parse_completion",
    "rollout.sglang.replies:parse_versions",
    "rollout.engine:Response.__post_init__",
    "rollout.engine:int32",
    "rollout.engine:Completion.__post_init__",
    "rollout.engine:check_end",
    "rl.generation.rollouts:Rollouts._text",
    "data.tokenizer:response_text",
    "data.tokenizer:Tokenizer.decode",
    "rewards.score:Rubric.__call__ via _scorer",
    "rewards.score:Rubric._with_retries",
    "rewards.accuracy:Accuracy.score",
    "rewards.accuracy:Accuracy._verify",
    "rewards.extract:answer_of",
    "rewards.exact:same_number via COMPARE",
    "rewards.score:TextRule.score",
    "rewards.format:format_reward via score",
    "rl.generation.rollouts:scored_sample",
    "rollout.sample:Sample",
    "rl.generation.filters:apply_filters",
    "rollout.journal:Journal.write",
    "rollout.journal:FlatResponses.of",
    "parallel.comm:broadcast",
    "parallel.comm:scatter_over_data_parallel",
    "parallel.comm:scatter_arrays",
    "rl.learner:Learner.learn",
    "rl.learner:Learner._mini_batches",
    "rl.learner:plan_mini_batches",
    "train.batching:shuffle_into_mini_batches",
    "train.batching:micro_batches_of_ranks",
    "train.batching:divide_by_tokens",
    "train.batching:micro_batches_by_tokens",
    "rl.policy.batch:make_batch",
    "rl.policy.batch:num_tokens",
    "rl.policy.policy:compute_frozen_logprobs",
    "rl.policy.policy:Policy.logprobs_by_sample",
    "rl.policy.policy:outputs_by_sample",
    "model.forward_backward:forward_only",
    "rl.policy.policy:Policy._scores_1T",
    "model.scores:model_scores",
    "model.scores:_read",
    "model.vocab_parallel:score_tokens",
    "model.vocab_parallel:_Scores.forward via _Scores",
    "model.vocab_parallel:_forward_chunk",
    "rl.advantages.group_relative:GroupAdvantages.estimate",
    "rl.advantages.group_relative:ragged_group_advantages",
    "rl.advantages.group_relative:group_advantages",
    "rl.learner:Learner._update",
    "train.update:update",
    "train.update:_scaled",
    "model.forward_backward:forward_backward",
    "rl.policy.batch:ResponseBatch.gather",
    "rl.objective.objective:Objective.loss",
    "rl.objective.policy_terms:grpo via TERMS",
    "rl.objective.policy_terms:at_level",
    "rl.objective.policy_terms:surrogate",
    "rl.objective.aggregation:sequence_mean via sequence_mean",
    "rl.objective.objective:Objective._kl",
    "rl.objective.kl:estimate_kl",
    "rl.objective.kl:k3 via ESTIMATORS",
    "rl.mismatch:mismatch_sums",
    "model.vocab_parallel:_Scores.backward via _Scores",
    "model.vocab_parallel:_backward_chunk",
    "train.optimizer:Optimizer.step",
]
"""A prompt from its file to the gradient: SGLang, group-relative advantages, KL penalty in the loss."""

WEIGHT = [
    "train.update:update",
    "train.optimizer:Optimizer.step",
    "rl.loop:reinforcement_step via step",
    "rl.loop:send_weights",
    "rollout.sync.strategies:StageSync.push via publish",
    "rollout.sync.strategies:fail_together",
    "rollout.sglang.engine:SGLangEngine.receiving",
    "rollout.sglang.engine:Background.run",
    "rollout.sglang.weight_session:WeightSession.receiving",
    "rollout.sglang.weight_session:WeightSession._holding",
    "rollout.sglang.pool.pool:Pool.hold",
    "rollout.sglang.pool.pool:Pool.drained",
    "rollout.sglang.client:Client.begin_update",
    "rollout.sglang.client:Client._call",
    "rollout.sglang.client:Client._attempt",
    "rollout.sglang.client:Client.end_update",
    "rollout.sglang.client:Client.confirm",
    "rollout.sync.strategies:StageSync._send",
    "model.shards:shards",
    "model.shards:_shard",
    "model.shards:assemble",
    "model.shards:_fill",
    "rollout.sync.payload:WeightPayload.groups",
    "rollout.sync.payload:WeightPayload.tensors",
    "hf.export:hf_tensors",
    "hf.families.__init__:canonical_name",
    "hf.families.__init__:param_mappings",
    "hf.families.deepseek:_DeepSeek.mappings via mappings",
    "hf.param_mapping:ParamMapping.split",
    "rollout.sync.payload:FusedGroups.collect",
    "rollout.sync.group_sender:GroupSender.send",
    "rollout.sync.buckets:fill_buckets",
    "rollout.sync.buckets:Bucket.add",
    "rollout.sync.group_sender:GroupSender._wait_loaded",
    "rollout.sync.group_sender:RoundRobin.turn",
    "parallel.comm:recv_flag via _recv_flag",
    "parallel.comm:send_flag via _send_flag",
    "rollout.sync.group_sender:GroupSender._join",
    "rollout.sync.group_sender:GroupSender._post",
    "rollout.sglang.client:Client.join_group",
    "rollout.sync.group_sender:GroupSender._broadcast",
    "rollout.sglang.client:Client.receive",
]
"""A weight from the optimizer to an SGLang server, over a process group."""
WALKS = {"a prompt, from file to gradient": PROMPT, "a weight, from optimizer to server": WEIGHT}


def main() -> int:
    for title, places in WALKS.items():
        found = walked(places)
        print(
            f"{title}: {found.files} files ({found.file_lines:,} lines), {found.functions} functions "
            f"({found.function_lines:,} lines), {found.returns} returns to a file already left"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
