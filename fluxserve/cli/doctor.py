"""What `fluxserve doctor` checks: everything that a server would refuse, before one is started."""

from collections.abc import Callable, Mapping
from functools import cache

from fluxserve.settings import Settings

Check = Callable[[], str]


def checks(config: Settings, server: Check) -> Mapping[str, Check]:
    """Checks by name, in their order; each returns what it found, or raises FluxserveError.

    Args:
        server: the check of tritonserver, which the command line chooses.
    """
    import torch

    from fluxserve import source
    from fluxserve.source import Source
    from fluxserve.text import Tokenizers

    device = "cuda:0" if torch.cuda.is_available() else "cpu"

    @cache
    def found() -> Source:
        return source.find(config)

    def model() -> str:
        return f"{found().spec.name} at {found().path}, engine {found().engine}"

    def tokenizers() -> str:
        Tokenizers(found().checkpoint)("")
        return ", ".join(encoder.tokenizer for encoder in found().spec.text.encoders)

    def weights() -> str:
        found().check_files(config.dtype)
        return "every file is what it should be" if found().artifact else "all numbers are finite"

    def engine() -> str:
        place = found().device(device)
        found().check_engine(place, config.dtype)
        return f"{found().engine} on {place}"

    def gpu() -> str:
        if not torch.cuda.is_available():
            return "none; the CPU is used"
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))

    def signature() -> str:
        from fluxserve.serving.files import open_signer

        signer = open_signer(config, found().spec.name)
        return f"C2PA, with {config.c2pa_certificate}" if signer else "none; no certificate is set"

    return {
        "tritonserver": server,
        "model": model,
        "tokenizers": tokenizers,
        "weights": weights,
        "engine": engine,
        "signature": signature,
        "GPU": gpu,
        "torch": lambda: str(torch.__version__),
    }


NEEDS_MODEL = ("tokenizers", "weights", "engine", "signature")
"""Checks that say nothing where the one of `model` failed."""
