"""benchmarks.distance without a model: its measures, what it makes of them, what it writes into a manifest."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fluxserve_export.manifest import add_quality
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import closeness, distance, distance_report
from benchmarks.closeness import Measure, judges_features, measures, ms_ssim, read_features, summary
from benchmarks.distance import Asked, Drawn, Model, models_of
from benchmarks.sheet import Row, difference, sheet
from fluxserve.errors import ArtifactError, SettingsError
from fluxserve.families.flux.models import TINY
from fluxserve.folders import artifact as artifacts
from fluxserve.folders.artifact import MANIFEST
from tests.support import artifacts as made

WAYS = ("psnr", "ms_ssim", "judge", "AlexNet", "VGG16")


def picture(side: int = 128) -> Tensor:
    """Smooth shapes and colours: uint8 [side, side, 3]."""
    line = torch.linspace(0, 9, side)
    waves = torch.stack([torch.sin(line[:, None] * k + line[None] * (3 - k)) for k in (1, 2, 3)], 2)
    return (waves * 100 + 128).round().to(torch.uint8)


def noised(clean: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    return (clean + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def network(name: str) -> nn.Sequential:
    """torchvision's `features` of a network, narrow and with random weights."""
    torch.manual_seed(3)
    if name == "AlexNet":
        return nn.Sequential(
            nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(8, 12, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
    layers: list[nn.Module] = []
    for count in (2, 2, 3, 3, 3):
        for _ in range(count):
            layers += [nn.Conv2d(8 if layers else 3, 8, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


LISTENED = {"AlexNet": (1, 4, 7, 9, 11), "VGG16": (3, 8, 15, 22, 29)}
"""Where lpips takes its features from, by torchvision's numbers."""


def save(folder: Path, name: str, **more: Tensor) -> Path:
    file = folder / f"{name}.safetensors"
    weights = {f"features.{key}": value for key, value in network(name).state_dict().items()}
    save_file({**weights, "classifier.1.weight": torch.zeros(2, 2), **more}, file)
    return file


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Measure:
    if request.param in LISTENED:
        return measures(read_features(save(tmp_path, request.param)))[-1]
    by_name = {each.key: each for each in measures(judges_features())}
    return by_name[{"judge": "features"}.get(request.param, request.param)]


# --- one picture -----------------------------------------------------------------------------------------------------


def test_equal_pictures(way: Measure) -> None:
    expected = {"psnr": 99.0, "ms_ssim": 1.0, "features": 0.0}[way.key]
    assert way.of(picture(), picture()) == pytest.approx(expected, abs=1e-9)


def test_the_order_of_two_pictures_makes_no_difference(way: Measure) -> None:
    a, b = picture(), noised(picture(), 20)
    assert way.of(a, b) == pytest.approx(way.of(b, a), rel=1e-6)
    assert way.of(a, b) != pytest.approx(way.of(a, a), rel=1e-3)


def test_more_noise_is_farther(way: Measure) -> None:
    values = [way.of(picture(), noised(picture(), sigma)) for sigma in (1, 4, 16, 64)]
    assert values == sorted(values, reverse=way.larger_is_closer)
    assert abs(values[-1] - values[0]) > 0.05


def test_psnr_of_a_known_error() -> None:
    flat = torch.full((32, 48, 3), 100, dtype=torch.uint8)
    psnr = measures(None)[0]
    assert psnr.of(flat, flat + 16) == pytest.approx(10 * math.log10(255**2 / 16**2))
    assert psnr.of(torch.zeros_like(flat), torch.full_like(flat, 255)) == pytest.approx(0)


@pytest.mark.parametrize(("side", "scales"), [(16, 1), (128, 4), (176, 5), (512, 5)])
def test_ms_ssim_of_two_shades(side: int, scales: int) -> None:
    """Flat pictures have the same structure; the coarsest scale alone sees light, with its share of the weights."""
    dark, light = (torch.full((side, 2 * side, 3), v, dtype=torch.uint8) for v in (100, 180))
    a, b = 100 / 255, 180 / 255
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    expected = ((2 * a * b + 1e-4) / (a * a + b * b + 1e-4)) ** (weights[-1] / sum(weights))
    assert ms_ssim(dark, light) == pytest.approx(expected, rel=1e-6)


def test_ms_ssim_of_a_negative_is_nothing() -> None:
    assert ms_ssim(picture(), 255 - picture()) == 0


def test_ms_ssim_needs_a_window() -> None:
    with pytest.raises(ValueError, match="got 10x64; expected sides of 11 pixels or more"):
        ms_ssim(torch.zeros(10, 64, 3, dtype=torch.uint8), torch.zeros(10, 64, 3, dtype=torch.uint8))


@pytest.mark.parametrize("name", LISTENED)
def test_features_are_compared_as_lpips_does_it(name: str, tmp_path: Path) -> None:
    """Spelled out on torchvision's own layers, with lpips' shift and scale; then with weights of channels."""
    a, b, net = picture(), noised(picture(), 30), network(name)
    expected, weighted, lin = 0.0, 0.0, {}
    taps = []
    for each in (a, b):
        x = (each.permute(2, 0, 1)[None] / 127.5 - 1 - torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]) / (
            torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
        )
        taps.append([x := layer(x).detach() for layer in net])
    for depth, index in enumerate(LISTENED[name]):
        x, y = (each[index] / each[index].norm(dim=1, keepdim=True).clamp(min=1e-10) for each in taps)
        weight = torch.rand(1, x.shape[1], 1, 1)
        lin[f"lin{depth}.model.1.weight"] = weight
        expected += float(((x - y) ** 2).sum(1).mean())
        weighted += float(((x - y) ** 2 * weight).sum(1).mean())
    plain, learned = read_features(save(tmp_path, name)), read_features(save(tmp_path, name, **lin))
    assert (plain.title, learned.title) == (f"LPIPS-style, unweighted, features of {name}", f"LPIPS, {name}")
    assert plain.distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert learned.distance(a, b) == pytest.approx(weighted, rel=1e-4)


def test_files_of_other_networks_are_refused(tmp_path: Path) -> None:
    other, text = tmp_path / "other.safetensors", tmp_path / "text.safetensors"
    save_file({f"features.{k}.{n}": torch.zeros(3, 3, 1, 1) for k in range(4) for n in ("weight", "bias")}, other)
    text.write_text("no tensors")
    for file in (other, text, tmp_path / "missing.safetensors"):
        with pytest.raises(SettingsError, match=r"features: got .*AlexNet"):
            read_features(file)


def test_measures_disagree() -> None:
    """Why there are three: one PSNR, and structure and features differ about what is worse."""
    psnr, structure, features = measures(judges_features())
    shaded, noise = picture() - 12, noised(picture(), 12)
    assert psnr.of(picture(), shaded) == pytest.approx(psnr.of(picture(), noise), abs=0.5)
    assert structure.of(picture(), shaded) > 0.995 > structure.of(picture(), noise)
    assert features.of(picture(), shaded) > 2 * features.of(picture(), noise)


# --- many pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("larger_is_closer", "worst"), [(True, 0), (False, 10)])
def test_summary(larger_is_closer: bool, worst: int) -> None:
    way = Measure("any", "any", larger_is_closer, lambda a, b: 0.0)
    prompts, seeds = [f"prompt {k}" for k in range(11)], list(range(100, 111))
    values = [10.0 * k for k in range(11)]
    assert summary(values, way, prompts, seeds) == {
        "median": 50, "p10": 10, "p90": 90, "worst": 10 * worst, "prompt": f"prompt {worst}", "seed": 100 + worst,
    }  # fmt: skip


@pytest.mark.parametrize(("larger_is_closer", "expected"), [(True, 3), (False, 4)])
def test_pictures_stray_as_far_as_other_seeds(larger_is_closer: bool, expected: int) -> None:
    """0, 1, 2 are no closer than 2; 7, 8, 9, 10 no closer than 7."""
    way = Measure("any", "any", larger_is_closer, lambda a, b: 0.0)
    yardstick = {"p10": 1.0, "p90": 2.0} if larger_is_closer else {"p10": 7.0, "p90": 9.0}
    assert closeness.strayed([float(k) for k in range(11)], way, yardstick) == expected


def test_pictures_are_compared_one_by_one() -> None:
    a = torch.stack([picture(), picture()])
    b = torch.stack([picture(), noised(picture(), 30)])
    found = closeness.compare(a, b, measures(None), "cpu")
    assert found["psnr"][0] == 99 and found["psnr"][1] < 25
    assert found["ms_ssim"][0] == pytest.approx(1) and found["ms_ssim"][1] < 0.99


def test_prompts_of_a_file_are_drawn_again_from_other_seeds(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# few\na fox\nan owl\n")
    (asked,) = distance.file_set(file, 5)
    assert asked.prompts == ["a fox", "an owl", "a fox", "an owl", "a fox"]
    assert len(set(asked.seeds)) == 5 and asked.pairs == []


def test_there_are_only_so_many_pairs_that_are_held_out() -> None:
    assert [len(each.prompts) for each in distance.tiny_sets(240)] == [240, 240]
    with pytest.raises(SettingsError, match="n: got 241; allowed: at most 240"):
        distance.tiny_sets(241)


# --- accuracy --------------------------------------------------------------------------------------------------------


def judged_as(monkeypatch: pytest.MonkeyPatch, *, pairs: bool = True, **right: tuple[str, float]) -> list[dict]:
    """What is said of models by name, given each one's precision and how often it draws the right object."""
    rates = dict(enumerate(right.values()))

    def score(pictures: Tensor, *_: object) -> dict[str, Any]:
        return {"object": rates[int(pictures[0, 0, 0, 0])][1], "colour": 1.0, "wrong": []}

    monkeypatch.setattr(distance, "score", score)
    drawn = [
        Drawn(Model(name, precision, {}, "cpu", TINY), torch.full((4, 1, 1, 3), index, dtype=torch.uint8), 1.0)
        for index, (name, (precision, _)) in enumerate(right.items())
    ]
    sets = [Asked(which, ["a fox"] * 2, [1, 2], [(0, 0)] * 2 if pairs else []) for which in ("seen", "held_out")]
    return models_of(drawn, sets)


@pytest.mark.parametrize(("rate", "passed"), [(1.0, True), (0.995, True), (0.99, True), (0.985, False)])
def test_fp8_may_lose_one_point(rate: float, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, low = judged_as(monkeypatch, full=("fp32", 1.0), low=("fp8", rate))
    assert low["points"]["seen"] == {"object": pytest.approx(100 * rate - 100), "colour": 0}
    assert low["passed"] is passed and "passed" not in reference
    expected = "passed: FP8 lost no more than 1 point of accuracy"
    failed = "FAILED: low lost more than 1 point of accuracy"
    assert distance_report.verdict([reference, low]) == (expected if passed else failed)


def test_only_fp8_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged_as(monkeypatch, full=("fp32", 1.0), half=("bf16", 0.5))
    assert not any("passed" in entry for entry in found)
    assert distance_report.verdict(found).endswith("not decided; no FP8 model was compared")


def test_pictures_that_nobody_can_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged_as(monkeypatch, pairs=False, full=("fp32", 1.0), low=("fp8", 0.0))
    assert not any("passed" in entry for entry in found)
    assert distance_report.verdict(found).endswith("not decided; no judge knows these pictures")


# --- what is kept and shown ------------------------------------------------------------------------------------------

NUMBERS = {"median": 30.0, "p10": 20.0, "p90": 40.0, "worst": 10.0}


def result() -> dict[str, Any]:
    """Of three models, the last of which is an FP8 artifact."""
    names = ["torch_eager fp32", "torch_eager bf16", "onnxruntime fp8"]
    yardstick = {"psnr": {**NUMBERS, "prompt": "a fox", "seed": 3}}
    distances = {"psnr": {**yardstick["psnr"], "strayed": 1}}
    rates = {"object": 0.99, "colour": 1.0}
    models = [
        {
            "model": name,
            "device": "cpu",
            "reference": not index,
            "accuracy": {"seen": {**rates, "wrong": ["a fox"]}},
            "points": {"seen": {"object": -float(index), "colour": 0.0}},
            **({"passed": True} if name.endswith("fp8") else {}),
        }
        for index, name in enumerate(names)
    ]
    pairs = [{"models": [names[a], names[b]], "equal": a, "distances": distances} for a, b in ((0, 1), (0, 2), (1, 2))]
    return {
        "when": "2026-01-02T03:04:05+00:00", "commit": "unknown",
        "pictures": 8, "prompts": 8, "prompts_sha256": "0" * 64, "steps": 20, "guidance": 3.0, "size": [128, 128],
        "measures": {"psnr": "PSNR"}, "models": models, "pairs": pairs, "yardstick": {"pictures": 2, **yardstick},
    }  # fmt: skip


def test_a_manifest_says_what_was_measured(tmp_path: Path) -> None:
    folder = made.write(tmp_path / "tiny")
    for _ in range(2):
        add_quality(folder, distance_report.entry_for(2, result()))
    first, second = artifacts.read(folder).manifest["quality"]
    assert first == second
    assert first["against"] == [
        {"model": "torch_eager fp32", "reference": True, "equal": 0, "distances": {"psnr": {**NUMBERS, "strayed": 1}}},
        {"model": "torch_eager bf16", "reference": False, "equal": 1, "distances": {"psnr": {**NUMBERS, "strayed": 1}}},
    ]
    assert first["accuracy"] == {"seen": {"object": 0.99, "colour": 1.0}}
    assert first["points"] == {"seen": {"object": -2.0, "colour": 0.0}}
    assert (first["passed"], first["yardstick"], first["device"]) == (True, {"psnr": NUMBERS}, "cpu")


def test_a_manifest_of_a_model_that_nobody_can_judge(tmp_path: Path) -> None:
    found = result()
    for entry in found["models"]:
        entry["accuracy"] = entry["points"] = {}
        entry.pop("passed", None)
    add_quality(folder := made.write(tmp_path / "tiny"), distance_report.entry_for(2, found))
    (entry,) = artifacts.read(folder).manifest["quality"]
    assert not {"accuracy", "points", "passed"} & set(entry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passed": "yes"}, r"quality\[0\].passed"),
        ({"steps": 0}, r"quality\[0\].steps"),
        ({"mood": "good"}, "mood"),
        ({"yardstick": {"psnr": {"median": 1.0}}}, r"quality\[0\].yardstick.psnr"),
        ({"yardstick": {"psnr": {**NUMBERS, "worst": float("nan")}}}, r"quality\[0\].yardstick.psnr.worst"),
    ],
)
def test_what_the_schema_does_not_know_is_not_written(change: dict, message: str, tmp_path: Path) -> None:
    folder = made.write(tmp_path / "tiny")
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ArtifactError, match=message):
        add_quality(folder, {**distance_report.entry_for(2, result()), **change})
    assert (folder / MANIFEST).read_bytes() == before


def test_the_table_names_what_it_shows() -> None:
    said = distance_report.table(result())
    assert "onnxruntime fp8 – torch_eager bf16 (1 equal)" in said and "same prompt, other seed (2)" in said
    assert said.count("30.00    20.00    40.00    10.00        1  3 a fox") == 3
    assert said.count("30.00    20.00    40.00    10.00           3 a fox") == 1
    assert "onnxruntime fp8     seen: object 99.0%, colour 100.0% (-2.0, +0.0 points)" in said


def test_a_sheet_shows_every_picture_and_what_differs() -> None:
    black, grey = (torch.full((64, 96, 3), value, dtype=torch.uint8) for value in (0, 10))
    assert difference(black, grey).unique().tolist() == [80] == difference(grey, black).unique().tolist()
    assert difference(black, grey * 5).unique().tolist() == [255]
    image = sheet(["one", "two"], [Row("a fox", [black, grey]), Row("an owl", [grey, black])])
    assert image.size == (8 + 2 * (4 * 96 + 8), 22 + 2 * (22 + 4 * 64 + 8))
    last = (image.width - 9, image.height - 9)
    assert image.getpixel(last) == (0, 0, 0) and image.getpixel((8, image.height - 9)) == (10, 10, 10)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bfloat16", "bfloat16"], "models: got 'torch_eager fp32, torch_eager bf16, torch_eager bf16'; allowed: each"),
        (["float32"], "models: got 'torch_eager fp32, torch_eager fp32'; allowed: each"),
        (["bfloat16", "--write"], "write: got 'torch_eager fp32, torch_eager bf16'; allowed: an artifact"),
        (["bfloat16", "--size", "128", "100"], "width: got 100"),
        (["bfloat16", "--steps", "0"], "num_inference_steps: got 0"),
        (["bfloat16", "--n", "0"], "--n, --batch, --yardstick: expected 1 or more"),
        (["bfloat16", "--json", "/nowhere/at/all.json"], "/nowhere/at: no such folder"),
        (["nowhere"], "nowhere/manifest.json: missing; expected an artifact"),
        (["quick:bfloat16"], "quick"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_anything_is_drawn(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distance, "draw", lambda *_: pytest.fail("it was drawn"))
    with pytest.raises(SystemExit) as ended:
        distance.main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2 and message in said.err


def test_an_artifact_of_another_size_is_refused_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes up to 256 pixels, and the checkpoint to 512."""
    folder = made.write(tmp_path / "tiny")
    with pytest.raises(SystemExit):
        distance.main([str(folder), "--size", "512", "512"])
    assert "height: got 512" in capsys.readouterr().err
    assert "quality" not in json.loads((folder / MANIFEST).read_text())
