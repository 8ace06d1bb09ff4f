"""Whether Triton runs its kernels on the CPU, op by op: TRITON_INTERPRET=1 before Triton is imported."""

from __future__ import annotations

import os

# The interpreter has no inline assembly, multiplies bf16 bit patterns in a dot, and rounds an fma twice.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
