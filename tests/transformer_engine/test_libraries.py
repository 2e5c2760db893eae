"""Transformer Engine's library loads beside the packages' CUDA, and takes none from a toolkit of the machine."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.transformer_engine.on_cpu import FOLDER, needs_transformer_engine

LOAD = """
import json, os, sys
sys.path.append(sys.argv[1])
os.environ = os.environ | {"CUDA_PATH": sys.argv[2]}
from megatron_r1.platform import cuda
cuda.take_cuda_from_packages()
cuda.load_cudnn()
import transformer_engine.common
paths = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(json.dumps([path for path in paths if any(name in path for name in ("cudnn", "nvrtc", "curand", "libtransf"))]))
"""


@needs_transformer_engine
def test_libraries_come_from_the_packages(tmp_path):
    """A toolkit in CUDA_PATH would be searched before the packages; what it has here is no library."""
    for name in ("cudnn", "nvrtc", "curand"):
        (tmp_path / f"lib{name}.so.99").write_text("of another version")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(FOLDER), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    for name in ("libcudnn_graph", "libnvrtc", "libcurand", "libtransformer_engine"):
        (path,) = [path for path in loaded if f"/{name}.so" in path]
        assert "/site-packages/nvidia/" in path or str(FOLDER) in path
