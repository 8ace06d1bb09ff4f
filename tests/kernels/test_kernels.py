"""The Triton kernels without a card: their numbers in the interpreter, and the machine code compiled for five cards.

`registers.json` holds what the Triton it names compiled; `python tests/kernels/test_kernels.py` writes it anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TABLE = HERE / "registers.json"
sys.path.append(str(HERE.parents[1]))  # behind the host, whose module `nodes` our folder would hide
from lab.boot import import_pack  # noqa: E402

import_pack()
from slipstream.kernels.reference import E2M1, integer_dot, nvfp4_quantise, nvfp4_values, pack_int4  # noqa: E402

if importlib.util.find_spec("triton"):
    import triton

    VERSION = ".".join(triton.__version__.split(".")[:2])
    TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
else:
    VERSION = ""
needs_triton = pytest.mark.skipif(not VERSION, reason="Triton is not installed")


def work(what: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, HERE / "worker.py", what], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# Outputs in 16 bit carry a rounding of the branch's projection and one of the result, and the interpreter cuts bfloat16
# off where a card rounds it: at most 2^-7 and 2^-10. Everything before is what the float32 cases show.
BOUNDS = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10, "scales": 1e-6, "codes": 2e-4}


@needs_triton
def test_every_kernel_agrees_with_the_exact_reference():
    """Ragged M and N, signed and unsigned, 4 and 8 bit, ranks 0, 16 and 48, rotated or not, groups and rows.

    Codes: a value that a rotation has added up in another order may lie on the other side of a tie.
    """
    found = work("interpret")
    assert len(found) > 50
    assert found.pop("q, k, v: K0 runs beyond one for each input") == 0
    wrong = {name: error for name, error in found.items() if not error <= BOUNDS[name.split()[-1]]}
    assert not wrong


@needs_triton
def test_the_compiled_kernels_spill_nothing_and_use_the_tensor_cores_they_are_for():
    """sm_80, 86, 89, 90 and 120 without a card; more registers or a longer loop than recorded fail."""
    if not (TOOLS / "nvdisasm").exists():
        pytest.skip("this Triton brings no disassembler")
    found = work("compile")
    recorded = json.loads(TABLE.read_text())
    for name, row in found.items():
        assert row["spilled"] == 0, name
        if "K1" in name and "sm_90" not in name:
            assert row["stores"] == 0, f"{name} writes shared memory in its loop"
            assert "IMMA.16832.S8.S8.SAT" in row["mma"], name
        elif "K1" in name:  # whose instruction takes W from shared memory, so unpacked nibbles go there
            assert "IGMMA.64" in row["mma"], name
        elif "K2" in name:
            assert row["stores"] == 0, name
            assert ("IMMA.16864.U4.S4" if "unsigned" in name else "IMMA.16864.S4.S4") in row["mma"], name
        elif name == "K3 128x128 sm_120":
            assert any(mma.startswith("OMMA.SF.16864.F32.E2M1.E2M1") for mma in row["mma"]) and row["stores"] == 0
    assert any("K2" in name for name in found) or VERSION < "3.5"
    if recorded["triton"] == VERSION:
        assert set(found) == set(recorded["kernels"])
        for name, row in found.items():
            before = recorded["kernels"][name]
            assert row["registers"] <= before["registers"], f"{name} takes more registers"
            assert row["loop"] <= before["loop"], f"{name} has a longer loop"


def test_nvfp4_takes_the_nearest_number_and_the_even_code_of_two():
    """Against all eight magnitudes, on a grid that holds every tie."""
    x = torch.zeros(25, 16)
    x[:, 0], x[:, 1] = 6.0, torch.arange(25) / 4  # the scale is one
    packed, scales = nvfp4_quantise(-x)
    assert torch.equal(scales.float(), torch.ones(25, 1))
    for value, kept in zip(x[:, 1].tolist(), nvfp4_values(packed, scales)[:, 1].tolist(), strict=True):
        nearest = min(abs(e - value) for e in E2M1)
        ties = [i for i, e in enumerate(E2M1) if abs(e - value) == nearest]
        assert -kept == E2M1[next(i for i in ties if len(ties) == 1 or i % 2 == 0)]
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 10.0 ** torch.arange(-1, 3)[:, None]
    back = nvfp4_values(*nvfp4_quantise(x))
    assert ((back - x).norm(dim=1) / x.norm(dim=1)).max() < 0.12
    assert not nvfp4_values(*nvfp4_quantise(torch.zeros(1, 16))).any()


def fragments(words: torch.Tensor, rows: int) -> torch.Tensor:
    """The codes (lane, register, 8) that K2's addresses load of `rows` (16 of A, 8 of W) of words (rows, 8)."""
    lane = torch.arange(32)
    loaded = []
    for register in range(4 if rows == 16 else 2):
        half = register // 2 if rows == 16 else register
        row = lane // 4 + (8 * (register % 2) if rows == 16 else 0)
        loaded.append(words[row, lane % 4 * 2 + half])
    word = torch.stack(loaded, 1)
    nibbles = (word[..., None] >> (4 * torch.arange(8))) & 15
    return (nibbles ^ 8) - 8


def test_the_words_k2_loads_make_the_product():
    """The registers of mma.m16n8k64 as the PTX ISA lays them out, filled by K2's addresses from natural rows."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-7, 8, (16, 64), generator=generator).to(torch.int8)
    w = torch.randint(-8, 8, (8, 64), generator=generator).to(torch.int8)
    left, right = (fragments(pack_int4(codes).view(torch.int32).long(), len(codes)) for codes in (a, w))
    result = torch.zeros(16, 8, dtype=torch.long)
    for row in range(16):
        for column in range(8):
            for k in range(64):  # A: register 2 (k / 32) + row / 8, lane 4 (row % 8) + k % 32 / 8; B: without the row
                quad, half, i = k % 32 // 8, k // 32, k % 8
                value = left[row % 8 * 4 + quad, 2 * half + row // 8, i]
                result[row, column] += value * right[column * 4 + quad, half, i]
    assert torch.equal(result.float(), integer_dot(a, w).float())


if __name__ == "__main__":
    TABLE.write_text(json.dumps({"triton": VERSION, "kernels": work("compile")}, indent=1) + "\n")
