"""Baselines change the prompts of M_θ, and nothing else."""

import pytest

from cai_jax.constitution import Constitution, Principle
from cai_jax.data.prompts import Prompt
from cai_jax.evaluation.baselines import BASELINES
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.runtime.errors import UserError

CONSTITUTION = Constitution(
  (
    Principle('a', 'Critique it.', 'Remove insults.'),
    Principle('b', 'Criticise it.', 'Remove lies.'),
    Principle('c', 'Say what is rude.', 'Remove insults.'),
  )
)
USER = {'role': 'user', 'content': 'Hello'}


def test_the_constitution_stands_once_in_the_system_message():
  plain, instructed = BASELINES['constitution_prompt'](
    CONSTITUTION,
    [Prompt('1', (USER,)), Prompt('2', ({'role': 'system', 'content': 'Be brief.'}, USER))],
  )
  assert plain.id == '1' and plain.messages[1:] == (USER,) == instructed.messages[1:]
  system = plain.messages[0]
  assert system['role'] == 'system'
  assert system['content'].count('Remove insults.') == system['content'].count('Remove lies.') == 1
  assert instructed.messages[0]['content'] == 'Be brief.\n\n' + system['content']


@pytest.mark.parametrize('names', ['constitution_prompt', ('none',), ('constitution_prompt',) * 2])
def test_unknown_baselines_are_rejected(names):
  with pytest.raises(UserError, match='baselines=.*constitution_prompt'):
    EvaluationConfig(baselines=names)
