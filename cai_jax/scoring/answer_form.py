"""Answers in a fixed form: a model chooses one of a few labels, and may write short texts.

A guard model answers in a form that its training fixed, such as 'Safety: Unsafe' and a line of
categories. The form is a tuple of steps. A `Choice` gives the openings of the form and asks for the
probabilities of its labels; the most likely label continues the answer, as in greedy decoding. A
`Written` step lets the model write greedily. The answer has the same labels as a free greedy one
whenever the model keeps to its form, and has probabilities in any case.

Each label is a turn of the engine whose logit bias forces the label's token, so that its
log-probability, which the engine takes before biases, is known. Turns go through the journal.
"""

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cai_jax.dialogue.encode import Encoder, Markup, Piece, Text
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.completions import default_sizes
from cai_jax.sampling.config import round_up_length
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Chain, Completion, SamplingConfig, Turn

LINE_TOKENS = 16  # that an opening and a label take in any tokenizer, at most
BIAS = 100.0  # the largest bias; it forces a token whose logit is less than 100 below the largest


@dataclasses.dataclass(frozen=True)
class Chosen:
  """The result of a `Choice`.

  Attributes:
    label: the most likely label.
    probabilities: the softmax over the labels' first tokens that differ, by label.
    mass: probability of these tokens together, among all tokens; None if it is not known.
    at: where the label begins in an answer that was read as text.
  """

  label: str
  probabilities: Mapping[str, float]
  mass: float | None
  at: int = 0


class Answer(NamedTuple):
  """An answer in a form.

  Attributes:
    choices: the result of each `Choice`, by its name.
    texts: what the model wrote in each `Written` step, by its name.
  """

  choices: dict[str, Chosen]
  texts: dict[str, str]


@dataclasses.dataclass
class Draft:
  """An answer while it is given.

  Attributes:
    encoder: the encoder of the model's tokenizer.
    prompt: the pieces of the prompt.
    stop_token_ids: tokens that end the model's reply.
    said: the answer so far.
    answer: the results so far.
  """

  encoder: Encoder
  prompt: Sequence[Piece]
  stop_token_ids: tuple[int, ...] = ()
  said: str = ''
  answer: Answer = dataclasses.field(default_factory=lambda: Answer({}, {}))

  def tokens(self, more: str = '') -> list[int]:
    """Return the token ids of the prompt, the answer so far, and more text of it."""
    text = self.said + more
    return self.encoder.encode([*self.prompt, Text(text)] if text else self.prompt)

  def missing(self, opening: str) -> str:
    """Return an opening, or '' if the prompt or the answer ends with it already."""
    end = self.prompt[-1]
    last = self.said or (end.text if isinstance(end, Markup) else '')
    return '' if opening and last.endswith(opening) else opening


class Step(Protocol):
  """A step of a form."""

  @property
  def name(self) -> str:
    """Name of the choice or text."""
    ...

  def ask(self, draft: Draft) -> Generator[Turn, Completion, None]:
    """Ask the model with turns of the engine, and add the result to the draft."""
    ...

  def longest(self, draft: Draft) -> int:
    """Add the longest text of this step to the draft; return the tokens to add to its own."""
    ...

  def check(self, draft: Draft) -> None:
    """Check that the tokenizer suits the step, or raise UserError."""
    ...

  @property
  def most_tokens(self) -> int:
    """Number of tokens that a model needs to write the step by itself, at most."""
    ...

  def read(self, text: str, at: int, answer: Answer) -> int | None:
    """Add what a whole answer says to the results.

    Args:
      text: the answer.
      at: where the step begins in it.
      answer: the results so far.

    Returns:
      Where the next step begins; None if the answer does not have the form.
    """
    ...


Form = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
  """A choice of one of several labels.

  Attributes:
    name: name of the choice.
    labels: the labels, with the white space before them.
    opening: the text before the label. It is left out if the prompt ends with it.
  """

  name: str
  labels: tuple[str, ...]
  opening: str = ''

  def split(self, draft: Draft) -> tuple[list[int], tuple[int, ...]]:
    """Return the context of the choice, and the token that tells each label from the others.

    Labels may begin with the same tokens, which are then a part of the context.

    Raises:
      UserError: if the tokenizer has no tokens for a label, or gives two labels the same ones.
    """
    opening = draft.missing(self.opening)
    wholes = [draft.tokens(opening + label) for label in self.labels]
    split = 0
    while len({tuple(whole[: split + 1]) for whole in wholes}) == 1:
      if split == min(map(len, wholes)):  # all labels are equal
        break
      split += 1
    heads = tuple(whole[split] if split < len(whole) else None for whole in wholes)
    unknown = draft.encoder.tokenizer.unk_token_id
    known = [head for head in heads if head is not None and head != unknown]
    if len({*known}) < len(self.labels):
      raise UserError(
        f'The tokenizer has no tokens that tell the labels {self.labels} apart: after their common '
        f'beginning they are {heads}. Use the tokenizer of the checkpoint that this answer '
        'belongs to.'
      )
    return wholes[0][:split], tuple(known)

  def ask(self, draft: Draft) -> Generator[Turn, Completion, None]:
    """Ask for the log-probability of each label, and continue with the most likely one."""
    context, heads = self.split(draft)
    values = []
    for label, head in zip(self.labels, heads, strict=True):
      sampling = SamplingConfig(temperature=0.0, max_tokens=1, logit_bias=((head, BIAS),))
      completion = yield Turn(f'{self.name}: {label.strip()}', context, sampling)
      # Beyond the reach of the bias, the probability is below exp(-100).
      values.append(completion.logprobs[0] if completion.tokens == [head] else -BIAS)
    total = float(np.logaddexp.reduce(values))
    shares = {
      label: math.exp(value - total) for label, value in zip(self.labels, values, strict=True)
    }
    chosen = max(self.labels, key=shares.__getitem__)  # the first of equally likely ones
    draft.answer.choices[self.name] = Chosen(chosen, shares, min(1.0, math.exp(total)))
    draft.said += draft.missing(self.opening) + chosen

  def longest(self, draft: Draft) -> int:
    """Add the opening and the longest label to the draft."""
    draft.said += draft.missing(self.opening) + max(self.labels, key=len)
    return 1

  def check(self, draft: Draft) -> None:
    """Check that the tokenizer tells the labels apart."""
    self.split(draft)

  @property
  def most_tokens(self) -> int:
    """Number of tokens for the opening and the label."""
    return LINE_TOKENS

  def read(self, text: str, at: int, answer: Answer) -> int | None:
    """Read the label after the opening, in any case. Its probability is 1."""
    names = {label.strip().lower(): label for label in self.labels}
    longest_first = '|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    opening = re.escape(self.opening.strip())
    pattern = re.compile(rf'{opening}\s*({longest_first})(?!\w)', re.IGNORECASE)
    found = pattern.search(text, at) if opening else pattern.match(text, at)
    if not found:
      return None
    label = names[found[1].lower()]
    shares = {other: float(other == label) for other in self.labels}
    answer.choices[self.name] = Chosen(label, shares, None, found.start(1))
    return found.end()


@dataclasses.dataclass(frozen=True)
class Written:
  """A line that the model writes greedily, if an earlier choice calls for it.

  Attributes:
    name: name of the text.
    opening: the text before it.
    max_tokens: maximum number of its tokens.
    choice: name of the earlier choice.
    labels: the labels of that choice after which the model writes.
    otherwise: text of the answer after any other label, with its opening.
  """

  name: str
  opening: str
  max_tokens: int
  choice: str
  labels: tuple[str, ...]
  otherwise: str = ''

  def ask(self, draft: Draft) -> Generator[Turn, Completion, None]:
    """Let the model write, if the earlier choice calls for it."""
    if draft.answer.choices[self.choice].label not in self.labels:
      draft.said += self.otherwise
      return
    sampling = SamplingConfig(
      temperature=0.0,
      max_tokens=self.max_tokens,
      stop=('\n',),
      stop_token_ids=draft.stop_token_ids,
    )
    completion = yield Turn(self.name, draft.tokens(self.opening), sampling)
    # Bytes that are no text are encoded as more tokens than were written. The next step must fit.
    most, text = len(draft.tokens(self.opening)) + self.max_tokens, completion.text
    while len(draft.tokens(self.opening + text)) > most:
      text = text[:-1]
    draft.answer.texts[self.name] = text
    draft.said += self.opening + text

  def longest(self, draft: Draft) -> int:
    """Add the longer one of both openings to the draft."""
    draft.said += max(self.opening, self.otherwise, key=len)
    return self.max_tokens + 1

  def check(self, draft: Draft) -> None:
    """Every tokenizer suits a text."""

  @property
  def most_tokens(self) -> int:
    """Number of tokens for the opening and the text."""
    return LINE_TOKENS + self.max_tokens

  def read(self, text: str, at: int, answer: Answer) -> int | None:
    """Read the line after the opening, if the earlier choice calls for it."""
    if answer.choices[self.choice].label not in self.labels:
      return at
    found = re.compile(rf'\s*{re.escape(self.opening.strip())}[ \t]*([^\n]*)').match(text, at)
    if not found:
      return None
    answer.texts[self.name] = found[1]
    return found.end()


def count_tokens(encoder: Encoder, prompt: Sequence[Piece], form: Form) -> int:
  """Return the number of tokens of a prompt with the longest answer in a form.

  Args:
    encoder: the encoder of the model's tokenizer.
    prompt: the pieces of the prompt.
    form: the form of the answer.
  """
  draft = Draft(encoder, prompt)
  more = sum(step.longest(draft) for step in form)
  return len(draft.tokens()) + more


def check_form(encoder: Encoder, prompt: Sequence[Piece], form: Form) -> None:
  """Check that a tokenizer tells the labels of each choice apart.

  Args:
    encoder: the encoder of the model's tokenizer.
    prompt: the pieces of a prompt.
    form: the form of the answer.

  Raises:
    UserError: if it does not.
  """
  draft = Draft(encoder, prompt)
  for step in form:
    step.check(draft)
    step.longest(draft)


def ask(
  lm: LM,
  prompts: Sequence[Sequence[Piece]],
  form: Form,
  journal: str | os.PathLike | None = None,
) -> list[Answer]:
  """Let a model answer prompts in a form.

  Equal prompts are asked once. An answer depends on its own prompt, and on the others by rounding
  at most.

  Args:
    lm: the model.
    prompts: the pieces of each prompt.
    form: the form of the answers.
    journal: folder in which turns are stored and looked up; None stores none.

  Returns:
    One answer per prompt, in order.

  Raises:
    UserError: if a prompt with its answer does not fit into the model's context, or the tokenizer
      does not tell labels apart.
  """
  if not prompts:
    return []
  encoder = Encoder(lm.tokenizer)
  eos = lm.tokenizer.eos_token_id
  ends = (*lm.eos_token_ids, *(() if eos is None else (eos,)))
  drafts: dict[str, Draft] = {}
  names, longest = [], 0
  for prompt in prompts:
    name = _digest(encoder.encode(prompt))
    names.append(name)
    if name not in drafts:
      drafts[name] = Draft(encoder, prompt, tuple(dict.fromkeys(ends)))
      longest = max(longest, count_tokens(encoder, prompt, form))
  length = min(round_up_length(longest), max(lm.max_positions, longest))
  stored = None if journal is None else Journal(journal)
  try:
    config = default_sizes(lm, len(drafts))
    engine = Engine({'base': lm}, length=length, seed=0, config=config, journal=stored)
    for _ in engine.run((name, _answer(draft, form)) for name, draft in drafts.items()):
      pass
  finally:
    if stored is not None:
      stored.close()
  return [drafts[name].answer for name in names]


def _answer(draft: Draft, form: Form) -> Chain:
  """Yield the turns of an answer."""
  for step in form:
    yield from step.ask(draft)


def _digest(tokens: Sequence[int]) -> str:
  """Return the id of the chain of a prompt."""
  return hashlib.blake2b(np.asarray(tokens, '<i4').tobytes(), digest_size=16).hexdigest()
