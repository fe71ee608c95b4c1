"""A FLUX.2 of random weights, small enough for a CPU, saved as diffusers does: two double, three single blocks.

What would hide a mistake is not as it would be by default: the language model is deeper than what is read of it, its
heads are together wider than its states, no norm's weight is 1, the VAE's batch norm changes something, and what goes
into a block's layers comes out as large: were it smaller, what the blocks do would be lost beside the noise.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fluxserve.families.flux.configs import as_member
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders import checkpoint
from fluxserve.folders.checkpoint import Checkpoint
from testing.stand_in import qwen_tokenizer
from tests.support.random_flux import SCHEDULER

VOCABULARY = 512
TOKENS = 64


class RandomFlux2:
    """diffusers' pipeline, and the folder it was saved to."""

    def __init__(self, pipe: Flux2KleinPipeline | Flux2Pipeline) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self._folder = TemporaryDirectory()
        pipe.save_pretrained(self._folder.name)

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def checkpoint(self, tokens: int = TOKENS, model: FluxSpec | None = None) -> Checkpoint:
        """As it is read, but with fewer tokens: 512 would take most of the time, and most of them are padding.

        Args:
            model: the member of the family that it is taken for, as if it were as large.
        """
        read = checkpoint.read(self.folder)
        if model:
            read = replace(read, spec=as_member(read.spec, replace(model, transformer=read.spec.transformer)))
        text = read.spec.text.changed(read.spec.text.sequence.name, tokens=tokens)
        return replace(read, spec=replace(read.spec, text=text, defaults=replace(read.spec.defaults, side=64)))


@cache
def klein(tied: bool = True, seed: int = 0, head_dim: int = 32, distilled: bool = True) -> RandomFlux2:
    """The same weights for the same arguments; `tied` embeddings as in klein-4B, or not, as in klein-9B.

    One that is not distilled is a klein Base.

    A head's size is the published ones' only if it is 128, and then large enough for the fused engine's kernels.
    """
    torch.manual_seed(seed)
    text, transformer, vae = _scaled(_qwen3(tied), _transformer(guidance_embeds=False, head_dim=head_dim), _vae())
    return RandomFlux2(
        Flux2KleinPipeline(_scheduler(), vae, text, qwen_tokenizer(), transformer, is_distilled=distilled)
    )


@cache
def dev(seed: int = 0) -> RandomFlux2:
    """With an embedding of guidance, and a text encoder that can see, whose padding comes first."""
    torch.manual_seed(seed)
    text, transformer, vae = _scaled(_mistral3(), _transformer(guidance_embeds=True), _vae())
    made = RandomFlux2(Flux2Pipeline(_scheduler(), vae, text, chat_tokenizer(), transformer))
    index = made.folder / "model_index.json"
    listed = json.loads(index.read_text())  # a PixtralProcessor would want torchvision; its tokenizer is what is read
    index.write_text(json.dumps({**listed, "tokenizer": ["transformers", "PixtralProcessor"]}))
    return made


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**SCHEDULER)


def _scaled(text: nn.Module, transformer: nn.Module, vae: nn.Module) -> Iterator[nn.Module]:
    for norm in (p for module in (text, transformer) for p in module.parameters() if p.ndim == 1):
        nn.init.uniform_(norm, 0.5, 1.5)
    for linear in (p for p in transformer.parameters() if p.ndim == 2):
        nn.init.normal_(linear, std=linear.shape[1] ** -0.5)
    return (module.eval().requires_grad_(False) for module in (text, transformer, vae))


def _transformer(guidance_embeds: bool, head_dim: int = 32) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        joint_attention_dim=3 * 48,
        axes_dims_rope=(head_dim // 4,) * 4,
        guidance_embeds=guidance_embeds,
    )


def _vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 32, 32), latent_channels=32, layers_per_block=1, norm_num_groups=8
    )
    vae.bn.running_mean.normal_(std=0.1)  # about those of its latents: they must differ from image to image
    vae.bn.running_var.uniform_(0.02, 0.08)
    return vae


def _mistral3() -> Mistral3ForConditionalGeneration:
    text = {
        "model_type": "mistral",
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def _qwen3(tied: bool) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=30,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=tied,
        )
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each byte, Mistral's special tokens, and a chat template of system and user as it has them."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    words = [*special, *bytes_to_unicode().values()]
    byte_level = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=special[4:],
        padding_side="left",
    )
    made.chat_template = (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- '[SYSTEM_PROMPT]' if message.role == 'system' else '[INST]' }}"
        "{%- for part in message.content %}{{- part.text }}{%- endfor %}"
        "{{- '[/SYSTEM_PROMPT]' if message.role == 'system' else '[/INST]' }}"
        "{%- endfor %}"
    )
    return made


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """uint8 [height, width, 3] of smooth colours: of mere noise, all would be the same grey."""
    rng = np.random.default_rng(seed)
    made = []
    for height, width in sizes:
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        made.append(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)))
    return made
