"""convert: a run or checkpoint as a Hugging Face folder."""

from __future__ import annotations

import time

from rich.console import Console

from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.hf.export import export
from megatron_r1.stages.session import mark_done, open_run_folder
from megatron_r1.stages.weights import find_weights


def run(config: RunConfig) -> None:
    """Write the run's ``hf/`` folder from the weights that `init.from` names."""
    if not config.init.from_:
        raise ConfigError("init.from", "", "convert needs a model: a run, a checkpoint or hf:FOLDER")
    found = find_weights(config.init.from_, which=config.init.weights)
    folder = open_run_folder(config)
    started = time.perf_counter()
    target = export(found.tensors.items(), found.model, folder / "hf", tokenizer_folder=found.tokenizer_folder)
    size = sum(file.stat().st_size for file in target.iterdir())
    seconds = time.perf_counter() - started
    Console(stderr=True).print(f"{found.folder} -> {target}: {size / 1e6:.1f} MB in {seconds:.2f} s")
    mark_done(folder, {"source": found.folder, "bytes": size})
