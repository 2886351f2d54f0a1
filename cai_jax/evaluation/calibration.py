"""How well probabilities agree with what they predict."""

import numpy as np
from numpy.typing import ArrayLike

BINS = 10  # of the calibration error


def calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = BINS) -> float:
  """Return the expected calibration error (Guo et al. 2017, equation 3).

  Answers are divided by confidence into M bins of equal width: bin m contains the confidences in
  ((m - 1) / M, m / M]. The error is the mean of |accuracy - mean confidence| over bins, weighted by
  their numbers of answers.

  Args:
    confidences: f64[N], the probability of each answer.
    correct: bool[N], whether each answer is right.
    bins: number of bins.

  Raises:
    ValueError: if there are no answers, the arguments differ in length, or a confidence is outside
      [0, 1].
  """
  p, right = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
  if p.ndim != 1 or p.shape != right.shape or not p.size:
    raise ValueError(
      f'confidences {p.shape} and correct {right.shape} must be lists of equal length, not empty.'
    )
  if not ((p >= 0) & (p <= 1)).all():
    raise ValueError(f'Confidences are in {p.min()}..{p.max()}. They must be probabilities.')
  indices = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
  gaps = np.bincount(indices, right - p, bins)  # each bin's size times its gap
  return float(np.abs(gaps).sum() / p.size)
