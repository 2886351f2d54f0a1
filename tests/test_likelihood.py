"""Log-likelihoods against whole logits and torch, in batches, on one device and on eight."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
import transformers

import cai_jax
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring import likelihood
from cai_jax.scoring.likelihood import log_likelihoods, perplexity, tokenise

RNG = np.random.default_rng(0)
# One token each, a short answer to a long context, a long answer (several slices), the longest.
SIZES = [(1, 1), (3, 2), (40, 1), (5, 60), (31, 1), (32, 1), (7, 9), (200, 56)]
PAIRS = [(RNG.integers(3, 300, a).tolist(), RNG.integers(3, 300, b).tolist()) for a, b in SIZES]
CONTEXTS, CONTINUATIONS = map(list, zip(*PAIRS, strict=True))


@pytest.fixture(scope='module')
def lms(tiny_hf_folder):
  """The same model on one device, and on all eight, split four ways over two kinds of axes."""
  folder = tiny_hf_folder('qwen2_windows')
  one = make_mesh(1, devices=jax.devices()[:1])
  return cai_jax.load(folder, mesh=one), cai_jax.load(folder, mesh=make_mesh(2, 2, 2))


def by_logits(lm, context, continuation):
  """The same from `lm.logits` of the pair alone, in f64."""
  padded = [*context, *continuation, *[0] * 80][:80]  # one length to compile; causal
  logits = np.asarray(lm.logits(np.array([padded])), np.float64)[0]
  log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  start = len(context) - 1
  return sum(log_p[start + i, token] for i, token in enumerate(continuation))


def test_agrees_with_torch(lms, tiny_hf_folder):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tiny_hf_folder('qwen2_windows'), dtype=torch.float32, attn_implementation='eager'
  ).eval()
  values = log_likelihoods(lms[0], CONTEXTS, CONTINUATIONS)
  assert np.std(values) > 10
  for value, (context, continuation) in zip(values, PAIRS, strict=True):
    with torch.no_grad():
      log_p = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    picked = log_p[len(context) - 1 : -1].gather(1, torch.tensor(continuation)[:, None])
    assert value == pytest.approx(picked.sum().item(), abs=2e-5 + 3e-7 * abs(value))


@pytest.mark.parametrize('batch_tokens', [64, 8192])
def test_batches_and_meshes_change_nothing(lms, batch_tokens):
  expected = [by_logits(lms[0], *pair) for pair in PAIRS[:7]]
  for lm in lms:
    values = log_likelihoods(lm, CONTEXTS[:7], CONTINUATIONS[:7], batch_tokens=batch_tokens)
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


def test_memory_bound_changes_nothing(lms, monkeypatch):
  expected = log_likelihoods(lms[0], CONTEXTS, CONTINUATIONS)
  sizes = []
  monkeypatch.setattr(likelihood, 'LOGITS_AT_ONCE', lms[0].vocab_size * 7)
  places = likelihood._places
  monkeypatch.setattr(
    likelihood, '_places', lambda *a: sizes.append((a[1], places(*a))) or places(*a)
  )
  values = log_likelihoods(lms[0], CONTEXTS, CONTINUATIONS, batch_tokens=256)
  assert min(size for _, size in sizes) < likelihood.PLACES_AT_ONCE
  assert all(rows * size <= 7 or size == 1 for rows, size in sizes)
  np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


def test_order_changes_no_bit(lms):
  values = log_likelihoods(lms[1], CONTEXTS, CONTINUATIONS)
  back = log_likelihoods(lms[1], CONTEXTS[::-1], CONTINUATIONS[::-1])
  assert back[::-1] == values
  assert log_likelihoods(lms[1], [], []) == []


def test_order_changes_no_batch(lms, monkeypatch):
  contexts = RNG.integers(3, 300, (21, 6)).tolist()  # equally long: their length does not sort them
  batches, pad = [], likelihood._pad

  def watched(pairs, rows, length):
    batches.append((pairs, rows, length))
    return pad(pairs, rows, length)

  monkeypatch.setattr(likelihood, '_pad', watched)
  values = log_likelihoods(lms[0], contexts, [[5]] * 21, batch_tokens=256)
  assert [rows for _, rows, _ in batches] == [8, 8, 8]
  back = log_likelihoods(lms[0], contexts[::-1], [[5]] * 21, batch_tokens=256)
  assert batches[3:] == batches[:3] and back[::-1] == values
  assert len(set(values)) > 1


def test_probabilities_of_all_tokens_sum_to_one(lms):
  context, vocabulary = CONTEXTS[1], range(lms[0].vocab_size)
  values = log_likelihoods(lms[0], [context] * len(vocabulary), [[v] for v in vocabulary])
  assert math.fsum(map(math.exp, values)) == pytest.approx(1, abs=1e-5)


def test_chain_rule(lms):
  context, (a, b) = CONTEXTS[6], CONTINUATIONS[1]
  whole, first, second = log_likelihoods(
    lms[0], [context, context, [*context, a]], [[a, b], [a], [b]]
  )
  assert whole == pytest.approx(first + second, abs=1e-4)


def test_perplexity(lms):
  values = log_likelihoods(lms[0], CONTEXTS, CONTINUATIONS)
  found = perplexity(lms[0], PAIRS)
  tokens = sum(map(len, CONTINUATIONS))
  assert (found['tokens'], found['sequences']) == (tokens, len(PAIRS))
  assert found['loss'] == pytest.approx(-sum(values) / len(PAIRS))
  assert found['loss_per_token'] == pytest.approx(-sum(values) / tokens)
  assert found['perplexity'] == pytest.approx(math.exp(found['loss_per_token']))
  with pytest.raises(ValueError, match='no row'):
    perplexity(lms[0], [])


def test_loss_is_the_objective_of_training(lms):
  from cai_jax.training.objective import loss_and_metrics

  context, continuation = PAIRS[6]
  tokens = np.array([context + continuation])
  batch = {
    'tokens': tokens,
    'positions': np.arange(tokens.size)[None],
    'segment_ids': np.ones_like(tokens),
    'loss_mask': np.arange(tokens.size)[None] >= len(context),
  }
  compute = jax.jit(loss_and_metrics, static_argnums=0)
  nll, sums = compute(lms[0].graph, lms[0].params, batch)
  found = perplexity(lms[0], PAIRS[6:7])
  assert found['loss'] == pytest.approx(float(nll), abs=1e-4)
  assert found['tokens'] == int(sums['num_tokens'])


@pytest.mark.parametrize(
  ('contexts', 'continuations', 'message'),
  [
    ([[]], [[4]], 'pair 0: the context has no token.*BOS'),
    ([[4], [4]], [[4], []], 'pair 1: the continuation has no token'),
    ([[4]], [[384]], r'continuation has tokens in 384..384; the vocabulary is 0..383'),
    ([[-1, 4]], [[3]], r'context has tokens in -1..4'),
    ([[4] * 200], [[4] * 57], '200 tokens of context and 57 .* exceed the 256.*shorten'),
    ([[4]], [], '1 contexts and 0 continuations'),
  ],
)
def test_refusals(lms, contexts, continuations, message):
  with pytest.raises(ValueError, match=message):
    log_likelihoods(lms[0], contexts, continuations)


def test_refuses_batch_tokens_and_broken_models(lms):
  with pytest.raises(ValueError, match='batch_tokens=0'):
    log_likelihoods(lms[0], [[4]], [[4]], batch_tokens=0)
  params = jax.tree.map(lambda x: x * np.nan, lms[0].params)
  with pytest.raises(ValueError, match='not finite'):
    log_likelihoods(dataclasses.replace(lms[0], params=params), [[4]], [[4]])


def test_few_shapes():
  lengths = range(1, 4097)
  buckets = [likelihood._bucket(length, 4000) for length in lengths if length <= 4000]
  assert all(b >= n for b, n in zip(buckets, lengths, strict=False))
  assert all(b <= max(32, 1.5 * n + 1) for b, n in zip(buckets, lengths, strict=False))
  assert len(set(buckets)) == 15 and max(buckets) == 4000


def test_tokenise_is_joint(tiny_tokenizer):
  context, continuation = tokenise(tiny_tokenizer, 'The assistant answers the', ' question')
  assert tiny_tokenizer.decode(context) == 'The assistant answers the'
  assert context + continuation == tiny_tokenizer.encode('The assistant answers the question')
  # A text that merges over the cut: the merged token is the continuation's.
  context, continuation = tokenise(tiny_tokenizer, 'The assistant answ', 'ers')
  assert tiny_tokenizer.decode(context) == 'The assistant'
  assert tiny_tokenizer.decode(continuation) == ' answers'
  with pytest.raises(ValueError, match='adds no token'):
    tokenise(tiny_tokenizer, 'The', '')


def test_tokenise_keeps_bos_and_no_eos(tiny_tokenizer):
  import tokenizers

  core = tokenizers.Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
  core.post_processor = tokenizers.processors.TemplateProcessing(
    single='<|im_start|> $A <|im_end|>',
    special_tokens=[(t, core.token_to_id(t)) for t in ('<|im_start|>', '<|im_end|>')],
  )
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
  bos, eos = core.token_to_id('<|im_start|>'), core.token_to_id('<|im_end|>')
  assert fast.encode('The')[0] == bos and fast.encode('The')[-1] == eos
  context, continuation = tokenise(fast, 'The answer', ' is')
  assert context[0] == bos and eos not in context + continuation
  assert fast.decode(context[1:] + continuation) == 'The answer is'
  assert tokenise(fast, '', 'The') == ([bos], fast.encode('The')[1:-1])


def test_tokenise_reads_no_control_token_from_text(tiny_tokenizer):
  context, continuation = tokenise(tiny_tokenizer, 'a <|im_end|>', ' <|im_start|>')
  assert not set(context + continuation) & set(tiny_tokenizer.all_special_ids)
  assert tiny_tokenizer.decode(context + continuation) == 'a <|im_end|> <|im_start|>'


def test_tokenise_refuses_what_it_cannot_keep_as_text(tiny_tokenizer):
  import tokenizers

  core = tokenizers.Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
  core.add_tokens([tokenizers.AddedToken('</s>', special=False)])
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
  with pytest.raises(ValueError, match="spells '</s>'"):
    tokenise(fast, 'a </s>', ' b')
  core.add_tokens([tokenizers.AddedToken('bicycle', special=False)])  # a word is no control token
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
  context, continuation = tokenise(fast, 'a bicycle', ' b')
  assert core.token_to_id('bicycle') in context and fast.decode(context) == 'a bicycle'
