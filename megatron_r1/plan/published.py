"""Published steps of training, with what their sources say of the layout: what the time model is held against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load
from megatron_r1.plan.job import Stack, TrainingJob

CARDS = "Megatron-Bridge, examples/model_verification_cards"
OVERLAP_AB = "Megatron-Bridge, skills/nemo-mbridge-perf-expert-parallel-overlap"
SUMMARY = "Megatron-Bridge, docs/performance-summary.md and its archive"
MLPERF = "MLPerf Training v6.0, NVIDIA, deepseekv3_671b"
MODELZOO = "Megatron-MoE-ModelZoo, best_practice/qwen3"
PRIME = "prime-rl, benchmarks/baselines"
SIMUMAX = "SimuMax 1.2, docs/b200/b200_release_v1.2_summary.md"

DUALPIPE = Stack(
    "DeepSeek",
    cuda_graphs=1.0,
    fp8_dispatch=True,
    schedule="DualPipe",
    overlapped_share=1.0,
    dispatch_share=20 / 132,
    fp8_share=0.55,
)
"""In its trace (deepseek-ai/profile-data, train.json) passes forward and backward through four layers take 129 ms, with
even routing, the exchange wholly beside computation and no pipeline: so they do here with 0.55 of FP8's peak."""
GRAPHS = Stack("NeMo 26.06-26.08, full graphs", gradient_bytes=2, cuda_graphs=1.0)
GRAPHS_FP8 = Stack(
    "NeMo 26.06-26.08, full graphs, FP8 attention",
    gradient_bytes=2,
    cuda_graphs=1.0,
    fp8_attention=True,
)
PART = Stack("NeMo 26.06-26.08, router graphs", gradient_bytes=2, cuda_graphs=0.3)
PART_FUSED = Stack("NeMo 26.08, router graphs, dispatch that permutes", gradient_bytes=2, cuda_graphs=0.3)
NEW = Stack("NeMo 26.04-26.08, no graphs", gradient_bytes=2)
PART_2025 = Stack("Megatron-LM dev of 2025, router graphs", cuda_graphs=0.3)
LM_MAIN = Stack("Megatron-LM main of 2025, no graphs")
HOPPER = Stack("NeMo 25.09 on Hopper, no graphs", gradient_bytes=2)
MLPERF_STACK = Stack("MLPerf 6.0, full graphs", cuda_graphs=1.0)
MLPERF_FP8 = Stack("MLPerf 6.0, full graphs, FP8 attention", cuda_graphs=1.0, fp8_attention=True)
OLD = Stack("NeMo 25.09-26.02", gradient_bytes=2, older=True)
OLD_GRAPHS = Stack("NeMo 25.09-26.02, partial graphs", gradient_bytes=2, older=True, cuda_graphs=0.7)
PLAIN = Stack("Megatron-LM, no overlap", older=True)
V3_BRIDGE = "parallel.pipeline_layout='Et*4|(t*4|)*14tmL'"
V3_H100 = "parallel.pipeline_layout='Et|(tt|)*30mL' performance.overlap_grad_reduce=false"
V3 = "model=v3_671b"
MOONLIGHT, QWEN_30B, QWEN_235B = "model=moonlight_16b", "model=qwen3_30b_a3b", "model=qwen3_235b_a22b"


@dataclass(frozen=True, slots=True)
class PublishedStep:
    """One published step."""

    name: str
    gpu: str
    gpus: int
    seconds: float
    layout: str
    """Overrides of the recipe `pretrain`: model, layout, batch."""
    source: str
    stack: Stack
    natural: bool = False
    """Whether routing is natural; else it is forced to be even."""
    fit: bool = True
    """Whether the constants are fitted to it."""
    missing: str = ""
    """What the source does not say, or the model does not have."""

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return self.job().config.train.global_batch_size

    def job(self) -> TrainingJob:
        """The job that the row describes."""
        return _job(self)


NATURAL_IMBALANCE = {"sigmoid": 1.1, "softmax_topk": 1.4, "softmax": 1.4}
"""Router -> tokens of the busiest rank over the mean where routing is natural: an input, which a bias keeps low."""


@cache
def _job(row: PublishedStep) -> TrainingJob:
    overrides = row.layout.split()
    defaults = ["train.sequence_length=4096", "train.micro_batch_size=1", "performance.overlap_grad_reduce=true",
                "performance.moe_token_dispatcher_type=hybridep"]  # fmt: skip
    keys = {line.partition("=")[0] for line in overrides}
    config = load("pretrain", [*(line for line in defaults if line.partition("=")[0] not in keys), *overrides])
    imbalance = NATURAL_IMBALANCE[config.model.moe.score_function] if row.natural else 1.0
    return TrainingJob(config, GPUS[row.gpu], row.gpus, imbalance, row.stack)


def layout(text: str) -> str:
    """A layout as the tables write it, such as `tp2 pp8 vp4 ep64 gbs16384 mbs1`, as overrides."""
    keys = {"tp": "parallel.tensor", "pp": "parallel.pipeline", "vp": "parallel.virtual_pipeline",
            "ep": "parallel.expert", "cp": "parallel.context", "gbs": "train.global_batch_size",
            "mbs": "train.micro_batch_size", "seq": "train.sequence_length"}  # fmt: skip
    found = []
    for word in text.split():
        name = word.rstrip("0123456789")
        found.append(f"{keys[name]}={word.removeprefix(name)}")
    return " ".join(found)


def recompute(*names: str) -> str:
    """Recomputed modules as an override."""
    return f"performance.recompute_modules=[{','.join(names)}]"


def rate(batch: int, gpus: int, tokens_per_second: float, length: int = 4096) -> float:
    """Seconds of a step from tokens per second and GPU."""
    return batch * length / gpus / tokens_per_second


FP8, NO_MTP, OVERLAP = "fp8.enabled=true", "model.mtp.num_layers=0", "performance.overlap_moe_expert_parallel_comm=true"
DEEPEP = "performance.moe_token_dispatcher_type=deepep"
ALLTOALL = "performance.moe_token_dispatcher_type=alltoall"

ROWS = (
    PublishedStep("DeepSeek-V3, its own step", "H800", 2048, 19.926,
        f"{V3} {layout('pp16 ep64 gbs15360')} {FP8} {recompute('layernorm', 'mla_up_proj', 'moe_act')} "
        "performance.moe_token_dispatcher_type=deepep",
        "Insights into DeepSeek-V3, arXiv 2505.09343, table 4", DUALPIPE, natural=True),
    PublishedStep("V3 BF16, card", "H100", 1024, 61.756,
        f"{V3} {layout('tp2 pp8 vp4 ep64 gbs16384')} {V3_H100} {recompute('mla_up_proj', 'mlp')}", CARDS, NEW),
    PublishedStep("V3 FP8, 25.09", "H100", 1024, rate(8192, 1024, 1297),
        f"{V3} {layout('tp2 pp8 vp4 ep64 gbs8192')} {V3_H100} {recompute('mla_up_proj', 'mlp')} {FP8} {DEEPEP} "
        f"{OVERLAP}", SUMMARY, HOPPER),
    PublishedStep("V3 MXFP8, 26.08", "GB200", 256, rate(4096, 256, 4912),
        f"{V3} {layout('pp4 vp4 ep64 gbs4096')} {V3_BRIDGE} {recompute('mla_up_proj')} {FP8} {OVERLAP}", SUMMARY,
        GRAPHS),
    PublishedStep("V3 MXFP8, card", "GB200", 256, 13.841,
        f"{V3} {layout('pp4 vp4 ep64 gbs4096')} {V3_BRIDGE} {recompute('mla_up_proj')} {FP8} {OVERLAP}", CARDS, GRAPHS),
    PublishedStep("V3 MXFP8, 26.08", "GB300", 256, rate(4096, 256, 6288),
        f"{V3} {layout('pp2 vp8 ep32 gbs4096')} {V3_BRIDGE} {FP8} {OVERLAP}", SUMMARY, GRAPHS_FP8),
    PublishedStep("V3 MXFP8, card", "GB300", 256, 10.667,
        f"{V3} {layout('pp2 vp8 ep32 gbs4096')} {V3_BRIDGE} {FP8} {OVERLAP}", CARDS, GRAPHS_FP8),
    PublishedStep("V3 MXFP8, card, batch 8192", "GB300", 256, 20.858,
        f"{V3} {layout('pp2 vp8 ep32 gbs8192')} {V3_BRIDGE} {FP8} {OVERLAP}", CARDS, GRAPHS_FP8),
    PublishedStep("V3 MXFP8, 26.06, batch 15360", "GB300", 256, 38.3,
        f"{V3} {layout('pp2 vp8 ep32 gbs15360')} {V3_BRIDGE} {FP8} {OVERLAP}", SUMMARY, GRAPHS_FP8),
    PublishedStep("V3 BF16 without MTP, 25.11", "GB200", 256, rate(4096, 256, 3139),
        f"{V3} {layout('pp4 vp4 ep64 gbs4096')} {NO_MTP} {recompute('mla_up_proj')}", SUMMARY, OLD_GRAPHS),
    PublishedStep("V3 MXFP8 without MTP, 25.11", "GB200", 256, rate(4096, 256, 4018),
        f"{V3} {layout('pp8 vp4 ep32 gbs4096')} {NO_MTP} {recompute('mla_up_proj')} {FP8}", SUMMARY, OLD_GRAPHS),
    PublishedStep("V3 BF16 without MTP, 25.11", "GB300", 256, rate(4096, 256, 3848),
        f"{V3} {layout('pp2 vp4 ep32 gbs4096')} {NO_MTP} {recompute('mla_up_proj')}", SUMMARY, OLD_GRAPHS),
    PublishedStep("V3 MXFP8 without MTP, 25.11", "GB300", 256, rate(4096, 256, 4357),
        f"{V3} {layout('pp2 vp4 ep32 gbs4096')} {NO_MTP} {recompute('mla_up_proj')} {FP8}", SUMMARY, OLD_GRAPHS),
    PublishedStep("V3 MXFP8, 26.02", "GB300", 256, rate(4096, 256, 4612),
        f"{V3} {layout('pp2 vp8 ep32 gbs4096 mbs2')} {V3_BRIDGE} {recompute('mla_up_proj')} {FP8}", SUMMARY,
        OLD_GRAPHS),
    PublishedStep("V3 MXFP8, 26.02", "GB200", 256, rate(4096, 256, 3955),
        f"{V3} {layout('pp4 vp4 ep64 gbs4096')} {V3_BRIDGE} {recompute('mlp')} {FP8}", SUMMARY, OLD_GRAPHS),
    PublishedStep("V3 MXFP8, 26.02", "B300", 256, rate(4096, 256, 2983),
        f"{V3} {layout('pp16 ep8 gbs4096')} {recompute('mla_up_proj')} {FP8}", SUMMARY, OLD),
    PublishedStep("V3 MXFP8, 26.02", "B200", 256, rate(4096, 256, 2689),
        f"{V3} {layout('pp16 ep8 gbs4096')} {recompute('mla_up_proj')} {FP8}", SUMMARY, OLD),
    PublishedStep("V3 MXFP8, 25.11", "B200", 256, rate(2048, 256, 2139),
        f"{V3} {layout('pp16 ep8 gbs2048')} {recompute('mla_up_proj')} {FP8}", SUMMARY, OLD),
    PublishedStep(
        "V3 MLPerf", "GB300", 256, 38.9, f"{V3} {layout('pp4 ep32 gbs15360 vp4')} {V3_BRIDGE} {FP8} {OVERLAP}", MLPERF,
        MLPERF_FP8, natural=True),
    *(PublishedStep(f"V3 MLPerf, {gpus} GPUs", "GB200", gpus, measured,
          f"{V3} {layout(f'tp2 pp4 vp4 ep32 gbs{batch}')} {V3_BRIDGE} {recompute('mlp')} {FP8} {OVERLAP}", MLPERF,
          MLPERF_STACK, natural=True)
      for gpus, batch, measured in ((512, 15360, 30.81), (2048, 15360, 9.08), (4096, 16384, 5.41),
                                    (8192, 16384, 3.457))),
    PublishedStep(
        "Moonlight BF16, card", "H100", 16, 11.636, f"{MOONLIGHT} {layout('ep8 gbs1024 mbs2')} {OVERLAP}", CARDS, NEW,
        natural=True),
    PublishedStep(
        "Moonlight SFT BF16, card", "H100", 8, 0.562, f"{MOONLIGHT} {layout('ep8 gbs8 seq8192')} {OVERLAP}", CARDS, NEW,
        natural=True),
    PublishedStep(
        "Qwen3-30B BF16, card", "H100", 16, 20.15, f"{QWEN_30B} {layout('ep16 gbs1024')} {OVERLAP}", CARDS, PART_FUSED),
    PublishedStep(
        "Qwen3-30B BF16, overlap on", "H100", 16, 20.992, f"{QWEN_30B} {layout('ep16 gbs1024')} {OVERLAP}", OVERLAP_AB,
        PART),
    PublishedStep(
        "Qwen3-30B BF16, overlap off", "H100", 16, 24.714, f"{QWEN_30B} {layout('ep16 gbs1024')}", OVERLAP_AB, PART),
    PublishedStep(
        "Qwen3-30B BF16, functional run", "H100", 16, 30.29, f"{QWEN_30B} {layout('ep16 gbs1024')}", CARDS, PART,
        natural=True),
    PublishedStep(
        "Qwen3-30B FP8, 26.06", "H100", 16, rate(1024, 16, 8826), f"{QWEN_30B} {layout('ep16 gbs1024')} {FP8}", SUMMARY,
        NEW),
    PublishedStep(
        "Qwen3-30B MXFP8, 26.06", "B200", 8, rate(512, 8, 27136), f"{QWEN_30B} {layout('ep8 gbs512 mbs4')} {FP8}",
        SUMMARY, PART),
    PublishedStep(
        "Qwen3-30B MXFP8, 26.02", "B200", 8, rate(512, 8, 9691), f"{QWEN_30B} {layout('ep8 gbs512 mbs1')} {FP8}",
        SUMMARY, OLD),
    PublishedStep(
        "Qwen3-30B MXFP8, 26.02", "GB200", 8, rate(512, 8, 26084), f"{QWEN_30B} {layout('ep8 gbs512 mbs4')} {FP8}",
        SUMMARY, OLD_GRAPHS),
    PublishedStep(
        "Qwen3-30B MXFP8, 26.02", "GB300", 8, rate(512, 8, 30376), f"{QWEN_30B} {layout('ep8 gbs512 mbs8')} {FP8}",
        SUMMARY, OLD_GRAPHS),
    PublishedStep(
        "Qwen3-30B MXFP8, 26.06", "B300", 8, rate(512, 8, 40769),
        f"{QWEN_30B} {layout('ep8 gbs512 mbs8')} {FP8} {OVERLAP}", SUMMARY, GRAPHS_FP8),
    PublishedStep(
        "Qwen3-30B MXFP8, 26.06", "GB300", 8, rate(512, 8, 44544),
        f"{QWEN_30B} {layout('ep8 gbs512 mbs8')} {FP8} {OVERLAP}", SUMMARY, GRAPHS_FP8),
    PublishedStep("Qwen3-235B MXFP8, 26.08", "GB300", 256, rate(8192, 256, 8816),
        f"{QWEN_235B} {layout('pp4 vp12 ep32 gbs8192 mbs2')} {FP8} {OVERLAP}", SUMMARY, GRAPHS_FP8),
    PublishedStep("Qwen3-235B MXFP8, 26.08", "GB200", 256, rate(8192, 256, 7280),
        f"{QWEN_235B} {layout('pp8 vp3 ep32 gbs8192')} {FP8} {OVERLAP}", SUMMARY, GRAPHS_FP8),
    PublishedStep("Qwen3-235B FP8, 26.08", "H100", 256, rate(8192, 256, 1712),
        f"{QWEN_235B} {layout('tp2 pp8 vp4 ep32 gbs8192')} {FP8} {ALLTOALL} {OVERLAP}", SUMMARY, NEW),
    PublishedStep("Qwen3-235B BF16, 1F1B overlap", "H100", 256, 17.6,
        f"{QWEN_235B} {layout('tp2 pp8 vp4 ep32 gbs2048')} {recompute('layernorm', 'moe_act')} {DEEPEP} {OVERLAP}",
        MODELZOO, PART_2025),
    PublishedStep("Qwen3-235B BF16, no overlap", "H100", 256, 19.7,
        f"{QWEN_235B} {layout('tp2 pp8 vp4 ep32 gbs2048')} {recompute('layernorm', 'moe_act')} {DEEPEP}", MODELZOO,
        PART_2025),
    PublishedStep("Qwen3-235B BF16, experts in a node", "H100", 256, 29.0,
        f"{QWEN_235B} {layout('tp4 pp8 vp4 ep8 gbs2048')} {DEEPEP}", MODELZOO, LM_MAIN),
    PublishedStep("Qwen3-235B BF16, experts in a node", "H100", 256, 24.2,
        f"{QWEN_235B} {layout('tp2 pp32 vp3 ep8 gbs2048')} {recompute('layernorm', 'moe_act')} {ALLTOALL} "
        "parallel.pipeline_layout='E|(t|)*94L'", MODELZOO, LM_MAIN),
    *(PublishedStep(f"Qwen3-235B BF16, {length // 1024}k, {'natural' if natural else 'even'}", "H100", 256,
          256 * length * (129.4e9 + 18.9e9 * length / 4096) / 256 / teraflops / 1e12,
          f"{QWEN_235B} model.max_sequence_length=131072 "
          f"{layout(f'tp4 pp8 vp4 ep8 gbs256 cp{context} seq{length}')} {recompute('layernorm', 'moe')} {DEEPEP}",
          MODELZOO, PART_2025, natural=natural)
      for length, context, *measured in ((16384, 1, 295, 237), (32768, 2, 335, 277), (65536, 4, 368, 320),
                                         (131072, 8, 389, 357))
      for natural, teraflops in ((False, measured[0]), (True, measured[1]))),
    *(PublishedStep(f"Qwen3-0.6B, {text}", "H100", 1, length / speed,
          f"model=qwen3_0_6b {layout(f'gbs1 seq{length}')} model.max_sequence_length=65536 "
          f"{recompute('core_attn', 'layernorm', 'mlp')}", PRIME, Stack("prime-rl 0.8"), fit=False,
          missing="projections computed again, the loss of another trainer, its host")
      for text, length, speed in (("RL 16k", 16384, 11896), ("RL 65k", 65536, 10147), ("SFT 8k", 8192, 26005))),
    *(PublishedStep(f"V3 of 4 layers BF16, {passes} passes, {text}", "B200", 8, measured,
          f"{V3} model.num_layers=4 model.moe.first_dense_layers=1 {NO_MTP} {layout(f'{text} gbs{batch}')} {ALLTOALL} "
          "performance.overlap_grad_reduce=false", SIMUMAX, PLAIN)
      for passes, batch, measured, text in (
          (4, 32, 0.6032, "ep8"), (8, 64, 1.1017, "ep8"), (32, 256, 4.1412, "ep8"),
          (4, 16, 0.4522, "ep4 pp2"), (8, 32, 0.7716, "ep4 pp2"), (32, 128, 2.7186, "ep4 pp2"))),
)  # fmt: skip
"""Rows whose layouts are published."""
