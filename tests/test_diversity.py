"""Diversity of sets of texts, against values derived by hand, NLTK's, and torch's hidden states."""

import math

import numpy as np
import pytest
import torch
import transformers

from cai_jax.evaluation import diversity
from cai_jax.evaluation.diversity import cosine_distances, distinct_ngrams, self_bleu, text_changes
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.embeddings import embed_texts

TEXTS = [
  'open the window and let the air in',
  'open the window and the door',
  'let the cat in',
  'close it',
  'open the window and let the air in please do',
  'the the the the',
]


@pytest.mark.parametrize(('order', 'different', 'total'), [(1, 13, 34), (2, 15, 28), (3, 13, 22)])
def test_distinct_n_is_the_share_of_different_ngrams(order, different, total):
  assert np.mean(distinct_ngrams(TEXTS, order)) == pytest.approx(different / total)


def test_distinct_n_of_equal_different_and_blank_texts():
  assert distinct_ngrams(['a b c'] * 4, 2) == [0.25] * 4
  assert distinct_ngrams(['a b', 'c d'], 2) == [1.0, 1.0]
  assert distinct_ngrams(['a b', 'c d e'], 2) == pytest.approx([2 / 3, 4 / 3])
  assert distinct_ngrams(['a', ''], 2) == [0.0, 0.0]


def test_self_bleu_by_hand():
  # In the second text, 4 of 6 words and 2 of 5 pairs match. It is longer than the reference.
  texts = ['a b c d', 'a b e c d f']
  assert self_bleu(texts, 2)[1] == pytest.approx(math.sqrt(4 / 6 * 2 / 5))
  # In the first text, all words and 2 of 3 pairs match. It is shorter: exp(1 - 6 / 4).
  assert self_bleu(texts, 2)[0] == pytest.approx(math.sqrt(2 / 3) * math.exp(-0.5))


@pytest.mark.parametrize(
  ('order', 'expected'),
  [
    (2, [1.0, 0.707107, 0.5, 0.0, 0.788811, 0.129099]),
    (4, [1.0, 0.537285, 0.18803, 0.0, 0.759836, 0.095544]),
  ],
)
def test_self_bleu_equals_that_of_nltk(order, expected):
  """NLTK 3.9's `sentence_bleu(others, text, weights, SmoothingFunction().method1)`."""
  assert self_bleu(TEXTS, order) == pytest.approx(expected, abs=1e-6)


def test_self_bleu_of_equal_texts_is_1_and_of_blank_ones_0():
  assert self_bleu(['a b c d e'] * 3) == pytest.approx([1.0] * 3)
  assert self_bleu(['a b c d', '', 'e f g h']) == [0.0] * 3


def test_self_bleu_of_many_texts_equals_a_direct_computation():
  rng = np.random.default_rng(0)
  texts = [' '.join(rng.choice(list('abcdef'), rng.integers(1, 9))) for _ in range(30)]

  def direct(i):
    own, others = texts[i].split(), [t.split() for j, t in enumerate(texts) if j != i]
    score = 0.0
    for n in range(1, 5):
      grams = diversity._ngrams(own, n)
      matches = sum(
        min(grams.count(g), max(diversity._ngrams(o, n).count(g) for o in others))
        for g in set(grams)
      )
      score += math.log((matches or 0.1) / max(len(grams), 1)) / 4
    closest = min((abs(len(o) - len(own)), len(o)) for o in others)[1]
    return math.exp(score + min(0.0, 1 - closest / len(own)))

  assert self_bleu(texts) == pytest.approx([direct(i) for i in range(30)])


def test_changes_are_those_of_a_text_and_its_own_reference():
  changes = text_changes(['a b c', 'a b c', 'x y', ''], ['a b c', 'a b d', 'a b c', ''])
  assert changes == pytest.approx([0, 1 - 1 / 3, 1, 0])


def test_cosine_distances_of_right_angles_opposites_and_zero():
  assert cosine_distances(np.eye(3)) == pytest.approx([1.0] * 3)
  assert cosine_distances(np.array([[1, 0], [2, 0]])) == pytest.approx([0.0, 0.0])
  assert cosine_distances(np.array([[1, 0], [-3, 0], [0, 0]])) == pytest.approx([1.5, 1.5, 1.0])


def test_embeddings_are_torchs_mean_hidden_states(load, tiny_hf_folder):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tiny_hf_folder('qwen2'), dtype=torch.float32
  ).eval()
  lm = load('qwen2')
  texts = ['How do I repair a bicycle?', '', 'kind', 'The human ' * 20, 'kind']
  embeddings = embed_texts(lm, texts)
  assert not embeddings[1].any() and np.array_equal(embeddings[2], embeddings[4])
  for text, embedding in zip(texts, embeddings, strict=True):
    tokens = lm.tokenizer.encode(text, add_special_tokens=False)
    if tokens:
      with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1]
      np.testing.assert_allclose(embedding, states[0].mean(0).numpy(), atol=2e-5)
  with pytest.raises(UserError, match='but the context of .* holds'):
    embed_texts(lm, ['human ' * 2000])


def test_every_measure_compares_at_least_two_texts(load):
  class Loader:
    def language_model(self, name):
      assert name == 'base'
      return load('qwen2')

  for name, create in diversity.DIVERSITY.items():
    measure = create(Loader())
    assert len(measure(['a b c d e f', 'a b c'])) == 2, name
    with pytest.raises(UserError, match='needs at least two'):
      measure(['a'])
