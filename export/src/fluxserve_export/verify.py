"""An artifact's engines against the reference that it carries, wherever they run."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fluxserve.engine import Components, Saturating
from fluxserve.engines.open import CPU_ONLY, open_artifact
from fluxserve.errors import ArtifactError
from fluxserve.folders.artifact import REFERENCE, Artifact
from fluxserve.kernels.gemm.layers import SAMPLE
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers
from fluxserve_export import reference
from fluxserve_export.metrics import psnr

PSNR_ENOUGH, PSNR_SLACK = 40.0, 3.0
"""dB. An image is good enough at PSNR_ENOUGH, or no more than PSNR_SLACK below plain arithmetic's: twenty steps carry
rounding along, and two ways of rounding equally well end at pictures that differ from each other."""


def verify(artifact: Artifact, device: str) -> dict[str, Any]:
    """Run every engine on the reference's inputs, and draw the reference's pictures from the same noise.

    Returns:
        what was measured, fit for the manifest's `verified`; `passed` says whether all of it is within its gate.

    Raises:
        ArtifactError, EngineError: the engines can't run here; the message says why.
    """
    device = "cpu" if artifact.engine in CPU_ONLY else device
    components = open_artifact(artifact, device)
    try:
        files = _files(artifact)
        rows = []
        for name, engine in components.by_name.items():
            cases = reference.load_cases(files[name])
            results = [reference.call(engine, case.inputs) for case in cases]
            rows += [{"component": name, **row} for row in reference.compare(cases, results)]
        images = _images(artifact, components, device, files)
        saturated = _saturated(components)
    finally:
        components.close()
    for row in rows:
        row["passed"] = row["relative_error"] <= row["allowed"]
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "components": rows,
        "images": images,
        **({} if saturated is None else {"saturated": saturated}),
        "passed": all(row["passed"] for row in [*rows, *images]),
    }


def _saturated(components: Components) -> dict[str, list[int]] | None:
    """Values that were too large for a static scale: block → of attention, of the hidden layer. None: nobody counts."""
    engine = components.network
    return {name: list(pair) for name, pair in engine.saturated().items()} if isinstance(engine, Saturating) else None


def _files(artifact: Artifact) -> dict[str, Path]:
    """The reference's files, by what they are of."""
    files = {file.stem: file for file in artifact.folder(REFERENCE)}
    missing = sorted({*artifact.spec.components, reference.IMAGES} - set(files))
    if missing:
        raise ArtifactError(f"{artifact.path / REFERENCE}: got no {', '.join(missing)}; nothing to compare with")
    return files


def _images(artifact: Artifact, components: Components, device: str, files: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked, expected, plain = reference.load_images(files[reference.IMAGES])
    pipeline = Pipeline(artifact.spec, components, device, reference.rows_of(asked))
    drawn = reference.draw(asked, pipeline, Tokenizers(artifact.checkpoint), expected[0])
    return [
        {
            "size": [each.height, each.width],
            "task": each.task,
            "psnr": psnr(image, wanted),
            "plain": plain_psnr,
            "allowed": min(PSNR_ENOUGH, plain_psnr - PSNR_SLACK),
            "passed": psnr(image, wanted) >= min(PSNR_ENOUGH, plain_psnr - PSNR_SLACK),
        }
        for each, image, wanted, plain_psnr in zip(asked, drawn, expected, plain, strict=True)
    ]


def table(found: Mapping[str, Any]) -> str:
    """What was measured, for people."""
    lines = [f"{'':<34}{'relative error':>15}{'plain':>10}{'allowed':>10}{'cosine':>10}"]
    for row in found["components"]:
        name = f"{row['component']}.{row['output']} {'x'.join(map(str, row['shape']))}"
        numbers = f"{row['relative_error']:>15.2e}{row['plain']:>10.1e}{row['allowed']:>10.1e}{row['cosine']:>10.6f}"
        lines.append(f"{name:<34}{numbers}{_mark(row)}")
    lines.append(f"{'':<34}{'PSNR dB':>15}{'plain':>10}{'allowed':>10}")
    for row in found["images"]:
        name = f"{row['task']} {row['size'][0]}x{row['size'][1]}"
        lines.append(f"{name:<34}{row['psnr']:>15.1f}{row['plain']:>10.1f}{row['allowed']:>10.1f}{'':>10}{_mark(row)}")
    if "saturated" in found:
        lines.append(f"FP8 values at their limit, in every {SAMPLE}th row: {_counted(found['saturated'])}")
    return "\n".join(lines)


def _counted(saturated: Mapping[str, Any]) -> str:
    worst = sorted(saturated, key=lambda name: -sum(saturated[name]))[:5]
    listed = ", ".join(f"{name}: {sum(saturated[name])}" for name in worst)
    return listed + (f" ({len(saturated)} blocks in all)" if len(saturated) > len(worst) else "") or "none"


def _mark(row: Mapping[str, Any]) -> str:
    return "" if row["passed"] else "   FAILED"
