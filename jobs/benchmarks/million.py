"""The arithmetic of a large job, from figures that were measured or counted, and others that are assumed."""

from __future__ import annotations

from dataclasses import dataclass

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class MillionEstimate:
    """Stable Diffusion 1.5 at 512 pixels. Every default says where it comes from; pass your own."""

    identities: int = 1_000_000
    prompts: int = 4
    """Pictures of an identity. Assumed."""
    references: int = 3
    """Reference images of an identity. Assumed."""
    steps: int = 25
    """The weights' default."""
    unet_tflop: float = 0.80
    """A U-Net forward of one row. Counted from the shapes."""
    decode_tflop: float = 2.5
    """A VAE decoding. Counted from the shapes."""
    encode_tflop: float = 0.162
    """CLIP ViT-L/14 on one reference. Counted from the shapes."""
    peak_tflops: float = 989.0
    """Dense bf16 peak of the GPU: an H100's data sheet."""
    share_of_peak: float = 0.30
    """What of the peak the engine reaches. Assumed: no GPU was at hand."""
    cost_per_gpu_hour: float = 3.0
    """Assumed."""
    gpus: int = 64
    """Assumed."""
    cost_per_million_writes: float = 5.0
    """Assumed, as for lists."""
    cost_per_million_reads: float = 0.4
    """Assumed."""
    concept_bytes: int = 257 * 768 * 4
    """Of one reference, in float32. Counted from the shapes."""
    picture_bytes: int = 450_000
    """A PNG of 512 x 512. Assumed; WebP takes a sixth."""
    rows_per_second: float = 10_000.0
    """That the driver plans: measured, rows of 1.3 kB with four pictures each, one core of an AMD EPYC."""
    driver_bytes_per_row: float = 200.0
    """Measured: growth of the driver's memory by the plan of such rows, whose texts are much alike."""
    record_reads_per_second: float = 1600.0
    """That the driver makes at the end: 16 at once, 10 ms each. Assumed."""


def million(options: cli.Flat[MillionEstimate]) -> None:
    """Prints the page as Markdown."""
    print(page(options), end="")


def page(options: MillionEstimate) -> str:
    """The page: what goes in, what comes out, and where it would be tight."""
    pictures = options.identities * options.prompts
    denoise = 2 * options.steps * options.unet_tflop
    tflop = pictures * (denoise + options.decode_tflop) + options.identities * options.references * options.encode_tflop
    gpu_hours = tflop / (options.peak_tflops * options.share_of_peak) / 3600
    writes = 2 * pictures + options.identities
    reads = pictures + options.identities * (1 + options.references)
    lists = pictures // 1000
    storage = (writes + lists) / 1e6 * options.cost_per_million_writes + reads / 1e6 * options.cost_per_million_reads
    hours = gpu_hours / options.gpus
    plan_s, tell_s = options.identities / options.rows_per_second, pictures / options.record_reads_per_second
    again = options.identities * (options.prompts - 1) * options.references * options.encode_tflop
    rows = {
        "pictures": f"{pictures:,}",
        "arithmetic": f"{tflop / 1e6:,.0f} EFLOP, {100 * pictures * denoise / tflop:.0f} % of it the U-Net",
        "GPU hours": f"{gpu_hours:,.0f}",
        "GPU cost": f"{gpu_hours * options.cost_per_gpu_hour:,.0f}",
        f"time on {options.gpus} GPUs": f"{hours:,.1f} h",
        "storage writes": f"{writes:,}: a picture and a record for each picture, a concept for each identity",
        "storage reads": f"{reads:,}: references, a look for each concept, each record once at the end",
        "storage lists": f"{lists:,} pages of records at the start of a run over a full output",
        "cost of storage calls": f"{storage:,.0f}",
        "calls a second": f"{(writes + reads) / (hours * 3600):,.0f}",
        "stored": f"{pictures * options.picture_bytes / 1e12:.1f} TB of pictures, "
        f"{options.identities * options.references * options.concept_bytes / 1e12:.1f} TB of concepts",
        "the driver": f"plans for {plan_s / 60:.0f} min, reads records for {tell_s / 60:.0f} min at the end, "
        f"and holds {options.identities * options.driver_bytes_per_row / 1e6:,.0f} MB beside its 600 MB",
        "encoding once saves": f"{100 * again / (tflop + again):.1f} % of the arithmetic against once for each picture",
    }
    given = vars(options)
    lines = [
        "# A million identities",
        "",
        "What `python -m jobs.benchmark million` prints; every figure below the first table follows from those in it.",
        "",
        "| given | value | where it comes from |",
        "| --- | ---: | --- |",
        *(f"| {name} | {given[name]:,} | {source} |" for name, source in SOURCES.items()),
        "",
        "| follows | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "**The bottleneck** is the U-Net. Storage comes far behind: its calls cost "
        f"{100 * storage / (gpu_hours * options.cost_per_gpu_hour):.0f} % of the GPUs, and their rate is spread over "
        "256 prefixes of records. What does not scale with the GPUs is the driver, which plans before the first "
        "picture and reads every record after the last: "
        f"{100 * (plan_s + tell_s) / (hours * 3600):.0f} % of the time on "
        f"{options.gpus} GPUs. Beyond that, split the manifest and run one job for each part, into one output each.",
    ]
    return "\n".join(lines) + "\n"


SOURCES = {
    "identities": "the question",
    "prompts": "assumed, one picture each",
    "references": "assumed",
    "steps": "the weights' default, guided",
    "unet_tflop": "counted from the shapes, a row",
    "decode_tflop": "counted from the shapes, a picture",
    "encode_tflop": "counted from the shapes, a reference",
    "peak_tflops": "an H100's data sheet, dense bf16",
    "share_of_peak": "**assumed**: no GPU was at hand",
    "cost_per_gpu_hour": "assumed",
    "gpus": "assumed",
    "cost_per_million_writes": "assumed, also for lists",
    "cost_per_million_reads": "assumed",
    "concept_bytes": "counted from the shapes, a reference in float32",
    "picture_bytes": "assumed, a PNG; WebP takes about a sixth",
    "rows_per_second": "measured: planning rows of four pictures on one core of an AMD EPYC",
    "driver_bytes_per_row": "measured: the driver's growth by the plan of 100 000 rows, whose texts were much alike",
    "record_reads_per_second": "assumed: 16 at once, 10 ms each",
}
