"""What a disk can do to a file."""

import random

FAULTS = ["bit", "zeros", "truncated", "empty", "deleted"]


def damage(path, fault, generator=None):
    """One of FAULTS, at a random place."""
    generator = generator or random.Random(0)
    content = bytearray(path.read_bytes())
    if fault == "deleted":
        return path.unlink()
    if fault == "bit":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif fault == "zeros":
        first = generator.randrange(max(1, len(content) - 64))
        content[first : first + 64] = bytes(len(content[first : first + 64]))
    else:
        content = content[: len(content) // 2 if fault == "truncated" else 0]
    return path.write_bytes(content)
