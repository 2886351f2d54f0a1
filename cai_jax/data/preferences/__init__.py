"""Preferences between responses: comparisons of two, and responses judged on their own.

`read_comparisons` and `read_judged` read files in the forms of `FORMS`, `write_comparisons` and
`write_judged` write them, and `units` makes the input of training.
"""

from cai_jax.data.preferences import d_cai_pairs as d_cai_pairs  # registers its form
from cai_jax.data.preferences import hh_rlhf as hh_rlhf  # registers its form
from cai_jax.data.preferences import hhh as hhh  # registers its form
from cai_jax.data.preferences.comparisons import Comparison, JudgedResponse, judge_both
from cai_jax.data.preferences.d_cai_pairs import PAIRS, write_preferences
from cai_jax.data.preferences.forms import FORMS
from cai_jax.data.preferences.reading import PreferenceSet, read_comparisons, read_judged
from cai_jax.data.preferences.splits import find_held_out, group_comparisons
from cai_jax.data.preferences.trl import write_comparisons, write_judged

__all__ = [
  'FORMS',
  'PAIRS',
  'Comparison',
  'PreferenceSet',
  'JudgedResponse',
  'find_held_out',
  'group_comparisons',
  'judge_both',
  'read_comparisons',
  'read_judged',
  'write_comparisons',
  'write_judged',
  'write_preferences',
]
