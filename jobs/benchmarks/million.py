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

    @property
    def pictures(self) -> int:
        """All of them."""
        return self.identities * self.prompts

    @property
    def denoise_tflop(self) -> float:
        """Of one guided picture."""
        return 2 * self.steps * self.unet_tflop

    @property
    def encode_all_tflop(self) -> float:
        """Every reference once."""
        return self.identities * self.references * self.encode_tflop

    @property
    def tflop(self) -> float:
        """The whole job."""
        return self.pictures * (self.denoise_tflop + self.decode_tflop) + self.encode_all_tflop

    @property
    def gpu_hours(self) -> float:
        """On all GPUs together."""
        return self.tflop / (self.peak_tflops * self.share_of_peak) / 3600

    @property
    def writes(self) -> int:
        """A picture and a record for each picture, a concept for each identity."""
        return 2 * self.pictures + self.identities

    @property
    def reads(self) -> int:
        """References, a look for each concept, each record once at the end."""
        return self.pictures + self.identities * (1 + self.references)

    @property
    def storage_cost(self) -> float:
        """Of the calls."""
        return (self.writes * self.cost_per_million_writes + self.reads * self.cost_per_million_reads) / 1e6

    @property
    def driver_s(self) -> tuple[float, float]:
        """Seconds before the first picture, and after the last."""
        return self.identities / self.rows_per_second, self.pictures / self.record_reads_per_second


def million(options: cli.Flat[MillionEstimate]) -> None:
    """Prints the page as Markdown."""
    print(page(options), end="")


def page(given: MillionEstimate) -> str:
    """The page: what goes in, what comes out, and where it would be tight."""
    storage = 100 * given.storage_cost / (given.gpu_hours * given.cost_per_gpu_hour)
    driver = 100 * sum(given.driver_s) / (given.gpu_hours / given.gpus * 3600)
    lines = [
        "# A million identities",
        "",
        "What `python -m jobs.benchmark million` prints; all else follows from the first table.",
        "",
        "| given | value | where it comes from |",
        "| --- | ---: | --- |",
        *(f"| {name} | {getattr(given, name):,} | {source} |" for name, source in SOURCES.items()),
        "",
        "| follows | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _follows(given).items()),
        "",
        f"**The bottleneck** is the U-Net. Storage comes far behind: its calls cost {storage:.0f} % of what GPUs do,",
        "and their rate is spread over 256 prefixes of records. What does not scale with the GPUs is the driver, which",
        f"plans before the first picture and reads every record after the last: {driver:.0f} % of the time on "
        f"{given.gpus} GPUs.",
        "Beyond that, split the manifest and run a job for each part, into an output of its own.",
    ]
    return "\n".join(lines) + "\n"


def _follows(given: MillionEstimate) -> dict[str, str]:
    hours = given.gpu_hours / given.gpus
    plan_s, tell_s = given.driver_s
    unet = 100 * given.pictures * given.denoise_tflop / given.tflop
    again = (given.prompts - 1) * given.encode_all_tflop
    pictures_tb = given.pictures * given.picture_bytes / 1e12
    concepts_tb = given.identities * given.references * given.concept_bytes / 1e12
    return {
        "pictures": f"{given.pictures:,}",
        "arithmetic": f"{given.tflop / 1e6:,.0f} EFLOP, {unet:.0f} % of it the U-Net",
        "GPU hours": f"{given.gpu_hours:,.0f}",
        "GPU cost": f"{given.gpu_hours * given.cost_per_gpu_hour:,.0f}",
        f"time on {given.gpus} GPUs": f"{hours:,.1f} h",
        "storage writes": f"{given.writes:,}: a picture and a record for each picture, a concept for each identity",
        "storage reads": f"{given.reads:,}: references, a look for each concept, each record once at the end",
        "storage lists": f"{given.pictures // 1000:,} pages of records where the output is full already",
        "cost of storage calls": f"{given.storage_cost:,.0f}",
        "calls a second": f"{(given.writes + given.reads) / (hours * 3600):,.0f}",
        "stored": f"{pictures_tb:.1f} TB of pictures, {concepts_tb:.1f} TB of concepts",
        "the driver": f"plans for {plan_s / 60:.0f} min, reads records for {tell_s / 60:.0f} min at the end, and holds "
        f"{given.identities * given.driver_bytes_per_row / 1e6:,.0f} MB beside its 600 MB",
        "encoding once saves": f"{100 * again / (given.tflop + again):.1f} % of the arithmetic",
    }


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
