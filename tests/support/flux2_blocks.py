"""Few blocks of FLUX.2's transformer at their real widths, or at two heads of 128, with random weights, as diffusers
saves them. Without a text encoder or a VAE: what reads the folder is the transformer alone.

Spreads are those of random_flux2, and for its reason: what goes into a layer comes out as large.
"""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from torch import nn

from fluxserve.families.flux.models import FLUX2_DEV
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.checkpoint import Checkpoint

SMALL = replace(
    FLUX2_DEV,
    name="small",
    transformer=replace(FLUX2_DEV.transformer, num_attention_heads=2, joint_attention_dim=144),
)
"""As wide as its kernels' tiles at least; with guidance."""


def write(folder: Path, spec: FluxSpec, double: int, single: int) -> Checkpoint:
    """Make the folder; weights in bfloat16."""
    shape = replace(spec.transformer, num_layers=double, num_single_layers=single)
    torch.manual_seed(0)
    with torch.device("meta"):
        module = Flux2Transformer2DModel(
            in_channels=shape.in_channels,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=shape.attention_head_dim,
            num_attention_heads=shape.num_attention_heads,
            joint_attention_dim=shape.joint_attention_dim,
            axes_dims_rope=shape.axes_dims_rope,
            guidance_embeds=shape.guidance_embeds,
        )
    module = module.to(torch.bfloat16).to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    module.save_pretrained(folder / "transformer")
    return Checkpoint(folder, replace(spec, transformer=shape))
