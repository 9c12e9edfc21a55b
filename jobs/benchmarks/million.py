"""The arithmetic of a large job, from figures that were measured or counted, and others that are assumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, get_type_hints

from tyro.conf import arg

from jobs import cli
from jobs.benchmarks.peak import H100_TFLOPS


@dataclass(frozen=True, kw_only=True)
class MillionEstimate:
    """Stable Diffusion 1.5 at 512 pixels. Every figure says where it comes from; pass your own."""

    identities: Annotated[int, arg(help="the question")] = 1_000_000
    prompts: Annotated[int, arg(help="of an identity, one picture each: assumed")] = 4
    references: Annotated[int, arg(help="of an identity: assumed")] = 3
    steps: Annotated[int, arg(help="of a picture, guided: the weights' default")] = 25
    unet_tflop: Annotated[
        float,
        arg(help="of a guided step, 0.80 for its bare row and 1.01 with adapters: counted from the shapes"),
    ] = 1.82
    decode_tflop: Annotated[float, arg(help="of a picture: counted from the shapes")] = 2.5
    encode_tflop: Annotated[float, arg(help="of a reference: counted from the shapes")] = 0.162
    peak_tflops: Annotated[float, arg(help="of a GPU, dense bf16: an H100's data sheet")] = H100_TFLOPS
    share_of_peak: Annotated[
        float, arg(help="**assumed, not measured**: pass what `benchmark bulk --full-size` finds on your GPU")
    ] = 0.30
    cost_per_gpu_hour: Annotated[float, arg(help="assumed")] = 3.0
    gpus: Annotated[int, arg(help="assumed")] = 64
    cost_per_million_writes: Annotated[float, arg(help="and of lists: assumed")] = 5.0
    cost_per_million_reads: Annotated[float, arg(help="assumed")] = 0.4
    concept_bytes: Annotated[int, arg(help="of a reference, in float32: counted from the shapes")] = 257 * 768 * 4
    picture_bytes: Annotated[int, arg(help="of a PNG; WebP takes about a sixth: assumed")] = 450_000
    rows_per_second: Annotated[
        float, arg(help="that the driver plans, four pictures each: measured on one core of an AMD EPYC")
    ] = 10_000.0
    driver_bytes_per_row: Annotated[
        float, arg(help="of the driver's memory: measured with 100 000 rows, whose texts were much alike")
    ] = 200.0
    record_reads_per_second: Annotated[
        float, arg(help="that the driver makes at the end: assumed, 16 at once, 10 ms each")
    ] = 1600.0

    @property
    def pictures(self) -> int:
        """All of them."""
        return self.identities * self.prompts

    @property
    def denoise_tflop(self) -> float:
        """Of one guided picture."""
        return self.steps * self.unet_tflop

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
        """All of the job."""
        return 2 * self.pictures + self.identities

    @property
    def reads(self) -> int:
        """All of the job."""
        return self.pictures + self.identities * (2 + self.references)

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
        "| given | value | what it is, and where it comes from |",
        "| --- | ---: | --- |",
        *(f"| {name} | {getattr(given, name):,} | {source} |" for name, source in _sources()),
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


def _sources() -> Iterator[tuple[str, str]]:
    """Field → what it is, and where its default comes from."""
    for name, hint in get_type_hints(MillionEstimate, include_extras=True).items():
        yield name, hint.__metadata__[0].help


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
        "storage reads": f"{given.reads:,}: references, two looks for each concept, each record once at the end",
        "storage lists": f"{given.pictures // 1000:,} pages of records where the output is full already",
        "cost of storage calls": f"{given.storage_cost:,.0f}",
        "calls a second": f"{(given.writes + given.reads) / (hours * 3600):,.0f}",
        "stored": f"{pictures_tb:.1f} TB of pictures, {concepts_tb:.1f} TB of concepts",
        "the driver": f"plans for {plan_s / 60:.0f} min, reads records for {tell_s / 60:.0f} min at the end, and holds "
        f"{given.identities * given.driver_bytes_per_row / 1e6:,.0f} MB beside its 600 MB",
        "encoding once saves": f"{100 * again / (given.tflop + again):.1f} % of the arithmetic",
    }
