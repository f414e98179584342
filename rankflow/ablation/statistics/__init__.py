"""What a table of methods, tasks and seeds allows to say, and what it does not. Imports no torch.

Every statement rests on one estimate: the mean, over tasks, of a task's mean paired difference.
Tasks are fixed, seeds are the sample.
"""
