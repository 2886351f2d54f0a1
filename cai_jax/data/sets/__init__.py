"""Published sets of prompts, which a config names: `prompts.*.source='xstest'`."""

from cai_jax.data.sets import published as published  # importing it registers the sets
from cai_jax.data.sets.prompt_set import PROMPT_SETS, PromptSet, register_set

__all__ = ['PROMPT_SETS', 'PromptSet', 'register_set']
