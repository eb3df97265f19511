"""Weight formats, plans, quantizers, the ``edgeforge::`` torch operators, and the rewrite."""

DISTRIBUTION = "edgeforge"
