"""Error messages fit in a terminal, whatever they quote."""

import pickle

import pytest

from cai_jax.runtime.errors import MAX_MESSAGE, UnreachableError, UserError, show


@pytest.mark.parametrize('kind', [UserError, UnreachableError])
def test_messages_are_printable_and_short(kind):
  message = str(kind('\x1b[31mred\ud800\u202e\r\nsecond line ' + 'x' * 5000 + ' the way out'))
  assert message.startswith('\\x1b[31mred\\ud800\\u202e\\r\nsecond line xxx')
  assert message.endswith('the way out') and len(message) <= MAX_MESSAGE
  assert str(pickle.loads(pickle.dumps(kind(message)))) == message


def test_values_are_quoted_like_repr_but_short_and_fast():
  cyclic = []
  cyclic.append(cyclic)
  bomb = 'lol'
  for _ in range(60):
    bomb = [bomb] * 9
  for value in [None, 1.5, 'a\x1b', ['u', 'a'], {'a': [1]}]:
    assert show(value) == repr(value)
  for value in [cyclic, bomb, 'x' * 10**7, 10**5000, b'\xff' * 300, {'k' * 500: 'v' * 500}]:
    assert len(show(value)) <= 100 and len(show(value, 40)) <= 40
