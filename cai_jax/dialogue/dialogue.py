"""Messages to token ids, with an exact loss mask: the only module that renders text.

Two styles. `chat` is the tokenizer's own chat template. `plain` is the form of Bai et al. 2022:
"\n\nHuman: ...\n\nAssistant: ...", with labels of their own for critiques and revisions.

Template and content are told apart character by character, and a control token (<|im_end|>, </s>,
...) is recognised in template text only: what users and models write is always encoded as text.
Everything between two control tokens, template and content together, is tokenised as one string, so
benign messages give exactly the ids of `tokenizer.apply_chat_template`.

A content may be a list of ids, a reply as it was sampled. It stands in the result verbatim, right
after the tokens it was sampled from, so `prompt(messages + [reply, request])` extends
`prompt(messages) + reply` and a live KV cache can go on, unless the template rewrites its history
(as reasoning templates do, which drop old reasoning): then the rewritten text is encoded.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
import tokenizers

from cai_jax.dialogue.plain import LABELS, REPLY_ROLES, REQUEST_ROLES, join_plain
from cai_jax.runtime.errors import UserError

Message = dict[str, Any]  # 'role': str, 'content': str | list[int]

_CHAT_ROLE = {
  'system': 'system',
  **{role: 'user' for role in REQUEST_ROLES},
  **{role: 'assistant' for role in REPLY_ROLES},
}

# Unicode noncharacters, which no text is meant to hold. HARD and SOFT are added to our copy of the
# tokenizer as tokens that cut the string where a control token or sampled ids go; SOFT also
# swallows the white space after it, as control tokens with rstrip do. ANCHOR stands for "text came
# before", BREAK splits a control token's spelling, SLOT stands for a content in a template.
_HARD, _SOFT, _ANCHOR, _BREAK, _SLOT = '\ufdd0', '\ufdd1', '\ufdd2', '\ufdd3', '\ufdd4'
_RESERVED = re.compile('([\ufdd0-\ufdd4])')
_BEFORE_CUT = re.compile(f'(?=[{_HARD}{_SOFT}])')
_SLOT_PATTERN = re.compile(f'{_SLOT}(\\d+){_SLOT}')

# Kinds of pieces that a rendered dialogue is made of.
_TEMPLATE, _TEXT, _IDS = 'template', 'text', 'ids'

_OURS = ('messages', 'add_generation_prompt')  # what a template reads that is no option

# Added tokens written like this are control tokens even where they are not marked as special.
_MARK = re.compile(r'<\S+>|\[\S+\]')

# A chat template may print today's date. A run's tokens must not change at midnight, so every
# template sees this day instead: the one that Llama 3's template falls back to.
_DATE = {'%d': '26', '%m': '07', '%b': 'Jul', '%B': 'July', '%y': '24', '%Y': '2024'}
_DATE |= {'%a': 'Fri', '%A': 'Friday', '%H': '12', '%M': '00', '%S': '00'}
_FIXED_DATE = (
  '{% macro strftime_now(form) %}{{ form'
  + ''.join(f" | replace('{field}', '{value}')" for field, value in _DATE.items())
  + ' }}{% endmacro %}'
)


@dataclasses.dataclass(frozen=True, eq=False)
class Dialogue:
  """Turns messages into token ids for one tokenizer and one style.

  Roles are 'system' (first only), 'user', 'assistant' and the four of a chain: 'critique_request',
  'critique', 'revision_request', 'revision'. Chat templates see the four as user, assistant, user,
  assistant; the plain style gives each its label, and puts a system message in front as it is.
  In the plain style nothing keeps a content from spelling a label; that is the form's weakness.

  Attributes:
    tokenizer: a fast tokenizer of `transformers`.
    style: 'chat' or 'plain'.
    eos_token_ids: further ids that end a turn, as `generation_config.json` lists them.
    template_options: (name, value) pairs for the chat template, such as ('enable_thinking', False).

  Raises:
    ValueError: an unknown style, a slow tokenizer, the chat style without a chat template, or an
      option that the template does not read.
  """

  tokenizer: Any
  style: str = 'chat'
  eos_token_ids: tuple[int, ...] = ()
  template_options: tuple[tuple[str, Any], ...] = ()

  def __post_init__(self):
    if self.style not in ('chat', 'plain'):
      raise UserError(f"style must be 'chat' or 'plain', got {self.style!r}")
    if not self.tokenizer.is_fast:
      raise UserError(
        f'{type(self.tokenizer).__name__} is a slow tokenizer; only fast ones (with a '
        f'tokenizer.json) can keep text from becoming control tokens. Load it with use_fast=True'
      )
    if self.style == 'chat' and not self.tokenizer.chat_template:
      raise UserError("the tokenizer has no chat template: use style='plain', or give it one")
    if self.style == 'plain' and self.tokenizer.eos_token_id is None:
      raise UserError("style='plain' ends a turn with the eos token, and the tokenizer has none")
    for option in self.template_options:
      if len(option) != 2 or not isinstance(option[0], str):
        raise UserError(f'template_options: {option!r} is not a pair of a name and a value')
      name = option[0]
      if (
        self.style == 'plain'
        or name in _OURS
        or not re.search(rf'\b{re.escape(name)}\b', self._template)
      ):
        raise UserError(
          f'template_options: {name!r} is nothing that the chat template reads from us; leave it '
          "out (the 'plain' style has no template at all)"
        )

  def prompt(
    self,
    messages: Sequence[Message],
    reply_role: str = 'assistant',
    demonstrations: Sequence[Sequence[Message]] = (),
  ) -> list[int]:
    """Returns the tokens up to where the reply begins.

    Args:
      messages: the dialogue, ending with a request; a content is a text, or the ids of a sampled
        reply with its end token if it has one.
      reply_role: who speaks next: 'assistant', 'critique' or 'revision'.
      demonstrations: few-shot dialogues, put in front: as plain text, or as earlier chat turns.

    Raises:
      ValueError: roles out of place, or a chat template that refuses them.
    """
    _check_roles(messages, reply_role)
    system, turns = _split_system(messages)
    messages = [*system, *(m for dialogue in demonstrations for m in dialogue), *turns]
    if self.style == 'plain':
      return self._encode([*self._plain_pieces(messages), (_TEMPLATE, LABELS[reply_role])])
    return self._encode(self._chat_pieces(messages))

  def reply(self, text: str, reply_role: str = 'assistant') -> list[int]:
    """Returns the tokens of `text` as the next turn, with the token that ends the turn.

    Raises:
      ValueError: `reply_role` is no replying role.
    """
    if reply_role not in REPLY_ROLES:
      raise UserError(f'reply_role must be one of {REPLY_ROLES}, got {reply_role!r}')
    if self.style == 'plain':
      context = [(_TEMPLATE, LABELS[reply_role])]
      turn = [(_TEXT, ' ' + text), (_IDS, (self.tokenizer.eos_token_id,))]
    else:
      context, turn = self._chat_reply(text)
    before = self._encode(context)
    whole = self._encode([*context, *turn])
    if whole[: len(before)] == before:
      return whole[len(before) :]
    # The text would merge with the end of the prompt, whose tokens stand already.
    return self._encode([(_IDS, ()), *turn])

  def example(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Returns (tokens, loss_mask) of a dialogue that ends with the reply to learn.

    The mask is 1 exactly on the reply and the token that ends it, else 0.

    Raises:
      ValueError: the last message is no reply, or leaves no token to learn.
    """
    if not messages or messages[-1]['role'] not in REPLY_ROLES:
      roles = [message['role'] for message in messages]
      raise UserError(f'an example must end with a reply {REPLY_ROLES}, got the roles {roles}')
    role, content = messages[-1]['role'], messages[-1]['content']
    if isinstance(content, str):
      target = self.reply(content, role) if content.strip() else []
    else:
      target = [int(token) for token in content]
    if not target:
      raise UserError(f'the reply to learn has no target token, its content is {content!r}')
    context = self.prompt(messages[:-1], role)
    return context + target, [0] * len(context) + [1] * len(target)

  def conversation(self, messages: Sequence[Message]) -> list[int]:
    """Returns the tokens of a whole dialogue that ends with a reply, as reward models read it.

    In the chat style these are the tokens of `apply_chat_template` without a generation prompt:
    what the template writes after the reply (a line break after ChatML's end token) is there too.

    Raises:
      ValueError: the last message is no reply; as `prompt`.
    """
    if not messages or messages[-1]['role'] not in REPLY_ROLES:
      roles = [message['role'] for message in messages]
      raise UserError(f'a conversation must end with a reply {REPLY_ROLES}, got the roles {roles}')
    _check_roles(messages[:-1], messages[-1]['role'])
    if self.style == 'plain':
      end = (_IDS, (self.tokenizer.eos_token_id,))
      return self._encode([*self._plain_pieces(messages), end])
    return self._encode(self._chat_pieces(messages, generate=False))

  def decode(self, tokens: Sequence[int]) -> str:
    """Returns the text of a sampled reply, without control tokens and surrounding white space.

    Reasoning up to a `</think>` token is left out, and so is reasoning that was cut before it came
    to one: such a reply has no text. In the plain style the text ends before the first label, which
    a base model writes when it goes on to speak for others.
    """
    tokens = [int(token) for token in tokens]
    think, thought = map(self._control.get, ('<think>', '</think>'))
    if thought in tokens:
      tokens = tokens[len(tokens) - tokens[::-1].index(thought) :]
    elif self._prompt_thinks:
      tokens = []
    if think in tokens:
      tokens = tokens[: tokens.index(think)]
    text = self._text_of([token for token in tokens if token not in self._control_ids])
    cuts = [text.find(stop) for stop in self.stop_strings if stop in text]
    return text[: min(cuts, default=len(text))].strip()

  @functools.cached_property
  def _prompt_thinks(self) -> bool:
    """Whether the template's generation prompt opens the reasoning that a reply begins with."""
    if self.style == 'plain' or '<think>' not in self._control:
      return False
    return self._layout(('user',), generate=True)[-1].rstrip().endswith('<think>')

  @functools.cached_property
  def stop_token_ids(self) -> tuple[int, ...]:
    """The ids that end a turn: eos, the chat template's end of turn, and `eos_token_ids`."""
    ids = [self.tokenizer.eos_token_id, *self.eos_token_ids]
    if self.style == 'chat':
      ids.append(self._end_of_turn)
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None))

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """The texts that end a turn: the labels of the plain style; none in the chat style."""
    return tuple(LABELS.values()) if self.style == 'plain' else ()

  # The tokenizer: which tokens are control tokens, and a copy that never reads one from text.

  @functools.cached_property
  def _control(self) -> dict[str, int]:
    return control_tokens(self.tokenizer)

  @functools.cached_property
  def _control_ids(self) -> frozenset[int]:
    return frozenset(self._control.values())

  @functools.cached_property
  def _control_pattern(self) -> re.Pattern:
    longest_first = sorted(self._control, key=len, reverse=True)
    return re.compile(
      '(' + '|'.join(map(re.escape, longest_first)) + ')' if longest_first else '$^'
    )

  @functools.cached_property
  def _strips(self) -> dict[int, tuple[bool, bool]]:
    """Whether a control token swallows white space on its left and on its right."""
    added = self.tokenizer.added_tokens_decoder
    return {i: (added[i].lstrip, added[i].rstrip) for i in self._control_ids}

  @functools.cached_property
  def _backend(self) -> tokenizers.Tokenizer:
    """A copy of the tokenizer that reads control tokens as text, and knows our two cuts."""
    spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
    for token in spec['added_tokens']:
      # encode_special_tokens spares special tokens only, and some control tokens are not so marked.
      token['special'] = token['content'] in self._control
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    for cut, rstrip in ((_HARD, False), (_SOFT, True)):
      backend.add_tokens([tokenizers.AddedToken(cut, rstrip=rstrip, normalized=False)])
    return backend

  @functools.cached_property
  def _cut_ids(self) -> frozenset[int]:
    return frozenset(self._backend.token_to_id(cut) for cut in (_HARD, _SOFT))

  @functools.cached_property
  def _anchor(self) -> list[int]:
    """Tokens to put before text that continues sampled ids, and take off again.

    Sentencepiece-like tokenizers prepend a space to what follows a cut; after an anchor they do
    not. Empty for tokenizers that need none.
    """
    bare, anchor, both = (self._ids_of(_HARD + t)[1:] for t in ('a', _ANCHOR, _ANCHOR + 'a'))
    needed = both[: len(anchor)] == anchor and both[len(anchor) :] != bare
    return anchor if needed else []

  def _ids_of(self, text: str) -> list[int]:
    return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

  def _text_of(self, tokens: Sequence[int]) -> str:
    return self.tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)

  # Pieces to tokens. A piece is (_TEMPLATE, text), (_TEXT, text) or (_IDS, ids).

  def _encode(self, pieces: Sequence[tuple[str, Any]]) -> list[int]:
    """Returns the tokens of the pieces, tokenised as one string with cuts where ids go."""
    tokens = self._splice(*self._with_cuts(pieces))
    if tokens is None:
      tokens = self._splice(*self._with_cuts(pieces, careful=True))
    if tokens is None:
      raise UserError(
        f'this tokenizer turns text into control tokens whatever is done; it cannot be used '
        f'(pieces: {list(pieces)!r:.500})'
      )
    return tokens

  def _with_cuts(self, pieces, careful=False) -> tuple[str, list[tuple[Sequence[int], list[int]]]]:
    """Returns the string to tokenise and, for each cut in it, (ids to put there, anchor after it).

    With `careful`, control tokens spelled in a text are cut in two, and nothing is anchored: for
    the tokenizers whose vocabulary proper holds such spellings.
    """
    parts, splices = [], []

    def cut(ids, continues):
      anchored = continues and not careful and self._anchor
      lstrip, rstrip = self._strips.get(ids[-1], (False, False)) if ids else (False, False)
      if lstrip and len(ids) == 1 and parts:
        parts[-1] = parts[-1].rstrip()
      parts.append((_SOFT if rstrip else _HARD) + (_ANCHOR if anchored else ''))
      splices.append((ids, self._anchor if anchored else []))

    def write(text):
      if careful:
        text = self._control_pattern.sub(lambda found: found[0][0] + _BREAK + found[0][1:], text)
      for i, part in enumerate(_RESERVED.split(text)):
        if i % 2 == 0:
          parts.append(part)
        else:
          cut([] if careful and part == _BREAK else self._reserved_ids(part), continues=True)

    for kind, value in pieces:
      if kind == _IDS:
        cut(value, continues=not value or value[-1] not in self._control_ids)
      elif kind == _TEXT:
        write(value)
      else:
        for i, part in enumerate(self._control_pattern.split(value)):
          if i % 2 == 0:
            write(part.replace(_BREAK, ''))
          else:
            cut((self._control[part],), continues=False)
    return ''.join(parts), splices

  def _splice(self, text: str, splices) -> list[int] | None:
    """Returns the tokens of `text` with the ids in its cuts, or None if it cannot be right."""
    first, *units = _BEFORE_CUT.split(text)
    out = list(self._unit(first))
    if not self._never_text.isdisjoint(out):
      return None
    for unit, (ids, anchor) in zip(units, splices, strict=True):
      encoded, start = self._unit(unit), 1 + len(anchor)
      if encoded[0] not in self._cut_ids or encoded[1:start] != anchor:
        return None
      if not self._never_text.isdisjoint(encoded[start:]):
        return None
      out += ids
      out += encoded[start:]
    return out

  @functools.cached_property
  def _unit(self):
    """A cut with the text up to the next cut -> its tokens.

    No token reaches over a cut, so each unit is encoded by itself. What comes again and again
    (demonstrations, requests, the prompt in each of its turns) is then encoded once.
    """
    return functools.lru_cache(maxsize=8192)(self._ids_of)

  @functools.cached_property
  def _never_text(self) -> frozenset[int]:
    """Control tokens that no text may become; the unknown token is what text may well become."""
    return self._control_ids - {self.tokenizer.unk_token_id}

  def _reserved_ids(self, character: str) -> list[int]:
    plain = self.tokenizer.backend_tokenizer
    # After a letter, so that tokenizers which put a space in front do not put it here.
    letter, both = (plain.encode(t, add_special_tokens=False).ids for t in ('a', 'a' + character))
    return both[len(letter) :]

  # The plain style.

  def _plain_pieces(self, messages: Sequence[Message]) -> list[tuple[str, Any]]:
    pieces = [(_IDS, (self.tokenizer.bos_token_id,))] if self._begins_with_bos else []
    for message in messages:
      role, content = message['role'], message['content']
      if isinstance(content, str):
        text = content if role == 'system' else join_plain([message])
        pieces.append((_TEXT, text))
      else:
        ids, rest = self._without_stop_string(_as_ids(content))
        pieces += [(_TEMPLATE, LABELS[role]), (_IDS, ids), (_TEXT, rest)]
    return pieces

  @functools.cached_property
  def _begins_with_bos(self) -> bool:
    bos = self.tokenizer.bos_token_id
    return bos is not None and self.tokenizer('a')['input_ids'][:1] == [bos]

  @functools.cached_property
  def _without_stop_string(self):
    """ids -> (the ids before the first label, the text of a token that the cut divides)."""

    def without(ids: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
      text = self._text_of(ids)
      found = [text.find(stop) for stop in self.stop_strings if stop in text]
      if not found:
        return ids, ''
      text = text[: min(found)]
      for n in range(len(ids), -1, -1):
        kept = self._text_of(ids[:n])
        if text.startswith(kept):
          return ids[:n], text[len(kept) :]
      return (), text

    return functools.lru_cache(maxsize=8192)(without)

  # The chat style. A layout is a rendered template as [text, slot, text, slot, ..., text], where a
  # slot is the index of the message whose content stands there.

  @functools.cached_property
  def _layouts(self) -> dict[tuple[tuple[str, ...], bool], list]:
    return {}

  @functools.cached_property
  def _template(self) -> str:
    template = self.tokenizer.get_chat_template()
    return _FIXED_DATE + template if 'strftime_now' in template else template

  def _layout(self, roles: tuple[str, ...], generate: bool) -> list:
    """Returns the template's layout for these chat roles, rendered once."""
    key = roles, generate
    if key not in self._layouts:
      slots = [f'{_SLOT}{i}{_SLOT}' for i in range(len(roles))]
      self._layouts[key] = _split_slots(self._render(roles, slots, generate))
    return self._layouts[key]

  def _render(self, roles: Sequence[str], contents: Sequence[str], generate: bool) -> str:
    messages = [{'role': r, 'content': c} for r, c in zip(roles, contents, strict=True)]
    try:
      return self.tokenizer.apply_chat_template(
        messages,
        chat_template=self._template,
        tokenize=False,
        add_generation_prompt=generate,
        **dict(self.template_options),
      )
    except jinja2.TemplateError as error:
      raise UserError(
        f'the chat template refuses a dialogue with the roles {list(roles)}: {error}. Change the '
        f'messages (many templates allow no system message, or want turns to alternate), or use '
        f"style='plain'"
      ) from error

  def _filled_layout(self, roles, texts, generate) -> tuple[list, dict[int, str]]:
    """Returns the layout of these contents, and the text in each slot as the template put it."""
    rendered = self._render(roles, texts, generate)
    layout = self._layout(roles, generate)
    taken = _fill(layout, texts, rendered)
    return (
      (layout, taken) if taken is not None else self._rewritten(roles, texts, generate, rendered)
    )

  def _rewritten(self, roles, texts, generate, rendered) -> tuple[list, dict[int, str]]:
    """As `_filled_layout`, for a template that looks into contents and rewrites some of them.

    Contents it leaves alone keep their slots. The others stand in the layout's text with their
    control tokens' spellings broken. Where the template itself looks for a mark that is no special
    token (`</think>`), that mark stays whole in replies, whose language it belongs to.
    """
    if any(_RESERVED.search(text) for text in texts):
      raise UserError('a content holds a noncharacter (U+FDD0 to U+FDD4): take it out')

    def slots_for(indices, others):
      contents = [f'{_SLOT}{i}{_SLOT}' if i in indices else t for i, t in enumerate(others)]
      return _split_slots(self._render(roles, contents, generate))

    untouched = {
      i for i in range(len(texts)) if _fill(slots_for({i}, texts), texts, rendered) is not None
    }
    broken = [_break_spellings(text, self._control) for text in texts]
    added = self.tokenizer.added_tokens_decoder
    special = [t for t, i in self._control.items() if added[i].special or t not in self._template]
    lenient = [
      _break_spellings(text, special) if role == 'assistant' else text_broken
      for role, text, text_broken in zip(roles, texts, broken, strict=True)
    ]
    for others in (broken, lenient):
      for indices in (untouched, set()):
        layout = slots_for(indices, others)
        whole = [p if isinstance(p, int) else p.replace(_BREAK, '') for p in layout]
        taken = _fill(whole, texts, rendered)
        if taken is not None:
          return layout, taken
    raise UserError(
      f'the chat template rewrites contents that spell control tokens in a way that cannot be '
      f"followed (roles {list(roles)}); take these out of the contents, or use style='plain'"
    )

  def _chat_pieces(
    self, messages: Sequence[Message], generate: bool = True
  ) -> list[tuple[str, Any]]:
    """Returns the pieces of the dialogue, with the generation prompt at their end or without."""
    roles = tuple(_CHAT_ROLE[message['role']] for message in messages)
    contents = [
      m['content'] if isinstance(m['content'], str) else _as_ids(m['content']) for m in messages
    ]
    texts = [c if isinstance(c, str) else self._spoken(c) for c in contents]
    layout, taken = self._filled_layout(roles, texts, generate)
    pieces = [(_TEMPLATE, layout[0])]
    for at in range(1, len(layout), 2):
      content, following = contents[layout[at]], layout[at + 1]
      if isinstance(content, str):
        pieces.append((_TEXT, taken[layout[at]]))
      else:
        before = pieces[-1][1]
        surplus = self._surplus(layout, at, roles, texts)
        pieces[-1] = (_TEMPLATE, before[: len(before) - surplus])
        pieces.append((_IDS, content))
        following = self._without_end(following) if self._has_ended(content) else following
      pieces.append((_TEMPLATE, following))
    return pieces

  def _surplus(self, layout: list, at: int, roles, texts) -> int:
    """Returns how many characters before slot `at` are no part of the prompt its reply followed.

    Some templates write more before a reply than they give as its generation prompt (a space, an
    empty reasoning block); a sampled reply holds that already if the model wrote it.
    """
    i = layout[at]
    if layout is self._layouts.get((roles, True)):
      prompt = self._layout(roles[:i], generate=True)
    else:
      prompt, _ = self._filled_layout(roles[:i], texts[:i], generate=True)
    same = layout[: at - 1] == prompt[:-1] and layout[at - 1].startswith(prompt[-1])
    return len(layout[at - 1]) - len(prompt[-1]) if same else 0

  def _has_ended(self, ids: tuple[int, ...]) -> bool:
    return bool(ids) and ids[-1] in self.stop_token_ids

  def _without_end(self, following: str) -> str:
    """Returns the template text after a reply, less the end token that the reply brought."""
    found = self._control_pattern.search(following)
    if not found or self._control[found[0]] not in self.stop_token_ids:
      return following
    return following if following[: found.start()].strip() else following[found.end() :]

  @functools.cached_property
  def _spoken(self):
    """ids -> the text that a template may look at: without the token that ended the turn."""

    def spoken(ids: tuple[int, ...]) -> str:
      return self._text_of(ids[:-1] if self._has_ended(ids) else ids)

    return functools.lru_cache(maxsize=8192)(spoken)

  @functools.cached_property
  def _end_of_turn(self) -> int | None:
    """The control token that the template puts right after a reply, if it puts one."""
    layout = self._layout(('user', 'assistant'), generate=False)
    following = layout[layout.index(1) + 1] if 1 in layout else ''
    found = self._control_pattern.search(following)
    return self._control[found[0]] if found and not following[: found.start()].strip() else None

  def _chat_reply(self, text: str) -> tuple[list, list]:
    """Returns the pieces before a reply, and those of the reply with the token that ends it."""
    roles = ('user', 'assistant')
    prompt = self._layout(roles[:1], generate=True)
    layout, taken = self._filled_layout(roles, ('x', text), generate=False)
    n = len(prompt)
    if layout[: n - 1] == prompt[:-1] and layout[n - 1].startswith(prompt[-1]):
      rest = [layout[n - 1][len(prompt[-1]) :], *layout[n:]]
    else:
      layout, taken = self._layout(roles, generate=False), {1: text}
      rest = layout[layout.index(1) :] if 1 in layout else [1]
    turn = []
    for part in rest:
      if isinstance(part, int):
        turn.append((_TEXT, taken[part]))
        continue
      ends = [m.end() for m in self._control_pattern.finditer(part) if self._ends_turn(m[0])]
      turn.append((_TEMPLATE, part[: ends[0]] if ends else part))
      if ends:
        break
    else:
      if self.tokenizer.eos_token_id is None:
        raise UserError('neither the chat template nor the tokenizer has a token to end a turn')
      turn.append((_IDS, (self.tokenizer.eos_token_id,)))
    return [(_IDS, ()), (_TEMPLATE, prompt[-1])], turn

  def _ends_turn(self, spelling: str) -> bool:
    return self._control[spelling] in self.stop_token_ids


def control_tokens(tokenizer) -> dict[str, int]:
  """Returns the ids of control tokens by their text; added words and white space are none."""
  added = tokenizer.added_tokens_decoder
  return {t.content: i for i, t in added.items() if t.special or _MARK.fullmatch(t.content)}


def _check_roles(messages: Sequence[Message], reply_role: str) -> None:
  """Raises ValueError unless a request comes last, the system first, and a reply can follow."""
  roles = [message['role'] for message in messages]
  unknown = [role for role in roles if role not in _CHAT_ROLE]
  if unknown:
    raise UserError(f'unknown roles {unknown}; allowed are {sorted(_CHAT_ROLE)}')
  if reply_role not in REPLY_ROLES:
    raise UserError(f'reply_role must be one of {REPLY_ROLES}, got {reply_role!r}')
  if not roles or roles[-1] not in REQUEST_ROLES:
    raise UserError(f'a prompt must end with a request {REQUEST_ROLES}, got the roles {roles}')
  if 'system' in roles[1:]:
    raise UserError(f'a system message can only come first, got the roles {roles}')


def _split_system(messages: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
  n = int(messages[0]['role'] == 'system')
  return messages[:n], messages[n:]


def _as_ids(content: Sequence[int]) -> tuple[int, ...]:
  return tuple(int(token) for token in content)


def _break_spellings(text: str, spellings: Iterable[str]) -> str:
  for spelling in spellings:
    text = text.replace(spelling, spelling[0] + _BREAK + spelling[1:])
  return text


def _split_slots(rendered: str) -> list:
  """Returns [text, slot, text, ...] of a template rendered with slots for contents."""
  parts = _SLOT_PATTERN.split(rendered)
  return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _fill(layout: list, texts: Sequence[str], rendered: str) -> dict[int, str] | None:
  """Returns the text in each slot if filling them gives `rendered`, else None.

  A template may trim a content; it then stands in its slot as trimmed.
  """
  if not rendered.startswith(layout[0]):
    return None
  position, taken = len(layout[0]), {}
  for slot, following in zip(layout[1::2], layout[2::2], strict=True):
    text = texts[slot]
    for candidate in (text, text.strip(), text.lstrip(), text.rstrip()):
      if rendered.startswith(candidate + following, position):
        break
    else:
      return None
    taken[slot] = candidate
    position += len(candidate) + len(following)
  return taken if position == len(rendered) else None
