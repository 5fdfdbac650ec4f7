"""Self-calibrating thresholds: epsilon and eta as quantiles.

The paper (arXiv 2605.02178) tunes both thresholds by hand and names that as a
limitation. Here the config may say `auto(q)`: the threshold becomes the
q-quantile of what was observed, the windowed mean delta for epsilon and the
change of Phi for eta. Before the first calibration the threshold is 0: neither
the uncertainty rule nor resampling acts.

Everything is deterministic: every n-th sample of the stream is kept, and n
doubles whenever the buffer is full, so the selection depends only on the order
of arrival. Interventions cut off the small values that would have followed
them, so later calibrations are biased towards large ones;
`recalibrate_every=0` keeps the first calibration.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

_AUTO = re.compile(r"\s*auto\s*\(\s*([^()\s]+)\s*\)\s*")


def parse(value: Any, key: str) -> tuple[float, float | None]:
  """Reads a threshold from the config.

  Args:
    value: a number, `"auto(q)"`, or `{"auto": q}` with q between 0 and 1.
    key: the config key, for the message.

  Returns:
    The fixed threshold and None, or 0.0 and q.

  Raises:
    ValueError: for any other value.
  """
  quantile = None
  if isinstance(value, str) and (match := _AUTO.fullmatch(value)):
    quantile = match.group(1)
  elif isinstance(value, Mapping) and set(value) == {"auto"}:
    quantile = value["auto"]
  elif not isinstance(value, bool):
    fixed = _number(value)
    if fixed is not None and fixed >= 0.0:
      return fixed, None
  number = _number(quantile)
  if number is None or not 0.0 <= number <= 1.0:
    raise ValueError(
      f"{key}: found {value!r}, expected a number >= 0 or 'auto(q)' with q "
      "from 0 to 1"
    )
  return 0.0, number


class Quantile:
  """A threshold, fixed or calibrated on the samples passed to `add`.

  Attributes:
    value: the current threshold.
    quantile: q, or None for a fixed threshold.
    updates: number of calls of `advance`.
  """

  def __init__(
    self,
    setting: Any,
    *,
    key: str,
    calibrate_after: int = 1,
    recalibrate_every: int = 0,
    capacity: int = 65_536,
  ) -> None:
    """Creates an uncalibrated threshold.

    Args:
      setting: the value in the config, see `parse`.
      key: the config key, for messages.
      calibrate_after: updates until the first calibration, at least 1.
      recalibrate_every: updates from one calibration to the next; 0: only once.
        Each uses the samples since the previous one.
      capacity: the most samples kept, at least 2.

    Raises:
      ValueError: if the setting or a number is invalid.
    """
    self.value, self.quantile = parse(setting, key)
    for name, number, least in (
      ("calibrate_after", calibrate_after, 1),
      ("recalibrate_every", recalibrate_every, 0),
      ("capacity", capacity, 2),
    ):
      if number < least:
        raise ValueError(
          f"{key}: found {name} = {number}, expected at least {least}"
        )
    self.updates = 0
    self._key = key
    self._calibrate_after = calibrate_after
    self._recalibrate_every = recalibrate_every
    self._capacity = capacity
    self._calibrated_at = 0
    self._forget()

  def add(self, samples: Any) -> None:
    """Adds the finite samples; their order must be reproducible."""
    if self.quantile is None:
      return
    samples = np.asarray(samples, np.float32).ravel()
    samples = samples[np.isfinite(samples)]
    offset = -self._seen % self._stride
    self._seen += len(samples)
    self._samples = np.concatenate(
      [self._samples, samples[offset :: self._stride]]
    )
    while len(self._samples) > self._capacity:
      self._samples = self._samples[::2]
      self._stride *= 2

  def advance(self) -> bool:
    """Ends an update; calibrates if it is due.

    Returns:
      Whether the threshold was calibrated. Without samples it keeps its value
      and calibration is tried again at the next update.
    """
    self.updates += 1
    if self.quantile is None:
      return False
    since = self.updates - self._calibrated_at
    due = self._calibrate_after
    if self._calibrated_at > 0:
      due = self._recalibrate_every or np.inf
    if since < due or len(self._samples) == 0:
      return False
    self.value = float(np.quantile(self._samples.astype(float), self.quantile))
    self._forget()
    self._calibrated_at = self.updates
    return True

  def state_dict(self) -> dict[str, Any]:
    """Everything that `load` needs to resume exactly from here."""
    return {
      "quantile": self.quantile,
      "value": self.value,
      "updates": self.updates,
      "calibrated_at": self._calibrated_at,
      "seen": self._seen,
      "stride": self._stride,
      "samples": self._samples.tolist(),
    }

  def load(self, state: Mapping[str, Any]) -> None:
    """Restores a `state_dict`.

    If the config now fixes the threshold or names another quantile, the stored
    state is ignored: the config takes precedence.
    """
    self.updates = int(state["updates"])
    if self.quantile is None or state["quantile"] != self.quantile:
      return
    self.value = float(state["value"])
    self._calibrated_at = int(state["calibrated_at"])
    self._seen, self._stride = int(state["seen"]), int(state["stride"])
    self._samples = np.asarray(state["samples"], np.float32)

  def _forget(self) -> None:
    """Drops all samples."""
    self._samples = np.zeros(0, np.float32)
    self._seen, self._stride = 0, 1


def _number(value: Any) -> float | None:
  """The value as a finite float, or None."""
  try:
    number = float(value)
  except (TypeError, ValueError):
    return None
  return number if np.isfinite(number) else None
