"""Pictures → files, where that is quickest: PNGs on the GPU that drew the picture, everything else on the host.

Every file carries its provenance, and is signed where the operator has a certificate.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fluxserve.errors import SettingsError
from fluxserve.families import registry
from fluxserve.job import Job
from fluxserve.media.images import Pixels, write_image
from fluxserve.media.provenance import Provenance, System
from fluxserve.pipeline import Drawing
from fluxserve.settings import Settings
from fluxserve.spec import ModelSpec

if TYPE_CHECKING:
    from fluxserve.media.signing import Signer

Finish = Callable[[], list[bytes]]


def open_signer(config: Settings, model: str) -> "Signer | None":
    """Open the signer that the settings name and try it out; None where they name none.

    Raises:
        SettingsError: it can't sign, or its library is not installed.
    """
    if not (config.c2pa_certificate or config.c2pa_key):
        return None
    if not (config.c2pa_certificate and config.c2pa_key):
        missing = "c2pa_key" if config.c2pa_certificate else "c2pa_certificate"
        raise SettingsError(missing, "", "a PEM file: a certificate and its key are set together, or neither")
    try:
        from fluxserve.media.signing import Signer
    except ModuleNotFoundError as error:
        extra = f"nothing, or {error.name} beside it: the extra 'provenance' (pip install 'fluxserve[provenance]')"
        raise SettingsError("c2pa_certificate", config.c2pa_certificate, extra) from error
    return Signer(Path(config.c2pa_certificate), Path(config.c2pa_key), model)


class Files:
    """Writes the files of pictures.

    Args:
        device: a GPU whose kernels may be compiled here, to write PNGs on; None: the host writes them.
        spec: the model. A picture of its default size is tried, so that no request waits for what is compiled late.
        system: what draws, as the files name it.
        signer: None leaves files unsigned.
    """

    def __init__(
        self, device: torch.device | None, spec: ModelSpec, system: System, signer: "Signer | None" = None
    ) -> None:
        self._spec, self._system, self._signer = spec, system, signer
        self._encode: Callable[[torch.Tensor, bytes], bytes] | None = None
        if device is not None:
            from fluxserve.media.png import gpu  # it brings Triton's compiler, which comes with PyTorch for CUDA alone

            side = spec.defaults.side
            self._encode = gpu.encode
            self._encode(torch.zeros(side, side, 3, dtype=torch.uint8, device=device), b"")

    def begin(self, drawing: Drawing, job: Job, output_format: str, quality: int, prompt: str = "") -> Finish:
        """What the GPU has to do is done here and now, before anything else keeps it busy.

        Args:
            drawing: the pictures of `job`.
            prompt: goes into the files; empty unless the caller wants it there.

        Returns:
            what does the rest, on any thread: a file for each image.

        Raises:
            NotFinite: there is no picture to write.
        """
        drawing.require_finite()
        provenances = [self._provenance(job, seed, job.steps, prompt) for seed in job.seeds]
        if self._encode is not None and output_format == "png":
            pairs = zip(drawing.pixels, provenances, strict=True)
            written = [self._encode(pixels, each.png_chunks()) for pixels, each in pairs]
            return lambda: self._signed(written, output_format)
        images = drawing.images

        def finish() -> list[bytes]:
            pairs = zip(images, provenances, strict=True)
            return self._signed(
                [write_image(image, output_format, quality, each) for image, each in pairs], output_format
            )

        return finish

    def _signed(self, files: list[bytes], output_format: str) -> list[bytes]:
        """Sign each file. Raw pixels have no place for a signature."""
        if self._signer is None or output_format == "raw":
            return files
        return [self._signer.sign(file, output_format) for file in files]

    def preview(self, pixels: Pixels, job: Job, seed: int, steps: int, output_format: str, quality: int) -> bytes:
        """Write a preview on the host: with its provenance, without a signature or the prompt.

        Args:
            seed, steps: of the picture that it shows, so far.
        """
        return write_image(pixels, output_format, quality, self._provenance(job, seed, steps, ""))

    def _provenance(self, job: Job, seed: int, steps: int, prompt: str) -> Provenance:
        """Describe one image. Image k of several gets the same description as the same image alone."""
        own = registry.of(self._spec).parameters(job, self._spec)
        return Provenance(self._system, seed, steps, job.height, job.width, own, prompt)
