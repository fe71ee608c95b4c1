"""A PixArt-Σ of random weights, small enough for a CPU, saved as diffusers does: three blocks, hidden size 48.

What would hide a mistake is not as it would be by default: the vectors that modulate blocks and the cross-attention's
weights come out as large, so that the words, their mask and the timestep all show in the picture.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fluxserve.folders import checkpoint
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.settings import default_checkpoint


class RandomPixArt:
    """diffusers' pipeline, and the folder it was saved to."""

    def __init__(self, pipe: PixArtSigmaPipeline) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self._folder = TemporaryDirectory()
        pipe.save_pretrained(self._folder.name)

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def checkpoint(self) -> Checkpoint:
        return checkpoint.read(self.folder)


@cache
def make(seed: int = 0) -> RandomPixArt:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(default_checkpoint() / "tokenizer_2")
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=3,
        cross_attention_dim=48,
        caption_channels=64,
        sample_size=8,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.13025,
    )
    text = _t5(len(tokenizer))
    for weight in (p for p in transformer.parameters() if p.ndim == 2):
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    modules = (module.eval().requires_grad_(False) for module in (text, vae, transformer))
    return RandomPixArt(PixArtSigmaPipeline(tokenizer, *modules, DPMSolverMultistepScheduler()))


def _t5(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
