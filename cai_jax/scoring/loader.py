"""Load the models that scorers and measures use."""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh

from cai_jax.model import lm
from cai_jax.scoring import reward


@dataclasses.dataclass(frozen=True)
class ModelLoader:
  """A loader of the models that scorers and measures use, with one dtype and on one mesh.

  Attributes:
    dtype: dtype of parameters and activations, such as 'float32'.
    mesh: the devices that hold each model.
    aliases: folder or hub name of language models by short name, such as 'base' for M_θ.
  """

  dtype: str
  mesh: Mesh
  aliases: Mapping[str, str]

  def language_model(self, name: str) -> lm.LM:
    """Load a language model.

    Args:
      name: an alias, a folder or a hub name.

    Raises:
      UserError: if the checkpoint cannot be loaded.
    """
    return lm.load(self.aliases.get(name, name), self.dtype, self.mesh)

  def reward_model(self, name: str, style: str = 'chat') -> reward.RewardModel:
    """Load a reward model or classifier.

    Args:
      name: the folder or hub name of a sequence-classification checkpoint.
      style: how conversations are rendered, see `reward.load`.

    Raises:
      UserError: if the checkpoint cannot be loaded.
    """
    return reward.load(name, self.dtype, self.mesh, style)
