"""Open the fused engine: all components of a model, on one GPU, from a checkpoint's weights or an artifact."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from fluxserve.engine import Components, Engine
from fluxserve.errors import DeviceUnsuited, EngineError, LibraryMissing, OutOfMemory, SettingsError
from fluxserve.families.flux import signatures
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.artifact import CHECKPOINT, Artifact, Ranges
from fluxserve.folders.checkpoint import Checkpoint

try:
    from fluxserve.engines.fused import headroom, vae
    from fluxserve.engines.fused.build import BF16, FP8, Build, Precision
    from fluxserve.engines.fused.clip import FusedClip
    from fluxserve.engines.fused.probe import HOPPER
    from fluxserve.engines.fused.qwen3 import FusedQwen3
    from fluxserve.engines.fused.t5 import FusedT5
    from fluxserve.engines.fused.transformer import FusedTransformer
    from fluxserve.kernels.gemm import hopper
    from fluxserve.kernels.operations import LAUNCHED, PLAIN, Operations
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("triton"):
        raise
    raise LibraryMissing("triton", comes_with="a CUDA build of PyTorch") from error

_ROWS = 8
"""Images that one call may hold: they take turns, so it costs no more than their inputs' memory."""


_ENCODERS: dict[str, Callable[[Checkpoint, Build], Engine]] = {"clip": FusedClip, "t5": FusedT5, "qwen3": FusedQwen3}


def open_components(checkpoint: Checkpoint, device: str, dtype: str) -> Components:
    """In BF16, which needs no calibration; see engines.open.open_components."""
    check_components(checkpoint, device, dtype)
    return _served(assemble(checkpoint, usable(device), BF16, None, LAUNCHED))


def open_artifact(artifact: Artifact, device: str) -> Components:
    """In the precision it was exported in; see engines.open.open_artifact.

    While weights are loaded they are hashed, and kernels are compiled that are not kept yet; nothing is returned before
    all hashes were right.
    """
    found = usable(device)
    quantised = artifact.component("transformer").precision == "fp8"
    ranges = artifact.ranges("transformer") if quantised else None
    folder = replace(artifact.checkpoint, spec=artifact.spec)
    with ThreadPoolExecutor() as pool:
        beside: list[Future[Any]] = [pool.submit(artifact.folder, CHECKPOINT)]
        if quantised:
            beside += hopper.compiling(pool)
        components = assemble(folder, found, FP8 if quantised else BF16, ranges, LAUNCHED)
        for task in beside:
            task.result()
    return _served(components)


def _served(components: Components) -> Components:
    """Once nothing can fail any more."""
    assert isinstance(components.network, FusedTransformer)
    components.network.prepare_sizes()
    return components


def assemble(
    checkpoint: Checkpoint, device: torch.device, precision: Precision, ranges: Ranges | None, kernels: Operations
) -> Components:
    """Every component. The transformer first: it needs the most memory.

    Args:
        ranges: the transformer's; None exactly if nothing is quantised.

    Raises:
        CheckpointError, ArtifactError, OutOfMemory.
        EngineError: a model whose text encoder the engine does not have.
    """
    _check_encoders(FluxSpec.of(checkpoint.spec))
    try:
        return _load(checkpoint, device, precision, ranges, kernels)
    except torch.OutOfMemoryError as error:
        needed = f"about {_weights_gb(checkpoint, precision):.0f} GB"
        raise OutOfMemory("weights", needed, f"what {device} has left ({error})") from error


def check_components(checkpoint: Checkpoint, device: str, dtype: str) -> None:
    """Check the dtype, the device and the text encoders; see engines.open."""
    if dtype not in ("auto", "bfloat16"):
        raise SettingsError("dtype", dtype, "auto or bfloat16 with the fused engine; FP8 comes with an artifact")
    usable(device)
    _check_encoders(FluxSpec.of(checkpoint.spec))


def check_artifact(artifact: Artifact, device: str) -> None:
    """Check the device and the text encoders; see engines.open."""
    usable(device)
    _check_encoders(FluxSpec.of(artifact.spec))


def _check_encoders(spec: FluxSpec) -> None:
    for encoder in spec.text.encoders:
        if encoder.name not in _ENCODERS:
            known = ", ".join(_ENCODERS)
            raise EngineError(
                f"fused: got {spec.name}, whose text encoder is {encoder.name}; expected one with {known}."
                " torch_eager runs it"
            )


def _weights_gb(checkpoint: Checkpoint, precision: Precision) -> float:
    """All files of weights; in FP8 and INT8 half of what BF16 takes."""
    sets = (checkpoint.weights(name).set for name in checkpoint.folders)
    files = sum(file.stat().st_size for each in sets for file in each.files)
    return files / 1e9 / (2 if precision.quantised else 1)


def _load(
    checkpoint: Checkpoint, device: torch.device, precision: Precision, ranges: Ranges | None, kernels: Operations
) -> Components:
    spec = FluxSpec.of(checkpoint.spec)
    signature = signatures.transformer(spec)
    most = (signature.most("image_tokens"), signature.most("text_tokens"), _ROWS)

    def build(folder: str) -> Build:
        return Build.of(checkpoint.weights(folder), device, precision, kernels)

    components = Components(
        {
            "transformer": FusedTransformer(spec, replace(build("transformer"), ranges=ranges), most),
            **{e.name: _ENCODERS[e.name](checkpoint, build(e.folder)) for e in reversed(spec.text.encoders)},
            "vae_decoder": vae.decoder(checkpoint, build(vae.FOLDER)),
            "vae_encoder": vae.encoder(checkpoint, build(vae.FOLDER)),
        }
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # a GiB that weights passed through before they were quantised
    headroom.require(f"{spec.limits.max_pixels:,} pixels in the VAE", vae.peak(checkpoint, precision.compute), device)
    return components


def operations_on(device: str) -> Operations:
    """The kernels, if the device runs them; their definitions anywhere else."""
    found = torch.device(device)
    hopper = found.type == "cuda" and torch.cuda.get_device_capability(found) == HOPPER
    return LAUNCHED if hopper else PLAIN


def usable(device: str) -> torch.device:
    """Raises DeviceUnsuited: no GPU, or none of the architecture that the kernels are written for."""
    found = torch.device(device)
    if found.type != "cuda" or not torch.cuda.is_available():
        raise DeviceUnsuited("fused", device, "a CUDA device")
    if torch.cuda.get_device_capability(found) != HOPPER:
        name, capability = torch.cuda.get_device_name(found), torch.cuda.get_device_capability(found)
        raise DeviceUnsuited("fused", f"{name}, compute capability {capability}", "Hopper, compute capability (9, 0)")
    return found
