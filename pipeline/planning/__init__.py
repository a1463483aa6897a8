"""What a run will be, before anything is made.

``sizes`` counts it, ``mixing`` and ``calibration`` measure, ``fitting`` refuses; ``plan`` puts the four together and is
the way in; ``table`` shows what it found.
"""
