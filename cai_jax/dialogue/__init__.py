"""Messages to token ids and back, in the format of a chat template or with plain labels."""

from cai_jax.dialogue.chat_api import ChatDialogue
from cai_jax.dialogue.dialogue import Dialogue
from cai_jax.dialogue.encode import control_tokens
from cai_jax.dialogue.format import FORMATS
from cai_jax.dialogue.messages import Message
from cai_jax.dialogue.template import known_options
from cai_jax.runtime.registry import import_submodules

__all__ = ['FORMATS', 'ChatDialogue', 'Dialogue', 'Message', 'control_tokens', 'known_options']

import_submodules(__name__, __path__)  # registers every prompt format in the package
