"""Turning image files of unknown make into equal squares of bytes.

Owns: safe decoding (a whitelist of formats, a pixel cap), orientation, transparency, cropping and resizing.
Does not own: where images come from (`sources`).
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# A few megabytes of file can decode to gigabytes ("decompression bomb").
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 64 << 20
# Only raster formats Pillow decodes itself: EPS, for one, would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"})

# What Pillow raises on damaged files, by its decoders (SyntaxError: broken PNG chunks).
_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError,
    OverflowError, MemoryError, UserWarning, Image.DecompressionBombError,
)  # fmt: skip

RawImage = bytes | Path | NDArray[np.uint8]
"""An image as a source yields it: file contents, a file's path, or grey levels (H, W)."""


class UnreadableImageError(Exception):
    """This image cannot be used; the message says why. The caller skips it."""


def image_size(raw: RawImage) -> tuple[int, int]:
    """Width and height in pixels, from the header alone. Raises `UnreadableImageError`."""
    if isinstance(raw, np.ndarray):
        return raw.shape[1], raw.shape[0]
    return _open(raw).size


def square(raw: RawImage, side: int) -> NDArray[np.uint8]:
    """The image cropped to its central square and resized to (side, side, 3); transparency becomes white.

    Raises `UnreadableImageError`.
    """
    image = Image.fromarray(raw) if isinstance(raw, np.ndarray) else _open(raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # truncated data and the like: skip such an image
            whole = _on_white(ImageOps.exif_transpose(image))
            fitted = ImageOps.fit(whole, (side, side), Image.Resampling.BICUBIC)
            return np.asarray(fitted, dtype=np.uint8)
    except _DAMAGED as error:
        raise UnreadableImageError(f"damaged image: {error}") from None


def _open(raw: bytes | Path) -> Image.Image:
    data = raw if isinstance(raw, bytes) else _read(raw)
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableImageError(f"the file has more than {MAX_FILE_BYTES} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; the size is checked below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except _DAMAGED as error:
        detail = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise UnreadableImageError(f"not a readable {'/'.join(FORMATS)} image{detail}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width}x{height} pixels are more than {MAX_PIXELS}")
    return image


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnreadableImageError(f"cannot be read: {error.strerror}") from None


def _on_white(image: Image.Image) -> Image.Image:
    """As RGB, transparent parts over white, 16-bit grey scaled to 8."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image, dtype=np.float32)
        image = Image.fromarray((deep / 257).round().astype(np.uint8))
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB")
