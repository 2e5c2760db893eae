"""How answers are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Sampling of answers."""

    engine: str = "sglang"
    """Who samples: sglang (servers) or local (in this process, seeded)."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with this probability is sampled from."""
    max_response_tokens: int = 64
    """Longest answer, in tokens."""
    batch_size: int = 256
    """Sequences that the local engine decodes at a time."""
    ahead: int = 0
    """Rollouts begun before their step, while the trainer learns, and most updates by which a token may be older than
    the weights that learn from it: 0 takes turns, 1 is one step off-policy, more is asynchronous."""
    sync: str = "group"
    """How new weights reach the servers: group (a process group, in memory) or disk (a folder that they read)."""
    bucket_mb: int = 64
    """Megabytes (2^20 bytes) of weights that sync=group sends at a time."""
    sync_mtp: bool = False
    """Whether the servers are given the multi-token layers too, at the start and with every sync. Those that draft with
    them need them; others let them pass."""
    pause: str = "finish"
    """What becomes of answers under way when weights change: finish (are waited for), retract (go on under the new
    weights, after their beginning was read again), in_place (go on from the old cache) or abort (those of others)."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    """Servers of engine=sglang."""

    def __post_init__(self) -> None:
        one_of(self, "engine", ("sglang", "local"))
        one_of(self, "sync", ("group", "disk"))
        one_of(self, "pause", ("finish", "abort", "retract", "in_place"))
        within(self, 0.0, 10.0, "temperature")
        within(self, 1e-6, 1.0, "top_p")
        at_least(self, 1, "max_response_tokens", "batch_size")
        within(self, 1, 65_536, "bucket_mb")
        within(self, 0, 64, "ahead")
        if self.ahead and self.pause == "abort":
            raise ConfigError(
                "pause", "abort", "must be finish, retract or in_place with ahead: no answer may be cut short"
            )
        if self.ahead and self.engine == "local":
            raise ConfigError("ahead", self.ahead, "must be 0 with engine=local, whose weights are the trainer's own")
        if self.sglang.server.speculative.method == "mtp" and not self.sync_mtp:
            raise ConfigError(
                "sync_mtp", False, "must be true with sglang.server.speculative.method=mtp, which drafts by them"
            )
        groups = self.sglang.server.data_parallel_attention
        if groups > 1 and self.sync == "group":
            allowed = "must be 1 with sync=group: SGLang takes weights over a group only without it"
            raise ConfigError("sglang.server.data_parallel_attention", groups, allowed)
