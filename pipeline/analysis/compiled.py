"""A survey's inner loop, compiled by numba to native code that runs without Python's lock; cached on disk."""

# numba compiles these from the types that it is called with: annotations would be read by nobody, checked by nothing.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false

import numba
import numpy as np

from pipeline.analysis.survey import BINS_AN_OCTAVE, N_BINS, SMALLEST_OCTAVE

_FIRST_BIN = BINS_AN_OCTAVE * (127 + SMALLEST_OCTAVE)
_BIN_SHIFT = 23 - 2  # the exponent and the two leading bits of a float32's fraction

compiled = numba.njit(cache=True, nogil=True)


@compiled
def _hash(number):
    """SplitMix64's output function: a bijection of 64-bit numbers that passes for random."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


@compiled
def _is_larger(act, prompt, position, other, where):
    """Whether a firing comes before another: larger, or equal and of an earlier prompt, then position."""
    if act != other:
        return act > other
    return (prompt, position) < (where[0], where[1])


@compiled
def _keep_if_large(acts, where, act, prompt, position):
    """Puts a firing in its place among the largest ones of a feature, if it is one."""
    place = acts.shape[0]
    while place > 0 and _is_larger(act, prompt, position, acts[place - 1], where[place - 1]):
        place -= 1
        if place + 1 < acts.shape[0]:
            acts[place + 1] = acts[place]
            where[place + 1] = where[place]
    if place < acts.shape[0]:
        acts[place] = act
        where[place, 0], where[place, 1] = prompt, position


@compiled
def take(active, prompt, position, state):
    """Takes rows in; see ``SurveyState.take``."""
    pointer, feature, activation = active
    n_features = np.uint64(state.counts.shape[0])
    for t in range(prompt.shape[0]):
        state.l0_histogram[pointer[t + 1] - pointer[t]] += 1
        first = np.uint64(state.rows[0] + t + 1) * n_features
        for k in range(pointer[t], pointer[t + 1]):
            i, act = feature[k], activation[k]
            seen = state.counts[i]
            state.counts[i] = seen + 1
            state.total[i] += act
            bits = np.int64(np.float32(act).view(np.uint32) >> np.uint32(_BIN_SHIFT))
            state.histogram[i, min(max(bits - _FIRST_BIN, 0), N_BINS - 1)] += 1
            _keep_if_large(state.top_act[i], state.top_where[i], act, prompt[t], position[t])
            if seen < state.seldom_act.shape[1]:
                state.seldom_act[i, seen] = act
                state.seldom_where[i, seen, 0], state.seldom_where[i, seen, 1] = prompt[t], position[t]
            priority, last = _hash(first + np.uint64(i)), state.sample_last[i]
            if priority < state.sample_hash[i, last]:
                state.sample_hash[i, last], state.sample_act[i, last] = priority, act
                state.sample_where[i, last, 0], state.sample_where[i, last, 1] = prompt[t], position[t]
                state.sample_last[i] = np.argmax(state.sample_hash[i])
    state.rows[0] += prompt.shape[0]
