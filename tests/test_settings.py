"""Settings: flat names, identities, and changes between starts."""

import dataclasses

from cai_jax.runtime.settings import changed_settings, flatten, identity, setting


def test_a_missing_saved_setting_counts_as_its_default():
  defaults = {'train.loss': 'nll', 'train.filters': ()}
  current = {'train.epochs': 1, 'train.loss': 'nll', 'train.filters': ()}
  assert changed_settings({'train.epochs': 1}, current, defaults) == {}
  changed = changed_settings({'train.epochs': 2}, current | {'train.loss': 'dpo'}, defaults)
  assert changed == {'train.epochs': (2, 1), 'train.loss': ('nll', 'dpo')}


def test_settings_without_a_default_must_be_equal():
  assert changed_settings({}, {'data': 'a'}, {}) == {'data': (None, 'a')}
  assert changed_settings({'data': 'a'}, {}, {}) == {'data': ('a', None)}


def test_flatten_joins_nested_names_with_dots():
  assert flatten({'train': {'epochs': 1}, 'seed': 0}) == {'train.epochs': 1, 'seed': 0}


@dataclasses.dataclass(frozen=True)
class Grown:
  """Settings with a field that a later version added."""

  old: int = 1
  new: float = setting(0.0, 'A penalty.', added=True)


def test_an_added_field_changes_no_identity_while_it_has_its_default():
  assert identity(Grown()) == {'old': 1}
  assert identity(Grown(old=2, new=0.5)) == {'old': 2, 'new': 0.5}
