"""What benchmarks.calibration compares: the methods are what their names say, and the table has a place for each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fluxserve_export import fp8
from fluxserve_export.calibrate import Histogram
from torch import Tensor, nn

from benchmarks import calibration, scale_methods
from benchmarks.scale_methods import BOUND, CANDIDATES, LUCK, MAX, TARGETS, Method, Recipe, Seen
from fluxserve.folders.artifact import Ranges

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "tiny"
COMPONENTS = ("transformer", "t5", "clip", "vae_decoder", "vae_encoder")
Run = tuple[calibration.Model, dict[str, Seen], dict[str, list[calibration.Call]], Tensor]


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run() -> Run:
    """The tiny model, watched on one prompt and captured on two others, two steps each."""
    model = calibration.Model(CHECKPOINT, rows=2)
    seen = calibration.calibrated(model, ["a fox on a blue background"], steps=2)
    return model, seen, *calibration.captured(model, ["a red apple", "an owl on pink"], steps=2)


def outlier_layer(kind: str) -> tuple[nn.Module, Tensor, Seen]:
    """A layer with rows and columns of very different size, an input with such channels, and what was seen of it."""
    torch.manual_seed(0)
    sizes = torch.logspace(-3, 3, 16)
    if kind == "linear":
        layer, x = nn.Linear(16, 8), torch.randn(4, 10, 16) * sizes
    else:
        layer, x = nn.Conv2d(16, 8, 3, padding=1), torch.randn(4, 16, 6, 5) * sizes[:, None, None]
    with torch.no_grad():
        layer.weight *= torch.logspace(-4, 1, 8).view([-1] + [1] * (layer.weight.dim() - 1))
    seen = Seen()
    seen.see("layer", x)
    return layer.requires_grad_(False), x, seen


def call(layer: nn.Module, made: Recipe, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return nn.functional.conv2d(made.input(x), made.weight, layer.bias, padding=1)
    return nn.functional.linear(made.input(x), made.weight, layer.bias)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("alpha", [0.5, 0.75])
def test_smoothquant_is_exact_without_quantisation(kind: str, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, seen = outlier_layer(kind)
    monkeypatch.setattr(fp8, "fake_quantise", lambda values, _: values)
    made = scale_methods.recipe("layer", layer, seen, Method("smooth", alpha=alpha))
    assert made.smooth is not None
    assert not torch.allclose(made.weight, layer.weight)
    torch.testing.assert_close(call(layer, made, x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_smoothquant_balances_inputs_and_weights(kind: str) -> None:
    """At α = 0.5 a channel's largest input and its column's largest weight are the same afterwards."""
    layer, _, seen = outlier_layer(kind)
    smooth = scale_methods.migration(seen.channels["layer"], layer.weight, 0.5)
    columns = layer.weight.abs().transpose(0, 1).flatten(1).amax(1)
    torch.testing.assert_close(seen.channels["layer"] / smooth, columns * smooth)


def test_smoothquant_leaves_channels_that_were_never_seen() -> None:
    smooth = scale_methods.migration(torch.tensor([0.0, 4.0]), torch.ones(3, 2), 0.5)
    assert smooth.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_weights_per_channel_err_less_where_rows_differ(kind: str) -> None:
    """Each row's relative error. A hundred-thousandth of the tensor's maximum is below E4M3's normal numbers."""
    layer, _, seen = outlier_layer(kind)

    def errors(method: Method) -> Tensor:
        quantised = scale_methods.recipe("layer", layer, seen, method).weight
        return (quantised - layer.weight).flatten(1).norm(dim=1) / layer.weight.flatten(1).norm(dim=1)

    whole, rows = errors(MAX), errors(Method("rows", per_channel=True))
    assert rows.mean() <= whole.mean()
    assert rows[0] < 0.05 < whole[0]


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e6])
def test_least_mse_is_never_worse_than_max(outlier: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(50_000)
    x[0] = outlier
    seen = Histogram()
    seen.see(x)
    amax, largest = scale_methods.mse_amax(seen), seen.amax("max")
    chosen, plain = (float((fp8.fake_quantise(x, a) - x).square().mean()) for a in (amax, largest))
    assert amax <= largest
    assert chosen <= plain


def test_least_mse_clips_where_that_pays() -> None:
    """With amax at 1, values around 0.607 fall midway between two of E4M3's; clipping the lone 1 moves the grid."""
    torch.manual_seed(0)
    x = torch.cat([0.607 * (0.98 + 0.04 * torch.rand(10_000)), torch.tensor([1.0])])
    seen = Histogram()
    seen.see(x)
    amax = scale_methods.mse_amax(seen)
    chosen, plain = (float((fp8.fake_quantise(x, a) - x).square().mean()) for a in (amax, 1.0))
    assert amax < 1
    assert chosen < plain / 2


@pytest.mark.parametrize("name", ["t5", "clip", "transformer both"])
def test_max_is_what_an_export_does(name: str, run: Run) -> None:
    model, seen, calls, _ = run
    target = TARGETS[name]
    component, module = target.component, model.modules[target.component]
    ranges = seen[component]
    attention = {n: tuple(r.amax("max") for r in q_k_v) for n, q_k_v in ranges.attention.items()}
    measured = Ranges({n: r.amax("max") for n, r in ranges.layers.items()}, attention, {})  # type: ignore[arg-type]
    before = model.run(component, calls[component][0])
    with fp8.simulated(component, module, measured):
        expected = model.run(component, calls[component][0])
    with scale_methods.quantised(target, module, ranges, MAX):
        got = model.run(component, calls[component][0])
    assert torch.equal(got[0], expected[0])
    assert not torch.equal(got[0], before[0])
    assert torch.equal(model.run(component, calls[component][0])[0], before[0]), "the module is left as it was"


def test_the_table_has_every_method_and_component(run: Run) -> None:
    model, seen, calls, images = run
    errors = calibration.component_errors(model, seen, calls)
    assert errors.keys() == TARGETS.keys()
    for name, found in errors.items():
        attention_only = name == "transformer attention"
        methods = {m.name for m in (*CANDIDATES, BOUND, *LUCK) if not attention_only or not (m.alpha or m.per_channel)}
        assert found.keys() == methods | {BOUND.name}
        assert all((values > 0).all() and (values < 1).all() for values in found.values())
    components = {name: calibration.summary(found) for name, found in errors.items()}
    lines = calibration.error_table(components).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:] if "draws" not in line] == [
        m.name for m in (*CANDIDATES, BOUND)
    ]
    assert lines[0].strip("| ").split(" | ") == ["method", *TARGETS]
    assert len({line.count("|") for line in lines}) == 1
    assert images.shape == (2, 128, 128, 3)


def test_a_verdict_needs_more_than_luck_and_more_than_the_spread() -> None:
    base = torch.linspace(1, 2, 10)
    alike = {m.name: base.clone() for m in (*CANDIDATES, BOUND, *LUCK)}
    wobble = 1 + 0.2 * torch.tensor([1.0, -1.0]).repeat(5)
    alike["percentile 99.9"] = base * 1.5
    alike["least MSE"] = base * 0.8
    alike["SmoothQuant 0.5"] = base * 0.9 * wobble
    methods = calibration.summary(alike)["methods"]
    assert {name: of["verdict"] for name, of in methods.items() if of["verdict"] != "like max"} == {
        "percentile 99.9": "worse",
        "least MSE": "better",
    }
    assert calibration.summary(alike)["best"] == "least MSE"
    lucky = alike | {LUCK[3].name: base * 0.7}
    assert calibration.summary(lucky)["methods"]["least MSE"]["verdict"] == "like max"


def test_distance_and_psnr() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    got = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert calibration.distance((got,), (expected,)).tolist() == [0.0, 0.5]
    assert calibration.distance((got, got), (expected, expected)).tolist() == pytest.approx([0.0, 0.5])
    black, grey = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    assert calibration.psnr(black, grey).tolist() == pytest.approx([0.0])
    assert calibration.psnr(black, black).isfinite().all()
