"""How many tokens each row drafts in a burst, chosen by measured speed.

On CPUs a step is compiled for at least so many rows that a row's bits do not depend on the number.
When fewer rows are active, drafts fill the rest at almost no cost; when more are, each drafted
token costs as much as a row. So drafts are tried only when few rows are active, and used if they
turn out to be faster. The choice changes no text and, on CPUs, no bit.
"""

import dataclasses

MOST_DRAFTS = 7  # drafted tokens of a row at most
PERIOD = 32  # bursts, of which one is run the other way, so that both stay measured
GAIN = 1.1  # how many times as fast the other way must be to change to it
MEMORY = 0.7  # weight of earlier bursts in an average


@dataclasses.dataclass
class _Choice:
  """What is known of one number of drafts.

  Attributes:
    drafts: whether drafting is the faster way so far.
    speed: tokens of a row per second, without and with drafts; 0 is unknown.
    spent: seconds of bursts in which drafts were possible and not tried.
    bursts: number of bursts since both ways were measured.
  """

  drafts: bool = False
  speed: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
  spent: float = 0.0
  bursts: int = 0


class DraftChoice:
  """Chooses the number of drafts of each burst, from the speed of earlier bursts.

  Args:
    rows: number of rows of the smallest step without drafts.
  """

  def __init__(self, rows: int):
    self._rows = rows
    self._choices: dict[int, _Choice] = {}
    self._compilation = 0.0  # the longest burst, in seconds, for which a program was compiled

  def next(self, active: int) -> int:
    """Return how many tokens each row drafts in the next burst.

    The first trial compiles a program. It comes once as much time has been spent without drafts as
    a compilation takes, so a trial never costs more than the run has taken without it.

    Args:
      active: number of active rows, the most of all batch shards.
    """
    drafts = self._most(active)
    if not drafts:
      return 0
    choice = self._choices.setdefault(drafts, _Choice())
    if not choice.speed[False]:
      return 0
    if not choice.speed[True]:
      return drafts if choice.spent >= self._compilation else 0
    choice.bursts += 1
    return drafts if choice.drafts != (choice.bursts % PERIOD == 0) else 0

  def record(self, active: int, drafts: int, seconds: float, tokens: float, compiled: bool) -> None:
    """Take note of a burst.

    Args:
      active: number of active rows at its start, as given to `next`.
      drafts: number of tokens that each row drafted, as `next` returned.
      seconds: how long it took.
      tokens: how many tokens a row sampled that stayed active, on average.
      compiled: whether a program was compiled for it.
    """
    if compiled:
      self._compilation = max(self._compilation, seconds)
      return
    choice = self._choices.get(drafts or self._most(active))
    if choice is None:
      return
    way, speed = drafts > 0, tokens / seconds
    before = choice.speed[way]
    choice.speed[way] = MEMORY * before + (1 - MEMORY) * speed if before else speed
    choice.spent += 0 if drafts else seconds
    used, other = choice.speed[choice.drafts], choice.speed[not choice.drafts]
    if used and other > GAIN * used:
      choice.drafts = not choice.drafts

  def _most(self, active: int) -> int:
    """Return how many tokens each row may draft; 0 if there are too many rows.

    A row has 1, 2, 4 or 8 tokens in a step, so that few programs are compiled.
    """
    width = 1
    while 2 * width * active <= self._rows and 2 * width <= MOST_DRAFTS + 1:
      width *= 2
    return width - 1 if active else 0
