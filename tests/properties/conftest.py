"""Prints how many drawn inputs each reader accepted and refused."""

import harness


def pytest_terminal_summary(terminalreporter):
  if not harness.COUNTS:
    return
  terminalreporter.section('inputs by reader')
  for name, counts in sorted(harness.COUNTS.items()):
    outcomes = ', '.join(f'{kind}: {number}' for kind, number in sorted(counts.items()))
    terminalreporter.write_line(f'{name}: {outcomes}')
