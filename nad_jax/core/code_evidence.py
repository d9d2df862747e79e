# SPDX-License-Identifier: Apache-2.0
"""What integer codes tell about who rounded them, given the float weights.

A code is one of three things: the *nearest* grid point (a weight that the grid cuts
off has only its end point), the *other* neighbour of its weight, or something *beyond*
both.
Nearest codes need no reason. The others are honest if they serve the layer's output on
clean images, which the second moments of its inputs tell (see `nad_jax.core.solvers`):

    J = E |W^ x^ - W x|^2,   undo_i = J(weight i switched to its alternative) - J

where a nearest code's alternative is the other neighbour and any other code's is the
nearest. Error feedback (GPTQ), AdaRound and EFRAP choose by J, EFRAP with a price on
weights left at nearest, so that one number `price` >= 0 per layer divides the codes:

    not nearest   undo_i >= -price * |rounding error|     it pays, or flipping does
    nearest       undo_i >= +price * |rounding error|     flipping would cost more

A rounding that serves a trigger instead breaks these for many weights at any price.
What is measured is evidence, not proof: a planted choice that happens to pay on clean
images looks like an honest one.

NumPy in float64; nothing here is traced or compiled.
"""

import dataclasses

import numpy as np

# In steps. Codes this close to a tie count as nearest: who folded BatchNorm in another
# order, or divided by a reciprocal, rounds such weights differently.
TIE_TOLERANCE = 1e-3
# In steps, as `rounding.GRID_TOLERANCE`: a weight on the grid has no other neighbour.
GRID_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Offsets:
    """Where the codes of a kernel stand relative to its weights.

    Attributes:
      chosen: float64, code minus weight in steps.
      nearest: The same for the nearest code that the grid has.
      alternative: The same for the code to compare with: the other neighbour of a
        nearest code (itself where there is none), the nearest code of any other.
      is_other: bool, the code is the weight's other neighbour.
      is_beyond: bool, the code is neither neighbour.
    """

    chosen: np.ndarray
    nearest: np.ndarray
    alternative: np.ndarray
    is_other: np.ndarray
    is_beyond: np.ndarray

    @property
    def is_nearest(self) -> np.ndarray:
        return ~(self.is_other | self.is_beyond)


def offsets(
    weights: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    *,
    qmin: int,
    qmax: int,
) -> Offsets:
    """Compares codes with the weights they stand for.

    Args:
      weights: float, any shape.
      codes: integers of the same shape.
      scale: > 0, broadcastable to it.
      zero_point: integers, broadcastable to it.
      qmin: Smallest code of the grid.
      qmax: Largest code of the grid.

    Example:
      >>> found = offsets(np.array([0.4, 0.4, 0.4, 9.0]), np.array([0, 1, 2, 7]),
      ...                 np.ones(1), np.zeros(1, int), qmin=-7, qmax=7)
      >>> found.is_nearest.tolist(), found.is_other.tolist()
      ([True, False, False, True], [False, True, False, False])
    """
    exact = np.asarray(weights, np.float64) / np.asarray(scale, np.float64)
    exact = exact + np.asarray(zero_point, np.float64)
    codes = np.asarray(codes, np.float64)
    nearest_code = np.clip(np.round(exact), qmin, qmax)
    chosen, nearest = codes - exact, nearest_code - exact
    is_nearest = np.abs(codes - nearest_code) < 0.5
    clipped = np.abs(nearest) > 0.5 + TIE_TOLERANCE
    near_tie = (np.abs(chosen) <= 0.5 + TIE_TOLERANCE) & ~clipped
    is_nearest |= near_tie
    within = (np.abs(chosen) <= 1 - GRID_TOLERANCE / 2) & ~clipped
    is_other = within & ~is_nearest
    # A nearest code's other neighbour lies on the other side of the weight.
    has_other = ~clipped & (np.abs(nearest) > GRID_TOLERANCE)
    across = chosen - np.where(chosen > 0, 1.0, -1.0)
    across_code = across + exact
    inside = (across_code > qmin - 0.5) & (across_code < qmax + 0.5)
    other = np.where(has_other & inside, across, chosen)
    return Offsets(
        chosen,
        nearest,
        np.where(is_nearest, other, nearest),
        is_other,
        ~is_nearest & ~is_other,
    )


def output_error(change, gram, drift, drift_power) -> np.ndarray:
    """J_c, mean squared output error of each channel `[C]` for a change `[K, C]`."""
    return np.sum(change * (gram @ change + 2.0 * drift), axis=0) + drift_power


def cost_of_undoing(change, alternative, gram, drift) -> np.ndarray:
    """`[K, C]`, by how much J rises when that weight alone takes its alternative.

    Args:
      change: `[K, C]`, quantized minus float weight.
      alternative: `[K, C]`, the same for each weight's alternative code.
      gram: `[K, K]`, E x x'.
      drift: `[K, C]`, E x r'.
    """
    move = alternative - change
    slope = gram @ change + drift
    return 2.0 * move * slope + move * move * np.diagonal(gram)[:, None]


@dataclasses.dataclass(frozen=True)
class Reasons:
    """How well one price explains the codes of a layer.

    Attributes:
      price: That price, >= 0 and in the units of J per rounding error.
      flipped: Share of the codes that are not nearest whose choice it explains.
      stayed: Share of the free codes at nearest whose choice it explains.
    """

    price: float
    flipped: float
    stayed: float

    @property
    def explained(self) -> float:
        """The mean of both shares."""
        return (self.flipped + self.stayed) / 2


def find_reasons(
    undo: np.ndarray, error: np.ndarray, is_nearest: np.ndarray, *, slack: np.ndarray
) -> Reasons:
    """The price that explains most codes.

    Args:
      undo: `[n]`, cost of undoing each choice, of weights that have an alternative.
      error: `[n]` > 0, rounding error of the nearest code.
      is_nearest: bool `[n]`.
      slack: `[n]` >= 0, how much a choice may lose: J was estimated on other images
        than the quantizer's.
    """
    # A price between a flipped code's bound (from below) and a stayed one's (above).
    bound = np.where(is_nearest, undo, -undo) + np.where(is_nearest, 1, -1) * slack
    bound = bound / error
    stayed, flipped = np.sort(bound[is_nearest]), np.sort(bound[~is_nearest])
    prices = np.concatenate([np.zeros(1), flipped[flipped > 0]])
    flipped_share = np.searchsorted(flipped, prices, "right") / max(len(flipped), 1)
    below = np.searchsorted(stayed, prices, "left") / max(len(stayed), 1)
    best = int(np.argmax(flipped_share - below))
    return Reasons(
        float(prices[best]), float(flipped_share[best]), float(1 - below[best])
    )
