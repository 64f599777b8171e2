"""The names of the 1000 classes of ImageNet (ILSVRC-2012), in the order models number them.

The order is that of the sorted identifiers of WordNet's synsets, which every model trained on
ILSVRC-2012 has, those of google/vit-base-patch16-224 for one; a name is all the words of the
synset, parted by ", ". So class 281 is "tabby, tabby cat". Two classes have one name, "crane": 134
is the bird, 517 the machine.

Source of imagenet_labels.txt: `imagenet_synsets.txt` (which lies beside it) and
`imagenet_synset_to_lemma.txt` of timm 1.0.31 (`timm/data/_info`, Apache-2.0), put together line by
line. The words are those of WordNet,
whose licence allows any use and has to stay with the words:

    WordNet Release 3.0

    This software and database is being provided to you, the LICENSEE, by Princeton University
    under the following license. By obtaining, using and/or copying this software and database,
    you agree that you have read, understood, and will comply with these terms and conditions.:

    Permission to use, copy, modify and distribute this software and database and its
    documentation for any purpose and without fee or royalty is hereby granted, provided that you
    agree to comply with the following copyright notice and statements, including the disclaimer,
    and that the same appear on ALL copies of the software, database and documentation, including
    modifications that you make for internal use or for distribution.

    WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.

    THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO
    REPRESENTATIONS OR WARRANTIES, EXPRESS OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION,
    PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES OF MERCHANTABILITY OR FITNESS FOR
    ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE, DATABASE OR DOCUMENTATION
    WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.

    The name of Princeton University or Princeton may not be used in advertising or publicity
    pertaining to distribution of the software and/or database. Title to copyright in this
    software, database and any associated documentation shall at all times remain with Princeton
    University and LICENSEE agrees to preserve same.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

__all__ = ["imagenet_labels", "imagenet_synsets"]


@cache
def imagenet_labels() -> tuple[str, ...]:
    """The 1000 names; the index is the class. Read at the first call."""
    return _lines("imagenet_labels.txt")


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1000 identifiers in WordNet 3.0, such as "n01440764"; the index is the class. Copies of
    ILSVRC-2012 name their folders so. Read at the first call."""
    return _lines("imagenet_synsets.txt")


def _lines(name: str) -> tuple[str, ...]:
    text = files("vit_common.images").joinpath(name).read_text(encoding="utf-8")
    return tuple(text.splitlines())
