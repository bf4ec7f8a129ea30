"""Sweeps: many trials of a recipe in one folder, each of them an ordinary run, shared among any number of workers.

    sweep.json                the plan: recipes, words, search
    loss.weight=2,seed=1/     the run of a trial, named by its values
    .trials/0001.json         a trial: its words, and how it ended
    .trials/0001.lock         held by the worker that is at it
    .trials/recipes/0/        a recipe of the plan as it was when the plan was made

Nothing else is kept: what is done, what a search has seen and what is to be done next are read from these files, so
that a worker may be killed at any moment, and another one goes on with its trial where it was.
"""

from robustkit.sweep.folder import Search, Sweep, Trial, make_sweep, open_sweep, with_sweeps
from robustkit.sweep.worker import take_up_again, work

__all__ = ["Search", "Sweep", "Trial", "make_sweep", "open_sweep", "take_up_again", "with_sweeps", "work"]
