"""Counters of an engine, and their description as text."""

import dataclasses
from collections.abc import Mapping

import jax


@dataclasses.dataclass
class Stats:
  """Counts and seconds of an engine, summed over its models.

  Attributes:
    slots: number of slots.
    most_slots: number of slots that the config asks for.
    chains: finished chains.
    turns: sampled turns.
    replayed_turns: turns read from the journal.
    sampled_tokens: tokens of the sampled turns.
    prefilled_tokens: context tokens that were prefilled.
    prefix_tokens: tokens of the shared prefixes, each prefilled once.
    shared_tokens: context tokens that a shared prefix already covered.
    reused_tokens: context tokens that the slot's own cache already held.
    decode_steps: decode steps.
    occupied: active slots, summed over decode steps.
    slot_steps: rows of the programs, summed over decode steps.
    draft_steps: active slots, summed over decode steps with drafts.
    draft_tokens: tokens that those sampled.
    compilations: XLA compilations.
    prefill_seconds: time that the host waited for programs that prefill, including compilation. On
      CPUs, most of them also decode.
    decode_seconds: time that the host waited for all other programs, including compilation.
    remote_seconds: time that the host waited for servers with nothing else to do.
    seconds: total time.
  """

  slots: int = 0
  most_slots: int = 0
  chains: int = 0
  turns: int = 0
  replayed_turns: int = 0
  sampled_tokens: int = 0
  prefilled_tokens: int = 0
  prefix_tokens: int = 0
  shared_tokens: int = 0
  reused_tokens: int = 0
  decode_steps: int = 0
  occupied: int = 0
  slot_steps: int = 0
  draft_steps: int = 0
  draft_tokens: int = 0
  compilations: int = 0
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  remote_seconds: float = 0.0
  seconds: float = 0.0

  def summary(self) -> dict[str, float]:
    """Return all counters, plus `host_seconds`, `tokens_per_second` and `occupancy`."""
    waited = self.prefill_seconds + self.decode_seconds + self.remote_seconds
    return dataclasses.asdict(self) | {
      'host_seconds': self.seconds - waited,
      'tokens_per_second': self.sampled_tokens / max(self.seconds, 1e-9),
      'occupancy': self.occupied / max(self.slot_steps, 1),
    }


def describe(summary: Mapping[str, float]) -> str:
  """Return a `Stats.summary()` as a few lines of text."""
  s = summary
  waits = [f'{s[f"{kind}_seconds"]:.1f} s {kind}' for kind in ('prefill', 'decode', 'host')]
  if s['remote_seconds']:
    waits.append(f'{s["remote_seconds"]:.1f} s remote servers')
  slots = f'{s["slots"]} slots'
  if s['slots'] < s['most_slots']:
    slots += f' of {s["most_slots"]} (limited by engine.cache_gib)'
  drafts = ''
  if steps := s.get('draft_steps'):
    drafts = f'\n  drafts: {s["draft_tokens"] / steps:.2f} tokens per slot and step'
  return (
    f'  {s["turns"]:,} turns sampled, {s["replayed_turns"]:,} from the journal; '
    f'{s["sampled_tokens"]:,} tokens at {s["tokens_per_second"]:,.0f} tokens/s\n'
    f'  context tokens: {s["prefilled_tokens"]:,} prefilled, {s["reused_tokens"]:,} reused, '
    f'{s["shared_tokens"]:,} in a shared prefix\n'
    f'  {slots}, {100 * s["occupancy"]:.0f} % occupied; {", ".join(waits)}; '
    f'{s["compilations"]} compilations{drafts}'
  )


@dataclasses.dataclass
class CompilationCounter:
  """A `jax.monitoring` listener for the programs that XLA compiles in this process.

  Attributes:
    count: number of programs.
    seconds: time that XLA took for them.
  """

  count: int = 0
  seconds: float = 0.0

  def __call__(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      self.count += 1
      self.seconds += duration_secs


COMPILATIONS = CompilationCounter()
jax.monitoring.register_event_duration_secs_listener(COMPILATIONS)
