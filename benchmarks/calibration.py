"""Which way of choosing FP8 scales is best, component by component.

    python -m benchmarks.calibration [--checkpoint] [--prompts 24] [--steps 20] [--markdown OUT] [--json OUT]

The float32 model draws the calibration file's prompts (ranges are measured) and then held-out ones with other seeds
(inputs are captured at five timesteps each). Every method quantises every component in turn; its error is the relative
L2 distance of the component's output from float32's on the same input. Then whole images, from the same noise.

Candidates differ by little, so each is set against luck: `max` again, with every scale multiplied by a random factor
from 1 to 2. That wastes at most one octave of E4M3's eighteen and lays the grid elsewhere; what it changes is chance.
A method is called clearly better where its error is below the least of those draws and, input by input, its gain over
`max` is larger than that gain's standard deviation. The last line on stdout is JSON.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from fluxserve_export import calibrate as ranges
from fluxserve_export import fp8
from torch import Tensor, nn

from benchmarks.command import report
from benchmarks.quality import FIRST_SEED, PROMPT_SEED
from benchmarks.scale_methods import BOUND, CANDIDATES, LUCK, MAX, TARGETS, Method, Seen, Target, quantised, watched
from benchmarks.surroundings import surroundings
from fluxserve.engine import Components
from fluxserve.engines.torch_eager import TorchEngine, load_module
from fluxserve.families import registry
from fluxserve.families.flux.signatures import BY_COMPONENT
from fluxserve.folders import checkpoint as folders
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers
from training.evaluate import ask_for

TIMESTEPS = 5
METHODS = (*CANDIDATES, BOUND, *LUCK)

# --- the model, what it is called with, and how far off it is --------------------------------------------------------

Call = dict[str, Tensor]


class Model:
    """The reference engine's parts, where hooks can reach them."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32, rows: int = 1) -> None:
        folder = folders.read(checkpoint)
        self.spec, self.tokenizers = folder.spec, Tokenizers(folder)
        self.modules = {n: load_module(folder, n, "cpu", dtype) for n in ("clip", "t5", "transformer", "vae_decoder")}
        self.modules["vae_encoder"] = self.modules["vae_decoder"]
        known = registry.architectures(self.spec)
        self.wrappers = {name: known[name].wrapper(module) for name, module in self.modules.items()}
        engines = {name: TorchEngine(BY_COMPONENT[name](self.spec), w) for name, w in self.wrappers.items()}
        self.pipeline = Pipeline(self.spec, Components(engines), max_rows=rows)

    def draw(self, prompts: Sequence[str], steps: int, first_seed: int = FIRST_SEED) -> Tensor:
        """uint8 [N, H, W, 3], prompt k from first_seed + k."""
        fields = [{"prompt": p.encode(), "seed": first_seed + k} for k, p in enumerate(prompts)]
        jobs = [registry.plan({**f, "num_inference_steps": steps}, self.spec, self.tokenizers) for f in fields]
        drawings = self.pipeline.draw(jobs)
        return torch.cat([torch.from_numpy(drawing.images) for drawing in drawings if drawing is not None])

    @torch.inference_mode()
    def run(self, component: str, call: Call) -> tuple[Tensor, ...]:
        result = self.wrappers[component](**call)
        return result if isinstance(result, tuple) else (result,)

    @torch.inference_mode()
    def round_trip(self, images: Tensor) -> Tensor:
        """Images through the VAE and back, by the latents' mean."""
        (mean, _), module = self.run("vae_encoder", {"pixels": as_pixels(images)}), self.wrappers["vae_decoder"]
        return ((module(mean) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def as_pixels(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def calibrated(model: Model, prompts: Sequence[str], steps: int) -> dict[str, Seen]:
    """Draw the calibration prompts as an export does, and watch more than it does. The encoder sees what was drawn."""
    seen = {name: Seen() for name in model.modules}
    pictures: list[Tensor] = []
    with ExitStack() as stack:
        names = [name for name in fp8.KEPT if name in model.modules]
        exported = {name: stack.enter_context(ranges.watched(name, model.modules[name])) for name in names}
        for name, module in model.modules.items():
            stack.enter_context(watched(name, module, seen[name]))
        hook = model.wrappers["vae_decoder"].register_forward_hook(lambda *call: pictures.append(call[-1].clone()))
        stack.callback(hook.remove)
        for index, prompt in enumerate(prompts):
            model.draw([prompt], steps, first_seed=index)
        for picture in pictures:
            model.run("vae_encoder", {"pixels": picture.clamp(-1, 1)})
    for name, measured in exported.items():
        seen[name].attention = measured.attention
    return seen


def captured(model: Model, prompts: Sequence[str], steps: int) -> tuple[dict[str, list[Call]], Tensor]:
    """What the components are called with as the prompts are drawn, the transformer at a few timesteps; the images."""
    calls: dict[str, list[Call]] = {name: [] for name in model.modules}
    with ExitStack() as stack:
        for name, wrapper in model.wrappers.items():

            def keep(_module: nn.Module, _args: Any, inputs: Call, name: str = name) -> None:
                calls[name].append({key: value.clone() for key, value in inputs.items()})

            stack.callback(wrapper.register_forward_pre_hook(keep, with_kwargs=True).remove)
        images = model.draw(prompts, steps)
    few = torch.linspace(0, steps - 1, min(TIMESTEPS, steps)).round().int().tolist()
    calls["transformer"] = [calls["transformer"][step] for step in few]
    calls["vae_encoder"] = [{"pixels": as_pixels(images)}]
    return calls, images


def distance(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Tensor:
    """‖got − expected‖ / ‖expected‖ of each row, all outputs of the component together."""
    wrong, size = (
        sum(x.flatten(1).double().square().sum(1) for x in xs)
        for xs in ([g - e for g, e in zip(got, expected, strict=True)], expected)
    )
    return (wrong / size).sqrt()


def psnr(images: Tensor, expected: Tensor) -> Tensor:
    """Of each picture of two uint8 batches, in dB; equal ones count as off by one step in one value."""
    squares = (images.double() - expected.double()).square().flatten(1)
    return 10 * (255**2 / squares.mean(1).clamp(min=1 / squares.shape[1])).log10()


# --- the two measurements --------------------------------------------------------------------------------------------

Errors = dict[str, dict[str, Tensor]]
"""Target → method → the error of each input. A method that does nothing to the target is left out."""


def component_errors(model: Model, seen: Mapping[str, Seen], calls: Mapping[str, list[Call]]) -> Errors:
    errors: Errors = {}
    for name, target in TARGETS.items():
        component = target.component
        expected = [model.run(component, call) for call in calls[component]]
        errors[name] = {}
        for method in (m for m in METHODS if m.concerns(target)):
            with quantised(target, model.modules[component], seen[component], method):
                got = [model.run(component, call) for call in calls[component]]
            errors[name][method.name] = torch.cat([distance(g, e) for g, e in zip(got, expected, strict=True)])
    return errors


Images = dict[str, dict[str, Tensor]]
"""What is quantised → method → PSNR of each picture."""

ROUND_TRIP = "vae encoder (image → latents → image)"
Parts = tuple[tuple[Target, Method], ...]


def everything(method: Method) -> Parts:
    """What an export quantises, all with one method."""
    return tuple((TARGETS[name], method) for name in ("transformer both", "t5", "clip"))


def configurations() -> Iterator[tuple[str, str, Parts]]:
    """(what is quantised, method, parts) of each row of the table of images."""
    for name in ("transformer linears", "transformer attention", "transformer both", "t5", "clip"):
        yield name, MAX.name, ((TARGETS[name], MAX),)
    for method in (*CANDIDATES, BOUND, *LUCK[:4]):
        yield "transformer, t5, clip", method.name, everything(method)
    channels = next(m for m in CANDIDATES if m.per_channel)
    decoder, inner = TARGETS["vae decoder"], Target("vae_decoder", inner=True)
    for method in (MAX, channels, BOUND):
        yield "vae decoder", method.name, ((decoder, method),)
    yield "vae decoder, all but first and last", MAX.name, ((inner, MAX),)
    yield "vae decoder, all but first and last", channels.name, ((inner, channels),)
    yield "transformer, t5, clip", "max, and the vae decoder's convolutions", (*everything(MAX), (decoder, MAX))


def image_psnr(model: Model, seen: Mapping[str, Seen], prompts: Sequence[str], steps: int, expected: Tensor) -> Images:
    """Each configuration's PSNR against float32's pictures from the same noise."""
    images: Images = {}
    for what, method, parts in configurations():
        with ExitStack() as stack:
            for target, how in parts:
                component = target.component
                stack.enter_context(quantised(target, model.modules[component], seen[component], how))
            images.setdefault(what, {})[method] = psnr(model.draw(prompts, steps), expected)
    there_and_back, module = model.round_trip(expected), model.modules["vae_encoder"]
    images[ROUND_TRIP] = {}
    for method in (MAX, BOUND):
        with quantised(TARGETS["vae encoder"], module, seen["vae_encoder"], method):
            images[ROUND_TRIP][method.name] = psnr(model.round_trip(expected), there_and_back)
    return images


def image_rows(images: Images) -> list[dict[str, Any]]:
    """Rows of the table of images; where max is among the methods, the others' gain over it, picture by picture."""
    rows = []
    for what, methods in images.items():
        for method, values in methods.items():
            row = {"quantised": what, "method": method, **spread(values)}
            if method != MAX.name and MAX.name in methods:
                row["gain"] = spread(values - methods[MAX.name])
            rows.append(row)
    return rows


def spread(values: Tensor) -> dict[str, float]:
    found = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    return {key: round(float(value), 6) for key, value in found.items()}


def summary(errors: Mapping[str, Tensor]) -> dict[str, Any]:
    """One target's errors in figures: each method's, its change against max input by input, and the verdict."""
    least, most = (pick(float(errors[m.name].mean()) for m in LUCK) for pick in (min, max))
    methods = {}
    for method in (m for m in (*CANDIDATES, BOUND) if m.name in errors):
        own = errors[method.name]
        change = spread(own / errors[MAX.name] - 1)
        clearly = -change["mean"] > change["std"] and float(own.mean()) < least
        worse = change["mean"] > change["std"] and float(own.mean()) > most
        verdict = "better" if clearly else "worse" if worse else "like max"
        methods[method.name] = {**spread(own), "change": change, "verdict": verdict}
    best = min((m.name for m in CANDIDATES if m.name in methods), key=lambda name: methods[name]["mean"])
    return {"inputs": len(errors[MAX.name]), "methods": methods, "luck": [least, most], "best": best}


# --- what is written -------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def error_table(components: Mapping[str, Any]) -> str:
    """Methods × components: mean ± standard deviation of the error; below it, the change against max."""

    def cell(of: Mapping[str, Any], method: str) -> str:
        if method not in of["methods"]:
            return "as max"
        found = of["methods"][method]
        text = f"{100 * found['mean']:.2f} ± {100 * found['std']:.2f}"
        if method != MAX.name:
            text += f" ({100 * found['change']['mean']:+.0f} ± {100 * found['change']['std']:.0f})"
        return f"**{text}**" if found["verdict"] == "better" else text

    rows = [[m.name, *(cell(of, m.name) for of in components.values())] for m in (*CANDIDATES, BOUND)]
    luck = [f"{100 * of['luck'][0]:.2f} – {100 * of['luck'][1]:.2f}" for of in components.values()]
    rows.insert(1, [f"max × 1–2 at random, {len(LUCK)} draws: least – most", *luck])
    return table(["method", *components], rows)


def conclusions(components: Mapping[str, Any]) -> str:
    lines = []
    for name, of in components.items():
        methods = of["methods"]
        best, plain = (f"{100 * methods[m]['mean']:.2f}%" for m in (of["best"], MAX.name))
        judged = {m.name: methods[m.name]["verdict"] for m in CANDIDATES if m.name in methods}
        better, worse = (", ".join(m for m, v in judged.items() if v == verdict) for verdict in ("better", "worse"))
        lines.append(
            f"- **{name}**: least with {of['best']} ({best}; max {plain}). "
            f"Clearly better than max: {better or 'none'}; clearly worse: {worse or 'none'}."
        )
    better = [name for name, of in components.items() if any(is_better(of, m) for m in CANDIDATES)]
    lines.append(f"\nComponents for which some method is clearly better than max: {', '.join(better) or 'none'}.")
    return "\n".join(lines)


def is_better(of: Mapping[str, Any], method: Method) -> bool:
    return method.name in of["methods"] and of["methods"][method.name]["verdict"] == "better"


def image_table(rows: Sequence[Mapping[str, Any]]) -> str:
    def line(row: Mapping[str, Any]) -> list[str]:
        gain = f"{row['gain']['mean']:+.1f} ± {row['gain']['std']:.1f}" if "gain" in row else ""
        return [row["quantised"], row["method"], f"{row['mean']:.1f} ± {row['std']:.1f}", f"{row['min']:.1f}", gain]

    return table(["in FP8", "method", "PSNR", "worst", "against max"], [line(row) for row in rows])


def markdown(result: Mapping[str, Any]) -> str:
    r, components = result, result["components"]
    inputs = ", ".join(f"{name} {of['inputs']}" for name, of in components.items())
    return f"""# Ways of choosing FP8 scales

`{r["checkpoint"]}`, {r["steps"]} steps, {r["side"]}×{r["side"]}; ranges from {r["calibration_prompts"]} prompts,
errors on {r["prompts"]} others with other seeds.
E4M3 in plain PyTorch, all else in float32: the rounding is the format's alone. torch {r["torch"]}, {r["cpu"]},
commit {r["commit"]}; {r["seconds"]:.0f} s. Repeat: `python -m benchmarks.calibration`.

Calibration and judged prompts come from one grammar, and the pictures have flat backgrounds: ranges hold on held-out
prompts as they need not on another model's, and rounding errors of a flat colour are the same in every pixel.

## A component's error

Relative L2 distance of its output from float32's on the same input, in %: mean ± standard deviation over inputs; in
brackets the change against max in %, input by input. Bold: clearly better than max, which is below the least of the
luck *and* a mean gain larger than its deviation. Luck is max with every scale (the weights' too) multiplied by a random
factor from 1 to 2: it has nothing to gain, so what it changes is chance. The last row is no candidate but a bound: a
scale of its own for every token or pixel. Weights are quantised by their maximum except where "per channel" is said.
Inputs: {inputs}.

{error_table(components)}

{conclusions(components)}

## The image

PSNR against float32's picture from the same noise, in dB, {r["prompts"]} prompts: mean ± standard deviation, the worst,
and the gain over max picture by picture.

{image_table(r["images"])}
"""


def measure(checkpoint: Path, calibration: Path, count: int, steps: int) -> dict[str, Any]:
    """The whole benchmark, but for what it says about the machine."""
    begun = time.perf_counter()
    known = ranges.read_prompts(calibration).lines
    prompts = [p for p in ask_for("held_out", 2 * count, PROMPT_SEED)[0] if p not in known][:count]
    model = Model(checkpoint, rows=count)
    seen = calibrated(model, known, steps)
    calls, expected = captured(model, prompts, steps)
    components = {name: summary(found) for name, found in component_errors(model, seen, calls).items()}
    images = image_psnr(model, seen, prompts, steps, expected)
    half = psnr(Model(checkpoint, torch.bfloat16, count).draw(prompts, steps), expected)
    rows = image_rows({"nothing; the model in bfloat16": {"–": half}, **images})
    return {
        "checkpoint": checkpoint.name,
        "calibration_prompts": len(known),
        "prompts": len(prompts),
        "steps": steps,
        "side": model.spec.defaults.side,
        "components": components,
        "images": rows,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--calibration", type=Path, help="a prompt a line; default: the checkpoint's calibration.txt")
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts that are judged on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    calibration = args.calibration or args.checkpoint / "calibration.txt"
    found = measure(args.checkpoint, calibration, args.prompts, args.steps)
    result = {"benchmark": "calibration", **surroundings(), **found}
    print(markdown(result))
    if args.markdown:
        args.markdown.write_text(markdown(result), encoding="utf-8")
    report(result, args.json)


if __name__ == "__main__":
    main()
