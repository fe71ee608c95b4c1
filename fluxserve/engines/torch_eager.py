"""diffusers' and transformers' modules as they are: the reference that every other engine is judged against.

Not fast, and not meant to be: no graph, no fused kernel, one library call per operation.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.mistral3.configuration_mistral3 import Mistral3Config
from transformers.models.mistral3.modeling_mistral3 import Mistral3ForConditionalGeneration
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3Model
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.utils import logging as transformers_logging

from fluxserve.engine import FLOATING, Components, Shapes, Signature, TensorSpec
from fluxserve.engines import signatures
from fluxserve.engines.finite import extremes, refuse_infinite
from fluxserve.errors import CheckpointError
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.folders.weights import Weights
from fluxserve.spec import PATCH, ModelSpec

Tensors = Mapping[str, Tensor]


class TorchEngine:
    """A component's module, called with the signature's names."""

    def __init__(self, signature: Signature, module: nn.Module) -> None:
        self.signature = signature
        self._module: nn.Module | None = module

    def bind(self, shapes: Shapes) -> "TorchBound":
        assert self._module is not None, "bind after close"
        weight = next(self._module.parameters())
        sizes = self.signature.resolve(shapes)

        def allocate(tensors: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
            return {t.name: torch.zeros(sizes[t.name], dtype=_dtype(t, weight), device=weight.device) for t in tensors}

        return TorchBound(allocate(self.signature.inputs), allocate(self.signature.outputs), self._module)

    def close(self) -> None:
        self._module = None


class TorchBound:
    """Eager PyTorch at fixed addresses: results are copied to where they are expected."""

    def __init__(self, inputs: Tensors, outputs: Tensors, module: nn.Module) -> None:
        self.inputs, self.outputs, self._module = inputs, outputs, module

    @torch.inference_mode()
    def run(self) -> None:
        results = self._module(**self.inputs)
        for output, result in zip(self.outputs.values(), _tuple(results), strict=True):
            output.copy_(result)


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def _dtype(tensor: TensorSpec, weight: Tensor) -> torch.dtype:
    if tensor.dtype == FLOATING:
        return weight.dtype
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype


# --- the components as functions of their signatures' tensors; what is exported is exactly what is called here ------


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Clip(_Wrapper):
    """signatures.clip of a CLIPTextModel."""

    def forward(self, input_ids: Tensor) -> Tensor:
        pooled: Tensor = self.module(input_ids).pooler_output
        return pooled


class T5(_Wrapper):
    """signatures.t5 of a T5EncoderModel."""

    def forward(self, input_ids: Tensor) -> Tensor:
        sequence: Tensor = self.module(input_ids).last_hidden_state
        return sequence


class Qwen3Layers(Qwen3Model):  # type: ignore[misc]
    """The first `num_hidden_layers` of a Qwen3ForCausalLM's folder, without the norm that follows its last layer."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^(model\.)?(layers|norm)\.", r"^lm_head\."]

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.norm = nn.Identity()


class Mistral3Layers(Mistral3ForConditionalGeneration):  # type: ignore[misc]
    """The first `text_config.num_hidden_layers` of a Mistral3ForConditionalGeneration's folder: it only reads words.

    Without the norm that follows its last layer, without eyes, and without the head that would guess the next word.
    """

    _keys_to_ignore_on_load_unexpected: ClassVar = [
        r"(^|\.)language_model\.(model\.)?(layers|norm)\.",
        r"(^|\.)(vision_tower|multi_modal_projector|lm_head)\.",
    ]
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__(config)
        self.model.language_model.norm = nn.Identity()
        self.model.vision_tower = self.model.multi_modal_projector = self.lm_head = nn.Identity()


class LanguageModel(_Wrapper):
    """signatures.language_model of a model of transformers."""

    def __init__(self, module: nn.Module, layers: tuple[int, ...]) -> None:
        super().__init__(module)
        self.layers = layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        read = {"input_ids": input_ids, "attention_mask": attention_mask}
        states = self.module(**read, output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([states[layer] for layer in self.layers], dim=-1)


class Transformer(_Wrapper):
    """signatures.transformer of a FluxTransformer2DModel; one without guidance ignores it."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        guided = self.module.config.guidance_embeds  # type: ignore[union-attr]
        velocity: Tensor = self.module(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            guidance=guidance if guided else None,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        return velocity


class Transformer2(_Wrapper):
    """signatures.transformer of a Flux2Transformer2DModel."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        velocity: Tensor = self.module(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            guidance=guidance,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        return velocity


class VaeEncoder(_Wrapper):
    """signatures.vae_encoder of an AutoencoderKL."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        distribution = self.module.encode(pixels).latent_dist  # type: ignore[operator]
        return distribution.mean, distribution.std


class VaeDecoder(_Wrapper):
    """signatures.vae_decoder of an AutoencoderKL."""

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.module.decode(latents, return_dict=False)[0]  # type: ignore[operator]
        return pixels


class Vae2Encoder(VaeEncoder):
    """signatures.vae_encoder of an AutoencoderKLFlux2: the latents are those that the loop has."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().forward(pixels)
        shift, scale = _statistics(self.module, mean)
        return (mean - shift) / scale, std / scale


class Vae2Decoder(VaeDecoder):
    """signatures.vae_decoder of an AutoencoderKLFlux2, of latents as the loop has them."""

    def forward(self, latents: Tensor) -> Tensor:
        shift, scale = _statistics(self.module, latents)
        return super().forward(latents * scale + shift)


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents [B, C, h, w], as [C, h, w] (Flux2KleinPipeline._encode_vae_image).

    There is one of each for the channels of a token, which are the places of a square of latents.
    """
    shift, scale = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    squares = 1, latents.shape[2] // PATCH, latents.shape[3] // PATCH
    return shift.view(-1, PATCH, PATCH).repeat(squares), scale.view(-1, PATCH, PATCH).repeat(squares)


@dataclass(frozen=True)
class Architecture:
    """Where a component's weights are in a diffusers folder, their class, and how it is called."""

    folder: str
    module: type[nn.Module]
    wrapper: Callable[[nn.Module], nn.Module]
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """What is loaded other than the folder's config.json says."""


ARCHITECTURES = {
    "clip": Architecture("text_encoder", CLIPTextModel, Clip),
    "t5": Architecture("text_encoder_2", T5EncoderModel, T5),
    "transformer": Architecture("transformer", FluxTransformer2DModel, Transformer),
    "vae_encoder": Architecture("vae", AutoencoderKL, VaeEncoder),
    "vae_decoder": Architecture("vae", AutoencoderKL, VaeDecoder),
}
"""Of FLUX.1."""


def architectures(spec: ModelSpec) -> Mapping[str, Architecture]:
    """Every component of a model."""
    if spec.transformer.generation == 1:
        return ARCHITECTURES
    encoder = spec.text.sequence
    reads, folder = partial(LanguageModel, layers=encoder.layers), encoder.folder
    depth = {"num_hidden_layers": max(encoder.layers)}
    texts = {
        "qwen3": Architecture(folder, Qwen3Layers, reads, depth),
        "mistral3": Architecture(folder, Mistral3Layers, reads, {"text_config": depth}),
    }
    return {
        encoder.name: texts[encoder.name],
        "transformer": Architecture("transformer", Flux2Transformer2DModel, Transformer2),
        "vae_encoder": Architecture("vae", AutoencoderKLFlux2, Vae2Encoder),
        "vae_decoder": Architecture("vae", AutoencoderKLFlux2, Vae2Decoder),
    }


def load_module(checkpoint: Checkpoint, component: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The module behind one component, without its wrapper. Raises CheckpointError."""
    architecture = architectures(checkpoint.spec)[component]
    folder = checkpoint.component(architecture.folder)
    for library in (diffusers_logging, transformers_logging):  # a server's log is no place for their progress bars
        library.disable_progress_bar()
    weights = checkpoint.weights(architecture.folder)
    with _libraries_errors(folder):
        module, report = architecture.module.from_pretrained(  # type: ignore[attr-defined]
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            variant=weights.set.variant or None,
            local_files_only=True,
            output_loading_info=True,
            **architecture.configuration,
        )
        _refuse_gaps(weights, report)
        loaded: nn.Module = module.eval().requires_grad_(False).to(device)
        named = (*loaded.named_parameters(), *loaded.named_buffers())
        refuse_infinite(folder, {name: extremes(t) for name, t in named if t.is_floating_point()})
    return loaded


def hollow_module(checkpoint: Checkpoint, component: str) -> nn.Module:
    """The same module on the meta device, without weights. Raises CheckpointError."""
    architecture = architectures(checkpoint.spec)[component]
    cls: Any = architecture.module
    folder = checkpoint.component(architecture.folder)
    with _libraries_errors(folder), init_empty_weights(include_buffers=False):
        if hasattr(cls, "load_config"):  # diffusers
            module: nn.Module = cls.from_config(cls.load_config(str(folder)))
        else:
            module = cls(cls.config_class.from_pretrained(str(folder), **architecture.configuration))
    return module


@contextmanager
def _libraries_errors(folder: Path) -> Iterator[None]:
    """What diffusers and transformers raise about a folder, as a CheckpointError that names it."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def check_components(checkpoint: Checkpoint, _: str, __: str) -> None:
    """Build every module, without its weights; see engines.open. Raises CheckpointError."""
    for component in checkpoint.spec.components:
        hollow_module(checkpoint, component)


def open_components(checkpoint: Checkpoint, device: str, dtype: str) -> Components:
    """Load every component; see engines.open.open_components."""
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    names = (name for name in checkpoint.spec.components if name != "vae_encoder")  # whose module is the decoder's
    modules = {name: load_module(checkpoint, name, device, getattr(torch, dtype)) for name in names}
    return from_modules(checkpoint.spec, {**modules, "vae_encoder": modules["vae_decoder"]})


def _refuse_gaps(weights: Weights, report: Mapping[str, Iterable[object]]) -> None:
    """Refuse what the loader left out: it draws missing tensors at random, drops the ones that it can't place, and
    goes on."""
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(key) for key in report.get(problem, ()))
        if problem == "unexpected_keys":
            names = [name for name in names if (stored := weights.find(name)) and stored.name == name]
        if names:
            few, problem = ", ".join(names[:5]), problem.replace("_", " ")
            raise CheckpointError(f"{weights.folder}: {problem}: {few} ({len(names)} in all)")


def from_modules(spec: ModelSpec, modules: Mapping[str, nn.Module]) -> Components:
    """Wrap modules that are loaded already, by the component's name, all on one device and of one dtype."""
    return Components.of(
        {
            name: TorchEngine(signatures.BY_COMPONENT[name](spec), architecture.wrapper(modules[name]))
            for name, architecture in architectures(spec).items()
        }
    )
