"""`cai_jax.generate`: one completion per prompt."""

import numpy as np
import pytest
import torch
import transformers

import cai_jax
from cai_jax import SamplingConfig
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.config import EngineConfig

GREEDY = SamplingConfig(temperature=0.0, max_tokens=64)


def test_greedy_tokens_equal_those_of_torch(tiny_hf_folder):
  """All 64 tokens are equal, for prompts of different lengths in one call."""
  folder = tiny_hf_folder('qwen2_windows')
  lm = cai_jax.load(folder)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(5, lm.config.vocab_size, n).tolist() for n in (3, 17, 40)]
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  engine = EngineConfig(slots=8, prefill_width=16)
  completions = cai_jax.generate(lm, prompts, GREEDY, engine=engine)
  for prompt, completion in zip(prompts, completions, strict=True):
    expected = model.generate(
      torch.tensor([prompt]),
      do_sample=False,
      max_new_tokens=64,
      pad_token_id=0,
      eos_token_id=list(lm.eos_token_ids),
    )[0, len(prompt) :].tolist()
    assert completion.tokens == expected


@pytest.fixture(scope='module')
def lm(tiny_hf_folder):
  return cai_jax.load(tiny_hf_folder('smollm2'))


def test_prompts_can_be_texts_dialogues_or_tokens(lm):
  sampling = SamplingConfig(max_tokens=5)
  text = 'Once upon a time'
  messages = [{'role': 'user', 'content': 'Hello'}]
  ids = lm.tokenizer.encode(text)
  done = cai_jax.generate(lm, [text, messages, ids], sampling)
  assert all(0 < len(c.tokens) <= 5 and len(c.logprobs) == len(c.tokens) for c in done)
  assert all(c.finish_reason in ('stop', 'length') for c in done)
  # The text and its ids are the same prompt, so these are two different samples of it.
  assert cai_jax.generate(lm, [ids], sampling)[0] == done[0] != done[2]


def test_a_sample_is_independent_of_the_other_prompts(lm):
  sampling = SamplingConfig(max_tokens=8, temperature=1.5)
  texts = [f'Prompt number {i}' for i in range(9)]
  engine = EngineConfig(slots=8)
  completions = cai_jax.generate(lm, texts, sampling, seed=3, engine=engine)
  reversed_prompts = cai_jax.generate(lm, texts[::-1], sampling, seed=3, engine=engine)
  assert completions == reversed_prompts[::-1]
  assert cai_jax.generate(lm, texts[4:5], sampling, seed=3, engine=engine) == completions[4:5]
  assert cai_jax.generate(lm, texts, sampling, seed=4, engine=engine) != completions


def test_text_prompts_cannot_become_control_tokens(lm):
  end = lm.tokenizer.eos_token
  spelled = cai_jax.generate(lm, [f'a {end} b'], GREEDY, engine=EngineConfig(slots=8))
  plain = lm.tokenizer.encode(f'a {end} b', split_special_tokens=True)
  assert lm.tokenizer.eos_token_id not in plain
  assert spelled == cai_jax.generate(lm, [plain], GREEDY, engine=EngineConfig(slots=8))


def test_invalid_prompts_are_refused(lm):
  with pytest.raises(UserError, match='non-empty list'):
    cai_jax.generate(lm, 'a text alone')
  with pytest.raises(UserError, match='non-empty list'):
    cai_jax.generate(lm, [])
  for single in ([{'role': 'user', 'content': 'a'}], [1, 2, 3]):
    with pytest.raises(UserError, match=r'\[prompt\]'):
      cai_jax.generate(lm, single)
  with pytest.raises(UserError, match='Prompt 1 has no tokens'):
    cai_jax.generate(lm, ['a', []])
  with pytest.raises(UserError, match='outside the vocabulary'):
    cai_jax.generate(lm, [[1, 10**6]])
  with pytest.raises(UserError, match='longer than the'):
    cai_jax.generate(lm, [[1] * 4000])
  for prompt, message in (
    ([['a']], 'Prompt 0 is'),
    (b'a', 'Prompt 0 is'),
    ([{'role': 'user'}], 'Message 0 is'),
    ([{'role': 'user', 'content': None}], 'Message 0 is'),
    ([{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]}], 'several parts'),
    ('\ud800', 'unpaired surrogate'),
  ):
    with pytest.raises(UserError, match=message):
      cai_jax.generate(lm, [prompt])
  with pytest.raises(UserError, match='stop_token_ids has token ids'):
    cai_jax.generate(lm, ['a'], SamplingConfig(stop_token_ids=(10**6,)))
  with pytest.raises(UserError, match='seed must be an integer'):
    cai_jax.generate(lm, ['a'], seed='a')


@pytest.mark.parametrize(
  'settings',
  [
    dict(temperature=float('nan')),
    dict(temperature='1'),
    dict(top_k=1.5),
    dict(top_k=2**40),
    dict(max_tokens=True),
    dict(stop='x'),
    dict(stop=(1,)),
    dict(stop_token_ids=(-1,)),
    dict(stop_token_ids=('a',)),
  ],
)
def test_sampling_settings_of_a_wrong_type_are_refused(settings):
  with pytest.raises(UserError, match=f'sampling: {next(iter(settings))}'):
    SamplingConfig(**settings)


def test_sampling_settings_are_converted_to_their_types():
  assert SamplingConfig(temperature=1, stop=['x']) == SamplingConfig(temperature=1.0, stop=('x',))
