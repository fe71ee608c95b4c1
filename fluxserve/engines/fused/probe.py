"""Run single blocks of the fused transformer on given rows, in each precision that a block may have.

`fluxserve export` decides by it which blocks stay in the compute dtype. A block's weights are read when it is opened
and freed with it, so that a model of any size needs the memory of one block.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from fluxserve.engines.fused.blocks import Buffers, DoubleBlock, Rows, SingleBlock
from fluxserve.engines.fused.build import FP8, Build
from fluxserve.engines.fused.modulation import Modulation, width
from fluxserve.engines.fused.transformer import write_rope
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.artifact import Ranges
from fluxserve.kernels.attention.fused import padded
from fluxserve.kernels.fp8 import E4M3

HOPPER = (9, 0)
"""The compute capability that the kernels are written for."""
_REPEATS = 5


class Kept(Enum):
    """What of a block stays in the compute dtype."""

    NOTHING = "nothing"
    ATTENTION = "attention"
    ALL = "all"

    def names(self, block: str) -> frozenset[str]:
        """As `Ranges.kept` has them."""
        return frozenset({"nothing": (), "attention": (f"{block}.attn",), "all": (block,)}[self.value])


@dataclass(frozen=True)
class Image:
    """One image's inputs of every block. steering: float32 [width], as `Modulation` writes it."""

    split: int
    steering: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Result:
    """attended: float32 [S, D], attention's output with the mean of v. residual: float32 [S, D], the stream behind the
    block."""

    attended: Tensor
    residual: Tensor


class Probe:
    """Blocks of one transformer on one device.

    Args:
        build: of the component, in FP8.
        ranges: the transformer's; what they keep is not regarded.
    """

    def __init__(self, spec: FluxSpec, build: Build, ranges: Ranges) -> None:
        self._spec, self._build, self._device, self._ranges = spec.transformer, build, build.device, ranges
        self._modulation = Modulation(build, self._spec)

    def images(self, inputs: Mapping[str, Tensor]) -> list[Image]:
        """The rows of a batch of the transformer's inputs, by the signature's names."""
        given = {name: value.to(self._device) for name, value in inputs.items()}
        rows, text, _ = given["encoder_hidden_states"].shape
        steering = torch.empty(rows, width(self._spec), dtype=torch.float32, device=self._device)
        named = {name: value for name, value in given.items() if name in ("guidance", "pooled_projections")}
        self._modulation(self._build.kernels, given["timestep"], named, steering)
        ids = torch.cat([given["txt_ids"], given["img_ids"]])
        shape = (len(ids), self._spec.attention_head_dim // 2)
        cos, sin = (torch.empty(shape, dtype=torch.float32, device=self._device) for _ in range(2))
        write_rope(ids, self._spec.axes_dims_rope, self._spec.rope_theta, cos, sin)
        return [Image(text, row, cos, sin) for row in steering]

    def open(self, name: str, kept: Kept) -> DoubleBlock | SingleBlock:
        """A block by its name, with some of it in the compute dtype. Raises CheckpointError, ArtifactError."""
        kind, _, index = name.partition(".")
        build = replace(self._build, ranges=replace(self._ranges, kept=kept.names(name))).below("")
        block = DoubleBlock if kind == "transformer_blocks" else SingleBlock
        return block(build, int(index), self._spec)

    @torch.inference_mode()
    def __call__(self, block: DoubleBlock | SingleBlock, image: Image, residual: Tensor) -> Result:
        """Run a block on the residual stream [S, D] that comes to it."""
        b, steering, counts = self._begin(block, image, residual)
        block.attend(self._build.kernels, b, steering)
        attended = block.attended(b)
        b.residual.copy_(residual)
        block(self._build.kernels, b, steering, counts)
        return Result(attended, b.residual.float())

    @torch.inference_mode()
    def milliseconds(self, block: DoubleBlock | SingleBlock, image: Image, residual: Tensor) -> float:
        """The shortest of a few runs, on the host's clock around the device's work."""
        b, steering, counts = self._begin(block, image, residual)
        spent = []
        for _ in range(_REPEATS):
            self._wait()
            begun = time.perf_counter()
            block(self._build.kernels, b, steering, counts)
            self._wait()
            spent.append(1000 * (time.perf_counter() - begun))
        return min(spent)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _begin(
        self, block: DoubleBlock | SingleBlock, image: Image, residual: Tensor
    ) -> tuple[Buffers, Tensor, Tensor]:
        """Buffers with the stream in them, and what steers the block."""
        double, single, _ = self._modulation.split(image.steering)
        index = int(block.name.partition(".")[2])
        steering = double[index] if isinstance(block, DoubleBlock) else single[index]
        d, device = self._spec.hidden_size, self._device
        blocks = self._spec.num_layers + self._spec.num_single_layers
        due = torch.ones(1, dtype=torch.int32, device=device)
        carried = due, torch.zeros(blocks, d, device=device), torch.zeros(blocks, 2, d, device=device)
        stream = residual.to(device, torch.bfloat16)
        linear, compute = (self._rows(len(stream), dtype) for dtype in (FP8.linear, FP8.compute))
        b = Buffers(image.split, stream.clone(), linear, compute, image.cos, image.sin, *carried)
        return b, steering, torch.zeros(2, dtype=torch.int64, device=device)

    def _rows(self, rows: int, dtype: torch.dtype) -> Rows:
        d, memory = self._spec.hidden_size, padded(rows, dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self._device).to(dtype)

        scale = torch.zeros(rows, device=self._device) if dtype == E4M3 else None
        return Rows(zeros(rows, d), scale, zeros(memory, 3 * d), zeros(memory, d + self._spec.mlp_width))
