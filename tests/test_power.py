"""The smallest difference that a planned number of prompts can show."""

import numpy as np
import pytest

from cai_jax.evaluation import intervals
from cai_jax.evaluation.power import describe_power, smallest_difference
from cai_jax.pipeline import build
from cai_jax.pipeline.plan import describe_plan
from cai_jax.pipeline.schema import default_config
from cai_jax.runtime.errors import UserError


def test_the_smallest_difference_shrinks_with_the_number_of_prompts():
  drops = [smallest_difference(count, 0.5) for count in (50, 200, 800)]
  assert drops[0] > drops[1] > drops[2] > 0
  assert drops[1] / drops[2] == pytest.approx(2, rel=0.1)
  assert smallest_difference(20, 0.05) is None
  assert 'not even a drop to 0 at a rate of 5 %' in describe_power(20)
  assert '200 prompts x 3 seeds' in describe_power(200, 3)
  with pytest.raises(UserError, match='no prompts'):
    smallest_difference(0, 0.5)


@pytest.mark.parametrize(('rate', 'count'), ((0.5, 200), (0.5, 600), (0.05, 800)))
def test_a_simulation_finds_the_difference_in_80_percent(rate, count):
  rng = np.random.default_rng(0)
  lower = rate - smallest_difference(count, rate)
  both = min(rate * lower + 0.5 * np.sqrt(rate * (1 - rate) * lower * (1 - lower)), lower)
  tables = rng.multinomial(count, [rate - both, lower - both, 1 - rate - lower + 2 * both], 1500)
  ends = [intervals.tango_interval(int(g), int(l), count) for g, l, _ in tables]
  assert np.mean([low > 0 or high < 0 for low, high in ends]) == pytest.approx(0.8, abs=0.05)


def test_a_dry_run_says_what_the_held_out_prompts_can_show(tmp_path):
  config = default_config()
  config.model.base = 'tiny'
  for name, kind, count in (('eval_harmful', 'baited', 40), ('harmful', 'baited', 30)):
    source = config.prompts[name]
    source.source, source.name, source.limit = 'tiny', kind, count
    source.split = 'eval' if name.startswith('eval') else 'train'
  text = describe_plan(build(config, tmp_path / 'run'))
  assert 'prompts.harmful: 30' in text
  assert f'prompts.eval_harmful: {describe_power(40)}' in text
  assert not (tmp_path / 'run').exists()
