"""Run on every rank of a layout: pre-training steps and a GRPO update, whose numbers go to files.

All of it in fp32 and once more in float64, where rounding cannot hide a difference. A single rank also computes the
GRPO update by the plain loss over the whole vocabulary.

Started by test_layouts.py with a folder that holds job.json: the configuration, models that teach, and
whether reinforcement learning can do it.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.support.float64 import DTYPE, float64

STEPS = 3
PROMPTS, GROUP = 4, 4
REFERENCE_SCALE = 1.02


def main(folder: Path) -> None:
    from megatron_r1.config.run import RunConfig
    from megatron_r1.config.schema import convert
    from megatron_r1.platform import select

    job = json.loads((folder / "job.json").read_text())
    config, platform = convert(RunConfig, job["config"]), select("cpu")
    config.train.optimizer.max_grad_norm = 0.0
    from megatron_r1.parallel.mesh import process_groups

    with process_groups(platform, config.parallel, seed=0, threads=1), ExitStack() as stack:
        for precision in ("fp32", DTYPE):
            if precision == DTYPE:
                stack.enter_context(float64())
            config.model.dtype = precision
            found = {"pretrain": pretrain(config, platform)}
            if precision == "fp64":
                found["packed"] = packed(config, platform, cross=True)
            if precision == "fp64" and config.parallel.context == 1:
                found["apart"] = packed(config, platform, cross=False)
            if precision == "fp64" and job["fine_tune"]:
                found["supervised"] = supervised(post_training(config), platform)
                found["taught"] = taught(post_training(config), platform, job["teachers"])
            if job["reinforce"]:
                found["grpo"] = reinforce(post_training(config), platform)
                if precision == "fp64":
                    teacher = build_teacher(job["teachers"]["dense"], config, platform)
                    found["distilled"] = reinforce(with_teacher(post_training(config)), platform, teacher)
                if precision == "fp64" and not (config.model.tied_embeddings and config.parallel.pipeline > 1):
                    found["ppo"] = reinforce(with_critic(post_training(config)), platform)
            if dist.get_world_size() == 1:
                found["plain"] = reinforce_plainly(post_training(config), platform)
                if precision == "fp64":
                    found["alone"] = supervised(post_training(config), platform, alone=True)
                    found["whole"], found["written"] = distilled_all_tokens(
                        post_training(config), platform, job["teachers"]["dense"]
                    )
            if dist.get_rank() == 0:
                for name, (numbers, gradients) in found.items():
                    (folder / f"{name}-{precision}.json").write_text(json.dumps(numbers))
                    torch.save(gradients, folder / f"{name}-{precision}.pt")


def build(config: Any, platform: Any) -> Any:
    from megatron_r1.model.build import build_model

    return build_model(config.model, config.parallel, platform, 0, config.performance)


def pretrain(config: Any, platform: Any) -> tuple[dict, dict]:
    """Losses of some steps, and the whole gradients of the first."""
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.train.metrics import logged_metrics
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.stream import next_token_forward
    from megatron_r1.train.update import update

    model = build(config, platform)
    optimizer = Optimizer(model, config.train, config.performance)
    group = data_parallel_group()
    generator = torch.Generator().manual_seed(1)
    losses, norms, routing, gradients = [], [], [], {}
    for step in range(STEPS):
        # One step has three micro-batches, which are no multiple of two pipeline ranks.
        number, size = (6, 2 // dist.get_world_size(group)) if step == STEPS - 2 else (8, 2)
        rows = torch.randint(5, 512, (number, 33), generator=generator)
        mine = rows[dist.get_rank(group) :: dist.get_world_size(group)]
        result = update(model, optimizer, mine.split(size), next_token_forward, 1e-3, 32, micro_batch_size=size)
        losses.append(logged_metrics(result)["train/loss"])
        norms.append(result.gradient_norm)
        loads = {layer: load_E.tolist() for layer, load_E in result.passes.expert_load.items()}
        routing.append({"mtp_loss": result.passes.mtp_loss, **loads})
        if step == 0:
            gradients = whole_gradients(model, optimizer)
    return {"losses": losses, "norms": norms, "routing": routing}, gradients


def packed(config: Any, platform: Any, cross: bool) -> tuple[dict, dict]:
    """Loss of a step on packed documents, that see those before them or do not, and its whole gradients."""
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.train.metrics import logged_metrics
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.packed import PackedReader
    from megatron_r1.train.update import update
    from tests.support.packing_cases import packed_batch

    model = build(config, platform)
    optimizer = Optimizer(model, config.train, config.performance)
    reader, group = PackedReader(cross, config.model.mtp.num_layers, platform.device), data_parallel_group()
    rows = reader.micro_batches(packed_batch(8, 32), dist.get_rank(group), dist.get_world_size(group), 2)
    result = update(model, optimizer, rows, reader.forward, 1e-3, 32, micro_batch_size=2)
    found = {"losses": [logged_metrics(result)["train/loss"]], "norms": [result.gradient_norm]}
    return found, whole_gradients(model, optimizer)


def supervised(config: Any, platform: Any, alone: bool = False) -> tuple[dict, dict]:
    """Loss of a step of fine-tuning on packed examples, and its whole gradients.

    `alone` gives every example a forward pass of its own, as long as it is, under the causal mask.
    """
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.sft.supervised import SupervisedReader
    from megatron_r1.train.metrics import logged_metrics
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.routing import FROZEN
    from megatron_r1.train.update import update
    from tests.support.packing_cases import chat_batch, one_example_a_row

    model, batch = build(config, platform), chat_batch(8, 32)
    FROZEN.apply(model, 0)
    optimizer = Optimizer(model, config.train, config.performance)
    reader = SupervisedReader(not alone, config.model.mtp.num_layers, platform.device, int(alone))
    group, size = data_parallel_group(), 1 if alone else 2
    batch = one_example_a_row(batch) if alone else batch
    rows = reader.micro_batches(batch, dist.get_rank(group), dist.get_world_size(group), size)
    result = update(model, optimizer, rows, reader.forward, 1e-3, *reader.shape(32, size))
    row = {"losses": [logged_metrics(result)["train/loss"]], "norms": [result.gradient_norm]}
    return row, whole_gradients(model, optimizer)


def taught(config: Any, platform: Any, teachers: dict[str, Any]) -> tuple[dict, dict]:
    """Losses of a step beside each of some teachers, and whole gradients."""
    from megatron_r1.config.sft import TeacherConfig
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.routing import FROZEN

    model = build(config, platform)
    FROZEN.apply(model, 0)
    optimizer = Optimizer(model, config.train, config.performance)
    settings = TeacherConfig(top_k=24, temperature=1.5, weight=0.6)
    losses, gradients = [], {}
    for kind, tree in teachers.items():
        teacher = build_teacher(tree, config, platform)
        losses.append(update_beside(teacher, settings, config, platform, model, optimizer))
        gradients |= {f"{kind} {name}": tensor for name, tensor in whole_gradients(model, optimizer).items()}
    return {"losses": losses}, gradients


def build_teacher(tree: Any, config: Any, platform: Any) -> Any:
    """A model of another shape, shared out as a teacher is."""
    from megatron_r1.config.model import ModelConfig
    from megatron_r1.config.schema import convert
    from megatron_r1.runs.teacher import shared_as

    teacher = copy.copy(config)
    teacher.model = convert(ModelConfig, tree)
    teacher.model.dtype = config.model.dtype
    teacher.parallel = shared_as(config.parallel, config.model, teacher.model)
    return build(teacher, platform)


def update_beside(teacher: Any, settings: Any, config: Any, platform: Any, model: Any, optimizer: Any) -> float:
    """The loss of a step that fills the gradient buffers and moves no weight."""
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.sft.teacher import DistillingReader, Teacher
    from megatron_r1.train.metrics import logged_metrics
    from megatron_r1.train.update import update
    from tests.support.packing_cases import chat_batch

    group, vocab_size = data_parallel_group(), config.model.vocab_size
    speaks = Teacher(teacher, settings.top_k, settings.temperature, vocab_size)
    reader = DistillingReader(speaks, settings, None, config.model.mtp.num_layers, platform.device)
    rows = reader.micro_batches(chat_batch(8, 32), dist.get_rank(group), dist.get_world_size(group), 2)
    return logged_metrics(update(model, optimizer, rows, reader.forward, 0.0, *reader.shape(32, 2)))["train/loss"]


def distilled_all_tokens(config: Any, platform: Any, tree: Any) -> list[tuple[dict, dict]]:
    """Loss and gradients with a teacher that gives its whole vocabulary; and by the divergence written out."""
    from megatron_r1.config.sft import TeacherConfig
    from megatron_r1.sft.supervised import SupervisedReader, end_to_end
    from megatron_r1.train.optimizer import Optimizer
    from tests.support.packing_cases import chat_batch

    config = copy.deepcopy(config)
    config.model.mtp.num_layers = 0
    vocab_size = config.model.vocab_size
    model, teacher = build(config, platform), build_teacher(tree, config, platform)
    [rows] = SupervisedReader(True, 0, platform.device).micro_batches(chat_batch(8, 32), 0, 1, 8)
    tokens_1T, positions_1T, apart = end_to_end(rows)
    log_p_TV, log_q_TV = (
        one(tokens_1T, positions_1T, None, packed_seq_params=apart)[0, :, :vocab_size].log_softmax(-1)
        for one in (model, teacher)
    )
    log_q_TV = log_q_TV.detach()
    divergence_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
    loss = divergence_T[rows.loss_mask_BL.flatten() > 0].mean()
    loss.backward()
    written = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer = Optimizer(model, config.train, config.performance)
    settings = TeacherConfig(top_k=vocab_size, weight=1.0)
    losses = [update_beside(teacher, settings, config, platform, model, optimizer)]
    return [({"losses": losses}, whole_gradients(model, optimizer)), ({"losses": [float(loss.detach())]}, written)]


def post_training(config: Any) -> Any:
    """The same model, the routers' balance left alone, and a rollout to learn from in one mini-batch."""
    config = copy.deepcopy(config)
    config.model.moe.sequence_loss_coefficient = config.model.moe.bias_update_rate = 0.0
    config.rl.prompts_per_rollout, config.rl.group_size, config.rl.updates_per_rollout = PROMPTS, GROUP, 1
    config.rl.tokens_per_micro_batch, config.rl.kl_coefficient, config.rollout.temperature = 120, 0.05, 0.7
    config.rl.routing_replay = config.model.moe.num_experts > 0
    return config


def with_critic(config: Any) -> Any:
    """The same by PPO, every response twice, so that among several ranks some change theirs."""
    rl = config.rl
    rl.advantage_estimator, rl.loss_aggregation, rl.kl_placement, rl.kl_estimator, rl.epochs_per_rollout = (
        "critic",
        "token_mean",
        "reward",
        "k1",
        2,
    )
    config.train.schedule.warmup_steps, config.train.schedule.learning_rate = 0, 1e-5
    rl.critic.learning_rate, rl.critic.gae_lambda = 1e-5, 0.9
    return config


def with_teacher(config: Any) -> Any:
    """The same by on-policy distillation."""
    config.rl.kl_estimator, config.rl.loss_aggregation, config.rl.kl_coefficient = "exact", "token_mean", 1.0
    return config


def critic_of(config: Any, platform: Any) -> tuple[Any, Any]:
    """A value model whose head says something, and its optimizer."""
    from megatron_r1.model.names import in_multi_token_layer
    from megatron_r1.model.reward_head import HEAD, add_reward_head
    from megatron_r1.train.optimizer import Optimizer

    model = build(config, platform)
    add_reward_head(model)
    for name, parameter in model.named_parameters():
        if HEAD in name:
            parameter.data.fill_(0.01)
        parameter.requires_grad_(not in_multi_token_layer(name) and "output_layer" not in name.split("."))
    return model, Optimizer(model, config.train, config.performance)


def reinforce(config: Any, platform: Any, teacher: Any = None) -> tuple[dict, dict]:
    """Metrics of one rollout in one mini-batch, and its whole gradients; the critic's too where there is one.

    Args:
        teacher: a model in the reference's place.
    """
    from megatron_r1.model.names import in_multi_token_layer
    from megatron_r1.model.replay import RoutingReplay
    from megatron_r1.rl.advantages.critic import Critic
    from megatron_r1.rl.learner import Learner
    from megatron_r1.rl.policy.reference import ReferencePolicy
    from megatron_r1.rl.policy.teacher import TeacherPolicy
    from megatron_r1.track.metrics import reproducible
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.state import TrainState

    model = build(config, platform)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not in_multi_token_layer(name))
    optimizer = Optimizer(model, config.train, config.performance)
    reference = ReferencePolicy(model)
    for copy_of_weight in reference.copies:
        copy_of_weight *= REFERENCE_SCALE
    replay = RoutingReplay(model, config.model.moe.first_dense_layers) if config.rl.routing_replay else None
    beside = critic_of(config, platform) if config.rl.advantage_estimator == "critic" else None
    critic = Critic(*beside, config.rl.critic) if beside else None
    fixed = TeacherPolicy(teacher, config.model.vocab_size) if teacher else reference
    learner = Learner(config, model, optimizer, fixed, 0, "cpu", replay, critic)
    _, row = learner.learn(scattered(list(samples(config.model)), learner), TrainState())
    gradients = whole_gradients(model, optimizer)
    if beside:
        gradients |= {f"critic {name}": gradient for name, gradient in whole_gradients(*beside).items()}
    return reproducible(row), gradients


def scattered(whole: list[Any], learner: Any) -> list[Any]:
    """The samples as this rank gets them from rank 0: of what it has no pass over, it knows no tokens."""
    from megatron_r1.parallel.mesh import data_parallel_group
    from megatron_r1.rl.generation.rollouts import Rollout
    from megatron_r1.rl.loop import scatter_responses

    if dist.get_world_size() == 1:
        return whole
    rollout = Rollout(whole, {})
    shares = learner.shares(whole, 0)
    given = rollout if dist.get_rank() == 0 else rollout.without_responses()
    found = scatter_responses(given, shares).samples
    mine = shares[data_parallel_group().rank()]
    assert [one.response for one in found] == [one.response if i in mine else None for i, one in enumerate(whole)]
    assert learner.shares(found, 0) == shares and set().union(*shares) == {*range(len(whole))}
    return found


def reinforce_plainly(config: Any, platform: Any) -> tuple[dict, dict]:
    """The same update's loss and gradients by the loss written out, on one rank."""
    from megatron_r1.model.build import native_tensors
    from megatron_r1.model.replay import NOT_RECORDED, RoutingReplay
    from tests.support.plain_grpo import plain_loss

    model, reference = build(config, platform), build(config, platform)
    for _, tensor in native_tensors(reference):
        tensor *= REFERENCE_SCALE
    settings = config.rollout.temperature, config.rl.clip_epsilon, config.rl.kl_coefficient
    replay = RoutingReplay(model, config.model.moe.first_dense_layers)

    def replaying(sample: Any) -> AbstractContextManager:
        if sample.response.routed_experts is None:
            return nullcontext()
        replayed_TNK = torch.from_numpy(sample.response.routed_experts.astype(np.int64))
        last_1NK = torch.full_like(
            replayed_TNK[:1], NOT_RECORDED
        )  # nothing follows the last token, which is read here too
        return replay.replaying(torch.cat([replayed_TNK, last_1NK])[None], backward=False)

    loss = plain_loss(model, reference, list(samples(config.model)), *settings, replaying)
    loss.backward()
    return {"policy/loss": float(loss.detach())}, {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def samples(model: Any) -> Iterator[Any]:
    """Responses of many lengths to prompts of many lengths, off-policy; every second one with recorded experts."""
    from megatron_r1.rollout.routed_experts import narrowed
    from tests.support.samples import make_sample

    generator = torch.Generator().manual_seed(4)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    moe = model.moe

    def experts(tokens: int) -> np.ndarray | None:
        if not moe.num_experts:
            return None
        scores = torch.rand(
            tokens, model.num_layers - moe.first_dense_layers, moe.num_experts, generator=generator, dtype=torch.float32
        )
        return narrowed(scores.topk(moe.top_k).indices.numpy())

    for group in range(PROMPTS):
        prompt = tuple(torch.randint(5, 512, (draw(3, 12),), generator=generator).tolist())
        for number in range(GROUP):
            length = draw(1, 20)
            response = tuple(torch.randint(5, 512, (length,), generator=generator).tolist())
            log_probs = tuple((-6.3 + 0.4 * torch.randn(length, generator=generator, dtype=torch.float32)).tolist())
            reward = float(draw(0, 3))
            routed = experts(len(prompt) + length - 1) if number % 2 else None
            yield make_sample(
                prompt_id=str(group), group=group, prompt_tokens=prompt, response_tokens=response, logprobs=log_probs,
                reward=reward, reward_parts={"accuracy": reward}, routed_experts=routed,
            )  # fmt: skip


def whole_gradients(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Gradient buffers, gathered like weights; what has no gradient shows itself and must be equal too."""
    from megatron_r1.model.shards import whole_tensors

    for buffer in optimizer.buffers():
        # Data-parallel ranks have summed up one part each.
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            mine = bucket.grad_data.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)

    def gradient(parameter: torch.Tensor) -> torch.Tensor:
        return getattr(parameter, "main_grad", parameter.detach())

    return {name: tensor.clone() for name, tensor in whole_tensors(model, of=gradient)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
