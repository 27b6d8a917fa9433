"""The paper's experiments, a room for each concern.

    data/        images as arrays: where they are found, how they are checked, what is drawn of them
    models/      nets, and the pure functions made from them
    training/    one run: its configuration, its compiled steps, its folder, its interruptions
    paper/       the paper's figures, and the comparison of many runs
    theory/      the SDE and the local complexities, measured
    noise_study/ gradient noise along training, measured

`commands` and `__main__` are the command line. `figures`, `records`, `tables`, `terminal` and
`_typing` are shared: they stand on nothing of ours, and every room may use them. A room's face,
its `__init__`, hands out what others use of it; which room may use which other stands in
CONTRIBUTING.md.
"""
