"""Messages to token ids and back, in the format of a chat template or with plain labels."""

from cai_jax.dialogue.dialogue import Dialogue
from cai_jax.dialogue.encode import control_tokens
from cai_jax.dialogue.format import FORMATS
from cai_jax.dialogue.messages import Message

__all__ = ['FORMATS', 'Dialogue', 'Message', 'control_tokens']
