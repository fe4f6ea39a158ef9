"""Image files: looking at the header, checking that they decode, and turning them into RGB of one size.

Everything a file can be is settled here: EXIF orientation is applied, transparency is composited on white, CMYK,
palette and 16-bit images become 8-bit RGB. A file that is no usable image is a UserError that names it.
"""

from __future__ import annotations

import functools
import hashlib
import mimetypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dopsd_fast.errors import UserError

_NO_DECODER = frozenset("BUFR EPS GRIB HDF5 MPEG PDF WMF".split())
"""Formats that Pillow knows by name but decodes only with another program (EPS runs Ghostscript) or not at all."""
_OTHER_PICTURES = frozenset(
    ".3fr .ai .arw .bpg .cdr .cr2 .cr3 .crw .dcr .djvu .dng .emf .eps .erf .exr .fff .flif .hdr .heic .heics .heif .heifs .hif "
    ".iiq .jxl .jxr .kdc .kra .mef .mrw .nef .nrw .orf .pef .ps .psb .raf .raw .rw2 .sr2 .srf .srw .svg .svgz .wdp .wmf .x3f "
    ".xcf".split()
)
"""Endings of pictures that no decoder of Pillow's reads: camera raws, vector drawings, newer codecs, project files."""

# Larger files are refused from the header alone; about 9459^2, the limit from which Pillow warns.
MAX_PIXELS = 89_478_485
MIN_SIDE = 8

# What load_image does to pixels; part of every digest, so that a change of it makes cached results stale.
_RECIPE = "exif,white,cover,centre,bicubic"

_EXIF_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Endings (small letters, with the dot) of the picture types that the installed Pillow decodes by itself."""
    Image.init()
    opened = Image.OPEN.keys() - _NO_DECODER | {"MPO"}  # which the decoder of JPEG opens
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in opened)


def is_readable(name: str | Path) -> bool:
    """Whether the name's ending is that of a picture that can be read; the case of letters does not matter."""
    return Path(name).suffix.lower() in readable_suffixes()


def is_other_picture(name: str | Path) -> bool:
    """Whether the name's ending is that of a picture of a type that cannot be read."""
    suffix = Path(name).suffix.lower()
    kind = mimetypes.guess_type(f"a{suffix}", strict=False)[0] or ""
    return not is_readable(name) and (suffix in _OTHER_PICTURES or kind.startswith("image/"))


def check_image(path: Path) -> tuple[int, int]:
    """(height, width) as shown, after the whole file was decoded once.

    JPEGs are decoded at an eighth of their size, which reads every byte of the file. Raises what load_image raises.
    """
    with _open(path) as image:
        width, height = image.size
        if _orientation(image) >= 5:
            width, height = height, width
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    return height, width


def load_image(path: Path, height: int, width: int) -> Image.Image:
    """RGB image of exactly height x width: scaled until it covers that size, then cropped at the centre.

    Raises UserError for a file that is missing, empty, truncated, not an image, smaller than 8 pixels on a side, or of
    more than 89 megapixels (refused before decoding).
    """
    with _open(path) as image:
        rgb = to_rgb(image)
        turn = _TURN.get(_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    return ImageOps.fit(rgb, (width, height), Image.Resampling.BICUBIC)


def image_digest(path: Path, height: int, width: int) -> str:
    """Hex hash of what load_image(path, height, width) returns: of the file's bytes, the size and how it is cropped."""
    hasher = hashlib.sha256(f"{_RECIPE}|{height}x{width}|".encode())
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}") from None
    return hasher.hexdigest()


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """The opened, not yet decoded image; whatever its decoder raises inside the block becomes a UserError."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"image {path} is empty (0 bytes)")
        _silence_size_warning()
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(_too_large(path, f"{image.width} x {image.height} pixels"))
            if min(image.size) < MIN_SIDE:
                raise UserError(
                    f"image {path} is {image.width} x {image.height} pixels: too small to train on, "
                    f"{MIN_SIDE} on each side is the least"
                )
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"image {path} is a folder") from None
    except PermissionError:
        raise UserError(f"image {path} cannot be read: permission denied") from None
    except Image.DecompressionBombError:
        raise UserError(_too_large(path, "far too many pixels")) from None
    except Image.UnidentifiedImageError:
        raise UserError(f"image {path} is not an image of a known format, or its header is damaged") from None
    except MemoryError:
        raise UserError(f"image {path} does not fit into memory") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error, ...
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"image {path} cannot be read: {error.strerror}") from None
        raise UserError(f"image {path} is truncated or damaged: {error}") from None


def _silence_size_warning() -> None:
    """Pillow warns from MAX_PIXELS on, where files are refused here. Not undone: filters belong to all threads."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _too_large(path: Path, size: str) -> str:
    return f"image {path} has {size}, {MAX_PIXELS} is the most (it may be a decompression bomb): scale it down"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF: the picture itself may be whole
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_8_bit(image).convert("RGB")
    if image.has_transparency_data or image.mode in ("La", "RGBa", "PA"):
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits: 0..65535 for integers, 0..1 for floats, or 0..255 where a value shows that range.

    Pillow's own conversion clips at 255 and turns such pictures white.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        top = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    else:
        top = 65535.0
    return Image.fromarray(np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8))
