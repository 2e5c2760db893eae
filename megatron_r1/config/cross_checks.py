"""Checks of values of several sections together, and against the number of ranks; they run before torch is imported."""

from __future__ import annotations

from megatron_r1.config import serving
from megatron_r1.config.fp8 import ROWS, check_tilings
from megatron_r1.config.keys import reads
from megatron_r1.config.model import AttentionConfig, GroupedAttentionConfig, ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.pipeline import TRAINING_VERBS
from megatron_r1.config.pipeline_stages import fitting_group_size
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stage_checks import check_stages
from megatron_r1.errors import ConfigError


def check_sections(config: RunConfig, verb: str) -> None:
    """Refuse values of different sections that contradict each other, of keys that the verb reads.

    Raises:
        ConfigError: names the key that does not fit.
    """
    longest = config.model.max_sequence_length
    if reads(verb, "parallel.tensor") and reads(verb, "model"):
        check_division(config.parallel, config.model)
    if reads(verb, "data.vocab_size") and config.data.vocab_size > config.model.vocab_size:
        allowed = f"must be at most model.vocab_size={config.model.vocab_size}"
        raise ConfigError("data.vocab_size", config.data.vocab_size, allowed)
    if reads(verb, "train.sequence_length"):
        if config.train.sequence_length > longest:
            allowed = f"must be at most model.max_sequence_length={longest}"
            raise ConfigError("train.sequence_length", config.train.sequence_length, allowed)
        check_sequences(config.parallel, config.train.sequence_length)
    if reads(verb, "rl"):
        _check_responses(config)
    if reads(verb, "routing"):
        _check_routing(config)
    taught = reads(verb, "rl") and config.rl.teacher.from_
    if reads(verb, "reward.accuracy") and not (config.reward.scores_responses or taught):
        raise ConfigError("reward.accuracy", config.reward.accuracy, "at least one reward needs a weight above 0")
    if reads(verb, "performance"):
        _check_performance(config, verb)
    if reads(verb, "parallel.context") and config.platform == "cuda":
        check_context_parallelism(config)


def _check_performance(config: RunConfig, verb: str) -> None:
    """Refuse what megatron-core refuses while it builds the model."""
    performance, degrees = config.performance, config.parallel
    plain_latent = isinstance(config.model.attention, AttentionConfig) and config.model.rope.factor == 1
    if performance.apply_rope_fusion and plain_latent:
        allowed = "must be false with latent attention and model.rope.factor=1: its kernel is of YaRN's positions"
        raise ConfigError("performance.apply_rope_fusion", True, allowed)
    dispatcher = performance.moe_token_dispatcher_type
    sparse = config.model.moe.num_experts > 0  # the dense models of a recipe may get the dispatcher of the others
    if sparse and dispatcher == "deepep" and degrees.expert * degrees.expert_tensor == 1:
        allowed = "needs parallel.expert x expert_tensor above 1: a rank that has all experts sends no tokens"
        raise ConfigError("performance.moe_token_dispatcher_type", dispatcher, allowed)
    if performance.overlap_moe_expert_parallel_comm:
        _check_expert_overlap(config, verb)


def _check_responses(config: RunConfig) -> None:
    if config.rl.group_size == 1 and not config.rl.learns_from_single_responses():
        allowed = "must be at least 2: without a critic or rl.teacher.from a response is compared with others"
        raise ConfigError("rl.group_size", 1, allowed)
    longest = config.model.max_sequence_length
    if config.rollout.max_response_tokens >= longest:
        allowed = f"must be below model.max_sequence_length={longest}"
        raise ConfigError("rollout.max_response_tokens", config.rollout.max_response_tokens, allowed)
    if config.rollout.engine == "sglang" and not config.rollout.sglang.started_elsewhere:
        serving.check_division(config.rollout.sglang.server, config.model)
        if config.platform == "cuda":
            serving.on_cuda(config.rollout.sglang.server, config.model)
    if (method := config.rollout.sglang.server.speculative.method) == "mtp" and not config.model.mtp.num_layers:
        allowed = "needs model.mtp.num_layers of at least 1: without such layers nothing drafts"
        raise ConfigError("rollout.sglang.server.speculative.method", method, allowed)


def _check_routing(config: RunConfig) -> None:
    coefficient = config.routing.sequence_loss_coefficient
    if coefficient and not config.model.moe.sequence_loss_coefficient:
        allowed = "must be 0: the model is built without a balance loss (model.moe.sequence_loss_coefficient=0)"
        raise ConfigError("routing.sequence_loss_coefficient", coefficient, allowed)


def check_context_parallelism(config: RunConfig) -> None:
    """Refuse what Transformer Engine has no attention for.

    Raises:
        ConfigError: context-parallel ranks would share fp32 sequences.
    """
    if config.parallel.context > 1 and config.model.dtype != "bf16":
        allowed = f"needs model.dtype=bf16 on GPUs: Transformer Engine divides no sequences in {config.model.dtype}"
        raise ConfigError("parallel.context", config.parallel.context, allowed)


def _check_expert_overlap(config: RunConfig, verb: str) -> None:
    degrees, key = config.parallel, "performance.overlap_moe_expert_parallel_comm"
    if verb != "pretrain":
        raise ConfigError(key, True, "must be false: only pretrain can plan its forward passes beside backward ones")
    for needed, holds in (
        ("parallel.expert above 1", degrees.expert > 1),
        ("model.dtype=bf16", config.model.dtype == "bf16"),
        (
            "parallel.virtual_pipeline above 1 where there is a pipeline",
            degrees.virtual_pipeline > 1 or degrees.pipeline == 1,
        ),
        ("at most 1 multi-token layer", config.model.mtp.num_layers <= 1),
    ):
        if not holds:
            raise ConfigError(key, True, f"needs {needed}")


def check_layout(config: RunConfig, verb: str, ranks: int) -> None:
    """Refuse a layout that `ranks` processes cannot run; verbs that do not train have no layout.

    Raises:
        ConfigError: names the key that does not fit.
    """
    if verb == "pipeline":
        check_stages(config.pipeline)
    if verb not in TRAINING_VERBS:
        return
    check_degrees(config.parallel, ranks)
    if config.profile.steps and max(config.profile.ranks) >= ranks:
        raise ConfigError("profile.ranks", config.profile.ranks, f"must be below the {ranks} ranks of the run")
    if config.platform == "cuda" and config.fp8.enabled:
        check_tilings(config.fp8)
        if verb in ("pretrain", "sft"):
            check_fp8_sequences(config)
    if verb == "pretrain":
        _check_pretraining(config, ranks)
    elif config.parallel.mtp_rank != config.parallel.pipeline - 1:
        allowed = "must have m and L on one pipeline rank: only pretrain divides them"
        raise ConfigError("parallel.pipeline_layout", config.parallel.pipeline_layout, allowed)
    if verb == "sft":
        _check_fine_tuning(config, ranks)
    if verb == "grpo":
        _check_reinforcement(config)
    if verb in ("reward_model", "dpo"):
        _check_preferences(config, ranks)


def _check_pretraining(config: RunConfig, ranks: int) -> None:
    check_batch(config, ranks)
    if config.data.source == "indexed" and not config.data.indexed.datasets:
        raise ConfigError("data.indexed.datasets", "{}", "must name a dataset: data.indexed.datasets.NAME.path=FOLDER")


def _check_reinforcement(config: RunConfig) -> None:
    """Refuse what reinforcement learning does not support in a layout, or with an engine."""
    degrees = config.parallel
    if config.rl.routing_replay and not config.model.moe.num_experts:
        raise ConfigError("rl.routing_replay", True, "must be false: the model has no routers")
    recorded = config.rollout.engine == "local" or config.rollout.sglang.server.return_routed_experts
    if config.rl.routing_replay and not recorded:
        raise ConfigError("rl.routing_replay", True, "needs rollout.sglang.server.return_routed_experts=true")
    if config.rl.tokens_per_micro_batch <= config.rollout.max_response_tokens:
        raise ConfigError(
            "rl.tokens_per_micro_batch",
            config.rl.tokens_per_micro_batch,
            f"must be above rollout.max_response_tokens={config.rollout.max_response_tokens}, to hold one sample",
        )
    _check_staleness(config)
    _check_advantages(config)
    if degrees.context > 1:
        raise ConfigError("parallel.context", degrees.context, "must be 1: only pretrain divides sequences")
    _check_many_lengths(config)
    if config.rollout.engine == "local" and degrees.fewest_ranks() > 1:
        raise ConfigError("rollout.engine", "local", "needs the whole model on every rank: with a layout, take sglang")


def _check_staleness(config: RunConfig) -> None:
    """Refuse settings that are wrong for responses which older weights sampled."""
    if not config.rollout.max_staleness:
        return
    corrected = config.rl.importance_sampling.kind != "none"
    if config.rl.old_logprobs_from != "rollout" and not corrected:
        allowed = (
            "must be rollout with rollout.max_staleness, or rl.importance_sampling.kind must not be none: responses "
            "are sampled with older weights, and the ratio or the importance weights must account for that"
        )
        raise ConfigError("rl.old_logprobs_from", config.rl.old_logprobs_from, allowed)
    if config.rl.objective == "on_policy":
        allowed = "needs rollout.max_staleness=0: it has no ratio to account for responses of older weights"
        raise ConfigError("rl.objective", "on_policy", allowed)
    if config.rl.routing_replay and config.rollout.weight_sync.pause_mode != "finish":
        allowed = (
            "must be finish with rl.routing_replay: after a new prefill, tokens go to other experts than when sampled"
        )
        raise ConfigError("rollout.weight_sync.pause_mode", config.rollout.weight_sync.pause_mode, allowed)


def _check_advantages(config: RunConfig) -> None:
    """Refuse an advantage estimator whose inputs are missing, or that a layout does not support."""
    degrees = config.parallel
    if config.rl.advantage_estimator == "process" and not config.reward.steps:
        raise ConfigError("reward.steps", 0.0, "must be above 0 with rl.advantage_estimator=process")
    if config.rl.advantage_estimator == "group" and config.reward.steps:
        allowed = "must be 0 with rl.advantage_estimator=group, which gives all tokens of a response one advantage"
        raise ConfigError("reward.steps", config.reward.steps, allowed)
    if config.rl.advantage_estimator == "critic" and config.model.tied_embeddings and degrees.pipeline > 1:
        allowed = (
            "must be 1 with rl.advantage_estimator=critic and model.tied_embeddings: a critic trains no output head"
        )
        raise ConfigError("parallel.pipeline", degrees.pipeline, allowed)
    if config.rl.advantage_estimator == "critic" and config.rollout.placement == "colocated":
        allowed = "must be separate with rl.advantage_estimator=critic: the critic cannot be offloaded"
        raise ConfigError("rollout.placement", "colocated", allowed)


def _check_fine_tuning(config: RunConfig, ranks: int) -> None:
    check_batch(config, ranks)
    degrees = config.parallel
    if (
        config.sft.packing == "none"
        and degrees.expert > 1
        and config.performance.moe_token_dispatcher_type == "allgather"
    ):
        allowed = "needs equally many tokens on every rank: with sft.packing=none, take alltoall"
        raise ConfigError("performance.moe_token_dispatcher_type", "allgather", allowed)


def _check_many_lengths(config: RunConfig) -> None:
    """Refuse layouts that need micro-batches of one length: responses have different lengths."""
    degrees = config.parallel
    if degrees.virtual_pipeline > 1:
        allowed = "must be 1: interleaved stages need micro-batches of one length, and responses differ in length"
        raise ConfigError("parallel.virtual_pipeline", degrees.virtual_pipeline, allowed)
    if degrees.expert > 1 and config.performance.moe_token_dispatcher_type == "allgather":
        allowed = "needs equally many tokens on every rank, and responses differ in length: take alltoall"
        raise ConfigError("performance.moe_token_dispatcher_type", "allgather", allowed)


def _check_preferences(config: RunConfig, ranks: int) -> None:
    check_batch(config, ranks)
    degrees = config.parallel
    if degrees.context > 1:
        raise ConfigError("parallel.context", degrees.context, "must be 1: only pretrain divides sequences")
    _check_many_lengths(config)


def check_degrees(degrees: ParallelConfig, ranks: int) -> None:
    """Refuse degrees that `ranks` processes cannot be divided into.

    Raises:
        ConfigError: names the degree that does not fit.
    """
    model_parallel = degrees.tensor * degrees.pipeline * degrees.context
    if ranks % model_parallel:
        named = max(("tensor", "pipeline", "context"), key=lambda name: getattr(degrees, name))
        allowed = f"tensor x pipeline x context={model_parallel} must divide the {ranks} ranks that were started"
        raise ConfigError(f"parallel.{named}", getattr(degrees, named), allowed)
    experts = degrees.expert * degrees.expert_tensor * degrees.pipeline
    if ranks % experts:
        raise ConfigError(
            "parallel.expert", degrees.expert, f"expert x expert_tensor x pipeline={experts} must divide {ranks} ranks"
        )


def check_batch(config: RunConfig, ranks: int) -> None:
    """Data-parallel ranks need equally many sequences, in equal micro-batches, so that a mean of means is the mean.

    Raises:
        ConfigError: names the size that does not fit.
    """
    degrees, train = config.parallel, config.train
    data_parallel = ranks // (degrees.tensor * degrees.pipeline * degrees.context)
    for size in train.batch_sizes():
        share, rest = divmod(size, data_parallel)
        if rest:
            raise ConfigError(
                f"train.{train.batch_size_key(size)}",
                size,
                f"must be a multiple of the {data_parallel} data-parallel ranks",
            )
        if share > train.micro_batch_size and share % train.micro_batch_size:
            raise ConfigError(
                "train.micro_batch_size", train.micro_batch_size, f"must divide the {share} sequences of a rank's share"
            )
        if degrees.virtual_pipeline > 1:
            _check_interleaving(degrees, train.micro_batch_size, share)


def _check_interleaving(degrees: ParallelConfig, micro_batch_size: int, share: int) -> None:
    """Refuse a number of micro-batches that megatron-core cannot interleave over the stages of a rank."""
    passes, given = -(-share // micro_batch_size), degrees.microbatch_group_size_per_vp_stage
    fitting = fitting_group_size(given, degrees.pipeline, passes)
    if fitting is None:
        allowed = (
            f"must make at least parallel.pipeline={degrees.pipeline} passes of a rank's {share} sequences, "
            "for parallel.virtual_pipeline above 1"
        )
        raise ConfigError("train.micro_batch_size", micro_batch_size, allowed)
    if given and given != fitting:
        allowed = (
            f"must leave none of the {passes} passes of a rank's {share} sequences, "
            f"or at least parallel.pipeline={degrees.pipeline}: {fitting} does"
        )
        raise ConfigError("parallel.microbatch_group_size_per_vp_stage", given, allowed)


def check_division(degrees: ParallelConfig, model: ModelConfig) -> None:
    """Refuse a model that these degrees cannot divide among ranks.

    Raises:
        ConfigError: names the degree that does not fit.
    """
    if degrees.expert > 1 and not model.moe.num_experts:
        raise ConfigError("parallel.expert", degrees.expert, "must be 1: the model has no experts")
    attention = model.attention
    key_value_heads = attention.num_key_value_heads if isinstance(attention, GroupedAttentionConfig) else 0
    shared_experts_width = model.moe.num_shared_experts * model.moe.ffn_hidden_size
    for key, degree, name, amount in (
        ("tensor", degrees.tensor, "model.num_attention_heads", model.num_attention_heads),
        ("tensor", degrees.tensor, "model.attention.num_key_value_heads", key_value_heads),
        ("tensor", degrees.tensor, "model.ffn_hidden_size", model.ffn_hidden_size),
        ("tensor", degrees.tensor, "model.vocab_size", model.vocab_size),
        ("tensor", degrees.tensor, "model.moe.num_shared_experts x ffn_hidden_size", shared_experts_width),
        ("expert", degrees.expert, "model.moe.num_experts", model.moe.num_experts),
        ("expert_tensor", degrees.expert_tensor, "model.moe.ffn_hidden_size", model.moe.ffn_hidden_size),
    ):
        if amount % degree:
            raise ConfigError(f"parallel.{key}", degree, f"must divide {name}={amount}")
    degrees.stages_of(model.num_layers, model.mtp.num_layers)


def check_sequences(degrees: ParallelConfig, length: int) -> None:
    """Refuse sequences of a length that ranks cannot divide.

    Raises:
        ConfigError: names the degree that does not fit.
    """
    if length % degrees.tensor:
        raise ConfigError("parallel.tensor", degrees.tensor, f"must divide train.sequence_length={length}")
    pieces = degrees.tensor * 2 * degrees.context
    if degrees.context > 1 and length % pieces:
        allowed = f"tensor x 2 x context={pieces} must divide train.sequence_length={length}"
        raise ConfigError("parallel.context", degrees.context, allowed)


def check_fp8_sequences(config: RunConfig) -> None:
    """Refuse sequences of a length that Transformer Engine does not multiply in FP8; other verbs' are padded.

    Raises:
        ConfigError: names the length.
    """
    degrees, length = config.parallel, config.train.sequence_length
    multiple = ROWS * degrees.tensor * degrees.context
    if config.fp8.enabled and length % multiple:
        allowed = f"must be a multiple of {ROWS} x tensor x context={multiple}, as Transformer Engine's FP8 needs it"
        raise ConfigError("train.sequence_length", length, allowed)
