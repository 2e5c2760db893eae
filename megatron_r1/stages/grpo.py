"""grpo: reinforcement learning (R1-Zero when it starts from a base model), by groups of answers or with a critic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.model.chunks import in_multi_token_layer
from megatron_r1.model.replay import RoutingReplay
from megatron_r1.model.shards import Shard
from megatron_r1.parallel import comm
from megatron_r1.parallel.mesh import leads
from megatron_r1.rewards.score import Weighted
from megatron_r1.rl.ahead import AheadRollouts, TakesRollouts
from megatron_r1.rl.critic import CriticAdvantages
from megatron_r1.rl.joint_scoring import JointScoring
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.loop import reinforcement_step
from megatron_r1.rl.placement import Colocated, Separate
from megatron_r1.rl.reference import SAVED, ReferencePolicy
from megatron_r1.rl.rollouts import Rollouts
from megatron_r1.rl.scoring import rule_scorer
from megatron_r1.rollout.choose import SyncedEngine, shared_sglang_engine
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.local import LocalEngine
from megatron_r1.rollout.routed import RoutedLayers
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.stages.critic import critic_of
from megatron_r1.stages.questions import asking_of, keep, prompts_of_file, training_prompts
from megatron_r1.stages.reward_scorer import RewardModelScorer
from megatron_r1.stages.trainer import Trainer, finish, trainer
from megatron_r1.stages.weights import Weights, find_weights
from megatron_r1.train.hooks import Hook, Hooks
from megatron_r1.train.loop import train
from megatron_r1.train.offload import TrainerMemory
from megatron_r1.train.state import TrainState

SHOWN = ("reward", "accuracy", "format", "response_length", "kl", "entropy", "rollout_seconds", "train_seconds")


def run(config: RunConfig) -> None:
    """Reinforce a model, or go on where its run stopped."""
    check(config)
    weights = find_weights(config.init.from_, which=config.init.weights)
    tokenizer = Tokenizer.load(weights.tokenizer_folder)
    asking = asking_of(config, tokenizer)
    questions = prompts_of_file(config, asking)
    # Answers predict one token at a time: the multi-token layers are carried through untouched.
    with trainer(config, tokenizer, weights, trainable=lambda name: not in_multi_token_layer(name)) as this:
        if this.state.step >= config.train.steps:
            finish(this, this.state)
            return
        joint = joint_scoring(this)
        models = joint.rewards if joint else ()
        scorer = rule_scorer(config.reward, lambda text: len(tokenizer.encode(text)), models)
        reference = ReferencePolicy(this.model, this.saved(SAVED)) if config.rl.kl_coefficient else None
        moe = config.model.moe
        replay = RoutingReplay(this.model, moe.first_dense_layers) if config.rl.routing_replay else None
        critic = critic_of(this, weights) if config.rl.advantages == "critic" else None
        advantages = CriticAdvantages(critic, config.rl.critic) if critic else None
        learner = Learner(
            config, this.model, this.optimizer, reference, tokenizer.pad, this.platform.device, replay, advantages
        )

        def beside() -> Iterator[tuple[str, Shard]]:
            for part in (reference, critic):
                yield from part.saved() if part else ()

        colocated = config.rollout.placement == "colocated"
        placement = Colocated(TrainerMemory(this.model, this.optimizer)) if colocated else Separate()
        with rollout_engine(this, weights, replay, placement) as engine, ExitStack() as stack:
            rollouts: TakesRollouts | None = None
            prompts = config.rl.prompts_per_rollout
            hooks: Hook = this.hooks(SHOWN, f"grpo {config.name}", extra_shards=beside)
            if leads():
                keep(questions, this.folder)
                journal = Journal(this.folder / "rollouts")
                hooks = Hooks([hooks, PruneJournal(journal, config.train)])
                rollouts = Rollouts(
                    training_prompts(config, questions),
                    engine,
                    asking,
                    journal,
                    scorer,
                    config.rollout,
                    config.rl,
                    config.seed,
                    RoutedLayers(config.model.num_layers, moe.first_dense_layers, moe.top_k) if replay else None,
                )
                if config.rollout.ahead:
                    begun = ahead_of(rollouts, config, engine.engine.abandon, joint)
                    rollouts = stack.enter_context(begun)
            received = joint.received if joint else comm.received
            step = reinforcement_step(rollouts, learner, engine.update_weights, prompts, placement, received)
            state = train(this.state, step, hooks, config.train.steps)
        finish(this, state)


def check(config: RunConfig) -> None:
    """Refuse what this stage cannot do.

    Raises:
        ConfigError: nothing to start from.
    """
    if not config.init.from_:
        raise ConfigError("init.from", "", "grpo needs a model to start from: a run, a checkpoint or hf:FOLDER")


def joint_scoring(this: Trainer) -> JointScoring | None:
    """The configured reward models, at work beside the policy on all ranks."""
    reward, parallel = this.config.reward, this.config.parallel

    def weighted(name: str, source: str) -> Weighted:
        scorer = RewardModelScorer(source, parallel, this.platform, f"reward.{name}_model", name)
        return Weighted(getattr(reward, name), scorer)

    models = [weighted(name, source) for name, source in reward.models.items()]
    return JointScoring(models) if models else None


def ahead_of(
    rollouts: TakesRollouts, config: RunConfig, abandon: Callable[[], None], joint: JointScoring | None
) -> AheadRollouts:
    """The same rollouts, taken while the trainer learns; reward models score when it waits for one."""
    ahead, prompts, last = config.rollout.ahead, config.rl.prompts_per_rollout, config.train.steps
    if joint is None:
        return AheadRollouts(rollouts, ahead, prompts, last, abandon)

    def abandon_both() -> None:
        abandon()
        joint.close()

    return AheadRollouts(rollouts, ahead, prompts, last, abandon_both, joint.result)


class PruneJournal(Hook):
    """Drops rollouts that no checkpoint could need again."""

    def __init__(self, journal: Journal, train):
        self._journal = journal
        self._horizon = train.checkpoint_interval * (train.keep_checkpoints + 1)

    def after_step(self, state: TrainState, row: dict) -> None:
        self._journal.prune(before_step=state.step - self._horizon)


@contextmanager
def rollout_engine(
    this: Trainer, weights: Weights, replay: RoutingReplay | None, placement: Separate | Colocated
) -> Iterator[SyncedEngine]:
    """The configured engine, on rank 0; each step sends it the trainer's weights before it samples."""
    rollout = this.config.rollout
    if rollout.engine == "local":
        # Every rank has the whole model; rank 0 alone samples.
        local = LocalEngine(this.model, rollout.batch_size, this.tokenizer.pad, replay) if leads() else None
        yield SyncedEngine(local, None)
        return
    if isinstance(placement, Colocated) and this.platform.name == "cuda" and not rollout.sglang.server.memory_saver:
        allowed = "must be true with rollout.placement=colocated on a GPU: without it servers keep their memory"
        raise ConfigError("rollout.sglang.server.memory_saver", False, allowed)
    with shared_sglang_engine(
        rollout,
        this.config.model,
        this.model,
        weights.tokenizer_folder,
        this.folder / "logs",
        this.platform.name,
        placement.starting,
    ) as engine:
        if isinstance(placement, Colocated) and leads():
            assert isinstance(engine.engine, SGLangEngine)
            placement.engine = engine.engine
        yield engine
