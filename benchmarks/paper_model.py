"""What more GPUs would bring, on paper: the gradients' all-reduce against the least time of a step.

    python -m benchmarks.paper_model

A model and not a measurement: the data sheets' rates, NCCL's own latencies, nothing hidden behind the
backward pass. DistributedDataParallel hides some of it, and real steps take longer than their least time.
"""

from dataclasses import dataclass

from benchmarks.harness import markdown
from fasttrain.model import EPOCH_IMAGES, build_model, training_flop_per_image
from fasttrain.recipe import Recipe

GPU_FLOP_PER_SEC = 989.4e12
"""bf16, dense. Source: NVIDIA's data sheet of the H100 SXM."""
NVLINK_BYTES_PER_SEC = 450e9
"""Each way and GPU, of the sheet's 900 GB/s both ways."""
PORT_BYTES_PER_SEC = 400e9 / 8
"""InfiniBand NDR, each way."""
RING_SECONDS, RING_NVLINK_SECONDS, RING_NETWORK_SECONDS = 8.4e-6, 3.4e-6, 9.6e-6
"""To begin, and for every hop. Source: NCCL, src/graph/tuning.cc, protocol Simple; so are the tree's."""
TREE_NVLINK_SECONDS, TREE_NETWORK_SECONDS, TREE_SHARE = 28e-6, 50e-6, 0.9


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs joined by NVLink; ports: InfiniBand's, of a node."""

    name: str
    nodes: int
    gpus: int
    ports: int

    @property
    def size(self) -> int:
        return self.nodes * self.gpus


CLUSTERS = {
    Cluster("8 GPUs, NVLink", 1, 8, 0): (512, 2048, 8192),
    Cluster("64 nodes of 8, a 400 Gb/s port a node", 64, 8, 1): (1024, 8192, 65_536),
    Cluster("64 nodes of 8, a 400 Gb/s port a GPU", 64, 8, 8): (1024, 8192, 65_536),
}
"""Each with the batches to look at, of all its GPUs together."""


def all_reduce_seconds(cluster: Cluster, num_bytes: float) -> float:
    """The better of NCCL's ring and tree: what every GPU waits until it has the sum of all.

    In a ring each of n GPUs sends 2 (n - 1) / n of the bytes, in as many hops as 2 (n - 1).
    """
    bytes_per_sec, hops = NVLINK_BYTES_PER_SEC, 2 * (cluster.size - 1)
    network_hops = 2 * (cluster.nodes - 1)
    if cluster.nodes > 1:
        bytes_per_sec = min(bytes_per_sec, cluster.ports * PORT_BYTES_PER_SEC)
    ring = hops / cluster.size * num_bytes / bytes_per_sec + RING_SECONDS
    ring += (hops - network_hops) * RING_NVLINK_SECONDS + network_hops * RING_NETWORK_SECONDS
    levels = (cluster.nodes - 1).bit_length()
    tree = 2 * num_bytes / (TREE_SHARE * bytes_per_sec)
    tree += 2 * ((cluster.gpus - 1) * TREE_NVLINK_SECONDS + levels * TREE_NETWORK_SECONDS)
    return min(ring, tree)


def table() -> str:
    """The model as a table with its caption."""
    model = build_model(Recipe(), num_classes=10)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    image_seconds = training_flop_per_image(model) / GPU_FLOP_PER_SEC
    rows, even = [], []
    for cluster, batch_sizes in CLUSTERS.items():
        reduce_seconds = all_reduce_seconds(cluster, 4 * parameters)
        halved = all_reduce_seconds(cluster, 2 * parameters)
        even.append(f"{reduce_seconds / image_seconds:,.0f} ({halved / image_seconds:,.0f} in bf16)")
        for batch_size in batch_sizes:
            alone = batch_size * image_seconds
            together = alone / cluster.size + reduce_seconds
            rows.append(
                [
                    cluster.name,
                    f"{batch_size:,}",
                    f"{batch_size // cluster.size:,}",
                    f"{1e3 * alone / cluster.size:.3f}",
                    f"{1e3 * reduce_seconds:.3f}",
                    f"{alone / together:,.1f}x",
                    f"{alone / together / cluster.size:.0%}",
                ]
            )
    columns = ["model, not measured", "batch", "per GPU", "least step, ms", "all-reduce, ms"]
    columns += ["against one GPU", "of perfect"]
    return (
        f"{markdown(columns, rows)}\n\nComputed, not measured. A step's least time is set by the matrix "
        "products, the exchange follows it with no overlap, and NCCL takes its ring or its tree, whichever "
        "is faster.\n\n"
        f"- Least time of a step: {training_flop_per_image(model) / 1e9:.2f} GFLOP per image at "
        f"{GPU_FLOP_PER_SEC / 1e12:,.0f} TFLOP/s (H100 SXM, bf16, data sheet).\n"
        f"- All-reduce: {4 * parameters / 1e6:.1f} MB of float32 gradients of {parameters:,} parameters; "
        "2 (n - 1) / n of them pass through NVLink's "
        f"{NVLINK_BYTES_PER_SEC / 1e9:.0f} GB/s per GPU or the node's ports of "
        f"{PORT_BYTES_PER_SEC / 1e9:.0f} GB/s each, plus the latencies of NCCL's own table.\n"
        "- Images per GPU at which the exchange takes as long as the step's least time, in the order of the "
        f"table: {'; '.join(even)}.\n"
        f"- An epoch of {EPOCH_IMAGES:,} images has {EPOCH_IMAGES // 512} steps of 512, "
        f"{EPOCH_IMAGES // 8192} of 8,192 and none of 65,536."
    )


if __name__ == "__main__":
    print(table())
