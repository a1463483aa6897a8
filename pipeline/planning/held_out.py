"""Whether the held-out prompts are enough to measure an autoencoder on, and what it costs where they are few.

Loss recovered is a ratio of means over prompts, so its standard error falls with the square root of their number. The
demo's 400 prompts give an interval of 94.4 to 95.1 %: 3.6 points over the root of the number. Other models and sites
differ, so the figure is of the size, no more; each report has its own interval.
"""

ENOUGH_PROMPTS = 100
"""From here on nothing is said."""
_POINTS_OF_ONE_PROMPT = 3.6


def few_held_out(n_prompts: int) -> str | None:
    """A warning where the held-out prompts are fewer than :data:`ENOUGH_PROMPTS`, else None."""
    if n_prompts >= ENOUGH_PROMPTS:
        return None
    error = _POINTS_OF_ONE_PROMPT / max(n_prompts, 1) ** 0.5
    return (
        f"few held-out prompts: {n_prompts:,}. Loss recovered and cross-entropies are measured on them, with a "
        f"standard error of some {error:.1f} points of loss recovered (the demo's 400 prompts: 0.2); a larger "
        f"tokenize.held_out_tokens, or more documents, makes it {ENOUGH_PROMPTS} or more"
    )
