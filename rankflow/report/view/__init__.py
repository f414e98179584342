"""The interactive view of a run's events, one for TensorBoard and for the HTML report.

Python decides what is shown (places, colours, numbers), the scripts beside this file draw it.
"""
