"""The public interface of the package: dialogues to tokens, and sampled tokens to text."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

from cai_jax.dialogue.encode import Encoder, Markup, Piece, Text, Tokens
from cai_jax.dialogue.format import FORMATS, Format
from cai_jax.dialogue.messages import (
  Message,
  check_ends_with_reply,
  check_prompt,
  check_reply_role,
  check_text,
  split_system,
)
from cai_jax.dialogue.probe import SAMPLE_REPLIES
from cai_jax.runtime.errors import UserError

# The marks of thoughts in the spelling of Qwen3 and DeepSeek-R1.
_START_OF_THOUGHT, _END_OF_THOUGHT = '<think>\n', '\n</think>\n\n'


@dataclasses.dataclass(frozen=True, eq=False)
class Dialogue:
  """A converter of messages to token ids, for one tokenizer and one prompt format.

  Roles are 'system' (first only), 'user', 'assistant', and four for a critique–revision chain:
  'critique_request', 'critique', 'revision_request' and 'revision'. A chat template sees these
  four as user, assistant, user and assistant; the plain format gives each its own label.

  A content is text, or the token ids of a sampled reply. Ids are used verbatim, directly after the
  tokens of the prompt, so `prompt([*messages, reply, request])` begins with
  `prompt(messages) + reply` and a live KV cache can be extended. If the chat template rewrites
  earlier replies (reasoning templates drop old reasoning), the rewritten text is encoded instead.

  Attributes:
    tokenizer: a fast tokenizer of `transformers`.
    style: name of the prompt format: 'chat' for the tokenizer's chat template, 'plain' for the
      labels of Bai et al. 2022, or another entry of `FORMATS`.
    eos_token_ids: further ids that end a turn, as listed in `generation_config.json`.
    template_options: (name, value) pairs for the chat template, such as ('enable_thinking', False).
    has_replies: whether replies are sampled or learned. If not, only `conversation` may be used,
      and the format needs no prompt for a reply.

  Raises:
    UserError: if the style is unknown, does not support the tokenizer or an option, or does not
      keep the messages of a dialogue.
  """

  tokenizer: Any
  style: str = 'chat'
  eos_token_ids: tuple[int, ...] = ()
  template_options: tuple[tuple[str, Any], ...] = ()
  has_replies: bool = True

  def __post_init__(self) -> None:
    _ = self._format  # created here to report an unsuitable tokenizer or option at once
    if self.has_replies:
      self._check_round_trip()

  def __getstate__(self) -> dict[str, Any]:
    """Let another process build its own encoder and format, which hold functions."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  @property
  def digest(self) -> str:
    """A hex digest of the tokenizer and the settings, on which the tokens of a text depend."""
    added = sorted((i, str(token)) for i, token in self.tokenizer.added_tokens_decoder.items())
    settings = [self.style, self.eos_token_ids, self.template_options, self.has_replies]
    special = sorted(self.tokenizer.special_tokens_map.items())
    parts = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template]
    # Formats are code, so what they make of a conversation tells one from another.
    asked: list[Message] = [{'role': 'user', 'content': SAMPLE_REPLIES[0]}]
    answered: list[Message] = [*asked, {'role': 'assistant', 'content': SAMPLE_REPLIES[0]}]
    if self.has_replies:
      samples = [self.example(answered)[0], self.prompt([*answered, *asked])]
    else:
      samples = [self.conversation(answered)]
    parts += [[int(token) for token in sample] for sample in samples]
    return hashlib.sha256(repr([parts, added, special, settings]).encode()).hexdigest()

  def _check_round_trip(self) -> None:
    """Check that the text of a reply can be read back from its tokens."""
    for sample in SAMPLE_REPLIES:
      # What the tokenizer makes of a text: a small vocabulary may not have all of its characters.
      text = self._encoder.split_reply(self._encoder.encode([Text(sample)]))[1].strip()
      read = self.decode(self.reply(text))
      if text and read != text:
        raise UserError(
          f'The reply {text!r} is read back as {read!r:.80} with style={self.style!r}. Formats '
          "that write reasoning, channels or a speaker's name into replies are not supported. Use "
          "another template or style='plain'."
        )

  @functools.cached_property
  def _encoder(self) -> Encoder:
    return Encoder(self.tokenizer)

  @functools.cached_property
  def _format(self) -> Format:
    make_format = FORMATS[self.style]
    for option in self.template_options:
      if len(option) != 2 or not isinstance(option[0], str):
        raise UserError(f'template_options: {option!r} is not a pair of a name and a value.')
    return make_format(self._encoder, self.eos_token_ids, self.template_options)

  @functools.cached_property
  def rewritten_history(self) -> str:
    """A sentence if the format changes earlier replies from what was sampled, else ''.

    Reasoning templates drop the reasoning of earlier replies, or an empty block of it.
    """
    words = self._encoder.encode([Text(SAMPLE_REPLIES[0])])
    replies = [self.reply(SAMPLE_REPLIES[0])]
    if (end_of_thought := self._encoder.control.get('</think>')) is not None:
      replies.append([*words, end_of_thought, *words])
    asked: list[Message] = [{'role': 'user', 'content': SAMPLE_REPLIES[0]}]
    context = self.prompt(asked)
    for reply in replies:
      later = self.prompt([*asked, {'role': 'assistant', 'content': reply}, *asked])
      if later[: len(context) + len(reply)] != context + reply:
        return (
          'The chat template renders earlier replies differently from what was sampled, for '
          'example without their reasoning. Later turns read the rendered text.'
        )
    return ''

  @functools.cached_property
  def thinks(self) -> bool:
    """Whether a reply may begin with thoughts, between `<think>` and `</think>` tokens.

    It is False if the generation prompt already ends with `</think>`, and in the plain format.
    """
    if self.stop_strings or not {'<think>', '</think>'} <= {*self._encoder.control}:
      return False
    *_, last = self._format.prompt([{'role': 'user', 'content': 'x'}], 'assistant')
    return not (isinstance(last, Markup) and last.text.rstrip().endswith('</think>'))

  @property
  def end_of_thought(self) -> int:
    """The id of `</think>`, of a dialogue that `thinks`."""
    return self._encoder.control['</think>']

  @property
  def reads_text(self) -> bool:
    """False: a reply is token ids. That of a chat API is text, see `ChatDialogue`."""
    return False

  def messages(
    self,
    messages: Sequence[Message],
    reply_role: str = 'assistant',
    demonstrations: Sequence[Sequence[Message]] = (),
  ) -> tuple[tuple[str, str], ...]:
    """Return (): the model reads the tokens of `prompt`. See `ChatDialogue.messages`."""
    return ()

  def open_thoughts(self) -> list[int]:
    """Return the tokens that begin thoughts after a prompt; none if the prompt begins them."""
    opened = self._format.prompt_opens_reasoning
    return [] if opened else self._encoder.encode([Markup(_START_OF_THOUGHT)])

  def close_thoughts(self, tokens: Sequence[int]) -> list[int]:
    """Return the tokens that end thoughts.

    Args:
      tokens: token ids of the thoughts. They have no `</think>`.
    """
    given = tuple(int(token) for token in tokens)
    return self._encoder.encode([Tokens(given), Markup(_END_OF_THOUGHT)])[len(given) :]

  @property
  def stop_token_ids(self) -> tuple[int, ...]:
    """The ids that end a turn: eos, the format's end of turn, and `eos_token_ids`."""
    return self._format.stop_token_ids

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """The texts that end a turn: the labels of the plain format; () for chat templates."""
    return self._format.stop_strings

  def prompt(
    self,
    messages: Sequence[Message],
    reply_role: str = 'assistant',
    demonstrations: Sequence[Sequence[Message]] = (),
  ) -> list[int]:
    """Return the tokens of a dialogue up to the point where the reply begins.

    Args:
      messages: the dialogue, ending with a request.
      reply_role: the role of the reply: 'assistant', 'critique' or 'revision'.
      demonstrations: few-shot dialogues, inserted before the dialogue and after its system message.

    Raises:
      UserError: if the roles are misplaced, or the chat template rejects them.
    """
    check_prompt(messages, reply_role)
    system, turns = split_system(messages)
    demonstrated = [message for dialogue in demonstrations for message in dialogue]
    for message in demonstrated:
      check_text(message['content'])
    return self._encoder.encode(self._format.prompt([*system, *demonstrated, *turns], reply_role))

  def reply(self, text: str, reply_role: str = 'assistant', thoughts: str = '') -> list[int]:
    """Return the tokens of `text` as the next turn, including the token that ends the turn.

    Args:
      text: the content of the turn.
      reply_role: the role of the turn: 'assistant', 'critique' or 'revision'.
      thoughts: what precedes the text, between `<think>` and `</think>`; see `thinks`. A prompt
        that ends with `<think>` is not given a second one. '' leaves the text as the format
        renders it; many templates write an empty block of thoughts before it.

    Raises:
      UserError: if `reply_role` is not a role that replies, or the format has no thoughts.
    """
    check_reply_role(reply_role)
    check_text(text)
    end_of_prompt, turn = self._format.reply(text, reply_role)
    if thoughts:
      turn = [*self._thoughts(thoughts), Text(text), *self._end_of_turn(reply_role)]
    before = self._encoder.encode(end_of_prompt)
    whole = self._encoder.encode([*end_of_prompt, *turn])
    if whole[: len(before)] == before:
      return whole[len(before) :]
    # The text would merge with the end of the prompt, whose tokens are already fixed.
    return self._encoder.encode([Tokens(()), *turn])

  def continue_reply(self, tokens: Sequence[int], text: str) -> list[int]:
    """Return the tokens of a text that continues a reply.

    Args:
      tokens: token ids of the reply so far, without the token that ends a turn.
      text: what follows them.

    Raises:
      UserError: if the text cannot be encoded.
    """
    check_text(text)
    given = tuple(int(token) for token in tokens)
    return self._encoder.encode([Tokens(given), Text(text)])[len(given) :]

  def _thoughts(self, thoughts: str) -> list[Piece]:
    """Return the pieces of thoughts and their marks."""
    if not self.thinks:
      raise UserError(
        f'A reply has thoughts, but with style={self.style!r} this tokenizer has no marks for '
        "them, or its prompt ends them at once. Use train.reasoning='drop', or the tokenizer and "
        'the template options that sampled them.'
      )
    start = [] if self._format.prompt_opens_reasoning else [Markup(_START_OF_THOUGHT)]
    return [*start, Text(thoughts), Markup(_END_OF_THOUGHT)]

  def _end_of_turn(self, reply_role: str) -> list[Piece]:
    """Return the pieces that follow the text of a reply."""
    _, turn = self._format.reply('x', reply_role)
    return turn[turn.index(Text('x')) + 1 :]

  def example(self, messages: Sequence[Message], thoughts: str = '') -> tuple[list[int], list[int]]:
    """Return the tokens and the loss mask of a dialogue that ends with the reply to learn.

    Args:
      messages: the dialogue; its last message is the reply to learn.
      thoughts: learned before the reply, if its content is a text; see `reply`.

    Returns:
      (tokens, loss_mask), of equal length. The mask is 1 on the reply and the token that ends it,
      and 0 elsewhere.

    Raises:
      UserError: if the last message is not a reply, or has no token to learn.
    """
    check_ends_with_reply(messages)
    role, content = messages[-1]['role'], messages[-1]['content']
    if isinstance(content, str):
      target = self.reply(content, role, thoughts) if content.strip() else []
    else:
      target = [int(token) for token in content]
    if not target:
      raise UserError(f'The reply to learn has no target token. Its content is {content!r}.')
    context = self.prompt(messages[:-1], role)
    return context + target, [0] * len(context) + [1] * len(target)

  def conversation(self, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of a whole dialogue that ends with a reply, as reward models read it.

    In the chat style these are the tokens of `apply_chat_template` without a generation prompt,
    including what the template writes after the reply (ChatML writes a line break).

    Args:
      messages: the dialogue, ending with a reply.

    Raises:
      UserError: if the last message is not a reply; otherwise as `prompt`.
    """
    check_ends_with_reply(messages)
    check_prompt(messages[:-1], messages[-1]['role'])
    check_text(messages[-1]['content'])
    return self._encoder.encode(self._format.conversation(messages))

  def show(self, tokens: Sequence[int]) -> str:
    """Return the text of a context for a reader, with each control token between ⟦ and ⟧.

    Args:
      tokens: token ids, such as those that `prompt` returns.
    """
    parts = []
    for is_control, run in itertools.groupby(tokens, self._encoder.control_ids.__contains__):
      ids = list(run)
      parts += (
        [f'⟦{self._encoder.decode([i])}⟧' for i in ids]
        if is_control
        else [self._encoder.decode(ids)]
      )
    return ''.join(parts)

  def decode(self, tokens: Sequence[int]) -> str:
    """Return the text of a sampled reply: the second part of `split`.

    Args:
      tokens: token ids of the reply.
    """
    return self.split(tokens)[1]

  def split(self, tokens: Sequence[int]) -> tuple[str, str]:
    """Return the thoughts and the text of a sampled reply.

    Both are without control tokens and surrounding white space. Thoughts end with `</think>`; a
    reply that was cut off inside its thoughts has no text. In the plain format, the text ends
    before the first label. A base model writes one when it continues with the next speaker's turn.

    Args:
      tokens: token ids of the reply.
    """
    opened = self._format.prompt_opens_reasoning
    thoughts, text = self._encoder.split_reply(tokens, opened)
    ends = [text.find(stop) for stop in self.stop_strings if stop in text]
    return thoughts.strip(), text[: min(ends, default=len(text))].strip()
