"""A grid of small pictures as one picture a person can see.

Owns: layout, enlarging, captions. Does not own: making the pictures.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SMALLEST_SIDE = 96
"""Pictures are enlarged by a whole factor to about this many pixels: 8 pixels are a speck on a screen."""
GAP = 4
LABEL_HEIGHT = 16
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def enlarged(image: Image.Image, side: int = SMALLEST_SIDE) -> Image.Image:
    """`image` magnified by the whole number that brings its longer side to at least `side` pixels or so."""
    factor = max(1, round(side / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """`images` row by row, `columns` a row; `labels`: a caption above each row, one a row."""
    if not images or columns < 1:
        raise ValueError("a grid needs an image and a column")
    tiles = [enlarged(image.convert("RGB")) for image in images]
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    head = LABEL_HEIGHT if labels is not None else 0
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + head + GAP) + GAP), _PAPER)
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        sheet.paste(tile, (GAP + column * (width + GAP), GAP + row * (height + head + GAP) + head))
    if labels is not None:
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
        for row, label in enumerate(labels[:rows]):
            # The default font has Latin-1 only.
            text = label.encode("latin-1", "replace").decode("latin-1")
            draw.text((GAP, GAP + row * (height + head + GAP) + 2), text, fill=_INK, font=font)
    return sheet
