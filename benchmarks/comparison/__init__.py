"""Fine-tuning methods side by side on real weights and data; `benchmarks/methods.py` runs it.

    files.py     the data folder: texts, and which of them stand in two parts
    tasks.py     a task: a model with a head, arrays of examples, and a score
    places.py    the places of a model that methods are put at
    rows.py      the methods, with the rates they are swept over
    cell.py      one method on one task: compiled once, then run at any rate from any seed
    costs.py     what a method costs: time, FLOPs, memory, and what the model forgets
    source.py    a source without its comments, docstrings and formatting
    code.py      the hash of the code that a run depends on
    records.py   finished runs, one line each, what their examples came to, and what is carried
    significance.py  the error of a gap between two runs
    protocol.py  which runs there are, and how a rate is chosen
    report.py    summary, table and figures, from the finished runs alone

N examples, B rows, T tokens, S numbers that an example contributes to a score.
"""
