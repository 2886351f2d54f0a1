"""Parts of configs and weight tables of families with mixtures of experts."""

from typing import Any

from cai_jax.model.config import Experts, ModelConfig
from cai_jax.model.families.fields import read_flag, read_size
from cai_jax.model.families.shared import per_layer
from cai_jax.model.families.weight_table import Weight
from cai_jax.runtime.errors import UserError

OPTIONS = ('num_experts', 'num_local_experts')  # two names of the same entry


def expert_weights(
  block: str = 'mlp', names: tuple[str, str, str] = ('gate_proj', 'up_proj', 'down_proj')
) -> tuple[Weight, ...]:
  """Return the rows of a router and of experts that have tensors of their own.

  Args:
    block: Hugging Face's name of the feed-forward layer.
    names: those of an expert's matrices for gate, up and down.
  """
  kernels = zip(('gate', 'up', 'down'), names, ('EDM->M,D', 'EDM->M,D', 'EMD->D,M'), strict=True)
  return per_layer(
    Weight('mlp/router/kernel', f'{block}.gate.weight', 'DE->E,D'),
    *(
      Weight(f'mlp/experts/{ours}/kernel', f'{block}.experts.{{E}}.{theirs}.weight', axes)
      for ours, theirs, axes in kernels
    ),
  )


# The same in files that transformers 5 writes with save_original_format=False: the experts of a
# layer have two tensors, and their gates come before their `up`.
FUSED = per_layer(
  Weight('mlp/router/kernel', 'mlp.gate.weight', 'DE->E,D'),
  Weight('mlp/experts/gate/kernel', 'mlp.experts.gate_up_proj', 'EDM->E,+M,D'),
  Weight('mlp/experts/up/kernel', 'mlp.experts.gate_up_proj', 'EDM->E,+M,D'),
  Weight('mlp/experts/down/kernel', 'mlp.experts.down_proj', 'EMD->E,D,M'),
)


def read_experts(
  hf: dict[str, Any],
  number: int,
  per_token: int,
  size: tuple[str, int | None] = ('intermediate_size', None),
  renormalize: bool | None = None,
  dense_layers: tuple[int, ...] = (),
) -> Experts:
  """Return the mixture of experts of a parsed config.json.

  Args:
    hf: a parsed config.json.
    number: experts of a layer if config.json does not say.
    per_token: experts of a token if config.json does not say.
    size: the entry of the hidden channels of an expert, and its default; None makes it required.
    renormalize: whether weights are divided by their sum; None reads norm_topk_prob, which is false
      by default.
    dense_layers: as in `Experts`.

  Raises:
    UserError: if an entry is wrong, or two entries contradict each other.
  """
  counts = {key: hf[key] for key in OPTIONS if hf.get(key) is not None}
  if len(set(counts.values())) > 1:
    raise UserError(
      f'config.json: num_experts={counts["num_experts"]} and '
      f'num_local_experts={counts["num_local_experts"]} must be the same. Correct one of them.'
    )
  number = read_size(hf, next(iter(counts), 'num_experts'), number)
  chosen = read_size(hf, 'num_experts_per_tok', per_token)
  if chosen > number:
    raise UserError(
      f'config.json: num_experts_per_tok={chosen} is more than the {number} experts of a layer. '
      'Correct the one that does not belong to the weights.'
    )
  if renormalize is None:
    renormalize = read_flag(hf, 'norm_topk_prob')
  d_ff = read_size(hf, *size)
  return Experts(number, chosen, d_ff, renormalize, dense_layers=dense_layers)


def the_experts(config: ModelConfig) -> Experts:
  """Return the mixture of experts of a model that must have one.

  Raises:
    UserError: if it has none.
  """
  if config.experts is None:
    raise UserError(
      f'A {config.family} model needs experts. Set `experts`, or take another family.'
    )
  return config.experts
