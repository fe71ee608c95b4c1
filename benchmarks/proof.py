"""A model on one GPU, proven: the floor, the peers, the engine inside and the served model, in one run.

    python -m testing.random_weights /tmp/flux --model flux.1-dev                      # or real weights
    fluxserve export /tmp/flux --out /tmp/flux.fp8 --engine fused --precision fp8 --prompts 2 --steps 4
    python -m benchmarks.proof /tmp/flux /tmp/flux.fp8 --out benchmarks/results/flux1-dev-h100-DATE

Each part is a command of its own and runs in a process of its own, so that the GPU's memory is free for it:
benchmarks.floor, .peers, .engines, .served; and with a model that takes references floor, peers and served once more
with one of --reference's size ("floor-edit" and so on). Writes OUT.json with all of their results and OUT.md with the
table that compares them. --parts leaves some out; those that OUT.json has from before stay in it, and the table says so
where they are of another commit: such a part has no ratio to this one's floor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders import checkpoint

_EDIT = "-edit"
_NEVER_SEEN = ("896x1152", "832x1216", "960x1088")
"""Of different numbers of tokens: what was built for one serves another of as many."""
PARTS = ("floor", "peers", "engines", "served", *(f"{part}{_EDIT}" for part in ("floor", "peers", "served")))
Results = dict[str, dict[str, Any]]


def commands(args: argparse.Namespace, spec: FluxSpec) -> dict[str, list[str]]:
    """Part → its arguments; all that there are for the model."""
    asked = ["--size", args.size, "--steps", str(args.steps or spec.defaults.num_inference_steps)]
    made = {
        "floor": ["--model", spec.name, *asked],
        "peers": [args.checkpoint, *asked],
        "engines": ["--artifacts-only", "--artifact", args.artifact, "--n", "3"],
        "served": ["--artifact", args.artifact, *asked, "--unseen", *_NEVER_SEEN],
    }
    edits = [part for part in PARTS if part.endswith(_EDIT)] if spec.takes_references else []
    return made | {part: [*made[part.removesuffix(_EDIT)], "--reference", args.reference] for part in edits}


def run(part: str, arguments: list[str]) -> dict[str, Any]:
    """One command; what it wrote. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        print(f"--- {part}", flush=True)
        module = f"benchmarks.{part.removesuffix(_EDIT)}"
        subprocess.run([sys.executable, "-m", module, *arguments, "--json", str(file)], check=True)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def markdown(found: Results) -> str:
    """The table; a part that is not there has no row."""
    any_part = next(iter(found.values()))
    names = ("gpu", "driver", "torch", "cudnn", "triton", "nvidia-cudnn-frontend", "diffusers", "commit")
    lines = [", ".join(f"{name} {any_part[name]}" for name in names if name in any_part), ""]
    lines += ["| | end to end, ms | denoise, ms | a step, ms | times as long as the floor |", "|---|---|---|---|---|"]
    lines += [*_rows(found), *_rows(found, _EDIT)]
    for suffix, of in (("", ""), (_EDIT, "with a reference: ")):
        if f"served{suffix}" in found:
            lines += ["", *(f"- {of}{line}" for line in _details(found[f"served{suffix}"]))]
    for mode, peer in found.get("peers", {}).get("modes", {}).items():
        if "file_ms" in peer:
            lines.append(f"- PNG by Pillow, which the row of {mode} leaves out, ms: {peer['file_ms']['median']}")
    for engine in found.get("engines", {}).get("engines", []):
        lines.append(f"- memory of {engine['engine']}, GiB: {json.dumps(engine['gib'])}")
    return "\n".join(lines) + "\n"


def _rows(found: Results, suffix: str = "") -> Iterator[str]:
    """Of the parts without a reference, or of those with one."""
    floor, peers, served = (found.get(f"{part}{suffix}", {}) for part in ("floor", "peers", "served"))
    own, of = next(iter(found.values())).get("commit"), ", with a reference" if suffix else ""

    def of_floor(part: dict[str, Any], total: float) -> float | None:
        same = floor and floor.get("commit") == part.get("commit", own)
        return total / floor["total_ms"] if same else None

    def named(name: str, part: dict[str, Any]) -> str:
        commit = part.get("commit", own)
        return f"{name}{of}" + (f"; another run, commit {commit}" if commit != own else "")

    if floor:
        name = named("floor: products and attentions of the loop alone", floor)
        yield row(name, None, floor["total_ms"], floor["step_ms"], 1)
    for mode, peer in peers.get("modes", {}).items():
        kind = "without its PNG" if "picture_ms" in peer else "with Pillow's PNG"  # timed together until 8e0d13b
        total, step = (peer.get("picture_ms") or peer["total_ms"])["median"], peer["step_ms"]
        name = named(f"diffusers BF16, {mode}, {kind}", peers)
        yield row(name, total, step * peers["steps"], step, of_floor(peers, total))
    if served:
        total, denoise = served["client_ms"]["median"], served["stages_ms"]["denoise"]
        steps = floor.get("steps") or served.get("num_inference_steps")
        step = denoise / steps if steps else None
        yield row(named("fluxserve, gRPC to PNG", served), total, denoise, step, of_floor(served, total))


def row(name: str, total: float | None, denoise: float, step: float | None, ratio: float | None) -> str:
    values = ((total, 0), (denoise, 0), (step, 2), (ratio, 3))
    cells = [f"{value:.{digits}f}" if value else "" for value, digits in values]
    return f"| {name} | {' | '.join(cells)} |"


def _details(served: dict[str, Any]) -> list[str]:
    """What a request consists of, and how it varies."""
    client = served["client_ms"]
    spread = ", ".join(f"{name} {client[name]}" for name in ("median", "p90", "p99", "n"))
    stages = ", ".join(f"{name} {value}" for name, value in served["stages_ms"].items())
    lines = [
        f"a picture's file: {served['image_bytes']:,} bytes",
        f"client, ms: {spread}; ready after {served['ready_s']} s, first request {served['first_ms']} ms",
        f"stages, ms: {stages}",
        f"pictures a second, so many at once: {json.dumps(served['images_per_s'])}; GPU memory in use, all of it:"
        f" {served['gpu_memory_mib']} MiB",
        f"client − device − encoding, ms: {served['overhead_ms']['median']}; everything but the loop:"
        f" {served['around_the_loop_ms']['median']}",
    ]
    if "unseen_sizes_ms" in served:  # since a932001, and the next since 9ff05b6: parts from before are shown without
        unseen = ", ".join("{} × {} {more}".format(*new["size"], **new) for new in served["unseen_sizes_ms"])
        lines.append(f"a size never seen, ms more than its next times: {unseen}")
    if "same_bytes" in served:
        lines.append(f"the same bytes from the same seed: {json.dumps(served['same_bytes'])}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("artifact")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--reference", default="1024x1024", metavar="HxW", help="of an edit; default: %(default)s")
    parser.add_argument("--size", default="1024x1024", metavar="HxW")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    args = parser.parse_args()
    target = args.out.with_suffix(".json")
    found: Results = json.loads(target.read_text()) if target.is_file() else {}
    for part, arguments in commands(args, FluxSpec.of(checkpoint.read(Path(args.checkpoint)).spec)).items():
        if part in args.parts:
            found[part] = run(part, arguments)
            target.write_text(json.dumps(found, indent=1) + "\n")
    table = markdown(found)
    args.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
