"""Prompt formats: how messages become pieces of text and tokens.

To add a format, write one file with a class like `PlainFormat` in plain.py and register it:

  @FORMATS.register('alpaca')
  class AlpacaFormat: ...

Then choose it with `feedback.style='alpaca'`. Put the file into this folder, or keep it
anywhere and name it in `config.plugins`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cai_jax.dialogue.encode import Piece
from cai_jax.dialogue.messages import Message
from cai_jax.runtime.registry import Registry

TemplateOptions = tuple[tuple[str, Any], ...]  # (name, value) pairs


class Format(Protocol):
  """A prompt format, bound to one tokenizer.

  A format describes a dialogue as a sequence of pieces, which `Encoder.encode` converts to tokens.
  The messages that it receives have valid roles in a valid order, with demonstrations already
  inserted.
  """

  @property
  def stop_token_ids(self) -> tuple[int, ...]:
    """Token ids that end a turn."""
    ...

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """Texts that end a turn because they begin the next one; () if only tokens end turns."""
    ...

  @property
  def prompt_opens_reasoning(self) -> bool:
    """Whether a prompt ends with `<think>`, so that a reply begins inside its reasoning."""
    ...

  def prompt(self, messages: Sequence[Message], reply_role: str) -> list[Piece]:
    """Return the pieces of a prompt: the messages, and whatever comes before the reply.

    Args:
      messages: the dialogue, ending with a request.
      reply_role: the role of the reply.
    """
    ...

  def reply(self, text: str, reply_role: str) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces before a reply, and the pieces of the reply with its end token.

    Args:
      text: the reply.
      reply_role: its role.

    Returns:
      The pieces with which a prompt for this role ends, and those that follow.
    """
    ...

  def conversation(self, messages: Sequence[Message]) -> list[Piece]:
    """Return the pieces of a whole dialogue that ends with a reply."""
    ...


# Each entry is called as entry(encoder, eos_token_ids, template_options) and returns a Format. It
# raises UserError if the tokenizer or the options do not suit it.
FORMATS: Registry[Callable[..., Format]] = Registry('prompt format')
