"""Settings of the chains: the sections `feedback` and `sampling` of the config."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.data import quality
from cai_jax.dialogue.format import FORMATS
from cai_jax.feedback.chain import TurnPlan
from cai_jax.feedback.variants import VARIANTS
from cai_jax.runtime import settings
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.sampling.types import SamplingConfig

# Fields of FeedbackConfig that no row of D_CAI depends on. A run may change them and continue.
ROW_INDEPENDENT_FIELDS = ('max_rate', 'topicality')


def build_options(name: str, pairs: Sequence[tuple[str, Any]]) -> Any:
  """Return the options of a variant, or None if it has none.

  Args:
    name: name of the variant.
    pairs: (name, value) pairs; options that are not given have their defaults.

  Raises:
    UserError: if the variant has no such option, or a value is not allowed.
  """
  owner = f'The variant {name!r}'
  return settings.build_options(VARIANTS[name].options, pairs, 'feedback.options', owner)


@dataclasses.dataclass(frozen=True)
class FeedbackConfig:
  """How responses are critiqued and revised.

  Raises:
    UserError: if a value is not allowed.
  """

  rounds: int = setting(4, "Number of revisions of each harmful prompt's response.", most=1000)
  variant: str = setting(
    'critique',
    "How a round revises: 'critique' (critique, then revision), 'direct' (no critique), another "
    'variant of docs/variants.md, or one that a plugin registers.',
  )
  options: tuple[tuple[str, Any], ...] = setting(
    (),
    "(name, value) pairs for the variant, such as (('n', 4),). docs/variants.md lists the options "
    'of each variant.',
    added=True,
  )
  context: str = setting(
    'fresh',
    "What a round sees besides the prompt: 'fresh' (the latest response only) or 'growing' (all "
    'earlier rounds).',
  )
  repeat_principles: bool = setting(
    True,
    'Whether the principle of each round is drawn independently. If false, no principle is drawn '
    'twice for a prompt.',
  )
  demonstrations: bool = setting(
    True,
    'Whether the few-shot demonstrations of the constitution precede the contexts of critiques and '
    'revisions.',
  )
  style: str = setting(
    'chat',
    "How conversations are rendered: 'chat' (the tokenizer's chat template) or 'plain' (the labels "
    'Human: and Assistant:).',
  )
  template_options: tuple[tuple[str, Any], ...] = setting(
    (), "(name, value) pairs for the chat template, such as (('enable_thinking', False),)."
  )
  shard_rows: int = setting(256, 'Rows in each file of D_CAI.')
  helpful_samples: int = setting(1, 'Number of responses to each helpful prompt.', most=10_000)
  topicality: bool = setting(
    True,
    'Whether to measure how much each revision depends on its prompt, by M_θ, for the defect '
    "'off_topic'. It needs M_θ as a local model, and costs about three passes over the revisions.",
    added=True,
  )
  max_rate: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: dict(quality.MAX_RATE),
    metadata={
      'doc': 'Largest allowed share of revisions with each defect, in [0, 1]. If a share is '
      "larger, and so is the lower end of Wilson's 95 % interval with the number of revised rows, "
      'the run stops before it trains. 1 sets no limit.',
      'keys': quality.FLAGS,
      'renamed': quality.RENAMED,
    },
  )

  def __post_init__(self):
    checks = (
      ('rounds', self.rounds >= 1, 'at least 1'),
      (
        'variant',
        self.variant in VARIANTS,
        f'one of {tuple(VARIANTS)}, or a variant that a file in config.plugins registers',
      ),
      ('style', self.style in FORMATS, f'one of {tuple(FORMATS)}'),
      (
        'template_options',
        len({name for name, _ in self.template_options}) == len(self.template_options),
        'pairs with distinct names',
      ),
      ('context', self.context in ('fresh', 'growing'), "'fresh' or 'growing'"),
      ('shard_rows', self.shard_rows >= 1, 'at least 1'),
      ('helpful_samples', self.helpful_samples >= 1, 'at least 1'),
    )
    for name, is_valid, allowed in checks:
      if not is_valid:
        raise UserError(f'feedback: {name}={getattr(self, name)!r} must be {allowed}.')
    build_options(self.variant, self.options)
    object.__setattr__(self, 'max_rate', dict(self.max_rate))
    for name, rate in self.max_rate.items():
      if name not in quality.FLAGS or not 0 <= rate <= 1:
        raise UserError(
          f'feedback: max_rate.{name}={rate!r} is not allowed. Give a rate in [0, 1] for one of '
          f'{tuple(quality.FLAGS)}.'
        )

  @property
  def variant_options(self) -> Any:
    """The options of the variant as its own dataclass, or None if it has none."""
    return build_options(self.variant, self.options)

  def plan(self) -> TurnPlan:
    """Return (turn name, stage name) of the turns that a revised chain takes at most."""
    return VARIANTS[self.variant].plan(self.rounds, self.variant_options)


@dataclasses.dataclass(frozen=True)
class StageSampling:
  """Sampling settings of each kind of turn: initial responses, critiques and revisions."""

  initial: SamplingConfig = SamplingConfig()
  critique: SamplingConfig = SamplingConfig()
  revision: SamplingConfig = SamplingConfig()

  def of_stage(self, name: str, variant: str) -> SamplingConfig:
    """Return the settings of a stage.

    Args:
      name: 'initial', 'critique', 'revision', or a stage that the variant adds.
      variant: name of the variant.
    """
    extra = VARIANTS[variant].stages.get(name)
    return getattr(self, name) if extra is None else extra.sampling(getattr(self, extra.parent))
