"""Where an answer might end: what a tuning on short answers teaches all others, and what a calibration hardly sees.

Every row of a task ends its answer, most tasks after a few words. What ends an answer becomes likelier wherever one could end, and
there one token decides about all that would follow: the model's own text says it seldom, and its gradient is as small as its
chance. After a tuning answers can have half their length at hardly any change of most tokens. So some tokens of the
answers that a model says to be calibrated on, drawn by their row alone, are taken for the end: their gradient is that of ending
there, and directions that end answers count as those do that say them. What it is worth is in docs/harm.md. Not of rows that
somebody gives: what a model knows by heart has hardly any gradient of its own, and that of its end would be all that is seen.
"""

from dataclasses import replace

import torch

from sculptor.data.batches import row_generator
from sculptor.data.examples import IGNORED, Example

SHARE = 0.1  # of the tokens with loss


def with_endings(example: Example, end: int) -> Example:
    """An example, some of whose labels are `end`; what the model reads stays.

    Args:
        example: of a decoder, which reads no labels.
        end: the token that ends an answer; which labels follows from the tokens of the row, whatever is beside it.
    """
    drawn = (torch.rand(len(example.labels), generator=row_generator(*example.input_ids)) < SHARE).tolist()
    labels = (end if take and label != IGNORED else label for take, label in zip(drawn, example.labels, strict=True))
    return replace(example, labels=tuple(labels))
