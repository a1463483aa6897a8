import re

import pytest

from pipeline.planning.held_out import ENOUGH_PROMPTS, few_held_out


def test_enough_prompts_need_no_word():
    assert few_held_out(ENOUGH_PROMPTS) is None
    assert few_held_out(10 * ENOUGH_PROMPTS) is None


@pytest.mark.parametrize(("prompts", "points"), [(99, 0.4), (36, 0.6), (9, 1.2), (1, 3.6), (0, 3.6)])
def test_few_are_named_with_the_error_that_they_leave(prompts: int, points: float):
    told = few_held_out(prompts) or ""
    assert told.startswith(f"few held-out prompts: {prompts}.")
    assert float(re.findall(r"some ([\d.]+) points", told)[0]) == points
