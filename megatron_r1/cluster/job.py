"""The script of a job: which of launch/slurm it is, and what its cluster and its command fill in."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from megatron_r1.cluster.request import is_training
from megatron_r1.cluster.script import fill_in, scripts_folder
from megatron_r1.config.cluster import ClusterConfig
from megatron_r1.config.nodes import servers_per_node
from megatron_r1.config.recipes import PACKAGE
from megatron_r1.config.run import RunConfig
from megatron_r1.runs.folder import run_folder
from megatron_r1.runs.provenance import IMAGE, IMAGE_DIGEST

GPUS_PER_NODE = "MEGATRON_R1_GPUS_PER_NODE"
"""Variable that tells the preflight how many GPUs the profile says a node has."""
COMPILED = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
"""Variables of folders with compiled kernels, which belong on a node's own disk."""


def script_name(config: RunConfig) -> str:
    """The file of launch/slurm that runs the job."""
    if config.submit.engine_nodes:
        return "rl_heterogeneous.sh" if config.submit.heterogeneous else "rl.sh"
    return "train.sh" if is_training(config) else "one_node.sh"


def job_script(config: RunConfig, output: Path | None = None) -> str:
    """The job's script, ready for sbatch.

    Args:
        output: folder whose checkpoints, rollouts and samples show progress; None is the run's own.

    Raises:
        ConfigError: a server does not fit on a node.
    """
    submit, cluster = config.submit, config.cluster
    folder = run_folder(config)
    variables: dict[str, str | list[str]] = {
        "functions": str(scripts_folder() / "job.sh"),
        "python": cluster.python or (sys.executable if cluster.container == "none" else "python"),
        "run": str(folder),
        "output": str(output or folder),
        "arguments": submit.arguments,
        "restart": submit.restart,
        "max_restarts_without_progress": str(submit.max_restarts_without_progress),
        "grace_s": str(submit.grace_s),
        "preflight": str(submit.preflight).lower(),
        "preflight_limit_s": str(submit.preflight_limit_s),
        "environment": environment(cluster),
        "env_file": cluster.env_file,
        "srun_options": srun_options(cluster),
        "container": container(cluster),
        "setup": cluster.setup,
    }
    if submit.engine_nodes:
        each = servers_per_node(config.rollout, cluster.gpus_per_node)
        variables |= {"engine_nodes": str(submit.engine_nodes), "servers_per_node": str(each)}
    if submit.heterogeneous:
        variables |= {
            "trainer_nodes": str(submit.nodes - submit.engine_nodes),
            "ranks_per_node": str(cluster.ranks),
        }
    text = (scripts_folder() / script_name(config)).read_text(encoding="utf-8")
    return fill_in(text, directives(config), variables, cluster.sbatch_options, directives_of_engines(config))


def directives(config: RunConfig) -> dict[str, str | None]:
    """Options of sbatch, as `fill_in` takes them."""
    submit, cluster = config.submit, config.cluster
    ranks = cluster.ranks if is_training(config) else 1
    return {
        "job-name": config.name,
        "account": cluster.account or None,
        "partition": cluster.partition or None,
        "qos": cluster.qos or None,
        "nodes": str(submit.nodes - (submit.engine_nodes if submit.heterogeneous else 0)),
        "ntasks-per-node": str(ranks),
        "gpus-per-node": str(cluster.gpus_per_node) if cluster.gpus_per_node else None,
        "cpus-per-task": str(cluster.cpus_per_rank * cluster.ranks // ranks) if cluster.cpus_per_rank else None,
        "mem": cluster.memory_per_node or None,
        "exclusive": "" if cluster.exclusive else None,
        "time": submit.time_limit,
        "signal": f"B:USR1@{submit.signal_before_s}",
        "output": f"{run_folder(config)}/logs/job-%j.log",
        "requeue": "" if submit.restart == "requeue" else None,
        "no-requeue": None if submit.restart == "requeue" else "",
        "dependency": "singleton" if submit.restart == "singleton" else None,
    }


def directives_of_engines(config: RunConfig) -> dict[str, str | None]:
    """Options of sbatch for the engines' nodes, where these are a component of their own."""
    same = ("account", "partition", "qos", "gpus-per-node", "mem", "exclusive", "time")
    trainer, cores = directives(config), config.cluster.cpus_per_rank * config.cluster.ranks
    own = {"nodes": str(config.submit.engine_nodes), "ntasks-per-node": "1", "cpus-per-task": str(cores or "") or None}
    # With restart=singleton, components of one name would wait for each other.
    own |= {"job-name": f"{config.name}.engines"}
    return {name: trainer[name] for name in same} | own


def environment(cluster: ClusterConfig) -> list[str]:
    """NAME=value of the job's variables."""
    values: dict[str, str] = {}
    if cluster.gpus_per_node:
        values[GPUS_PER_NODE] = str(cluster.gpus_per_node)
    if cluster.cpus_per_rank:
        values["OMP_NUM_THREADS"] = str(cluster.cpus_per_rank)
    if cluster.network_interface:
        values |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.network_interface)
    if cluster.scratch:
        values["TMPDIR"] = cluster.scratch
        values |= {name: f"{cluster.scratch}/{name.lower()}" for name in COMPILED}
    if cluster.image:
        values |= {IMAGE: cluster.image, IMAGE_DIGEST: image_digest(cluster.image)}
    return [f"{name}={value}" for name, value in (values | cluster.environment).items()]


def image_digest(image: str) -> str:
    """SHA-256 of an image: in its name, or in IMAGE.sha256 beside it as `sha256sum` writes it; else empty.

    An image has many gigabytes, which are not read for each job.
    """
    if "@sha256:" in image:
        return image[image.index("@") + 1 :]
    file, record = Path(image), Path(f"{image}.sha256")
    if not (file.is_file() and record.is_file()) or record.stat().st_mtime < file.stat().st_mtime:
        return ""
    found = re.match(r"[0-9a-f]{64}\b", record.read_text())
    return f"sha256:{found[0]}" if found else ""


def srun_options(cluster: ClusterConfig) -> list[str]:
    """Options of srun that start a container; none where srun does not start it."""
    if cluster.container != "pyxis":
        return []
    return [
        f"--container-image={cluster.image}",
        f"--container-mounts={','.join(_mounts(cluster))}",
        f"--container-workdir={Path.cwd()}",
        "--no-container-mount-home",
    ]


def container(cluster: ClusterConfig) -> list[str]:
    """The command that starts a container, in front of each rank's own; empty where it needs none."""
    if cluster.container != "apptainer":
        return []
    gpus = ["--nv"] if cluster.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--bind", ",".join(_mounts(cluster)), "--pwd", str(Path.cwd()), cluster.image]


def _mounts(cluster: ClusterConfig) -> list[str]:
    """Folders as PATH:INSIDE, each once."""
    folders = [str(PACKAGE.parent), str(Path.cwd()), cluster.scratch, *cluster.mounts]
    return list(dict.fromkeys(folder if ":" in folder else f"{folder}:{folder}" for folder in folders if folder))
