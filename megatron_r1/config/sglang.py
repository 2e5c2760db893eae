"""SGLang servers: how many and of what kind, and how requests find their way to them.

Options are named by what they do; rollout/sglang/servers/arguments.py holds SGLang's own names for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError

AUTO = "auto"
"""Left to SGLang."""


@dataclass(kw_only=True, slots=True)
class SpeculativeConfig:
    """Several tokens a step: a draft by the model's own multi-token layers, which the model then verifies."""

    method: str = "none"
    """none, or mtp (the multi-token prediction layers draft)."""
    steps: int = 1
    """Draft steps before a verification."""
    top_k: int = 1
    """Branches of the draft at each step."""
    draft_tokens: int = 2
    """Tokens that one verification looks at."""

    def __post_init__(self) -> None:
        one_of(self, "method", ("none", "mtp"))
        at_least(self, 1, "steps", "top_k")
        at_least(self, 2, "draft_tokens")
        if self.top_k == 1 and self.draft_tokens != self.steps + 1:
            raise ConfigError("draft_tokens", self.draft_tokens, f"must be steps + 1={self.steps + 1} where top_k is 1")


@dataclass(kw_only=True, slots=True)
class ServerConfig:
    """What one server is made of."""

    tensor_parallel: int = 1
    """Ranks that share the model's layers."""
    expert_parallel: int = 1
    """Ranks, of those, that the experts are divided among."""
    data_parallel_attention: int = 1
    """Groups of those ranks that attend to requests of their own; 1 shares every attention."""
    memory_fraction: float = 0.0
    """Share of a device's memory for weights and key-value cache; 0 leaves it to SGLang."""
    chunked_prefill_tokens: int = 0
    """Most prompt tokens that are read in one step; 0 leaves it to SGLang."""
    quantization: str = "none"
    """Of the linear layers: none, or fp8 (128 x 128 blocks, as DeepSeek-V3)."""
    kv_cache_dtype: str = AUTO
    """Number format of the key-value cache: auto (the model's), fp8_e4m3 or fp8_e5m2."""
    attention_backend: str = AUTO
    """SGLang's name of the attention kernels; auto takes torch_native on the CPU, else SGLang's own choice."""
    expert_dispatch: str = "none"
    """How tokens reach experts of other ranks: none (SGLang's collectives) or deepep."""
    return_routed_experts: bool = False
    """Answers can say which experts their tokens took, as rl.routing_replay needs."""
    memory_saver: bool = False
    """Memory can be given back to a trainer on the same devices."""
    cuda_graph: bool = True
    """Capture decoding as CUDA graphs; without effect on the CPU."""
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    """Drafts that are verified."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tensor_parallel", "expert_parallel", "data_parallel_attention")
        at_least(self, 0, "chunked_prefill_tokens")
        within(self, 0.0, 0.99, "memory_fraction")
        one_of(self, "quantization", ("none", "fp8"))
        one_of(self, "kv_cache_dtype", (AUTO, "fp8_e4m3", "fp8_e5m2"))
        one_of(self, "expert_dispatch", ("none", "deepep"))
        for name in ("expert_parallel", "data_parallel_attention"):
            if self.tensor_parallel % getattr(self, name):
                allowed = f"must divide tensor_parallel={self.tensor_parallel}"
                raise ConfigError(name, getattr(self, name), allowed)
        if self.expert_dispatch == "deepep" and self.expert_parallel != self.tensor_parallel:
            allowed = f"needs expert_parallel=tensor_parallel={self.tensor_parallel}"
            raise ConfigError("expert_dispatch", "deepep", allowed)


@dataclass(kw_only=True, slots=True)
class PoolConfig:
    """How requests are spread over servers and what is done about those that fail."""

    requests_per_call: int = 64
    """Requests of one HTTP call: whole groups of one prompt as far as they fit; what fails is tried again together."""
    in_flight_per_server: int = 1024
    """Requests that wait for a server's answers at a time; later ones are sent as earlier ones come back."""
    give_up_s: float = 900.0
    """Seconds of trying after which a request counts as lost; time without any server does not count."""
    capacity_timeout_s: float = 600.0
    """Seconds without a server that answers after which the run stops, with a checkpoint."""
    retry_share: float = 0.1
    """Requests that are sent again, as a share of those that were sent first; more are held back."""
    retry_floor_per_s: float = 10.0
    """Requests a second, for each server, that may be sent again whatever the share."""
    breaker_failures: int = 10
    """Calls to a server that must fail one after the other for it to be left alone."""
    breaker_cooldown_s: float = 1.0
    """Seconds that it is left alone until one call tries it; doubles with every try that fails."""
    health_interval_s: float = 5.0
    """Seconds between two looks at a server."""
    hang_timeout_s: float = 300.0
    """Seconds without a sign of progress after which a server counts as hung."""
    restarts: int = 3
    """Restarts in a row, without an answer in between, after which a server is given up; 0 never restarts."""

    def __post_init__(self) -> None:
        at_least(self, 1, "requests_per_call", "in_flight_per_server", "breaker_failures")
        at_least(self, 0.01, "give_up_s", "capacity_timeout_s", "health_interval_s", "hang_timeout_s")
        at_least(self, 0.001, "breaker_cooldown_s")
        at_least(self, 0, "restarts")
        within(self, 0.0, 10.0, "retry_share")
        at_least(self, 0.01, "retry_floor_per_s")


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """Servers on nodes of this SLURM job that another of its steps or components starts."""

    nodes: str = "none"
    """Whose nodes have servers: none (they are not found by SLURM), job (all nodes), or component (of a heterogeneous
    job)."""
    component: int = 0
    """Number of the component, with nodes=component."""
    skip_nodes: int = 0
    """How many of those nodes, from the first, have no server: the trainer's own."""
    ports: list[int] = field(default_factory=lambda: [30_000])
    """Port of each server of a node."""

    def __post_init__(self) -> None:
        one_of(self, "nodes", ("none", "job", "component"))
        at_least(self, 0, "component", "skip_nodes")
        if (
            not self.ports
            or len(set(self.ports)) < len(self.ports)
            or not all(0 < port < 65_536 for port in self.ports)
        ):
            raise ConfigError("ports", self.ports, "must be different numbers between 1 and 65535")


@dataclass(kw_only=True, slots=True)
class SGLangConfig:
    """The SGLang servers of a run."""

    servers: int = 1
    """Servers to start, or to wait for in `address_file`; without effect where `addresses` or `slurm` names some."""
    first_gpu: int = -1
    """First GPU of the servers that are started here, each of which takes its own; -1 takes those behind the trainer's,
    or the trainer's where they are colocated or there are no others."""
    addresses: list[str] = field(default_factory=list)
    """Servers that run already, as http://host:port; keys in SGLANG_API_KEY and SGLANG_ADMIN_API_KEY."""
    address_file: str = ""
    """File that a launcher writes such addresses into, one a line; `servers` of them are waited for."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Servers at known ports of this SLURM job's nodes, which are waited for."""
    router: str = ""
    """http://host:port of an sglang-router that requests go through; it is told of the servers that are started."""
    start_timeout_s: float = 240.0
    """Seconds a server may take until it answers."""
    request_timeout_s: float = 300.0
    """Seconds that one call may take."""
    max_running_requests: int = 512
    """Requests that one server decodes at a time."""
    max_total_tokens: int = 65_536
    """Tokens that one server's key-value cache holds; 0 leaves it to the memory fraction."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """What each server is made of."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """How requests are spread over servers."""

    def __post_init__(self) -> None:
        if self.address_file:  # servers of any number of machines
            at_least(self, 1, "servers")
        else:
            within(self, 1, 64, "servers")
        at_least(self, -1, "first_gpu")
        at_least(self, 1, "start_timeout_s", "max_running_requests")
        at_least(self, 0.01, "request_timeout_s")
        at_least(self, 0, "max_total_tokens")
        for name, values in (("addresses", self.addresses), ("router", [self.router] if self.router else [])):
            for value in values:
                if not value.startswith(("http://", "https://")) or value.endswith("/"):
                    raise ConfigError(name, value, "must be http://host:port")
        if self.addresses and self.address_file:
            raise ConfigError("address_file", self.address_file, "must be empty where addresses names servers")
        if self.slurm.nodes != "none" and (self.addresses or self.address_file):
            allowed = "must be none where addresses or address_file names servers"
            raise ConfigError("slurm.nodes", self.slurm.nodes, allowed)
        if len(set(self.addresses)) < len(self.addresses):
            raise ConfigError("addresses", self.addresses, "must name every server once")

    @property
    def started_elsewhere(self) -> bool:
        """Whether somebody else starts, restarts and stops the servers."""
        return bool(self.addresses or self.address_file or self.slurm.nodes != "none")
