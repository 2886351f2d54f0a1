"""The registry of baselines."""

from collections.abc import Callable, Sequence

from cai_jax.constitution import Constitution
from cai_jax.data.prompts import Prompt
from cai_jax.runtime.registry import Registry

# Maps a constitution and the held-out prompts to the prompts that M_θ answers instead, with the
# same ids in the same order.
BASELINES: Registry[Callable[[Constitution, Sequence[Prompt]], list[Prompt]]] = Registry('baseline')
