"""Components that several families have, as functions of their signatures' tensors."""

from torch import Tensor, nn


class Wrapper(nn.Module):
    """A module of diffusers or transformers behind a signature."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Clip(Wrapper):
    """A CLIPTextModel: token ids → the pooled embedding."""

    def forward(self, input_ids: Tensor) -> Tensor:
        pooled: Tensor = self.module(input_ids).pooler_output
        return pooled


class T5(Wrapper):
    """A T5EncoderModel: token ids, and with a mask 0 at padding → the last hidden state of every token."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        sequence: Tensor = self.module(input_ids, attention_mask=attention_mask).last_hidden_state
        return sequence


class VaeEncoder(Wrapper):
    """signatures.vae_encoder of an AutoencoderKL."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        distribution = self.module.encode(pixels).latent_dist  # type: ignore[operator]
        return distribution.mean, distribution.std


class VaeDecoder(Wrapper):
    """signatures.vae_decoder of an AutoencoderKL."""

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.module.decode(latents, return_dict=False)[0]  # type: ignore[operator]
        return pixels
