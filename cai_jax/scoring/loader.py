"""Load the models that scorers and measures use."""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh

from cai_jax.dialogue.format import TemplateOptions
from cai_jax.model import lm
from cai_jax.scoring import reward


@dataclasses.dataclass(frozen=True)
class ModelLoader:
  """A loader of the models that scorers and measures use, with one dtype and on one mesh.

  Attributes:
    dtype: dtype of parameters and activations, such as 'float32'.
    mesh: the devices that hold each model.
    aliases: folder or hub name of language models by short name, such as 'base' for M_θ.
    template_options: (name, value) pairs for chat templates. A reward model's template gets those
      that it reads.
  """

  dtype: str
  mesh: Mesh
  aliases: Mapping[str, str]
  template_options: TemplateOptions = ()

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
    return reward.load(name, self.dtype, self.mesh, style, self.template_options)
