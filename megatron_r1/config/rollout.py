"""How responses are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, iso_date, one_of, within
from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class WeightSyncConfig:
    """How the servers get new weights, and what they do with running requests meanwhile."""

    method: str = "group"
    """group (a process group, in memory), ipc (memory that colocated servers share with the trainer) or disk (a folder
    that the servers read)."""
    bucket_mb: int = 64
    """Megabytes (2^20 bytes) of weights that method=group or ipc sends at a time."""
    delta: bool = False
    """Whether method=group sends only the numbers that changed since the last sync, where they are fewer bytes. Pays
    with bf16 weights and small learning rates; holds a copy of the sent weights in host memory. Needs
    placement=separate, servers that this run starts, and weights that are not quantised."""
    include_mtp: bool = False
    """Whether the servers get the multi-token prediction layers too, at the start and with every sync. Servers with
    speculative decoding by these layers need them; others ignore them."""
    pause_mode: str = "finish"
    """What the servers do with running requests when weights change: finish (wait for them), retract (continue them
    with the new weights, after a new prefill), in_place (continue from the old cache) or abort (requests of other
    clients)."""

    def __post_init__(self) -> None:
        one_of(self, "method", ("group", "ipc", "disk"))
        one_of(self, "pause_mode", ("finish", "abort", "retract", "in_place"))
        within(self, 1, 65_536, "bucket_mb")


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Sampling of responses."""

    engine: str = "sglang"
    """Engine that samples: sglang (servers) or local (in this process, seeded)."""
    chat_template: str = "r1_zero"
    """Template around a question: r1_zero (of DeepSeek-R1-Zero), none (the question is the prompt), tokenizer (the
    model's own chat template), or a file with one."""
    template_date: str = ""
    """Day that a chat template learns from strftime_now, YYYY-MM-DD; empty: none, and a template that cannot do without
    is refused."""
    system_prompt: str = ""
    """System message before every question; the template must support one."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with this probability is sampled from."""
    max_response_tokens: int = 64
    """Longest response, in tokens."""
    local_batch_size: int = 256
    """Sequences that the local engine decodes at a time."""
    max_staleness: int = 0
    """Rollouts that are sampled ahead while the trainer trains, and the most updates by which the weights that sampled
    a token may be older than those that train on it: 0 alternates sampling and training, 1 is one step off-policy, more
    is asynchronous. Trained reward models score between steps only; rollouts that need them wait until then, which
    does not make them staler."""
    placement: str = "separate"
    """Where servers run: separate (on devices of their own) or colocated (on the trainer's, alternating with it)."""
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    """How the servers get new weights."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    """Servers of engine=sglang."""

    def __post_init__(self) -> None:
        one_of(self, "engine", ("sglang", "local"))
        one_of(self, "placement", ("separate", "colocated"))
        within(self, 0.0, 10.0, "temperature")
        within(self, 1e-6, 1.0, "top_p")
        at_least(self, 1, "max_response_tokens", "local_batch_size")
        if not self.chat_template:
            raise ConfigError("chat_template", self.chat_template, "must be r1_zero, none, tokenizer or a file")
        iso_date(self, "template_date")
        within(self, 0, 64, "max_staleness")
        if self.max_staleness and self.weight_sync.pause_mode == "abort":
            raise ConfigError(
                "weight_sync.pause_mode",
                "abort",
                "must be finish, retract or in_place with max_staleness: no response may be cut short",
            )
        if self.max_staleness and self.engine == "local":
            raise ConfigError(
                "max_staleness", self.max_staleness, "must be 0 with engine=local, whose weights are the trainer's own"
            )
        if self.sglang.server.speculative.method == "mtp" and not self.weight_sync.include_mtp:
            raise ConfigError(
                "weight_sync.include_mtp",
                False,
                "must be true with sglang.server.speculative.method=mtp, which drafts by them",
            )
        groups = self.sglang.server.data_parallel_attention
        if groups > 1 and self.weight_sync.method != "disk":
            method = self.weight_sync.method
            allowed = f"must be 1 with weight_sync.method={method}: SGLang takes weights from memory only without it"
            raise ConfigError("sglang.server.data_parallel_attention", groups, allowed)
        if self.weight_sync.delta:
            self._check_delta()
        if self.placement == "colocated":
            self._check_colocated()
        elif self.weight_sync.method == "ipc":
            raise ConfigError("weight_sync.method", "ipc", "must be group or disk with placement=separate")

    def _check_delta(self) -> None:
        """A delta needs servers that take it, and whose parameters hold what the last sync sent."""
        for key, value, allowed in (
            ("weight_sync.method", self.weight_sync.method, "group"),
            ("placement", self.placement, "separate"),
            ("sglang.server.quantization", self.sglang.server.quantization, "none"),
        ):
            if value != allowed:
                raise ConfigError(key, value, f"must be {allowed} with weight_sync.delta=true")
        if self.sglang.started_elsewhere:
            raise ConfigError("weight_sync.delta", True, "must be false with servers that are started elsewhere")

    def _check_colocated(self) -> None:
        """Colocated servers release their memory while the trainer trains, so they must belong to this run alone."""
        with_it = "with placement=colocated"
        for key, value, holds, allowed in (
            ("engine", self.engine, self.engine == "sglang", f"must be sglang {with_it}"),
            (
                "max_staleness",
                self.max_staleness,
                not self.max_staleness,
                f"must be 0 {with_it}: engine and trainer take turns",
            ),
            (
                "weight_sync.pause_mode",
                self.weight_sync.pause_mode,
                self.weight_sync.pause_mode == "finish",
                f"must be finish {with_it}: the servers serve nobody else",
            ),
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
