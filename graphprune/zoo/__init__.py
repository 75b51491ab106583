"""The zoo: many public models, each taken through capture, analysis, cut, proof and export; one row per model.

models.py  which models there are, and how to build each small
timm_table.py, timm_table.json  one model of every file of timm.models, and how it was chosen
row.py     one model -> one row
suite.py   many models -> rows, in processes of their own, written down as they come
table.py   rows -> Markdown
"""

from graphprune.zoo.models import SUITES, ZooModel, select, timm_models, torchvision_models
from graphprune.zoo.row import Job, Row, run_model
from graphprune.zoo.suite import load_rows, run_suite
from graphprune.zoo.table import to_markdown

__all__ = [
    "SUITES",
    "Job",
    "Row",
    "ZooModel",
    "load_rows",
    "run_model",
    "run_suite",
    "select",
    "timm_models",
    "to_markdown",
    "torchvision_models",
]
