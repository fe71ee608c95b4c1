"""What an export is asked for, and the shapes that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fluxserve.errors import ExportError
from fluxserve.families.flux import signatures
from fluxserve.families.flux.parts import PATCH, FluxSpec
from fluxserve.families.shared.signatures import MAX_ROWS
from fluxserve.folders.artifact import Extent
from fluxserve_export.fp8 import ATTENTION, KEPT

ONNXRUNTIME, TENSORRT, TENSORRT_RTX, FUSED = "onnxruntime", "tensorrt", "tensorrt-rtx", "fused"
FP8 = "fp8"

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Precision → what the graph computes in; under fp8 the engine decides (see Options.dtype)."""

SPELLED_OUT_OPSET = 22
"""Attention is products and a softmax. ONNX Runtime can simulate FP8 in it, and every TensorRT can read it."""

ATTENTION_OPSET = 23
"""Attention is one operator, which TensorRT fuses into one kernel or refuses to build: what FP8 attention needs. Newer
than TensorRT 10.13. No kernel is there for float32, nor for the VAE's single head of 512."""

FUSED_ARCHITECTURES = ("sm90",)

GATE = 0.1
"""The largest error of a block in FP8, of what it adds to the residual stream. BF16's is about a tenth of it."""

FUSED_WITHOUT = ("clip",)
"""Components that the fused engine leaves in BF16 under fp8: a thousandth of the time."""

_NOT_FUSED = ("mistral3",)
"""Components that the fused engine has no code for."""

Size = tuple[int, int]
"""Height, width in pixels."""


@dataclass(frozen=True)
class Sizes:
    """What an engine is built for: any size from the shorter side of min_size to the longer of max_size, and at most
    max_size's area; fastest at opt_size."""

    min_size: Size
    opt_size: Size
    max_size: Size
    max_batch: int = 1

    def check(self, spec: FluxSpec) -> None:
        """Raises ExportError, which names the size, what came and what the model allows."""
        limits, step = spec.limits, spec.size_multiple
        for name in ("min_size", "opt_size", "max_size"):
            height, width = getattr(self, name)
            fits = all(limits.min_side <= s <= limits.max_side and s % step == 0 for s in (height, width))
            if not fits or height * width > limits.max_pixels:
                allowed = f"multiples of {step} from {limits.min_side} to {limits.max_side}"
                raise ExportError(f"{name}: got {height}x{width}; {spec.name} allows {allowed}")
        areas = [h * w for h, w in (self.min_size, self.opt_size, self.max_size)]
        sides = [*self.min_size, *self.opt_size, *self.max_size]
        if areas != sorted(areas) or min(sides) != min(self.min_size) or max(sides) != max(self.max_size):
            got = ", ".join("x".join(map(str, s)) for s in (self.min_size, self.opt_size, self.max_size))
            raise ExportError(f"min, opt, max size: got {got}; expected each to hold the one before")
        if not 1 <= self.max_batch <= MAX_ROWS:
            raise ExportError(f"max_batch: got {self.max_batch}; expected 1 to {MAX_ROWS}")


def default_sizes(spec: FluxSpec) -> Sizes:
    """From the model's smallest picture to its default size, where it is fastest."""
    side = spec.defaults.side
    return Sizes((spec.limits.min_side,) * 2, (side, side), (side, side))


@dataclass(frozen=True)
class Options:
    """One export, whole."""

    engine: str
    precision: str
    sizes: Sizes
    architectures: tuple[str, ...] = ()
    fused_attention: bool = True
    """Whether attention may be one operator, where the engine has a kernel for it."""
    check_numerics: bool = True
    """Whether ONNX files are run through ONNX Runtime, where memory allows it."""
    gate: float = GATE
    """The largest error of a block in FP8; see measure.py."""

    @property
    def dtype(self) -> torch.dtype:
        """What the graph computes in. ONNX Runtime's CPU provider has no bfloat16."""
        if self.precision == FP8:
            return torch.float32 if self.engine == ONNXRUNTIME else torch.bfloat16
        return DTYPES[self.precision]

    def onnx_opset(self, component: str) -> int:
        """The dialect in which a component's attention is written."""
        has_kernel = component in ATTENTION and self.engine != ONNXRUNTIME and self.dtype != torch.float32
        return ATTENTION_OPSET if has_kernel and self.fused_attention else SPELLED_OUT_OPSET

    def precision_of(self, component: str) -> str:
        """FP8 is for the components that fp8.KEPT lists; the others compute in `dtype`."""
        without = FUSED_WITHOUT if self.engine == FUSED else ()
        if self.precision == FP8 and (component not in KEPT or component in without):
            return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return self.precision

    def check(self, spec: FluxSpec) -> None:
        """Raises ExportError."""
        missing = [name for name in spec.components if name in _NOT_FUSED]
        if missing:
            raise ExportError(f"{self.engine}: {spec.name} has {missing[0]}, which torch_eager alone runs")
        if spec.transformer.generation != 1 and self.engine != FUSED:
            raise ExportError(f"{self.engine}: {spec.name} is not exported yet; fused and torch_eager run it")
        self.sizes.check(spec)
        if self.engine == ONNXRUNTIME and self.precision == "bf16":
            raise ExportError("precision: got bf16; ONNX Runtime on a CPU computes in fp32, fp16 or (simulated) fp8")
        if self.engine == FUSED and self.precision not in ("bf16", FP8):
            raise ExportError(f"precision: got {self.precision}; the fused engine computes in bf16 or fp8")
        if self.engine == FUSED and self.architectures not in ((), FUSED_ARCHITECTURES):
            raise ExportError(f"sm: got {', '.join(self.architectures)}; the fused engine's kernels are for sm90")
        if self.engine == TENSORRT_RTX and not self.architectures:
            raise ExportError("sm: got none; expected the GPU architectures to build for, such as sm89 or sm120")
        if self.engine == ONNXRUNTIME and self.architectures:
            raise ExportError(f"sm: got {', '.join(self.architectures)}; ONNX Runtime's files are for any machine")


def ranges(component: str, spec: FluxSpec, sizes: Sizes) -> dict[str, Extent]:
    """The varying dimensions of a component's signature: least, typical, most.

    Text is always padded to its full length, so that its dimension does not vary. References add to the tokens, and
    may be longer or smaller than any picture.
    """
    rows = (1, 1, sizes.max_batch)
    if component in (encoder.name for encoder in spec.text.encoders):
        tokens = spec.text.named(component).tokens
        return {"rows": rows, "tokens": (tokens,) * 3}
    if component == "transformer":
        least, limits = min(sizes.min_size), spec.limits
        small, usual, large = (spec.image_tokens(*size) for size in ((least, least), sizes.opt_size, sizes.max_size))
        references = limits.max_references * limits.max_reference_pixels // spec.size_multiple**2
        text = spec.text.sequence.tokens
        return {"rows": rows, "image_tokens": (small, usual, large + references), "text_tokens": (text,) * 3}
    least, most = min(sizes.min_size) // spec.vae.downscale, max(sizes.max_size) // spec.vae.downscale
    if component == "vae_encoder" and spec.takes_references:
        least = min(least, spec.limits.min_reference_side // spec.vae.downscale)
        most = max(most, signatures.vae_encoder(spec).most("latent_height"))
    height, width = spec.latent_size(*sizes.opt_size)
    return {"rows": rows, "latent_height": (least, height, most), "latent_width": (least, width, most)}


def profile(shapes: Mapping[str, Extent], which: int) -> dict[str, int]:
    """The symbols at the least (0), typical (1) or most (2) of their range."""
    return {symbol: values[which] for symbol, values in shapes.items()}


def example(shapes: Mapping[str, Extent]) -> dict[str, int]:
    """A small point inside the ranges: sizes that torch.export takes for variable (0 and 1 it takes for fixed)."""
    small = {symbol: min(max(least, 2), most) for symbol, (least, _, most) in shapes.items()}
    for symbol in ("latent_height", "latent_width"):
        if symbol in small:
            small[symbol] += small[symbol] % PATCH
    return small
