"""What the devices at hand can do at most, and what they hold."""

import resource
import time

import jax
import jax.numpy as jnp

LOGITS_AT_ONCE = 2**27  # logits that a device computes at once (512 MB in f32), at most

# Dense bf16 FLOP/s of a device by its maker's datasheet, by the beginning of its `device_kind`.
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


def peak_flops(devices, dtype: str) -> float | None:
  """FLOP/s of all devices together; None where nothing is known of them.

  Of accelerators it is the datasheet's, dense and in bf16 whatever `dtype` is. CPUs are measured:
  the best of some products of two matrices of 2,048 in `dtype`, which takes less than a second.
  CPU devices of one process are the same cores, so they count once.
  """
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    return _measured(dtype) * len({device.process_index for device in devices})
  for name, peak in PEAKS.items():
    if kind.startswith(name):
      return peak * len(devices)
  return None


def _measured(dtype: str) -> float:
  n = 2048
  x = jnp.full((n, n), 1e-3, dtype)
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
  seconds = []
  for _ in range(5):
    begin = time.perf_counter()
    multiply(x, x).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return 2 * n**3 / min(seconds[1:])  # the first compiles


def memory_bytes(device) -> int:
  """Most bytes in use so far: of the device's memory, or of this process where it tells none."""
  stats = device.memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
