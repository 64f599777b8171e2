"""`vit search`: the images of a file of features that are most like a photo."""
