"""python -m tests.transformer_engine [--ranks N] PROGRAM [ARGUMENT ...]: see on_cpu.py."""

import sys

from tests.transformer_engine.on_cpu import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
