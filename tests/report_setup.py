"""A run with hostile texts, as the tests of its report write it."""

from cai_jax import report
from configs import default

HOSTILE = (
  '</script><script>document.title = "owned"</script>'
  '<img src=x onerror="document.title=\'owned\'"> ]]> <!-- <script> '
  '\u2028 \u2029 @@title@@ \ud83d &lt;'
)
RATES = {
  'violation_rate': 0.873,
  'violation_rate_interval': [0.8375, 0.9],
  'helpful_rate': 0.998,
  'mean_tokens': 54.25,
  'count': 1400,
}
SUMMARY = {
  'stages': {
    'initial': RATES,
    'revision_10': RATES | {'violation_rate': 0.107, 'violation_rate_interval': [0.05, 0.2]},
    'revision_2': RATES | {'violation_rate': 0.517, 'violation_rate_interval': [0.5, 0.6]},
  },
  'models': {'aligned': RATES | {'violation_rate': 0.0753}, 'base': RATES},
  'benign': {'base': {'violation_rate': 0.0, 'helpful_rate': 1.0, 'mean_tokens': 9.0, 'count': 3}},
}
TRAINING = [
  {'step': i, 'loss': 50.0 / i, 'learning_rate': 1e-3, 'grad_norm': 1.0} for i in range(1, 101)
]
MANIFEST = {
  'started': '2030-01-02T03:04:05Z',
  'versions': {'jax': '0.10'},
  'stages': {
    'generate': {
      'rows_in': 1234,
      'rows_kept': 1230,
      'rows_dropped': {'too <long>': 3, 'empty': 1},
      'seconds': 12.5,
      'tokens_per_second': 2048.4,
      'journal_hits': 17,
      'settings': {'seed': 5, 'feedback': {'rounds': 4}},
      'git_commit': 'abc',
    },
    'evaluate': {'aligned': {'rows': 600, 'mean_tokens': 54.2}},
  },
}


def _response(text, **more):
  return {'text': text, 'finish_reason': 'stop', 'logprob': -3.25, 'num_tokens': 7} | more


def _chain(i, before='Water it. You fool. Then rest.', after='Water it. Then rest.', **more):
  return {
    'id': f'p{i}',
    'prompt': [{'role': 'user', 'content': f'How do I water fern {i}?'}],
    'initial': _response(before),
    'rounds': [
      {
        'principle': f'rule-{i % 3}',
        'critique': _response('It says: You fool.'),
        'revision': _response(after),
      }
    ],
  } | more


def _write(path, **changes):
  arguments = {
    'title': 'A run',
    'config': default.get_config().to_dict() | {'seed': 5},
    'manifest': MANIFEST,
    'summary': SUMMARY,
    'training': TRAINING,
    'chains': [_chain(0)],
  }
  report.write_report(path, **(arguments | changes))
  return path.read_text('utf-8')
