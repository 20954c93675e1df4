"""Smooth curves and the frames they are placed in. Points are float64 arrays [N, 2], x to the right, y down."""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, radians, sin

import numpy as np


@dataclass(frozen=True)
class Frame:
    """A place to draw in: local point p lies at `axes @ p + origin` of the parent."""

    axes: np.ndarray  # [2, 2], columns are the local x and y axes
    origin: np.ndarray  # [2]

    def at(self, points) -> np.ndarray:
        """Local points [N, 2] (or one point [2]) in the parent's coordinates."""
        return np.asarray(points, dtype=np.float64) @ self.axes.T + self.origin

    def inside(self, parent: "Frame") -> "Frame":
        """This frame seen from outside of `parent`."""
        return Frame(parent.axes @ self.axes, parent.at(self.origin))

    @property
    def unit(self) -> float:
        """Length of a local unit in the parent, averaged over directions."""
        (a, b), (c, d) = self.axes
        return float(abs(a * d - b * c) ** 0.5)


def frame(x: float, y: float, degrees: float = 0.0, width: float = 1.0, height: float = 1.0) -> Frame:
    """A frame at (x, y), turned anticlockwise on the page by `degrees`, scaled by width and height."""
    c, s = cos(radians(degrees)), sin(radians(degrees))
    return Frame(np.array([[c * width, s * height], [-s * width, c * height]]), np.array([x, y]))


def step(x: float, y: float) -> np.ndarray:
    """A displacement, [2]."""
    return np.array((x, y))


def closed(points, steps: int = 5) -> np.ndarray:
    """The closed Catmull-Rom curve through `points`, [N * steps, 2]."""
    points = np.asarray(points, dtype=np.float64)
    return _closed_basis(len(points), steps) @ points


def path(points, steps: int = 5) -> np.ndarray:
    """The open Catmull-Rom curve from the first to the last of `points`, [(N - 1) * steps + 1, 2]."""
    points = np.asarray(points, dtype=np.float64)
    return _open_basis(len(points), steps) @ points


def oval(x: float, y: float, width: float, height: float | None = None, count: int = 18) -> np.ndarray:
    """An ellipse with half axes `width` and `height`, [count, 2]."""
    return _circle(count) * (width, width if height is None else height) + (x, y)


def tube(spine: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """The outline of a tube along `spine` [N, 2] with half widths `radii` [N]: left side out, right side back."""
    across = normals(spine) * np.asarray(radii)[:, None]
    return np.concatenate([spine + across, (spine - across)[::-1]])


def normals(spine: np.ndarray) -> np.ndarray:
    """Unit normals [N, 2] of a curve; for one that runs to the right they point down the page."""
    along = np.empty_like(spine)
    along[1:-1] = spine[2:] - spine[:-2]
    along[0], along[-1] = spine[1] - spine[0], spine[-1] - spine[-2]
    along /= np.sqrt((along * along).sum(axis=1, keepdims=True)) + 1e-12
    return along[:, ::-1] * (-1.0, 1.0)


@lru_cache(maxsize=256)
def _circle(count: int) -> np.ndarray:
    angle = np.arange(count) * (2 * np.pi / count)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _blend(steps: int) -> np.ndarray:
    """Catmull-Rom weights of the four neighbouring points, [steps, 4]."""
    t = np.arange(steps)[:, None] / steps
    return 0.5 * np.concatenate(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], axis=1
    )


@lru_cache(maxsize=256)
def _closed_basis(count: int, steps: int) -> np.ndarray:
    basis = np.zeros((count, steps, count))
    weights = _blend(steps)
    for piece in range(count):
        for neighbour in range(4):
            basis[piece, :, (piece + neighbour - 1) % count] += weights[:, neighbour]
    return basis.reshape(count * steps, count)


@lru_cache(maxsize=256)
def _open_basis(count: int, steps: int) -> np.ndarray:
    basis = np.zeros(((count - 1) * steps + 1, count))
    weights = _blend(steps)
    for piece in range(count - 1):
        for neighbour in range(4):
            # Beyond an end the end point itself is repeated, so the curve starts and stops on its points.
            point = min(max(piece + neighbour - 1, 0), count - 1)
            basis[piece * steps : (piece + 1) * steps, point] += weights[:, neighbour]
    basis[-1, -1] = 1.0
    return basis
