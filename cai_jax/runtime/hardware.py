"""Kind, memory and peak speed of devices."""

import dataclasses
import os
import pathlib
import resource
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

LOGITS_AT_ONCE = 2**27  # most logits that a device holds at a time: 512 MB in f32

# Dense bf16 FLOP/s of a device from its datasheet, by prefix of `device_kind`. The first match
# counts, so a longer prefix comes before a shorter one.
PEAKS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5p': 459e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA B200': 2250e12,
}

# Memory of an accelerator that does not say how much it has: that of a TPU v5e chip, the least of
# the devices that this code was written for.
UNKNOWN_MEMORY = 16 * 10**9


@dataclasses.dataclass(frozen=True)
class Device:
  """What the defaults of a device depend on.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    kind: name of the model, such as 'NVIDIA H200'.
    memory: bytes that programs may use.
  """

  platform: str
  kind: str
  memory: int


def describe_device(device: jax.Device) -> Device:
  """Return the platform, kind and memory of a device of this process.

  The CPU devices of a process share the host's memory, so each counts with an equal part of it.

  Args:
    device: a device of this process.
  """
  if device.platform == 'cpu':
    memory = host_memory() // len(jax.local_devices(backend='cpu'))
  else:
    memory = (device.memory_stats() or {}).get('bytes_limit', UNKNOWN_MEMORY)
  return Device(device.platform, device.device_kind, memory)


def host_memory() -> int:
  """Return the bytes of memory that this host has, or that its container allows."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  try:
    limit = int(pathlib.Path('/sys/fs/cgroup/memory.max').read_text())
  except (OSError, ValueError):  # not in a container, or one without a limit ('max')
    return memory
  return min(memory, limit)


def peak_flops(devices: Sequence[jax.Device], dtype: str) -> float | None:
  """Return the peak FLOP/s of all devices together, or None for an unknown device.

  For accelerators this is the dense bf16 peak in the datasheet, whatever `dtype` is. For CPUs it is
  the speed of the fastest of a few products of two 2048 × 2048 matrices, which takes less than a
  second to measure. The CPU devices of one process share its cores, so they count as one.

  Args:
    devices: devices of one kind.
    dtype: dtype of the measured products on a CPU.
  """
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    return _measure_cpu(dtype) * len({device.process_index for device in devices})
  for prefix, peak in PEAKS.items():
    if kind.startswith(prefix):
      return peak * len(devices)
  return None


def _measure_cpu(dtype: str) -> float:
  """Return the FLOP/s of the fastest of a few matrix products."""
  n = 2048
  x = jnp.full((n, n), 1e-3, dtype)
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
  seconds = []
  for _ in range(5):
    begin = time.perf_counter()
    multiply(x, x).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return 2 * n**3 / min(seconds[1:])  # the first call compiles


def memory_bytes(device: jax.Device) -> int:
  """Return the peak number of bytes in use on a device.

  If the device does not report its memory, as on CPUs, this is the peak resident size of the
  process.

  Args:
    device: a device of this process.
  """
  stats = device.memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
