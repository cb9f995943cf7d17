"""Where a run keeps its files; see `Run`."""

from typing import Final

EXPERIMENT_FILE: Final = "experiment.json"
PROMPTS_FOLDER: Final = "prompts"
EVALUATION_FOLDER: Final = "evaluation"
OUTSIDE_FOLDER: Final = "outside"
# In the folder of an evaluation.
ANSWERS_FOLDER: Final = "answers"
RESULTS_FILE: Final = "results.json"
TABLES_FILE: Final = "results.md"
