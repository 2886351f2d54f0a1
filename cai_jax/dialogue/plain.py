"""The plain format of Bai et al. 2022: each content follows a label such as "\\n\\nHuman:".

Nothing prevents a content from spelling a label. This is a weakness of the format itself.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from cai_jax.dialogue.encode import Encoder, Markup, Piece, Text, Tokens
from cai_jax.dialogue.format import FORMATS, TemplateOptions
from cai_jax.dialogue.messages import Message
from cai_jax.runtime.errors import UserError

LABELS = {
  'user': '\n\nHuman:',
  'assistant': '\n\nAssistant:',
  'critique_request': '\n\nCritiqueRequest:',
  'critique': '\n\nCritique:',
  'revision_request': '\n\nRevisionRequest:',
  'revision': '\n\nRevision:',
}


def join_plain(messages: Iterable[Mapping[str, str]]) -> str:
  """Return a dialogue in the paper's form: each content after its label and a space."""
  return ''.join(f'{LABELS[message["role"]]} {message["content"]}' for message in messages)


def split_plain(text: str, roles: Iterable[str] = tuple(LABELS)) -> list[dict[str, str]]:
  """Parse a dialogue in the plain format; the inverse of `join_plain`.

  Args:
    text: labels and contents. A label is recognized only after an empty line, so a content may
      contain "Human: ". One space after a label belongs to the label.
    roles: the roles whose labels are recognized.

  Returns:
    Messages with 'role' and 'content'.

  Raises:
    UserError: if the text does not begin with a label.
  """
  role_of = {LABELS[role]: role for role in roles}
  head, *parts = re.split('(' + '|'.join(map(re.escape, role_of)) + ')', text)
  if head or not parts:
    raise UserError(
      f'A plain dialogue must begin with one of the labels {list(role_of)}, but got {text[:60]!r}.'
    )
  return [
    {'role': role_of[label], 'content': content.removeprefix(' ')}
    for label, content in zip(parts[::2], parts[1::2], strict=True)
  ]


@FORMATS.register('plain')
@dataclasses.dataclass(frozen=True, eq=False)
class PlainFormat:
  """The plain format for one tokenizer. A system message comes first, without a label.

  Args:
    encoder: the encoder of the tokenizer, which needs an eos token.
    eos_token_ids: further ids that end a turn.
    template_options: must be empty, because there is no template.

  Raises:
    UserError: if there is no eos token, or an option is given.
  """

  encoder: Encoder
  eos_token_ids: tuple[int, ...] = ()
  template_options: TemplateOptions = ()

  def __post_init__(self) -> None:
    if self.encoder.tokenizer.eos_token_id is None:
      raise UserError(
        "style='plain' ends each turn with the tokenizer's eos token, but it has none. "
        'Give the tokenizer an eos token.'
      )
    if self.template_options:
      raise UserError(
        f'template_options: {self.template_options[0][0]!r} has no effect, because '
        "style='plain' uses no chat template. Remove it."
      )

  @functools.cached_property
  def stop_token_ids(self) -> tuple[int, ...]:
    """The tokenizer's eos token and `eos_token_ids`."""
    return tuple(dict.fromkeys((self._eos, *map(int, self.eos_token_ids))))

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """All labels. A base model writes one when it continues with the next speaker's turn."""
    return tuple(LABELS.values())

  @property
  def prompt_opens_reasoning(self) -> bool:
    """False: a prompt ends with a label."""
    return False

  def prompt(self, messages: Sequence[Message], reply_role: str) -> list[Piece]:
    """Return the pieces of the messages and the label of the reply."""
    return [*self._pieces(messages), Markup(LABELS[reply_role])]

  def reply(self, text: str, reply_role: str) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces of the label, and those of the text with the eos token."""
    return [Markup(LABELS[reply_role])], [Text(' ' + text), Tokens((self._eos,))]

  def conversation(self, messages: Sequence[Message]) -> list[Piece]:
    """Return the pieces of the messages and an eos token."""
    return [*self._pieces(messages), Tokens((self._eos,))]

  def _pieces(self, messages: Sequence[Message]) -> list[Piece]:
    bos = self.encoder.leading_bos
    pieces: list[Piece] = [] if bos is None else [Tokens((bos,))]
    for message in messages:
      role, content = message['role'], message['content']
      if isinstance(content, str):
        pieces.append(Text(content if role == 'system' else join_plain([message])))
      else:
        ids, rest = self._before_label(tuple(map(int, content)))
        pieces += [Markup(LABELS[role]), Tokens(ids), Text(rest)]
    return pieces

  @property
  def _eos(self) -> int:
    return int(self.encoder.tokenizer.eos_token_id)

  @functools.cached_property
  def _before_label(self) -> Callable[[tuple[int, ...]], tuple[tuple[int, ...], str]]:
    """Map the ids of a reply to (the ids before its first label, text left before the label).

    The text is not empty if a token contains the end of the reply and the start of the label.
    """

    def before_label(ids: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
      text = self.encoder.decode(ids)
      positions = [text.find(label) for label in self.stop_strings if label in text]
      if not positions:
        return ids, ''
      text = text[: min(positions)]
      for count in range(len(ids), -1, -1):
        kept = self.encoder.decode(ids[:count])
        if text.startswith(kept):
          return ids[:count], text[len(kept) :]
      return (), text

    return functools.lru_cache(maxsize=8192)(before_label)
