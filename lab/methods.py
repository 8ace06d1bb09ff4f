"""The ways to quantise that tests and benches compare, by name; what shipped code takes is `spec_for` of a format.

What each needs, costs and gives is in docs/quant_quality.md. `hadamard_*` (groups, rotation) are the best of their
class but read by this pack only; `svdquant*` is comfy-kitchen's layout, `*convrot` the host's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from slipstream.quant.layer import Spec

METHODS = {
    "rtn": Spec(rank=0, smooth="none", scale_search=False),
    "convrot": Spec("convrot_w4a4", smooth="none", scale_search=False),
    "int8_convrot": Spec("int8_convrot", smooth="none", scale_search=False),
    "hadamard_svd": Spec(rotation=256, smooth="none"),
    "svdquant": Spec(),
    "svdquant_refined": Spec(refine=20),
    "svdquant_gptq": Spec(gptq=True),
    "hadamard_svdquant": Spec(rotation=256),
    "hadamard_svdquant_gptq": Spec(rotation=256, gptq=True),
    "w4a8": Spec("w4a8"),
    "w4a16": Spec("w4a16"),
}


def with_spec(spec: Spec, **changes: Any) -> Spec:
    """`spec` with some fields changed."""
    return dataclasses.replace(spec, **changes)
