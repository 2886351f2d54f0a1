"""Results and chains of an experiment that the tests of its report share."""

import copy

from cai_jax import report

INJECTED = '<script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'


def _number(value, half, seeds=None):
  number = {'value': value, 'interval': [value - half, value + half]}
  return number | ({'by_seed': seeds} if seeds else {})


def _arm(response, rate, tokens, differences=None, overrides=None):
  harmful = {
    'count': 1200,
    'metrics': {
      'violation_rate': _number(rate, 0.02, {'0': rate + 0.01, '1': rate - 0.01}),
      'mean_tokens': _number(tokens, 1.5, {'0': tokens, '1': tokens}),
    },
  }
  helpful = {'count': 300, 'metrics': {'violation_rate': _number(0.05, 0.01)}}
  if differences:
    harmful['differences'] = differences
  return {
    'response': response,
    'overrides': overrides or {},
    'facts': {'coverage': 4.0},
    'groups': {'harmful': harmful, 'helpful': helpful},
  }


def _results(**changes):
  lower = {'violation_rate': _number(-0.33, 0.03), 'mean_tokens': _number(-2.0, 3.0)}
  higher = {'violation_rate': _number(-0.01, 0.01), 'mean_tokens': _number(6.0, 1.0)}
  arms = {
    'initial': _arm('initial', 0.87, 54.0),
    'revision 1': _arm('revision_1', 0.54, 52.0, lower, {'feedback.rounds': 1}),
    'revision 2': _arm('revision_2', 0.86, 60.0, higher, {'feedback.rounds': 2}),
  }
  names = list(arms)
  line = {'name': 'breaks a rule', 'metric': 'violation_rate', 'arms': list(names), 'x': [0, 1, 2]}
  cost = {'run': 'r', 'seed': 0, 'stage': 'generate', 'turns': 5600, 'reused_turns': 700}
  cost |= {'tokens': 100_000, 'seconds': 13.25, 'peak_memory_bytes': 2**30}
  return {
    'name': 'revisions',
    'title': 'Does every further revision help?',
    'docstring': 'First paragraph.\n\nSecond paragraph,\n  indented.\n',
    'base': 'configs/tiny.py',
    'seeds': [0, 1],
    'reference': 'initial',
    'metrics': ['violation_rate', 'mean_tokens'],
    'arms': arms,
    'figures': [
      {'kind': 'line', 'caption': 'By round', 'group': 'harmful', 'series': [line]}
      | {'x_label': 'revisions', 'y_label': 'share of responses (%)'},
      {'kind': 'arms', 'caption': 'All arms', 'group': 'harmful', 'arms': list(names)}
      | {'metrics': ['violation_rate', 'mean_tokens']},
      {'kind': 'frontier', 'caption': 'Both', 'arms': list(names)}
      | {'x': ['harmful', 'violation_rate'], 'y': ['harmful', 'mean_tokens']},
    ],
    'config_differences': {'feedback.rounds': {'revision 1': 1, 'revision 2': 2}},
    'costs': [cost, cost | {'seed': 1, 'peak_memory_bytes': 2**31}, cost | {'stage': 'train'}],
    'notes': ['7 of 10 were mended by the first revision.'],
  } | changes


def _chain(i, arm='initial', before='Water it. You fool. Then rest.', after='Water it. Then rest.'):
  return {
    'id': f'p{i}',
    'arm': arm,
    'prompt': [{'role': 'user', 'content': f'How do I water fern {i}?'}],
    'initial': {'text': before, 'finish_reason': 'stop', 'logprob': -3.25, 'num_tokens': 7},
    'rounds': [
      {
        'principle': f'rule-{i % 3}',
        'critique': {'text': 'It says: You fool.'},
        'revision': {'text': after},
      }
    ],
    'violations': [['insult'], []],
  }


def _write(path, chains=(), **changes):
  report.write_experiment(path, _results(**changes), list(chains))
  return path.read_text('utf-8')


def _hostile():
  results = _results(title=INJECTED, docstring=f'{INJECTED}\n\n{INJECTED}', notes=[INJECTED])
  results['arms'][INJECTED] = copy.deepcopy(results['arms']['revision 1'])
  results['arms'][INJECTED]['facts'] = {INJECTED: INJECTED}
  results['config_differences'] = {INJECTED: {INJECTED: INJECTED}}
  results['costs'] = [{'run': INJECTED, 'seed': INJECTED, 'stage': INJECTED, 'turns': 1}]
  for figure in results['figures'][1:]:
    figure['arms'].append(INJECTED)
  return results
