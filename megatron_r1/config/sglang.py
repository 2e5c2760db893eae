"""SGLang servers: their number and options, and how requests are sent to them.

Keys are named by what they do; rollout/sglang/servers/arguments.py translates them to SGLang's own names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError

AUTO = "auto"
"""Left to SGLang."""
ATTENTION_BACKENDS = (
    *("fa3", "fa4", "flashinfer", "flashmla", "trtllm_mla", "cutedsl_mla", "trtllm_mha"),
    *("triton", "flex_attention", "torch_native"),
)
"""Those of SGLang's that NVIDIA's GPUs or a CPU have, for attention as in this project's models."""


@dataclass(kw_only=True, slots=True)
class SpeculativeConfig:
    """Speculative decoding: the model's own multi-token layers draft tokens, which the model then verifies."""

    method: str = "none"
    """none, or mtp (the multi-token prediction layers draft)."""
    steps: int = 1
    """Draft steps before a verification."""
    top_k: int = 1
    """Branches of the draft at each step."""
    draft_tokens: int = 2
    """Tokens that one verification checks."""

    def __post_init__(self) -> None:
        one_of(self, "method", ("none", "mtp"))
        at_least(self, 1, "steps", "top_k")
        at_least(self, 2, "draft_tokens")
        if self.top_k == 1 and self.draft_tokens != self.steps + 1:
            raise ConfigError("draft_tokens", self.draft_tokens, f"must be steps + 1={self.steps + 1} where top_k is 1")


@dataclass(kw_only=True, slots=True)
class ServerConfig:
    """Options of one server."""

    tensor_parallel: int = 1
    """Ranks that share the model's layers."""
    expert_parallel: int = 1
    """Number of those ranks among which the experts are divided."""
    data_parallel_attention: int = 1
    """Groups of those ranks, each of which computes attention for requests of its own; 1 has no data parallelism."""
    memory_fraction: float = 0.0
    """Share of a device's memory for weights and key-value cache; 0 leaves it to SGLang."""
    chunked_prefill_tokens: int = 0
    """Most prompt tokens of one prefill step; 0 leaves it to SGLang."""
    quantization: str = "none"
    """Quantization of the linear layers: none, or fp8 (128 x 128 blocks, as DeepSeek-V3)."""
    kv_cache_dtype: str = AUTO
    """Number format of the key-value cache: auto (the model's), fp8_e4m3 or fp8_e5m2."""
    attention_backend: str = AUTO
    """SGLang's name of the attention kernels; auto takes torch_native on the CPU, else SGLang's own choice, or triton
    for sizes without compiled kernels, which no published model has."""
    expert_dispatch: str = "none"
    """How ranks exchange tokens for the experts: none (SGLang's collectives) or deepep."""
    return_routed_experts: bool = False
    """Whether replies can contain the experts that the routers chose for each token, as rl.routing_replay needs."""
    memory_saver: bool = False
    """Whether the server can release its memory for a trainer on the same devices."""
    cuda_graph: bool = True
    """Whether decoding is captured as CUDA graphs; without effect on the CPU."""
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    """Speculative decoding."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tensor_parallel", "expert_parallel", "data_parallel_attention")
        at_least(self, 0, "chunked_prefill_tokens")
        within(self, 0.0, 0.99, "memory_fraction")
        one_of(self, "quantization", ("none", "fp8"))
        one_of(self, "kv_cache_dtype", (AUTO, "fp8_e4m3", "fp8_e5m2"))
        one_of(self, "attention_backend", (AUTO, *ATTENTION_BACKENDS))
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
    """How the pool distributes requests over servers, retries failed ones and supervises servers."""

    requests_per_call: int = 64
    """Requests of one HTTP call: whole groups of one prompt where they fit; those that fail are retried together."""
    in_flight_per_server: int = 1024
    """Most requests in flight at a server; further ones are sent as earlier ones are answered."""
    give_up_s: float = 900.0
    """Seconds of attempts after which a request has failed; time without any server does not count."""
    capacity_timeout_s: float = 600.0
    """Seconds without any server that answers, after which the run stops with a checkpoint."""
    retry_share: float = 0.1
    """Most retries, as a share of first attempts; further retries wait."""
    retry_floor_per_s: float = 10.0
    """Retries per second and server that are allowed whatever the share."""
    breaker_failures: int = 10
    """Consecutive failed calls to a server after which its circuit breaker opens: it gets no requests."""
    breaker_cooldown_s: float = 1.0
    """Seconds until an open breaker lets one call through; doubles with every such call that fails."""
    health_interval_s: float = 5.0
    """Seconds between health checks of a server."""
    hang_timeout_s: float = 300.0
    """Seconds without progress after which a server counts as hung."""
    restarts: int = 3
    """Consecutive restarts, without an answered request in between, after which a server is given up; 0 never
    restarts."""

    def __post_init__(self) -> None:
        at_least(self, 1, "requests_per_call", "in_flight_per_server", "breaker_failures")
        at_least(self, 0.01, "give_up_s", "capacity_timeout_s", "health_interval_s", "hang_timeout_s")
        at_least(self, 0.001, "breaker_cooldown_s")
        at_least(self, 0, "restarts")
        within(self, 0.0, 10.0, "retry_share")
        at_least(self, 0.01, "retry_floor_per_s")


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """Servers on nodes of this SLURM job, started by another step or component of the job."""

    nodes: str = "none"
    """Nodes with servers: none (servers are not found by SLURM), job (all nodes), or component (the nodes of one
    component of a heterogeneous job)."""
    component: int = 0
    """Number of the component, with nodes=component."""
    skip_nodes: int = 0
    """First nodes without servers: the trainer's own."""
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
    """First GPU of the servers that the run starts, each of which has its own GPUs; -1 takes the GPUs after the
    trainer's, or the trainer's own where servers are colocated or the machine has one GPU."""
    addresses: list[str] = field(default_factory=list)
    """Servers that already run, as http://host:port; their keys are in SGLANG_API_KEY and SGLANG_ADMIN_API_KEY."""
    address_file: str = ""
    """File into which a launcher writes such addresses, one a line; the run waits for `servers` of them."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Servers at known ports of this SLURM job's nodes, for which the run waits."""
    router: str = ""
    """http://host:port of an sglang-router for the requests; the run registers its servers there."""
    start_timeout_s: float = 0.0
    """Seconds until a started server must answer; 0 is 240 on a CPU, and 3,600 on a GPU, where SGLang compiles kernels
    at the first start."""
    request_timeout_s: float = 300.0
    """Seconds that one call may take."""
    max_running_requests: int = 512
    """Requests that one server decodes at a time."""
    max_total_tokens: int = 65_536
    """Tokens in the key-value cache of one server; 0 derives the number from memory_fraction."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Options of each server."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """How requests are distributed over servers."""

    def __post_init__(self) -> None:
        if self.address_file:  # servers of any number of machines
            at_least(self, 1, "servers")
        else:
            within(self, 1, 64, "servers")
        at_least(self, -1, "first_gpu")
        at_least(self, 0, "start_timeout_s")
        at_least(self, 1, "max_running_requests")
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
        """Whether the servers are started, restarted and stopped outside of this run."""
        return bool(self.addresses or self.address_file or self.slurm.nodes != "none")
