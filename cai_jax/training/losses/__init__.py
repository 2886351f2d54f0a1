"""Training losses, one per file, registered by name.

`train.loss` selects one that learns single sequences, and `prefer.objective` one that compares
responses; what each trains on is part of its registration, see `loss.Loss`.

To add a loss, write a file that registers a function:

    from cai_jax.training.losses import register_loss

    @register_loss('my_loss', normalizations={'sequence': 'num_sequences'})
    def my_loss(graph, params, batch, sharding=None, remat='none', attention='xla'):
      ...
      return loss_sum, {'num_tokens': ..., 'num_sequences': ...}

A file in this folder is imported automatically. A file outside the package is named in
`config.plugins`. `nll.py` is the example to start from.

A loss receives the model in two halves (`graph` and `params`), a packed batch, and how to compute
the model (`sharding`, `remat`, `attention`). It returns sums, never means: the summed loss, and the
sums that it may be divided by. The train step adds these sums over micro-batches and devices and
divides once, so packing, padding, accumulation and parallelism cannot change the result.
`loss.LossFunction` documents every argument.

`balance.py` is the load-balancing loss, which the train step adds to any loss that returns how
experts were used.
"""

from cai_jax.runtime.registry import import_submodules
from cai_jax.training.losses.loss import (
  LOSSES,
  ROUTING,
  Batch,
  Loss,
  LossFunction,
  Sums,
  add_routing,
  register_loss,
  whole_of,
)
from cai_jax.training.losses.nll import negative_log_likelihood

__all__ = [
  'LOSSES',
  'ROUTING',
  'Batch',
  'Loss',
  'LossFunction',
  'Sums',
  'add_routing',
  'negative_log_likelihood',
  'register_loss',
  'whole_of',
]

import_submodules(__name__, __path__)
