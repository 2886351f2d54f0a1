"""Which program a step uses: general ones first, and others once they are worth compiling."""

import pytest

from cai_jax.sampling.programs import Programs, Size


def make_programs(mixed=True, rows=(16, 32, 64, 96)):
  programs = Programs(rows, (32, 64, 128), ((1, 2, 3, 4),), (50,), mixed, 64)
  programs.record(programs.choose(96, 128, (2,)), 10.0, compiled=True)
  programs.record(programs.choose(96, 0, (2,)), 10.0, compiled=True)
  programs.record(Size(96, 128, (2,)), 0.249, compiled=False)  # 1 ms for a row
  return programs


def test_the_first_programs_hold_every_step():
  programs = make_programs()
  assert programs.choose(3, 5, (1,)) == Size(96, 128, (2,))
  assert programs.choose(3, 0, (1,)) == Size(96, 0, (2,))  # a burst takes no prefill
  assert programs.choose(3, 0, (3,)) == Size(96, 0, (3,))


def test_a_program_is_compiled_once_it_would_have_saved_half_of_its_compilation():
  programs = make_programs()
  sizes = [programs.choose(90, 30, (2,)) for _ in range(60)]
  count = sizes.index(Size(96, 32, (2,)))
  assert set(sizes[count:]) == {Size(96, 32, (2,))} and set(sizes[:count]) == {Size(96, 128, (2,))}
  assert count == pytest.approx(5.0 / (0.001 * (128 - 32)), abs=1)


def test_steps_of_several_sizes_share_a_program_that_holds_them():
  programs = make_programs()
  seen = set()
  for _ in range(60):
    seen |= {programs.choose(20, 30, (2,)), programs.choose(30, 60, (2,))}
  assert Size(32, 64, (2,)) in seen
  # Of what it saved before, only the difference to the new program counts.
  assert programs.choose(30, 60, (2,)) == Size(32, 64, (2,))


def test_a_step_has_as_many_tokens_as_bits_need():
  programs = make_programs()
  programs._compile_seconds = 0.0  # then every size is compiled at once
  assert programs.choose(3, 0, (1,)) == Size(64, 0, (1,))
  assert programs.choose(3, 5, (1,)) == Size(32, 32, (1,))
  assert programs.choose(3, 64, (1,)) == Size(16, 64, (1,))
  assert programs.choose(5, 0, (1,), drafts=3) == Size(16, 0, (2,), 3)  # the first with drafts
  separate = make_programs(False, (96,))
  separate._compile_seconds = 0.0
  assert separate.choose(0, 5, (1,)) == Size(0, 64, (1,))
