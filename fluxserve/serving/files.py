"""Pictures → files, where that is quickest: PNGs on the GPU that drew the picture, everything else on the host."""

from collections.abc import Callable

import torch

from fluxserve.media.images import write_image
from fluxserve.pipeline import Drawing

Finish = Callable[[], list[bytes]]


class Files:
    """Writes them.

    Args:
        device: a GPU whose kernels may be compiled here, to write PNGs on; None: the host writes them.
        side: of a picture to try it on, so that no request waits for what is compiled late.
    """

    def __init__(self, device: torch.device | None, side: int) -> None:
        self._encode: Callable[[torch.Tensor], bytes] | None = None
        if device is not None:
            from fluxserve.media.png import gpu  # it brings Triton's compiler, which comes with PyTorch for CUDA alone

            self._encode = gpu.encode
            self._encode(torch.zeros(side, side, 3, dtype=torch.uint8, device=device))

    def begin(self, drawing: Drawing, output_format: str, quality: int) -> Finish:
        """What the GPU has to do is done here and now, before anything else keeps it busy.

        Returns:
            what does the rest, on any thread: a file for each image.

        Raises:
            NotFinite: there is no picture to write.
        """
        drawing.require_finite()
        if self._encode is not None and output_format == "png":
            written = [self._encode(pixels) for pixels in drawing.pixels]
            return lambda: written
        images = drawing.images
        return lambda: [write_image(image, output_format, quality) for image in images]
