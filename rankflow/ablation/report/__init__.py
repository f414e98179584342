"""From the results of an ablation to a folder that people read: Markdown, HTML and figures.

Pure functions gather frozen rows from the results, put them into words as one document, and
render that document as Markdown, as HTML and for the terminal. The same results give the same
bytes.
"""
