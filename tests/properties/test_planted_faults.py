"""The harness finds mistakes: each fault planted in a reader's source breaks the property."""

import importlib
import importlib.util
import pathlib

import harness
import pytest

MODULES = sorted(
  path.stem for path in pathlib.Path(__file__).parent.glob('test_properties_of_*.py')
)
FAULTS = [
  fault for name in MODULES for fault in getattr(importlib.import_module(name), 'FAULTS', [])
]


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: f'{fault.module}:{fault.old:.20}')
def test_the_source_contains_the_place_of_each_fault(fault):
  source = pathlib.Path(importlib.util.find_spec(fault.module).origin).read_text()
  assert source.count(fault.old) == 1
  assert fault.old != fault.new


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: f'{fault.module}:{fault.old:.20}')
def test_planted_fault_is_found(fault):
  with pytest.raises(harness.Violation):
    harness.check_reader(fault.reader, examples=1000, fault=fault)
