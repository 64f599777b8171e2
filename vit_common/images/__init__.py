"""Images: finding, decoding and preparing them, and naming what a classifier saw."""
