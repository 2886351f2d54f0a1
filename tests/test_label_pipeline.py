"""Stage `label` of a run: its files, and what a second start asks."""

import json
import shutil

from cai_jax import pipeline
from cai_jax.scoring.judge import JUDGES
from cai_jax.tiny.judge import judge_with_oracle, make_labelled
from tests.label_setup import write_lines
from tests.pipeline_setup import set_fields, small


def test_a_judge_of_a_run_is_asked_nothing_twice(random_model, tmp_path, restored_registries):
  asked = []

  def judge(matches):
    asked.extend(match.responses for match in matches)
    return judge_with_oracle(matches)

  JUDGES.register('counting')(lambda loader: judge)
  rows = [{'id': str(i), **row} for i, row in enumerate(make_labelled(6))]
  given, workdir = write_lines(tmp_path / 'pairs.jsonl', rows), tmp_path / 'run'
  config = small(random_model)
  set_fields(
    label__comparisons=(given,), label__model='counting', model__aligned=str(random_model)
  )(config)
  pipeline.run_stages(pipeline.build(config, workdir), ['label'])
  manifest = json.loads((workdir / 'manifest.json').read_text())
  assert manifest['stages']['label']['accuracy'][given]['right'] == 6 == len(asked)
  labels = (workdir / 'labels' / 'comparisons.jsonl').read_bytes()
  assert labels.count(b'\n') == 6
  # As if the run had been killed at the end of the stage.
  shutil.rmtree(workdir / 'labels')
  del manifest['stages']['label']
  (workdir / 'manifest.json').write_text(json.dumps(manifest))
  pipeline.run_stages(pipeline.build(config, workdir), ['label'])
  assert (workdir / 'labels' / 'comparisons.jsonl').read_bytes() == labels and len(asked) == 6
