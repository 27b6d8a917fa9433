"""The paper's experiments, with one folder ("room") per concern.

    data/        images as arrays: finding them, checking them, and drawing examples from them
    models/      nets, and the pure functions made from them
    training/    one run: its configuration, its compiled steps, its folder, its interruptions
    paper/       the paper's figures, and the comparison of many runs
    theory/      measurements of the SDE and of the local complexities
    noise_study/ measurements of gradient noise along training

`commands` and `__main__` are the command line. `figures`, `records`, `styles`, `tables`, `terminal`
and `_typing` are shared: they import nothing else of ours, and every room may use them. The
`__init__` of a room exports the names that other rooms use. CONTRIBUTING.md says which room may use
which others.
"""
