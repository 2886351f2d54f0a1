"""What is compared, and what comes of it."""

import dataclasses
from typing import Any

from cai_jax.dialogue import Message
from cai_jax.feedback.comparisons.comparing import Reading
from cai_jax.feedback.comparisons.pairing import Pair


@dataclasses.dataclass(frozen=True)
class Item:
  """A prompt whose responses are compared.

  Attributes:
    id: unique in the job; random draws depend on it.
    name: the id that rows have.
    messages: the conversation, which ends with the user's turn.
    responses: the two responses to compare; () samples them.
    better: 0 or 1, the better one of two given responses; None if it is not known.
    source: the file or set that the responses come from; '' if they are sampled.
    truncated: for each given response, whether it was cut off at a length limit.
    is_written: whether its labels are rows of the result. Those of labelled sets only count.
  """

  id: str
  name: str
  messages: tuple[Message, ...]
  responses: tuple[str, ...] = ()
  better: int | None = None
  source: str = ''
  truncated: tuple[bool, ...] = ()
  is_written: bool = True


@dataclasses.dataclass(frozen=True)
class Label:
  """The label of two responses.

  Attributes:
    item: the prompt.
    pair: the indices of the responses.
    texts: the responses.
    truncated: for each response, whether it was cut off at a length limit.
    readings: the answers to all questions about them, at least one.
  """

  item: Item
  pair: Pair
  texts: tuple[str, str]
  truncated: tuple[bool, bool]
  readings: tuple[Reading, ...]

  @property
  def probability(self) -> float:
    """The soft label: the mean probability that the first response is better."""
    return sum(reading.probability for reading in self.readings) / len(self.readings)

  def row(self, has_several_pairs: bool) -> dict[str, Any]:
    """Return the label in TRL's conversational preference format, with what it was made of.

    The response that is probably better is `chosen`; of two that are equally good, it is the first.

    Args:
      has_several_pairs: whether a prompt can have several rows, whose ids then name the responses.
    """
    better = int(self.probability < 0.5)
    numbers = [self.pair[better] + 1, self.pair[1 - better] + 1]
    suffix = f'/{self.pair[0] + 1}-{self.pair[1] + 1}' if has_several_pairs else ''
    chosen, rejected = self.texts[better], self.texts[1 - better]
    return {
      'id': self.item.name + suffix,
      'prompt': [dict(message) for message in self.item.messages],
      'chosen': [{'role': 'assistant', 'content': chosen}],
      'rejected': [{'role': 'assistant', 'content': rejected}],
      'probability': max(self.probability, 1 - self.probability),
      'source': 'label',
      'truncated': [self.truncated[better], self.truncated[1 - better]],
      'responses': numbers,
      'readings': [_reading_row(reading, better) for reading in self.readings],
    }


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of a chain.

  Attributes:
    item: the prompt.
    labels: the labels of its pairs.
    left_out: why other pairs were not compared; see `reason_to_leave_out`.
    ended: why the chain ended early; '' if it did not. It then has no labels.
  """

  item: Item
  labels: tuple[Label, ...] = ()
  left_out: tuple[str, ...] = ()
  ended: str = ''


def _reading_row(reading: Reading, better: int) -> dict[str, Any]:
  """Return a reading as rows have it.

  Args:
    reading: the reading.
    better: the response, 0 or 1, that is `chosen`.
  """
  answer = reading.answer
  return {
    'principle': reading.principle,
    'option_a': 'chosen' if reading.option_a == better else 'rejected',
    'probability_a': answer.probability,
    'probability': 1 - reading.probability if better else reading.probability,
    'label_mass': answer.mass,
    'text': answer.text,
  }
