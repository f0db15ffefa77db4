"""PIL images as parts of a message: PNG where that loses nothing, else the raw pixels with mode and size."""

from __future__ import annotations

import io
from typing import Any

from nbdeploy_server.arrays import instance_of

# A message may hold this many pixels as PNG, 256 MB as RGBA; more travel raw, so few bytes never claim much memory.
MAX_PNG_PIXELS = 64 * 1024 * 1024
_PNG_MODES = frozenset(("1", "L", "LA", "RGB", "RGBA", "I;16"))
_MODES = _PNG_MODES | {
    *("P", "PA", "I", "F", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16B", "I;16L", "I;16N"),
}
_WITH_PALETTE = frozenset(("P", "PA"))
_AS_JSON = {"P": None, "I": "I;16", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
_IHDR = 24  # a PNG's width and height end here


def is_image(value: object) -> bool:
    """Whether the value is a PIL image."""
    return instance_of(value, "PIL.Image", "Image")


def parts(image: Any, pixels: int) -> list[Any]:
    """Mode, [width, height], palette, transparency, form ("png" or "raw"), data; PNG for at most `pixels` pixels.

    Raises TypeError for modes that PIL cannot rebuild from bytes.
    """
    if image.mode not in _MODES:
        message = f"images of mode {image.mode} cannot be sent; convert to RGB first"
        raise TypeError(message)
    palette = _palette(image) if image.mode in _WITH_PALETTE else None
    transparency = image.info.get("transparency") if palette else None
    head = [image.mode, list(image.size), palette, transparency]
    if 0 < image.width * image.height <= pixels and (image.mode in _PNG_MODES or image.mode == "P"):
        return [*head, "png", _encoded(_indices(image) if image.mode == "P" else image)]
    return [*head, "raw", image.tobytes() if image.width * image.height else b""]


def of(mode: str, size: list[int], palette: Any, transparency: Any, form: str, data: bytes) -> Any:
    """The image of these parts; raises ValueError where they do not fit each other. PIL's own errors pass through."""
    from PIL import Image

    width, height = size
    if mode not in _MODES or type(width) is not int or type(height) is not int or min(width, height) < 0:
        message = "an image has a mode or a size that is not allowed"
        raise ValueError(message)
    plane = "L" if mode == "P" else mode
    if form == "png":
        image = _decoded(data, plane, (width, height))
    elif form == "raw":
        _check_length(mode, width, height, len(data))
        image = Image.frombytes(mode, (width, height), data) if width * height else Image.new(mode, (width, height))
    else:
        message = "an image is described wrongly"
        raise ValueError(message)
    if mode == "P" and form == "png":
        image = Image.frombytes("P", (width, height), image.tobytes())
    if palette is not None and mode in _WITH_PALETTE:
        image.putpalette(bytes(palette[1]), palette[0])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def pixels_of(size: list[int], form: str) -> int:
    """How many pixels an image counts against MAX_PNG_PIXELS."""
    return size[0] * size[1] if form == "png" else 0


def _check_length(mode: str, width: int, height: int, length: int) -> None:
    from PIL import Image

    row = (width + 7) // 8 if mode == "1" else width * len(Image.new(mode, (1, 1)).tobytes())
    if row * height != length:
        message = f"an image of mode {mode} and size {width} x {height} does not fit its {length} bytes"
        raise ValueError(message)


def _palette(image: Any) -> list[Any]:
    mode = image.palette.mode if image.palette is not None and image.palette.mode in {"RGB", "RGBA"} else "RGB"
    return [mode, bytes(image.getpalette(mode) or b"")]


def _indices(image: Any) -> Any:
    """The palette image's indices as grey values: PNG would cut the palette to the colours it thinks are used."""
    from PIL import Image

    return Image.frombytes("L", image.size, image.tobytes())


def _encoded(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=1)  # level 1: the caller waits for this
    return out.getvalue()


def _decoded(data: bytes, mode: str, size: tuple[int, int]) -> Any:
    from PIL import Image

    written = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:_IHDR], "big"))
    if len(data) < _IHDR or written != size:
        message = "an image's size is not the one it is said to have"
        raise ValueError(message)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if image.size != size or image.mode != mode:
            message = "an image's mode or size is not the one it is said to have"
            raise ValueError(message)
        image.load()
        plain = image.copy()
    plain.info = {}
    return plain


def png(image: Any) -> bytes:
    """The image as PNG for JSON; modes that PNG lacks are converted to the nearest that it has.

    Raises TypeError for float images, whose range only their maker knows.
    """
    if image.mode == "F":
        message = "images of mode F have no PNG; return an array or convert to L"
        raise TypeError(message)
    if image.mode in _PNG_MODES:
        return _encoded(image)
    if image.mode.startswith("I;16"):  # in another byte order
        return _encoded(image.convert("I").convert("I;16"))
    target = _AS_JSON.get(image.mode, "RGB")
    return _encoded(image.convert(target) if target else image)
