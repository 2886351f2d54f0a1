"""Pretraining of the embedded model: its documents as training examples."""

import pytest
import transformers

from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError
from cai_jax.tiny import corpus, files, pretrain


def test_every_token_of_a_pretraining_document_is_learned():
  dialogue = Dialogue(transformers.PreTrainedTokenizerFast.from_pretrained(files.MODELS['tiny']))
  examples, counts = pretrain.make_examples(dialogue, 3000, seed=1)
  assert counts['tokens'] == sum(len(e.tokens) for e in examples) >= 3000
  assert counts['documents'] == len(examples) and all(e.loss_mask.all() for e in examples)
  first = corpus.make_document(1, 0)
  assert examples[0].tokens.tolist() == dialogue.prompt(
    first[:-1], first[-1]['role']
  ) + dialogue.reply(first[-1]['content'], first[-1]['role'])


def test_a_seed_writes_its_own_model_of_the_package_and_no_other():
  assert pretrain.default_output('base', 0) == files.MODELS['tiny']
  assert pretrain.default_output('base', 2) == files.MODELS['tiny-2']
  with pytest.raises(UserError, match='no base model of seed 3, .* Name the folder'):
    pretrain.default_output('base', 3)
