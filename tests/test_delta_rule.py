"""The gated delta rule: both forms agree with each other and with torch, and so do gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as reference

from cai_jax.model import delta_rule
from cai_jax.model.delta_rule import DeltaInputs

B, K, G, H, U, W = 2, 2, 3, 8, 16, 4
RECURRENT = reference.torch_recurrent_gated_delta_rule
CHUNKS = reference.torch_chunk_gated_delta_rule
FORMS = {'recurrent': delta_rule.recur, 'chunks': delta_rule.recur_in_chunks}


def make_inputs(length, seed=0, spread=2):
  """Draw the inputs of tokens, whose decays are between strong and almost none.

  Strong decays with a large `spread` cost torch's chunks a digit that ours keep.
  """
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  log_decay = -np.exp(spread * draw(B, length, K, G) - 1)
  beta = 1 / (1 + np.exp(-2 * draw(B, length, K, G)))
  return DeltaInputs(
    draw(B, length, K, H), draw(B, length, K, H), draw(B, length, K, G, U), log_decay, beta
  )


def in_torch(function, inputs, state=None):
  """Return the outputs and the state of one of torch's functions, as tensors."""
  merge = lambda x: x.reshape(*x.shape[:2], K * G, *x.shape[4:])  # noqa: E731
  return function(
    inputs.q,
    inputs.k,
    merge(inputs.v),
    g=merge(inputs.log_decay),
    beta=merge(inputs.beta),
    initial_state=None if state is None else state.reshape(B, K * G, H, U),
    output_final_state=True,
    use_qk_l2norm_in_kernel=True,
  )


def assert_close(ours, theirs):
  np.testing.assert_allclose(ours, np.asarray(theirs).reshape(ours.shape), atol=1e-5, rtol=0)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('length', [1, 7, 64, 150])
@pytest.mark.parametrize('function, spread', [(RECURRENT, 2), (RECURRENT, 1), (CHUNKS, 1)])
def test_both_forms_agree_with_both_of_torch(form, length, function, spread):
  inputs = make_inputs(length, spread=spread)
  state = np.random.default_rng(1).standard_normal((B, K, G, H, U)).astype(np.float32)
  tensors = DeltaInputs(*map(torch.tensor, inputs))
  for initial in (None, state):
    out, last = FORMS[form](inputs, initial)
    expected = in_torch(function, tensors, None if initial is None else torch.tensor(initial))
    assert_close(out, expected[0])
    assert_close(last, expected[1])
  assert np.abs(out).max() > 0.1


@pytest.mark.parametrize('form', FORMS)
def test_gradients_agree_with_torch(form):
  inputs = make_inputs(80, seed=2)
  weights = np.random.default_rng(3).standard_normal((B, 80, K, G, U)).astype(np.float32)
  ours = jax.grad(lambda x: (FORMS[form](x)[0] * weights).sum())(inputs)
  tensors = DeltaInputs(*(torch.tensor(x, requires_grad=True) for x in inputs))
  out, _ = in_torch(RECURRENT, tensors)
  (out * torch.tensor(weights).reshape(out.shape)).sum().backward()
  for name, gradient, tensor in zip(DeltaInputs._fields, ours, tensors, strict=True):
    expected = tensor.grad.numpy()
    assert np.abs(expected).max() > 0.1, name
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize('form', FORMS)
def test_packed_texts_are_computed_alone(form):
  """Texts begin in the middle of a chunk, at its start, and twice within one; padding follows."""
  lengths = (70, 58, 5, 90, 7)
  inputs = make_inputs(sum(lengths), seed=4)
  segments = np.repeat([1, 2, 3, 4, 0], lengths)[None].repeat(B, 0)
  out, last = FORMS[form](inputs, None, delta_rule.starts_of(segments))
  ends = np.cumsum(lengths)
  for end, n in zip(ends, lengths, strict=True):
    own = DeltaInputs(*(x[:, end - n : end] for x in inputs))
    expected, state = delta_rule.recur(own)
    assert_close(out[:, end - n : end], expected)
  assert_close(last, state)


@pytest.mark.parametrize('form', FORMS)
def test_a_token_without_rate_and_decay_leaves_the_state(form):
  inputs = make_inputs(20, seed=5)
  real = np.arange(20) % 3 != 1
  hide = lambda x: np.where(real[:, None, None], x, 0)  # noqa: E731
  hidden = inputs._replace(log_decay=hide(inputs.log_decay), beta=hide(inputs.beta))
  out, last = FORMS[form](hidden)
  expected, state = delta_rule.recur(DeltaInputs(*(x[:, real] for x in inputs)))
  assert_close(out[:, real], expected)
  assert_close(last, state)


def test_recurrence_in_pieces_is_equal_to_the_bit():
  """The state after each token depends on nothing but the tokens before it."""
  inputs = make_inputs(30, seed=6)
  run = jax.jit(delta_rule.recur)
  out, last = run(inputs)
  state, pieces = jnp.zeros_like(last), []
  for start in range(0, 30, 10):
    piece, state = run(DeltaInputs(*(x[:, start : start + 10] for x in inputs)), state)
    pieces.append(piece)
  np.testing.assert_array_equal(out, np.concatenate(pieces, 1))
  np.testing.assert_array_equal(last, state)


def test_the_inverse_is_as_accurate_as_substitution():
  """With keys that are all alike and no decay, powers of the matrix would overflow f32."""
  lower = np.tril(np.ones((64, 64), np.float32), -1) * 0.99
  expected = np.linalg.inv(np.eye(64) + lower.astype(np.float64))
  np.testing.assert_allclose(delta_rule._invert(jnp.asarray(lower)), expected, atol=1e-5)


def test_the_convolution_agrees_with_torch():
  rng = np.random.default_rng(7)
  x = rng.standard_normal((B, 20, H)).astype(np.float32)
  kernel = rng.standard_normal((H, W)).astype(np.float32)

  def expect(x):
    y = reference.causal_conv1d_fn(torch.tensor(x).transpose(1, 2), torch.tensor(kernel))
    return y.transpose(1, 2).numpy()

  assert_close(delta_rule.convolve(x, kernel), expect(x))
  later = delta_rule.convolve(x[:, 12:], kernel, before=x[:, 9:12])
  np.testing.assert_array_equal(later, delta_rule.convolve(x, kernel)[:, 12:])
  starts = delta_rule.starts_of(np.repeat([1, 2, 3, 0], (5, 2, 9, 4))[None].repeat(B, 0))
  packed = delta_rule.convolve(x, kernel, starts=starts)
  for start, end in ((0, 5), (5, 7), (7, 16)):
    assert_close(packed[:, start:end], expect(x[:, start:end]))
