"""The points of SYNTHETIC faces in space: 106 landmarks of random proportions and expression.

They stand in groups as in the public data (0-32 contour, 33-42 left eye, 43-51 left brow, 52-71 mouth,
72-86 nose, 87-96 right eye, 97-105 right brow; left as seen), with the outer corners of the eyes at 35 and
93, where the error's unit is measured. The order within a group is ours.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONTOUR, LEFT_EYE, LEFT_BROW, MOUTH, NOSE, RIGHT_EYE, RIGHT_BROW = (
    np.arange(first, last)
    for first, last in ((0, 33), (33, 43), (43, 52), (52, 72), (72, 87), (87, 97), (97, 106))
)


def proportions(draw: Generator) -> Array:
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


def rotation(pitch: float, yaw: float, roll: float) -> Array:
    (a, b, c), (x, y, z) = np.cos([pitch, yaw, roll]), np.sin([pitch, yaw, roll])
    about_x = np.array([[1, 0, 0], [0, a, -x], [0, x, a]])
    about_y = np.array([[b, 0, y], [0, 1, 0], [-y, 0, b]])
    about_z = np.array([[c, -z, 0], [z, c, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)
