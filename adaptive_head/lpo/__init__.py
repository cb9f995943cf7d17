"""Training a head by Latent Preference Optimization (arXiv 2411.09661), and evaluating it."""

from adaptive_head.lpo.experiment import Experiment, read_experiment
from adaptive_head.lpo.records import DataError, Pair, Prompt, Response, Side, Span
from adaptive_head.lpo.run import Run

__all__ = [
    "DataError",
    "Experiment",
    "Pair",
    "Prompt",
    "Response",
    "Run",
    "Side",
    "Span",
    "read_experiment",
]
