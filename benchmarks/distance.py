"""How far the pictures of FP8, BF16 and float32 are from each other, drawn from the same prompts and the same noise.

    python -m benchmarks.distance bfloat16 artifacts/tiny-onnxruntime-fp8 [--n 200] [--write] [--json OUT] [--sheet OUT]
    python -m benchmarks.distance --checkpoint /models/FLUX.1-dev bfloat16 dev-fp8 --prompts FILE --write

A model is the folder of an artifact, or [ENGINE:]DTYPE of the checkpoint, such as float32 or fused:bfloat16. One is
in memory at a time. Every two are compared picture by picture, and the reference's pictures of the same prompts from
other seeds are the yardstick: what is as far off as the closest tenth of those has strayed. The tiny model's prompts
are those of benchmarks.quality, --n of each set, and its pictures are judged too. Elsewhere they are the lines of a
file, again with other seeds where it has fewer than --n; an export calibrates with the first 32 of its own
(export/src/fluxserve_export/prompts.txt). --write adds what was found to the manifest of each artifact but the
reference. The last line on stdout is JSON; the status is 1 if FP8 lost more than a point of accuracy.
"""

import argparse
import datetime
import gc
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from fluxserve_export import console
from fluxserve_export.calibrate import read_prompts
from fluxserve_export.manifest import add_quality
from torch import Tensor

from benchmarks.closeness import Measure, compare, judges_features, measures, read_features, strayed, summary
from benchmarks.distance_report import POINTS_ALLOWED, Found, contact_sheet, entry_for, table, verdict
from benchmarks.quality import BARS, FIRST_SEED, PROMPT_SEED, opened, score
from benchmarks.surroundings import surroundings
from fluxserve import settings, source
from fluxserve.errors import FluxserveError, SettingsError
from fluxserve.families import registry
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.artifact import MANIFEST
from training.evaluate import ask_for
from training.grammar import held_out_pairs

OTHER_SEEDS = 1_000_000  # the yardstick's picture of a prompt is drawn from its seed + OTHER_SEEDS
PROMPTS = Path(__file__).parents[1] / "export/src/fluxserve_export/prompts.txt"
JUDGED = "tiny"
"""The model whose pictures the judge knows."""

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Model:
    """One that draws: settings by name, where its engine runs, and the artifact's folder if it is one."""

    name: str
    precision: str
    given: Mapping[str, str]
    device: str
    spec: FluxSpec
    artifact: Path | None = None


@dataclass(frozen=True)
class Asked:
    """A set of prompts, each with its seed, and the (object, colour) that it names where the judge knows it."""

    name: str
    prompts: list[str]
    seeds: list[int]
    pairs: list[tuple[int, int]]


@dataclass(frozen=True)
class How:
    """What all pictures of a run have in common."""

    steps: int
    guidance: float
    size: tuple[int, int]
    batch: int
    device: str


@dataclass(frozen=True)
class Drawn:
    """A model's pictures, uint8 [N, H, W, 3]: the prompts of all sets, one after the other."""

    model: Model
    pictures: Tensor
    seconds: float


# --- what is drawn ---------------------------------------------------------------------------------------------------


def find(what: str, checkpoint: Path, device: str) -> Model:
    """The model that is meant, after a look at its folder. Raises FluxserveError."""
    engine, _, dtype = what.rpartition(":")
    is_artifact = dtype not in _PRECISIONS
    given = {"checkpoint": str(checkpoint), "artifact": "", "engine": engine, "dtype": dtype}
    if is_artifact:
        given = {"checkpoint": "", "artifact": what, "engine": "", "dtype": "auto"}
    found = source.find(settings.load({name: {"string_value": value} for name, value in given.items()}))
    precision = str(found.artifact.manifest["precision"]) if found.artifact else _PRECISIONS[dtype]
    artifact = Path(what) if is_artifact else None
    return Model(f"{found.engine} {precision}", precision, given, found.device(device), found.spec, artifact)


def tiny_sets(count: int) -> list[Asked]:
    """Those of benchmarks.quality, from the same seeds: what is counted here is what is counted there."""
    if count > len(held_out_pairs()):
        raise SettingsError("n", count, f"at most {len(held_out_pairs())}, the pairs that are held out")
    seeds = list(range(FIRST_SEED, FIRST_SEED + count))
    asked = {which: ask_for(which, count, PROMPT_SEED) for which in BARS}
    return [Asked(which, prompts, seeds, pairs) for which, (prompts, pairs) in asked.items()]


def file_set(file: Path, count: int) -> list[Asked]:
    """The lines of a file, over again with other seeds where there are too few. Raises ExportError."""
    lines = read_prompts(file).lines
    prompts = [lines[k % len(lines)] for k in range(count)]
    return [Asked(file.name, prompts, list(range(FIRST_SEED, FIRST_SEED + count)), [])]


def draw(model: Model, prompts: Sequence[str], seeds: Sequence[int], how: How) -> Drawn:
    """Load a model, draw, and let go of it."""
    parts, begun = [], time.perf_counter()
    with console.line(model.name) as shown, opened(model.given, model.device, how.batch, how.size) as generate:
        for first in range(0, len(prompts), how.batch):
            chunk = slice(first, first + how.batch)
            parts.append(generate(prompts[chunk], seeds[chunk], how.steps, how.guidance))
            shown.progress(first + len(parts[-1]), len(prompts))
        seconds = time.perf_counter() - begun
        shown.end(f"{len(prompts)} pictures, {console.duration(seconds)}")
    return Drawn(model, torch.cat(parts), round(seconds, 1))


def draw_all(models: Sequence[Model], sets: Sequence[Asked], yardstick: slice, how: How) -> tuple[list[Drawn], Tensor]:
    """Every model's pictures, and the yardstick's, which the reference draws: uint8 [M, H, W, 3].

    The reference comes last: what can't run here says so before the long part.
    """
    prompts, seeds = _all_prompts(sets), _all_seeds(sets)
    more = prompts[yardstick], [seed + OTHER_SEEDS for seed in seeds[yardstick]]
    found = []
    for model in reversed(models[1:]):
        found.append(draw(model, prompts, seeds, how))
        _make_room()
    both = draw(models[0], prompts + more[0], seeds + more[1], how)
    _make_room()
    found.append(Drawn(models[0], both.pictures[: len(prompts)], both.seconds))
    return found[::-1], both.pictures[len(prompts) :]


def _make_room() -> None:
    gc.collect()  # modules refer to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _all_prompts(sets: Sequence[Asked]) -> list[str]:
    return [prompt for each in sets for prompt in each.prompts]


def _all_seeds(sets: Sequence[Asked]) -> list[int]:
    return [seed for each in sets for seed in each.seeds]


# --- how far apart ---------------------------------------------------------------------------------------------------


def points(own: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    """Hundredths of accuracy gained over the reference; rounded, because 0.99 − 1.0 is a little less than −0.01."""
    return {what: round(100 * (own[what] - reference[what]), 6) for what in ("object", "colour")}


def judged(drawn: Drawn, sets: Sequence[Asked]) -> Found:
    """Accuracy by set of prompts; empty where nobody knows what a picture shows."""
    parts = drawn.pictures.split([len(each.prompts) for each in sets])
    return {
        each.name: score(part, each.prompts, each.pairs) for each, part in zip(sets, parts, strict=True) if each.pairs
    }


def models_of(drawn: Sequence[Drawn], sets: Sequence[Asked]) -> list[Found]:
    """What is said of each model: its accuracy, its points, and under FP8 whether it has passed."""
    found: list[Found] = []
    for each in drawn:
        name, device = each.model.name, _device_name(each.model.device)
        entry: Found = {"model": name, "device": device, "reference": not found, "seconds": each.seconds}
        entry["accuracy"] = judged(each, sets)
        first = (found or [entry])[0]["accuracy"]
        entry["points"] = {which: points(entry["accuracy"][which], first[which]) for which in first}
        if each.model.precision == "fp8" and found and first:
            gained = [value for by_what in entry["points"].values() for value in by_what.values()]
            entry["passed"] = min(gained) >= -POINTS_ALLOWED
        found.append(entry)
    return found


def _device_name(device: str) -> str:
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def measure_pairs(
    drawn: Sequence[Drawn], sets: Sequence[Asked], ways: Sequence[Measure], device: str, yardstick: Found
) -> tuple[list[Found], list[dict[str, list[float]]]]:
    """Every two models: a summary, and the distances of each picture. The reference's pairs come first."""
    found, raw = [], []
    prompts, seeds = _all_prompts(sets), _all_seeds(sets)
    for first, second in combinations(drawn, 2):
        values = compare(first.pictures, second.pictures, ways, device)
        equal = sum(torch.equal(a, b) for a, b in zip(first.pictures, second.pictures, strict=True))
        distances = {way.key: summary(values[way.key], way, prompts, seeds) for way in ways}
        for way in ways:
            distances[way.key]["strayed"] = strayed(values[way.key], way, yardstick[way.key])
        found.append({"models": [first.model.name, second.model.name], "equal": equal, "distances": distances})
        raw.append(values)
    return found, raw


# --- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="an artifact's folder, or [ENGINE:]DTYPE")
    parser.add_argument(
        "--checkpoint", type=Path, default=settings.default_checkpoint(), help="default: the tiny model"
    )
    parser.add_argument("--reference", default="float32", metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--n", type=int, default=200, help="prompts of each set; default: %(default)s")
    parser.add_argument("--prompts", type=Path, help=f"one a line; default: tiny's own sets, else {PROMPTS.name}")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the model's own")
    parser.add_argument("--batch", type=int, default=1, help="images at once; default: 1, as the server draws")
    parser.add_argument("--yardstick", type=int, default=50, help="pictures from other seeds; default: %(default)s")
    parser.add_argument("--features", type=Path, help="AlexNet or VGG16 for LPIPS, safetensors: export/README.md")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="into the artifacts' manifests")
    parser.add_argument("--sheet", type=Path, help="a PNG of the median and the worst pictures")
    parser.add_argument("--json", type=Path)
    return parser


def chosen_models(args: argparse.Namespace) -> list[Model]:
    """The reference, then the others. Raises FluxserveError."""
    models = [find(what, args.checkpoint, args.device) for what in (args.reference, *args.models)]
    names = ", ".join(model.name for model in models)
    if len({model.name for model in models}) < len(models):
        raise SettingsError("models", names, "each engine and precision once")
    kinds = sorted({model.spec.name for model in models})
    if len(kinds) > 1:
        raise SettingsError("models", ", ".join(kinds), "one model in several precisions")
    if args.write and not any(model.artifact for model in models[1:]):
        raise SettingsError("write", names, "an artifact beside the reference, whose manifest is written to")
    return models


def chosen_sets(args: argparse.Namespace, spec: FluxSpec) -> list[Asked]:
    """Raises FluxserveError."""
    if spec.name == JUDGED and not args.prompts:
        return tiny_sets(args.n)
    return file_set(args.prompts or PROMPTS, args.n)


def chosen_measures(args: argparse.Namespace, spec: FluxSpec) -> list[Measure]:
    """Raises SettingsError."""
    if args.features:
        return measures(read_features(args.features, args.device))
    return measures(judges_features(args.device) if spec.name == JUDGED else None)


def chosen_how(args: argparse.Namespace, models: Sequence[Model]) -> How:
    """Checked for every model before one of them draws. Raises InvalidRequest."""
    usual = models[-1].spec.defaults
    steps = usual.num_inference_steps if args.steps is None else args.steps
    guidance = usual.guidance_scale if args.guidance is None else args.guidance
    height, width = args.size or (usual.side, usual.side)
    fields = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": guidance}
    for model in models:
        registry.of(model.spec).draft({"prompt": b"anything", **fields}, model.spec)
    return How(steps, guidance, (height, width), args.batch, args.device)


def run(args: argparse.Namespace) -> int:
    """Returns the exit status. Raises FluxserveError."""
    models = chosen_models(args)
    spec, how = models[-1].spec, chosen_how(args, models)
    sets, ways = chosen_sets(args, spec), chosen_measures(args, spec)
    prompts, seeds = _all_prompts(sets), _all_seeds(sets)
    sample = slice(None, None, -(-len(prompts) // args.yardstick))
    drawn, others = draw_all(models, sets, sample, how)
    apart = compare(drawn[0].pictures[sample], others, ways, how.device)
    yardstick = {way.key: summary(apart[way.key], way, prompts[sample], seeds[sample]) for way in ways}
    pairs, raw = measure_pairs(drawn, sets, ways, how.device, yardstick)
    result: Found = {
        "benchmark": "distance",
        **surroundings(),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": spec.name,
        **asdict(how),
        "size": list(how.size),
        "pictures": len(prompts),
        "prompts": len(set(prompts)),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "measures": {way.key: way.title for way in ways},
        "models": models_of(drawn, sets),
        "pairs": pairs,
        "yardstick": {"pictures": len(others), **yardstick},
    }
    print(table(result))
    print(verdict(result["models"]))
    if args.sheet:
        far = [values[ways[-1].key] for values in raw[: len(models) - 1]]
        names = [model.name for model in models]
        contact_sheet(names, [each.pictures for each in drawn], prompts, far, ways[-1], args.sheet)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.write:
        write(models, result)
    print(json.dumps(result))
    return int(not all(entry.get("passed", True) for entry in result["models"]))


def write(models: Sequence[Model], result: Found) -> None:
    """Into the manifest of each artifact but the reference."""
    for index, model in enumerate(models):
        if index and model.artifact:
            add_quality(model.artifact, entry_for(index, result))
            print(f"written: {model.artifact / MANIFEST}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(args.n, args.batch, args.yardstick) < 1:
        parser.error("--n, --batch, --yardstick: expected 1 or more")
    for file in (args.json, args.sheet):
        if file and not file.absolute().parent.is_dir():
            parser.error(f"{file.absolute().parent}: no such folder")
    try:
        # A reference in float32 is float32: PyTorch would let a GPU's convolutions round to TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return run(args)
    except FluxserveError as error:
        parser.exit(2, f"distance: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
