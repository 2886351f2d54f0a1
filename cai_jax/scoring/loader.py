"""Load the models that scorers and measures use."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from cai_jax.dialogue import Dialogue
from cai_jax.dialogue.format import TemplateOptions
from cai_jax.model import lm
from cai_jax.model.classifier import ClassifierInfo, inspect_classifier
from cai_jax.model.quantized.kernel import FULL
from cai_jax.scoring import reward

if TYPE_CHECKING:  # a judge is loaded with a `ModelLoader`
  from cai_jax.scoring.judge_client import JudgeClient
  from cai_jax.scoring.judge_server import JudgeServer


class Inspected(BaseException):
  """Ends a function that asked a `ModelLoader` with `inspect_only` for a model, which is valid.

  Args:
    path: folder or hub name of the model.
  """

  def __init__(self, path: str):
    super().__init__(path)
    self.path = path


@dataclasses.dataclass(frozen=True)
class ModelLoader:
  """A loader of the models that scorers and measures use, with one dtype and on one mesh.

  Attributes:
    dtype: dtype of parameters and activations, such as 'float32'.
    mesh: the devices that hold each model.
    aliases: folder or hub name of language models by short name, such as 'base' for M_θ.
    reward_models: folders of reward models by short name, which the run trains. With `inspect_only`
      they count as valid, because they may not exist yet.
    template_options: (name, value) pairs for chat templates. A reward model's template gets those
      that it reads.
    inspect_only: whether to check a model instead of loading it, and to raise `Inspected` if it is
      valid. A run then finds a model that a scorer or measure lacks before it begins.
    style: prompt format of the run's conversations, in which M_θ reads them.
    clients: maps the settings of a served model and its role, 'judge' or 'guard', to the client
      that asks it; None if no model is served.
    long_context: whether M_θ has its whole context, see `lm.load`. Other models have the default.
    loaded: language models that are in memory already, by folder or hub name.
    rating_journal: folder in which the turns of guard models and of rubrics are stored, if there is
      one.
    weights: format of M_θ's linear layers, see `lm.load`. Other models are in full precision.
  """

  dtype: str
  mesh: Mesh
  aliases: Mapping[str, str]
  template_options: TemplateOptions = ()
  inspect_only: bool = False
  style: str = 'chat'
  clients: Callable[[JudgeServer, str], JudgeClient] | None = None
  long_context: bool = False
  loaded: Mapping[str, lm.LM] = dataclasses.field(default_factory=dict)
  rating_journal: pathlib.Path | None = None
  reward_models: Mapping[str, str] = dataclasses.field(default_factory=dict)
  weights: str = FULL

  def language_model(self, name: str) -> lm.LM:
    """Load a language model.

    Args:
      name: an alias, a folder or a hub name.

    Raises:
      UserError: if the checkpoint cannot be loaded.
    """
    if self.inspect_only:
      raise Inspected(self.inspect_language_model(name)[0])
    path, long_context = self._find(name)
    if path in self.loaded:
      return self.loaded[path]
    weights = self.weights if path == self.aliases.get('base') else FULL
    return lm.load(path, self.dtype, self.mesh, long_context=long_context, weights=weights)

  def inspect_language_model(self, name: str) -> tuple[str, lm.ModelInfo]:
    """Check a language model without loading its weights.

    Args:
      name: an alias, a folder or a hub name.

    Returns:
      Its folder or hub name, and what is known of it.

    Raises:
      UserError: if the checkpoint cannot be loaded.
    """
    path, long_context = self._find(name)
    return path, lm.inspect_model(path, long_context)

  def reward_model(self, name: str, style: str = 'chat') -> reward.RewardModel:
    """Load a reward model or classifier.

    Args:
      name: a name in `reward_models`, or the folder or hub name of a sequence-classification
        checkpoint.
      style: how conversations are rendered, see `reward.load`.

    Raises:
      UserError: if the checkpoint cannot be loaded.
    """
    if self.inspect_only and name in self.reward_models:
      raise Inspected(name)
    if self.inspect_only:
      self.inspect_reward_model(name, style)
      raise Inspected(name)
    path = self.reward_models.get(name, name)
    return reward.load(path, self.dtype, self.mesh, style, self.template_options)

  def inspect_reward_model(self, name: str, style: str = 'chat') -> tuple[ClassifierInfo, Dialogue]:
    """Check a reward model or classifier without loading its weights.

    Args:
      name: the folder or hub name of a sequence-classification checkpoint.
      style: how conversations are rendered, see `reward.load`.

    Returns:
      What is known of it, and the dialogue that renders conversations for it.

    Raises:
      UserError: if the checkpoint cannot be loaded.
    """
    info = inspect_classifier(self.reward_models.get(name, name))
    return info, reward.make_dialogue(info, style, self.template_options)

  def client(self, server: JudgeServer, role: str) -> JudgeClient:
    """Return what asks a served judge or guard model.

    Args:
      server: its address and settings.
      role: 'judge' or 'guard'.
    """
    assert self.clients is not None, 'served models need a loader with clients'
    return self.clients(server, role)

  def _find(self, name: str) -> tuple[str, bool]:
    """Return the folder or hub name of a language model, and whether it has its whole context."""
    path = self.aliases.get(name, name)
    return path, self.long_context and path == self.aliases.get('base')
