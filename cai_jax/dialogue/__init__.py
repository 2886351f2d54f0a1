"""Messages to token ids and back, by a chat template or the paper's plain labels."""

from cai_jax.dialogue.dialogue import Dialogue, Message

__all__ = ['Dialogue', 'Message']
