"""Is it learning? Pictures of validation subjects at fixed seeds, and what the judges see in them."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from PIL import Image

from instantbooth import Personalizer
from instantbooth.evaluation.miniature import Examination, draw_subjects
from instantbooth.images import decode_image
from pipelines.feed import Shards

REFERENCES = 3
PROMPTS = 2


def validation_pictures(booth: Personalizer, shards: Shards, count: int) -> Image.Image | None:
    """The first pairs of the split beside what the model makes of their subjects and captions; seed n for pair n.

    None where the split is empty.
    """
    rows = list(islice(shards.read_rows(), count))
    if not rows:
        return None
    references = [decode_image(row["image"], name=row["id"]).convert("RGB") for row in rows]
    masks = [decode_image(row["mask"], name=row["id"]).convert("L") for row in rows]
    # An ingestion may know more nouns than the model does; with a mask given, only the prompt says them.
    concepts = [
        replace(booth.encode([image], masks=[mask]), class_noun=row["noun"])
        for image, mask, row in zip(references, masks, rows, strict=True)
    ]
    pictures = booth.generate([row["caption"] for row in rows], concepts, seed=list(range(len(rows))))
    side = booth.base.image_size
    sheet = Image.new("RGB", (side * len(rows), 2 * side))
    for column, pair in enumerate(zip(references, pictures, strict=True)):
        for line, image in enumerate(pair):
            sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (column * side, line * side))
    return sheet


def judged(booth: Personalizer, judges: Path, identities: int) -> dict[str, float]:
    """Identification and prompt accuracy on the miniature world's validation identities."""
    subjects = draw_subjects("validation", identities, references=REFERENCES, prompts=PROMPTS)
    exam = Examination(booth, judges, subjects)
    pictures = exam.personalized(exam.concepts(REFERENCES))
    return {
        "validation/identification_top1": exam.identification_top1(pictures),
        "validation/identity_similarity": exam.similarity(pictures),
        "validation/prompt_accuracy": exam.prompt_accuracy(pictures),
    }
