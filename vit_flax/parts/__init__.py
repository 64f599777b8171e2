"""Parts of the network of `model.py` that fields of the configuration choose: a file for each, and
`part.py`, which all of them share."""
