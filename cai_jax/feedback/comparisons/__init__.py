"""AI feedback: a model compares responses under a principle (Bai et al. 2022, section 4.1).

- `config`: `LabelConfig`, the section `label` of the config.
- `pairing`: which of several responses to a prompt are compared.
- `labelling`: `check_label(models, prompts, constitution, config, sampling, feedback, seed, ...)`
  returns a checked `LabelJob`, and `label(job, folder, journal, engine, progress)` samples it,
  writes `comparisons.jsonl` and `summary.json` into a folder, and returns the summary.
"""
