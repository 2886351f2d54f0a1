"""The choices in which families differ: each is read by every forward, and changes the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cai_jax
from cai_jax.model import cached_forward, lora, sharding
from cai_jax.model.attention import paged, ragged, triton
from cai_jax.model.attention.kernels.kernel import KERNELS, choose_kernel
from cai_jax.model.cache import windows_of
from cai_jax.model.config import DeltaRule, Experts, ModelConfig, QueryGrowth
from cai_jax.model.elementwise import ACTIVATIONS
from cai_jax.model.sharding import flatten_params
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.sampling import caches
from cai_jax.sampling.auto import measure_load
from cai_jax.training.config import TrainConfig
from cai_jax.training.losses import negative_log_likelihood
from cai_jax.training.state import init_state
from cai_jax.training.step import make_train_step, place_batch
from cai_jax.training.trainable import divide_model
from tests.paged_rows import TOKENS, B, PagedRows, T

BASE = ModelConfig('other', 320, 32, 48, 2, 4, 2, 8, 64)
# Models that together make every choice, in combinations that do not depend on one another.
MODELS = {
  'capped': {
    'norm_offset': 1.0,
    'post_norm': True,
    'qk_norm': True,
    'activation': 'gelu_tanh',
    'query_scale': 0.9,
    'attention_cap': 0.7,
    'sinks': True,
    'windows': (None, 5),
    'embedding_scale': 32**0.5,
    'logit_cap': 2.0,
  },
  'layer_norms': {
    'norm': 'layer',
    'parallel_blocks': True,
    'activation': 'gelu',
    'gated': False,
    'mlp_bias': True,
    'qkv_bias': True,
    'learned_positions': True,
  },
  'norms_after': {
    'pre_norm': False,
    'post_norm': True,
    'qk_norm': True,
    'qk_norm_over_heads': True,
    'residual_scale': 0.5,
    'logit_divisor': 0.5,
    'mlp_bias': True,
  },
  'growing': {'query_growth': QueryGrowth(0.8, 3)},
  'heads': {'head_dims': (8, 16), 'kv_heads': (2, 1), 'qk_norm': True},
  'values': {
    'value_norm': True,
    'values_from_keys': (False, True),
    'qk_norm': True,
    'head_dims': (8, 16),
    'qkv_bias': True,
    'windows': (5, None),
    'layer_scalar': True,
  },
  'states': {'delta': DeltaRule((0,), 2, 4, 8, 12, 4), 'attention_gate': True, 'norm_eps': 0.01},
  'experts': {'experts': Experts(6, 2, 40, dense_layers=(1,)), 'windows': (None, 5)},
  'biased_experts': {
    'experts': Experts(6, 2, 40, softmax_first=False, bias=True, limit=0.8, up_offset=1.0),
    'activation': 'gelu_quick',
  },
}
GATHERED = ('capped', 'heads', 'states')  # with these, each part of the gathering runs
CHOICES = {name: value for fields in MODELS.values() for name, value in fields.items()}


def draw_params(config: ModelConfig, seed: int = 0):
  """Return parameters that are so large and irregular that a mistake changes the logits.

  NumPy draws them, because `init_params` takes longer to compile than most models here.
  """
  rng = np.random.default_rng(seed)
  starts = {'scale': 1 - config.norm_offset, 'scalar': 1.0}
  noise = {'scale': 0.2, 'bias': 0.2, 'scalar': 0.2, 'sinks': 1.0}

  def draw(path, x):
    *parents, name = sharding.path_str(path).split('/')
    drawn = rng.standard_normal(x.shape, np.float32)
    if name in noise:
      return jnp.asarray(starts.get(name, 0.0) + noise[name] * drawn)
    if name == 'table':
      return jnp.asarray(x.shape[-1] ** -0.5 * drawn)
    inputs = x.shape[-2] if 'experts' in parents else x.shape[0]
    if parents[-1] == 'output':  # of attention, with axes N, H and D
      inputs = x.shape[0] * x.shape[1]
    gain = 1.0 if parents[-1] in ('output', 'down') else 2.0  # those write to the residual stream
    return jnp.asarray(gain * inputs**-0.5 * drawn)

  return jax.tree_util.tree_map_with_path(draw, abstract_model(config)[1])


def model_of(config: ModelConfig, **changes) -> cai_jax.LM:
  config = dataclasses.replace(config, **changes)
  mesh = make_mesh(1, devices=jax.devices()[:1])
  return cai_jax.LM(config, draw_params(config), None, mesh, 'float32', '', '', (0,))


# Of tests that compile much, the others are slow.
FEW = ('capped', 'layer_norms', 'experts')


def few(name: str):
  return name if name in FEW else pytest.param(name, marks=pytest.mark.slow)


@functools.cache
def chosen(name: str) -> tuple[cai_jax.LM, np.ndarray]:
  """Return a model of MODELS and its logits of TOKENS."""
  lm = model_of(BASE, **MODELS[name])
  return lm, np.asarray(lm.logits(TOKENS))


@pytest.fixture(params=MODELS)
def choice(request) -> dict:
  """Each value of MODELS in turn."""
  return MODELS[request.param]


def test_every_choice_is_tested():
  neutral = {x.name for x in dataclasses.fields(ModelConfig) if x.metadata.get('added')}
  rotary = {'rope_channels', 'rope_interleaved', 'ropes'}
  assert neutral - rotary <= CHOICES.keys()


@pytest.mark.parametrize('name', CHOICES)
def test_each_choice_changes_the_logits(name):
  """So no field is ignored. The other fields are those of the field's model."""
  model = next(model for model, fields in MODELS.items() if name in fields)
  neutral = {**MODELS[model], name: getattr(BASE, name)}
  if name == 'qk_norm':
    neutral['qk_norm_over_heads'] = False
  if name == 'pre_norm':  # its parameters keep their names only if there are norms before too
    neutral['post_norm'] = False
  lm, logits = chosen(model)
  config = dataclasses.replace(BASE, **neutral)
  shapes = abstract_model(config)[1]
  if jax.tree.map(jnp.shape, lm.params) == jax.tree.map(jnp.shape, shapes):
    plain = dataclasses.replace(lm, config=config)
  else:
    plain = model_of(config)
  other = np.asarray(plain.logits(TOKENS))
  assert np.isfinite(logits).all() and logits.std() > 0.1
  assert np.abs(logits - other).max() > 0.05


# Of these, test_family_generation.py checks the cached forward: gpt2, gpt_oss and gemma4.
GENERATED = ('layer_norms', 'biased_experts', 'heads', 'values')


@pytest.mark.parametrize(
  'name',
  [pytest.param(name, marks=pytest.mark.slow) if name in GENERATED else name for name in MODELS],
)
def test_cached_forward_equals_the_full_forward(name):
  """Prefill in two chunks beside a decoded row, then decode, from scattered and stale pages."""
  lm, full = chosen(name)
  rows = PagedRows(lm)
  for row, logits in enumerate(rows.prefill([(row, 0, 9) for row in range(B)])):
    np.testing.assert_allclose(logits, full[row, :9], atol=1e-4, rtol=0)
  decoded, (prefilled,) = rows.step([0, 1], [9, 9], [(2, 9, 20)], tokens=4)
  np.testing.assert_allclose(decoded[:2], full[:2, 9:13], atol=1e-4, rtol=0)
  np.testing.assert_allclose(prefilled, full[2, 9:20], atol=1e-4, rtol=0)
  for step in range(4):
    at = np.array([13, 13, 20]) + step
    logits = rows.decode(range(B), at)
    np.testing.assert_allclose(logits[:, 0], full[range(B), at], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
  'name',
  [name if name in GATHERED else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_gathered_pages_give_the_same_logits(name, monkeypatch):
  """Accelerators read pages in another way, which this test runs on a CPU."""
  attend = paged._attend_local
  monkeypatch.setattr(
    paged, '_attend_local', lambda *args, on_cpu, **kwargs: attend(*args, on_cpu=False, **kwargs)
  )
  lm, full = chosen(name)
  rows = PagedRows(lm, dtype=jnp.float32)
  jax.clear_caches()
  try:
    rows.prefill([(row, 0, 9) for row in range(B)])
    decoded, (prefilled,) = rows.step([0, 1], [9, 9], [(2, 9, 20)])
  finally:
    jax.clear_caches()
  np.testing.assert_allclose(decoded[:, 0], full[:2, 9], atol=1e-4, rtol=0)
  np.testing.assert_allclose(prefilled, full[2, 9:20], atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', [few(name) for name in MODELS])
def test_kernels_give_the_same_training_gradient(name):
  """Each kernel that this machine has, for packed rows, and for the loss with its own gradient."""
  config = dataclasses.replace(BASE, **MODELS[name])
  graph, params = abstract_model(config)[0], draw_params(config)
  tokens = jnp.asarray(TOKENS[:2], jnp.int32)
  segment_ids = jnp.array([[1] * 14 + [2] * 10, [1] * 20 + [0] * 4])
  positions = jnp.array([[*range(14), *range(10)], [*range(20), *range(4)]])
  batch = {'tokens': tokens, 'positions': positions, 'segment_ids': segment_ids}
  batch['loss_mask'] = jnp.ones((2, T), jnp.int32)

  def plain(params):
    """JAX's own gradient of the logits of plain attention."""
    model = nnx.merge(graph, params)
    log_p = jax.nn.log_softmax(model.unembed(model(tokens, positions, segment_ids)))
    targets = jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return -jnp.sum(jnp.where(same, targets, 0.0))

  expected = jax.jit(jax.value_and_grad(plain))(params)
  for kernel in ('xla', 'blocks'):

    def loss(params, kernel=kernel):
      return negative_log_likelihood(graph, params, batch, attention=kernel)[0]

    ours = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    theirs = flatten_params(expected[1])
    for path, gradient in flatten_params(ours[1]).items():
      size = np.abs(theirs[path]).max()
      # The gradient of a key bias is 0 up to rounding, because it moves all scores of a query.
      np.testing.assert_allclose(gradient, theirs[path], atol=2e-5 * size + 3e-6, err_msg=path)


def test_the_number_of_parameters_is_that_of_the_model(choice):
  for fields in (choice, {**choice, 'tied_embeddings': True}):
    config = dataclasses.replace(BASE, **fields)
    shapes = flatten_params(abstract_model(config)[1]).values()
    assert config.num_params == sum(x.size for x in shapes)
  looked_up = config.learned_positions * config.max_positions * config.d_model
  channels = sum(
    kind.head_dim * min(t + 1, T if kind.window is None else kind.window)
    for kind in config.kinds
    for t in range(T)
  )
  idle = 0  # parameters of the experts that do not compute a token
  if experts := config.experts:
    layers = 2 - len(experts.dense_layers)
    idle = layers * (experts.number - experts.per_token)
    idle *= 3 * 32 * experts.d_ff + experts.bias * (2 * experts.d_ff + 32)
  state = 3 * 4 * 8 * 12 if config.delta else 0  # products with it, in one layer
  flops = 6 * T * (config.num_params - looked_up - idle + state) + 12 * 4 * channels
  assert config.training_flops([T]) == pytest.approx(flops)
  assert len(windows_of(config)) == len(set(config.windows) or {None}) + bool(config.delta)


def test_layers_of_one_kind_share_a_program():
  """On one CPU device. Layers 0 and 2 have the same heads, and layer 1 has others."""
  lm = model_of(BASE, num_layers=3, head_dims=(8, 16, 8), kv_heads=(2, 1, 2))
  rows, before = PagedRows(lm), cached_forward._layer._cache_size()
  cached_forward.forward_cached(*rows.arguments(range(B), [0] * B, [])[0])
  assert cached_forward._layer._cache_size() - before == 2


def test_caches_have_the_heads_of_each_layer():
  lm = model_of(BASE, head_dims=(8, 16), kv_heads=(2, 1), windows=(5, None))
  first = 2 * 2 * 8 * 4  # bytes of a token: keys and values of two heads of eight f32 numbers
  second = 2 * 1 * 16 * 4
  assert caches.cache_bytes(lm, 20, 3) == (5 + 3 + 1) * first + 20 * second
  load = measure_load([(lm.config, 'float32')], lm.mesh)
  assert load.token == first + second and load.windowed == ((5, first),)
  shapes = [layer.k.shape for layer in caches.allocate_prefix(lm, 32)]
  assert shapes == [(1, 2, 8, 32), (1, 1, 16, 32)]
  assert [x.v.shape for x in caches.allocate_block(lm, None, 3, 4)] == [(3, 1, 4, 16)]
  mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
  with pytest.raises(UserError, match='does not divide the 1 key-value heads'):
    caches.check_rows(dataclasses.replace(lm, mesh=mesh), 8)


def test_kernels_must_support_the_heads_of_each_layer(monkeypatch):
  mesh = make_mesh(1, devices=jax.devices()[:1])
  large = dataclasses.replace(BASE, head_dims=(128, 256), kv_heads=(2, 4))
  assert ragged.refuse(large, 'bfloat16', 64, mesh) is None
  odd = dataclasses.replace(BASE, head_dims=(128, 64))
  assert 'the model has 64' in str(ragged.refuse(odd, 'bfloat16', 64, mesh))
  assert triton.refuse(large, 'bfloat16', 64, mesh) is None
  odd = dataclasses.replace(BASE, head_dims=(128, 96))
  assert 'the model has 96' in str(triton.refuse(odd, 'bfloat16', 64, mesh))
  seen = []

  def check(head_dim, device):
    seen.append(head_dim)
    if head_dim > 256:
      raise UserError('too large')

  kernel = dataclasses.replace(KERNELS['blocks'], check_head=check)
  monkeypatch.setitem(KERNELS._entries, 'cudnn', kernel)
  assert choose_kernel(mesh, 'float32', [64], [128, 256]) == 'cudnn'
  assert choose_kernel(mesh, 'float32', [64], [128, 512]) == 'blocks'
  assert seen == [128, 256, 128, 512]


def test_norms_have_only_the_parameters_that_a_model_uses():
  both = flatten_params(abstract_model(dataclasses.replace(BASE, post_norm=True))[1])
  names = ('attention_norm', 'attention_post_norm', 'mlp_norm', 'mlp_post_norm')
  assert {f'layers/0/{name}/scale' for name in names} <= both.keys()
  after = dataclasses.replace(BASE, post_norm=True, pre_norm=False, norm='layer')
  paths = flatten_params(abstract_model(after)[1])
  assert 'layers/0/mlp_post_norm/bias' in paths and 'norm/bias' in paths
  assert not any('mlp_norm' in path or 'attention_norm' in path for path in paths)


def test_values_from_keys_are_the_keys_before_their_norm_and_rotation():
  """A projection of values with the weights of the keys gives the same."""
  fields = {'qk_norm': True, 'value_norm': True, 'qkv_bias': True}
  lm = model_of(BASE, **fields, values_from_keys=(True, True))
  plain = model_of(BASE, **fields)
  for layer, ours in lm.params['layers'].items():
    assert 'value' not in ours['attention'] and 'v_norm' not in ours['attention']
    plain.params['layers'][layer] = {
      **ours,
      'attention': {**ours['attention'], 'value': ours['attention']['key']},
    }
  others = {key: value for key, value in lm.params.items() if key != 'layers'}
  plain.params.update(others)
  np.testing.assert_array_equal(lm.logits(TOKENS), plain.logits(TOKENS))


def test_normed_values_have_a_mean_square_of_one():
  lm = model_of(BASE, value_norm=True, num_kv_heads=4)
  rows = PagedRows(lm)
  rows.prefill([(row, 0, 9) for row in range(B)])
  values = rows.values(0)[:9]
  np.testing.assert_allclose((values**2).mean(-1), 1.0, atol=1e-3)


@pytest.mark.parametrize('adapters', [False, True])
def test_training_never_changes_the_scalar_of_a_layer(adapters):
  """No gradient, no weight decay, and no rounding in the moving average."""
  lm = model_of(BASE, layer_scalar=True)
  for layer, value in enumerate((0.7, 1.1)):  # an average of 0.7 is rounded
    lm.params['layers'][layer]['scalar'] = jnp.float32(value)
  config = TrainConfig(
    learning_rate=0.1, warmup=0, weight_decay=0.5, ema=0.99, b1=0.9, b2=0.95, clip_norm=1.0,
    attention='blocks', lora_rank=2 if adapters else 0, lora_modules='attention',
  )  # fmt: skip
  trained = divide_model(lm.config, lm.params, config, lm.mesh)
  step = make_train_step(trained.graph, trained.params, config, 9, lm.mesh, trained.frozen)
  state = init_state(jax.tree.map(jnp.copy, trained.params), config, lm.mesh)
  state = dataclasses.replace(state, frozen=trained.frozen)
  tokens = np.asarray(TOKENS, np.int32)[:2]
  batch = {'tokens': tokens, 'positions': np.arange(T)[None].repeat(2, 0).astype(np.int32)}
  batch |= {'segment_ids': np.ones_like(tokens), 'loss_mask': np.ones_like(tokens)}
  for _ in range(5):
    state, metrics = step(state, place_batch(batch, batch_sharding(lm.mesh)))
  assert np.isfinite(metrics['loss'])
  before, averaged = flatten_params(lm.params), flatten_params(trained.full_params(state))
  plain = flatten_params(trained.full_params(dataclasses.replace(state, ema=None)))
  for path in ('layers/0/scalar', 'layers/1/scalar'):
    np.testing.assert_array_equal(plain[path], before[path])
    np.testing.assert_array_equal(averaged[path], before[path])
  kernel = 'layers/0/attention/query/kernel'
  assert np.abs(plain[kernel] - before[kernel]).max() > 1e-3


def test_norm_scales_start_at_one():
  config = dataclasses.replace(BASE, norm_offset=1.0, num_layers=1)
  params = init_params(config, jax.random.key(0))
  np.testing.assert_array_equal(params['norm']['scale'], 0.0)


def test_adapters_find_the_layers_of_a_model_without_a_gate():
  config = dataclasses.replace(BASE, gated=False, mlp_bias=True)
  paths = flatten_params(lora.abstract_model(config, lora.LoraConfig(2, 4.0, 'mlp'))[1])
  adapted = {path.split('/')[-3] for path in paths if 'adapter' in path}
  assert adapted == {'up', 'down'}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'norm': 'batch'}, r"norm='batch' must be one of \['rms', 'layer'\]"),
    ({'activation': 'swish'}, "activation='swish' must be one of"),
    ({'norm': 'layer', 'norm_offset': 1.0}, 'norm_offset is for'),
    ({'qk_norm_over_heads': True}, 'no effect without qk_norm'),
    ({'pre_norm': False}, 'at least one'),
    ({'attention_cap': 0.0}, 'attention_cap=0.0 must be positive'),
    ({'logit_cap': -1.0}, 'logit_cap=-1.0 must be positive'),
    ({'experts': Experts(4, 2, 8), 'gated': False}, 'Experts have a gate'),
    ({'head_dims': (8,)}, 'head_dims has 1 entries for 2 layers'),
    ({'kv_heads': (2, 3)}, 'num_heads=4 is not a multiple of num_kv_heads=3'),
    ({'head_dims': (8, 4), 'rope_channels': 6}, 'between 2 and head_dim=4'),
    ({'logit_divisor': 0.0}, 'logit_divisor=0.0 must be positive'),
  ],
)
def test_contradictions_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(BASE, **fields)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_every_activation_is_accepted(name):
  assert dataclasses.replace(BASE, activation=name).activation == name
