"""What the post published, one row a quantity: which numbers of which analysis measure it here, and what it says.

Source: the post, and the author's code where the post leaves a number implicit.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.analysis.display import Unit

Rule = Literal["run", "shape"]


@dataclass(frozen=True)
class RunFacts:
    """What decides whether a run compares with the post.

    Attributes:
        model: the language model's name.
        hook_name: the autoencoder's site.
        d_in: width of the activations.
        d_sae: number of features.
        train_tokens: activations that the autoencoder was trained on, repeats included.
    """

    model: str
    hook_name: str
    d_in: int
    d_sae: int
    train_tokens: int


POST = RunFacts("gelu-1l", "blocks.0.mlp.hook_post", 2048, 16384, 2_000_000_000)
"""The post's run."""
POST_RANK = 512
"""Rank of its W_out."""


@dataclass(frozen=True)
class Part:
    """One number of a published quantity.

    Attributes:
        key: of the analysis' numbers.
        unit: how it is shown.
        form: text around it.
    """

    key: str
    unit: Unit = "plain"
    form: str = "{}"


@dataclass(frozen=True)
class Published:
    """One row of the post's findings.

    Attributes:
        quantity: what was measured.
        analysis: which analysis measures it here.
        parts: its numbers here.
        post: what the post says.
        source: where it says so.
        rule: what has to agree for the two to compare.
    """

    quantity: str
    analysis: str
    parts: tuple[Part, ...]
    post: str
    source: str
    rule: Rule = "run"


_RARE = "Ultra Low Frequency Features"
PUBLISHED = (
    Published(
        "Loss recovered by the reconstruction (0 = zero ablation)",
        "loss_recovered",
        (Part("loss_recovered", "fraction"),),
        "92 %",
        "Implementation Details",
    ),
    Published(
        "Loss recovered without ultra-low features",
        "loss_recovered",
        (Part("loss_recovered_without_ultra_low", "fraction"),),
        "91 %",
        _RARE,
    ),
    Published(
        "Loss recovered by mean ablation",
        "loss_recovered",
        (Part("mean_ablation_recovered", "fraction"),),
        "25 %",
        "Implementation Details",
    ),
    Published(
        "Ultra-low features, density < 1e-4",
        "density",
        (Part("ultra_low_fraction", "fraction"),),
        "about 60 %",
        _RARE,
    ),
    Published(
        "Two modes in log density (Ashman’s D, above 2: two)",
        "density",
        (Part("ashman_d", "plain", "D {}"), Part("lower_mode_weight", "fraction", ", lower mode {}")),
        "“clearly bimodal”",
        _RARE,
    ),
    Published("Dead features", "density", (Part("dead_fraction", "fraction"),), "none", "TLDR"),
    Published(
        "Ultra-low encoders within cosine 0.95 of their mean",
        "rare_cluster",
        (Part("aligned_fraction", "fraction"),),
        "97.5 %",
        _RARE,
    ),
    Published(
        "Two modes in the projection of ultra-low encoders on their mean",
        "rare_cluster",
        (
            Part("projection_ashman_d", "plain", "D {}"),
            Part("projection_smaller_mode", "fraction", ", smaller mode {}"),
        ),
        "“bimodal”",
        _RARE,
    ),
    Published(
        "Ultra-low features firing together on one token, at most",
        "rare_cluster",
        (Part("cofiring_max", "fraction"),),
        "95 %",
        _RARE,
    ),
    Published(
        "Ultra-low decoders along one direction",
        "rare_cluster",
        (Part("decoder_top_share", "fraction"),),
        "“very little”",
        _RARE,
    ),
    Published(
        "Rare direction’s ten largest neurons",
        "rare_direction",
        (Part("fve_top_10", "fraction"),),
        "“not sparse in the neuron basis”",
        _RARE,
    ),
    Published(
        "Rare direction’s logits over the vocabulary",
        "rare_direction",
        (
            Part("logit_kurtosis", "plain", "kurtosis {}"),
            Part("space_correlation", "plain", ", correlation with “begins with a space” {}"),
        ),
        "“aren’t sparse”, “correlates”",
        _RARE,
    ),
    Published(
        "Rare direction’s cosine with the mean activation, largest with a singular vector; correlation with the norm",
        "rare_direction",
        (Part("cosine_mean"), Part("cosine_singular", "plain", ", {}"), Part("norm_correlation", "plain", "; {}")),
        "“nothing to do with”",
        _RARE,
    ),
    Published(
        "Rare direction’s largest projections: share that the median edit of the text leaves",
        "rare_direction",
        (Part("edit_share_left", "fraction"),),
        "“drops”",
        _RARE,
    ),
    Published(
        "Mean ultra-low encoder directions of two seeds, cosine",
        "cross_seed",
        (Part("direction_cosine"),),
        "0.96",
        _RARE,
    ),
    Published(
        "Encoder kept orthogonal to the ultra-low direction: ultra-low features, median cosine with their mean",
        "orthogonal_rerun",
        (
            Part("rare_fraction", "fraction"),
            Part("cosine_median", "plain", ", cosine with their own {}"),
            Part("direction_cosine", "plain", ", with the old {}"),
        ),
        "a cluster again, along “a different direction”",
        _RARE,
    ),
    Published(
        "Decoders dense, 1-sparse, 10-ish-sparse",
        "neuron_sparsity",
        (
            Part("dense_fraction", "fraction"),
            Part("one_sparse_fraction", "fraction", ", {}"),
            Part("ten_sparse_fraction", "fraction", ", {}"),
        ),
        "92.1 %, 3.9 %, 4.0 %",
        "Exploring Neuron Sparsity",
    ),
    Published(
        "Kurtosis of decoders in the neuron basis",
        "kurtosis",
        (
            Part("decoder_median", "plain", "median {}"),
            Part("decoder_max", "plain", ", largest {}"),
            Part("decoder_above_random", "fraction", "; {} above every random row"),
        ),
        "far above 0 for nearly all, largest 1700",
        "Exploring Neuron Sparsity",
    ),
    Published(
        "Cosine of encoder and decoder, frequent features",
        "enc_dec",
        (
            Part("cosine_median_frequent", "plain", "median {}"),
            Part("lower_mode", "plain", ", modes {}"),
            Part("upper_mode", "plain", " and {}"),
        ),
        "median 0.5, modes 0.5 and 0.75",
        "Should encoder and decoder weights be tied?",
    ),
    Published(
        "Cosine of distinct frequent decoders",
        "geometry",
        (Part("cosine_mean", "plain", "mean {}"), Part("cosine_variance", "plain", ", variance {}")),
        "mean 0.0026, variance 0.002",
        "comment",
    ),
    Published(
        "… without neuron-sparse features",
        "geometry",
        (Part("cosine_mean_dense", "plain", "mean {}"), Part("cosine_variance_dense", "plain", ", variance {}")),
        "“persists”",
        "comment",
    ),
    Published(
        "… of random directions",
        "geometry",
        (Part("random_mean", "plain", "mean {}"), Part("random_variance", "plain", ", variance {}")),
        "mean 0, variance 0.0005",
        "comment",
        "shape",
    ),
    Published(
        "Encoder bias and D/E projection, medians",
        "bias_density",
        (
            Part("bias_median_frequent", "plain", "frequent {}"),
            Part("projection_median_frequent", "plain", " and {}"),
            Part("bias_median_rare", "plain", "; ultra-low {}"),
            Part("projection_median_rare", "plain", " and {}"),
        ),
        "frequent: projections near 1; ultra-low: biases not larger, projections around 0",
        "comment",
    ),
    Published(
        "Encoder and decoder in the null space of W_out, frequent features",
        "null_space",
        (
            Part("encoder_mean_frequent", "fraction", "mean {}"),
            Part("encoder_std_frequent", "plain", ", std {}"),
            Part("decoder_mean_frequent", "fraction", "; mean {}"),
            Part("decoder_std_frequent", "plain", ", std {}"),
        ),
        "wider than random",
        "Should we train autoencoders on the MLP output?",
    ),
    Published(
        "Random direction in the null space of W_out",
        "null_space",
        (Part("random_mean_theory", "fraction", "mean {}"), Part("random_std_theory", "plain", ", std {}")),
        "mean 75 %, std 0.013",
        "Should we train autoencoders on the MLP output?",
        "shape",
    ),
    Published(
        "Features of density < 1e-5 in training",
        "training_dynamics",
        (
            Part("below_1e-5_peak", "fraction", "at most {}"),
            Part("below_1e-5_peak_tokens", "count", ", after {} tokens"),
            Part("below_1e-5_final", "fraction", "; {} at the end"),
        ),
        "reset every 120M tokens; from about 1.6B they drift past 1e-5",
        _RARE,
    ),
)
"""What the post says, in the order of the headline table."""
POST_TRAINING = "2B in about 12 h on one A6000"
"""A run's own time stands in no report, which is the same bytes however fast the run was."""
