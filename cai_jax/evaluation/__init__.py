"""Measures over a run's responses and models, and their statistics.

- `config`: the settings that select measures.
- `registries`: how a measure is registered. `measures` has the built-in ones, one file each.
- `suite`: runs the measures that a config asks for.
- `summary`: averages measures of responses over the held-out prompts of a run.
- `intervals`, `estimates`, `ratings`, `diversity`: statistics.
- `questions`: reads multiple-choice questions.
"""
