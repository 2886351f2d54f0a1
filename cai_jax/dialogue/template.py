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
  Encoder,
  Markup,
  Piece,
  Text,
  Tokens,
  break_spelling,
)
from cai_jax.dialogue.format import FORMATS, TemplateOptions
from cai_jax.dialogue.layout import Layout, extends, match_slots, slot, split_slots
from cai_jax.dialogue.messages import CHAT_ROLE, Message
from cai_jax.dialogue.probe import (
  check_contents,
  check_slots,
  damage,
  describe_roles,
  find_unread_mark,
  probe_texts,
)
from cai_jax.dialogue.trial import MAX_MARKUP, call_with_limit, check_limits
from cai_jax.runtime.errors import UserError

_NOT_OPTIONS = ('messages', 'add_generation_prompt')  # set by us

# A chat template may print today's date. The tokens of a run must not change at midnight, so every
# template sees this day: the default of Llama 3's template.
_DATE = {'%d': '26', '%m': '07', '%b': 'Jul', '%B': 'July', '%y': '24', '%Y': '2024'}
_DATE |= {'%a': 'Fri', '%A': 'Friday', '%H': '12', '%M': '00', '%S': '00'}
_FIXED_DATE = (
  '{% macro strftime_now(form) %}{{ form'
  + ''.join(f" | replace('{field}', '{value}')" for field, value in _DATE.items())
  + ' }}{% endmacro %}'
)


@FORMATS.register('chat')
@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
  """The chat template of one tokenizer.

  Args:
    encoder: the encoder of the tokenizer, which needs a chat template.
    eos_token_ids: further ids that end a turn.
    template_options: (name, value) pairs for the template.
    has_replies: whether the text of replies is read back from their tokens. If not, the template
      may write marks that nothing here can read.
    content_parts: whether the template reads a content as a list of parts, as those of many
      multimodal models do, and not as text.

  Raises:
    UserError: if there is no chat template, it does not read an option, it exceeds the limits on
      time and memory, or it does not keep the messages of a dialogue.
  """

  encoder: Encoder
  eos_token_ids: tuple[int, ...] = ()
  template_options: TemplateOptions = ()
  has_replies: bool = True
  content_parts: bool = False

  def __post_init__(self) -> None:
    if not self.encoder.tokenizer.chat_template:
      raise UserError(
        "The tokenizer has no chat template. Use style='plain', or give the tokenizer a template."
      )
    known = _options_in(self._template, self.template_options)
    if unknown := [name for name, _ in self.template_options if name not in dict(known)]:
      raise UserError(
        f'template_options: the chat template reads no option named {unknown[0]!r}. Remove it.'
      )
    variables = {**self.encoder.tokenizer.special_tokens_map, **dict(self.template_options)}
    if failure := check_limits(self._template, variables):
      raise UserError(
        f'The chat template cannot be used: {failure} on a short dialogue. Correct the template, '
        "or use style='plain'."
      )
    mark = self.has_replies and find_unread_mark(self._template, tuple(self.encoder.control))
    if mark:
      raise UserError(
        f'The chat template writes {mark!r}, a mark of reasoning or channels. Only <think> and '
        '</think> can be separated from a reply, and only if they are control tokens of the '
        "tokenizer. Use another template, or style='plain'."
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
    prompt = self._checked_prompt
    layout, contents = self._filled_layout(roles, ('x', text), generate=False)
    last = len(prompt) - 1
    if extends(layout, prompt):
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
  def _checked_prompt(self) -> Layout:
    """The layout of a prompt, after which a reply and the turns after it are rendered.

    Raises:
      UserError: if a reply or a later turn does not follow the prompt of the reply.
    """
    prompt = self._layout(('user',), generate=True)
    reply = self._layout(('user', 'assistant'), generate=False)
    if not extends(reply, prompt):
      raise UserError(
        f'The chat template ends a prompt with {prompt[-1]!r:.60} but begins a reply with '
        f'{reply[2]!r:.60}, so a model would be trained on other tokens than it continues. Correct '
        'the generation prompt (reasoning that it opens must be in the reply too), or use '
        "style='plain'."
      )
    self._layout(('user', 'assistant', 'user'), generate=True)
    return prompt

  @functools.cached_property
  def _template(self) -> str:
    template = _read_template(self.encoder.tokenizer)
    return _FIXED_DATE + template if 'strftime_now' in template else template

  @functools.cached_property
  def _layouts(self) -> dict[tuple[tuple[str, ...], bool], Layout]:
    return {}

  def _layout(self, roles: tuple[str, ...], generate: bool) -> Layout:
    """Return the layout for these chat roles, with or without a generation prompt.

    Raises:
      UserError: if the template does not keep every message of such a dialogue.
    """
    key = roles, generate
    if key not in self._layouts:
      layout = split_slots(self._render(roles, map(slot, range(len(roles))), generate))
      check_slots(layout[1::2], layout[::2], roles)
      texts = probe_texts(len(roles))
      rendered = self._render(roles, texts, generate)
      if match_slots(layout, texts, rendered) is None:
        check_contents(texts, [text.strip() for text in texts], rendered, roles)
      self._layouts[key] = layout
    return self._layouts[key]

  def _render(self, roles: Sequence[str], contents: Iterable[str], generate: bool) -> str:
    contents = list(contents)
    wrap = (lambda c: [{'type': 'text', 'text': c}]) if self.content_parts else str
    messages = [{'role': r, 'content': wrap(c)} for r, c in zip(roles, contents, strict=True)]
    try:
      rendered = call_with_limit(
        lambda: self.encoder.tokenizer.apply_chat_template(
          messages,
          chat_template=self._template,
          tokenize=False,
          add_generation_prompt=generate,
          **dict(self.template_options),
        )
      )
      rendered.encode()  # fails for half of a surrogate pair
    except Exception as error:  # a template is a program, which may raise anything
      name = '' if isinstance(error, jinja2.TemplateError) else f'{type(error).__name__}: '
      reason = ''.join(c if c.isprintable() else ' ' for c in f'{name}{error}')
      raise UserError(
        f'The chat template rejects a dialogue with the roles {describe_roles(roles)}: '
        f'{reason:.300}. Many templates allow no system message, or require turns to alternate. '
        "Change the messages, or use style='plain'."
      ) from error
    if len(rendered) > MAX_MARKUP + 4 * sum(map(len, contents)):
      raise UserError(
        f'The chat template writes {len(rendered)} characters for a dialogue with the roles '
        f"{describe_roles(roles)}, which is too many. Correct it, or use style='plain'."
      )
    return rendered

  def _filled_layout(
    self, roles: tuple[str, ...], texts: Sequence[str], generate: bool
  ) -> tuple[Layout, dict[int, str]]:
    """Return the layout for these contents, and the text in each slot as the template wrote it."""
    rendered = self._render(roles, texts, generate)
    layout = self._layout(roles, generate)
    contents = match_slots(layout, texts, rendered)
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
      contents = [slot(i) if i in indices else text for i, text in enumerate(others)]
      return split_slots(self._render(roles, contents, generate))

    untouched = {
      i
      for i in range(len(texts))
      if match_slots(layout_with_slots({i}, texts), texts, rendered) is not None
    }
    kept = [self._kept_text(role, text) for role, text in zip(roles, texts, strict=True)]
    check_contents(texts, kept, rendered, roles)
    for i, text in enumerate(texts):
      if not text.strip() and i not in untouched:
        raise damage(i, roles, 'loses', ', which is empty')
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
        contents = match_slots(unbroken, texts, rendered)
        if contents is not None:
          return layout, contents
    raise UserError(
      f'The chat template rewrites contents that spell control tokens (roles {list(roles)}), and '
      "the result cannot be matched to them. Remove the control tokens, or use style='plain'."
    )

  def _kept_text(self, role: str, text: str) -> str:
    """Return what a template must keep of a content: all but the reasoning of a reply."""
    return (text.split('</think>')[-1] if role == 'assistant' else text).strip()

  # From layouts to pieces

  def _pieces(self, messages: Sequence[Message], generate: bool) -> list[Piece]:
    """Return the pieces of a dialogue, with or without a generation prompt at its end."""
    roles = tuple(CHAT_ROLE[message['role']] for message in messages)
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
    is_same = len(prompt) == at and extends(layout, prompt)
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


def known_options(tokenizer: Any, options: TemplateOptions) -> TemplateOptions:
  """Return the template options that a tokenizer's chat template reads.

  Args:
    tokenizer: a tokenizer of `transformers`.
    options: (name, value) pairs.
  """
  return _options_in(_read_template(tokenizer), options) if tokenizer.chat_template else ()


def _options_in(template: str, options: TemplateOptions) -> TemplateOptions:
  """Return the options whose names occur in a template and are not set by us."""
  names = {name for name, _ in options if re.search(rf'\b{re.escape(name)}\b', template)}
  return tuple(pair for pair in options if pair[0] in names and pair[0] not in _NOT_OPTIONS)


def _read_template(tokenizer: Any) -> str:
  try:
    template = tokenizer.get_chat_template()
  except ValueError as error:
    raise UserError(f'The tokenizer has no default chat template: {error!s:.300}') from error
  if not isinstance(template, str):
    raise UserError(f'The chat template must be text, but it is {template!r:.80}.')
  return template


def _break_spellings(text: str, spellings: Iterable[str]) -> str:
  for spelling in spellings:
    text = text.replace(spelling, break_spelling(spelling))
  return text
