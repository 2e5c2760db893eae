"""What a weight sync sends, and how long it takes: `tools/plan_sync.py --model v3_671b --ranks 512 tensor=8 expert=64`.

Nothing runs: who sends which slice to whom follows from the rules that a running sync follows. Degrees are those of
the configuration's `parallel` section. The lower bound is what no way of sending could beat:

    max( bytes that the fullest rank of a server keeps / GB/s of one network card,
         bytes of the weights as they are sent / GB/s of all the trainer's network cards )
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator

from megatron_r1.config.cross_checks import check_degrees
from megatron_r1.config.load import load
from megatron_r1.errors import UserError
from megatron_r1.model.shards import ShardDirectory
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.plan.cost import GB, Cluster, Prediction, predict
from megatron_r1.rollout.sync.plan.layout import predicted
from megatron_r1.rollout.sync.plan.traffic import Engines, StageTraffic, needed_by_a_rank, traffic

SHOWN_RANKS = 4


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("degrees", nargs="*", metavar="DEGREE=N", help="of the trainer, as in parallel.*")
    made.add_argument("--model", default="v3_671b", help="a file of configs/model")
    made.add_argument("--ranks", type=int, help="of the trainer (default: as few as the degrees allow)")
    made.add_argument("--engines", type=int, default=1, help="servers")
    made.add_argument("--engine-tensor", type=int, default=8, help="ranks of one server")
    made.add_argument("--engine-expert", type=int, default=1, help="of those, ranks that experts are divided among")
    made.add_argument("--fp8", action="store_true", help="servers hold linear layers in FP8 blocks")
    made.add_argument("--mtp", action="store_true", help="the multi-token layers go too")
    made.add_argument("--bucket-mb", type=int, default=1024, help="2^20 bytes sent at a time")
    made.add_argument("--gpus-per-node", type=int, default=8)
    made.add_argument("--intra", type=float, default=450.0, metavar="GB/s", help="between GPUs of a node")
    made.add_argument("--inter", type=float, default=50.0, metavar="GB/s", help="of one network card; one for each GPU")
    made.add_argument("--latency-us", type=float, default=20.0, help="of one message between ranks")
    made.add_argument("--bucket-ms", type=float, default=5.0, help="of announcing one bucket to the servers")
    made.add_argument("--slices", metavar="PATTERN", help="also list the slices of the weights whose names match")
    return made


def report(stages: list[StageTraffic], engines: Engines, needed: int, found: Prediction) -> Iterator[str]:
    """The plan as lines."""
    yield "stage  leader  gathered by the leader                               buckets  broadcast to each server rank"
    for number, stage in enumerate(stages):
        links = [f"{rank}: {size / GB:.2f}" for rank, size in stage.gathered.items()]
        more = f", and {len(links) - SHOWN_RANKS} ranks more" if len(links) > SHOWN_RANKS else ""
        total = sum(stage.gathered.values())
        gathered = f"{total / GB:.2f} GB ({'; '.join(links[:SHOWN_RANKS])}{more})" if links else "nothing"
        yield f"{number:>5}  {stage.leader:>6}  {gathered:<52} {len(stage.buckets):>7}  {stage.nbytes / GB:.2f} GB"
    sent = sum(stage.nbytes for stage in stages)
    yield f"in all {sum(len(stage.buckets) for stage in stages)} buckets, {sent} bytes"
    yield f"received: {sent} bytes by each of the {engines.ranks} ranks of {engines.count} servers"
    yield f"kept: {needed} bytes by the fullest of them, {needed / sent:.1%} of it: SGLang receives whole weights"
    yield (
        f"predicted {found.total_s:.2f} s: servers receive for {found.broadcast_s:.2f} s, "
        f"the slowest stage gathers for {found.gather_s:.2f} s"
    )
    yield (
        f"lower bound {found.bound_s:.2f} s: a server's rank gets what it keeps in {found.bound_receive_s:.2f} s, "
        f"the trainer sends everything once in {found.bound_send_s:.2f} s"
    )


def slices(everything: ShardDirectory, stages: list[int], payload: WeightPayload, pattern: str) -> Iterator[str]:
    """Which rank sends which slice of a weight to which leader, and which tensors the servers get of it."""
    for name, (shape, parts) in everything.items():
        if not re.search(pattern, name) or not (entries := payload.entries(name)):
            continue
        leader = stages.index(stages[parts[0].rank])
        yield f"{name} {list(shape)} -> rank {leader} -> {', '.join(entry.name for entry in entries)}"
        for part in parts:
            place = ", ".join(f"{extent.start}:{extent.stop}" for extent in part.index)
            yield f"    rank {part.rank} [{place}]{' (there already)' if part.rank == leader else ''}"


def main() -> int:
    given = parser().parse_args()
    try:
        config = load("pretrain", [f"model={given.model}", *(f"parallel.{degree}" for degree in given.degrees)])
        ranks = given.ranks or config.parallel.fewest_ranks()
        check_degrees(config.parallel, ranks)
        everything, of_rank = predicted(config.model, config.parallel, ranks)
    except UserError as error:
        print(f"plan_sync: {error}", file=sys.stderr)
        return int(error.exit_code)
    payload = WeightPayload(config.model, given.mtp, given.fp8)
    engines = Engines(given.engines, given.engine_tensor, given.engine_expert)
    cluster = Cluster(given.gpus_per_node, given.intra, given.inter, given.latency_us / 1e6, given.bucket_ms / 1e3)
    stages, needed = traffic(everything, of_rank, payload, given.bucket_mb << 20), needed_by_a_rank(payload, engines)
    sys.stdout.writelines(
        f"{line}\n" for line in report(stages, engines, needed, predict(stages, ranks, needed, cluster))
    )
    if given.slices:
        sys.stdout.writelines(f"{line}\n" for line in slices(everything, of_rank, payload, given.slices))
    return 0


if __name__ == "__main__":
    sys.exit(main())
