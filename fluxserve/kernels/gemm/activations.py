"""What stands between an MLP's two products, for Triton's kernels.

A GPU's own tanh is right to 2^-11, finer than what E4M3 and BF16 round to, and costs one instruction; an exponential
and a division would cost twenty, and an eighth of the whole product's time.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(u, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return 2.0 * tl.sigmoid(2.0 * u) - 1.0
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def gelu_tanh(y, INTERPRETED: tl.constexpr):
    """0.5·y·(1 + tanh(√(2/π)·(y + 0.044715·y³)))."""
    u = y * (0.7978845608028654 + 0.035677408136300125 * y * y)
    return 0.5 * y + 0.5 * y * _tanh(u, INTERPRETED)


@triton.jit
def silu(y, INTERPRETED: tl.constexpr):
    """y / (1 + exp(-y)), as 0.5·y·(1 + tanh(y / 2))."""
    return 0.5 * y + 0.5 * y * _tanh(0.5 * y, INTERPRETED)
