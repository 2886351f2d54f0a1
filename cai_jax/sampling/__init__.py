"""Sample replies from language models, in memory or behind a server.

- `types`: what a caller asks for and gets back (`SamplingConfig`, `Turn`, `Completion`, `Chain`).
- `completions`: `cai_jax.generate`, one reply per prompt.
- `engine`: runs many chains of turns at once; `config` holds its settings, `auto` what
  replaces `'auto'` in them, `stats` its counters. `active` is the state of a run.
- `planning`: the turns and the longest contexts of chains, without a model.
- `slots`: the host side of a model in memory: cache contents, prefill and decode scheduling.
- `device`: the compiled prefill and decode programs; `caches` sizes and allocates their caches.
- `sample`: draws a token from logits. To add a filter or a penalty, start in this module. `noise`
  is its randomness, `filters` finds what top-k and top-p keep, `blocks` cuts the vocabulary.
- `prefixes`: token prefixes that many contexts share.
- `text`: decodes tokens and finds stop texts.
- `journal`: finished turns on disk.
- `remote`: models behind an OpenAI-compatible server.
"""
