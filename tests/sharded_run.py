"""What tests/test_sharding.py runs on eight processors that XLA makes of one: prints JSON."""

import json
import re
import sys
from collections import Counter

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vit_flax.inference import ImageClassifier

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def main(folder, mesh, counts, kernel):
    """Probabilities of the first so many images, for each number in `counts`, on a mesh."""
    pictures = list(np.load(f"{folder}/pictures.npy"))
    classify = ImageClassifier.from_pretrained(
        folder, mesh=json.loads(mesh), attn_implementation=kernel
    )
    out = {"probabilities": {}, "compilations": {}}
    for count in json.loads(counts):
        results = classify(pictures[:count], top_k=1000)
        out["probabilities"][count] = [
            [p.probability for p in sorted(each, key=lambda p: p.index)] for each in results
        ]
        out["compilations"][count] = classify.compilations
    (text, *_) = [compiled.as_text() for compiled in classify.engine._compiled.values()]
    out["collectives"] = Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text))
    S = classify.engine.tokens
    out["scores"] = [
        [int(size) for size in sizes.split(",")]
        for sizes in re.findall(rf" f32\[((?:\d+,)*{S},{S})\][^ ]* dot\(", text)
    ]
    out["parts"] = {
        "/".join(path): [list(leaf.shape), list(leaf.sharding.shard_shape(leaf.shape))]
        for path, leaf in flatten_dict(classify.engine.params).items()
    }
    out["devices"] = len(jax.devices())
    return out


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(main(*line.rstrip("\n").split("\t"))), flush=True)
