"""One training loop for every stage: bf16 autocast, EMA, a schedule, losses in a log, exact resumption."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Losses = dict[str, Tensor]
_LOG_EVERY = 100
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Chance:
    """The randomness of one step, a function of seed and step alone, so that nothing of it needs saving."""

    host: np.random.Generator
    device: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int, device: torch.device) -> "Chance":
        """Fresh generators, the second on ``device``."""
        return cls(np.random.default_rng((seed, step)), torch.Generator(device).manual_seed(seed * 10_000_019 + step))


@dataclass
class Stage:
    """What one stage trains, on what, and for how long.

    Attributes:
        modules: what is trained, in float32; the EMA covers all of it.
        optimizers: their ``lr`` at construction is the peak.
        loss: draws a batch by chance and returns named losses; "loss" is the one to minimise.
        decay: part of the steps, at the end, over which the rate falls linearly to zero.
        watch: called with the step and the EMA modules every ``watch_every`` steps.
    """

    name: str
    modules: nn.ModuleDict
    optimizers: list[torch.optim.Optimizer]
    steps: int
    loss: Callable[[Chance], Losses]
    ema_decay: float = 0.999
    warmup: int = 200
    decay: float = 0.4
    clip: float = 1.0
    watch: Callable[[int, nn.ModuleDict], dict[str, float] | None] | None = None
    watch_every: int = 2000


class Run:
    """The folder of a training run: finished modules, checkpoints, facts and a log of losses."""

    def __init__(self, folder: Path, device: torch.device | str):
        self.folder = folder
        self.device = torch.device(device)
        folder.mkdir(parents=True, exist_ok=True)

    def log(self, **entry: object) -> None:
        """Print an entry and append it to ``log.jsonl``."""
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()), flush=True)

    def facts(self, **new: object) -> dict:
        """Remember measured numbers in ``facts.json``; returns all of them."""
        path = self.folder / "facts.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if new:
            known.update(new)
            _write_atomically(path, lambda p: p.write_text(json.dumps(known, indent=1)))
        return known

    def picture(self, name: str, images: Tensor, columns: int) -> None:
        """Write a grid of pictures to ``samples/NAME.png``: uint8 [N, H, W, 3]."""
        count, height, width, _ = images.shape
        rows = -(-count // columns)
        sheet = torch.full((rows * columns, height, width, 3), 255, dtype=torch.uint8)
        sheet[:count] = images
        sheet = sheet.view(rows, columns, height, width, 3).permute(0, 2, 1, 3, 4)
        path = self.folder / "samples" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(sheet.reshape(rows * height, columns * width, 3).numpy()).save(path)

    def compiled(self, module: nn.Module) -> nn.Module:
        """The module compiled for the shapes that it meets, on a GPU; as it is elsewhere."""
        return torch.compile(module, dynamic=False) if self.device.type == "cuda" else module

    def has(self, name: str) -> bool:
        """Whether a module of that name is finished."""
        return (self.folder / f"{name}.safetensors").exists()

    def save(self, name: str, module: nn.Module) -> None:
        """Keep a finished module's weights."""
        state = {k: v.detach().cpu().contiguous() for k, v in _unshared(module.state_dict()).items()}
        _write_atomically(self.folder / f"{name}.safetensors", lambda p: save_file(state, p))

    def load(self, name: str, module: nn.Module) -> nn.Module:
        """Read a finished module's weights and freeze it, on the run's device."""
        missing, unexpected = module.load_state_dict(load_file(self.folder / f"{name}.safetensors"), strict=False)
        shared = set(module.state_dict()) - set(_unshared(module.state_dict()))
        if unexpected or set(missing) - shared:
            raise ValueError(f"{name}.safetensors does not fit: missing {missing}, unexpected {unexpected}")
        return module.to(self.device).eval().requires_grad_(False)


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the second name of tied weights, which safetensors refuses to store twice."""
    seen: dict[int, str] = {}
    return {k: v for k, v in state.items() if v.numel() == 0 or seen.setdefault(v.data_ptr(), k) == k}


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def rate(step: int, stage: Stage) -> float:
    """Learning rate over its peak: linear warm-up, constant, linear fall to zero."""
    rising = (step + 1) / max(stage.warmup, 1)
    falling = (stage.steps - step) / max(stage.decay * stage.steps, 1)
    return min(1.0, rising, falling)


@dataclass
class _Progress:
    """Everything that makes a resumed run go on as if it had not stopped."""

    stage: Stage
    ema: nn.ModuleDict
    seed: int
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        state = {
            "modules": self.stage.modules.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [o.state_dict() for o in self.stage.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        _write_atomically(path, lambda p: torch.save(state, p))

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.stage.modules.load_state_dict(state["modules"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.stage.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]


def _advance(progress: _Progress, peaks: list[float], parameters: list[Tensor], averaged: list[Tensor]) -> None:
    stage = progress.stage
    for optimizer, peak in zip(stage.optimizers, peaks, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(progress.step, stage)
    losses = stage.loss(Chance.of(progress.seed, progress.step, parameters[0].device))
    losses["loss"].backward()
    norm = nn.utils.clip_grad_norm_(parameters, stage.clip)
    for optimizer in stage.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    keep = min(stage.ema_decay, (1 + progress.step) / (10 + progress.step))
    torch._foreach_lerp_(averaged, parameters, 1 - keep)
    for key, value in {**losses, "norm": norm}.items():
        progress.sums[key] = progress.sums.get(key, torch.zeros_like(value)) + value.detach()
    progress.step += 1


def fit(stage: Stage, run: Run, seconds: float = float("inf"), seed: int = 0) -> nn.ModuleDict | None:
    """Train a stage, from its checkpoint if there is one.

    Args:
        seconds: wall-clock budget of this call; a checkpoint is written when it is spent.
    Returns: the EMA modules when all steps are done, None when the budget ran out first.
    """
    path = run.folder / f"{stage.name}.checkpoint"
    peaks = [o.param_groups[0]["lr"] for o in stage.optimizers]
    ema = copy.deepcopy(stage.modules).eval().requires_grad_(False)
    progress = _Progress(stage, ema, seed)
    if path.exists():
        progress.load(path)
    parameters, averaged = list(stage.modules.parameters()), list(ema.parameters())
    before, begun = progress.seconds, time.monotonic()
    saved, logged, logged_step = begun, begun, progress.step
    while progress.step < stage.steps:
        _advance(progress, peaks, parameters, averaged)
        now = time.monotonic()
        progress.seconds = before + now - begun
        if progress.step % _LOG_EVERY == 0 or progress.step == stage.steps:
            count = progress.step - logged_step
            means = {k: float(v) / count for k, v in progress.sums.items()}
            now = time.monotonic()  # reading the losses waited for the device
            ms = 1e3 * (now - logged) / count
            run.log(stage=stage.name, step=progress.step, **means, ms=ms, seconds=round(before + now - begun, 1))
            progress.sums, logged, logged_step = {}, now, progress.step
        if stage.watch and (progress.step % stage.watch_every == 0 or progress.step == stage.steps):
            seen = stage.watch(progress.step, ema)
            if seen:
                run.log(stage=stage.name, step=progress.step, **seen)
            logged = time.monotonic() if not progress.sums else logged
        if now - begun > seconds or now - saved > _SAVE_EVERY_S or progress.step == stage.steps:
            progress.save(path)
            saved = now
            if now - begun > seconds and progress.step < stage.steps:
                return None
    run.facts(**{f"{stage.name}_steps": stage.steps, f"{stage.name}_seconds": round(progress.seconds, 1)})
    return ema
