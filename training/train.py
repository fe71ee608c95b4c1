"""Train the tiny model: ``python -m training.train --icons ICONS.npz --out DIR [--stage all]``.

An interrupted run goes on where it stopped when the same command is given again.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from testing.judge import ObjectNet, judge
from training.evaluate import ask_for, contact_sheet
from training.export import export
from training.flow import Batches, distil_loss, flow_loss, frozen_copy, make_flow, make_optimizer
from training.judge import export_judge, train_judge
from training.latents import build_latents, load_latents
from training.loop import Run, Stage, fit
from training.models import make_vae
from training.objects import OBJECTS
from training.sample import Painter
from training.scenes import Scenes
from training.vae import train_vae

STAGES = ("vae", "judge", "latents", "flow", "distil", "export")


@dataclass(frozen=True)
class Recipe:
    """Steps and batch sizes of each stage; these took 17.5 minutes on one H100."""

    vae_steps: int = 7000
    vae_batch: int = 64
    judge_steps: int = 1000
    judge_batch: int = 256
    variations: int = 24
    other_variations: int = 3
    flow_steps: int = 10500
    distil_steps: int = 1000
    batch: int = 1024
    learning_rate: float = 1e-3
    watch_every: int = 2500


TOY = Recipe(
    vae_steps=6, vae_batch=4, judge_steps=4, judge_batch=8, variations=1, other_variations=0, flow_steps=6,
    distil_steps=4, batch=8, watch_every=3,
)  # fmt: skip


class Trainer:
    """The stages of one run, each a method that returns whether it is finished."""

    def __init__(self, run: Run, recipe: Recipe, icons: Path, seconds: float):
        self.run, self.recipe = run, recipe
        self.scenes = Scenes.load(icons, run.device)
        self.deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.deadline - time.monotonic()

    def vae(self) -> bool:
        return train_vae(self.run, self.scenes, self.recipe.vae_steps, self.recipe.vae_batch, seconds=self.left())

    def judge(self) -> bool:
        return train_judge(self.run, self.scenes, self.recipe.judge_steps, self.recipe.judge_batch, self.left())

    def latents(self) -> bool:
        build_latents(self.run, self.scenes, self.recipe.variations, self.recipe.other_variations)
        return True

    def _batches(self, modules: nn.ModuleDict) -> Batches:
        empty = modules["text"].ids([""])
        return Batches(load_latents(self.run), self.recipe.batch, (empty[0][0], empty[1][0]))

    def painter(self, transformer: nn.Module, text: nn.Module) -> Painter:
        """A painter over these modules and the finished VAE."""
        facts = self.run.facts()
        vae = self.run.load("vae", make_vae())
        return Painter(transformer, text, vae, facts["shift_factor"], facts["scaling_factor"])

    def _watch(self, name: str, painter: Painter, **how: float) -> dict[str, float]:
        self.run.picture(name, contact_sheet(painter, **how), columns=12)
        net = self.run.load("judge", ObjectNet(len(OBJECTS))).cpu()
        found = {}
        for which in ("seen", "held_out"):
            prompts, pairs = ask_for(which, 200, seed=11)
            verdict = judge(net, painter.paint(prompts, list(range(5000, 5200)), 20, **how), pairs)
            found |= {f"{which}_object": verdict.object_accuracy, f"{which}_colour": verdict.colour_accuracy}
        return found

    def flow(self) -> bool:
        recipe, modules = self.recipe, make_flow().to(self.run.device)
        compiled = self.run.compiled(modules["transformer"])

        def watch(step: int, ema: nn.ModuleDict) -> dict[str, float]:
            painter = self.painter(ema["transformer"], ema["text"])
            return self._watch(f"flow-{step:06d}", painter, two_pass=3.0)

        stage = Stage(
            "flow",
            modules,
            [make_optimizer(modules, recipe.learning_rate)],
            recipe.flow_steps,
            flow_loss(modules, self._batches(modules), compiled),
            ema_decay=0.9995,
            watch=watch,
            watch_every=recipe.watch_every,
        )
        ema = fit(stage, self.run, self.left(), seed=3)
        if ema is not None:
            self.run.save("teacher", ema["transformer"])
            self.run.save("text", ema["text"])
        return ema is not None

    def distil(self) -> bool:
        recipe, teacher = self.recipe, make_flow()
        self.run.load("teacher", teacher["transformer"])
        self.run.load("text", teacher["text"])
        student = frozen_copy(teacher["transformer"]).train().requires_grad_(True)

        def watch(step: int, ema: nn.ModuleDict) -> dict[str, float]:
            return self._watch(f"distil-{step:06d}", self.painter(ema["transformer"], teacher["text"]), guidance=3.0)

        modules = nn.ModuleDict({"transformer": student})
        compiled = self.run.compiled(student), self.run.compiled(teacher["transformer"])
        stage = Stage(
            "distil",
            modules,
            [make_optimizer(modules, recipe.learning_rate / 2)],
            recipe.distil_steps,
            distil_loss(student, teacher, compiled, self._batches(teacher)),
            ema_decay=0.998,
            decay=0.6,
            watch=watch,
            watch_every=recipe.watch_every,
        )
        ema = fit(stage, self.run, self.left(), seed=4)
        if ema is not None:
            self.run.save("transformer", ema["transformer"])
        return ema is not None

    def export(self) -> bool:
        export(self.run, self.run.folder / "tiny")
        export_judge(self.run, self.run.folder / "tiny-judge.safetensors")
        return True


def prepare_torch() -> None:
    """Process-wide settings of PyTorch."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    # cuDNN's attention failed in the backward pass here (PyTorch 2.11, CUDA 13.0, H100): an illegal access.
    torch.backends.cuda.enable_cudnn_sdp(False)


def _finished(run: Run, stage: str) -> bool:
    kept = {"vae": "vae", "judge": "judge", "flow": "teacher", "distil": "transformer"}
    if stage == "latents":
        return (run.folder / "latents.cache").exists()
    return stage in kept and run.has(kept[stage])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True, help="what training.icons wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then; the next call goes on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="a few steps of everything, to try the script")
    args = parser.parse_args()
    prepare_torch()
    run = Run(args.out, args.device)
    trainer = Trainer(run, TOY if args.toy else Recipe(), args.icons, args.minutes * 60)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        if _finished(run, stage):
            continue
        begun = time.monotonic()
        done = getattr(trainer, stage)()
        run.log(stage=stage, done=done, seconds=round(time.monotonic() - begun, 1))
        if not done:
            break


if __name__ == "__main__":
    main()
