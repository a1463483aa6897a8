"""Random commands of the whole command line, with random faults, against a model of what must exist.

Everything that the commands can make is made once without faults, in a store of its own (``questions``): these are the
only artifacts, and the only bytes, that may ever appear. Then, one after the other, and now and then two at once,
commands run in processes of their own (``processes``), and are killed, stopped, given a disk that is full, or meet
files that were flipped, cut, emptied or removed, here or in the remote. After each, every artifact is hashed again
(``model``), with nothing of the product: what is there must be what was there before, or new and whole; what is damaged
must be what was damaged on purpose, and ``verify`` must say just that. What a command says is compared with the model
as well.

What is done is in the rooms ``making``, ``damaging``, ``sharing``, ``tidying`` and ``looking``; ``actions`` lists it.
Run it by itself for as long as wanted::

    python -m tests.faults.soak PRESET.toml FOLDER --seconds 3600 --seed 1
"""
