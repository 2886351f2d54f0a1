"""Dialogues for a chat API: the server renders the messages, and only text comes back.

The tokens here are those of some tokenizer of ours. They count how long a context is, and nothing
that a model reads or writes depends on them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from cai_jax.dialogue.encode import Encoder, Text
from cai_jax.dialogue.messages import (
  CHAT_ROLE,
  Message,
  check_prompt,
  check_reply_role,
  check_text,
  split_system,
)

ChatMessages = tuple[tuple[str, str], ...]  # (role, content) pairs


@dataclasses.dataclass(frozen=True, eq=False)
class ChatDialogue:
  """The counterpart of `Dialogue` for a model behind a chat API.

  Roles become those of chat templates: requests are 'user', and replies are 'assistant'. No token
  and no text of the format ends a turn, because the server knows what does. Thoughts stay with the
  server.

  Attributes:
    tokenizer: any fast tokenizer of `transformers`; it need not be that of the model.
    style: 'chat API', for messages.
    reads_text: True: replies are text, and ids that belong to them are not known.
    thinks: False: replies have no thoughts.
    rewritten_history: '': contexts hold the text of earlier replies as it came.
    stop_token_ids: ().
    stop_strings: ().
  """

  tokenizer: Any
  style: str = dataclasses.field(default='chat API', init=False)
  reads_text: bool = dataclasses.field(default=True, init=False)
  thinks: bool = dataclasses.field(default=False, init=False)
  rewritten_history: str = dataclasses.field(default='', init=False)
  stop_token_ids: tuple[int, ...] = dataclasses.field(default=(), init=False)
  stop_strings: tuple[str, ...] = dataclasses.field(default=(), init=False)

  @functools.cached_property
  def _encoder(self) -> Encoder:
    return Encoder(self.tokenizer)

  def messages(
    self,
    messages: Sequence[Message],
    reply_role: str = 'assistant',
    demonstrations: Sequence[Sequence[Message]] = (),
  ) -> ChatMessages:
    """Return a dialogue as the API takes it.

    Args:
      messages: the dialogue, ending with a request. Contents are texts.
      reply_role: the role of the reply: 'assistant', 'critique' or 'revision'.
      demonstrations: few-shot dialogues, inserted before the dialogue and after its system message.

    Raises:
      UserError: if the roles are misplaced, or a content cannot be sent.
    """
    check_prompt(messages, reply_role)
    system, turns = split_system(messages)
    demonstrated = [message for dialogue in demonstrations for message in dialogue]
    for message in demonstrated:
      check_text(message['content'])
    return tuple(
      (CHAT_ROLE[message['role']], message['content'])
      for message in (*system, *demonstrated, *turns)
    )

  def prompt(
    self,
    messages: Sequence[Message],
    reply_role: str = 'assistant',
    demonstrations: Sequence[Sequence[Message]] = (),
  ) -> list[int]:
    """Return tokens about as many as the server reads: those of each role and content.

    Args:
      messages: as for `messages`.
      reply_role: as for `messages`.
      demonstrations: as for `messages`.

    Raises:
      UserError: as `messages`.
    """
    pairs = self.messages(messages, reply_role, demonstrations)
    lines = [f'{role}: {content}' for role, content in pairs]
    return self._encoder.encode([Text('\n'.join([*lines, 'assistant:']))])

  def reply(self, text: str, reply_role: str = 'assistant') -> list[int]:
    """Return our tokens of a reply.

    Args:
      text: the reply.
      reply_role: the role of the reply.

    Raises:
      UserError: if `reply_role` is not a role that replies, or the text cannot be encoded.
    """
    check_reply_role(reply_role)
    check_text(text)
    return self._encoder.encode([Text(text)])

  def show(self, tokens: Sequence[int]) -> str:
    """Return the text of a context for a reader.

    Args:
      tokens: token ids, such as those that `prompt` returns.
    """
    return self._encoder.decode(tokens)
