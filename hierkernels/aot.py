"""Compiles the Triton kernels of every operator for GPUs that are not there.

    python -m hierkernels.aot [--full] [--arch 80 90 100] [--jobs 2] [--json FILE]

One operator alone: python -m hierkernels.ops.attention.aot, and so on. See
hierkernels/triton_common/aot.py for what is a failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

OPS = Path(__file__).resolve().parent / "ops"
MODULES = [f"hierkernels.ops.{path.parent.name}.aot" for path in sorted(OPS.glob("*/aot.py"))]


if __name__ == "__main__":
    from hierkernels.triton_common.aot import main

    sys.exit(main(MODULES, __doc__))
