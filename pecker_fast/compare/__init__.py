"""Every method on the same work: what `pecker-fast compare` runs, measures and prints.

``harness.py`` is the whole. ``methods.py`` says what is compared, ``task.py`` on what, ``plan.py`` which runs that
makes; ``contestants.py`` makes what trains, ``one_run.py`` trains it, ``judging.py`` judges it; ``tuning.py`` chooses
learning rates, ``timing.py`` measures steps, ``diagnostics.py`` looks at gradients, ``store.py`` keeps
the lines; ``statistics.py``, ``tables.py``, ``figures.py`` and ``page.py`` say what came out.
"""
