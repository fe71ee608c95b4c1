"""Text encoders → noise → denoise loop → VAE, over bound engines. The loop is ours; the engines are behind the seam.

Precision: latents are float32 from the noise to the last step, whatever the engines compute in; velocities, embeddings
and the VAE's tensors are in the engine's dtype. Noise is drawn on the CPU in float32 from the request's seed alone, as
diffusers does with `torch.Generator("cpu")`, so that an image does not depend on the device, on the other requests of
its batch, or on its place among `num_images`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxserve.device import DeviceClock, Pacer, sent
from fluxserve.engine import Bound, Components, Engine, Saturating, Shapes, denoiser
from fluxserve.errors import NotFinite, SettingsError
from fluxserve.families.flux import tokens
from fluxserve.job import RGB_CHANNELS, TEXT_TO_IMAGE_CHANNELS, Job
from fluxserve.media.images import Pixels
from fluxserve.sampling import loop
from fluxserve.sampling.guidance import OnePass
from fluxserve.sampling.solvers import Euler
from fluxserve.spec import PATCH, ModelSpec

Watch = Callable[[int], bool]
"""Called with a job's index after each of its steps; False says that nobody wants the job any more."""

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
class Conditioning:
    """What the prompts and the reference images say.

    pooled [rows, pooled_projection_dim] where the model has one, sequence [rows, tokens, joint_attention_dim],
    guidance float32 [rows], references float32 [rows, their tokens, C], reference_sizes in latent pixels.
    """

    pooled: Tensor | None
    sequence: Tensor
    guidance: Tensor
    references: Tensor
    reference_sizes: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def stack(rows: Sequence["Conditioning"]) -> "Conditioning":
        pooled = [r.pooled for r in rows if r.pooled is not None]
        return Conditioning(
            torch.cat(pooled) if pooled else None,
            torch.cat([r.sequence for r in rows]),
            torch.cat([r.guidance for r in rows]),
            torch.cat([r.references for r in rows]),
            rows[0].reference_sizes,
        )


class Pipeline:
    """One model on one device. Not thread-safe: one GPU worker owns it.

    Args:
        max_rows: images that go through the transformer together. With 1, an image has the same bytes alone and in a
            batch; with more, matrix products of another height may round differently in the last place.

    Raises:
        SettingsError: the engine takes fewer rows than max_rows.
    """

    def __init__(self, spec: ModelSpec, components: Components, device: str = "cpu", max_rows: int = 1) -> None:
        most = components.transformer.signature.most("rows")
        if max_rows > most:
            raise SettingsError("max_rows", max_rows, f"1 to {most}, which this engine takes")
        self.spec, self._engines, self._max_rows = spec, components, max_rows
        self.device = torch.device(device)
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
            (drawing,) = self.draw([self._nothing(size, given)])
            assert drawing is not None, "nobody can cancel it"
            drawing.require_finite()
        return self._seconds_a_picture()

    def _seconds_a_picture(self) -> float:
        """Draw one step at the default size, once more, and reckon with all steps."""
        (drawing,) = self.draw([self._nothing(self.spec.defaults.side, False)])
        assert drawing is not None, "nobody can cancel it"
        times, steps = drawing.timings, self.spec.defaults.num_inference_steps
        return (times["encode"] + steps * times["denoise"] + times["decode"]) / 1000

    def _nothing(self, side: int, given: bool) -> Job:
        """A square job of no words; `given` a black image, or a reference where the model takes those."""
        first, *rest = self.spec.text.encoders
        least, refers = self.spec.limits.min_reference_side, given and self.spec.takes_references
        channels = RGB_CHANNELS if given and not refers else TEXT_TO_IMAGE_CHANNELS
        black = np.zeros((least, least, RGB_CHANNELS), dtype=np.uint8)
        return Job(
            token_ids=np.zeros(first.tokens, dtype=np.int64),
            token_ids_2=np.zeros(rest[0].tokens if rest else 0, dtype=np.int64),
            token_mask=np.ones(first.tokens if first.layers else 0, dtype=np.int64),
            pixels=np.zeros((side, side, channels), dtype=np.uint8),
            sigmas=np.array([1.0, 0.0], dtype=np.float32),
            guidance=self.spec.defaults.guidance_scale,
            noise_seeds=(0,),
            references=(black,) if refers else (),
        )

    def saturated(self) -> int:
        """Values at the limit of FP8 in all pictures so far, in a sample of their rows. Waits for the device."""
        engine = self._engines.transformer
        return sum(map(sum, engine.saturated().values())) if isinstance(engine, Saturating) else 0

    def close(self) -> None:
        self._bounds.clear()
        self._engines.close()

    @torch.inference_mode()
    def draw(self, jobs: Sequence[Job], watch: Watch = lambda _: True) -> list[Drawing | None]:
        """Draw jobs of one likeness. None stands for a job that `watch` called off.

        The timings of every drawing are those of the whole batch: that is how long each of them took.
        """
        assert len({job.likeness for job in jobs}) == 1, "jobs of a batch must be alike"
        clock = DeviceClock(self.device)
        with clock.stage("encode"):
            batch = _Batch(jobs, watch, [self.encode(job) for job in jobs])
        height, width = jobs[0].height, jobs[0].width
        canvas = torch.empty(len(batch.rows), height, width, 3, dtype=torch.uint8, device=self.device)
        finite = torch.ones(len(batch.rows), dtype=torch.bool, device=self.device)
        for first in range(0, len(batch.rows), self._max_rows):
            rows = batch.rows[first : first + self._max_rows]
            latents = self._denoise_watched(batch, rows, clock)
            if latents is not None:
                with clock.stage("decode"):
                    values, place = self._decoded(latents, height, width), slice(first, first + len(rows))
                    canvas[place] = _as_bytes(values)
                    finite[place] = _are_finite(latents) & _are_finite(values)
        timings = clock.milliseconds()
        timings["total"] = sum(timings.values())
        shares = zip(batch.share(canvas), batch.share(finite.cpu()), strict=True)  # the clock has waited for both
        return [
            Drawing(pixels, timings, bool(good.all())) if pixels is not None and good is not None else None
            for pixels, good in shares
        ]

    def _denoise_watched(self, batch: "_Batch", rows: Sequence["_Row"], clock: DeviceClock) -> Tensor | None:
        """Run the loop for some rows, telling the watch after each step; None once nobody wants any of them."""
        members = [row.job for row in rows]  # a job of several rows here takes as many steps at once
        if not batch.any_wanted(members):
            return None
        jobs = batch.jobs
        with clock.stage("encode"):
            latents = torch.cat([self.start(jobs[row.job], row.seed) for row in rows])
        conditioning = Conditioning.stack([batch.conditionings[row.job] for row in rows])
        size = self.spec.latent_size(jobs[0].height, jobs[0].width)
        with clock.stage("denoise"):
            for _ in self.denoise(latents, conditioning, jobs[0].sigmas, size):
                batch.tell(members)
                if not batch.any_wanted(members):
                    return None
        return latents

    def encode(self, job: Job) -> Conditioning:
        """Prompt tokens and reference images → what conditions one row."""
        outputs: dict[str, Tensor] = {}
        for encoder, ids in zip(self.spec.text.encoders, job.ids, strict=False):  # one or both
            given = {"input_ids": ids, "attention_mask": job.token_mask} if encoder.layers else {"input_ids": ids}
            bound = self._bind(self._engines.text[encoder.name], {name: (1, len(a)) for name, a in given.items()})
            for name, array in given.items():
                bound.inputs[name].copy_(sent(torch.from_numpy(array), self.device)[None])
            bound.run()
            outputs |= {name: value.clone() for name, value in bound.outputs.items()}
        guidance = torch.full((1,), job.guidance, dtype=torch.float32, device=self.device)
        references = [torch.empty(1, 0, self.spec.transformer.in_channels, device=self.device)]
        references += [tokens.pack(self._encode_pixels(pixels)) for pixels in job.references]
        sizes = tuple(self.spec.latent_size(*pixels.shape[:2]) for pixels in job.references)
        return Conditioning(outputs.get("pooled"), outputs["sequence"], guidance, torch.cat(references, dim=1), sizes)

    def start(self, job: Job, seed: int) -> Tensor:
        """Where the loop begins: noise, or noise mixed with the input image; packed, float32 [1, image_tokens, C].

        The generator's order is diffusers': with an input image it first draws the sample of the VAE's posterior.
        FLUX.2's noise is drawn with the channels of tokens.
        """
        height, width = self.spec.latent_size(job.height, job.width)
        folded = self.spec.transformer.generation == 2
        places = (height // PATCH, width // PATCH) if folded else (height, width)
        channels = self.spec.transformer.in_channels if folded else self.spec.vae.latent_channels
        generator = torch.Generator("cpu").manual_seed(seed)

        def draw() -> Tensor:
            shape, pinned = (1, channels, *places), self.device.type == "cuda"
            return sent(torch.randn(shape, generator=generator, dtype=torch.float32, pin_memory=pinned), self.device)

        if folded:
            return tokens.pack(draw(), patch=1)
        if not job.is_image_to_image:
            return tokens.pack(draw())
        clean = self._encode_pixels(job.pixels, draw())
        return tokens.pack(tokens.blend_(clean, draw(), float(job.sigmas[0])))

    def _encode_pixels(self, image: Pixels, sample: Tensor | None = None) -> Tensor:
        """An image as latents, float32 [1, C, h, w]: mean + std·sample, or the mean alone, shifted and scaled."""
        bound = self._bind(self._engines.vae_encoder, {"pixels": (1, 3, *image.shape[:2])})
        pixels = sent(torch.tensor(image), self.device).float() / 255.0
        bound.inputs["pixels"].copy_((2.0 * pixels - 1.0).permute(2, 0, 1)[None])
        bound.run()
        mean, std = bound.outputs["mean"].float(), bound.outputs["std"].float()
        latents = mean if sample is None else mean + std * sample
        return (latents - self.spec.vae.shift_factor) * self.spec.vae.scaling_factor

    def denoise(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        sigmas: npt.NDArray[np.float32],
        size: tuple[int, int],
    ) -> Iterator[Tensor]:
        """Take Euler steps along `sigmas`; yield the latents after each of them (the same tensor, updated in place).

        Args:
            latents: packed, float32 [rows, image_tokens, C]; overwritten.
            size: height and width in latent pixels.
        """
        bound, own = self._bind_transformer(latents, conditioning, size), latents.shape[1]
        window, velocity = bound.inputs["hidden_states"][:, :own], bound.outputs["velocity"][:, :own]
        levels = sent(torch.tensor(sigmas), self.device)
        timesteps = tokens.timesteps(levels[:-1], self.spec.schedule, bound.inputs["timestep"].dtype)
        solver, pacer = Euler(levels, timesteps), Pacer(self.device)
        return loop.denoise(denoiser(bound), window, velocity, latents, solver, OnePass(), pacer.step)

    def _bind_transformer(self, latents: Tensor, conditioning: Conditioning, size: tuple[int, int]) -> Bound:
        """Bind for these rows and write everything that stays the same from step to step."""
        engine, axes = self._engines.transformer, len(self.spec.transformer.axes_dims_rope)
        references = conditioning.references
        ids = [tokens.image_ids(*size, axes), tokens.reference_ids(conditioning.reference_sizes, axes)]
        known = {
            "encoder_hidden_states": conditioning.sequence,
            "pooled_projections": conditioning.pooled,
            "guidance": conditioning.guidance,
            "img_ids": sent(torch.from_numpy(np.concatenate(ids)), self.device),
            "txt_ids": sent(torch.from_numpy(tokens.text_ids(conditioning.sequence.shape[1], axes)), self.device),
        }
        taken = {tensor.name for tensor in engine.signature.inputs}
        fixed = {name: value for name, value in known.items() if name in taken and value is not None}
        shapes = {name: tuple(value.shape) for name, value in fixed.items()}
        rows, own, channels = latents.shape
        shapes |= {"hidden_states": (rows, own + references.shape[1], channels), "timestep": (rows,)}
        bound = self._bind(engine, shapes)
        for name, value in fixed.items():
            bound.inputs[name].copy_(value)
        bound.inputs["hidden_states"][:, own:].copy_(references)
        return bound

    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents → uint8 [rows, height, width, 3] on the device."""
        return _as_bytes(self._decoded(latents, height, width))

    def _decoded(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents → what the VAE makes of them, [rows, 3, height, width]; overwritten by the next call."""
        z = tokens.unpack(latents, *self.spec.latent_size(height, width))
        bound = self._bind(self._engines.vae_decoder, {"latents": tuple(z.shape)})
        bound.inputs["latents"].copy_(z / self.spec.vae.scaling_factor + self.spec.vae.shift_factor)
        bound.run()
        return bound.outputs["pixels"]

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


@dataclass(frozen=True)
class _Row:
    """One image of one job."""

    job: int
    seed: int


class _Batch:
    """The jobs of one call: their rows, and which of them are still wanted."""

    def __init__(self, jobs: Sequence[Job], watch: Watch, conditionings: Sequence[Conditioning]) -> None:
        self.jobs, self.conditionings, self._watch = jobs, conditionings, watch
        self.rows = [_Row(index, seed) for index, job in enumerate(jobs) for seed in job.noise_seeds]
        self._wanted = [True] * len(jobs)

    def tell(self, members: Sequence[int]) -> None:
        """One more step for each row; who was called off is not asked again."""
        for member in members:
            self._wanted[member] = self._wanted[member] and self._watch(member)

    def any_wanted(self, members: Sequence[int]) -> bool:
        return any(self._wanted[member] for member in members)

    def share(self, rows: Tensor) -> list[Tensor | None]:
        """Every wanted job's part of what has a row for each image."""
        parts = torch.split(rows, [len(job.noise_seeds) for job in self.jobs])
        return [part if wanted else None for part, wanted in zip(parts, self._wanted, strict=True)]
