"""Features of a folder of images by Ray Data, on a cluster or on this machine.

    pip install ".[ray]"
    python examples/ray_features.py photos --output features --model facebook/dinov2-small

Without `--model` it is the small network of digits that the package ships. `vit features --on ray`
does more; this is the way into a pipeline of your own.
"""

from __future__ import annotations

import argparse

import ray

from vit_flax.inference.ray_data import ImageFeatures


def main() -> None:
    """Read, embed and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="folder or URI of images")
    parser.add_argument("--output", required=True, help="folder or URI for Parquet files")
    parser.add_argument("--model", help="folder, weights file or name on the Hub")
    parser.add_argument("--actors", type=int, default=1, help="copies of the model")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each of them")
    parser.add_argument("--address", default="local", help="a cluster; local starts one here")
    args = parser.parse_args()

    local = {"_node_ip_address": "127.0.0.1"} if args.address == "local" else {}
    ray.init(address=args.address, include_dashboard=False, log_to_driver=False, **local)
    images = ray.data.read_binary_files(args.images, include_paths=True)  # bytes and path
    features = images.map_batches(
        ImageFeatures,
        fn_constructor_kwargs={"model": args.model},
        batch_size=256,
        num_gpus=args.gpus,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
    )
    features.write_parquet(args.output)
    written = ray.data.read_parquet(args.output)
    print(f"{written.count()} rows with the columns {', '.join(written.schema().names)}")


if __name__ == "__main__":
    main()
