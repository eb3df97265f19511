"""`edgeforge check`: holds artifacts against a policy and a baseline, for continuous integration."""
