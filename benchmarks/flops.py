"""What a picture costs in operations, by model and stage, and what share of a GPU's peak a claimed time would need.

    python -m benchmarks.flops [--models flux.2-klein-9b …] [--size 1024x1024] [--references 0] [--claim MODEL SECONDS]

diffusers' and transformers' own modules, hollow, are called with hollow inputs of the real shapes, and PyTorch counts
what their products and convolutions are (a multiplication and an addition are two). Nothing is computed, no weight is
there: it takes seconds on any machine. A share above 100% can't be: the claim is of something else. published.json has
what is known of text encoders, of GPUs (dense, as their makers state it) and who claims what; --claim asks of every GPU
what a time of your own would need, at the size and with the references given. The last line is JSON.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import report
from benchmarks.pictures import sides
from fluxserve.families import registry
from fluxserve.families.base import Architecture
from fluxserve.families.flux import signatures
from fluxserve.families.flux.parts import FluxSpec
from testing import published
from testing.published import MODELS, PUBLISHED

_TERA = 1e12


def counted(spec: FluxSpec, size: tuple[int, int], references: int) -> dict[str, float]:
    """Return TFLOP of every component, the transformer's for one step with all of its passes.

    Args:
        references: images that are as large as the picture.
    """
    text = {e.name: e.tokens for e in spec.text.encoders}
    latent_height, latent_width = spec.latent_size(*size)
    image = spec.image_tokens(*size) * (1 + references)
    lengths = {"image_tokens": image, "text_tokens": spec.text.sequence.tokens}
    lengths |= {"latent_height": latent_height, "latent_width": latent_width}
    passes = 2 if spec.classifier_free else 1
    rows = {"vae_encoder": 1, "vae_decoder": 1}
    return {
        name: _operations(
            spec, name, architecture, {**lengths, "rows": rows.get(name, passes), "tokens": text.get(name, 1)}
        )
        / _TERA
        for name, architecture in registry.architectures(spec).items()
    }


def _operations(spec: FluxSpec, name: str, architecture: Architecture, lengths: Mapping[str, int]) -> int:
    signature = signatures.BY_COMPONENT[name](spec)
    shapes = signature.at(lengths)
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # whose two products are counted
        module = architecture.wrapper(published.module(spec, name)).eval()
        given = {t.name: torch.ones(shapes[t.name], dtype=_dtype(t.dtype)) for t in signature.inputs}
        with FlopCounterMode(display=False) as counter:
            module(**given)
    return int(counter.get_total_flops())


def _dtype(name: str) -> torch.dtype:
    return torch.int64 if name == "int64" else torch.float32


def whole(spec: FluxSpec, tflop: Mapping[str, float], steps: int) -> float:
    """TFLOP of a picture from its prompt: every text encoder once, the steps, the VAE's decoder."""
    texts = sum(tflop[encoder.name] for encoder in spec.text.encoders)
    return texts + steps * tflop["transformer"] + tflop["vae_decoder"]


def judged(claim: Mapping[str, Any], tflop: Mapping[str, float]) -> dict[str, Any]:
    """A claim, and the share of its GPU's peak that the loop alone, and the whole picture, would need."""
    spec, peak = MODELS[claim["model"]], PUBLISHED["tflops"][claim["gpu"]][claim["precision"]]
    can = peak * claim["seconds"]
    loop = claim["steps"] * tflop["transformer"]
    shares = {"loop": loop / can, "all": whole(spec, tflop, claim["steps"]) / can}
    return {**claim, **{name: round(share, 4) for name, share in shares.items()}}


def asked_of_all(parser: argparse.ArgumentParser, model: str, seconds: str) -> list[dict[str, Any]]:
    """A claim as it would be of every GPU, in every precision."""
    if model not in MODELS:
        parser.error(f"--claim: got {model!r}; expected one of {', '.join(MODELS)}")
    try:
        claim = {"model": model, "seconds": float(seconds), "steps": MODELS[model].defaults.num_inference_steps}
    except ValueError:
        claim = {"seconds": 0}
    if not claim["seconds"] > 0:
        parser.error(f"--claim: got {seconds!r}; expected seconds, more than 0")
    gpus = PUBLISHED["tflops"].items()
    return [{**claim, "gpu": gpu, "precision": p, "whose": "--claim"} for gpu, peaks in gpus for p in peaks]


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        "| TFLOP | text | a step | steps | VAE decoder | VAE encoder | a picture |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, tflop in found.items():
        spec = MODELS[name]
        steps, text = spec.defaults.num_inference_steps, sum(tflop[e.name] for e in spec.text.encoders)
        numbers = f"{text:.2f} | {tflop['transformer']:.2f} | {steps} | {tflop['vae_decoder']:.2f}"
        lines.append(f"| {name} | {numbers} | {tflop['vae_encoder']:.2f} | {whole(spec, tflop, steps):.1f} |")
    return "\n".join(lines)


def claims_table(claims: list[dict[str, Any]]) -> str:
    lines = ["| claim | s | GPU | of its peak: the loop alone | all | |", "|---|---|---|---|---|---|"]
    for c in claims:
        verdict = "can't be" if c["loop"] > 1 else ""
        gpu = f"{c['gpu']}, {c['precision'].upper()}"
        lines.append(
            f"| {c['model']}: {c['whose']} | {c['seconds']} | {gpu} | {c['loop']:.0%} | {c['all']:.0%} | {verdict} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--size", type=sides, default=(1024, 1024), metavar="HxW")
    parser.add_argument("--references", type=int, default=0, help="of FLUX.2, as large as the picture; %(default)s")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--claim", nargs=2, action="append", default=[], metavar=("MODEL", "SECONDS"))
    args = parser.parse_args()
    asked = [asked_of_all(parser, model, seconds) for model, seconds in args.claim]
    found = {name: counted(MODELS[name], args.size, args.references) for name in args.models}
    print(table(found))
    told = args.size == (1024, 1024) and not args.references
    known = [*(PUBLISHED["claims"] if told else []), *(claim for of_all in asked for claim in of_all)]
    claims = [judged(c, found[c["model"]]) for c in known if c["model"] in found]
    print("\n" + claims_table(claims) if claims else "\npublished claims are of 1024x1024 without references")
    result = {"benchmark": "flops", "size": args.size, "references": args.references, "tflop": found, "claims": claims}
    report(result, args.json)


if __name__ == "__main__":
    main()
