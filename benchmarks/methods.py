"""Fine-tuning methods side by side on real weights and data: python benchmarks/methods.py --json

MiniLM on SNIPS (slots, span F1), TREC (questions, accuracy) and, as a parity row, Banking77;
stories260k on E2E NLG (BLEU on 200 meaning representations, loss on all). The data folder is
JAXPEFT_DATA, ../shared/data without it.

A run is 150 optimizer steps of 32 sequences of at most 48 tokens (E2E: 16 of at most 160). Every
method trains the same head from the same start at the same rate; the probe is that head alone (on
E2E the final norm and an untied copy of the head). Three rates a factor of three apart around a
centre per family (comparison/rows.py has them with their sources), and one more where the best is
an edge, are swept on the validation parts of SNIPS and E2E with seed 0; TREC takes the encoder's
rate. Then seeds 0, 1 and 2 on test. LoRA's descendants, rotations, sparse deltas, mixtures and
LoRA at ranks 1 to 64 are swept on SNIPS, take their centre on E2E, and have no row on TREC. Full
fine-tuning, BitFit and LoRA also train on 100 and 1,000 examples of SNIPS and TREC, at the rates
found on all.

EVA, CorDA and LoRA-GA are told of eight batches of the task's own, seen by the base with a trained
head. Mixtures are of one task, the only one that there is here. X-LoRA weighs adapters that are
trained beforehand and has no row; pruning has its own in named.py, LongLoRA in longlora.py.

A finished run is a line of results/methods.jsonl, so a repeated command goes on where it was
killed; it starts anew where a change of code has changed what is computed.

    --cell METHOD TASK   does one again
    --methods A B ...    runs these alone
    --workers N          N processes, each on its part of the cores, share the work: on two cores,
                         two take four fifths of the time of one. So do commands that are started
                         side by side
    --short              20 steps, fewer methods, no sweep: seven minutes with two workers, into
                         results/methods.short.jsonl, and no quality to speak of
    --table              writes results/methods.md and methods.png from the runs and runs nothing
    --json               the last line is the summary

About thirteen hours on 2 cores, estimated: these are 536 runs, and 164 of them took 238 minutes.
"""

import os
import sys

if __name__ == "__main__":  # before jax starts
    # The default scheduler trades memory for overlap: it would be measured instead.
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from comparison.command import main
from comparison.protocol import SHORT, WHOLE

if __name__ == "__main__":
    sys.exit(main("methods", WHOLE, SHORT))
