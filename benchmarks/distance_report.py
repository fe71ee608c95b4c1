"""What benchmarks.distance found: a table and a sheet for people, an entry for an artifact's manifest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.closeness import NUMBERS, Measure, by_distance
from benchmarks.sheet import AMPLIFIED, Row, difference, sheet

POINTS_ALLOWED = 1.0
"""Hundredths of accuracy that FP8 may lose."""

Found = dict[str, Any]

_WIDTH, _PROMPT = 68, 60  # characters


def table(result: Found) -> str:
    """For people."""
    lines = []
    for key, title in result["measures"].items():
        heads = "".join(f"{head:>9}" for head in NUMBERS)
        lines.append(f"{title:<{_WIDTH}}{heads}{'strayed':>9}  the worst one's seed and prompt")
        rows = [(_versus(pair), pair["distances"][key]) for pair in result["pairs"]]
        rows.append((f"same prompt, other seed ({result['yardstick']['pictures']})", result["yardstick"][key]))
        for name, found in rows:
            numbers = "".join(f"{found[head]:>9.{2 if key == 'psnr' else 4}f}" for head in NUMBERS)
            picture = f"{found['seed']} {found['prompt'][:_PROMPT]}"
            lines.append(f"  {name:<{_WIDTH - 2}}{numbers}{found.get('strayed', ''):>9}  {picture}")
    return "\n".join([*lines, *map(_accuracy, result["models"])])


def _versus(pair: Found) -> str:
    first, second = pair["models"]
    return f"{second} – {first}" + (f" ({pair['equal']} equal)" if pair["equal"] else "")


def _accuracy(entry: Found) -> str:
    """By set of prompts, behind one another."""
    said = []
    for which, found in entry["accuracy"].items():
        more = entry["points"][which]
        points = "" if entry["reference"] else f" ({more['object']:+.1f}, {more['colour']:+.1f} points)"
        said.append(f"{which}: object {100 * found['object']:.1f}%, colour {100 * found['colour']:.1f}%{points}")
    return f"{entry['model']:<20}" + "; ".join(said or ["accuracy: no judge knows these pictures"])


def verdict(entries: Sequence[Found]) -> str:
    """One line on FP8's accuracy."""
    reference, low = entries[0], [entry for entry in entries if "passed" in entry]
    if not low:
        why = "no FP8 model was compared" if reference["accuracy"] else "no judge knows these pictures"
        return f"accuracy of FP8: not decided; {why}"
    failed = [entry["model"] for entry in low if not entry["passed"]]
    if failed:
        return f"FAILED: {', '.join(failed)} lost more than {POINTS_ALLOWED:g} point of accuracy"
    return f"passed: FP8 lost no more than {POINTS_ALLOWED:g} point of accuracy"


def contact_sheet(
    models: Sequence[str],
    pictures: Sequence[Tensor],
    prompts: Sequence[str],
    far: Sequence[Sequence[float]],
    way: Measure,
    file: Path,
) -> None:
    """The median and the worst picture of each model against the reference, beside all others' of that prompt.

    Args:
        models: their names, the reference first.
        pictures: of each, uint8 [N, H, W, 3].
        far: of each but the reference, how far every picture is from the reference's, by `way`.
    """
    others, rows = models[1:], []
    columns = [*models, *(f"{name}: |difference| x {AMPLIFIED}" for name in others)]
    for name, values in zip(others, far, strict=True):
        order = by_distance(values, way)
        for which, index in (("median", order[len(order) // 2]), ("worst", order[-1])):
            title = f"{name}, {which}, {way.key} {values[index]:.4g}: {prompts[index]}"
            shown = [each[index] for each in pictures]
            rows.append(Row(title, [*shown, *(difference(shown[0], each) for each in shown[1:])]))
    sheet(columns, rows).save(file, "PNG")


def entry_for(index: int, result: Found) -> Found:
    """What is said of a model in its artifact's manifest."""
    own, models = result["models"][index], result["models"]
    against = [
        {
            "model": next(name for name in pair["models"] if name != own["model"]),
            "reference": models[0]["model"] in pair["models"],
            "equal": pair["equal"],
            "distances": {key: _numbers(found) for key, found in pair["distances"].items()},
        }
        for pair in result["pairs"]
        if own["model"] in pair["models"]
    ]
    kept = ("when", "commit", "pictures", "prompts", "prompts_sha256", "steps", "guidance", "size", "measures")
    entry: Found = {name: result[name] for name in kept} | {"device": own["device"], "against": against}
    entry["yardstick"] = {key: _numbers(result["yardstick"][key]) for key in result["measures"]}
    if own["accuracy"]:
        rates = {which: {k: found[k] for k in ("object", "colour")} for which, found in own["accuracy"].items()}
        entry |= {"accuracy": rates, "points": own["points"]}
    return entry | ({"passed": own["passed"]} if "passed" in own else {})


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in (*NUMBERS, "strayed") if name in found}
