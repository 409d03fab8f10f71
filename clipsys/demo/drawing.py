"""Drawing scenes with Pillow: backgrounds in two pale tones, shapes with a darker edge."""

from __future__ import annotations

import math
from functools import cache

from PIL import Image, ImageDraw

from clipsys.demo.scenes import RGB, SHAPES, Background, Scene, Shape, to_rgb

Point = tuple[float, float]

#: Scenes are drawn this many times as large, and reduced: smooth edges at 64 pixels.
_SUPERSAMPLING = 3


def draw(scene: Scene, *, size_px: int = 64) -> Image.Image:
    """The scene as a square RGB image, drawn three times as large and reduced."""
    if size_px < 8:
        raise ValueError(f"size_px is {size_px}; expected 8 or more")
    side = size_px * _SUPERSAMPLING
    canvas = _draw_background(scene.background, side)
    for shape in scene.shapes:
        _draw_shape(canvas, shape)
    return canvas.resize((size_px, size_px), Image.Resampling.BOX)


def _draw_background(background: Background, side: int) -> Image.Image:
    light, dark = background.tones
    canvas = Image.new("RGB", (side, side), light)
    if background.texture == "plain":
        return canvas
    overlay = Image.new("RGB", (side, side), dark)
    if background.texture == "gradient":
        ramp = Image.linear_gradient("L").resize((side, side), Image.Resampling.BILINEAR)
        # Right angles only: turned by another, the corners of the ramp would stay empty.
        mask = ramp.rotate(90.0 * round(background.angle_degrees / 45.0))
    else:
        # Drawn larger than the picture and cut from its middle after the rotation.
        mask = _pattern(background, side, large=math.ceil(1.5 * side))
    canvas.paste(overlay, (0, 0), mask)
    return canvas


def _pattern(background: Background, side: int, *, large: int) -> Image.Image:
    pattern = Image.new("L", (large, large), 0)
    pen = ImageDraw.Draw(pattern)
    period = background.period * side
    start = (background.phase - 1.0) * period
    num_cells = math.ceil(large / period) + 2
    angle = background.angle_degrees
    for row in range(num_cells):
        top = start + row * period
        if background.texture == "striped":
            pen.rectangle((0, top, large, top + period / 2), fill=255)
            continue
        for column in range(num_cells):
            left = start + column * period
            if background.texture == "dotted":
                box = (left, top, left + period / 2, top + period / 2)
                pen.ellipse(box, fill=255)
            elif (row + column) % 2 == 0:
                pen.rectangle((left, top, left + period - 1, top + period - 1), fill=255)
    offset = (large - side) // 2
    turned = pattern.rotate(angle, Image.Resampling.NEAREST)
    return turned.crop((offset, offset, offset + side, offset + side))


def _draw_shape(canvas: Image.Image, shape: Shape) -> None:
    side = canvas.width
    radius = shape.radius * side
    contours = _placed(_contours(shape.kind), shape, side)
    mask = Image.new("L", canvas.size, 0)
    pen = ImageDraw.Draw(mask)
    for number, contour in enumerate(contours):
        pen.polygon(contour, fill=0 if number else 255)  # a second contour is a hole
    shadow_offset = round(0.02 * side)
    canvas.paste((70, 70, 85), (shadow_offset, shadow_offset), mask.point(lambda v: v * 0.35))
    canvas.paste(shape.rgb, (0, 0), mask)
    edge = to_rgb(_darker(shape.rgb))
    outline = ImageDraw.Draw(canvas)
    for contour in contours:
        outline.line(
            [*contour, contour[0], contour[1]],
            fill=edge,
            width=max(1, round(0.09 * radius)),
            joint="curve",
        )


def _darker(rgb: RGB) -> tuple[float, float, float]:
    red, green, blue = rgb
    return 0.68 * red / 255, 0.68 * green / 255, 0.68 * blue / 255


def _placed(contours: tuple[tuple[Point, ...], ...], shape: Shape, side: int) -> list[list[Point]]:
    """The contours turned, scaled and moved to their place, in pixels."""
    angle = math.radians(shape.rotation_degrees)
    cos, sin = math.cos(angle) * shape.radius, math.sin(angle) * shape.radius
    return [
        [
            ((shape.x + x * cos - y * sin) * side, (shape.y + x * sin + y * cos) * side)
            for x, y in contour
        ]
        for contour in contours
    ]


@cache
def _contours(kind: str) -> tuple[tuple[Point, ...], ...]:
    """The outline of a shape in a circle of radius one; a second contour is a hole."""
    match kind:
        case "circle":
            return (_arc(0.92, 0.0, 360.0),)
        case "square":
            return (((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),)
        case "triangle":
            return (((0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)),)
        case "star":
            radii = (1.05, 0.43) * 5
            return (tuple(_polar(r, 36.0 * n - 90.0) for n, r in enumerate(radii)),)
        case "heart":
            return (tuple(_heart_point(7.5 * n) for n in range(48)),)
        case "cross":
            a, b = 0.32, 0.95
            right = ((a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b))
            return (right + tuple((-x, -y) for x, y in right),)
        case "diamond":
            return (((0.0, -1.05), (0.66, 0.0), (0.0, 1.05), (-0.66, 0.0)),)
        case "ring":
            return (_arc(0.98, 0.0, 360.0), _arc(0.55, 0.0, 360.0))
        case "crescent":
            return (_crescent(distance=0.5, radius=0.82),)
        case "bolt":
            half = ((-0.05, -1.05), (0.6, -1.05), (0.28, -0.3), (0.78, -0.3))
            return (half + tuple((-x, -y) for x, y in half),)
        case "arrow":
            half = ((1.0, 0.0), (0.15, 0.85), (0.15, 0.34), (-0.98, 0.34))
            return (half + tuple((x, -y) for x, y in reversed(half[1:])),)
        case "flower":
            angles = [5.0 * n for n in range(72)]
            return (
                tuple(
                    _polar(0.66 + 0.36 * abs(math.cos(math.radians(2.5 * a))), a) for a in angles
                ),
                _arc(0.24, 0.0, 360.0),
            )
    raise ValueError(f"{kind!r} is not a shape; expected one of {', '.join(SHAPES)}")


def _polar(radius: float, degrees: float) -> Point:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _arc(radius: float, start: float, end: float, *, x: float = 0.0) -> tuple[Point, ...]:
    """48 points of an arc around (x, 0), angles in degrees, the end left out."""
    points = (_polar(radius, start + (end - start) * n / 48) for n in range(48))
    return tuple((x + px, py) for px, py in points)


def _heart_point(degrees: float) -> Point:
    # The usual heart curve (https://mathworld.wolfram.com/HeartCurve.html), scaled to a side of 2.
    t = math.radians(degrees)
    x = 16 * math.sin(t) ** 3
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return x / 16.5, -(y + 2.5) / 15.5


def _crescent(*, distance: float, radius: float) -> tuple[Point, ...]:
    """The unit circle less a circle of `radius` whose centre is at (`distance`, 0)."""
    x = (1 + distance**2 - radius**2) / (2 * distance)
    y = math.sqrt(1 - x**2)
    outer = math.degrees(math.acos(x))
    inner = math.degrees(math.atan2(y, x - distance))
    points = _arc(1.0, outer, 360.0 - outer) + _arc(radius, 360.0 - inner, inner, x=distance)
    return tuple((px + 0.2, py) for px, py in points)
