"""`python -m benchmarks.faults --minutes M --seed S`: what a cluster, a hostile file or a tired person does
to a run, done to it; counts of what was tried and of what was lost.

    toy.py       a tiny policy, a reward model and data: the world of the trials
    process.py   a command in a forked process, and wires that kill it or fail its writes at the n-th change
    runs.py      kill -9, signals, two at once, closed pipes, full and read-only disks
    files.py     damaged and hostile files
    answers.py   what verifiers are given
    ops.py       random calls of the ops, under sanitizers where they are built (sanitized.py)

A trial is decided by its kind, the seed and its number, and ends in None or in a sentence that says what was
lost; one that had nothing to do (the command had ended before it could be killed) is counted apart. Only the
moment of a kill by the clock is the machine's.
"""
