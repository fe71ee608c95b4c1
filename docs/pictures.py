"""Draws docs/demo.png, the sheet in the README: `python docs/pictures.py`. Seeds are counted up, none is picked."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fluxserve import Model, Settings

PROMPTS = (
    "a fox on a blue background",
    "a red apple on a white background",
    "a big rocket on a black background",
    "a castle on a pink background",
    "a small penguin on a red background",
    "a guitar on an orange background",
    "a cactus on a purple background",
    "a sailboat on a teal background",
    "a cupcake on a yellow background",
    "an owl on a green background",
)
COLUMNS, TILE, CAPTION, GAP = 5, 128, 28, 6


def main() -> None:
    model = Model.open(Settings(dtype="float32"), device="cpu")
    rows = -(-len(PROMPTS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * (TILE + CAPTION + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place, prompt in enumerate(PROMPTS):
        (drawing,) = model.draw(model.request(prompt, seed=place))
        x, y = GAP + place % COLUMNS * (TILE + GAP), GAP + place // COLUMNS * (TILE + CAPTION + GAP)
        words = "\n".join(textwrap.wrap(prompt, 22))
        pen.multiline_text((x + TILE / 2, y + CAPTION / 2), words, "#333333", font, anchor="mm", align="center")
        sheet.paste(Image.fromarray(drawing.images[0]), (x, y + CAPTION))
    sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.Resampling.LANCZOS).save(
        Path(__file__).with_name("demo.png"), optimize=True
    )


if __name__ == "__main__":
    main()
