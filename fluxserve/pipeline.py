"""Text encoders → noise → denoise loop → VAE, over bound engines. The loop is ours; the engines are behind the seam.

Precision: latents are float32 from the noise to the last step, whatever the engines compute in; velocities, embeddings
and the VAE's tensors are in the engine's dtype. Noise is drawn on the CPU in float32 from the request's seed alone, as
diffusers does with `torch.Generator("cpu")`, so that an image does not depend on the device, on the other requests of
its batch, or on its place among `num_images`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxserve.device import DeviceClock, Pacer, sent
from fluxserve.engine import Bound, Components, Dim, Engine, Saturating, Shapes, denoiser
from fluxserve.errors import NotFinite, SettingsError
from fluxserve.families import registry
from fluxserve.families.base import Draw, Inputs
from fluxserve.job import Array, Arrays, Job
from fluxserve.sampling import glimpses, loop
from fluxserve.spec import ModelSpec

Watch = Callable[[int], bool]
"""Called with a job's index after each of its steps; False says that nobody wants the job any more."""

Show = Callable[[int, "View"], None]
"""Called with a job's index and its view after each of its steps, as long as it is wanted; may take a preview."""

_BOUNDS_KEPT = 24


@dataclass(frozen=True)
class Drawing:
    """One job's pictures.

    Attributes:
        pixels: uint8 [num_images, height, width, 3] on the device; of no meaning unless `finite`.
        timings: milliseconds by stage on the device's clock.
        finite: whether latents and decoded values all were; `images` and `require_finite` raise NotFinite if not.
    """

    pixels: Tensor
    timings: dict[str, float]
    finite: bool = True

    def require_finite(self) -> None:
        """Raise NotFinite rather than let a black picture pass."""
        if not self.finite:
            raise NotFinite

    @cached_property
    def images(self) -> npt.NDArray[np.uint8]:
        """The pixels on the host. Behind all that the device was told to do before this was first asked for."""
        self.require_finite()
        if not self.pixels.is_cuda:
            return self.pixels.numpy()
        host = torch.empty_like(self.pixels, device="cpu", pin_memory=True)  # one transfer, into memory that is kept
        return host.copy_(self.pixels).numpy()


@dataclass(frozen=True)
class Encoded:
    """What the text encoders and the VAE say of one job.

    Attributes:
        states: for each pass of the network, the text encoders' outputs by name, of one row.
        images: mean and standard deviation of each image's latents, float32 [1, C, h, w].
    """

    states: Sequence[Mapping[str, Tensor]]
    images: Sequence[tuple[Tensor, Tensor]]


class Pipeline:
    """One model on one device. Not thread-safe: one GPU worker owns it.

    Args:
        max_rows: images that go through the network together, each with a row for each of its passes. With 1, an image
            has the same bytes alone and in a batch; with more, matrix products of another height may round
            differently in the last place.

    Raises:
        SettingsError: the engine takes fewer rows than max_rows.
    """

    def __init__(self, spec: ModelSpec, components: Components, device: str = "cpu", max_rows: int = 1) -> None:
        most = components.network.signature.most("rows")
        if max_rows > most:
            raise SettingsError("max_rows", max_rows, f"1 to {most}, which this engine takes")
        self.spec, self._engines, self._max_rows = spec, components, max_rows
        self.device = torch.device(device)
        self._family, self._recipe = registry.of(spec), registry.recipe(spec)
        self._bounds: OrderedDict[tuple[object, ...], Bound] = OrderedDict()

    def warm_up(self) -> float:
        """One step through every component, at the default size twice: engines capture the second.

        Returns how many seconds a picture of the default size and steps takes, by the time of one step more.

        So that no first request pays for what is loaded, compiled or captured late, and that what can't run fails now.
        References make the transformer's rows more, so they come after. Then the smallest size: libraries have kernels
        for multiples of something, and others for all other sizes.
        """
        side, least, alone = self.spec.defaults.side, self.spec.limits.min_side, not self.spec.takes_references
        sizes = [(side, alone), (side, alone), *([] if alone else [(side, True)]), (least, True)]
        for size, given in sizes:
            (drawing,) = self.draw([self._family.nothing(self.spec, size, given)])
            assert drawing is not None, "nobody can cancel it"
            drawing.require_finite()
        _ = self._projection
        return self._seconds_a_picture()

    def _seconds_a_picture(self) -> float:
        """Draw one step at the default size, once more, and reckon with all steps."""
        (drawing,) = self.draw([self._family.nothing(self.spec, self.spec.defaults.side, False)])
        assert drawing is not None, "nobody can cancel it"
        times, steps = drawing.timings, self.spec.defaults.num_inference_steps
        return (times["encode"] + steps * times["denoise"] + times["decode"]) / 1000

    def saturated(self) -> int:
        """Values at the limit of FP8 in all pictures so far, in a sample of their rows. Waits for the device."""
        engine = self._engines.network
        return sum(map(sum, engine.saturated().values())) if isinstance(engine, Saturating) else 0

    @property
    def network(self) -> Engine:
        """The engine that the loop runs."""
        return self._engines.network

    def close(self) -> None:
        self._bounds.clear()
        self._engines.close()

    @torch.inference_mode()
    def draw(
        self, jobs: Sequence[Job], watch: Watch = lambda _: True, show: Show = lambda *_: None
    ) -> list[Drawing | None]:
        """Draw jobs of one likeness. None stands for a job that `watch` called off.

        The timings of every drawing are those of the whole batch: that is how long each of them took. The host never
        waits for the device in the loop, not for previews either. A preview that `show` takes is work of the device
        between two steps; nothing is computed or allocated for one that nobody takes.
        """
        assert len({job.likeness for job in jobs}) == 1, "jobs of a batch must be alike"
        clock = DeviceClock(self.device)
        with clock.stage("encode"):
            batch = _Batch(jobs, watch, show, [self.encode(job) for job in jobs])
        height, width = jobs[0].height, jobs[0].width
        canvas = torch.empty(len(batch.rows), height, width, 3, dtype=torch.uint8, device=self.device)
        finite = torch.ones(len(batch.rows), dtype=torch.bool, device=self.device)
        together = self._pictures_together(batch.passes)
        for first in range(0, len(batch.rows), together):
            rows = batch.rows[first : first + together]
            latents = self._denoise_watched(batch, rows, clock)
            if latents is not None:
                with clock.stage("decode"):
                    values, place = self._decoded(latents, jobs[0]), slice(first, first + len(rows))
                    canvas[place] = _as_bytes(values)
                    finite[place] = _are_finite(latents) & _are_finite(values)
        timings = clock.milliseconds()
        timings["total"] = sum(timings.values())
        shares = zip(batch.share(canvas), batch.share(finite.cpu()), strict=True)  # the clock has waited for both
        return [
            Drawing(pixels, timings, bool(good.all())) if pixels is not None and good is not None else None
            for pixels, good in shares
        ]

    def _pictures_together(self, passes: int) -> int:
        """Return how many pictures go through the network together, each of which takes a row for each pass."""
        return max(1, min(self._max_rows, self._engines.network.signature.most("rows") // passes))

    def _denoise_watched(self, batch: "_Batch", rows: Sequence["_Row"], clock: DeviceClock) -> Tensor | None:
        """Run the loop for some rows, telling the watch after each step; None once nobody wants any of them."""
        members = [row.job for row in rows]  # a job of several rows here takes as many steps at once
        if not batch.any_wanted(members):
            return None
        with clock.stage("encode"):
            steps = self._loop([(batch.jobs[row.job], row.seed, batch.encoded[row.job]) for row in rows])
        views = {job: View(self, steps, batch.jobs[job], members.index(job), rows) for job in members}
        with clock.stage("denoise"):
            for _ in steps:
                batch.tell(members)
                if not batch.any_wanted(members):
                    return None
                batch.show(views)
        return steps.latents

    def encode(self, job: Job) -> Encoded:
        """Run the text encoders, and the VAE on the job's images."""
        return Encoded(
            [self._states(read) for read in self._recipe.prompts(job, self.spec)],
            [self._encode_pixels(image) for image in self._recipe.images(job)],
        )

    def _states(self, read: Mapping[str, Arrays]) -> Mapping[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for name, given in read.items():
            bound = self._bind(self._engines.text[name], {key: (1, len(array)) for key, array in given.items()})
            for key, array in given.items():
                bound.inputs[key].copy_(self._send(array)[None])
            bound.run()
            outputs |= {key: value.clone() for key, value in bound.outputs.items()}
        return outputs

    def _encode_pixels(self, image: Array) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of an image's latents, float32 [1, C, h, w]."""
        bound = self._bind(self._engines.vae_encoder, {"pixels": (1, 3, *image.shape[:2])})
        pixels = self._send(image).float() / 255.0
        bound.inputs["pixels"].copy_((2.0 * pixels - 1.0).permute(2, 0, 1)[None])
        bound.run()
        return bound.outputs["mean"].float().clone(), bound.outputs["std"].float().clone()

    def _send(self, array: Array) -> Tensor:
        return sent(torch.tensor(array), self.device)

    def _noise(self, seed: int) -> Draw:
        """Return what draws the noise of one picture, on the CPU and in the order of diffusers' generator."""
        generator, pinned = torch.Generator("cpu").manual_seed(seed), self.device.type == "cuda"

        def draw(shape: tuple[int, ...]) -> Tensor:
            return sent(torch.randn(shape, generator=generator, dtype=torch.float32, pin_memory=pinned), self.device)

        return draw

    def denoise(self, rows: Sequence[tuple[Job, int, Encoded]]) -> Iterator[Tensor]:
        """Yield the latents that the loop begins with, then those after each step (one tensor, updated in place).

        Args:
            rows: for each picture its job, seed and what was encoded; jobs of one likeness.
        """
        steps = self._loop(rows)
        yield steps.latents
        yield from steps

    def _loop(self, rows: Sequence[tuple[Job, int, Encoded]]) -> loop.Loop:
        job, recipe = rows[0][0], self._recipe
        draws = [self._noise(seed) for _, seed, _ in rows]
        starts = [
            recipe.start(own, self.spec, draw, encoded.images)
            for (own, _, encoded), draw in zip(rows, draws, strict=True)
        ]
        latents = torch.cat(starts)
        guidance = recipe.guidance([own for own, _, _ in rows], self._send)
        bound = self._bind_network(latents, self._inputs(rows, guidance.passes))
        own = latents.shape[1]
        window, prediction = bound.inputs[recipe.latents][:, :own], bound.outputs[recipe.prediction][:, :own]

        def noise() -> Tensor:
            return torch.cat([draw(tuple(starts[0].shape)) for draw in draws])

        solver = recipe.solver(job, self.spec, bound.inputs["timestep"].dtype, self._send, noise)
        paced = Pacer(self.device).step
        return loop.Loop(denoiser(bound), window, prediction, latents, solver, guidance, paced)

    def _inputs(self, rows: Sequence[tuple[Job, int, Encoded]], passes: int) -> list[Inputs]:
        """Return the network's inputs for each of its rows: all rows of the first pass, then those of the second."""
        return [
            self._recipe.inputs(job, self.spec, encoded.states[which], encoded.images, self._send, which)
            for which in range(passes)
            for job, _, encoded in rows
        ]

    def _bind_network(self, latents: Tensor, rows: Sequence[Inputs]) -> Bound:
        """Bind for these rows and write everything that stays the same from step to step."""
        engine, name = self._engines.network, self._recipe.latents
        of_rows = {t.name for t in engine.signature.inputs if isinstance(t.dims[0], Dim) and t.dims[0].symbol == "rows"}
        taken = {t.name for t in engine.signature.inputs} & set(rows[0].fixed)
        fixed = {
            key: torch.cat([row.fixed[key] for row in rows]) if key in of_rows else rows[0].fixed[key] for key in taken
        }
        beside = [row.beside for row in rows if row.beside is not None]
        own, more = latents.shape[1], beside[0].shape[1] if beside else 0
        shapes = {key: tuple(value.shape) for key, value in fixed.items()}
        shapes |= {name: (len(rows), own + more, *latents.shape[2:]), "timestep": (len(rows),)}
        bound = self._bind(engine, shapes)
        for key, value in fixed.items():
            bound.inputs[key].copy_(value)
        if beside:
            bound.inputs[name][:, own:].copy_(torch.cat(beside))
        return bound

    def decode(self, latents: Tensor, job: Job) -> Tensor:
        """Return the pictures of a job's latents, uint8 [rows, height, width, 3] on the device."""
        return _as_bytes(self._decoded(latents, job))

    def _decoded(self, latents: Tensor, job: Job) -> Tensor:
        """Return what the VAE makes of the loop's latents, [rows, 3, height, width]; overwritten by the next call."""
        z = self._recipe.decoded(latents, job, self.spec)
        bound = self._bind(self._engines.vae_decoder, {"latents": tuple(z.shape)})
        bound.inputs["latents"].copy_(z)
        bound.run()
        return bound.outputs["pixels"]

    @cached_property
    def _projection(self) -> Tensor:
        """The VAE's latents to RGB; costs one pass of its encoder, at the default size."""
        image = glimpses.colours(self.spec.defaults.side)
        with torch.inference_mode():
            return glimpses.fit(self._encode_pixels(image)[0], image)

    def _bind(self, engine: Engine, shapes: Shapes) -> Bound:
        """An engine bound to shapes, from the few that were used last."""
        key = (id(engine), *sorted(shapes.items()))
        if key in self._bounds:
            self._bounds.move_to_end(key)
        else:
            self._bounds[key] = engine.bind(shapes)
            if len(self._bounds) > _BOUNDS_KEPT:
                self._bounds.popitem(last=False)
        return self._bounds[key]


def _as_bytes(values: Tensor) -> Tensor:
    """[rows, 3, height, width] in −1 to 1 → uint8 [rows, height, width, 3]."""
    pixels = (values.float() / 2 + 0.5).clamp_(0, 1)
    return (pixels * 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _are_finite(values: Tensor) -> Tensor:
    """Whether a row holds neither NaN nor infinity, bool [rows] on the device: its sum would be neither finite."""
    return values.flatten(1).sum(dim=1, dtype=torch.float32).isfinite()


class View:
    """One picture of a loop that runs; of several of one job, the first. Each method is work for the device.

    Attributes:
        seed: of the picture.
    """

    def __init__(self, pipeline: Pipeline, steps: loop.Loop, job: Job, row: int, rows: Sequence["_Row"]) -> None:
        self._pipeline, self._steps, self._job, self._row = pipeline, steps, job, row
        self.seed = rows[row].seed

    @property
    def done(self) -> int:
        """Steps of this picture so far."""
        return self._steps.done

    def glimpse(self) -> Tensor:
        """Return the estimated picture at the latents' resolution, uint8 [h, w, 3]."""
        z = self._pipeline._recipe.decoded(self._clean(), self._job, self._pipeline.spec)
        return glimpses.project(z[0], self._pipeline._projection)

    def partial(self) -> Tensor:
        """Return the estimated picture through the VAE, uint8 [height, width, 3]."""
        return self._pipeline.decode(self._clean(), self._job)[0]

    def _clean(self) -> Tensor:
        return self._steps.clean()[self._row : self._row + 1]


@dataclass(frozen=True)
class _Row:
    """One image of one job."""

    job: int
    seed: int


class _Batch:
    """The jobs of one call: their rows, and which of them are still wanted."""

    def __init__(self, jobs: Sequence[Job], watch: Watch, show: Show, encoded: Sequence[Encoded]) -> None:
        self.jobs, self.encoded, self._watch, self._show = jobs, encoded, watch, show
        self.rows = [_Row(index, seed) for index, job in enumerate(jobs) for seed in job.seeds]
        self._wanted = [True] * len(jobs)

    @property
    def passes(self) -> int:
        """Passes of the network in each step, of which jobs of one likeness have equally many."""
        return len(self.encoded[0].states)

    def tell(self, members: Sequence[int]) -> None:
        """One more step for each row; who was called off is not asked again."""
        for member in members:
            self._wanted[member] = self._wanted[member] and self._watch(member)

    def show(self, views: Mapping[int, View]) -> None:
        for member, view in views.items():
            if self._wanted[member]:
                self._show(member, view)

    def any_wanted(self, members: Sequence[int]) -> bool:
        return any(self._wanted[member] for member in members)

    def share(self, rows: Tensor) -> list[Tensor | None]:
        """Every wanted job's part of what has a row for each image."""
        parts = torch.split(rows, [len(job.seeds) for job in self.jobs])
        return [part if wanted else None for part, wanted in zip(parts, self._wanted, strict=True)]
