"""The Triton kernels without a GPU: the layers of CPU ranks, computed by Triton's interpreter.

In a process of its own, because Triton reads the variable when a kernel is defined.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

SCRIPT = """
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

def exact_dot(self, a, b, d, *precision):
    # The interpreter keeps BF16 as its bits, and its own dot multiplies those as integers.
    wide = [
        (one.data.astype(np.uint32) << 16).view(np.float32) if one.dtype.scalar == tl.bfloat16
        else one.data
        for one in (a, b)
    ]
    product = np.matmul(*wide, dtype=d.data.dtype) + d.data
    return interpreter.TensorHandle(product, d.dtype.scalar)

interpreter.InterpreterBuilder.create_dot = exact_dot

from expert_layers import LayerGroup, config_of, layer_inputs
from support import new_rng
from examples.experts import triton_kernels

rng = new_rng()
group = LayerGroup(rng, config_of({recv_format!r}, {wire!r}, 2, max_tokens=9), 2, "host", 80)
for experts in group.experts:
    experts.kernels = triton_kernels
for _ in range(2):
    inputs = layer_inputs(rng, group.config, 2)
    group.poison()
    group.check(inputs, group.layer(group.on_device(inputs)))
print("checked")
"""


@needs_triton
@pytest.mark.parametrize("wire", ["fp8", "bf16"])
@pytest.mark.parametrize("recv_format", ["batched", "contiguous", "compact"])
def test_interpreted_kernels_match_fp64(recv_format: str, wire: str) -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(recv_format=recv_format, wire=wire)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("checked\n")
