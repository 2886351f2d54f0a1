"""Settings of AI feedback: the section `label` of the config."""

import dataclasses

from cai_jax.data.preferences import FORMS as FORMS_OF_COMPARISONS
from cai_jax.dialogue.format import FORMATS
from cai_jax.feedback.comparisons.asking import VERDICTS
from cai_jax.feedback.comparisons.pairing import PAIRINGS
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.sampling.remote import RemoteConfig

MAX_RESPONSES = 64


@dataclasses.dataclass(frozen=True)
class LabelConfig:
  """How a feedback model compares responses (Bai et al. 2022, section 4.1).

  Raises:
    UserError: if a value is not allowed.
  """

  responses: int = setting(
    0,
    'Number of responses that are sampled for each prompt and compared with each other, at least '
    '2. 0 samples none: the run has no stage `label`, unless `comparisons` names files.',
    added=True,
  )
  sampled_by: str = setting(
    'aligned',
    "Model that samples the responses: 'aligned' (M_aligned, as in the paper), 'base' (M_θ), a "
    'folder or a hub name.',
    added=True,
    path=True,
  )
  pairs: str = setting(
    'all',
    "Which responses to a prompt are compared, if there are more than two: 'all' (each pair), "
    "'first' (the first with each other one) or 'random' (one random pair of each prompt).",
    added=True,
  )
  comparisons: tuple[str, ...] = setting(
    (),
    'Files of comparisons to label again, in place of sampled responses.',
    added=True,
    path=True,
  )
  comparisons_limit: int = setting(
    -1,
    'Number of comparisons that are read of each file in `comparisons`; -1 reads all.',
    added=True,
  )
  form: str = setting(
    'trl',
    f'Form of the files in `comparisons`: one of {tuple(FORMS_OF_COMPARISONS)}, or one that a '
    'plugin registers.',
    added=True,
  )
  model: str = setting(
    'base',
    "The feedback model: 'base' (M_θ), 'aligned' (M_aligned), a folder, a hub name, or a judge "
    "such as 'tiny-oracle'. label.remote replaces it.",
    added=True,
    path=True,
  )
  constitution: str = setting(
    '',
    "Constitution whose principles the feedback model reads, as in constitution.path. '' means the "
    'constitution of the run.',
    added=True,
    path=True,
  )
  principles: int = setting(
    1,
    'Number of principles that are drawn for each pair without repetition. The label of a pair is '
    'the mean over them.',
    added=True,
  )
  verdict: str = setting(
    'logprobs',
    "'logprobs' reads the log-probabilities of the two labels. 'text' samples an answer and reads "
    'the label in it, for servers without log-probabilities.',
    added=True,
  )
  thoughts: int = setting(
    0,
    'Most tokens that the feedback model thinks aloud before its answer. 0 asks for the answer at '
    'once.',
    added=True,
    most=2**20,
  )
  samples: int = setting(
    1,
    'Number of chains of thought, or of sampled answers, over which the probabilities of a '
    'question are averaged.',
    added=True,
    most=1000,
  )
  temperature: float = setting(
    1.0, 'Temperature of thoughts, and of answers that are read as text.', added=True
  )
  clamp: tuple[float, float] = setting(
    (0.4, 0.6),
    'Least and largest probability that a question can give after a chain of thought, which makes '
    'answers overconfident. (0.0, 1.0) changes nothing. Without thoughts it has no effect.',
    added=True,
  )
  demonstrations: str = setting(
    '',
    "File of few-shot demonstrations of questions and answers. '' shows none. docs/preferences.md "
    'describes the forms.',
    added=True,
    path=True,
  )
  style: str = setting(
    'chat',
    "How the feedback model reads questions: 'chat' (its chat template) or 'plain' (the labels "
    'Human: and Assistant:). A model without a chat template always reads plain text.',
    added=True,
  )
  labelled: tuple[str, ...] = setting(
    (),
    'Files of comparisons whose better response is known, or names of such sets, such as '
    "('tiny',). The feedback model labels them too, and the summary gives its accuracy.",
    added=True,
    path=True,
  )
  labelled_form: str = setting('trl', 'Form of the files in `labelled`, as in `form`.', added=True)
  labelled_limit: int = setting(
    400, 'Number of comparisons that are read of each file in `labelled`; -1 reads all.', added=True
  )
  remote: RemoteConfig | None = None

  def __post_init__(self) -> None:
    low, high = self.clamp
    checks = (
      (
        'responses',
        not self.responses or 2 <= self.responses <= MAX_RESPONSES,
        f'0, or between 2 and {MAX_RESPONSES}',
      ),
      ('pairs', self.pairs in PAIRINGS, f'one of {tuple(PAIRINGS)}'),
      *(
        (name, getattr(self, name) in FORMS_OF_COMPARISONS, f'one of {tuple(FORMS_OF_COMPARISONS)}')
        for name in ('form', 'labelled_form')
      ),
      ('principles', self.principles >= 1, 'at least 1'),
      ('verdict', self.verdict in VERDICTS, f'one of {tuple(VERDICTS)}'),
      ('thoughts', self.thoughts >= 0, 'at least 0'),
      ('samples', self.samples >= 1, 'at least 1'),
      ('temperature', self.temperature >= 0, 'at least 0'),
      ('clamp', 0 <= low <= 0.5 <= high <= 1, 'two numbers in [0, 0.5] and [0.5, 1]'),
      ('style', self.style in FORMATS, f'one of {tuple(FORMATS)}'),
      *(
        (name, getattr(self, name) == -1 or getattr(self, name) > 0, '-1 or at least 1')
        for name in ('comparisons_limit', 'labelled_limit')
      ),
    )
    for name, valid, allowed in checks:
      if not valid:
        raise UserError(f'label: {name}={getattr(self, name)!r} must be {allowed}.')
    self._check_together()

  def _check_together(self) -> None:
    """Raise UserError if two settings contradict each other."""
    if self.responses and self.comparisons:
      raise UserError(
        f'label: responses={self.responses} samples the responses to compare, and comparisons='
        f'{self.comparisons!r} reads them from files. Set one of them.'
      )
    if self.remote is None and not self.model:
      raise UserError(
        "label: model='' names no feedback model. Set model, such as 'base', or remote.url."
      )
    if self.remote is not None and self.model not in ('', 'base'):
      raise UserError(
        f'label: model={self.model!r} and remote.url={self.remote.url!r} are both set, but only '
        "one model gives feedback. Set model='' or remote.url=''."
      )
    if self.samples > 1 and not self.draws:
      raise UserError(
        f'label: samples={self.samples} would ask the same question {self.samples} times. Set '
        "thoughts to a number of tokens, or verdict='text', and a temperature above 0."
      )

  @property
  def is_asked_for(self) -> bool:
    """Whether there is something to label."""
    return bool(self.responses or self.comparisons)

  @property
  def draws(self) -> bool:
    """Whether the feedback model's answer to a question depends on random draws."""
    return self.temperature > 0 and bool(self.thoughts or self.verdict == 'text')
