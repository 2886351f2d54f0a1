"""The chat format: the chat template that comes with a tokenizer.

The template is rendered with numbered slots in place of contents. The result, called a layout,
shows which characters are markup and which are content. It depends only on the roles, so it is
rendered once for each sequence of roles.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jinja2

from cai_jax.dialogue.encode import (
  BREAK,
  RESERVED,
  SLOT,
  Encoder,
  Markup,
  Piece,
  Text,
  Tokens,
  break_spelling,
)
from cai_jax.dialogue.format import FORMATS, TemplateOptions
from cai_jax.dialogue.messages import REPLY_ROLES, REQUEST_ROLES, Message
from cai_jax.runtime.errors import UserError

_CHAT_ROLE = {
  'system': 'system',
  **{role: 'user' for role in REQUEST_ROLES},
  **{role: 'assistant' for role in REPLY_ROLES},
}
_NOT_OPTIONS = ('messages', 'add_generation_prompt')  # set by us
_SLOT_PATTERN = re.compile(f'{SLOT}(\\d+){SLOT}')

# A chat template may print today's date. The tokens of a run must not change at midnight, so every
# template sees this day: the default of Llama 3's template.
_DATE = {'%d': '26', '%m': '07', '%b': 'Jul', '%B': 'July', '%y': '24', '%Y': '2024'}
_DATE |= {'%a': 'Fri', '%A': 'Friday', '%H': '12', '%M': '00', '%S': '00'}
_FIXED_DATE = (
  '{% macro strftime_now(form) %}{{ form'
  + ''.join(f" | replace('{field}', '{value}')" for field, value in _DATE.items())
  + ' }}{% endmacro %}'
)

# A rendered template as [text, slot, text, slot, ..., text]; a slot is the index of the message
# whose content belongs there.
Layout = list[Any]


@FORMATS.register('chat')
@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
  """The chat template of one tokenizer.

  Args:
    encoder: the encoder of the tokenizer, which needs a chat template.
    eos_token_ids: further ids that end a turn.
    template_options: (name, value) pairs for the template.

  Raises:
    UserError: if there is no chat template, or it does not read an option.
  """

  encoder: Encoder
  eos_token_ids: tuple[int, ...] = ()
  template_options: TemplateOptions = ()

  def __post_init__(self) -> None:
    if not self.encoder.tokenizer.chat_template:
      raise UserError(
        "The tokenizer has no chat template. Use style='plain', or give the tokenizer a template."
      )
    for name, _ in self.template_options:
      if name in _NOT_OPTIONS or not re.search(rf'\b{re.escape(name)}\b', self._template):
        raise UserError(
          f'template_options: the chat template reads no option named {name!r}. Remove it.'
        )

  @functools.cached_property
  def stop_token_ids(self) -> tuple[int, ...]:
    """The tokenizer's eos token, `eos_token_ids`, and the template's end of turn."""
    ids = (self.encoder.tokenizer.eos_token_id, *self.eos_token_ids, self._end_of_turn)
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None))

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """Always (), because only tokens end a turn."""
    return ()

  @functools.cached_property
  def prompt_opens_reasoning(self) -> bool:
    """Whether the generation prompt ends with `<think>`."""
    if '<think>' not in self.encoder.control:
      return False
    return self._layout(('user',), generate=True)[-1].rstrip().endswith('<think>')

  def prompt(self, messages: Sequence[Message], reply_role: str) -> list[Piece]:
    """Return the pieces of the messages and the generation prompt."""
    return self._pieces(messages, generate=True)

  def conversation(self, messages: Sequence[Message]) -> list[Piece]:
    """Return the pieces of the messages, without a generation prompt."""
    return self._pieces(messages, generate=False)

  def reply(self, text: str, reply_role: str) -> tuple[list[Piece], list[Piece]]:
    """Return the end of the generation prompt, and the pieces of the reply with its end token.

    Raises:
      UserError: if neither the template nor the tokenizer has a token that ends a turn.
    """
    roles = ('user', 'assistant')
    prompt = self._layout(roles[:1], generate=True)
    layout, contents = self._filled_layout(roles, ('x', text), generate=False)
    last = len(prompt) - 1
    if _extends(layout, prompt):
      rest = [layout[last][len(prompt[last]) :], *layout[last + 1 :]]
    else:
      layout, contents = self._layout(roles, generate=False), {1: text}
      rest = layout[layout.index(1) :] if 1 in layout else [1]
    return [Tokens(()), Markup(prompt[last])], self._until_end_of_turn(rest, contents)

  def _until_end_of_turn(self, layout: Layout, contents: dict[int, str]) -> list[Piece]:
    """Return the pieces of a layout up to its first stop token; add eos if it has none."""
    pieces: list[Piece] = []
    for part in layout:
      if isinstance(part, int):
        pieces.append(Text(contents[part]))
        continue
      for match in self.encoder.control_pattern.finditer(part):
        if self.encoder.control[match[0]] in self.stop_token_ids:
          return [*pieces, Markup(part[: match.end()])]
      pieces.append(Markup(part))
    eos = self.encoder.tokenizer.eos_token_id
    if eos is None:
      raise UserError(
        'Neither the chat template nor the tokenizer has a token that ends a turn. '
        'Give the tokenizer an eos token.'
      )
    return [*pieces, Tokens((eos,))]

  # Rendering

  @functools.cached_property
  def _template(self) -> str:
    template = self.encoder.tokenizer.get_chat_template()
    return _FIXED_DATE + template if 'strftime_now' in template else template

  @functools.cached_property
  def _layouts(self) -> dict[tuple[tuple[str, ...], bool], Layout]:
    return {}

  def _layout(self, roles: tuple[str, ...], generate: bool) -> Layout:
    """Return the layout for these chat roles, with or without a generation prompt."""
    key = roles, generate
    if key not in self._layouts:
      self._layouts[key] = _split_slots(
        self._render(roles, map(_slot, range(len(roles))), generate)
      )
    return self._layouts[key]

  def _render(self, roles: Sequence[str], contents: Iterable[str], generate: bool) -> str:
    messages = [{'role': r, 'content': c} for r, c in zip(roles, contents, strict=True)]
    try:
      return self.encoder.tokenizer.apply_chat_template(
        messages,
        chat_template=self._template,
        tokenize=False,
        add_generation_prompt=generate,
        **dict(self.template_options),
      )
    except jinja2.TemplateError as error:
      raise UserError(
        f'The chat template rejects a dialogue with the roles {list(roles)}: {error}. Many '
        'templates allow no system message, or require turns to alternate. Change the messages, '
        "or use style='plain'."
      ) from error

  def _filled_layout(
    self, roles: tuple[str, ...], texts: Sequence[str], generate: bool
  ) -> tuple[Layout, dict[int, str]]:
    """Return the layout for these contents, and the text in each slot as the template wrote it."""
    rendered = self._render(roles, texts, generate)
    layout = self._layout(roles, generate)
    contents = _match_slots(layout, texts, rendered)
    if contents is None:
      return self._rewritten_layout(roles, texts, generate, rendered)
    return layout, contents

  def _rewritten_layout(
    self, roles: tuple[str, ...], texts: Sequence[str], generate: bool, rendered: str
  ) -> tuple[Layout, dict[int, str]]:
    """Like `_filled_layout`, for a template that inspects contents and rewrites some of them.

    Contents that it does not rewrite keep their slots. The others become part of the markup, with
    the spellings of control tokens broken. A non-special token that the template itself looks for
    (`</think>`) stays intact in replies, because there it is part of the model's language.
    """
    if any(RESERVED.search(text) for text in texts):
      raise UserError('A content contains a noncharacter (U+FDD0 to U+FDD4). Remove it.')

    def layout_with_slots(indices: Collection[int], others: Sequence[str]) -> Layout:
      contents = [_slot(i) if i in indices else text for i, text in enumerate(others)]
      return _split_slots(self._render(roles, contents, generate))

    untouched = {
      i
      for i in range(len(texts))
      if _match_slots(layout_with_slots({i}, texts), texts, rendered) is not None
    }
    control, added = self.encoder.control, self.encoder.tokenizer.added_tokens_decoder
    special = [t for t, i in control.items() if added[i].special or t not in self._template]
    broken = [_break_spellings(text, control) for text in texts]
    lenient = [
      _break_spellings(text, special) if role == 'assistant' else text_broken
      for role, text, text_broken in zip(roles, texts, broken, strict=True)
    ]
    for others in (broken, lenient):
      for indices in (untouched, set()):
        layout = layout_with_slots(indices, others)
        unbroken = [p if isinstance(p, int) else p.replace(BREAK, '') for p in layout]
        contents = _match_slots(unbroken, texts, rendered)
        if contents is not None:
          return layout, contents
    raise UserError(
      f'The chat template rewrites contents that spell control tokens (roles {list(roles)}), and '
      "the result cannot be matched to them. Remove the control tokens, or use style='plain'."
    )

  # From layouts to pieces

  def _pieces(self, messages: Sequence[Message], generate: bool) -> list[Piece]:
    """Return the pieces of a dialogue, with or without a generation prompt at its end."""
    roles = tuple(_CHAT_ROLE[message['role']] for message in messages)
    contents = [
      m['content'] if isinstance(m['content'], str) else tuple(map(int, m['content']))
      for m in messages
    ]
    texts = [c if isinstance(c, str) else self._text_of_reply(c) for c in contents]
    layout, written = self._filled_layout(roles, texts, generate)
    pieces: list[Piece] = []
    markup = layout[0]
    for at in range(1, len(layout), 2):
      content, following = contents[layout[at]], layout[at + 1]
      if isinstance(content, str):
        pieces += [Markup(markup), Text(written[layout[at]])]
      else:
        surplus = self._surplus(layout, at, roles, texts)
        pieces += [Markup(markup[: len(markup) - surplus]), Tokens(content)]
        following = self._without_end(following) if self._has_ended(content) else following
      markup = following
    return [*pieces, Markup(markup)]

  def _surplus(self, layout: Layout, at: int, roles: tuple[str, ...], texts: Sequence[str]) -> int:
    """Return how many characters before the slot `at` are not part of the reply's own prompt.

    Some templates write more before a reply than they give as its generation prompt (a space, an
    empty reasoning block). If the model wrote that, the sampled reply already contains it.
    """
    i = layout[at]
    if layout is self._layouts.get((roles, True)):
      prompt = self._layout(roles[:i], generate=True)
    else:
      prompt, _ = self._filled_layout(roles[:i], texts[:i], generate=True)
    is_same = len(prompt) == at and _extends(layout, prompt)
    return len(layout[at - 1]) - len(prompt[-1]) if is_same else 0

  def _has_ended(self, ids: tuple[int, ...]) -> bool:
    return bool(ids) and ids[-1] in self.stop_token_ids

  def _without_end(self, following: str) -> str:
    """Return the markup after a reply without its end token, which the reply already has."""
    match = self.encoder.control_pattern.search(following)
    if not match or self.encoder.control[match[0]] not in self.stop_token_ids:
      return following
    return following if following[: match.start()].strip() else following[match.end() :]

  @functools.cached_property
  def _text_of_reply(self) -> Callable[[tuple[int, ...]], str]:
    """Decode a reply, without the token that ended it, for the template to inspect."""

    def text_of_reply(ids: tuple[int, ...]) -> str:
      return self.encoder.decode(ids[:-1] if self._has_ended(ids) else ids)

    return functools.lru_cache(maxsize=8192)(text_of_reply)

  @functools.cached_property
  def _end_of_turn(self) -> int | None:
    """The control token that the template writes directly after a reply, or None."""
    layout = self._layout(('user', 'assistant'), generate=False)
    following = layout[layout.index(1) + 1] if 1 in layout else ''
    match = self.encoder.control_pattern.search(following)
    if match is None or following[: match.start()].strip():
      return None
    return self.encoder.control[match[0]]


def _slot(index: int) -> str:
  return f'{SLOT}{index}{SLOT}'


def _split_slots(rendered: str) -> Layout:
  """Return the layout of a template that was rendered with slots for contents."""
  parts = _SLOT_PATTERN.split(rendered)
  return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _extends(layout: Layout, prompt: Layout) -> bool:
  """Return whether a layout begins with all of `prompt`."""
  last = len(prompt) - 1
  return (
    len(layout) > last and layout[:last] == prompt[:last] and layout[last].startswith(prompt[last])
  )


def _match_slots(layout: Layout, texts: Sequence[str], rendered: str) -> dict[int, str] | None:
  """Return the text in each slot if filling the slots gives `rendered`, else None.

  A template may strip a content; the result then contains the stripped text.
  """
  if not rendered.startswith(layout[0]):
    return None
  position, contents = len(layout[0]), {}
  for slot, following in zip(layout[1::2], layout[2::2], strict=True):
    text = texts[slot]
    for candidate in (text, text.strip(), text.lstrip(), text.rstrip()):
      if rendered.startswith(candidate + following, position):
        break
    else:
      return None
    contents[slot] = candidate
    position += len(candidate) + len(following)
  return contents if position == len(rendered) else None


def _break_spellings(text: str, spellings: Iterable[str]) -> str:
  for spelling in spellings:
    text = text.replace(spelling, break_spelling(spelling))
  return text
