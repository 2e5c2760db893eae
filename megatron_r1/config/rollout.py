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
    template: str = "r1_zero"
    """What stands around a question: r1_zero (the template of DeepSeek-R1-Zero), none (the question is the prompt),
    tokenizer (the model's own chat template), or a file with one."""
    system_prompt: str = ""
    """Said before every question; the template must have a place for it."""
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
    the weights that learn from it: 0 takes turns, 1 is one step off-policy, more is asynchronous. Trained reward models
    score between steps only; rollouts that still need them wait until then, and are no staler for it."""
    placement: str = "separate"
    """Where the servers run: separate (on devices of their own) or colocated (on the trainer's, in turns with it)."""
    sync: str = "group"
    """How new weights reach the servers: group (a process group, in memory), ipc (memory that colocated ones share with
    the trainer) or disk (a folder that they read)."""
    bucket_mb: int = 64
    """Megabytes (2^20 bytes) of weights that sync=group or ipc sends at a time."""
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
        one_of(self, "placement", ("separate", "colocated"))
        one_of(self, "sync", ("group", "ipc", "disk"))
        one_of(self, "pause", ("finish", "abort", "retract", "in_place"))
        within(self, 0.0, 10.0, "temperature")
        within(self, 1e-6, 1.0, "top_p")
        at_least(self, 1, "max_response_tokens", "batch_size")
        if not self.template:
            raise ConfigError("template", self.template, "must be r1_zero, none, tokenizer or a file")
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
        if groups > 1 and self.sync != "disk":
            allowed = f"must be 1 with sync={self.sync}: SGLang takes weights from memory only without it"
            raise ConfigError("sglang.server.data_parallel_attention", groups, allowed)
        if self.placement == "colocated":
            self._check_colocated()
        elif self.sync == "ipc":
            raise ConfigError("sync", "ipc", "must be group or disk with placement=separate")

    def _check_colocated(self) -> None:
        """Servers on the trainer's devices stop and start with its turns, so they must be this run's own and alone."""
        with_it = "with placement=colocated"
        for key, value, holds, allowed in (
            ("engine", self.engine, self.engine == "sglang", f"must be sglang {with_it}"),
            ("ahead", self.ahead, not self.ahead, f"must be 0 {with_it}: engine and trainer take turns"),
            ("pause", self.pause, self.pause == "finish", f"must be finish {with_it}: the servers serve nobody else"),
            ("sglang.addresses", self.sglang.addresses, not self.sglang.addresses, f"must be empty {with_it}"),
            ("sglang.address_file", self.sglang.address_file, not self.sglang.address_file, f"must be empty {with_it}"),
            ("sglang.router", self.sglang.router, not self.sglang.router, f"must be empty {with_it}"),
            (
                "sglang.server.data_parallel_attention",
                self.sglang.server.data_parallel_attention,
                self.sglang.server.data_parallel_attention == 1,
                f"must be 1 {with_it}: only one of its groups says whether it is idle",
            ),
        ):
            if not holds:
                raise ConfigError(key, value, allowed)
