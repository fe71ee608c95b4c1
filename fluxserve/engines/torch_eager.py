"""diffusers' and transformers' modules as they are: the reference that every other engine is judged against.

Not fast, and not meant to be: no graph, no fused kernel, one library call per operation.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.utils import logging as transformers_logging

from fluxserve.checkpoint import Checkpoint
from fluxserve.engines import signatures
from fluxserve.engines.base import FLOATING, Components, Shapes, Signature, TensorSpec
from fluxserve.errors import CheckpointError

Tensors = Mapping[str, Tensor]


class TorchEngine:
    """A module and how to call it with the signature's names."""

    def __init__(self, signature: Signature, module: nn.Module, call: Callable[[Tensors], Tensors]) -> None:
        self.signature = signature
        self._module: nn.Module | None = module
        self._call: Callable[[Tensors], Tensors] | None = call

    def bind(self, shapes: Shapes) -> "TorchBound":
        assert self._module is not None and self._call is not None, "bind after close"
        weight = next(self._module.parameters())
        sizes = self.signature.resolve(shapes)

        def allocate(tensors: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
            return {t.name: torch.zeros(sizes[t.name], dtype=_dtype(t, weight), device=weight.device) for t in tensors}

        return TorchBound(allocate(self.signature.inputs), allocate(self.signature.outputs), self._call)

    def close(self) -> None:
        self._module = self._call = None


class TorchBound:
    """Eager PyTorch at fixed addresses: results are copied to where they are expected."""

    def __init__(self, inputs: Tensors, outputs: Tensors, call: Callable[[Tensors], Tensors]) -> None:
        self.inputs, self.outputs, self._call = inputs, outputs, call

    @torch.inference_mode()
    def run(self) -> None:
        for name, value in self._call(self.inputs).items():
            self.outputs[name].copy_(value)


def _dtype(tensor: TensorSpec, weight: Tensor) -> torch.dtype:
    if tensor.dtype == FLOATING:
        return weight.dtype
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype


def open_components(checkpoint: Checkpoint, device: str, dtype: str) -> Components:
    """Load all five components; see engines.open.open_components."""
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    precision: torch.dtype = getattr(torch, dtype)
    for library in (diffusers_logging, transformers_logging):  # a server's log is no place for their progress bars
        library.disable_progress_bar()

    def load(cls: type, name: str) -> nn.Module:
        folder = checkpoint.component(name)
        try:
            module, report = cls.from_pretrained(  # type: ignore[attr-defined]
                str(folder),
                torch_dtype=precision,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            _refuse_gaps(folder, report)
            loaded: nn.Module = module.eval().requires_grad_(False).to(device)
        except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
            raise CheckpointError(f"{folder}: {error}") from error
        return loaded

    return from_modules(
        checkpoint,
        clip=load(CLIPTextModel, "text_encoder"),
        t5=load(T5EncoderModel, "text_encoder_2"),
        transformer=load(FluxTransformer2DModel, "transformer"),
        vae=load(AutoencoderKL, "vae"),
    )


def _refuse_gaps(folder: Path, report: Mapping[str, Iterable[object]]) -> None:
    """Refuse weights that do not fill the module: both libraries would draw what is missing at random, and go on."""
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(key) for key in report.get(problem, ()))
        if names:
            raise CheckpointError(
                f"{folder}: {problem.replace('_', ' ')}: {', '.join(names[:5])} ({len(names)} in all)"
            )


def from_modules(
    checkpoint: Checkpoint, clip: nn.Module, t5: nn.Module, transformer: nn.Module, vae: nn.Module
) -> Components:
    """Wrap modules that are loaded already, all on one device and of one dtype."""
    spec = checkpoint.spec
    guided = spec.transformer.guidance_embeds

    def run_transformer(x: Tensors) -> Tensors:
        guidance = x["guidance"] if guided else None
        return {"velocity": transformer(**{**x, "guidance": guidance}, return_dict=False)[0]}

    def run_vae_encoder(x: Tensors) -> Tensors:
        distribution = vae.encode(x["pixels"]).latent_dist  # type: ignore[operator]
        return {"mean": distribution.mean, "std": distribution.std}

    return Components(
        clip=TorchEngine(signatures.clip(spec), clip, lambda x: {"pooled": clip(x["input_ids"]).pooler_output}),
        t5=TorchEngine(signatures.t5(spec), t5, lambda x: {"sequence": t5(x["input_ids"]).last_hidden_state}),
        transformer=TorchEngine(signatures.transformer(spec), transformer, run_transformer),
        vae_encoder=TorchEngine(signatures.vae_encoder(spec), vae, run_vae_encoder),
        vae_decoder=TorchEngine(
            signatures.vae_decoder(spec),
            vae,
            lambda x: {"pixels": vae.decode(x["latents"], return_dict=False)[0]},  # type: ignore[operator]
        ),
    )
