"""SYNTHETIC faces: drawn from parameters, with their 106 landmarks and their pose. No photograph, no person.

They stand in for the public 106-point data (arXiv 1905.03469) where that is absent, in its format, so that
the same code trains on either. A face is a set of points on an ellipsoid, of random proportions and
expression, turned by three Euler angles, projected, and drawn: face, brows, eyes, nose and mouth over a
random background, under a light from one side, with noise and at times something in front. How well a
network does here says nothing about photographs.

Landmarks stand in groups as in the public data (0-32 contour, 33-42 left eye, 43-51 left brow, 52-71 mouth,
72-86 nose, 87-96 right eye, 97-105 right brow; left as seen), with the outer corners of the eyes at 35 and
93, where the error's unit is measured. The order within a group is ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float64]
CONTOUR, LEFT_EYE, LEFT_BROW, MOUTH, NOSE, RIGHT_EYE, RIGHT_BROW = (
    np.arange(first, last)
    for first, last in ((0, 33), (33, 43), (43, 52), (52, 72), (72, 87), (87, 97), (97, 106))
)
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
    points = _proportions(draw)
    angles = draw.uniform(-1, 1, 3) * _LARGEST_ANGLES
    turned = points @ _rotation(*angles).T
    flat = turned[:, :2] * (1 + 0.15 * turned[:, 2:])  # what is nearer is larger
    low, high = flat.min(0), flat.max(0)
    scale = draw.uniform(0.68, 0.86) / (high - low).max()
    landmarks = (flat - (low + high) / 2) * scale + 0.5 + draw.uniform(-0.06, 0.06, 2)
    return _drawn(draw, landmarks, size), landmarks, angles


def _proportions(draw: Generator) -> Array:
    """The points of a face that looks ahead: x right, y down, z to the viewer; half a face is 1 wide."""
    points = np.zeros((106, 3))
    around = np.linspace(np.pi * 1.08, -np.pi * 0.08, 33)  # from temple to temple by the chin
    length, jaw = draw.uniform(1.15, 1.4), draw.uniform(0.75, 1.1)
    narrowing = np.where(np.sin(around) > 0, np.abs(np.sin(around)), 0) ** 2 * (1 - jaw) * 0.45
    points[CONTOUR, 0] = np.cos(around) * (1 - narrowing)
    points[CONTOUR, 1] = np.sin(around) * length
    apart, eye_y = draw.uniform(0.4, 0.5), draw.uniform(-0.2, -0.1)
    wide, open_ = draw.uniform(0.17, 0.24), draw.uniform(0.03, 0.12)
    gaze = draw.uniform(-0.06, 0.06, 2) * (1, 0.3)
    tilt, lift = draw.uniform(-0.06, 0.06), draw.uniform(0.17, 0.32)
    bend = draw.uniform(0.02, 0.1)
    # The third point of an eye is its left corner, the seventh its right one.
    turn = np.pi / 2 + np.arange(8) * np.pi / 4
    for eye, brow, side in ((LEFT_EYE, LEFT_BROW, -1), (RIGHT_EYE, RIGHT_BROW, 1)):
        points[eye[:8], 0] = side * apart + wide * np.cos(turn)
        points[eye[:8], 1] = eye_y + open_ * np.sin(turn) + side * tilt * np.cos(turn)
        points[eye[8:], :2] = np.array([side * apart, eye_y]) + gaze
        points[eye[9], 1] -= open_ * 0.5
        along = np.linspace(-1, 1, 9)
        points[brow, 0] = side * apart + along * wide * 1.45
        points[brow, 1] = eye_y - lift - bend * (1 - along**2) + side * tilt * along
    nose, wing = draw.uniform(0.4, 0.55), draw.uniform(0.14, 0.24)
    bridge, base = NOSE[:6], NOSE[6:]
    points[bridge, 1] = np.linspace(eye_y, eye_y + nose, 6)
    across = np.linspace(-1, 1, 9)
    points[base, 0] = across * wing
    points[base, 1] = eye_y + nose + 0.12 - 0.08 * across**2
    mouth_y, mouth = eye_y + nose + draw.uniform(0.32, 0.42), draw.uniform(0.26, 0.42)
    lips, gap, smile = draw.uniform(0.06, 0.1), draw.uniform(0, 0.14), draw.uniform(-0.06, 0.1)
    for part, thick in ((MOUTH[:12], lips + gap), (MOUTH[12:], gap)):
        turn = np.pi + np.arange(len(part)) * 2 * np.pi / len(part)
        points[part, 0] = mouth * (1 if thick > gap else 0.8) * np.cos(turn)
        points[part, 1] = mouth_y + thick * np.sin(turn) - smile * np.cos(turn) ** 2
    inner = 1 - (points[:, 0] / 1.1) ** 2 - (points[:, 1] / 1.5) ** 2
    points[:, 2] = 0.7 * np.sqrt(np.clip(inner, 0, None))
    points[bridge, 2] += np.linspace(0.02, 0.3, 6)
    points[base, 2] += 0.18 * (1 - across**2)
    return points + draw.normal(0, 0.008, points.shape)


def _rotation(pitch: float, yaw: float, roll: float) -> Array:
    (a, b, c), (x, y, z) = np.cos([pitch, yaw, roll]), np.sin([pitch, yaw, roll])
    about_x = np.array([[1, 0, 0], [0, a, -x], [0, x, a]])
    about_y = np.array([[b, 0, y], [0, 1, 0], [-y, 0, b]])
    about_z = np.array([[c, -z, 0], [z, c, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


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
