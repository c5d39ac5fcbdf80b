"""The stages that the commands run, a file for each: all that the program knows of it.

Such a file says, for a run's folder and for its page,

    STAGE               its name in a run: of its folder, its checkpoints and its metrics
    TITLE, ROWS         its name in a heading, and what its rows are
    CURVES              the figures of its page and of curves.png, and what is healthy in them
    headline(run)       a sentence on what it reached, findings(run) what there is to look at;
                        both may be left out
    CONFIG              the class of its options
    MEASURED            what it measures on held-out rows, and whether "higher" or "lower" is better
    MONITORS            whether it also reports rewards beside the one that it is trained on
    WRITES              the files that a run has from this stage only
    trained_before(..)  the stages that its command trains first, where no model is given for them;
                        it may be left out

and then has its preflight, ``checks``, and ``run``, which a command calls. Nothing lists the
files: whoever puts another one here has another stage.
"""
