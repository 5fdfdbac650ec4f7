"""Environments of other libraries, each behind an extra of its own.

What all of them promise: a task id names a seed, splits hold different seeds,
a malformed response is a turn without effect. What none of them promises: that
two seeds are two different tasks, and that a lost episode can be rewound other
than by playing it again.
"""
