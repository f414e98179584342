"""``rankflow init``: a first run spec for a model and a data set, with the reasons beside it."""
