"""How fast, how exact and how small a scan is: measured against Spectrum's precision and numpy's, side by side.

    python -m benchmarks --suite ci -o now.json
    python -m benchmarks --suite full --workload llama3-8b-layer
    python -m benchmarks --model path/to/checkpoint
    python -m benchmarks --help

Times depend on the machine and on who else uses it; ratios of times taken in alternation in one run depend on
them far less. So everything here is a ratio: to Spectrum's precision, to numpy's, to the parts of the scan
(reading alone, computing alone), and to the floor, which is the time that the flops of half a Gram matrix and
of its tridiagonalization (`costs.flops`) would take at the rate of this machine's matrix product.

Reading order:

    spectra.py      singular values worth testing, chosen and therefore known
    matrices.py     a dense matrix that has them, made without an SVD
    workloads.py    the suites: which shapes, how many, with which spectra
    checkpoints.py  a workload as a folder of safetensors
    contenders.py   what is timed: our scan, Spectrum's precision, numpy's, reading alone, computing alone
    worker.py       a process for each contender, watched from outside for its peak memory
    measuring.py    contenders in alternation, and the scores against the known ones
    results.py      the numbers: ratios, JSON
    report.py       the numbers as tables
    regression.py   the numbers against those of an earlier run

What is timed is a whole scan, from the path to the scores, with the page cache warm (or emptied before every
timing, with --cold) and without the start of the process, imports, and the first, slow call into LAPACK.
pytest-benchmark is not used because it times functions one after another in its own process; here the
contenders take turns, and each has a process of its own because peak memory belongs to a process.

bfloat16. Timings are taken on bfloat16 checkpoints, as models are published. But rounding to 8 bits moves the
score of an ordinary spectrum by 1e-6 to 1e-4, and of one with values below the rounding by up to a fifth, so the
known values are no reference any more; and the dense matrices that are exact in 8 bits, such as Hadamard's with
scaled columns, have a trivial Gram matrix. So errors against the known spectrum are measured on a second
checkpoint with the same matrices in float32, in one more scan; that rounding moves an ordinary score by 1e-9
and a hard one by 2e-7 at most. What bfloat16 itself does to accuracy shows in the difference to the other
contenders' scores on the very same bytes; numpy's are float64 inside. The hard spectra are timed in float32
too: in bfloat16 they would be others.

Other programs. Threads that share a matrix wait for one another, so one busy program beside the benchmark can
slow a scan down a hundred times, and not all contenders alike. The tables say so when it happens.

In CI. Ratios are comparable between runs on the same kind of machine. Keep the JSON of the main branch and
compare every change with it; regressions make the exit code 1, whatever the times were:

    # on the main branch, then keep benchmarks.json (an artifact, a cache, a branch)
    python -m benchmarks --suite ci -o benchmarks.json

    # on a pull request, with the kept file
    python -m benchmarks --suite ci --against benchmarks.json

It needs two cores, 4 GB of memory, 2 GB of disk in the temporary folder, and less than three minutes.
"""
