"""GPUs as data: rates, memory and links, from the vendor's datasheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU in the machine that it is sold in. Rates are of dense matrices, in FLOP/s; links are in bytes/s
    in one direction.
    """

    bf16: float
    """Peak rate of bf16 matrix products."""
    fp8: float
    """Peak rate of FP8 matrix products; that of bf16 where the GPU has no FP8."""
    watts: float
    """Power limit of the GPU."""
    memory_gb: float
    """Gigabytes (10^9 bytes) of its memory that a process sees."""
    memory_bandwidth: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s of NVLink from one GPU."""
    nvlink_domain: int
    """GPUs that NVLink connects."""
    network: float
    """Bytes/s of the network from one GPU, where each has an adapter of its own."""
    host_link: float
    """Bytes/s in one direction between one GPU and host memory."""
    per_node: int
    """GPUs of a node."""
    host_memory_gb: float
    """Gigabytes of host memory of a node."""
    source: str
    """Where the figures are from."""
    host_slowness: float = 1.0
    """Seconds in which the host launches a kernel, against the hosts of an H100."""

    @property
    def sustained(self) -> float:
        """Share of the peak that the power limit lets this GPU hold, against the GPU of its generation with most watts
        per FLOP/s: GB200 and GB300 have the same peak, and the second is 17 to 22 % faster in every release.
        """
        most = max(one.watts / one.bf16 for one in GPUS.values() if one.generation == self.generation)
        return min(1.0, self.watts / self.bf16 / most)

    @property
    def generation(self) -> str:
        """Of the matrix units: those of a generation have nearly the same peak."""
        return "Blackwell" if self.bf16 > 2e15 else "Hopper" if self.bf16 > 9e14 else "Ampere"


HGX, NVL72 = 8, 72
GRACE = 37.08 / 13.48
"""Microseconds of torch's linear layer on the CPU: GB200 over DGX H100 (Transformer Engine, issue 2053)."""
GPUS = {
    "A100": Gpu(
        bf16=312e12, fp8=312e12, watts=400, memory_gb=85, memory_bandwidth=2.04e12,
        nvlink=300e9, nvlink_domain=HGX, network=25e9,
        host_link=32e9, per_node=8, host_memory_gb=2000, source="NVIDIA A100 80GB SXM datasheet, 2021; DGX A100",
    ),
    "H100": Gpu(
        bf16=989.4e12, fp8=1978.9e12, watts=700, memory_gb=85, memory_bandwidth=3.35e12,
        nvlink=450e9, nvlink_domain=HGX,
        network=50e9, host_link=64e9, per_node=8, host_memory_gb=2000,
        source="NVIDIA H100 SXM datasheet, 2023; DGX H100",
    ),
    "H800": Gpu(
        bf16=989.4e12, fp8=1978.9e12, watts=700, memory_gb=85, memory_bandwidth=3.35e12,
        nvlink=200e9, nvlink_domain=HGX,
        network=50e9, host_link=64e9, per_node=8, host_memory_gb=2000,
        source="as H100 with 400 GB/s of NVLink (Insights into DeepSeek-V3, arXiv 2505.09343, section 4.1)",
    ),
    "H200": Gpu(
        bf16=989.4e12, fp8=1978.9e12, watts=700, memory_gb=150, memory_bandwidth=4.8e12,
        nvlink=450e9, nvlink_domain=HGX,
        network=50e9, host_link=64e9, per_node=8, host_memory_gb=2000,
        source="NVIDIA H200 SXM datasheet, 2024; DGX H200",
    ),
    "B200": Gpu(
        bf16=2250e12, fp8=4500e12, watts=1000, memory_gb=191, memory_bandwidth=7.7e12,
        nvlink=900e9, nvlink_domain=HGX,
        network=50e9, host_link=64e9, per_node=8, host_memory_gb=2000,
        source="NVIDIA HGX B200 and DGX B200 datasheets, 2024",
    ),
    "GB200": Gpu(
        bf16=2500e12, fp8=5000e12, watts=1200, memory_gb=198, memory_bandwidth=8e12,
        nvlink=900e9, nvlink_domain=NVL72,
        network=50e9, host_link=225e9, per_node=4, host_memory_gb=960, source="NVIDIA GB200 NVL72 datasheet, 2024",
        host_slowness=GRACE,
    ),
    "B300": Gpu(
        bf16=2250e12, fp8=4500e12, watts=1100, memory_gb=285, memory_bandwidth=8e12,
        nvlink=900e9, nvlink_domain=HGX,
        network=100e9, host_link=64e9, per_node=8, host_memory_gb=2000,
        source="NVIDIA HGX B300 and DGX B300 datasheets, 2025",
    ),
    "GB300": Gpu(
        bf16=2500e12, fp8=5000e12, watts=1400, memory_gb=295, memory_bandwidth=8e12,
        nvlink=900e9, nvlink_domain=NVL72,
        network=100e9, host_link=225e9, per_node=4, host_memory_gb=960, source="NVIDIA GB300 NVL72 datasheet, 2025",
        host_slowness=GRACE,
    ),
}  # fmt: skip
"""Name -> figures. 85 GB are the 79 GiB of "80 GB"."""
