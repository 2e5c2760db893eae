"""The experts' exchange: how many copies of a token leave a rank, and over which link."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from megatron_r1.config.hardware import Gpu
from megatron_r1.config.model import MoeConfig
from megatron_r1.config.run import RunConfig

BF16, FP8 = 2, 1 + 4 / 128
NETWORK_SHARE, NVLINK_SHARE, BOTH_LINKS = 0.88, 0.68, 3
"""Shares of a link that kernels for this exchange reach, and the exponent by which two links are slower together than
the slower one alone: from benchmarks of the kernels' authors, not fitted to steps.

DeepEP on H800 (its README: FP8 to the experts): 51 GB/s with 64 ranks and 58 with 32, of which 7/8 and 3/4 leave a node
of 50 GB/s a GPU, so 0.89 and 0.87; 153 GB/s with 8 ranks, of which 7/8 leave a GPU of 200 GB/s, so 0.67. Hybrid-EP
(Hybrid-EP_Implementation.md): 0.87 of InfiniBand with 32 and 64 H100, 0.65 of NVLink with 32 GB200. With 16 ranks both
links take equally long, and DeepEP is 8, Hybrid-EP 25 % slower than the slower link. So counted, these seven are within
12 %.
"""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Copies of each token of a rank, which go to experts and come back."""

    network: float = 0.0
    """Copies that leave the NVLink domain: one for each other domain with deepep and hybridep, else one an expert."""
    nvlink: float = 0.0
    """Copies that go to other ranks of a domain."""
    domain: int = 1
    """Ranks of a domain: their loads differ from the mean by less together than alone."""
    element: float = 2 * BF16
    """Bytes of a number on its way there and back."""

    @property
    def quantised(self) -> bool:
        """Whether tokens go to their experts in FP8."""
        return self.element < 2 * BF16


def traffic(config: RunConfig, gpu: Gpu, fp8_dispatch: bool = False) -> Traffic:
    """The exchange of a layout on a kind of GPU; expert-parallel ranks are neighbours, as megatron-core orders them."""
    moe, parallel = config.model.moe, config.parallel
    ranks = parallel.expert * parallel.expert_tensor
    if not moe.num_experts or ranks == 1:
        return Traffic()
    domain = min(ranks, gpu.nvlink_domain)
    domains = -(-ranks // domain)
    element = (FP8 if fp8_dispatch else BF16) + BF16
    if config.performance.moe_token_dispatcher_type in ("deepep", "hybridep"):
        far = domains_of_token(moe, domains) * (domains - 1) / domains
        near = ranks * (1 - (1 - 1 / ranks) ** moe.top_k) * (domain - 1) / domain
        return Traffic(far, near, domain, element)
    copies = moe.top_k
    return Traffic(copies * (domains - 1) / domains, copies * (domain - 1) / ranks, domain, element)


def exchange_seconds(network: float, nvlink: float, gpu: Gpu) -> float:
    """Seconds in which a rank sends these bytes over both links."""
    far, near = network / (NETWORK_SHARE * gpu.network), nvlink / (NVLINK_SHARE * gpu.nvlink)
    return float((far**BOTH_LINKS + near**BOTH_LINKS) ** (1 / BOTH_LINKS))


def domains_of_token(moe: MoeConfig, domains: int) -> float:
    """Expected number of domains that the experts of a token are in.

    With group-limited routing (DeepSeek-V3 report, section 2.1.2) a token has experts in at most `group_top_k` groups,
    which are divided among the domains; otherwise each expert is in any of them.
    """
    if moe.num_groups > 1 and moe.num_groups % domains == 0:
        each = moe.num_groups // domains
        none = comb(moe.num_groups - each, moe.group_top_k) / comb(moe.num_groups, moe.group_top_k)
        return domains * (1 - none)
    return domains * (1 - (1 - 1 / domains) ** moe.top_k)
