"""Near-duplicate prompts and splits that keep them on one side."""

import contextlib
import json
import types

import numpy as np
from ml_collections import ConfigDict

from cai_jax.data.examples import hold_out
from cai_jax.data.near_duplicates import find_near_duplicates, group_prompts
from cai_jax.data.prompt_sources import PromptSource
from cai_jax.data.units import Example
from cai_jax.pipeline import stage_generate
from cai_jax.pipeline.prompt_sets import load_prompt_sets
from cai_jax.pipeline.run import build
from cai_jax.pipeline.sections import PromptSets

LONG = 'please explain to me in a few short words how one opens the old lock of my garden door'


def chat(*texts):
  roles = ('user', 'assistant')
  return [{'role': roles[i % 2], 'content': text} for i, text in enumerate(texts)]


def test_near_duplicates_and_equal_openings_are_grouped():
  prompts = [
    chat(LONG),
    chat('How do I bake bread at home?'),
    chat(LONG.upper() + ' today!'),
    chat('how do i bake bread, at home?', 'With flour.', 'And without flour, what then?'),
    chat('Hi there', 'Hello.', 'Where is Rome?'),
    chat('Hi there', 'Hello.', 'Who wrote the Iliad?'),
  ]
  assert group_prompts(prompts) == [0, 1, 0, 1, 4, 5]
  assert find_near_duplicates(prompts[2:], prompts[:2]) == {0: 0, 1: 1}


def test_the_search_finds_what_comparing_all_pairs_finds():
  rng = np.random.default_rng(0)
  texts = [list(rng.choice(list('abcdefghijklmnopqrst'), 30)) for _ in range(40)]
  for text in texts[:20]:
    copy = list(text)
    copy[int(rng.integers(30))] = 'z'
    texts.append(copy)
  triples = [{tuple(t[k : k + 3]) for k in range(28)} for t in texts]
  expected = list(range(60))
  for j in range(60):
    for i in range(j):
      if len(triples[i] & triples[j]) >= 0.8 * len(triples[i] | triples[j]):
        expected[j] = expected[i]
        break
  assert group_prompts([chat(' '.join(t)) for t in texts]) == expected
  assert expected != list(range(60))


def test_training_prompts_that_nearly_equal_held_out_ones_are_left_out(tmp_path, capsys):
  sources = {}
  texts = {'harmful': [LONG, 'Who are you?'], 'eval_harmful': [LONG + ' today']}
  for name, prompts in texts.items():
    path = tmp_path / f'{name}.jsonl'
    path.write_text(''.join(json.dumps({'prompt': text}) + '\n' for text in prompts))
    sources[name] = PromptSource(source=str(path))
  sets, left_out, _ = load_prompt_sets(PromptSets(**sources), seed=0)
  assert [p.messages[-1]['content'] for p in sets['harmful']] == ['Who are you?']
  assert left_out == {'harmful': 1, 'helpful': 0}
  assert '1 of 2 prompts are left out' in capsys.readouterr().out


def test_the_manifest_counts_the_prompts_that_were_left_out(tmp_path, monkeypatch):
  """Sampling is replaced, so that only what the stage reports is tested."""
  config = ConfigDict({'model': {'base': 'tiny'}, 'prompts': {}})
  for name, texts in {'harmful': [LONG, 'Who?'], 'eval_harmful': [LONG + ' today']}.items():
    path = tmp_path / f'{name}.jsonl'
    path.write_text(''.join(json.dumps({'prompt': text}) + '\n' for text in texts))
    config.prompts[name] = {'source': str(path)}
  both = tmp_path / 'both.jsonl'
  both.write_text('{"prompt": "Who?"}\n{"prompt": "Why?"}\n')
  config.prompts.helpful = {'mixture': (str(both),)}
  run = build(config, tmp_path / 'run')
  counts = {'rows': 1, 'sampled_tokens': 9}
  monkeypatch.setattr(stage_generate, 'open_models', lambda run: contextlib.nullcontext())
  job = types.SimpleNamespace(sampled_models={})
  monkeypatch.setattr(stage_generate, 'prepare_job', lambda *args: job)
  for name in ('score_topics', 'measure_quality', 'keep_limits'):
    monkeypatch.setattr(stage_generate, name, lambda *args: None)
  monkeypatch.setattr(stage_generate, 'sample_dataset', lambda *args: dict(counts))
  monkeypatch.setattr(stage_generate, '_write_preferences', lambda run: {})
  monkeypatch.setattr(stage_generate.d_cai, 'content_digest', lambda folder: '')
  entry = stage_generate.generate_d_cai(run, {})
  assert entry['near_duplicates_left_out'] == {'harmful': 1, 'helpful': 0}
  assert entry['repeats_left_out'] == {'helpful': 1, 'eval_helpful': 0}


def test_the_internal_split_keeps_groups_on_one_side():
  examples = [Example(np.zeros(1), np.ones(1, bool), f'r{i}') for i in range(60)]
  groups = {f'r{i}': i // 2 for i in range(60)}
  kept, held_out = hold_out(examples, 0.2, 0, groups)
  sides = [{groups[e.id] for e in side} for side in (kept, held_out)]
  assert not sides[0] & sides[1] and len(held_out) == 12
  own = {f'r{i}': i for i in range(60)}
  assert hold_out(examples, 0.2, 0, own)[1] == hold_out(examples, 0.2, 0)[1]
