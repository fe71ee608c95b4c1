"""The seam: what a signature refuses, how an engine is opened, and that a bound engine's tensors never move."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fluxserve import errors
from fluxserve.engine import FLOATING, Bound, Components, Dim, Engine, Shapes, Signature, TensorSpec
from fluxserve.engines.open import ARTIFACTS, ENGINES, WEIGHTS, open_components
from fluxserve.errors import ShapeError
from fluxserve.families.flux import signatures
from fluxserve.families.flux.models import MEMBERS, TINY
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.checkpoint import Checkpoint
from tests.support import random_flux, threads

ROWS, SIDE = Dim("rows", 1, 4), Dim("side", 2, 8, multiple=8)
SIGNATURE = Signature(
    inputs=(TensorSpec("x", FLOATING, (ROWS, 3, SIDE)), TensorSpec("t", "float32", (ROWS,))),
    outputs=(TensorSpec("y", FLOATING, (ROWS, Dim("side", 2, 8))),),
)


def test_resolve() -> None:
    assert SIGNATURE.resolve({"x": (2, 3, 24), "t": (2,)}) == {"x": (2, 3, 24), "t": (2,), "y": (2, 3)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (2, 3, 24)}, "inputs: got ['x']; expected ['t', 'x']"),
        ({"x": (2, 3, 24), "t": (2,), "z": (1,)}, "inputs: got ['t', 'x', 'z']; expected ['t', 'x']"),
        ({"x": (2, 3), "t": (2,)}, "x [rows, 3, 8*side]: got (2, 3); expected 3 dimensions"),
        ({"x": (2, 4, 24), "t": (2,)}, "x [rows, 3, 8*side]: got (2, 4, 24); expected 3 where it has 4"),
        ({"x": (0, 3, 24), "t": (0,)}, "expected rows from 1 to 4"),
        ({"x": (5, 3, 24), "t": (5,)}, "expected rows from 1 to 4"),
        ({"x": (2, 3, 8), "t": (2,)}, "expected side from 2 to 8"),
        ({"x": (2, 3, 72), "t": (2,)}, "expected side from 2 to 8"),
        ({"x": (2, 3, 25), "t": (2,)}, "expected side from 2 to 8"),
        ({"x": (2, 3, 24), "t": (3,)}, "t [rows]: got (3,); rows is 2 in another input"),
        ({"x": (-1, 3, 24), "t": (-1,)}, "expected rows from 1 to 4"),
    ],
)
def test_resolve_refuses(shapes: Shapes, message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        SIGNATURE.resolve(shapes)
    assert message in str(caught.value)


LATENTS, FRAMES = Dim("latent_frames", 1, 21), Dim("latent_frames", 1, 21, multiple=4, offset=-3)
"""A causal VAE of video: 4k + 1 frames are k + 1 latent frames."""
ENCODER = Signature(
    inputs=(TensorSpec("frames", "float32", (ROWS, 3, FRAMES)),),
    outputs=(TensorSpec("latents", "float32", (ROWS, LATENTS)),),
)


def test_a_dimension_with_an_offset() -> None:
    assert [str(dim) for dim in (LATENTS, FRAMES, Dim("k", 0, 20, 4, 1))] == [
        "latent_frames",
        "4*latent_frames-3",
        "4*k+1",
    ]
    for frames, latents in ((1, 1), (5, 2), (81, 21)):
        assert ENCODER.resolve({"frames": (1, 3, frames)})["latents"] == (1, latents)
        assert ENCODER.at({"rows": 1, "latent_frames": latents})["frames"] == (1, 3, frames)
    assert ENCODER.most("latent_frames") == 21
    narrow = ENCODER.narrowed({"latent_frames": (2, 3)})
    assert narrow.resolve({"frames": (1, 3, 9)})["latents"] == (1, 3)
    with pytest.raises(ShapeError):
        narrow.resolve({"frames": (1, 3, 13)})


@pytest.mark.parametrize("frames", [-3, 0, 2, 3, 4, 6, 80, 82, 85])
def test_sizes_that_no_value_gives_are_refused(frames: int) -> None:
    with pytest.raises(ShapeError) as caught:
        ENCODER.resolve({"frames": (1, 3, frames)})
    expected = f"frames [rows, 3, 4*latent_frames-3]: got (1, 3, {frames}); expected latent_frames from 1 to 21"
    assert str(caught.value) == expected


def test_an_exported_graph_varies_as_its_signature_does() -> None:
    """torch.export gets the multiple and the offset: the graph's output has the symbol itself as a dimension."""
    from fluxserve_export.trace import _dynamic

    class Encoder(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return frames[:, :, ::4].sum(dim=1)

    (frames,) = ENCODER.inputs
    varying = _dynamic(frames, {"rows": (1, 1, 1), "latent_frames": (1, 3, 21)})
    program = torch.export.export(Encoder(), (torch.zeros(1, 3, 9),), dynamic_shapes=(varying,))
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    taken, given = str(values[0].shape[2]), str(values[-1].shape[1])
    assert taken == f"4*{given} - 3"
    for size in (5, 81):
        assert program.module()(torch.zeros(1, 3, size)).shape == ENCODER.resolve({"frames": (1, 3, size)})["latents"]
    with pytest.raises(AssertionError, match="<= 81"):
        program.module()(torch.zeros(1, 3, 85))


@pytest.mark.parametrize("spec", MEMBERS, ids=lambda m: m.name)
def test_signatures_hold_every_size_within_the_limits(spec: FluxSpec) -> None:
    limits, t = spec.limits, spec.transformer
    channels, axes = spec.vae.latent_channels, len(t.axes_dims_rope)
    for height, width in ((limits.min_side, limits.max_side), (limits.max_side, limits.max_side), (64, 64)):
        h, w = spec.latent_size(height, width)
        decoded = signatures.vae_decoder(spec).resolve({"latents": (1, channels, h, w)})
        assert decoded["pixels"] == (1, 3, height, width)
        encoded = signatures.vae_encoder(spec).resolve({"pixels": (1, 3, height, width)})
        assert encoded["mean"] == encoded["std"] == (1, channels, h, w)
        shapes = {
            "hidden_states": (2, spec.image_tokens(height, width), t.in_channels),
            "encoder_hidden_states": (2, spec.text.sequence.tokens, t.joint_attention_dim),
            "timestep": (2,),
            "img_ids": (spec.image_tokens(height, width), axes),
            "txt_ids": (spec.text.sequence.tokens, axes),
        }
        if t.generation == 1:
            shapes |= {"pooled_projections": (2, t.pooled_projection_dim)}
        if spec.takes_guidance and not spec.classifier_free:
            shapes |= {"guidance": (2,)}
        assert signatures.transformer(spec).resolve(shapes)["velocity"] == shapes["hidden_states"]
    read = signatures.BY_COMPONENT[spec.text.sequence.name](spec)
    words = {tensor.name: (1, 9) for tensor in read.inputs}
    assert read.resolve(words)["sequence"] == (1, 9, t.joint_attention_dim)
    if t.generation == 1:
        assert signatures.clip(spec).resolve({"input_ids": (1, 77)})["pooled"] == (1, t.pooled_projection_dim)


def test_signatures_refuse_a_larger_picture() -> None:
    with pytest.raises(ShapeError, match="latent_height from 2 to 64"):
        signatures.vae_decoder(TINY).resolve({"latents": (1, 16, 66, 8)})
    with pytest.raises(ShapeError, match="tokens from 1 to 77"):
        signatures.clip(TINY).resolve({"input_ids": (1, 78)})


@pytest.mark.parametrize("name", ["", "tensorrt_", "TORCH_EAGER", "os", "fluxserve.engines.torch_eager"])
def test_an_unknown_engine(name: str) -> None:
    with pytest.raises(errors.UnknownEngine) as caught:
        open_components(name, Checkpoint(Path("nowhere"), TINY), "cpu", "auto")
    assert str(caught.value) == f"engine: got {name!r}; known engines: {', '.join(sorted(ENGINES))}"


@pytest.mark.parametrize(("kind", "modules"), [("components", WEIGHTS), ("artifact", ARTIFACTS)])
def test_every_engine_can_be_checked_before_it_is_opened(kind: str, modules: dict[str, str]) -> None:
    for name in modules.values():
        engine = import_module(name)
        assert callable(getattr(engine, f"open_{kind}")) and callable(getattr(engine, f"check_{kind}")), name


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads.one():
        yield


@pytest.fixture
def components() -> Components:
    return random_flux.make().components()


def bound(engine: Engine, **shapes: tuple[int, ...]) -> Bound:
    return engine.bind(shapes)


def addresses(b: Bound) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in (*b.inputs.items(), *b.outputs.items())}


def test_bound_tensors_never_move(components: Components) -> None:
    cases = [
        bound(components.text["clip"], input_ids=(1, 77)),
        bound(components.text["t5"], input_ids=(2, 9)),
        bound(components.vae_encoder, pixels=(1, 3, 64, 80)),
        bound(components.vae_decoder, latents=(1, 16, 8, 10)),
    ]
    for b in cases:
        before, seen = addresses(b), set()
        assert len(set(before.values())) == len(before), "no two share memory"
        for seed in (1, 2, 3):
            for tensor in b.inputs.values():
                noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed))
                tensor.copy_(noise * (1 if tensor.is_floating_point() else random_flux.VOCABULARY))
            b.run()
            seen.add(next(iter(b.outputs.values())).numpy().tobytes())
        assert addresses(b) == before
        assert len(seen) == 3, "and every run wrote its result"


def test_two_bounds_of_one_engine_are_apart(components: Components) -> None:
    one, two = (bound(components.text["t5"], input_ids=(1, 9)) for _ in range(2))
    one.run()
    kept = one.outputs["sequence"].clone()
    two.inputs["input_ids"].fill_(7)
    two.run()
    assert torch.equal(one.outputs["sequence"], kept)
    assert not set(addresses(one).values()) & set(addresses(two).values())


def test_dtypes_follow_the_weights(components: Components) -> None:
    b = bound(components.text["clip"], input_ids=(1, 77))
    assert b.inputs["input_ids"].dtype == torch.int64
    assert b.outputs["pooled"].dtype == torch.float32


def test_bind_refuses_what_the_signature_does(components: Components) -> None:
    with pytest.raises(ShapeError):
        bound(components.text["clip"], input_ids=(1, 500))


def test_close_frees_every_engine(components: Components) -> None:
    components.close()
    for engine in components.by_name.values():
        with pytest.raises(AssertionError, match="bind after close"):
            engine.bind({})
