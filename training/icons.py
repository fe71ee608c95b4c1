"""Icons of the npm package → one array of RGBA pixels. Run: ``python -m training.icons PACKAGE OUT.npz``."""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from training.objects import OBJECTS

SIDE = 192  # pixels stored; every drawing is made by shrinking these
_OVERSAMPLE = 2


def draw_svg(body: str, width: int, height: int) -> np.ndarray:
    """Rasterise the body of one SVG icon.

    Returns: uint8 [SIDE, SIDE, 4], straight (not premultiplied) alpha.
    """
    import resvg_py  # only needed here, so that training itself runs without it

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE * _OVERSAMPLE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def draw_package(package: Path) -> np.ndarray:
    """Rasterise every object of ``OBJECTS``, in order.

    Returns: uint8 [len(OBJECTS), SIDE, SIDE, 4].
    Raises: KeyError if the package has no icon of that name.
    """
    data = json.loads((package / "icons.json").read_text())
    width, height = data.get("width", 32), data.get("height", 32)
    return np.stack([draw_svg(data["icons"][thing.icon]["body"], width, height) for thing in OBJECTS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="folder that holds icons.json")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    icons = draw_package(args.package)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, icons=icons, names=np.array([thing.icon for thing in OBJECTS]))
    print(f"{args.out}: {len(icons)} icons of {SIDE}x{SIDE}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
