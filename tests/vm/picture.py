#!/usr/bin/env python3
"""Compares pictures pixel by pixel: PPM (P6) and PNG (8-bit RGB or RGBA, not interlaced).

    picture.py compare A B     exit 0 same, 1 different, 2 unreadable; alpha is ignored
    picture.py hash A          sha256 of size and pixels, the same for PPM and PNG
    picture.py convert A B     writes B as .ppm or .png
    picture.py info A          size, colours, the colour of the middle pixel
"""

import argparse
import hashlib
import re
import struct
import sys
import zlib


class PictureError(Exception):
    """A file that is not a picture of the kinds above."""


class Picture:
    """Width, height, and rows of RGB bytes from the top left."""

    def __init__(self, width, height, rgb):
        if len(rgb) != width * height * 3:
            raise PictureError(f"{width}x{height} needs {width * height * 3} bytes of RGB, there are {len(rgb)}")
        self.width, self.height, self.rgb = width, height, bytes(rgb)

    def pixel(self, x, y):
        at = 3 * (y * self.width + x)
        return tuple(self.rgb[at:at + 3])

    def hash(self):
        return hashlib.sha256(b"%d %d\n" % (self.width, self.height) + self.rgb).hexdigest()

    def colours(self):
        return len({self.rgb[at:at + 3] for at in range(0, len(self.rgb), 3)})

    def differences(self, other):
        """(number of pixels that differ, (x, y) of the first or None); sizes must be equal."""
        if (self.width, self.height) != (other.width, other.height):
            raise PictureError(f"sizes differ: {self.width}x{self.height} and {other.width}x{other.height}")
        count, first, stride = 0, None, self.width * 3
        for y in range(self.height):
            mine, theirs = (p.rgb[y * stride:(y + 1) * stride] for p in (self, other))
            if mine == theirs:
                continue
            for x in range(self.width):
                if mine[3 * x:3 * x + 3] != theirs[3 * x:3 * x + 3]:
                    first = first or (x, y)
                    count += 1
        return count, first


# --- reading --------------------------------------------------------------------------------

def load(path):
    try:
        with open(path, "rb") as file:
            data = file.read()
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return decode_png(data)
        if data.startswith(b"P6"):
            return decode_ppm(data)
        raise PictureError(f"begins with {data[:8]!r}; PPM (P6) and PNG are known")
    except (OSError, PictureError, struct.error, zlib.error) as problem:
        raise PictureError(f"{path}: {problem}") from None


def decode_ppm(data):
    header = re.match(rb"P6(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s", data)
    if not header:
        raise PictureError("broken PPM header")
    width, height, depth = (int(number) for number in header.groups())
    if depth != 255:
        raise PictureError(f"PPM with {depth} as the largest value; only 255 is known")
    return Picture(width, height, data[header.end():header.end() + width * height * 3])


def png_chunks(data):
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8:at + 8 + length]
        if len(body) != length:
            raise PictureError(f"PNG chunk {kind!r} at {at} wants {length} bytes, {len(body)} are left")
        (crc,) = struct.unpack_from(">I", data, at + 8 + length)
        if crc != zlib.crc32(kind + body):
            raise PictureError(f"PNG chunk {kind!r} at {at} has a wrong CRC")
        yield kind, body
        at += 12 + length


def decode_png(data):
    header, packed = None, b""
    for kind, body in png_chunks(data):
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            packed += body
    if header is None:
        raise PictureError("PNG without IHDR")
    width, height, depth, colour, _, _, interlace = header
    if depth != 8 or colour not in (2, 6) or interlace:
        raise PictureError(f"PNG of depth {depth}, colour type {colour}, interlace {interlace}; "
                           "only 8-bit RGB (2) and RGBA (6), not interlaced, are known")
    channels = 3 if colour == 2 else 4
    pixels = unfilter(zlib.decompress(packed), width * channels, height, channels)
    if channels == 4:
        rgb = bytearray(width * height * 3)
        for channel in range(3):
            rgb[channel::3] = pixels[channel::4]
        pixels = rgb
    return Picture(width, height, pixels)


def unfilter(raw, stride, height, step):
    if len(raw) != (stride + 1) * height:
        raise PictureError(f"PNG has {len(raw)} bytes of rows, needs {(stride + 1) * height}")
    pixels, above = bytearray(), bytearray(stride)
    for y in range(height):
        at = y * (stride + 1)
        row = bytearray(raw[at + 1:at + 1 + stride])
        unfilter_row(raw[at], row, above, step)
        pixels += row
        above = row
    return pixels


def unfilter_row(kind, row, above, step):
    """Undoes PNG filter `kind` (PNG specification, 9.2) in place."""
    if kind == 0:
        return
    if kind > 4:
        raise PictureError(f"PNG row filter {kind}; 0 to 4 exist")
    for i in range(len(row)):
        left = row[i - step] if i >= step else 0
        up = above[i]
        if kind == 1:
            guess = left
        elif kind == 2:
            guess = up
        elif kind == 3:
            guess = (left + up) >> 1
        else:
            guess = paeth(left, up, above[i - step] if i >= step else 0)
        row[i] = (row[i] + guess) & 255


def paeth(left, up, corner):
    by_left, by_up, by_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    if by_left <= by_up and by_left <= by_corner:
        return left
    return up if by_up <= by_corner else corner


# --- writing --------------------------------------------------------------------------------

def save(picture, path):
    data = encode_png(picture) if str(path).endswith(".png") else encode_ppm(picture)
    with open(path, "wb") as file:
        file.write(data)


def encode_ppm(picture):
    return b"P6\n%d %d\n255\n" % (picture.width, picture.height) + picture.rgb


def encode_png(picture):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    stride = picture.width * 3
    rows = b"".join(b"\0" + picture.rgb[y * stride:(y + 1) * stride] for y in range(picture.height))
    header = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 6)) + chunk(b"IEND", b""))


# --- command line ---------------------------------------------------------------------------

def compare(path_a, path_b):
    a, b = load(path_a), load(path_b)
    if (a.width, a.height) != (b.width, b.height):
        print(f"sizes differ: {a.width}x{a.height} in {path_a}, {b.width}x{b.height} in {path_b}")
        return 1
    count, first = a.differences(b)
    if not count:
        print(f"same: {a.width}x{a.height}")
        return 0
    print(f"{count} of {a.width * a.height} pixels differ; first at {first[0]},{first[1]}: "
          f"#{bytes(a.pixel(*first)).hex()} in {path_a}, #{bytes(b.pixel(*first)).hex()} in {path_b}")
    return 1


def info(path):
    picture = load(path)
    middle = bytes(picture.pixel(picture.width // 2, picture.height // 2)).hex()
    print(f"{picture.width}x{picture.height}, {picture.colours()} colours, middle #{middle}")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("compare", "hash", "convert", "info"))
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    wanted = 2 if options.verb in ("compare", "convert") else 1
    if len(options.files) != wanted:
        parser.error(f"{options.verb} takes {wanted} file{'s' if wanted > 1 else ''}, not {len(options.files)}")
    try:
        if options.verb == "compare":
            return compare(*options.files)
        if options.verb == "info":
            return info(*options.files)
        if options.verb == "hash":
            print(load(options.files[0]).hash())
        else:
            save(load(options.files[0]), options.files[1])
        return 0
    except PictureError as problem:
        print(f"picture.py: error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
