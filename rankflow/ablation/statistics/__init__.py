"""What a table of methods, tasks and seeds allows to say, and what it does not. Imports no torch.

Every statement rests on one estimate: the mean, over tasks, of a task's mean paired difference.
Tasks are fixed, seeds are the sample. Pairs are taken as independent: what a seed or a task does to
both methods cancels in the pair, but a seed that moved the *difference* the same way in every task
would not (see `rankflow.ablation.statistics.verdict`).
"""
