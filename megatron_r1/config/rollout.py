"""How answers are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within


@dataclass(kw_only=True, slots=True)
class SGLangConfig:
    """The SGLang servers that this program starts."""

    servers: int = 1
    """Servers to start; prompts are divided among them."""
    start_timeout_s: float = 240.0
    """Seconds a server may take until it answers."""
    request_timeout_s: float = 300.0
    """Seconds one batch of requests may take."""
    max_running_requests: int = 512
    """Requests that one server decodes at a time."""
    max_total_tokens: int = 65_536
    """Tokens that one server's key-value cache holds."""

    def __post_init__(self) -> None:
        within(self, 1, 64, "servers")
        at_least(self, 1, "start_timeout_s", "request_timeout_s", "max_running_requests", "max_total_tokens")


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
    sync: str = "group"
    """How new weights reach the servers: group (a process group, in memory) or disk (a folder that they read)."""
    bucket_mb: int = 64
    """Megabytes (2^20 bytes) of weights that sync=group sends at a time."""
    sync_mtp: bool = False
    """Whether sync=group sends the multi-token layers too; only servers that draft with them take them."""
    pause: str = "finish"
    """What becomes of answers under way at a sync=group: finish, abort, retract (read again) or in_place (go on)."""
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
