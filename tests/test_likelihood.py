"""Log-likelihoods agree with torch, whatever the batches, the order and the number of devices."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
import transformers

import cai_jax
from cai_jax.evaluation.measures.held_out_loss import loss_and_perplexity
from cai_jax.model import transformer
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring import likelihood
from cai_jax.scoring.likelihood import log_likelihoods, tokenize_pair

RNG = np.random.default_rng(0)
# Tokens of context and continuation. Long continuations are scored in several slices, and the last
# pair fills the model's context.
SIZES = [(1, 1), (3, 2), (40, 1), (5, 60), (31, 1), (32, 1), (7, 9), (200, 56)]
PAIRS = [(RNG.integers(3, 300, a).tolist(), RNG.integers(3, 300, b).tolist()) for a, b in SIZES]
CONTEXTS, CONTINUATIONS = map(list, zip(*PAIRS, strict=True))


@pytest.fixture(scope='module')
def lms(tiny_hf_folder):
  """The same model on one device, and on eight with batch, parameter and tensor parallelism."""
  folder = tiny_hf_folder('qwen2_windows')
  one_device = make_mesh(1, devices=jax.devices()[:1])
  return cai_jax.load(folder, mesh=one_device), cai_jax.load(folder, mesh=make_mesh(2, 2, 2))


def reference_value(lm, context, continuation):
  """Return the log-likelihood of one pair from `lm.logits`, summed in f64."""
  # Padding on the right does not affect a causal model, and one length compiles one program.
  padded = [*context, *continuation, *[0] * 80][:80]
  logits = np.asarray(lm.logits(np.array([padded])), np.float64)[0]
  log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  start = len(context) - 1
  return sum(log_p[start + i, token] for i, token in enumerate(continuation))


def test_log_likelihoods_agree_with_torch(lms, tiny_hf_folder):
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
def test_values_do_not_depend_on_batch_size_or_mesh(lms, batch_tokens):
  expected = [reference_value(lms[0], *pair) for pair in PAIRS[:7]]
  for lm in lms:
    values = log_likelihoods(lm, CONTEXTS[:7], CONTINUATIONS[:7], batch_tokens=batch_tokens)
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


def test_values_do_not_depend_on_the_memory_limit(lms, monkeypatch):
  expected = log_likelihoods(lms[0], CONTEXTS, CONTINUATIONS)
  sizes = []
  monkeypatch.setattr(likelihood, 'LOGITS_AT_ONCE', lms[0].vocab_size * 7)
  positions_at_once = likelihood.positions_at_once
  monkeypatch.setattr(
    likelihood,
    'positions_at_once',
    lambda *a: sizes.append((a[1], positions_at_once(*a))) or positions_at_once(*a),
  )
  values = log_likelihoods(lms[0], CONTEXTS, CONTINUATIONS, batch_tokens=256)
  assert min(size for _, size in sizes) < likelihood.POSITIONS_AT_ONCE
  assert all(rows * size <= 7 or size == 1 for rows, size in sizes)
  np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


def test_the_order_of_pairs_does_not_change_a_bit(lms):
  values = log_likelihoods(lms[1], CONTEXTS, CONTINUATIONS)
  backward = log_likelihoods(lms[1], CONTEXTS[::-1], CONTINUATIONS[::-1])
  assert backward[::-1] == values
  assert log_likelihoods(lms[1], [], []) == []


def record_batches(monkeypatch):
  """Return a list that receives (rows, number of rows, length) of each batch from now on."""
  batches, pad_rows = [], likelihood._pad_rows

  def record(rows, count, length):
    batches.append((rows, count, length))
    return pad_rows(rows, count, length)

  monkeypatch.setattr(likelihood, '_pad_rows', record)
  return batches


def test_continuations_of_one_context_share_its_row(lms, monkeypatch):
  context = CONTEXTS[7][:150]
  others = [[7, 9], [7, 11], [7, 9, 4, 8], [5], [300], [12] * 9, [7, 9]]  # the first one twice
  alone = [log_likelihoods(lms[0], [context], [tokens])[0] for tokens in others]
  batches = record_batches(monkeypatch)
  for lm in lms:
    batches.clear()
    values = log_likelihoods(lm, [context, CONTEXTS[1]] * 7, [t for y in others for t in (y, y)])
    np.testing.assert_allclose(values[::2], alone, rtol=2e-6, atol=1e-4)
    assert values[0] == values[12]
    # The model reads the long context once, and each continuation but its last token.
    read = sum(row.length for rows, _, _ in batches for row in rows if len(row.context) == 150)
    assert read == 150 + 1 + 1 + 3 + 8


def test_a_row_of_many_continuations_stays_within_the_context_of_the_model(lms, monkeypatch):
  context, others = CONTEXTS[7][:100], RNG.integers(3, 300, (5, 60)).tolist()
  expected = [reference_value(lms[0], [*context[:20]], other) for other in others]
  batches = record_batches(monkeypatch)
  values = log_likelihoods(lms[0], [context[:20]] * 5, others)
  np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)
  log_likelihoods(lms[0], [context] * 5, others)
  lengths = [row.length for rows, _, _ in batches for row in rows]
  assert max(lengths) <= lms[0].max_positions and len(lengths) == 2 + 3


def test_a_short_context_is_not_shared_by_so_many_that_attention_dominates():
  for size, limit in ((30, likelihood.SHARED_ROW), (2000, 4000)):
    context = (5,) * size
    pairs = sorted((context, (number, *[7] * 200)) for number in range(60))
    rows = list(likelihood._share_contexts(pairs, 100_000))
    assert [pair for row in rows for pair in row.pairs()] == pairs
    assert max(row.length for row in rows) <= limit
    assert len(rows[0].continuations) > 1
  one = [((5,) * 10, (7,) * 900)]
  assert [row.length for row in likelihood._share_contexts(one, 100_000)] == [909]


def test_long_rows_make_no_mask(lms, monkeypatch):
  contexts = [[*RNG.integers(3, 300, 68)] for _ in range(15)]
  pairs = [(context, [7, 8, 9, 5]) for context in contexts]
  pairs += [(contexts[0], [11, 12]), (contexts[0][:9], [4]), (contexts[0][:9], [3])]
  expected = [reference_value(lms[0], *pair) for pair in pairs]
  kernels, bind_kernel = [], transformer.bind_kernel
  monkeypatch.setattr(
    transformer, 'bind_kernel', lambda *a: kernels.append(a[0]) or bind_kernel(*a)
  )
  for module in (transformer, likelihood):
    monkeypatch.setattr(module, 'LONGEST_MASK', 64)
  batches = record_batches(monkeypatch)
  for lm in lms:
    batches.clear()
    values = log_likelihoods(lm, *map(list, zip(*pairs, strict=True)))
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)
    branches = {length: max(len(row.continuations) for row in rows) for rows, _, length in batches}
    assert branches == {32: 2, 96: 1}  # short rows still share a context
  assert kernels == ['blocks', 'blocks']


def test_the_order_of_pairs_does_not_change_the_batches(lms, monkeypatch):
  contexts = RNG.integers(3, 300, (21, 6)).tolist()  # equal lengths
  batches = record_batches(monkeypatch)
  values = log_likelihoods(lms[0], contexts, [[5]] * 21, batch_tokens=256)
  assert [rows for _, rows, _ in batches] == [8, 8, 8]
  backward = log_likelihoods(lms[0], contexts[::-1], [[5]] * 21, batch_tokens=256)
  assert batches[3:] == batches[:3] and backward[::-1] == values
  assert len(set(values)) > 1


def test_probabilities_of_all_tokens_sum_to_one(lms):
  context, vocabulary = CONTEXTS[1], range(lms[0].vocab_size)
  values = log_likelihoods(lms[0], [context] * len(vocabulary), [[v] for v in vocabulary])
  assert math.fsum(map(math.exp, values)) == pytest.approx(1, abs=1e-5)


def test_log_likelihoods_obey_the_chain_rule(lms):
  context, (a, b) = CONTEXTS[6], CONTINUATIONS[1]
  whole, first, second = log_likelihoods(
    lms[0], [context, context, [*context, a]], [[a, b], [a], [b]]
  )
  assert whole == pytest.approx(first + second, abs=1e-4)


def test_loss_and_perplexity_follow_from_log_likelihoods(lms):
  values = log_likelihoods(lms[0], CONTEXTS, CONTINUATIONS)
  result = loss_and_perplexity(lms[0], PAIRS)
  tokens = sum(map(len, CONTINUATIONS))
  assert (result['tokens'], result['sequences']) == (tokens, len(PAIRS))
  assert result['loss'] == pytest.approx(-sum(values) / len(PAIRS))
  assert result['loss_per_token'] == pytest.approx(-sum(values) / tokens)
  assert result['perplexity'] == pytest.approx(math.exp(result['loss_per_token']))
  with pytest.raises(UserError, match='no pair'):
    loss_and_perplexity(lms[0], [])


def test_loss_equals_the_training_objective(lms):
  from cai_jax.training.losses import negative_log_likelihood

  context, continuation = PAIRS[6]
  tokens = np.array([context + continuation])
  batch = {
    'tokens': tokens,
    'positions': np.arange(tokens.size)[None],
    'segment_ids': np.ones_like(tokens),
    'loss_mask': np.arange(tokens.size)[None] >= len(context),
  }
  compute = jax.jit(negative_log_likelihood, static_argnums=0)
  nll, sums = compute(lms[0].graph, lms[0].params, batch)
  result = loss_and_perplexity(lms[0], PAIRS[6:7])
  assert result['loss'] == pytest.approx(float(nll), abs=1e-4)
  assert result['tokens'] == int(sums['num_tokens'])


@pytest.mark.parametrize(
  ('contexts', 'continuations', 'message'),
  [
    ([[]], [[4]], 'pair 0: the context has no token.*BOS'),
    ([[4], [4]], [[4], []], 'pair 1: the continuation has no token'),
    ([[4]], [[384]], r'continuation has tokens in 384..384, but the vocabulary is 0..383'),
    ([[-1, 4]], [[3]], r'context has tokens in -1..4'),
    ([[4] * 200], [[4] * 57], '200 tokens of context and 57 .* exceed the 256.*Shorten'),
  ],
)
def test_pairs_that_cannot_be_scored_are_rejected(lms, contexts, continuations, message):
  with pytest.raises(UserError, match=message):
    log_likelihoods(lms[0], contexts, continuations)


def test_invalid_arguments_and_models_with_nan_are_rejected(lms):
  with pytest.raises(ValueError, match='1 contexts and 0 continuations'):
    log_likelihoods(lms[0], [[4]], [])
  with pytest.raises(ValueError, match='batch_tokens=0'):
    log_likelihoods(lms[0], [[4]], [[4]], batch_tokens=0)
  params = jax.tree.map(lambda x: x * np.nan, lms[0].params)
  with pytest.raises(UserError, match='not finite'):
    log_likelihoods(dataclasses.replace(lms[0], params=params), [[4]], [[4]])


def test_rows_are_padded_to_few_lengths():
  lengths = range(1, 4097)
  padded = [likelihood._padded_length(length, 4000) for length in lengths if length <= 4000]
  assert all(b >= n for b, n in zip(padded, lengths, strict=False))
  assert all(b <= max(32, 1.5 * n + 1) for b, n in zip(padded, lengths, strict=False))
  assert len(set(padded)) == 15 and max(padded) == 4000


def test_few_shapes_of_batches_are_compiled(lms):
  rng = np.random.default_rng(1)
  for most_tokens, bound in ((100, 3), (400, 8), (4000, 20)):
    lm = dataclasses.replace(lms[0], config=dataclasses.replace(lms[0].config, max_positions=4000))
    lengths = sorted(rng.integers(20, most_tokens, 400).tolist())
    batches = list(likelihood.plan_batches(lengths, lm, 8192))
    assert [i for _, _, members in batches for i in members] == list(range(400))
    for rows, length, members in batches:
      assert len(members) <= rows and rows * length <= 8192
      own = likelihood._padded_length(lengths[members[0]], 4000)
      assert lengths[members[-1]] <= length <= 2 * own
    assert len({(rows, length) for rows, length, _ in batches}) <= bound


def test_context_and_continuation_are_tokenized_as_one_text(tiny_tokenizer):
  context, continuation = tokenize_pair(tiny_tokenizer, 'The assistant answers the', ' question')
  assert tiny_tokenizer.decode(context) == 'The assistant answers the'
  assert context + continuation == tiny_tokenizer.encode('The assistant answers the question')
  # A token that merges text of both belongs to the continuation.
  context, continuation = tokenize_pair(tiny_tokenizer, 'The assistant answ', 'ers')
  assert tiny_tokenizer.decode(context) == 'The assistant'
  assert tiny_tokenizer.decode(continuation) == ' answers'
  with pytest.raises(UserError, match='adds no token'):
    tokenize_pair(tiny_tokenizer, 'The', '')


def test_bos_is_kept_and_eos_is_dropped(tiny_tokenizer):
  import tokenizers

  core = tokenizers.Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
  core.post_processor = tokenizers.processors.TemplateProcessing(
    single='<|im_start|> $A <|im_end|>',
    special_tokens=[(t, core.token_to_id(t)) for t in ('<|im_start|>', '<|im_end|>')],
  )
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
  bos, eos = core.token_to_id('<|im_start|>'), core.token_to_id('<|im_end|>')
  assert fast.encode('The')[0] == bos and fast.encode('The')[-1] == eos
  context, continuation = tokenize_pair(fast, 'The answer', ' is')
  assert context[0] == bos and eos not in context + continuation
  assert fast.decode(context[1:] + continuation) == 'The answer is'
  assert tokenize_pair(fast, '', 'The') == ([bos], fast.encode('The')[1:-1])


def test_text_never_becomes_a_control_token(tiny_tokenizer):
  context, continuation = tokenize_pair(tiny_tokenizer, 'a <|im_end|>', ' <|im_start|>')
  assert not set(context + continuation) & set(tiny_tokenizer.all_special_ids)
  assert tiny_tokenizer.decode(context + continuation) == 'a <|im_end|> <|im_start|>'


def test_text_that_a_tokenizer_reads_as_a_control_token_is_rejected(tiny_tokenizer):
  import tokenizers

  core = tokenizers.Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
  core.add_tokens([tokenizers.AddedToken('</s>', special=False)])
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
  with pytest.raises(UserError, match="spells '</s>'"):
    tokenize_pair(fast, 'a </s>', ' b')
  # An added token that is an ordinary word is allowed.
  core.add_tokens([tokenizers.AddedToken('bicycle', special=False)])
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
  context, continuation = tokenize_pair(fast, 'a bicycle', ' b')
  assert core.token_to_id('bicycle') in context and fast.decode(context) == 'a bicycle'
