"""Streams for tests, by flat keywords."""

from rcmae.data.stream import BadLimits, Readers, Share, Stream
from rcmae.data.views import Views


def flat_stream(*, index, plan, on_device=None, **options):
    """A stream of an index in the order of a plan.

    Args:
        options: fields of `Views`, `Share` and `Readers`; and max_bad_fraction, max_bad_in_a_row.
    """

    def taken(kind):
        names = [name for name in kind.__dataclass_fields__ if name in options]
        return kind(**{name: options.pop(name) for name in names})

    bad = BadLimits(options.pop("max_bad_fraction", 0.001), options.pop("max_bad_in_a_row", 100))
    parts = {"views": taken(Views), "share": taken(Share), "readers": taken(Readers), "bad": bad}
    assert not options, options
    return Stream(index=index, plan=plan, on_device=on_device, **parts)
