"""SYNTHETIC faces: drawn from parameters, with their 106 landmarks and their pose. No photograph, no person.

They stand in for the public 106-point data (arXiv 1905.03469) where that is absent, in its format, so that
the same code trains on either. A face is a set of points on an ellipsoid, of random proportions and
expression, turned by three Euler angles, projected, and drawn: face, brows, eyes, nose and mouth over a
random background, under a light from one side, with noise and at times something in front. How well a
network does here says nothing about photographs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from face_shape import (
    CONTOUR,
    LEFT_BROW,
    LEFT_EYE,
    MOUTH,
    NOSE,
    RIGHT_BROW,
    RIGHT_EYE,
    Array,
    proportions,
    rotation,
)
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_LARGEST_ANGLES = (0.35, 0.6, 0.4)  # pitch, yaw, roll in radians


def write_faces(folder: Path, train: int, test: int, size: int = 112, seed: int = 0) -> None:
    """Writes ``train_data`` and ``test_data``, each with ``imgs/`` and ``list.txt``."""
    for part, count, offset in (("train_data", train, 0), ("test_data", test, 10_000_000)):
        (folder / part / "imgs").mkdir(parents=True, exist_ok=True)
        lines = []
        for number in range(count):
            image, landmarks, angles = make_face(np.random.default_rng((seed, offset + number)), size)
            name = f"{part}/imgs/{number:05d}.png"
            image.save(folder / name, compress_level=1)
            lines.append(" ".join([name, *(f"{x:.6f}" for x in (*landmarks.ravel(), *angles))]))
        (folder / part / "list.txt").write_text("\n".join(lines) + "\n")


def make_face(draw: Generator, size: int) -> tuple[Image.Image, Array, Array]:
    """An image, its landmarks as shares of its side ``(106, 2)``, and pitch, yaw and roll in radians."""
    points = proportions(draw)
    angles = draw.uniform(-1, 1, 3) * _LARGEST_ANGLES
    turned = points @ rotation(*angles).T
    flat = turned[:, :2] * (1 + 0.15 * turned[:, 2:])  # what is nearer is larger
    low, high = flat.min(0), flat.max(0)
    scale = draw.uniform(0.68, 0.86) / (high - low).max()
    landmarks = (flat - (low + high) / 2) * scale + 0.5 + draw.uniform(-0.06, 0.06, 2)
    return _drawn(draw, landmarks, size), landmarks, angles


def _drawn(draw: Generator, landmarks: Array, size: int) -> Image.Image:
    large = 2 * size  # drawn at twice the size, for smooth edges
    at = landmarks * large

    def colour(low: Array | list[int], high: Array | list[int]) -> tuple[int, ...]:
        return tuple(int(x) for x in draw.uniform(low, high))

    def polygon(part: NDArray[np.int64], fill: tuple[int, ...]) -> None:
        canvas.polygon([tuple(point) for point in at[part]], fill=fill)

    image = Image.new("RGB", (large, large), colour([0] * 3, [255] * 3))
    canvas = ImageDraw.Draw(image)
    for _ in range(6):
        corners = draw.uniform(0, large, (3, 2))
        canvas.polygon([tuple(corner) for corner in corners], fill=colour([0] * 3, [255] * 3))
    skin = draw.uniform([90, 60, 45], [245, 205, 180])
    hair = colour([10] * 3, [120, 90, 70])
    centre, half = at[CONTOUR].mean(0), np.abs(at[CONTOUR] - at[CONTOUR].mean(0)).max()
    top = centre - (0, half * 0.55)
    canvas.ellipse([*(top - half * 1.05), *(top + half * 1.05)], fill=hair)
    polygon(CONTOUR, tuple(int(x) for x in skin))
    brows = at[CONTOUR[[0, -1]]].mean(0) - (0, half * 0.2)
    canvas.ellipse([*(brows - half * 0.8), *(brows + half * 0.8)], fill=tuple(int(x) for x in skin))
    line = max(1, size // 40)
    for eye, brow in ((LEFT_EYE, LEFT_BROW), (RIGHT_EYE, RIGHT_BROW)):
        polygon(eye[:8], (240, 240, 240))
        pupil = at[eye[8]]
        canvas.ellipse([*(pupil - 2 * line), *(pupil + 2 * line)], fill=colour([10, 20, 20], [90, 90, 120]))
        canvas.line([tuple(point) for point in at[brow]], fill=hair, width=2 * line)
    shade = tuple(int(x) for x in skin * 0.72)
    canvas.line([tuple(point) for point in at[NOSE[:6]]], fill=shade, width=line)
    canvas.line([tuple(point) for point in at[NOSE[6:]]], fill=shade, width=line)
    polygon(MOUTH[:12], colour([120, 40, 40], [210, 110, 110]))
    polygon(MOUTH[12:], (60, 20, 20))
    if draw.random() < 0.15:
        corner, extent = draw.uniform(0, large, 2), draw.uniform(0.05, 0.3, 2) * large
        canvas.rectangle([*corner, *(corner + extent)], fill=colour([0] * 3, [255] * 3))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float64)
    ramp = np.linspace(-1, 1, size)
    light = 1 + draw.uniform(-0.3, 0.3) * ramp[:, None] + draw.uniform(-0.4, 0.4) * ramp[None]
    pixels = pixels * light[..., None] * draw.uniform(0.6, 1.2) + draw.normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
