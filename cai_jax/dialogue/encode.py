"""Encode pieces of a dialogue as token ids and decode them; no text becomes a control token.

A control token (<|im_end|>, </s>, ...) structures a dialogue. Text of users and models must never
become one, even if it spells one. A format therefore describes a dialogue as pieces:

  Markup   text of the format itself; control tokens in it are recognized
  Text     content; always encoded as ordinary text
  Tokens   token ids, used as they are

Markup and text between two control tokens are tokenized together as one string. For messages that
spell no control token, the result equals the ids of `tokenizer.apply_chat_template`.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tokenizers

from cai_jax.runtime.errors import UserError

# Unicode noncharacters, which text should not contain; one that does occur is encoded separately.
# HARD_CUT and SOFT_CUT are added as tokens to our copy of the tokenizer. They split the string
# where control tokens or given ids belong; SOFT_CUT also removes white space after it, as a control
# token with `rstrip` does. ANCHOR represents preceding text, and BREAK splits the spelling of a
# control token. SLOT marks the place of a content in a rendered template.
_HARD_CUT, _SOFT_CUT, _ANCHOR, BREAK, SLOT = '\ufdd0', '\ufdd1', '\ufdd2', '\ufdd3', '\ufdd4'
RESERVED = re.compile('([\ufdd0-\ufdd4])')
_BEFORE_CUT = re.compile(f'(?=[{_HARD_CUT}{_SOFT_CUT}])')

# An added token of this form is a control token even if it is not marked as special.
_CONTROL_FORM = re.compile(r'<\S+>|\[\S+\]')


class Markup(NamedTuple):
  """Text written by a format, in which control tokens are recognized."""

  text: str


class Text(NamedTuple):
  """Content written by a user or a model, encoded as ordinary text."""

  text: str


class Tokens(NamedTuple):
  """Token ids, such as a sampled reply, used as they are."""

  ids: tuple[int, ...]


Piece = Markup | Text | Tokens


class _Splice(NamedTuple):
  """What replaces a cut: the ids to insert, and the anchor's ids to remove after it."""

  ids: Sequence[int]
  anchor: Sequence[int]


def control_tokens(tokenizer: Any) -> dict[str, int]:
  """Return the id of each control token of a tokenizer, by its spelling.

  These are the special tokens, and the added tokens that look like `<...>` or `[...]`. Added words
  and white space are not control tokens.

  Args:
    tokenizer: a tokenizer of `transformers`.
  """
  added = tokenizer.added_tokens_decoder
  return {t.content: i for i, t in added.items() if t.special or _CONTROL_FORM.fullmatch(t.content)}


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """An encoder of pieces and a decoder of token ids, for one tokenizer.

  Args:
    tokenizer: a fast tokenizer of `transformers`.

  Raises:
    UserError: if the tokenizer is a slow one.
  """

  tokenizer: Any

  def __post_init__(self) -> None:
    if not self.tokenizer.is_fast:
      raise UserError(
        f'{type(self.tokenizer).__name__} is a slow tokenizer, which cannot keep text from '
        'becoming control tokens. Load it with use_fast=True; this needs a tokenizer.json.'
      )

  @functools.cached_property
  def control(self) -> dict[str, int]:
    """The ids of the control tokens, by spelling."""
    return control_tokens(self.tokenizer)

  @functools.cached_property
  def control_ids(self) -> frozenset[int]:
    """The ids of the control tokens."""
    return frozenset(self.control.values())

  @functools.cached_property
  def control_pattern(self) -> re.Pattern[str]:
    """A pattern whose group 1 matches the spelling of any control token."""
    longest_first = sorted(self.control, key=len, reverse=True)
    return re.compile(
      '(' + '|'.join(map(re.escape, longest_first)) + ')' if longest_first else '$^'
    )

  @functools.cached_property
  def leading_bos(self) -> int | None:
    """The bos token if the tokenizer puts it before every text, else None."""
    bos = self.tokenizer.bos_token_id
    return bos if bos is not None and self.tokenizer('a')['input_ids'][:1] == [bos] else None

  def encode(self, pieces: Sequence[Piece]) -> list[int]:
    """Return the token ids of the pieces.

    Raises:
      UserError: if the tokenizer turns text into control tokens and this cannot be prevented.
    """
    tokens = self._encode_with_cuts(*self._insert_cuts(pieces))
    if tokens is None:
      tokens = self._encode_with_cuts(*self._insert_cuts(pieces, break_spellings=True))
    if tokens is None:
      raise UserError(
        'This tokenizer turns ordinary text into control tokens and cannot be used. '
        f'The pieces were {list(pieces)!r:.500}.'
      )
    return tokens

  def decode(self, tokens: Sequence[int]) -> str:
    """Return the text of the tokens, including the spellings of control tokens."""
    return self.tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)

  def split_reply(self, tokens: Sequence[int], inside_reasoning: bool = False) -> tuple[str, str]:
    """Return the reasoning and the answer of a reply, both without control tokens.

    Everything up to the last `</think>` token is reasoning, and so is everything after a `<think>`
    that is not closed.

    Args:
      tokens: token ids of the reply.
      inside_reasoning: whether the prompt already contains the `<think>`. The answer is then empty
        if the reply has no `</think>`.
    """
    tokens = [int(token) for token in tokens]
    think, end_of_thought = map(self.control.get, ('<think>', '</think>'))
    start = 0
    if end_of_thought in tokens:
      start = len(tokens) - tokens[::-1].index(end_of_thought)
    elif inside_reasoning:
      start = len(tokens)
    end = tokens.index(think, start) if think in tokens[start:] else len(tokens)

    def decode(ids: list[int]) -> str:
      return self.decode([token for token in ids if token not in self.control_ids])

    return decode(tokens[:start] + tokens[end:]), decode(tokens[start:end])

  def _insert_cuts(
    self, pieces: Sequence[Piece], break_spellings: bool = False
  ) -> tuple[str, list[_Splice]]:
    """Return the string to tokenize and, for each cut in it, what replaces the cut.

    Args:
      pieces: to be joined.
      break_spellings: split control tokens that are spelled in a text, and use no anchors. Needed
        for tokenizers whose ordinary vocabulary contains such spellings.
    """
    parts: list[str] = []
    splices: list[_Splice] = []

    def cut(ids: Sequence[int], continues_text: bool) -> None:
      anchor = self._anchor if continues_text and not break_spellings else []
      lstrip, rstrip = self._strips.get(ids[-1], (False, False)) if ids else (False, False)
      if lstrip and len(ids) == 1 and parts:
        parts[-1] = parts[-1].rstrip()
      parts.append((_SOFT_CUT if rstrip else _HARD_CUT) + (_ANCHOR if anchor else ''))
      splices.append(_Splice(ids, anchor))

    def write(text: str) -> None:
      if break_spellings:
        text = self.control_pattern.sub(lambda match: break_spelling(match[0]), text)
      for i, part in enumerate(RESERVED.split(text)):
        if i % 2 == 0:
          parts.append(part)
        else:
          is_break = break_spellings and part == BREAK
          cut([] if is_break else self._noncharacter_ids(part), continues_text=True)

    for piece in pieces:
      if isinstance(piece, Tokens):
        cut(piece.ids, continues_text=not piece.ids or piece.ids[-1] not in self.control_ids)
      elif isinstance(piece, Text):
        write(piece.text)
      else:
        for i, part in enumerate(self.control_pattern.split(piece.text)):
          if i % 2 == 0:
            write(part.replace(BREAK, ''))
          else:
            cut((self.control[part],), continues_text=False)
    return ''.join(parts), splices

  def _encode_with_cuts(self, text: str, splices: Sequence[_Splice]) -> list[int] | None:
    """Return the tokens of `text` with each cut replaced, or None if a token is wrong."""
    first, *segments = _BEFORE_CUT.split(text)
    tokens = list(self._encode_segment(first))
    if not self._never_text.isdisjoint(tokens):
      return None
    for segment, (ids, anchor) in zip(segments, splices, strict=True):
      encoded, start = self._encode_segment(segment), 1 + len(anchor)
      if encoded[0] not in self._cut_ids or encoded[1:start] != anchor:
        return None
      if not self._never_text.isdisjoint(encoded[start:]):
        return None
      tokens += ids
      tokens += encoded[start:]
    return tokens

  @functools.cached_property
  def _encode_segment(self) -> Callable[[str], list[int]]:
    """Encode a cut and the text up to the next cut, with a cache.

    No token spans a cut, so segments can be encoded separately. Text that recurs (demonstrations,
    requests, the prompt in each of its turns) is then encoded only once.
    """
    return functools.lru_cache(maxsize=8192)(self._encode_text)

  def _encode_text(self, text: str) -> list[int]:
    return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

  @functools.cached_property
  def _backend(self) -> tokenizers.Tokenizer:
    """A copy of the tokenizer that reads control tokens as text and knows the two cuts."""
    spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
    for token in spec['added_tokens']:
      # encode_special_tokens applies to special tokens only, and not all control tokens are marked.
      token['special'] = token['content'] in self.control
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    for cut, rstrip in ((_HARD_CUT, False), (_SOFT_CUT, True)):
      backend.add_tokens([tokenizers.AddedToken(cut, rstrip=rstrip, normalized=False)])
    return backend

  @functools.cached_property
  def _cut_ids(self) -> frozenset[int | None]:
    return frozenset(self._backend.token_to_id(cut) for cut in (_HARD_CUT, _SOFT_CUT))

  @functools.cached_property
  def _strips(self) -> dict[int, tuple[bool, bool]]:
    """For each control token, whether it removes white space on its left and on its right."""
    added = self.tokenizer.added_tokens_decoder
    return {i: (added[i].lstrip, added[i].rstrip) for i in self.control_ids}

  @functools.cached_property
  def _never_text(self) -> frozenset[int]:
    """Control tokens that text must not become. The unknown token is a legitimate encoding."""
    return self.control_ids - {self.tokenizer.unk_token_id}

  @functools.cached_property
  def _anchor(self) -> list[int]:
    """Tokens that stand for preceding text; [] for tokenizers that need none.

    SentencePiece tokenizers prepend a space to text after a cut, but not to text after the anchor.
    The anchor's own ids are removed again.
    """
    alone, anchor, anchored = (
      self._encode_text(_HARD_CUT + text)[1:] for text in ('a', _ANCHOR, _ANCHOR + 'a')
    )
    needed = anchored[: len(anchor)] == anchor and anchored[len(anchor) :] != alone
    return anchor if needed else []

  def _noncharacter_ids(self, character: str) -> list[int]:
    """Return the ids of a reserved character that occurs in a text."""
    backend = self.tokenizer.backend_tokenizer
    # Encoded after a letter, because some tokenizers prepend a space to the first character.
    letter, both = (
      backend.encode(text, add_special_tokens=False).ids for text in ('a', 'a' + character)
    )
    return both[len(letter) :]


def break_spelling(spelling: str) -> str:
  """Return the spelling of a control token with `BREAK` inserted after its first character.

  Args:
    spelling: such as '<|im_end|>'.
  """
  return spelling[0] + BREAK + spelling[1:]
